"""What model.py promises: the network against numpy, loading, refusals, the tokenizer."""

import base64
import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from lexico import DenseCache
from model import Config, InputError, Llama, Tokenizer, find_file

TINY = Path(__file__).parent.parent / "tiny"
SMALL = Config(vocab_size=300, dim=32, n_layers=2, n_heads=4, kv_heads=2, head_dim=8, ffn_dim=48,
               context=256)


def random_model(**changes):
    torch.manual_seed(0)
    model = Llama.random(replace(SMALL, **changes), "cpu")
    for parameter in model.parameters():  # large enough that every part shows in the logits
        parameter.normal_(std=0.4) if parameter.dim() == 2 else parameter.uniform_(0.5, 2)
    return model


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


LLAMA31 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 128.0}


@pytest.mark.parametrize("changes", [
    {}, {"kv_heads": 4}, {"kv_heads": 1, "tied": True}, {"rope_scaling": LLAMA31},
    {"qkv_bias": True}, {"qkv_bias": True, "out_bias": True}])
def test_logits_equal_numpy_in_one_pass_in_chunks_and_in_single_steps(changes):
    model, tokens = random_model(**changes), torch.randint(0, 300, (2, 30))
    expected = np.stack([numpy_llama(model, row.numpy()) for row in tokens])
    cache = DenseCache(model.config, batch=2, device="cpu")
    parts = [model(part, cache) for part in tokens.split([11, 1, 1, 9, 1, 7], dim=1)]
    for logits in (model(tokens), model(tokens, last_only=True), torch.cat(parts, dim=1)):
        np.testing.assert_allclose(logits, expected[:, -logits.shape[1]:], rtol=1e-3, atol=1e-3)


def test_configs_of_all_families_and_both_spellings_of_rope_are_read():
    hf, scaling = SMALL.to_hf(), {"rope_type": "llama3", **LLAMA31}
    old = {**hf, "rope_theta": 5e5, "rope_scaling": scaling}
    new = {**hf, "rope_theta": None, "rope_parameters": {"rope_theta": 5e5, **scaling}}
    scaled = replace(SMALL, rope_theta=5e5, rope_scaling=LLAMA31)
    assert Config.from_hf(old) == Config.from_hf(new) == scaled and Config.from_hf(hf) == SMALL
    qwen = {**hf, "model_type": "qwen2", "sliding_window": 128, "use_sliding_window": False}
    assert Config.from_hf(qwen).qkv_bias and not Config.from_hf(qwen).out_bias
    assert Config.from_hf({**hf, "model_type": "mistral", "sliding_window": None}).kv_heads == 2


@pytest.mark.parametrize("change, named", [
    ({"model_type": "mixtral"}, "mixtral"), ({"rope_scaling": {"rope_type": "yarn"}}, "yarn"),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, "linear"), ({"hidden_act": "gelu"}, "gelu"),
    ({"model_type": "mistral", "sliding_window": 128}, "sliding_window"),
    ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 128}, "sliding_window"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ({"quantization_config": {"quant_method": "gptq"}}, "gptq"), ({"mlp_bias": True}, "mlp_bias"),
    ({"hidden_size": None}, "hidden_size"), ({"num_key_value_heads": 3}, "num_key_value_heads")])
def test_what_is_not_computed_is_refused_by_name(change, named):
    with pytest.raises(InputError, match=named):
        Config.from_hf({**SMALL.to_hf(), **change})


def test_shards_load_as_one_file_and_every_tensor_that_does_not_fit_is_named(tmp_path):
    model, tokens = random_model(), torch.randint(0, 300, (1, 9))
    model.save_pretrained(tmp_path, torch.float32)
    whole, index = tmp_path / "model.safetensors", tmp_path / "model.safetensors.index.json"
    state = load_file(whole)
    whole.unlink()
    shards = {name: f"{i % 2}.safetensors" for i, name in enumerate(state)}
    for shard in set(shards.values()):
        save_file({name: state[name] for name in state if shards[name] == shard}, tmp_path / shard)
    index.write_text(json.dumps({"weight_map": shards}))
    torch.testing.assert_close(Llama.from_pretrained(tmp_path, "cpu")(tokens), model(tokens))
    index.unlink()
    state["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 3)
    state["model.extra.weight"] = state.pop("model.norm.weight")
    save_file(state, whole)
    misfits = 'Missing.* "norm.*Unexpected.* "extra.*mismatch for layers.0.mlp.up_proj.*3, 3'
    with pytest.raises(InputError, match=misfits):
        Llama.from_pretrained(tmp_path, "cpu")


def test_a_model_that_came_from_the_hub_once_is_found_without_a_network(tmp_path, monkeypatch):
    for name, value in (("HF_HUB_OFFLINE", True), ("HF_HUB_CACHE", str(tmp_path))):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    folder = tmp_path / "models--some--one"
    for path in ("refs", "snapshots/1", ".no_exist/1"):
        (folder / path).mkdir(parents=True)
    (folder / "refs/main").write_text("1")
    (folder / "snapshots/1/config.json").write_bytes((TINY / "config.json").read_bytes())
    (folder / ".no_exist/1/generation_config.json").touch()  # the Hub said so, then
    assert Config.from_pretrained("some/one") == Config.from_pretrained("tiny")
    for name in ("some/one", "not a/name"):  # what is neither here nor known to be absent
        with pytest.raises(InputError, match=f"'{name}'.*no chat_template.jinja"):
            find_file(name, "chat_template.jinja", required=False)


MEMORY = """import resource, sys, torch; from model import Llama
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak(); model = Llama.from_pretrained(sys.argv[1], "cpu")
print(sum(p.sum().item() for p in model.parameters()) and peak() - before)"""


def test_loading_needs_little_more_memory_than_the_weights(tmp_path):
    config = replace(SMALL, dim=1024, ffn_dim=8192, n_layers=4, tied=True)
    Llama.random(config, "cpu", torch.bfloat16).save_pretrained(tmp_path)
    used = subprocess.check_output([sys.executable, "-c", MEMORY, tmp_path], cwd=TINY.parent)
    assert int(used) < 1.3 * (tmp_path / "model.safetensors").stat().st_size


# The tokenizer

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
DIGITS = {"type": "Digits", "individual_digits": True}
PIECES = [" ", "  ", "\n", "\r\n", "\t", "'s", "'LL", "12", " 7", "3456", "the ", " cat", "é",
          "\u3000", "²", "Ⅷ", "e\u0301", "\u00a0", "<|end_of_text|>", "🦙"]


@pytest.mark.parametrize("family", [
    {}, {"pre_tokenizer": BYTES}, {"normalizer": {"type": "NFC"}},  # Llama 3, GPT-2, Qwen2.5
    {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [DIGITS, BYTES]}},  # SmolLM2
    {"normalizer": {"type": "Lowercase"}}])  # any other, which Hugging Face's package runs
def test_tokens_are_those_of_hf_and_streaming_never_shows_half_a_character(family, tmp_path):
    hf, rng = {**json.loads((TINY / "tokenizer.json").read_text()), **family}, random.Random(0)
    vocab = hf["model"]["vocab"]  # ids need not follow the order of the merges: shuffle them
    plain = [token for token in vocab if not token.startswith("<|")]
    vocab.update(zip(plain, rng.sample([vocab[token] for token in plain], len(plain))))
    (tmp_path / "tokenizer.json").write_text(json.dumps(hf))
    theirs = tokenizers.Tokenizer.from_str(json.dumps(hf))
    ours = Tokenizer.from_pretrained(tmp_path)
    theirs.encode_special_tokens = True  # as ours: "<|end_of_text|>" in a text is only text
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    for _ in range(300):
        text = "".join(rng.choices(PIECES + rng.sample(characters, 20), k=60))
        ids = ours.encode(text)
        assert ids == theirs.encode(text).ids
        assert "".join(map(ours.stream(), [*ids, None])) == ours.decode(ids)
        assert "normalizer" in family or ours.decode(ids) == text


def test_tiktoken_files_and_other_vocabularies_are_read(tmp_path):
    tokens = [bytes([b]) for b in range(256)] + [b"he", b"hel", b"hell", b"hello"]
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join(lines))
    assert Tokenizer.from_pretrained(tmp_path).encode("hello hell") == [128000, 259, 32, 258]
    bpe = tokenizers.SentencePieceBPETokenizer()
    bpe.train_from_iterator(["the cat sat on the mat " * 50], vocab_size=60, show_progress=False)
    bpe.save(str(tmp_path / "tokenizer.json"))
    ids = Tokenizer.from_pretrained(tmp_path).encode("the cat sat")
    assert ids == bpe.encode("the cat sat", add_special_tokens=False).ids
    assert Tokenizer.from_pretrained(tmp_path).decode(ids) == " the cat sat"
