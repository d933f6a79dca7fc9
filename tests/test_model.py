"""What model.py promises: the network, configurations, weights, the tokenizer, finding a model."""

import base64
import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file

from lexico import DenseCache, Dictionaries
from model import Config, InputError, Llama, NoCache, Tokenizer
from tiny.pretrain import save_pretrained, to_hf

TINY, NAN = Path(__file__).parent.parent / "tiny", float("nan")
MALFORMED, TOKENIZERS = (json.loads((Path(__file__).parent / f"cases/{name}.json").read_text())
                         for name in ("malformed", "tokenizers"))
SMALL = Config(vocab_size=300, dim=32, n_layers=2, n_heads=4, kv_heads=2, head_dim=8, ffn_dim=48,
               context=256)
LLAMA31 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 128.0}

def random_model(**changes):
    torch.manual_seed(0)
    model = Llama(replace(SMALL, **changes)).requires_grad_(False).eval()
    for parameter in model.parameters():  # large enough that every part shows in the logits
        parameter.normal_(std=0.4) if parameter.dim() == 2 else parameter.uniform_(0.5, 2)
    return model

def model_folder(folder, model):
    """Write a model with tiny's tokenizer: its folder."""
    save_pretrained(model, folder, model.norm.weight.dtype)
    return shutil.copy(TINY / "tokenizer.json", folder) and folder

def says(words, action, *args):
    """Whether action(*args) is refused in one readable line with these words."""
    with pytest.raises(InputError) as error:
        action(*args)
    line = str(error.value)
    return words in line and "\n" not in line and len(line) < 800 or print(line)

# ---- Network -------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", [
    {"kv_heads": 4}, {"kv_heads": 1, "tied": True}, {"rope_scaling": LLAMA31, "norm_eps": 0.1},
    {"qkv_bias": True}, {"qkv_bias": True, "out_bias": True}, {"qk_norm": True, "tied": True}])
def test_logits_are_those_of_transformers_in_one_pass_chunks_and_single_steps(changes, tmp_path):
    model, tokens = random_model(**changes), torch.randint(0, 300, (2, 30))
    save_pretrained(model, tmp_path, torch.float32)
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits.detach()
    ours, cache = Llama.from_pretrained(tmp_path, "cpu"), DenseCache(model.config, 2, device="cpu")
    parts = [model(part, cache) for part in tokens.split([11, 1, 1, 9, 1, 7], dim=1)]
    for logits in (model(tokens), ours(tokens, last_only=True), torch.cat(parts, dim=1)):
        theirs = expected[:, -logits.shape[1]:]
        torch.testing.assert_close(logits, theirs, rtol=1e-3, atol=1e-3)

def test_a_cache_is_told_where_a_pass_begins_and_ends_and_says_where_it_stands():
    cache, model, tokens = Mock(wraps=NoCache(), position=0), random_model(), torch.arange(5)[None]
    logits = model(tokens, cache)
    calls = [(name, args[0]) for name, args, _ in cache.method_calls]
    assert calls == [("begin", 5), ("attend", 0), ("attend", 1), ("end", 5)]
    cache.position = 40  # RoPE is relative: what is shifted as a whole attends alike
    torch.testing.assert_close(model(tokens, cache), logits, rtol=1e-3, atol=1e-3)

# ---- Configuration -------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, window", [
    ("llama", {}), ("mistral", {"sliding_window": None}), ("qwen3", {}),
    ("qwen2", {"sliding_window": 128, "use_sliding_window": False})])
def test_what_a_config_leaves_out_is_what_transformers_fills_in(kind, window):
    # Rope has two spellings: transformers knows the new one alone.
    given = {"vocab_size": 300, "hidden_size": 256, "intermediate_size": 9, "num_hidden_layers": 2,
             "num_attention_heads": 32, "rope_theta": 5e5, **window,
             "rope_scaling": {"rope_type": "llama3", **LLAMA31}}
    new = transformers.AutoConfig.for_model(kind, **given).to_dict()
    assert new["rope_parameters"] == {"rope_theta": 5e5, **given["rope_scaling"]}
    ours = Config.from_hf({"model_type": kind, "eos_token_id": new["eos_token_id"], **given})
    assert ours == Config.from_hf(new) and ours.rope_scaling == LLAMA31

# ---- Weights and folders -------------------------------------------------------------------------

@pytest.fixture
def folder(tmp_path):
    return model_folder(tmp_path, random_model(tied=True))

def test_weights_are_found_whole_in_shards_tied_or_not_and_of_several_types(folder):
    model, tokens, whole = random_model(tied=True), torch.arange(9)[None], "model.safetensors"
    state, head = load_file(folder / whole), torch.randn(300, 32)
    mixed = {name: x.bfloat16() if x.dim() == 1 else x for name, x in state.items()}
    shards = {f"{i}.safetensors": {n: x for n, x in state.items() if ("layers.0" in n) == i}
              for i in range(2)}
    for files, index, tolerance in (
            ({whole: state}, {"gone.safetensors": state}, 1e-5),  # an old index is left over
            (shards, shards, 1e-5), ({whole: mixed}, {}, 0.5),
            ({whole: {**state, "lm_head.weight": head}}, {}, 1e-5)):  # whatever config.json says
        (folder / whole).unlink(missing_ok=True)
        for name, tensors in files.items():
            save_file(tensors, folder / name)
        index = {"weight_map": {name: shard for shard in index for name in index[shard]}}
        (folder / f"{whole}.index.json").write_text(json.dumps(index))
        if "lm_head.weight" in files.get(whole, {}):
            model.lm_head.weight = torch.nn.Parameter(head, requires_grad=False)
        ours = Llama.from_pretrained(folder, "cpu")
        assert {x.dtype for x in ours.parameters()} == {torch.float32}  # though some were bfloat16
        torch.testing.assert_close(ours(tokens), model(tokens), rtol=tolerance, atol=tolerance)

@pytest.mark.parametrize("words, tensor", MALFORMED["weights"].items())
def test_weights_that_cannot_be_used_are_refused_by_name_in_a_short_line(folder, words, tensor):
    path, (name, shape, dtype, value) = folder / "model.safetensors", tensor
    tensors = {f"model.{name}": torch.full(shape, value).to(getattr(torch, dtype))}
    tensors |= {f"more.{i}": torch.zeros(1) for i in range(999 * ("extra" in name))}
    save_file({**load_file(path), **tensors}, path)
    assert says(words, Llama.from_pretrained, folder, "cpu")

@pytest.mark.parametrize("file, part", [
    ("config.json", Config), ("model.safetensors.index.json", Llama), ("tokenizer.json", Tokenizer),
    ("tokenizer.model", Tokenizer)])
def test_what_is_malformed_or_not_computed_is_refused_by_name(folder, file, part):
    base = to_hf(SMALL) if part is Config else {}
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    (folder / "tokenizer.json").unlink()
    for name, values in MALFORMED[file].items():
        for value in values:
            change = {**base, **(value if isinstance(value, dict) else {name: value})}
            text = value if isinstance(value, str) and not base else json.dumps(change)
            (folder / file).write_text(text)
            assert says(name, part.from_pretrained, folder), value

def test_a_model_has_many_names_and_what_is_none_is_told_what_it_is(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    shape, name = {"n_layers": 2, "head_dim": 8}, folder.name
    d = Dictionaries(torch.eye(8).expand(2, 2, 8, 8), torch.ones(2, 2), shape)
    d.save(folder / "dictionary.safetensors")
    for name in (name, f"./{name}", f"{name}/", f"~/{name}", f"~/{name}/", str(folder)):
        assert Config.from_pretrained(name) == replace(SMALL, tied=True)
        assert all(torch.equal(Dictionaries.load(path).atoms, d.atoms)
                   for path in (name, Dictionaries.find(name)))
    for name in ("a.gguf", "a.safetensors"):
        with open(name, "wb") as file:
            file.truncate(2**36)  # nobody reads it
        assert says("is a file", Llama.from_pretrained, name)
    (folder / "tokenizer.json").rename(folder / "vocab.json")
    assert says("vocab.json", Tokenizer.from_pretrained, folder)

def test_a_complete_download_works_without_a_network(folder, tmp_path_factory, monkeypatch):
    cache, commit = tmp_path_factory.mktemp("hub"), "0" * 40
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    shutil.copytree(folder, cache / "models--some--one/snapshots" / commit)
    (cache / "models--some--one/refs").mkdir()  # and no optional files
    (cache / "models--some--one/refs/main").write_text(commit)
    assert all(part.from_pretrained("some/one") for part in (Config, Llama, Tokenizer))
    for name in ("some/two", "not a/name"):
        assert says(f"'{name}'", Config.from_pretrained, name)

def test_loading_needs_little_more_memory_than_the_weights(tmp_path):
    save_pretrained(Llama(replace(SMALL, dim=1024, ffn_dim=4096, n_layers=4, tied=True)), tmp_path)
    script = """import resource, sys, torch; from model import Llama
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak(); model = Llama.from_pretrained(sys.argv[1], "cpu")
print(sum(p.sum().item() for p in model.parameters()) and peak() - before)"""
    used = subprocess.check_output([sys.executable, "-c", script, tmp_path], cwd=TINY.parent)
    assert int(used) < 1.3 * (tmp_path / "model.safetensors").stat().st_size

# ---- Tokenizer -----------------------------------------------------------------------------------

PIECES = [" ", "  ", "\n", "\r\n", "\t", "'s", "'LL", "12", " 7", "3456", "the ", " cat", "é",
          "ü", "\u3000", "²", "Ⅷ", "e\u0301", "\u00a0", "<|end_of_text|>", "<think>",
          "<eot> ", "ш", "🦙"]
EVERY = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]

def read_tokenizer(folder, change):
    """Ours, of tiny's tokenizer.json with changes, and Hugging Face's, without left-overs."""
    hf = json.loads((TINY / "tokenizer.json").read_text())
    hf = {**hf, **change, "model": {**hf["model"], **change.get("model", {})}}
    (folder / "tokenizer.json").write_text(json.dumps(hf))
    theirs = tokenizers.Tokenizer.from_str(json.dumps({**hf, "truncation": None, "padding": None}))
    return Tokenizer.from_pretrained(folder), theirs

@pytest.mark.parametrize("reversible, change", TOKENIZERS.values(), ids=TOKENIZERS)
def test_tokens_are_those_of_hf_and_no_half_character_is_shown(reversible, change, tmp_path):
    (ours, theirs), rng = read_tokenizer(tmp_path, change), random.Random(0)
    theirs.encode_special_tokens = True  # as ours: "<|end_of_text|>" in a text is only text
    for _ in range(20):
        text = "".join(rng.choices(PIECES + rng.sample(EVERY, 20), k=60))
        ids, stream, shown = ours.encode(text), ours.stream(), ""
        assert ids == theirs.encode(text).ids
        assert ours.encode(text, bos=False) == theirs.encode(text, add_special_tokens=False).ids
        for count, i in enumerate(ids, 1):
            shown += stream(i)
            whole = ours.decode(ids[:count])  # what is half a character ends in U+FFFD
            assert whole.endswith("\ufffd") or shown == whole
        assert shown + stream(None) == ours.decode(ids)
        assert whole == (text if reversible else theirs.decode(ids)) or "ü" in text

def test_only_special_tokens_are_dropped_and_only_a_template_means_them(tmp_path):
    ours, theirs = read_tokenizer(tmp_path, TOKENIZERS["added tokens, of which one is special"][1])
    text, eot = "Tür<think>a</think>", theirs.token_to_id("<eot>")
    ids = ours.encode(f"<eot>{text}<eot>", special=True)
    assert ids == [eot, *ours.encode(text), eot] and ours.special == {"<eot>": eot}
    assert ours.decode(ids) == "".join(map(ours.stream(), [*ids, None])) == text
    assert says("'<eot>'", ours.check, ids, replace(SMALL, vocab_size=eot))

def test_tiktoken_files_are_read(tmp_path):
    tokens = [bytes([b]) for b in range(256)] + [b"he", b"hel", b"hell", b"hello"]
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join(lines))
    ours, text = Tokenizer.from_pretrained(tmp_path), "hello é<|eot_id|>🦙"
    assert ours.encode("hello<|eot_id|> hell", special=True) == [128000, 259, 128009, 32, 258]
    assert "".join(map(ours.stream(), [*ours.encode(text), None])) == text

def test_a_text_that_the_tokenizer_does_not_know_is_refused(tmp_path):
    unigram = {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": None}
    assert says("unk_id", read_tokenizer(tmp_path, {"model": unigram})[0].encode, "b")

def test_a_tokenizer_that_panics_is_refused_in_one_line_and_prints_none_of_its_own(tmp_path, capfd):
    hf = json.loads((TINY / "tokenizer.json").read_text())
    hf["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(hf))
    with pytest.raises(InputError, match="tokenizer.json is damaged"):
        Tokenizer.from_pretrained(tmp_path)
    assert capfd.readouterr().err == ""
