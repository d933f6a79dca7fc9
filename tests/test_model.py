"""What model.py promises: the network, configurations, weights, the tokenizer, finding a model."""

import base64
import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file

from lexico import DenseCache, Dictionaries
from model import Config, InputError, Llama, NoCache, Tokenizer
from tiny.pretrain import save_pretrained, to_hf

TINY, NAN = Path(__file__).parent.parent / "tiny", float("nan")
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

def says(words, action, *args):
    """Whether action(*args) is refused in one readable line with these words."""
    with pytest.raises(InputError) as error:
        action(*args)
    line = str(error.value)
    return words in line and "\n" not in line and len(line) < 800 or print(line)

# ---- Network -------------------------------------------------------------------------------------

def numpy_llama(model, tokens):
    """The forward pass for one sequence, in float64, without a cache."""
    c, w = model.config, {n: p.double().numpy() for n, p in model.named_parameters()}
    T, half = len(tokens), c.head_dim // 2
    frequency = c.rope_theta ** (-np.arange(half) / half)
    if c.rope_scaling:  # by 8 between 1 and 4 cycles in 128 tokens
        smooth = np.clip((128 * frequency / (2 * np.pi) - 1) / (4 - 1), 0, 1)
        frequency = (1 - smooth) * frequency / 8 + smooth * frequency
    turn = np.exp(1j * np.arange(T)[:, None, None] * frequency)

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + c.norm_eps) * w[f"{name}.weight"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    x = w["embed_tokens.weight"][tokens]
    for i in range(c.n_layers):
        h, name = norm(x, f"layers.{i}.input_layernorm"), f"layers.{i}.self_attn"
        q, k, v = (linear(h, f"{name}.{p}_proj").reshape(T, -1, c.head_dim) for p in "qkv")
        if c.qk_norm:
            q, k = norm(q, f"{name}.q_norm"), norm(k, f"{name}.k_norm")
        # RoPE as a rotation of complex numbers: element j with element j + m / 2
        q, k = ((x[..., :half] + 1j * x[..., half:]) * turn for x in (q, k))
        k, v = (np.repeat(x, c.n_heads // c.kv_heads, axis=1) for x in (k, v))  # (T, H, m)
        scores = np.einsum("ihm,jhm->hij", q, k.conj()).real / np.sqrt(c.head_dim)
        p = np.exp(scores) * np.tri(T)
        out = np.einsum("hij,jhm->ihm", p / p.sum(-1, keepdims=True), v).reshape(T, -1)
        x = x + linear(out, f"{name}.o_proj")
        h, name = norm(x, f"layers.{i}.post_attention_layernorm"), f"layers.{i}.mlp"
        gate, up = linear(h, f"{name}.gate_proj"), linear(h, f"{name}.up_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * up, f"{name}.down_proj")
    return linear(norm(x, "norm"), "embed_tokens" if c.tied else "lm_head")

@pytest.mark.parametrize("changes", [
    {"kv_heads": 4}, {"kv_heads": 1, "tied": True}, {"rope_scaling": LLAMA31, "norm_eps": 0.1},
    {"qkv_bias": True}, {"qkv_bias": True, "out_bias": True}, {"qk_norm": True, "tied": True}])
def test_logits_are_those_of_numpy_and_of_transformers_in_one_pass_in_chunks_and_in_single_steps(
        changes, tmp_path):
    model, tokens = random_model(**changes), torch.randint(0, 300, (2, 30))
    expected = np.stack([numpy_llama(model, row.numpy()) for row in tokens])
    cache = DenseCache(model.config, batch=2, device="cpu")
    parts = [model(part, cache) for part in tokens.split([11, 1, 1, 9, 1, 7], dim=1)]
    save_pretrained(model, tmp_path, torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits.detach()
    for logits in (model(tokens), model(tokens, last_only=True), torch.cat(parts, dim=1), theirs,
                   Llama.from_pretrained(tmp_path, "cpu")(tokens)):
        np.testing.assert_allclose(logits, expected[:, -logits.shape[1]:], rtol=1e-3, atol=1e-3)

def test_a_cache_is_told_where_a_pass_begins_and_ends_and_says_where_it_stands():
    calls, cache, model = [], NoCache(), random_model()
    for name in ("begin", "attend", "end"):
        method = getattr(cache, name)
        setattr(cache, name, lambda *args, name=name, method=method: (
            calls.append((name, args[0])), method(*args))[1])
    logits = model(torch.arange(5)[None], cache)
    assert calls == [("begin", 5), ("attend", 0), ("attend", 1), ("end", 5)]
    cache.position = 40  # RoPE is relative: what is shifted as a whole attends alike
    torch.testing.assert_close(model(torch.arange(5)[None], cache), logits, rtol=1e-3, atol=1e-3)

# ---- Configuration -------------------------------------------------------------------------------

def test_configs_of_all_families_and_both_spellings_of_rope_are_read():
    hf, scaling = to_hf(SMALL), {"rope_type": "llama3", **LLAMA31}
    old = {**hf, "rope_theta": 5e5, "rope_scaling": scaling}
    new = {**hf, "rope_theta": None, "rope_parameters": {"rope_theta": 5e5, **scaling}}
    scaled = replace(SMALL, rope_theta=5e5, rope_scaling=LLAMA31)
    assert Config.from_hf(old) == Config.from_hf(new) == scaled and Config.from_hf(hf) == SMALL
    qwen = {**hf, "model_type": "qwen2", "sliding_window": 128, "use_sliding_window": False}
    assert not Config.from_hf(qwen).out_bias and Config.from_hf({**hf, "model_type": "qwen3"}).qk_norm
    assert Config.from_hf({**hf, "model_type": "mistral", "sliding_window": None}).kv_heads == 2

@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
def test_what_a_config_leaves_out_is_what_transformers_fills_in(kind):
    given = {"vocab_size": 300, "hidden_size": 256, "intermediate_size": 9, "num_hidden_layers": 2,
             "num_attention_heads": 32, "sliding_window": None}
    whole = transformers.AutoConfig.for_model(kind, **given).to_dict()
    ours = {"model_type": kind, "eos_token_id": whole["eos_token_id"], **given}
    assert Config.from_hf(ours) == Config.from_hf(whole)

BAD = ["8", NAN, 0, -1, 10**12, [8], 1.5]
REFUSED = {  # fields of a config.json, and their values, or larger changes, that are refused by name
    "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size": [None, *BAD],
    "num_key_value_heads head_dim": [*BAD, 3], "max_position_embeddings": BAD,
    "rms_norm_eps rope_theta": ["1e4", NAN, 0, -1, [1], 10**400, True],
    "tie_word_embeddings attention_bias": ["no", 1, []], "eos_token_id": ["2", NAN, ["2"], [[2]]],
    " ".join(LLAMA31): [None, "8", NAN, 0, -1, [1]], "high_freq_factor": [1], "hidden_act": ["gelu"],
    "model_type": [None, "mixtral"], "mlp_bias": [True], "partial_rotary_factor": [0.5],
    "layer_types": [["full_attention", "sliding_attention"]],
    "quantization_config": [{"quantization_config": {"quant_method": "gptq"}}],
    "sliding_window": [{"model_type": "mistral", "sliding_window": 128}, {
        "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 128}],
    "rope_type": [{"rope_scaling": {"rope_type": "yarn"}}, {"rope_scaling": {"type": "linear"}}],
    "config.json": [{"rope_scaling": "llama3"}, {"rope_parameters": {"rope_type": [1]}},
                    {"model_type": ["llama"]}, {"layer_types": 3}]}

@pytest.mark.parametrize("names, values", REFUSED.items())
def test_what_is_malformed_or_not_computed_is_refused_by_name(tmp_path, names, values):
    for name, value in ((name, value) for name in names.split() for value in values):
        change = value if isinstance(value, dict) else {name: value}
        if name in LLAMA31:
            change = {"rope_scaling": {"rope_type": "llama3", **LLAMA31, **change}}
        (tmp_path / "config.json").write_text(json.dumps({**to_hf(SMALL), **change}))
        assert says(name, Config.from_pretrained, tmp_path), value

# ---- Weights and folders -------------------------------------------------------------------------

@pytest.fixture
def folder(tmp_path):
    """The folder of a random model with tied weights; its tokenizer is tiny's."""
    save_pretrained(random_model(tied=True), tmp_path, torch.float32)
    return Path(shutil.copy(TINY / "tokenizer.json", tmp_path)).parent

def test_weights_are_found_whole_in_shards_tied_or_not_and_of_several_types(folder):
    model, tokens = random_model(tied=True), torch.randint(0, 300, (1, 9))
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    state = load_file(whole)

    def check(tolerance=1e-5):
        ours = Llama.from_pretrained(folder, "cpu")
        torch.testing.assert_close(ours(tokens), model(tokens), rtol=tolerance, atol=tolerance)
        assert {x.dtype for x in ours.parameters()} == {torch.float32}

    index.write_text(json.dumps({"weight_map": dict.fromkeys(state, "gone.safetensors")}))
    check()  # the whole file comes before an index that may be left over
    whole.unlink()
    shards = {name: f"{i % 2}.safetensors" for i, name in enumerate(state)}
    for shard in set(shards.values()):
        save_file({name: state[name] for name in state if shards[name] == shard}, folder / shard)
    index.write_text(json.dumps({"weight_map": shards}))
    check()
    save_file({name: x.bfloat16() if x.dim() == 1 else x for name, x in state.items()}, whole)
    check(tolerance=0.5)  # what is bfloat16 becomes float32, as the rest is
    model.lm_head.weight = torch.nn.Parameter(torch.randn(300, 32), requires_grad=False)
    save_file({**state, "lm_head.weight": model.lm_head.weight}, whole)
    check()  # a head of its own in the file is used, whatever config.json says

NORM, UP = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"

@pytest.mark.parametrize("change, words", [
    ({NORM: torch.full((32,), NAN)}, "norm.weight holds NaN"), ({NORM: None}, '"norm.weight"'),
    ({UP: torch.full((48, 32), -torch.inf)}, "up_proj.weight holds NaN or infinity"),
    ({UP: torch.zeros(48, 32, dtype=torch.int8)}, "up_proj.weight is int8"),
    ({UP: torch.zeros(48, 32).to(torch.float8_e4m3fn)}, "up_proj.weight is float8_e4m3fn"),
    ({UP: torch.zeros(3, 3)}, "0.mlp.up_proj"), ({"model.x.weight": torch.zeros(3)}, '"x.weight"'),
    ({f"model.layers.{i}.x.weight": torch.zeros(1) for i in range(999)}, "do not fit")])
def test_weights_that_cannot_be_used_are_refused_by_name_in_a_short_line(folder, change, words):
    state = {**load_file(folder / "model.safetensors"), **change}.items()
    save_file({name: x for name, x in state if x is not None}, folder / "model.safetensors")
    assert says(words, Llama.from_pretrained, folder, "cpu")

@pytest.mark.parametrize("index, words", [
    ({"weight_map": {NORM: "gone.safetensors"}}, "gone.safetensors"), ({"metadata": {}}, "weight_map"),
    ({"weight_map": {NORM: "../outside.safetensors"}}, "outside.safetensors"), ([1], "index.json"),
    ({"weight_map": {NORM: None}}, "cannot be read"), ({"weight_map": "x"}, "cannot be read")])
def test_an_index_names_shards_that_are_there_and_in_its_folder(folder, index, words):
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert says(words, Llama.from_pretrained, folder, "cpu")

def test_a_model_has_many_names_and_what_is_none_is_told_what_it_is(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    shape, name = {"n_layers": 2, "head_dim": 8}, folder.name
    d = Dictionaries(torch.eye(8).expand(2, 2, 8, 8), torch.ones(2, 2), shape)
    d.save(folder / "dictionary.safetensors")
    for name in (name, f"./{name}", f"{name}/", f"~/{name}", f"~/{name}/", str(folder)):
        assert Config.from_pretrained(name) == replace(SMALL, tied=True)
        for path in (name, Dictionaries.find(name)):
            assert torch.equal(Dictionaries.load(path).atoms, d.atoms)
    for name in ("a.gguf", "a.safetensors"):
        with open(name, "wb") as file:
            file.truncate(2**36)  # nobody reads it
        assert says("is a file", Llama.from_pretrained, name)
    (folder / "tokenizer.json").rename(folder / "vocab.json")
    assert says("vocab.json", Tokenizer.from_pretrained, folder)
    assert says("'absent' does not exist", Llama.from_pretrained, "absent")

def test_a_complete_download_works_without_a_network_though_optional_files_are_absent(
        folder, tmp_path_factory, monkeypatch):
    cache, commit = tmp_path_factory.mktemp("hub"), "0" * 40
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    shutil.copytree(folder, cache / "models--some--one/snapshots" / commit)
    (cache / "models--some--one/refs").mkdir()
    (cache / "models--some--one/refs/main").write_text(commit)
    assert all(part.from_pretrained("some/one") for part in (Config, Llama, Tokenizer))
    assert all(says(f"'{name}'", Config.from_pretrained, name) for name in ("some/two", "not a/name"))

MEMORY = """import resource, sys, torch; from model import Llama
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak(); model = Llama.from_pretrained(sys.argv[1], "cpu")
print(sum(p.sum().item() for p in model.parameters()) and peak() - before)"""

def test_loading_needs_little_more_memory_than_the_weights(tmp_path):
    save_pretrained(Llama(replace(SMALL, dim=1024, ffn_dim=8192, n_layers=4, tied=True)), tmp_path)
    used = subprocess.check_output([sys.executable, "-c", MEMORY, tmp_path], cwd=TINY.parent)
    assert int(used) < 1.3 * (tmp_path / "model.safetensors").stat().st_size

# ---- Tokenizer -----------------------------------------------------------------------------------

HF = json.loads((TINY / "tokenizer.json").read_text())
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
PIECES = [" ", "  ", "\n", "\r\n", "\t", "'s", "'LL", "12", " 7", "3456", "the ", " cat", "é", "ü",
          "\u3000", "²", "Ⅷ", "e\u0301", "\u00a0", "<|end_of_text|>", "<think>", " <eot> ", "🦙", "ш"]
CUT = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
PAD = {"strategy": {"Fixed": 99}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 1,
       "pad_type_id": 0, "pad_token": "<|end_of_text|>"}

def characters(missing="", **flags):
    """Every byte a token but the missing ones, and added tokens, of which only <eot> is special.
    (The byte that BPE calls "ü", 0xFC, is in no UTF-8 text.)"""
    alphabet = sorted(set(tokenizers.pre_tokenizers.ByteLevel.alphabet()) - {"ü", *missing})
    added = [{"id": len(alphabet) + i, "content": name, "special": name == "<eot>", "lstrip": False,
              "rstrip": False, "normalized": False, "single_word": False, **flags}
             for i, name in enumerate(("<think>", "ü", "ш", "<eot>"))]
    model = {**HF["model"], "vocab": {c: i for i, c in enumerate(alphabet)}, "merges": []}
    return {**HF, "pre_tokenizer": BYTES, "post_processor": None, "added_tokens": added, "model": model}

def metaspace(kind):
    """A vocabulary with SentencePiece's spaces; for BPE, what it lacks falls back to bytes."""
    hf, text = kind(), ["the cat sat on the mat, the dog ran and the owl saw it "] * 50
    hf.train_from_iterator(text, 60, special_tokens=["<unk>", "<s>"], show_progress=False,
                           **{"unk_token": "<unk>"} if kind is UNIGRAM else {})
    hf = json.loads(hf.to_str())
    if kind is not UNIGRAM:
        vocab, parts = hf["model"]["vocab"], [{"type": "ByteFallback"}, {"type": "Fuse"}, {
            "type": "Strip", "content": " ", "start": 1, "stop": 0}]
        vocab.update({f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)})
        hf["model"]["byte_fallback"], hf["normalizer"] = True, None
        parts = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, *parts]
        hf["decoder"] = {"type": "Sequence", "decoders": parts}
    return hf

UNIGRAM, BPE = tokenizers.SentencePieceUnigramTokenizer, tokenizers.SentencePieceBPETokenizer

@pytest.mark.parametrize("hf, reversible", [
    (HF, True), ({**HF, "truncation": CUT, "padding": PAD}, True),  # Llama 3, left-overs
    ({**HF, "pre_tokenizer": BYTES}, True), ({**HF, "normalizer": {"type": "NFC"}}, False),  # GPT-2
    ({**HF, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [DIGITS, BYTES]}}, True),
    ({**HF, "pre_tokenizer": {**BYTES, "add_prefix_space": True}}, False),
    ({**HF, "model": {**HF["model"], "ignore_merges": True}}, True),
    ({**HF, "normalizer": {"type": "Lowercase"}}, False), (characters(), True),
    (characters(missing="Àñ\u0104c"), False), (characters(lstrip=True, rstrip=True), False),
    (characters(single_word=True), True), (metaspace(BPE), True), (metaspace(UNIGRAM), False)])
def test_tokens_are_those_of_hf_and_streaming_never_shows_half_a_character(
        hf, reversible, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(hf))
    theirs = tokenizers.Tokenizer.from_str(json.dumps({**hf, "truncation": None, "padding": None}))
    theirs.encode_special_tokens = True  # as ours: "<|end_of_text|>" in a text is only text
    ours, rng = Tokenizer.from_pretrained(tmp_path), random.Random(0)
    every = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    for _ in range(30):
        text = "".join(rng.choices(PIECES + rng.sample(every, 20), k=60))
        ids, stream, shown = ours.encode(text), ours.stream(), ""
        assert ids == theirs.encode(text).ids
        assert ours.encode(text, bos=False) == theirs.encode(text, add_special_tokens=False).ids
        for count, i in enumerate(ids, 1):
            shown += stream(i)
            whole = ours.decode(ids[:count])  # what is half a character ends in U+FFFD
            assert whole.endswith("\ufffd") or shown == whole
        assert shown + stream(None) == ours.decode(ids) == (text if reversible else whole)
        assert reversible or "ü" in text or whole == theirs.decode(ids)

def test_only_special_tokens_are_dropped_and_only_a_template_means_them(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(characters()))
    ours, text = Tokenizer.from_pretrained(tmp_path), "Tür<think>a</think>"
    theirs, eot = tokenizers.Tokenizer.from_file(f"{tmp_path}/tokenizer.json"), ours.special["<eot>"]
    assert ours.special == {"<eot>": theirs.token_to_id("<eot>")}
    assert ours.encode(f"{text}<eot>", special=True) == theirs.encode(f"{text}<eot>").ids
    ids = [eot, *ours.encode(text), eot]
    assert ours.decode(ids) == "".join(map(ours.stream(), [*ids, None])) == text
    assert says("'<eot>'", ours.check, ids, replace(SMALL, vocab_size=eot))

def test_tiktoken_files_are_read(tmp_path):
    tokens = [bytes([b]) for b in range(256)] + [b"he", b"hel", b"hell", b"hello"]
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join(lines))
    ours, hello = Tokenizer.from_pretrained(tmp_path), [128000, 259, 32, 258]
    assert ours.encode("hello hell") == hello and ours.decode(hello) == "hello hell"
    assert ours.encode("hell<|eot_id|>", bos=False, special=True) == [258, 128009]
    assert "".join(map(ours.stream(), [*ours.encode("é<|eot_id|>🦙"), None])) == "é<|eot_id|>🦙"

@pytest.mark.parametrize("name, data", [
    ("tokenizer.json", "{"), ("tokenizer.json", "[]"), ("tokenizer.json", "\ufeff{}"),
    ("tokenizer.json", json.dumps({**HF, "model": {**HF["model"], "merges": None}})),
    ("tokenizer.json", json.dumps({**HF, "added_tokens": [{"id": -1}]})), ("unk_id", json.dumps(
        {**HF, "pre_tokenizer": None, "model": {"type": "Unigram", "vocab": [["é", 0]]}})),
    ("tokenizer.model", "x"), ("tokenizer.model", "aGU= x"), ("tokenizer.model", "\x80 1")])
def test_a_tokenizer_that_is_damaged_or_cannot_encode_is_refused_by_name(tmp_path, name, data):
    (tmp_path / (name if "." in name else "tokenizer.json")).write_text(data)
    assert says(name, lambda: Tokenizer.from_pretrained(tmp_path).encode("a"))
