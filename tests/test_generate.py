"""What a user meets: the commands, their output, their refusals, chat, and what README says."""

import io
import itertools
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, cases
from test_model import model_folder, random_model, says

import generate
from lexico import DenseCache
from model import Llama, Tokenizer
from train_dict import output_file

HELD_OUT, TEMPLATES = ROOT / "tiny/held-out.txt", cases("templates")
README, COMMANDS = (ROOT / "README.md").read_text(), (ROOT / "tests/cases/commands.txt").read_text()

def call(command, out=None):
    """Run a program in this process, `< FILE` as in a shell: exit code, standard output and error.
    """
    command, _, given = command.partition(" < ")
    sys.stdin = open(given) if given else None
    sys.argv, code, out = shlex.split(command), 0, out or io.StringIO()
    with redirect_stdout(out), redirect_stderr(io.StringIO()) as error:
        try:
            runpy.run_path(f"{ROOT}/{sys.argv[0]}", run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
    out.seek(0)
    return code, out.read(), error.getvalue()

def start(command):
    """Run a program as a process of its own, which Ctrl-C reaches even where it would not us."""
    return subprocess.Popen([sys.executable, "-u", *shlex.split(command)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))

def refused(command, words):
    """Assert that a command ends with exit code 2 and one line with these words (a pattern)."""
    code, _, error = call(command)
    lines = [line for line in error.split("\n") if line and "\r" not in line]  # bars have that
    assert code == 2 and len(lines) == 1 and len(error) < 2000, (command, error)
    assert re.match(f"error: .*{words}", lines[0]), (command, words, lines)

def chat_folder(folder, template="plain", **changes):
    """A random model with tiny's tokens, two special ones more, and a chat template: its folder."""
    shape = {"vocab_size": 4098, "eos_ids": (4097,), "context": 120, "head_dim": 32, **changes}
    hf = json.loads((model_folder(folder, random_model(**shape)) / "tokenizer.json").read_text())
    hf["added_tokens"] += [{**hf["added_tokens"][0], "content": name, "id": 4096 + i}
                           for i, name in enumerate(("<|head|>", "<|eot|>"))]
    (folder / "tokenizer.json").write_text(json.dumps(hf))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "bos_token": "<|begin_of_text|>", "eos_token": "<|eot|>",
        "chat_template": TEMPLATES[template]}))
    return folder

# ---- The commands --------------------------------------------------------------------------------

def test_commands_print_what_they_should_and_bad_input_gets_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, data in re.findall(r"^file (\S+): ?(.*)$", COMMANDS, re.M):
        (tmp_path / name).write_bytes(data.encode().decode("unicode_escape").encode("latin1"))
    models = {name: random_model(vocab_size=400 if name == "beyond" else 4096, head_dim=32)
              for name in ("other", "beyond", "overflow", "silent")}
    models["overflow"].layers[0].self_attn.k_proj.weight *= 1e38  # keys beyond float32
    models["silent"].layers[1].self_attn.v_proj.weight *= 0
    for name, model in models.items():
        model_folder(name, model)
    chat_folder(tmp_path / "chat", "no system")
    before = {*tmp_path.iterdir()}
    table = COMMANDS.replace("$ROOT", str(ROOT)).replace("$BYTE", "\udcff")
    for command, refusal, words in re.findall(r"^([\w/]+\.py.*?) +-> (error: )?(.*)$", table, re.M):
        if refusal:
            refused(command, words)
        else:
            code, out, _ = call(command)
            assert code == 0 and re.search(words, out, re.M), (command, words, out)
    assert {*tmp_path.iterdir()} == before  # nothing is left behind

def test_a_line_for_every_token_then_the_text_the_summaries_and_how_far_they_agree(tmp_path):
    code, out, _ = call("generate.py --compare --max-new-tokens 40 --buffer 16 --window 1 "
                        f"--sparsity 6 --coding fp8 --json {tmp_path}/out.json")
    lines = re.findall(r"^ +(\d+)  .{16} +[\d.]+ +[\d.]+ +14.1% +[\d.]+ \wB +([\d.]+)%$", out, re.M)
    assert code == 0 and [int(line[0]) for line in lines] == list(range(1, 41))
    assert float(lines[0][1]) >= 100 and float(lines[-1][1]) < 75  # codes take over from the buffer
    figures = json.loads((tmp_path / "out.json").read_text())
    words = "sparse: prefill tokens/s codes buffer dictionaries allocated memory dense: agreement:"
    assert all(word in out for word in ("Once upon a time" + figures["text"], *words.split()))
    assert 0 < figures["agreement"]["kl"] < 1 and 0.5 < figures["agreement"]["top1"] <= 1
    assert "71.8 kB, codes 10.4 kB, buffer 61.4 kB" in out  # 3 s a coded vector, 2 m a dense one

def test_a_text_depends_on_prompt_and_seed_not_on_where_it_comes_from(tmp_path):
    path, text, ascii = tmp_path / "prompt", "The é\ndog", io.TextIOWrapper(io.BytesIO(), "ascii")
    path.write_bytes(b"\xef\xbb\xbfThe \xc3\xa9\r\ndog\r\n")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    os.mkfifo(tmp_path / "fifo")
    fifo = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    command = "generate.py --max-new-tokens 15 --temperature 0.8 --top-p 0.9"
    first, *same, other = (call(f"{command} --quiet {options}") for options in (
        f"--prompt '{text}'", f"--prompt-file {path}", f"--prompt - < {path}",
        "--prompt 'The é\r\ndog'", f"--prompt '{text}' --seed 1"))
    assert first[0] == 0 and same == [first] * 3 and other != first
    greedy, narrow = (call(f"{command} {option} --quiet --prompt '{text}'")
                      for option in ("--temperature 0", "--top-p 1e-6"))
    assert greedy == narrow != first
    assert "\nThe ?\ndog" in call(f"{command} --prompt '{text}' --json {tmp_path}/link", ascii)[1]
    call(f"{command} --prompt '{text}' --json {tmp_path}/fifo")
    for figures in (tmp_path / "real").read_text(), os.read(fifo, 2**16):
        assert json.loads(figures)["text"] in first[1]
    assert {path.name for path in tmp_path.iterdir()} == {"prompt", "link", "real", "fifo"}

def test_ctrl_c_ends_with_the_summary_so_far():
    process = start("generate.py --max-new-tokens 1500")
    next(line for line in process.stdout if line.startswith("    5"))
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=30)
    assert process.returncode == 130 and "interrupted" in out and "Traceback" not in error

def test_ctrl_c_in_the_second_run_of_a_comparison_ends_it(monkeypatch, capsys):
    def interrupted(*arguments):
        runs.append(arguments)  # of each cache, one that warms up and one that is measured
        yield from itertools.islice(real(*arguments), 2 if len(runs) == 4 else None)
        if len(runs) == 4:
            raise KeyboardInterrupt

    runs, real = [], generate.generate
    monkeypatch.setattr(generate, "generate", interrupted)
    monkeypatch.setattr(sys, "argv", ["generate.py", "--compare", "--max-new-tokens", "5"])
    assert generate.main() == 130
    out = capsys.readouterr().out
    assert "dense: 5 + 2 tokens, interrupted" in out and "agreement" not in out

def test_what_was_printed_stays_where_figures_go_to_the_same_file(capfd):
    print("before", flush=True)
    with output_file("/dev/stdout") as write:
        write(b"{}")
    assert capfd.readouterr().out == "before\n{}"

def test_figures_are_written_though_every_output_is_closed(tmp_path, monkeypatch):
    (tmp_path / "figures").write_bytes(b"old")
    with monkeypatch.context() as closed:
        closed.setattr(sys, "stdout", None)
        closed.setattr(os, "fstat", lambda stream: os.close(-1))  # fails
        with output_file(tmp_path / "figures") as write:
            write(b"new")
    assert (tmp_path / "figures").read_bytes() == b"new"

# ---- Chat ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("template", TEMPLATES)
def test_a_turn_is_that_of_transformers_and_rewriting_templates_are_refused(template, tmp_path):
    folder = chat_folder(tmp_path, template)
    chat = generate.Chat(folder, Tokenizer.from_pretrained(folder))
    typed = "\n A<b & \"c\"<|eot|>  <|<|eot|>head|>there<|\n<|end_of_text|> <think>ü"
    # Only the template writes special tokens, and what stands for an answer.
    message = chat.message("user", f"{generate.ANSWER}{typed}")
    assert message == {"role": "user", "content": "\n A<b & \"c\"  there<|\n <think>ü"}
    assert chat.new_tokens([message]) == chat.hf.apply_chat_template(
        [message], add_generation_prompt=True, return_dict=False)
    turns = [message, {"role": "assistant", "content": generate.ANSWER}, message]
    rewrites = template in ("rewriting", "hiding")
    assert says("hides or rewrites", chat.new_tokens, turns) if rewrites else chat.new_tokens(turns)

def test_every_token_passes_the_model_once(tmp_path, monkeypatch, capsys):
    folder = chat_folder(tmp_path)
    model, seen, prompts = Llama.from_pretrained(folder, "cpu", torch.float32), [], set()
    model.register_forward_hook(lambda _, args, out: seen.append((args[0][0].tolist(), out)))
    turns = iter(["One", "Two", "three " * 99, "Three", ""])  # what does not fit leaves no trace
    answers = iter([65, 66, 4097, 67, 68, 69, 4097])  # ended, cut, ended
    monkeypatch.setattr("builtins.input", lambda prompt: prompts.add(prompt) or next(turns))
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(generate, "sampler", lambda _: lambda _: torch.tensor([next(answers)]))
    args = SimpleNamespace(model=folder, device="cpu", system="Be brief.", seed=0, temperature=0,
                           top_p=1, max_new_tokens=3, quiet=False, rank=0)
    ours, cache = Tokenizer.from_pretrained(folder), DenseCache(model.config, device="cpu")
    generate.chat(args, model, ours, cache)
    expected, before = [], "<|head|>system\nBe brief.<|eot|>\n"
    for text, answer in (("One", [65, 66]), ("Two", [67, 68, 69]), ("Three", [])):
        turn = f"{before}<|head|>user\n{text}<|eot|>\n<|head|>assistant\n"
        expected += ours.encode(turn, bos=False, special=True) + answer  # the very ids
        before = "<|eot|>\n"
    assert [i for tokens, _ in seen for i in tokens] == expected
    logits = model(torch.tensor([expected]), last_only=True)
    torch.testing.assert_close(seen[-1][1], logits, rtol=1e-3, atol=1e-3)
    out, error = capsys.readouterr()
    assert out.count("ms a token") == 3 and error.count("\n") == 1 and "do not fit" in error
    assert prompts == {"> "}  # to a terminal

# ---- README --------------------------------------------------------------------------------------

def test_readme_points_at_the_right_lines_and_at_options_that_exist():
    for name, file, line in re.findall(r"\[`(?:\w+\.)?(\w+)`\]\(([\w/]+\.py)#L(\d+)\)", README):
        there = (ROOT / file).read_text().splitlines()[int(line) - 1]
        assert re.match(rf" *(def|class) {name}\b", there), (name, there)
    commands = re.findall(r"^(?:.* && )?python ([\w/]+\.py.*)$", README, re.M)
    for program, *options in map(shlex.split, commands):
        known = call(f"{program} --help")[1]
        assert all(name in known for name in options if name.startswith("--")), (program, options)

@pytest.mark.parametrize("code", re.findall(r"^```python\n(.*?)^```$", README, re.M | re.S))
def test_python_in_readme_runs(code):
    exec(compile(code, "README.md", "exec"), {})
