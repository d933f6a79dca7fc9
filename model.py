"""A Llama as one readable file: network, configuration, Hugging Face weights, tokenizer.

The network is that of Touvron et al. 2023 (arXiv 2302.13971) and its descendants, layers of

    x = x + Attention(RMSNorm(x))
    x = x + MLP(RMSNorm(x)),    MLP(y) = W_down (silu(W_gate y) * W_up y)

with rotary positions (Su et al. 2021, arXiv 2104.09864) and grouped-query attention (Ainslie et
al. 2023, arXiv 2305.13245). Modules carry the names of Hugging Face checkpoints, so weights load
without a mapping. How keys and values are stored is the business of a cache, an object with

    position                  how many tokens it has seen, an int or a tensor
    begin(T), end(T)          called before the first layer and after the last one, when T tokens
                              pass: a prompt, a chunk or one token
    attend(layer, q, k, v)    appends the layer's keys and values, returns attention's output"""

import base64
import functools
import itertools
import json
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf, pi
from pathlib import Path

import tiktoken
import tokenizers
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file
from tqdm import tqdm

# ---- Network -------------------------------------------------------------------------------------

class NoCache:
    """Causal attention within the tokens that are given, and nothing kept: the simplest cache."""
    position = 0
    begin = end = lambda self, T: None

    def attend(self, layer, q, k, v):
        """q: (B, G H, T, m), k and v: (B, H, T, m). Returns the output, shaped as q."""
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

def rope_frequencies(config):
    """Angular frequencies theta^(-2i/m) of the head_dim / 2 rotary pairs, (m / 2,) float32, on the
    CPU. Llama 3.1's scaling divides the low ones by `factor` (they turn too slowly to complete a
    cycle within the context first trained for), keeps the high ones, and blends between."""
    m = config.head_dim
    frequency = config.rope_theta ** (-torch.arange(0, m, 2, device="cpu") / m)
    if config.rope_scaling is None:
        return frequency
    factor, low, high, context = (config.rope_scaling[name] for name in LLAMA3_ROPE)
    cycles = context * frequency / (2 * pi)
    blend = ((cycles - low) / (high - low)).clamp(0, 1)  # 0: low frequency, 1: high frequency
    return frequency * (blend + (1 - blend) / factor)

def rotate(x, cos, sin):
    """Rotary embedding of x (B, H, T, m) by cos, sin (T, m). Pair i is elements i and i + m / 2."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin

class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        dim, m, self.head_dim = config.dim, config.head_dim, config.head_dim
        self.q_proj = nn.Linear(dim, config.n_heads * m, bias=config.qkv_bias)
        self.k_proj = nn.Linear(dim, config.kv_heads * m, bias=config.qkv_bias)
        self.v_proj = nn.Linear(dim, config.kv_heads * m, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.n_heads * m, dim, bias=config.out_bias)
        norm = nn.RMSNorm if config.qk_norm else nn.Identity  # which takes any arguments
        self.q_norm, self.k_norm = norm(m, eps=config.norm_eps), norm(m, eps=config.norm_eps)

    def project(self, x, cos, sin):
        """Queries (B, G H, T, m), keys and values (B, H, T, m) of x (B, T, dim)."""
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for project in (self.q_proj, self.k_proj, self.v_proj))
        return rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin), v

class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

class Layer(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.index = index
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.dim, eps=config.norm_eps)

    def before_attention(self, x, cos, sin):
        return self.self_attn.project(self.input_layernorm(x), cos, sin)

    def after_attention(self, x, out):
        x = x + self.self_attn.o_proj(out)
        return x + self.mlp(self.post_attention_layernorm(x))

    def forward(self, x, cos, sin, cache):
        q, k, v = self.before_attention(x, cos, sin)  # (B, heads, T, m)
        out = cache.attend(self.index, q, k, v).transpose(1, 2).flatten(2)  # (B, T, G H m)
        # A long prompt goes on in pieces: the MLP's hidden layer is the widest tensor of all.
        pieces = map(self.after_attention, x.split(4096, dim=1), out.split(4096, dim=1))
        return torch.cat([*pieces], dim=1) if x.shape[1] > 4096 else next(pieces)

class Llama(nn.Module):
    verbose = False  # whether a prompt that takes long shows a bar on stderr
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.embed_tokens.weight
        self._frequencies = rope_frequencies(config)  # (m / 2,)

    def forward(self, tokens, cache=None, last_only=False):
        """Logits (B, T, vocab) for tokens (B, T) int64, or (B, 1, vocab) with last_only.
        The tokens follow those already in the cache, and are appended to it."""
        cache, T = NoCache() if cache is None else cache, tokens.shape[1]
        cache.begin(T)
        x = self.embed_tokens(tokens)  # (B, T, dim)
        positions = cache.position + torch.arange(T, device=x.device)  # (T,)
        # Not a buffer: the frequencies stay float32 in a bf16 model.
        self._frequencies = self._frequencies.to(x.device)  # (m / 2,)
        angle = torch.outer(positions.float(), self._frequencies).repeat(1, 2)  # (T, m)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        # A prompt passes in one go. What takes longer than two seconds shows a bar.
        for layer in tqdm(self.layers, "prompt", delay=2, disable=T == 1 or not self.verbose):
            x = layer(x, cos, sin, cache)
            if T > 1 and x.is_cuda and self.verbose:
                torch.cuda.synchronize()  # the bar tells what is done, not what is launched
        cache.end(T)
        return self.lm_head(self.norm(x[:, -1:] if last_only else x))

    @classmethod
    def from_pretrained(cls, name_or_path, device=None, dtype=None):
        """Model of a local folder, a Hub id, or "tiny", the embedded one. Raises InputError. It is
        built without memory (meta device); on a CPU its weights are the file's own pages, mapped
        and never copied, unless dtype asks for a conversion. Default dtype: the file's."""
        folder = find_folder(name_or_path)
        with torch.device("meta"):
            model = cls(Config.from_pretrained(folder)).requires_grad_(False)
        weights = read_weights(folder, device or best_device(), dtype)
        if model.config.tied:  # a head of its own in the file is used, whatever config.json says
            weights.setdefault("lm_head.weight", weights.get("embed_tokens.weight"))
        with door(f"weights of '{folder}' do not fit its config.json", "give files of one model"):
            model.load_state_dict(weights, assign=True)
        if model.config.tied and torch.equal(model.lm_head.weight, model.embed_tokens.weight):
            model.lm_head.weight = model.embed_tokens.weight
        return model.eval()

def read_weights(folder, device, dtype):
    """name -> tensor of a folder's model.safetensors, or else of the shards that its index names.
    Tensors of several types become one, the widest."""
    file, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not file.is_file() and not index.is_file():
        raise missing(folder, file.name)
    weights = {}
    with door(f"weights of '{folder}' cannot be read", "fetch them again"):
        names = [file.name] if file.is_file() else read_json(index)["weight_map"].values()
        for name in sorted(set(names)):  # of this folder alone, whatever path an index gives
            weights |= load_file(folder / Path(name).name)
    weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()
               if not name.endswith("inv_freq")}  # which a Llama computes
    kinds = {tensor.dtype for tensor in weights.values()}
    widest = functools.reduce(torch.promote_types, kinds & FLOATS or {torch.bfloat16})
    for name, tensor in weights.items():
        if tensor.dtype not in FLOATS:
            raise InputError(f"weights of '{folder}': {name} is {str(tensor.dtype)[6:]}; quantised "
                             "weights are not supported, give the model in 16 or 32 bits")
        if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise InputError(f"weights of '{folder}': {name} holds NaN or infinity; fetch it again")
        weights[name] = tensor.to(device, dtype or widest)
    return weights

# ---- Configuration -------------------------------------------------------------------------------

HF_NAMES = {  # our names and those of a config.json
    "vocab_size": "vocab_size", "dim": "hidden_size", "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "head_dim": "head_dim",
    "ffn_dim": "intermediate_size", "context": "max_position_embeddings",
    "norm_eps": "rms_norm_eps", "rope_theta": "rope_theta", "tied": "tie_word_embeddings",
    "out_bias": "attention_bias"}
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
RANGES = {int: (1, 2**20), float: (1e-30, 1e15), bool: (False, True)}  # what makes sense
FLOATS = {torch.bfloat16, torch.float16, torch.float32, torch.float64}
DEFAULTS = {  # model_type -> what a config.json may leave out, as transformers fills it in
    "llama": {"max_position_embeddings": 2048, "eos_token_id": 2},
    "mistral": {"max_position_embeddings": 2**17, "num_key_value_heads": 8, "eos_token_id": 2,
                "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 2**15, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 2**15, "num_key_value_heads": 32, "head_dim": 128}}

@dataclass
class Config:
    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    kv_heads: int  # each serves G = n_heads / kv_heads query heads
    head_dim: int  # m: the length of one key or value vector
    ffn_dim: int
    context: int  # positions the model was trained for
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # Llama 3.1's parameters, or None for plain RoPE
    qkv_bias: bool = False  # Qwen2 and attention_bias
    out_bias: bool = False  # attention_bias
    qk_norm: bool = False  # Qwen3: RMSNorm on every head's query and key
    tied: bool = False  # the output layer shares the embedding's weights
    eos_ids: tuple = ()

    @classmethod
    def from_hf(cls, hf):
        """Config from the dict of a config.json. What we do not compute is refused by name."""
        kind = hf.get("model_type")
        # RoPE has two spellings: rope_scaling, or (transformers 5) all of it in rope_parameters.
        hf = {**DEFAULTS.get(kind, {}), **hf, **(hf.get("rope_scaling") or {}),
              **(hf.get("rope_parameters") or {})}
        hf = {name: value for name, value in hf.items() if value is not None}
        rope_type = hf["rope_type"] = hf.get("rope_type", hf.get("type", "default"))
        heads = checked(hf, "num_attention_heads", int)
        hf = {"num_key_value_heads": heads, "sliding_window": inf, "eos_token_id": [],
              "head_dim": checked(hf, "hidden_size", int) // heads, **hf}
        plain = {ours: checked(hf, name, cls.__annotations__[ours]) for ours, name in
                 HF_NAMES.items() if name in hf or not hasattr(cls, ours)}  # some have a default
        if kind in ("mistral", "qwen2"):  # whose attention_bias says nothing, as in transformers
            plain["out_bias"] = False
        scaling = {name: checked(hf, name, float) for name in LLAMA3_ROPE if rope_type == "llama3"}
        eos = hf["eos_token_id"] if isinstance(hf["eos_token_id"], list) else [hf["eos_token_id"]]
        computed = {
            "model_type": kind in DEFAULTS,
            "quantization_config": not hf.get("quantization_config"),
            "hidden_act": hf.get("hidden_act", "silu") == "silu",
            "mlp_bias": not hf.get("mlp_bias"),
            "sliding_window": not hf.get("use_sliding_window", kind == "mistral")
            or hf["sliding_window"] >= plain["context"],
            "layer_types": set(hf.get("layer_types", ())) <= {"full_attention"},
            "rope_type": rope_type in ("default", "llama3"),
            "high_freq_factor": not scaling or scaling["low_freq_factor"] < hf["high_freq_factor"],
            "partial_rotary_factor": hf.get("partial_rotary_factor", 1) == 1,
            "num_hidden_layers": plain["n_layers"] <= 2**12,
            "head_dim": plain["head_dim"] % 2 == 0,
            "eos_token_id": all(type(i) is int for i in eos),
            "num_key_value_heads": heads % plain["kv_heads"] == 0}
        for name in [name for name, fine in computed.items() if not fine]:
            raise InputError(f"config.json: {name} = {hf.get(name)!r} is not supported; use a "
                             "Llama, Mistral or Qwen with full attention and plain or llama3 RoPE")
        return cls(**plain, rope_scaling=scaling or None, eos_ids=tuple(eos),
                   qkv_bias=plain.get("out_bias") or kind == "qwen2", qk_norm=kind == "qwen3")

    @classmethod
    def from_pretrained(cls, name_or_path):
        """Config of a local folder or a Hub id."""
        folder = find_folder(name_or_path)
        hf = read_json(folder / "config.json")
        generation = read_json(folder / "generation_config.json", required=False)
        if generation.get("eos_token_id") is not None:  # a chat model's end of turn is only here
            hf["eos_token_id"] = generation["eos_token_id"]
        with door(f"config.json of '{name_or_path}' is damaged", "fetch it again"):
            return cls.from_hf(hf)

def checked(values, name, kind):
    """values[name], if it is of its kind and makes sense (NaN never does)."""
    value, (least, most) = values.get(name), RANGES[kind]
    typed = type(value) is kind or kind is float and type(value) is int
    if not typed or not least <= value <= most:
        raise InputError(f"config.json: {name} = {value!r} is no {kind.__name__} within {least} .. "
                         f"{most}; fetch it again")
    return kind(value)

# ---- Tokenizer -----------------------------------------------------------------------------------

LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3_SPECIAL = {"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, "<|eot_id|>": 128009,
                  "<|start_header_id|>": 128006, "<|end_header_id|>": 128007, "<|eom_id|>": 128008}

class Tokenizer:
    """Text to ids and back, by Hugging Face's `tokenizers`. special: special tokens' ids by name;
    in a text they are only text."""
    def __init__(self, backend):
        self.backend, self.token = backend, backend.id_to_token
        backend.no_truncation()
        backend.no_padding()
        added = backend.get_added_tokens_decoder().items()  # id -> token
        self.special = {token.content: i for i, token in added if token.special}
        # Added tokens are plain text, which a decoder of bytes may not give back.
        self.verbatim = {i: token.content for i, token in added
                         if not token.special and backend.decode([i]) != token.content}

    def encode(self, text, bos=True, special=False):
        """Ids of a text, as tokenizer.json says. bos: with what begins (or ends) every text.
        special: whether names of special tokens in the text mean these tokens."""
        self.backend.encode_special_tokens = not special
        with door("the tokenizer does not take this text", "give another text"), silenced():
            return self.backend.encode(text, add_special_tokens=bos).ids

    def decode(self, ids):
        """Text of ids, without special tokens."""
        runs = itertools.groupby(ids, key=self.verbatim.get)  # None for ordinary tokens
        return "".join(text * len(list(run)) if text else self.backend.decode(list(run))
                       for text, run in runs)

    def stream(self):
        """A function id -> text for printing token by token: half a character waits for the rest.
        Called with None, at the end, it gives what is left."""
        shown, new = [], []  # the ids printed last are context for those that wait
        def step(i):
            nonlocal shown, new
            new += [] if i is None else [i]
            before, now = self.decode(shown), self.decode(shown + new)
            if len(now) <= len(before) or i is not None and now.endswith("\ufffd"):
                return ""
            shown, new = new, []
            return now[len(before):]

        return step

    def check(self, ids, config):
        """Refuse a text of no ids, and ids that the model's embedding has no row for."""
        if not ids:
            raise InputError("the tokenizer makes no tokens of this text; give another one")
        if max(ids) >= config.vocab_size:
            raise InputError(f"the tokenizer's id {max(ids)}, {self.token(max(ids))!r}, has no row "
                             f"in the model's embedding, which has {config.vocab_size}; give the "
                             "tokenizer of this model")

    @classmethod
    def from_pretrained(cls, name_or_path):
        """From tokenizer.json, or else from a tokenizer.model in tiktoken's format (Llama 3)."""
        folder = find_folder(name_or_path)
        path, other = folder / "tokenizer.json", folder / "tokenizer.model"
        if path.is_file():
            with door(f"{path} is damaged", "fetch it again"), silenced():
                return cls(tokenizers.Tokenizer.from_file(str(path)))
        if not other.is_file():
            raise missing(folder, path.name)
        with door(f"{other} is not in tiktoken's format", "add a tokenizer.json"):
            pairs = map(bytes.split, other.read_bytes().splitlines())
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
            return Llama3Tokenizer(tiktoken.Encoding("llama3", pat_str=LLAMA3_SPLIT,
                                   mergeable_ranks=ranks, special_tokens=LLAMA3_SPECIAL))

class Llama3Tokenizer(Tokenizer):
    """The same for a tokenizer.model, by tiktoken."""
    def __init__(self, backend):
        self.backend, self.special = backend, LLAMA3_SPECIAL
        self.token = lambda i: backend.decode([i])

    def encode(self, text, bos=True, special=False):
        names = set(self.special) if special else set()
        with door("the tokenizer does not take this text", "fetch it again, or change the text"):
            ids = self.backend.encode(text, allowed_special=names, disallowed_special=())
        return [self.special["<|begin_of_text|>"]] * bos + ids

    def decode(self, ids):
        return self.backend.decode([i for i in ids if i < self.special["<|begin_of_text|>"]])

# ---- Files of a model ----------------------------------------------------------------------------

MODEL_FILES = ["config.json", "generation_config.json", "model*.safetensors", "*.index.json",
               "tokenizer*", "special_tokens_map.json", "chat_template*", "dictionary.safetensors"]

def find_folder(name_or_path, patterns=MODEL_FILES):
    """Folder of a model: "tiny" (the embedded one), a local folder, or a Hub id (owner/name), whose
    files of these patterns are fetched once and then found without a network."""
    path = Path(os.path.expanduser(name_or_path))
    if str(path) == "tiny":
        path = Path(__file__).parent / "tiny"
    if path.is_dir():
        return path
    if path.exists() or len(path.parts) != 2 or path.is_absolute():
        reason = "is a file" if path.exists() else "does not exist"
        raise InputError(f"model '{name_or_path}' {reason}; give a folder in Hugging Face layout "
                         "(config.json, model.safetensors, tokenizer.json) or a Hub id "
                         "(owner/name); for a GGUF file, the model that it was made from")
    import huggingface_hub as hub  # here, for it takes a while
    with door(f"'{name_or_path}' is no folder here, and the Hub does not give it",
              "check the name, the network and your login"):
        return Path(hub.snapshot_download(str(path), allow_patterns=patterns))

def missing(folder, name):
    """The error that a folder lacks a file, and what to do."""
    held = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "nothing"
    return InputError(f"model '{folder}' has no {name} (it holds {held}); transformers' "
                      "from_pretrained and save_pretrained make it of most other formats")

def read_json(path, required=True):
    """What a JSON file holds, a dict; {} if it may be absent and is."""
    if not path.is_file() and required:
        raise missing(path.parent, path.name)
    with door(f"{path} is not readable JSON", "fetch it again"):
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}

# ---- Errors --------------------------------------------------------------------------------------

class InputError(Exception):
    """Bad input, in one line: the thing, the value, the way out. Programs print it and exit 2."""
    def __str__(self):
        text = " ".join(super().__str__().split())
        return text if len(text) < 600 else f"{text[:300]} ... {text[-300:]}"

@contextmanager
def door(what, way_out):
    """Where something comes in from outside: whatever fails within is bad input."""
    try:
        yield
    except (InputError, KeyboardInterrupt, GeneratorExit, MemoryError):
        raise
    except BaseException as error:  # not Exception: a panic of `tokenizers` is none
        raise InputError(f"{what} ({type(error).__name__}: {error}); {way_out}") from None

@contextmanager
def silenced():
    """Without the lines that `tokenizers`, written in Rust, prints by itself when it panics."""
    if sys.stderr is None:  # a closed one
        yield
        return
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)

def best_device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

if __name__ == "__main__":  # continue a sentence
    model, tokenizer = Llama.from_pretrained("tiny", "cpu"), Tokenizer.from_pretrained("tiny")
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters: {model.config}")
    tokens = torch.tensor([tokenizer.encode("Once upon a time")])
    for _ in range(40):  # the slow way: without a cache, every token runs the whole text again
        tokens = torch.cat((tokens, model(tokens, last_only=True).argmax(-1)), dim=1)
    print(tokenizer.decode(tokens[0].tolist()))
