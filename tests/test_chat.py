"""Conversations over one cache, dictionaries to share, long prompts."""

import json
from types import SimpleNamespace

import pytest
import tokenizers
import torch
from test_model import TINY, random_model
from test_programs import HELD_OUT, call

import generate
from lexico import DenseCache, Dictionaries
from model import LLAMA3_SPECIAL, Chat, Llama, Tokenizer

QWEN = """{{ bos_token }}{% for m in messages %}
{{- '<|start_header_id|>' + m.role + '\\n' + m.content + eos_token + '\\n' }}
{%- endfor %}<|start_header_id|>assistant"""
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
PLAIN = "\n Hello  there<|\n"
TYPED = "\n Hello<|eot_id|>  <|<|eot_id|>start_header_id|>there<|\n<|end_of_text|>"


@pytest.fixture(params=[None])
def folder(request, tmp_path):
    """A random model with tiny's tokens, Llama 3's special tokens and this chat template."""
    hf = json.loads((TINY / "tokenizer.json").read_text())
    _, _, *new = LLAMA3_SPECIAL  # tiny has the first two
    hf["added_tokens"] += [{**hf["added_tokens"][0], "content": name, "id": 4096 + i}
                           for i, name in enumerate(new)]
    settings = {"eos_token": {"content": "<|end_of_text|>"}, "bos_token": None,
                "chat_template": request.param}
    (tmp_path / "tokenizer.json").write_text(json.dumps(hf))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    random_model(vocab_size=4099, eos_ids=(1,), context=120, head_dim=32).save_pretrained(tmp_path)
    return tmp_path


def theirs(folder, text):
    """Ids of a text with special tokens, from Hugging Face's package."""
    hf = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
    return hf.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("folder", [None, QWEN, [{"name": "default", "template": QWEN}]],
                         indirect=True)
def test_only_the_template_writes_special_tokens(folder):
    chat = Chat(folder, Tokenizer.from_pretrained(folder))
    message = chat.message("user", TYPED)
    assert message == {"role": "user", "content": PLAIN}
    assert chat.new_tokens([message]) == theirs(folder, chat.render([message]))


def test_every_token_passes_the_model_once_and_a_turn_that_does_not_fit_leaves_no_trace(
        folder, monkeypatch, capsys):
    model, seen = Llama.from_pretrained(folder, "cpu", torch.float32), []
    model.register_forward_hook(lambda _, args, out: seen.append((args[0][0].tolist(), out)))
    turns = iter(["One", "Two", "three " * 99, "Three", ""])
    answers = iter([65, 66, *theirs(folder, "<|eot_id|>"), 67, 68, 69, 1])  # ended, cut, ended
    monkeypatch.setattr("builtins.input", lambda prompt: next(turns))
    monkeypatch.setattr(generate, "sample", lambda *args: torch.tensor([next(answers)]))
    args = SimpleNamespace(model=folder, device="cpu", system="Be brief.", seed=0, temperature=0,
                           top_p=1, max_new_tokens=3, quiet=False)
    ours, cache = Tokenizer.from_pretrained(folder), DenseCache(model.config, device="cpu")
    generate.chat(args, model, ours, cache)
    head = "<|start_header_id|>{}<|end_header_id|>\n\n".format
    expected, before = [], f"<|begin_of_text|>{head('system')}Be brief.<|eot_id|>"
    for text, answer in (("One", [65, 66]), ("Two", [67, 68, 69]), ("Three", [])):
        turn = f"{before}{head('user')}{text}<|eot_id|>{head('assistant')}"
        expected += theirs(folder, turn) + answer  # the very ids, not what their text would give
        before = "<|eot_id|>"
    assert [i for tokens, _ in seen for i in tokens] == expected
    torch.testing.assert_close(seen[-1][1], model(torch.tensor([expected]), last_only=True))
    out, error = capsys.readouterr()
    assert out.count("ms a token") == 3 and error.count("\n") == 1 and "do not fit" in error


@pytest.mark.parametrize("folder", [NO_SYSTEM + QWEN], indirect=True)
def test_a_chat_reads_lines_until_the_end_and_says_what_is_wrong_in_one(folder, monkeypatch):
    def run(options):
        monkeypatch.setattr("sys.stdin", (folder / "turns").open())
        return call(f"generate.py --chat --dense --max-new-tokens 5 {options}")

    (folder / "turns").write_text("Hello\nAgain")
    code, out, _ = run(f"--model {folder}")
    assert code == 0 and out.count("ms a token, cache ") == 2
    assert "(no system)" in run(f"--model {folder} --system s")[2]
    (folder / "turns").write_bytes(b"caf\xe9")
    for options, words in ((f"--model {folder}", "not UTF-8"), ("", "no chat template")):
        code, _, error = run(options)
        assert code == 2 and words in error and error.count("\n") == 1


def test_a_folder_of_dictionaries_is_ready_to_share_and_is_found_on_the_hub(folder, monkeypatch):
    shared, learn = folder / "shared", (
        f"train_dict.py --model {folder} --text {HELD_OUT} --tokens 400 --batch 240 --atoms 32")
    assert call(f"{learn} --out {shared}/")[0] == 0
    assert {path.name for path in shared.iterdir()} == {"README.md", "dictionary.safetensors"}
    card = (shared / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: lexico\n") and "--dictionary OWNER/shared" in card
    assert card.count("\n| ") == 2 + len(Dictionaries.load(shared).metadata["key_errors"])
    monkeypatch.setattr("huggingface_hub.hf_hub_download",
                        lambda name, file: {"someone/shared": shared}[name] / file)
    one, same = (call(f"generate.py --quiet --model {folder} --buffer 4 --dictionary {name}")
                 for name in (shared / "dictionary.safetensors", "someone/shared"))
    assert one[0] == 0 and one == same
    code, _, error = call(f"{learn} --out {shared}")
    assert code == 2 and "exists" in error


def test_a_prompt_that_takes_long_shows_a_bar_on_stderr_once(monkeypatch, capsys):
    model, bar = random_model(), f"\r[{'#' * 30}] layer 2 of 2\n"
    for seconds, quiet, shown in ((0.1, False, ""), (1.5, True, ""), (1.5, False, bar)):
        now = iter(range(9))
        monkeypatch.setattr(generate, "clock", lambda device: seconds * next(now))
        generate.show_progress(model, quiet)
        model(torch.zeros(1, 9, dtype=torch.long)), model(torch.zeros(1, 1, dtype=torch.long))
        assert capsys.readouterr().err == shown
