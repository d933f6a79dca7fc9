"""What model.py promises: the network, configurations, weights, the tokenizer, finding a model."""

import base64
import json
import random
import shutil
from dataclasses import replace

import pytest
import tokenizers
import torch
import transformers
from conftest import ROOT, SHAPES, cases
from safetensors.torch import load_file, save_file

from generate import peak_memory
from lexico import DenseCache, Dictionaries
from model import Config, InputError, Llama, Tokenizer
from tiny.pretrain import save_pretrained, to_hf

TINY, CPU = ROOT / "tiny", torch.device("cpu")
MALFORMED, TOKENIZERS = cases("malformed"), cases("tokenizers")
SMALL = Config(vocab_size=300, dim=32, n_layers=2, n_heads=4, kv_heads=2, head_dim=8, ffn_dim=48,
               context=256)

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

@pytest.mark.parametrize("changes", SHAPES["models"])
def test_logits_are_those_of_transformers_in_one_pass_chunks_and_single_steps(changes, tmp_path):
    model, tokens = random_model(**changes), torch.randint(0, 300, (2, 30))
    save_pretrained(model, tmp_path, torch.float32)
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits.detach()
    ours, cache = Llama.from_pretrained(tmp_path, "cpu"), DenseCache(model.config, 2, device="cpu")
    parts = [model(part, cache) for part in tokens.split([11, 1, 1, 9, 1, 7], dim=1)]
    for logits in (model(tokens), ours(tokens, last_only=True), torch.cat(parts, dim=1)):
        theirs = expected[:, -logits.shape[1]:]
        torch.testing.assert_close(logits, theirs, rtol=1e-3, atol=1e-3)

# ---- Configuration -------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, window", SHAPES["configs"])
def test_what_a_config_leaves_out_is_what_transformers_fills_in(kind, window):
    scaling = SHAPES["models"][-1]["rope_scaling"]  # transformers has a new spelling of it
    given = {"vocab_size": 300, "hidden_size": 256, "intermediate_size": 9, "num_hidden_layers": 2,
             "num_attention_heads": 32, "rope_theta": 5e5, "attention_bias": True, **window,
             "rope_scaling": {"rope_type": "llama3", **scaling}}
    config = transformers.AutoConfig.for_model(kind, **given)
    new = config.to_dict()
    assert new["rope_parameters"] == {"rope_theta": 5e5, **given["rope_scaling"]}
    ours = Config.from_hf({"model_type": kind, "eos_token_id": new["eos_token_id"], **given})
    assert ours == Config.from_hf(new) and ours.rope_scaling == scaling
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(type(config)(**given)).state_dict()
        shapes = {name: x.shape for name, x in Llama(ours).state_dict().items()}
    assert shapes == {name.removeprefix("model."): x.shape for name, x in theirs.items()}

# ---- Weights and folders -------------------------------------------------------------------------

@pytest.fixture
def folder(tmp_path):
    return model_folder(tmp_path, random_model(tied=True))

def test_weights_are_found_whole_in_shards_tied_or_not_and_of_several_types(folder):
    def agree(tolerance=1e-5):
        ours, tokens = Llama.from_pretrained(folder, "cpu"), torch.arange(9)[None]
        assert {x.dtype for x in ours.parameters()} == {torch.float32}
        torch.testing.assert_close(ours(tokens), model(tokens), rtol=tolerance, atol=tolerance)

    model, path = random_model(tied=True), folder / "model.safetensors"
    state, index = load_file(path), folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"model.norm.weight": "gone.safetensors"}}')
    agree()  # an old index is left over
    save_file({name: x.bfloat16() if x.dim() == 1 else x for name, x in state.items()}, path)
    agree(0.5)
    state["lm_head.weight"] = torch.randn(300, 32)
    model.lm_head.weight = torch.nn.Parameter(state["lm_head.weight"], requires_grad=False)
    save_file(state, path)
    agree()  # whatever config.json says
    path.unlink()
    for i in range(2):
        save_file(dict([*state.items()][i::2]), folder / f"{i}.safetensors")
    index.write_text(json.dumps({"weight_map": {n: f"{i % 2}.safetensors" for i, n in enumerate(
        state)}}))
    agree()

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
def test_what_is_malformed_or_not_computed_is_refused_by_name(folder, file, part, capfd):
    base = to_hf(SMALL) if part is Config else {}
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    (folder / "tokenizer.json").unlink()
    for name, values in MALFORMED[file].items():
        for value in values:
            change = {**base, **(value if isinstance(value, dict) else {name: value})}
            text = value if isinstance(value, str) and not base else json.dumps(change)
            (folder / file).write_text(text)
            assert says(name, part.from_pretrained, folder) and not capfd.readouterr().err, value

def test_a_model_has_many_names_and_needs_no_network_twice(folder, tmp_path_factory, monkeypatch):
    hub, commit = tmp_path_factory.mktemp("hub"), "0" * 40
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    shutil.copy(TINY / "dictionary.safetensors", folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')  # which comes first
    shutil.copytree(folder, hub / "models--some--one/snapshots" / commit)  # no optional files
    (hub / "models--some--one/refs").mkdir()
    (hub / "models--some--one/refs/main").write_text(commit)
    name = folder.name
    for name in (name, f"./{name}", f"{name}/", f"~/{name}", f"~/{name}/", folder, "some/one"):
        assert Config.from_pretrained(name) == replace(SMALL, tied=True, eos_ids=(7,))
        assert Llama.from_pretrained(name, "cpu") and Tokenizer.from_pretrained(name)
        assert Dictionaries.load(name) and Dictionaries.load(Dictionaries.find(name))

@pytest.mark.skipif(not peak_memory(CPU), reason="only Linux tells how much memory was in use")
def test_loading_needs_little_more_memory_than_the_weights(tmp_path):
    save_pretrained(Llama(replace(SMALL, dim=1024, ffn_dim=8192, n_layers=2, tied=True)), tmp_path)
    peak_memory(CPU)  # counts from here
    before, model = peak_memory(CPU), Llama.from_pretrained(tmp_path, "cpu")
    used = peak_memory(CPU) - before
    assert model and used < 1.3 * (tmp_path / "model.safetensors").stat().st_size

# ---- Tokenizer -----------------------------------------------------------------------------------

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
        text = "".join(rng.choices(SHAPES["pieces of texts"] + rng.sample(EVERY, 20), k=60))
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
