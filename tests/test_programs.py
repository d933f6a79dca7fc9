"""What a user meets: the programs, their output, their refusals. All on the embedded model."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import generate
import train_dict
from lexico import Dictionaries
from model import Config, Llama, run_program

ROOT = Path(__file__).parent.parent
HELD_OUT = ROOT / "tiny" / "held-out.txt"


def call(program, *options, capsys=None):
    """Run a program's main in this process: exit code, standard output, standard error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["program", *map(str, options)])
        with pytest.raises(SystemExit) as stop:
            run_program(program.main)
    return (stop.value.code or 0, *capsys.readouterr())


def python(*arguments, **options):
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True,
                          cwd=ROOT, timeout=60, **options)


# generate.py

GOLDEN = ", there was a little girl named Lily. She loved to play with her toys and eat snack"


def test_a_line_for_every_token_then_the_text_then_the_summary(capsys, tmp_path):
    code, out, _ = call(generate, "--max-new-tokens", 40, "--buffer", 16, "--sparsity", 6,
                        "--json", tmp_path / "out.json", capsys=capsys)
    lines = re.findall(r"^ +(\d+)  .{16} +([\d.]+) +([\d.]+) +([\d.]+ \wB) +([\d.]+)%$", out, re.M)
    assert code == 0 and [int(line[0]) for line in lines] == list(range(1, 41))
    shares = [float(line[4]) for line in lines]
    assert shares[0] >= 100 and shares[-1] < 75  # as codes take over from the buffer
    figures = json.loads((tmp_path / "out.json").read_text())
    assert "Once upon a time" + figures["text"] in out
    for word in ("prefill", "tokens/s", "codes", "buffer", "dictionaries", "memory"):
        assert word in out
    # to the byte: 3 s a coded vector, 2 m a vector in the buffer
    config, cache = Config.from_pretrained("tiny"), figures["sparse"]["cache"]
    seen = figures["sparse"]["prompt_tokens"] + 39
    vectors = 2 * config.n_layers * config.kv_heads
    assert cache["codes"] == 3 * 6 * vectors * (seen - 16)
    assert cache["buffer"] == 2 * config.head_dim * vectors * 16
    assert cache["dense"] == 2 * config.head_dim * vectors * seen


def test_quiet_prints_the_golden_text_alone_and_seeds_repeat(capsys):
    _, dense, _ = call(generate, "--quiet", "--dense", "--max-new-tokens", 20, capsys=capsys)
    assert dense.strip() == GOLDEN
    options = ("--quiet", "--max-new-tokens", 30, "--temperature", 0.8, "--top-p", 0.9, "--seed")
    first, again, other = (call(generate, *options, seed, capsys=capsys)[1] for seed in (1, 1, 2))
    assert first == again != other
    assert "ms" not in first and "%" not in first


def test_compare_shows_both_caches_and_how_far_they_agree(capsys, tmp_path):
    code, out, _ = call(generate, "--compare", "--max-new-tokens", 30, "--buffer", 8,
                        "--json", tmp_path / "out.json", capsys=capsys)
    figures = json.loads((tmp_path / "out.json").read_text())
    assert code == 0 and "dense:" in out and "sparse:" in out
    assert figures["dense"]["cache"]["total"] > figures["sparse"]["cache"]["total"]
    assert 0 < figures["agreement"]["kl"] < 1 and 0.5 < figures["agreement"]["top1"] <= 1


def test_prompts_come_from_files_and_standard_input(capsys, tmp_path):
    (tmp_path / "prompt.txt").write_text("The little dog")
    options = ("--quiet", "--max-new-tokens", 8)
    texts = {call(generate, *options, *source, capsys=capsys)[1] for source in (
        ("--prompt", "The little dog"), ("--prompt-file", tmp_path / "prompt.txt"))}
    texts.add(python("generate.py", *options, "--prompt", "-", input="The little dog").stdout)
    assert len(texts) == 1


def test_bad_input_gets_one_line_and_exit_code_2(capsys, tmp_path):
    other = Config(**{**vars(Config.from_pretrained("tiny")), "n_layers": 1})
    Llama.random(other, "cpu").save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").write_bytes((ROOT / "tiny/tokenizer.json").read_bytes())
    (tmp_path / "cut").mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        data = (ROOT / "tiny" / name).read_bytes()
        (tmp_path / "cut" / name).write_bytes(data[:-1000] if name.startswith("model") else data)
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "long").write_text("word " * 3000)
    foreign = ["--dictionary", ROOT / "tiny" / "dictionary.safetensors"]
    for program, options, words in (
            (generate, ["--prompt", " "], "prompt is empty"),
            (generate, ["--prompt-file", tmp_path / "empty"], "prompt is empty"),
            (generate, ["--prompt-file", tmp_path / "absent"], "No such file"),
            (generate, ["--prompt-file", tmp_path / "latin"], "not UTF-8"),
            (generate, ["--prompt-file", tmp_path / "long"], "more than the model's context"),
            (generate, ["--sparsity", 0], "sparsity 0"),
            (generate, ["--sparsity", 65], "sparsity 65"),
            (generate, ["--top-p", 0], "--top-p 0"),
            (generate, ["--max-new-tokens", 0], "--max-new-tokens 0"),
            (generate, ["--device", "abacus"], "--device abacus"),
            (generate, ["--dictionary", tmp_path / "absent"], "does not exist"),
            (generate, ["--dictionary", ROOT / "tiny/model.safetensors"], "not a dictionary"),
            (generate, ["--model", tmp_path / "absent"], "does not exist"),
            (generate, ["--model", tmp_path / "other"], "python train_dict.py --model"),
            (generate, ["--model", tmp_path / "other", *foreign], "n_layers"),
            (generate, ["--model", tmp_path / "cut", "--dense"], "damaged"),
            (generate, ["--json", tmp_path / "no" / "o", "--max-new-tokens", 1], "cannot be writ"),
            (train_dict, ["--text", tmp_path / "absent"], "No such file"),
            (train_dict, ["--text", tmp_path / "latin"], "not UTF-8"),
            (train_dict, ["--text", tmp_path / "long"], "too little text"),
            (train_dict, ["--text", HELD_OUT, "--sparsity", 65], "--sparsity 65"),
            (train_dict, ["--text", HELD_OUT, "--atoms", 7], "--atoms 7"),
            (train_dict, ["--text", HELD_OUT, "--resume", "--out", tmp_path], "no checkpoint")):
        code, _, error = call(program, *options, capsys=capsys)
        assert code == 2 and words in error, (options, error)
        assert error.startswith("error: ") and "Traceback" not in error


def test_an_unreachable_hub_id_is_one_line(tmp_path):
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = python("generate.py", "--model", "nobody/nothing", env=offline)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "nobody/nothing" in result.stderr


def test_ctrl_c_ends_with_the_summary_so_far():
    process = subprocess.Popen([sys.executable, "-u", "generate.py", "--max-new-tokens", "1500"],
                               cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("    5"):
            process.send_signal(signal.SIGINT)
            break
    out, error = process.communicate(timeout=30)
    assert process.returncode == 130 and "interrupted" in out and "Traceback" not in error


# train_dict.py

SHORT = ("--text", HELD_OUT, "--tokens", 4096, "--batch", 1024, "--atoms", 128, "--sparsity", 4)


def test_learning_lowers_the_error_on_held_out_text_and_says_what_it_did(capsys, tmp_path):
    code, out, _ = call(train_dict, *SHORT, "--out", tmp_path / "d", capsys=capsys)
    errors = [float(e) for e in re.findall(r"keys ([\d.]+) values", out)]
    assert code == 0 and errors[-1] < errors[0] and "mean" in out
    d = Dictionaries.load(tmp_path / "d").check(Config.from_pretrained("tiny"))
    assert d.metadata["sparsity"] == 4 and d.metadata["text"] == ["held-out.txt"]
    norms = d.atoms.norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms), atol=5e-3, rtol=0)


def test_jsonl_is_text_too_and_fine_tuning_starts_from_what_is_there(capsys, tmp_path):
    text = HELD_OUT.read_text()
    parts = [json.dumps({"text": text[i:i + 1000]}) for i in range(0, len(text), 1000)]
    (tmp_path / "text.jsonl").write_text("\n".join(parts))
    options = ["--text", tmp_path / "text.jsonl", *SHORT[2:], "--out", tmp_path / "d"]
    first = call(train_dict, *options, capsys=capsys)[1]
    second = call(train_dict, *options, "--fine-tune", tmp_path / "d", capsys=capsys)[1]
    start, after = (float(re.findall(r"keys ([\d.]+) values", out)[0]) for out in (first, second))
    assert after < start


def test_a_killed_run_resumes_to_what_an_unbroken_one_gives(capsys, tmp_path):
    call(train_dict, *SHORT, "--out", tmp_path / "whole", capsys=capsys)
    options = ["train_dict.py", *SHORT, "--out", tmp_path / "d", "--checkpoint-seconds", 0]
    process = subprocess.Popen([sys.executable, *map(str, options)], cwd=ROOT,
                               stdout=subprocess.DEVNULL)
    while not (tmp_path / "d.checkpoint").exists():
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "d").exists()
    code, _, error = call(train_dict, *options[1:], "--resume", "--tokens", 8192, capsys=capsys)
    assert code == 2 and "--tokens 4096" in error
    assert call(train_dict, *options[1:], "--resume", capsys=capsys)[0] == 0
    whole, resumed = load_file(tmp_path / "whole"), load_file(tmp_path / "d")
    for name in whole:
        torch.testing.assert_close(resumed[name], whole[name])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "whole"]


# Every file, and the README

@pytest.mark.parametrize("name", ["model.py", "omp.py", "lexico.py"])
def test_every_file_runs_and_shows_something(name):
    result = python(name)
    assert result.returncode == 0 and len(result.stdout) > 100, result.stderr


def test_the_commands_of_the_readme_parse_and_its_main_one_runs():
    readme = (ROOT / "README.md").read_text()
    commands = re.findall(r"^(?:.* && )?python (\w+\.py.*)$", readme, re.M)
    assert len(commands) > 5
    for command in commands:
        program, *options = re.findall(r'"[^"]*"|\S+', command)
        known = python(program, "--help").stdout if options else ""
        for option in options:
            assert not option.startswith("--") or option in known, command
