"""What a user meets: the command, its output, its refusals, chat, and what README says of them."""

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
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from test_model import TINY, random_model, says

import generate
from lexico import DenseCache
from model import Config, Llama, Tokenizer
from tiny.pretrain import save_pretrained

ROOT, HELD_OUT, DICTIONARY = TINY.parent, TINY / "held-out.txt", TINY / "dictionary.safetensors"

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

def refused(command, cases):
    """Each of these options (options: a pattern) ends in one line that says why, and exit code 2."""
    for options, words in cases.items():
        code, _, error = call(f"{command} {options}")
        lines = [line for line in error.split("\n") if line and "\r" not in line]  # of a bar
        assert code == 2 and re.match(f"error: .*{words}", "\n".join(lines)), (options, error)
        assert len(lines) == 1 and len(lines[0]) < 800, (options, error)

# ---- The command ---------------------------------------------------------------------------------

GOLDEN = ", there was a little girl named Lily. She loved to play with her toys and eat snack"

def test_a_line_for_every_token_then_the_text_the_summaries_and_how_far_they_agree(tmp_path):
    code, out, _ = call("generate.py --compare --max-new-tokens 40 --buffer 16 --window 1 "
                        f"--sparsity 6 --coding fp8 --json {tmp_path}/out.json")
    lines = re.findall(r"^ +(\d+)  .{16} +[\d.]+ +[\d.]+ +([\d.]+)% +[\d.]+ \wB +([\d.]+)%$", out, re.M)
    assert code == 0 and [int(line[0]) for line in lines] == list(range(1, 41))
    assert {line[1] for line in lines} == {"14.1"}  # of a vector: 18 of 128 bytes, from the start
    assert float(lines[0][2]) >= 100 and float(lines[-1][2]) < 75  # codes take over from the buffer
    figures = json.loads((tmp_path / "out.json").read_text())
    for words in (f"dictionary {DICTIONARY}: N = 2048, coding fp8, sparsity 6", "sparse:", "prefill",
                  "Once upon a time" + figures["text"], "tokens/s", "codes", "buffer",
                  "dictionaries", "allocated", "memory", "dense:", "agreement:"):
        assert words in out
    assert 0 < figures["agreement"]["kl"] < 1 and 0.5 < figures["agreement"]["top1"] <= 1
    # To the byte: 3 s a coded vector, 2 m a dense one, here and in the buffer.
    cache, seen = figures["sparse"]["cache"], figures["sparse"]["prompt_tokens"] + 39
    vectors, dense = 2 * 6 * 2, 2 * 64
    assert cache["total"] == vectors * (3 * 6 * (seen - 16) + dense * 16)
    assert cache["dense"] == vectors * dense * seen <= figures["dense"]["cache"]["total"]
    assert "200" not in out.rpartition("dense:")[2].partition("agreement")[0]

def test_a_short_run_says_what_there_is(tmp_path):
    os.symlink(tmp_path / "real", tmp_path / "link")
    code, out, _ = call(f"generate.py --max-new-tokens 2 --sinks 3 --json {tmp_path}/link")
    assert code == 0 and "codes 0 B" in out and "N = 2048, coding word, sparsity auto:20%" in out
    assert (tmp_path / "link").is_symlink() and json.loads((tmp_path / "real").read_text())["text"]
    out = call("generate.py --max-new-tokens 2 --dense --json /dev/stdout")[1]
    assert "100.0%" in out and json.loads(out[out.index("{"):])["steps"][0]["total"]

def test_a_quiet_text_depends_on_prompt_and_seed_and_not_on_where_the_prompt_comes_from(
        tmp_path, monkeypatch):
    assert call("generate.py --quiet --dense --max-new-tokens 20") == (0, f"{GOLDEN}\n", "")
    path, text = tmp_path / "prompt", "The little\ndog"
    path.write_bytes(b"\xef\xbb\xbfThe little\r\ndog")
    monkeypatch.setattr(sys, "stdin", path.open())
    first, *same, other = (
        call(f"generate.py --quiet --max-new-tokens 15 --temperature 0.8 --top-p 0.9 {options}")
        for options in (f"--prompt '{text}'", f"--prompt-file {path}", "--prompt -",
                        "--prompt 'The little\r\ndog'", f"--prompt '{text}' --seed 1"))
    assert first[0] == 0 and same == [first] * 3 and other != first

def test_the_way_to_write_a_pursuit_of_ones_own(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def greedy(D, Y, sparsity):\n    print('coding', *D.shape)\n"
        "    from omp import omp\n    return omp(D, Y, sparsity)\n")
    command = "generate.py --quiet --max-new-tokens 20 --buffer 4 --coding fp8 --sparsity 4"
    code, out, _ = call(f"{command} --pursuit {tmp_path}/mine.py:greedy")
    assert code == 0 and out.replace("coding 2048 64\n", "") == call(command)[1] != out

def test_bad_input_gets_one_line_and_exit_code_2(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, data in (("latin", b"caf\xe9"), ("long", b"word " * 3000), ("none.py", b"1 / 0")):
        Path(name).write_bytes(data)
    save_pretrained(random_model(vocab_size=4096, head_dim=32), "other")
    shutil.copy(TINY / "tokenizer.json", "other")
    save_pretrained(random_model(vocab_size=400), "beyond")
    shutil.copy(TINY / "tokenizer.json", "beyond")
    model = random_model(vocab_size=4096)
    model.layers[0].mlp.gate_proj.weight *= 1e20
    model.layers[0].mlp.up_proj.weight *= 1e20
    save_pretrained(model, "overflow", torch.float32)
    shutil.copy(TINY / "tokenizer.json", "overflow")
    refused("generate.py --max-new-tokens 3", {
        "--prompt ' '": "prompt is empty", "--prompt-file absent": "No such file",
        "--prompt-file latin": "latin cannot be read", "--prompt-file long": "than the model's context",
        "--sparsity 0": "sparsity 0", "--sparsity 65": "sparsity 65", "--sparsity x": "'x'",
        "--sparsity auto:90%": "outside 3.9% .. 41.4%", "--sparsity auto:nan%": "auto:nan%",
        "--top-p 0": "--top-p: 0", "--temperature nan": "--temperature: nan", "--seed -1": "--seed: -1",
        "--batch x": "--batch", "--batch 0": "--batch: 0", "--beam 300": "--beam: 300",
        "--window 0": "--window: 0", "--sinks -1": "--sinks: -1",
        "--batch 1000000000": "out of memory",
        "--chat --batch 2": "--batch", "--chat --json o": "--json", "--chat --prompt x": "--prompt",
        "--dense --sparsity 3": "--sparsity", "--dense --sinks 3": "--sinks",
        "--dense --dictionary d": "--dictionary", "--prompt x --prompt-file y": "do not go together",
        "--system x": "--system goes with --chat", "--beam 2 --pursuit a.py:b": "",
        "--pursuit none.py:f": "none.py:f cannot be loaded", "--pursuit absent.py:f": "absent.py",
        f"--pursuit {ROOT}/omp.py:absent": "absent",
        "--dictionary absent": "absent", "--dictionary latin": "is damaged",
        f"--dictionary {TINY}/model.safetensors": "not a dictionary",
        "--model absent": "does not exist", "--model nobody/nothing": "'nobody/nothing'",
        "--model other": "train_dict.py --model other", "--model beyond --dense": "has no row",
        "--model overflow --dense": "no finite number",
        f"--model other --dictionary {DICTIONARY}": "dim = 384, not 32",
        "--json no/o": "no/o.* cannot be written", "--json /dev/full": "/dev/full cannot be written",
        "--device abacus": "--device abacus", "--device meta": "--device meta",
        "--device cpu:5": "--device cpu:5", "--device cuda:9": "--device cuda:9",
        "--prompt '\udcff'": "prompt", "--chat": "no chat template"})
    monkeypatch.setattr(sys, "stdin", None)
    refused("generate.py", {"--prompt -": "the prompt from - cannot be read"})

def test_a_terminal_that_knows_ascii_alone_shows_what_it_can(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "argv", ["generate.py", "--max-new-tokens", "2", "--prompt", "👩"])
    with redirect_stdout(terminal), pytest.raises(SystemExit) as stop:
        runpy.run_path(ROOT / "generate.py", run_name="__main__")
    terminal.flush()
    assert not stop.value.code and b"\n?" in terminal.buffer.getvalue()

def test_ctrl_c_ends_with_the_summary_so_far():
    process = start("generate.py --max-new-tokens 1500")
    next(line for line in process.stdout if line.startswith("    5"))
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=30)
    assert process.returncode == 130 and "interrupted" in out and "Traceback" not in error

# ---- Chat ----------------------------------------------------------------------------------------

HEAD = "<|head|>{{ m.role }}\n"
PLAIN = ("{% for m in messages %}" + HEAD + "{{ m.content }}<|eot|>\n{% endfor %}"
         "{% if add_generation_prompt %}<|head|>assistant\n{% endif %}")
LAST_ONLY = "{% for m in messages[-1:] %}" + HEAD + "{{ m.content }}<|eot|>{% endfor %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
TEMPLATES = [
    PLAIN, NO_SYSTEM + PLAIN, "{{ bos_token }}{{ strftime_now('%Y') }}" + PLAIN,
    PLAIN.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}"),
    "{% if tools is not none or documents %}{{ tools | tojson }}{% endif %}" + PLAIN,
    "{% macro say(m) %}{{ m.content | trim }}{% endmacro %}" + PLAIN.replace("m.content", "say(m)")]
ESCAPED = PLAIN.replace("m.content", "m.content | tojson")

@pytest.fixture
def folder(tmp_path):
    """A random model with tiny's tokens, two special ones more, and a chat template."""
    hf = json.loads((TINY / "tokenizer.json").read_text())
    hf["added_tokens"] += [{**hf["added_tokens"][0], "content": name, "id": 4096 + i}
                           for i, name in enumerate(("<|head|>", "<|eot|>"))]
    (tmp_path / "tokenizer.json").write_text(json.dumps(hf))
    save_pretrained(random_model(vocab_size=4098, eos_ids=(4097,), context=120, head_dim=32), tmp_path)
    return chat_template(tmp_path, PLAIN)

def chat_template(folder, template):
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "bos_token": "<|begin_of_text|>", "eos_token": "<|eot|>", "chat_template": template}))
    return folder

def theirs(folder, messages):
    hf = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    return hf.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

@pytest.mark.parametrize("template", [*TEMPLATES, ESCAPED, LAST_ONLY])
def test_the_first_turn_is_what_transformers_makes_of_it_and_only_templates_write_special_tokens(
        folder, template):
    chat = generate.Chat(chat_template(folder, template), Tokenizer.from_pretrained(folder))
    typed = "\n A<b & \"c\"<|eot|>  <|<|eot|>head|>there<|\n<|end_of_text|> <think>ü"
    message = chat.message("user", typed)
    assert message == {"role": "user", "content": "\n A<b & \"c\"  there<|\n <think>ü"}
    assert chat.new_tokens([message]) == theirs(folder, [message])

@pytest.mark.parametrize("template", [ESCAPED, LAST_ONLY])
def test_a_template_that_rewrites_or_hides_answers_is_refused_in_the_second_turn(folder, template):
    chat = generate.Chat(chat_template(folder, template), Tokenizer.from_pretrained(folder))
    answered = [chat.message("user", "One"), {"role": "assistant", "content": generate.ANSWER}]
    assert says("hides or rewrites", chat.new_tokens, [*answered, chat.message("user", "Two")])

@pytest.mark.parametrize("terminal", [False, True])
def test_every_token_passes_the_model_once_and_a_turn_that_does_not_fit_leaves_no_trace(
        folder, terminal, monkeypatch, capsys):
    model, seen, prompts = Llama.from_pretrained(folder, "cpu", torch.float32), [], []
    model.register_forward_hook(lambda _, args, out: seen.append((args[0][0].tolist(), out)))
    turns, answers = iter(["One", "Two", "three " * 99, "Three", ""]), iter(
        [65, 66, 4097, 67, 68, 69, 4097])  # ended, cut, ended
    monkeypatch.setattr("builtins.input", lambda prompt: (prompts.append(prompt), next(turns))[1])
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: terminal))
    monkeypatch.setattr(generate, "sample", lambda *args: torch.tensor([next(answers)]))
    args = SimpleNamespace(model=folder, device="cpu", system="Be brief.", seed=0, temperature=0,
                           top_p=1, max_new_tokens=3, quiet=False)
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
    assert set(prompts) == {"> " if terminal else ""}

def test_a_chat_reads_lines_until_the_end_and_says_what_is_wrong_in_one(folder, monkeypatch):
    command, turns = f"generate.py --chat --dense --max-new-tokens 5 --model {folder}", folder / "turns"

    def given(data):
        turns.write_bytes(data)
        monkeypatch.setattr("sys.stdin", turns.open())

    chat_template(folder, NO_SYSTEM + PLAIN)
    given(b"Hello\r\nAgain")
    code, out, _ = call(command)
    assert code == 0 and out.count("ms a token, cache ") == 2 and "> " not in out
    given(b"Hello\n")
    refused(command, {"--system s": "no system"})
    given(b"caf\xe9")
    refused(command, {"": "standard input cannot be read"})
    chat_template(folder, "{% for %}")
    given(b"Hello\n")
    refused(command, {"": "chat template"})

# ---- Every file, and README ----------------------------------------------------------------------

@pytest.mark.parametrize("command", ["model.py", "omp.py", "lexico.py"])
def test_every_file_runs_and_shows_something(command):
    code, out, _ = call(command)
    assert code == 0 and len(out) > 100

README = (ROOT / "README.md").read_text()

def test_readme_points_at_the_right_lines_and_its_commands_parse_and_the_main_one_runs():
    for name, file, line in re.findall(r"\[`(?:\w+\.)?(\w+)`\]\(([\w/]+\.py)#L(\d+)\)", README):
        there = (ROOT / file).read_text().splitlines()[int(line) - 1]
        assert re.match(rf" *(def|class) {name}\b", there), (name, there)
    commands = re.findall(r"^(?:.* && )?python ([\w/]+\.py.*)$", README, re.M)
    for command in commands:
        program, *options = shlex.split(command)
        known = call(f"{program} --help")[1] if options else ""
        assert all(option in known for option in options if option.startswith("--")), command
    code, out, _ = call(f"{commands[0]} --max-new-tokens 20")
    assert code == 0 and GOLDEN in out

@pytest.mark.parametrize("code", re.findall(r"^```python\n(.*?)^```$", README, re.M | re.S))
def test_python_in_readme_runs(code, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
