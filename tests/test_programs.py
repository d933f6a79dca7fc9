"""What a user meets: the programs, their output, their refusals. All on the embedded model."""

import io
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lexico import Dictionaries
from model import Config, Llama

ROOT = Path(__file__).parent.parent
HELD_OUT = ROOT / "tiny" / "held-out.txt"
CONFIG, WEIGHTS, DICTIONARY = (
    ROOT / "tiny" / name for name in ("config.json", "model.safetensors", "dictionary.safetensors"))
TINY = Config.from_pretrained("tiny")


def call(command):
    """Run a program in this process: exit code, standard output, standard error."""
    sys.argv, code = shlex.split(command), 0
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as error:
        try:
            runpy.run_path(ROOT / sys.argv[0], run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
    return code, out.getvalue(), error.getvalue()


def start(command):
    """Run a program as a process of its own, which Ctrl-C reaches even where it would not us."""
    return subprocess.Popen([sys.executable, "-u", *shlex.split(command)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


# generate.py

GOLDEN = ", there was a little girl named Lily. She loved to play with her toys and eat snack"


def test_a_line_for_every_token_then_the_text_the_summaries_and_how_far_they_agree(tmp_path):
    code, out, _ = call("generate.py --compare --max-new-tokens 40 --buffer 16 --window 1 "
                        f"--sparsity 6 --coding fp8 --json {tmp_path}/out.json")
    lines = re.findall(r"^ +(\d+)  .{16} +([\d.]+) +([\d.]+) +([\d.]+ \wB) +([\d.]+)%$", out, re.M)
    assert code == 0 and [int(line[0]) for line in lines] == list(range(1, 41))
    assert float(lines[0][4]) >= 100 and float(lines[-1][4]) < 75  # codes take over from the buffer
    figures = json.loads((tmp_path / "out.json").read_text())
    for words in ("Once upon a time" + figures["text"], "sparse:", "prefill", "tokens/s", "codes",
                  "buffer", "dictionaries", "memory", "dense:", "agreement:"):
        assert words in out
    assert 0 < figures["agreement"]["kl"] < 1 and 0.5 < figures["agreement"]["top1"] <= 1
    # To the byte: 3 s a coded vector, 2 m a dense one, here and in the buffer.
    cache, seen = figures["sparse"]["cache"], figures["sparse"]["prompt_tokens"] + 39
    vectors, dense = 2 * TINY.n_layers * TINY.kv_heads, 2 * TINY.head_dim
    assert cache["total"] == vectors * (3 * 6 * (seen - 16) + dense * 16)
    assert cache["dense"] == vectors * dense * seen <= figures["dense"]["cache"]["total"]


def test_a_quiet_text_depends_on_prompt_and_seed_and_not_on_where_the_prompt_comes_from(
        tmp_path, monkeypatch):
    assert call("generate.py --quiet --dense --max-new-tokens 20") == (0, f"{GOLDEN}\n", "")
    (tmp_path / "prompt").write_text("The little dog")
    monkeypatch.setattr(sys, "stdin", (tmp_path / "prompt").open())
    first, *same, other = (
        call(f"generate.py --quiet --max-new-tokens 15 --temperature 0.8 --top-p 0.9 {options}")
        for options in ("--prompt 'The little dog'", f"--prompt-file {tmp_path}/prompt",
                        "--prompt -", "--prompt 'The little dog' --seed 1"))
    assert first[0] == 0 and same == [first] * 2 and other != first


REFUSED = {  # each command, and words of the line that says why
    "generate.py": {
        "--prompt ' '": "prompt is empty", "--prompt-file absent": "No such file",
        "--prompt-file latin": "not UTF-8", "--prompt-file long": "than the model's context",
        "--sparsity 0": "sparsity 0", "--sparsity 65": "sparsity 65", "--sparsity x": "sparsity x",
        "--top-p 0": "--top-p 0", "--max-new-tokens 0": "--max-new-tokens 0",
        "--batch x": "--batch", "--chat --batch 2": "--batch 2", "--device abacus": "abacus",
        "--chat --random-weights": "not allowed with",
        "--dictionary absent": "does not exist", "--dictionary latin": "is damaged",
        "--dictionary short": "is damaged", f"--dictionary {WEIGHTS}": "not a dictionary",
        "--model absent": "does not exist", "--model nobody/nothing": "nobody/nothing",
        "--model other": "python train_dict.py --model", "--model cut --dense": "damaged",
        f"--model other --dictionary {DICTIONARY}": "n_layers",
        "--json no/o --max-new-tokens 1": "cannot be writ", "--chat --json o": "--chat goes",
        "--sparsity auto:90%": "outside 3.9% .. 41.4%", "--device meta": "--device meta",
        "--window 0": "--window 0", "--seed -1": "--seed -1"},
    "train_dict.py": {
        "--text absent": "No such file", "--text latin": "not UTF-8",
        "--text long": "too little text", "--text long --sparsity 65": "--sparsity 65",
        "--text long --atoms 7": "--atoms 7",
        f"--text {HELD_OUT} --device abacus": "--device abacus",
        f"--text {HELD_OUT} --resume --out d": "no checkpoint",
        f"--text {HELD_OUT} --resume --out cut": "cut exists",
        "--text long --out latin/d.safetensors": "name another place",
        f"--text {HELD_OUT} --resume --out r.safetensors": "is damaged"}}


def test_bad_input_gets_one_line_and_exit_code_2(learned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, data in (("latin", b"caf\xe9"), ("long", b"word " * 3000),
                       ("r.safetensors.checkpoint", b"no checkpoint"),
                       ("short", DICTIONARY.read_bytes()[:-100])):
        Path(name).write_bytes(data)
    for folder in ("other", "cut"):
        shutil.copytree(learned[0], folder)
    os.truncate("cut/model.safetensors", 10**6)
    for program, cases in REFUSED.items():
        for options, words in cases.items():
            code, _, error = call(f"{program} {options}")
            assert code == 2 and error.startswith("error: ") and words in error, (options, error)
            assert error.count("\n") == 1


def test_ctrl_c_ends_with_the_summary_so_far():
    process = start("generate.py --max-new-tokens 1500")
    next(line for line in process.stdout if line.startswith("    5"))
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=30)
    assert process.returncode == 130 and "interrupted" in out and "Traceback" not in error


# train_dict.py

ERROR = re.compile(r"keys ([\d.]+) values")


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """The folder of a model, the first layer of the embedded one, and of dictionaries "d" that an
    unbroken run learned for it; the run's command without --out, and what it printed."""
    folder, model = tmp_path_factory.mktemp("learned"), Llama.from_pretrained("tiny", "cpu")
    model.config, model.layers = replace(TINY, n_layers=1), model.layers[:1]
    model.save_pretrained(folder)
    shutil.copy(ROOT / "tiny" / "tokenizer.json", folder)
    command = (f"train_dict.py --model {folder} --text {HELD_OUT} --tokens 4096 --batch 1024 "
               "--atoms 128 --sparsity 4")
    code, out, _ = call(f"{command} --out {folder}/d.safetensors")
    assert code == 0
    return folder, command, out


def test_learning_lowers_the_held_out_error_and_fine_tuning_starts_from_there(learned, tmp_path):
    folder, command, out = learned
    first, last = map(float, ERROR.findall(out))
    assert last < first and "mean" in out
    d = Dictionaries.load(folder / "d.safetensors").check(Config.from_pretrained(folder))
    assert d.metadata["sparsity"] == 4 and d.metadata["text"] == ["held-out.txt"]
    torch.testing.assert_close(d.atoms.norm(dim=-1), torch.ones(2, 1, 128), atol=5e-3, rtol=0)
    parts = HELD_OUT.read_text().split("\n\n")  # the same text as JSON lines
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": part}) for part in parts))
    command = command.replace(str(HELD_OUT), f"{tmp_path}/text.jsonl")
    _, out, _ = call(f"{command} --out {tmp_path}/d.safetensors --fine-tune {folder}/d.safetensors")
    assert float(ERROR.findall(out)[0]) < first


def test_a_killed_run_resumes_to_what_an_unbroken_one_gives(learned, tmp_path):
    command = f"{learned[1]} --out {tmp_path}/d.safetensors --checkpoint-seconds 0"
    process = start(command)
    while not (tmp_path / "d.safetensors.checkpoint").exists():
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (tmp_path / "d.safetensors").exists()
    code, _, error = call(f"{command} --resume --tokens 8192")
    assert code == 2 and "--tokens 4096" in error
    assert call(f"{command} --resume")[0] == 0
    whole, resumed = load_file(learned[0] / "d.safetensors"), load_file(tmp_path / "d.safetensors")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert [path.name for path in tmp_path.iterdir()] == ["d.safetensors"]


# Every file, and the README

@pytest.mark.parametrize("command", [
    "model.py", "omp.py", "lexico.py", f"generate.py --random-weights --model {CONFIG} --compare "
    "--batch 2 --prompt-length 50 --max-new-tokens 3 --sparsity 4 --atoms 256"])
def test_every_file_runs_and_shows_something(command):
    code, out, _ = call(command)
    assert code == 0 and len(out) > 100 and out.count("50 + 3 tokens") == 2 * ("50" in command)


def test_the_readme_points_at_the_right_lines_its_commands_parse_and_its_main_one_runs():
    readme = (ROOT / "README.md").read_text()
    for name, file, line in re.findall(r"\[`(?:\w+\.)?(\w+)`\]\((\w+\.py)#L(\d+)\)", readme):
        there = (ROOT / file).read_text().splitlines()[int(line) - 1]
        assert re.match(rf" *(def|class) {name}\b", there), (name, there)
    commands = re.findall(r"^(?:.* && )?python (\w+\.py.*)$", readme, re.M)
    assert len(commands) > 5
    for command in commands:
        program, *options = shlex.split(command)
        known = call(f"{program} --help")[1] if options else ""
        assert all(option in known for option in options if option.startswith("--")), command
    code, out, _ = call(f"{commands[0]} --max-new-tokens 20")
    assert code == 0 and GOLDEN in out
