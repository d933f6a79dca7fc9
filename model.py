"""A Llama as one readable file: config, network, Hugging Face weights, tokenizer.

The network is that of Touvron et al. 2023 (arXiv 2302.13971) and its descendants, layers of

    x = x + Attention(RMSNorm(x))
    x = x + MLP(RMSNorm(x)),    MLP(y) = W_down (silu(W_gate y) * W_up y)

with rotary positions (Su et al. 2021, arXiv 2104.09864) and grouped-query attention (Ainslie et
al. 2023, arXiv 2305.13245). Modules carry the names of Hugging Face checkpoints, so weights load
without a mapping.

Nothing here knows how keys and values are stored. Each layer hands its q, k, v to
`cache.attend(layer, q, k, v)` and gets the attention's output back; without a cache it attends
causally within the tokens it was given. A cache has a `position`, the number of tokens seen so far
(a tensor, so that a recorded step can be replayed at any position), and any number of tokens may
come at any time: a prompt, a chunk, one token.

`python model.py` loads the embedded model and continues a sentence.
"""

import argparse
import atexit
import base64
import codecs
import json
import math
import os
import re
import sys
import time
import unicodedata
from dataclasses import dataclass, replace
from pathlib import Path

import tiktoken
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save


class InputError(Exception):
    """Bad input, in one line: the thing, the value, the way out. Programs print it and exit 2."""


class Parser(argparse.ArgumentParser):
    """Arguments that cannot be read, or are out of range, are bad input, too."""

    def error(self, message):
        raise InputError(f"{message}; see --help")

    def check(self, args, **ranges):
        """Refuse arguments outside their (least, most)."""
        for name, (least, most) in ranges.items():
            if not least <= getattr(args, name) <= most:
                self.error(f"--{name.replace('_', '-')} {getattr(args, name)} is outside "
                           f"{least} .. {most}")


def run_program(main):
    """Run a program: exit with what main returns, or with one line and 2 for bad input."""
    try:
        sys.exit(main())
    except InputError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        else:
            time.sleep(10)  # rank 0 says it; then torchrun ends the others
        sys.exit(2)
    except RuntimeError as error:
        if "allocate" not in str(error):  # that is how torch says it
            raise
        print("error: out of memory; ask for a shorter prompt, a smaller batch or buffer, or learn "
              "from fewer tokens at a time", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever read our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


# --------------------------------------------------------------------------------------------------
# Configuration

REQUIRED = {  # our names and those of a config.json
    "model_type": "model_type", "vocab_size": "vocab_size", "dim": "hidden_size",
    "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
    "ffn_dim": "intermediate_size", "context": "max_position_embeddings"}
HF_NAMES = {
    **REQUIRED, "kv_heads": "num_key_value_heads", "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps", "rope_theta": "rope_theta", "tied": "tie_word_embeddings",
    "bos_id": "bos_token_id"}
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


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
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # Llama 3.1's "llama3" parameters, or None for plain RoPE
    qkv_bias: bool = False  # Qwen2 and attention_bias
    out_bias: bool = False  # attention_bias
    tied: bool = False  # the output layer shares the embedding's weights
    bos_id: int | None = None
    eos_ids: tuple = ()
    model_type: str = "llama"

    @classmethod
    def from_hf(cls, hf):
        """Config from the dict of a config.json. What we do not compute is refused by name."""
        # RoPE has two spellings: rope_scaling, or (transformers 5) all of it in rope_parameters.
        hf = {**hf, **(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
        hf = {name: value for name, value in hf.items() if value is not None}
        rope_type = hf["rope_type"] = hf.get("rope_type", hf.get("type", "default"))
        scaling = LLAMA3_ROPE if rope_type == "llama3" else ()
        for name in (*REQUIRED.values(), *scaling):
            if name not in hf:
                raise InputError(f"config.json has no {name}, as every Llama's has; fetch it again")
        kind, heads = hf["model_type"], hf["num_attention_heads"]
        kv_heads, context = hf.get("num_key_value_heads", heads), hf["max_position_embeddings"]
        windowed = hf.get("use_sliding_window", kind == "mistral")
        computed = {
            "model_type": kind in ("llama", "mistral", "qwen2"),
            "quantization_config": not hf.get("quantization_config"),
            "hidden_act": hf.get("hidden_act", "silu") == "silu",
            "mlp_bias": not hf.get("mlp_bias"),
            "sliding_window": not windowed or hf.get("sliding_window", context) >= context,
            "layer_types": set(hf.get("layer_types", ())) <= {"full_attention"},
            "rope_type": rope_type in ("default", "llama3"),
            "partial_rotary_factor": hf.get("partial_rotary_factor", 1) == 1,
            "num_key_value_heads": heads % kv_heads == 0}
        for name in [name for name, fine in computed.items() if not fine]:
            raise InputError(f"config.json: {name} = {hf[name]!r} is not supported; use a Llama, "
                             "Mistral or Qwen2 with full attention and plain or llama3 RoPE")
        bias, eos = bool(hf.get("attention_bias")), hf.get("eos_token_id", [])
        plain = {ours: hf[name] for ours, name in HF_NAMES.items() if name in hf}
        return cls(**{"kv_heads": kv_heads, "head_dim": hf["hidden_size"] // heads, **plain},
                   rope_scaling={name: hf[name] for name in scaling} or None,
                   qkv_bias=bias or kind == "qwen2", out_bias=bias,
                   eos_ids=tuple(eos if isinstance(eos, list) else [eos]))

    @classmethod
    def from_pretrained(cls, name_or_path):
        """Config of a local folder, a config.json file or a Hub id."""
        hf = read_json(name_or_path, "config.json")
        generation = read_json(name_or_path, "generation_config.json", required=False)
        if generation.get("eos_token_id") is not None:  # a chat model's end of turn is only here
            hf["eos_token_id"] = generation["eos_token_id"]
        try:
            return cls.from_hf(hf)
        except (TypeError, AttributeError, ValueError, ZeroDivisionError) as error:
            raise InputError(f"config.json of '{name_or_path}' is damaged ({error}); fetch it "
                             "again") from None

    def to_hf(self):
        """The dict of this model's config.json."""
        scaling = self.rope_scaling and {"rope_type": "llama3", **self.rope_scaling}
        plain = {name: getattr(self, ours) for ours, name in HF_NAMES.items()}
        return {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu", **plain,
                "rope_scaling": scaling, "attention_bias": self.out_bias,
                "eos_token_id": list(self.eos_ids), "torch_dtype": "bfloat16"}


# --------------------------------------------------------------------------------------------------
# Network

def rope_frequencies(config):
    """Angular frequencies of the head_dim / 2 rotary pairs, (m / 2,) float32, on the CPU.

    Plain: theta^(-2i/m). Llama 3.1's scaling divides the low ones by `factor` (they turn too slowly
    to complete a cycle within the context first trained for), keeps the high ones, blends between.
    """
    m = config.head_dim
    frequency = config.rope_theta ** (-torch.arange(0, m, 2, device="cpu") / m)  # (m / 2,)
    if config.rope_scaling is None:
        return frequency
    factor, low, high, context = (config.rope_scaling[key] for key in LLAMA3_ROPE)
    cycles = context * frequency / (2 * math.pi)
    blend = ((cycles - low) / (high - low)).clamp(0, 1)  # 0: low frequency, 1: high frequency
    return frequency * (blend + (1 - blend) / factor)


def rotate(x, cos, sin):
    """Rotary embedding of x (B, H, T, m) by cos, sin (T, m). Pair i is elements i and i + m / 2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        q_dim, kv_dim = config.n_heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, q_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.dim, kv_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.dim, kv_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_dim, config.dim, bias=config.out_bias)

    def project(self, x, cos, sin):
        """Queries, keys and values of x (B, T, dim), each (B, heads, T, m)."""
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for project in (self.q_proj, self.k_proj, self.v_proj))
        return rotate(q, cos, sin), rotate(k, cos, sin), v


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    decode = None  # begin and end for a single token, once compile_layers was called

    def __init__(self, config, layer):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.dim, eps=config.norm_eps)

    def begin(self, x, cos, sin):
        return self.self_attn.project(self.input_layernorm(x), cos, sin)

    def end(self, x, out):
        x = x + self.self_attn.o_proj(out)
        return x + self.mlp(self.post_attention_layernorm(x))

    def forward(self, x, cos, sin, cache):
        begin, end = Layer.decode if Layer.decode and x.shape[1] == 1 else (Layer.begin, Layer.end)
        q, k, v = begin(self, x, cos, sin)  # (B, H, T, m)
        if cache is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            out = cache.attend(self.self_attn.layer, q, k, v)  # (B, H, T, m)
        out = out.transpose(1, 2).flatten(2)  # (B, T, H m)
        # A long prompt goes on in pieces: the MLP's hidden layer is the widest tensor of all.
        pieces = [end(self, *piece) for piece in zip(x.split(4096, dim=1), out.split(4096, dim=1))]
        return torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]


def compile_layers():
    """torch.compile what stands around attention when one token passes: its small operations become
    few kernels. Prompts differ in length and gain little, so they pass as they are. The option has
    products of one row with a matrix compiled, too, and tunes them: they take most of the time."""
    Layer.decode = [torch.compile(part, options={"coordinate_descent_tuning": True})
                    for part in (Layer.begin, Layer.end)]


class Llama(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        if not config.tied:
            self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self._frequencies = rope_frequencies(config)  # (m / 2,)

    def forward(self, tokens, cache=None, last_only=False):
        """Logits (B, T, vocab) for tokens (B, T) int64, or (B, 1, vocab) with last_only.

        The tokens follow those already in the cache, and are appended to it.
        """
        x = self.embed_tokens(tokens)  # (B, T, dim)
        start = 0 if cache is None else cache.position
        positions = start + torch.arange(tokens.shape[1], device=x.device)  # (T,)
        # Not a buffer: the frequencies stay float32 in a bf16 model.
        self._frequencies = self._frequencies.to(x.device)  # (m / 2,)
        angle = torch.outer(positions.float(), self._frequencies).repeat(1, 2)  # (T, m)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, cache)
        x = self.norm(x[:, -1:] if last_only else x)
        head = self.embed_tokens if self.config.tied else self.lm_head
        return F.linear(x, head.weight)

    def init_weights(self):
        """GPT-2's initialisation: normal(0.02), less for the projections that write to x."""
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layers))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            else:
                nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
        return self

    @classmethod
    def random(cls, config, device=None, dtype=None, rank=0, ranks=1):
        """Random weights in any shape, made on the device: for measuring without a download."""
        with torch.device("meta"):
            model = parallelize(cls(config).to(dtype or torch.float32), rank, ranks)
        model.to_empty(device=device or best_device()).init_weights()
        return model.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(cls, name_or_path, device=None, dtype=None):
        """Model of a local folder, a Hub id, or "tiny", the embedded one.

        The network is built without memory (meta device) and its weights are put in place one at a
        time. On a CPU they are the file's own pages, mapped and never copied, unless dtype asks for
        a conversion. Default device: the best there is, dtype: the file's. Raises InputError.
        """
        config, device = Config.from_pretrained(name_or_path), device or best_device()
        with torch.device("meta"):
            model = cls(config).requires_grad_(False)
        weights = {}  # without what some files hold, but a Llama computes or shares
        spare = ("inv_freq", "lm_head.weight") if config.tied else "inv_freq"
        index = read_json(name_or_path, "model.safetensors.index.json", required=False)
        files = set(index["weight_map"].values()) if index else {"model.safetensors"}
        for path in [find_file(name_or_path, file) for file in sorted(files)]:
            try:
                shard = load_file(path)
            except (SafetensorError, OSError) as error:
                raise InputError(f"{path} is damaged ({error}); fetch it again") from None
            weights.update((name.removeprefix("model."), weight.to(device, dtype))
                           for name, weight in shard.items() if not name.endswith(spare))
        try:
            model.load_state_dict(weights, assign=True)
        except RuntimeError as error:  # a line for every kind of misfit
            problems = " ".join(str(error).split()).partition("Llama: ")[2]
            raise InputError(f"weights of '{name_or_path}' do not fit its config.json; give the "
                             f"files of one model ({problems})") from None
        return model.eval()

    def save_pretrained(self, folder, dtype=torch.bfloat16):
        """Write config.json and model.safetensors in Hugging Face's layout, never half a file."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name if name == "lm_head.weight" else f"model.{name}": parameter.detach().to(dtype)
                 for name, parameter in self.named_parameters()}
        (folder / "model.part").write_bytes(save(state, metadata={"format": "pt"}))
        os.replace(folder / "model.part", folder / "model.safetensors")
        (folder / "config.part").write_text(json.dumps(self.config.to_hf(), indent=2) + "\n")
        os.replace(folder / "config.part", folder / "config.json")


# --------------------------------------------------------------------------------------------------
# Devices: one, or one for each of the processes that torchrun starts

def best_device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def world(device=None):
    """(device, rank, ranks): what to compute on, and which of how many processes this one is.

    A plain run is rank 0 of 1. Under torchrun every rank has a GPU of its own, and only 0 prints.
    """
    try:
        device = torch.device(device or best_device())
        if device.type == "cuda":  # kernels and graphs go to what is the current one
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
            torch.cuda.set_device(device)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {device} cannot be used here ({reason})") from None
    if "LOCAL_RANK" not in os.environ:
        return device, 0, 1
    if not dist.is_initialized():
        dist.init_process_group()
        atexit.register(dist.destroy_process_group)
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")
    return device, dist.get_rank(), dist.get_world_size()


def parallelize(model, rank, ranks):
    """Leave in a model this rank's share of all heads and hidden units (Shoeybi et al. 2019, arXiv
    1909.08053). Its config then counts the heads that are here: a cache made from it holds theirs.

    By hand, for torch's DTensor takes milliseconds of Python a layer, however small the shares.
    """
    if ranks == 1:
        return model
    for name in ("kv_heads", "ffn_dim"):
        if getattr(model.config, name) % ranks:
            raise InputError(f"the model's {name} = {getattr(model.config, name)} cannot be shared "
                             f"by {ranks} processes; give --nproc-per-node a divisor of it")
    for name, linear in model.layers.named_modules():
        if name.endswith(("o_proj", "down_proj")):  # inputs are shared: outputs are sums over ranks
            linear.weight = nn.Parameter(linear.weight.chunk(ranks, dim=1)[rank])
            if linear.bias is not None:  # counts once
                linear.bias = nn.Parameter(linear.bias * (rank == 0))
            linear.register_forward_hook(lambda linear, x, out: dist.all_reduce(out))
        elif name.endswith("_proj"):  # outputs are shared
            for part, whole in list(linear.named_parameters()):
                setattr(linear, part, nn.Parameter(whole.chunk(ranks)[rank]))
    heads, kv_heads = model.config.n_heads // ranks, model.config.kv_heads // ranks
    model.config = replace(model.config, n_heads=heads, kv_heads=kv_heads)
    return model.requires_grad_(False)


# --------------------------------------------------------------------------------------------------
# Files: a local folder, or the Hugging Face Hub

def find_file(name_or_path, filename, required=True):
    """Path of one file of a model: "tiny" (the embedded one), a local folder, or a Hub id.

    A bare config file will do where a shape is wanted without weights. Files that are not required
    may be absent: then None.
    """
    folder = Path(__file__).parent / "tiny" if str(name_or_path) == "tiny" else Path(name_or_path)
    path = folder if filename == "config.json" and folder.is_file() else folder / filename
    if path.is_file():
        return path
    reason = f"has no {filename}" if folder.exists() else "does not exist"
    if not folder.exists() and len(folder.parts) == 2 and not folder.is_absolute():  # owner/name
        import huggingface_hub as hub  # here, for it takes a while
        try:
            return Path(hub.hf_hub_download(str(name_or_path), filename))
        except (OSError, ValueError) as error:
            # Absent is what the Hub says is not there, now or, as this disk remembers, before.
            absent = isinstance(error, hub.errors.RemoteEntryNotFoundError) or (
                not isinstance(error, hub.errors.HFValidationError)
                and hub.try_to_load_from_cache(str(name_or_path), filename) is not None)
            required = required or not absent
            first_line = str(error).strip().split("\n")[0]
            reason = (f"is no folder, and the Hub gives no {filename} (check network and login: "
                      f"{first_line})")
    if required:
        raise InputError(f"model '{name_or_path}' {reason}; give a folder in Hugging Face layout, "
                         "or a Hub id (owner/name)")
    return None


def read_json(name_or_path, filename, required=True):
    """What one JSON file of a model holds, {} if it may be absent and is."""
    path = find_file(name_or_path, filename, required)
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path else {}
    except (ValueError, TypeError, OSError) as error:
        raise InputError(f"{path} is not readable JSON ({error}); fetch it again") from None


# --------------------------------------------------------------------------------------------------
# Tokenizer: byte-level BPE, run by tiktoken

GPT2_SPLIT = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same once every digit stands alone (SmolLM2): white space before a digit now ends its piece.
DIGITS_SPLIT = r"\p{N}|'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3_SPECIAL = {"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001,
                  "<|start_header_id|>": 128006, "<|end_header_id|>": 128007, "<|eot_id|>": 128009}
# How GPT-2 writes the 256 bytes of a byte-level vocabulary: what prints stands for itself.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
CHARACTERS = zip([*PRINTABLE, *range(256, 256 + len(OTHERS))], PRINTABLE + OTHERS)
BYTES = {chr(code): bytes([byte]) for code, byte in CHARACTERS}


class Tokenizer:
    """Text to ids and back. Text is only ever text: special tokens are in `special`, by name."""

    def __init__(self, encode_text, token_bytes, special, bos_id):
        self.encode_text = encode_text  # str -> list of ids
        self.token_bytes = token_bytes  # id -> bytes
        self.special = special  # name -> id
        self.bos_id = bos_id  # put before a text, or None where the model expects nothing there

    def encode(self, text, bos=True):
        start = [self.bos_id] if bos and self.bos_id is not None else []
        return start + self.encode_text(text)

    def decode(self, ids):
        return b"".join(self.token_bytes.get(i, b"") for i in ids).decode("utf-8", errors="replace")

    def stream(self):
        """A function id -> text for printing token by token: half a character waits for the rest.

        Called with None, at the end, it gives what is left.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda i: decoder.decode(self.token_bytes.get(i, b""), final=i is None)

    @classmethod
    def from_pretrained(cls, name_or_path):
        """From tokenizer.json, or else from a tokenizer.model in tiktoken's format (Llama 3)."""
        hf = read_json(name_or_path, "tokenizer.json", required=False)
        if hf:
            return cls.from_hf(hf)
        path = find_file(name_or_path, "tokenizer.model")
        try:
            pairs = map(bytes.split, path.read_bytes().splitlines())
            ids = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
        except ValueError:
            raise InputError(f"{path} is not in tiktoken's format; add a tokenizer.json") from None
        return cls(bpe_encoder(ids, LLAMA3_SPLIT), {i: token for token, i in ids.items()},
                   LLAMA3_SPECIAL, LLAMA3_SPECIAL["<|begin_of_text|>"])

    @classmethod
    def from_hf(cls, hf):
        """From the dict of a tokenizer.json."""
        vocab, normalizer = hf["model"]["vocab"], hf.get("normalizer")
        special = {token["content"]: token["id"] for token in hf["added_tokens"]}
        bos_id, processor = None, hf.get("post_processor") or {}
        for step in processor.get("processors", [processor]):
            match step:
                case {"single": [{"SpecialToken": {"id": first}}, *_]}:  # a TemplateProcessing
                    bos_id = special[first]
        steps = hf.get("pre_tokenizer") or {}
        steps = steps.get("pretokenizers", [steps])
        byte_level = any(step.get("type") == "ByteLevel" for step in steps)
        token_bytes = {i: bytes_of(token, byte_level) for token, i in vocab.items()
                       if token not in special}
        split = split_pattern(steps)
        if split is None or normalizer not in (None, {"type": "NFC"}):
            return cls(hf_encoder(hf), token_bytes, special, bos_id)
        # A merge is "a b" or ["a", "b"]; a token holds no space, which is written otherwise.
        merged = ["".join(merge).replace(" ", "") for merge in hf["model"]["merges"]]
        try:
            ids = {bytes_of(token): vocab[token] for token in [*BYTES, *merged]}
        except KeyError as missing:
            raise InputError(f"tokenizer.json has no token {missing}; fetch it again") from None
        return cls(bpe_encoder(ids, split, normalizer), token_bytes, special, bos_id)


def bytes_of(token, byte_level=True):
    """The bytes that a token stands for, in either of the spellings of a tokenizer.json."""
    if byte_level:
        return b"".join(BYTES.get(char, char.encode()) for char in token)
    if len(token) == 6 and token.startswith("<0x"):  # "<0x0A>" is a byte
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()  # a low line marks a space


def split_pattern(steps):
    """The regular expression that cuts text as these steps do, or None if they are unknown here."""
    match [{"use_regex": True, **step} for step in steps]:
        case [{"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}]:
            return GPT2_SPLIT
        case [{"type": "Digits", "individual_digits": True},
              {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}]:
            return DIGITS_SPLIT
        case [{"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated",
               "invert": False},
              {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False}]:
            return split
    return None


def bpe_encoder(ids, split, normalizer=None):
    """Byte-level BPE as a function text -> ids. ids: token (bytes) -> id, in order of the merges.

    A merge's place is its priority. tiktoken has one number for priority and id: it gets the
    priority, which is then mapped to the id (some vocabularies follow no order).
    """
    ranks, to_id = {token: rank for rank, token in enumerate(ids)}, list(ids.values())
    bpe = tiktoken.Encoding("bpe", pat_str=split, mergeable_ranks=ranks, special_tokens={})

    def encode_text(text):
        text = unicodedata.normalize("NFC", text) if normalizer else text
        return [to_id[rank] for rank in bpe.encode_ordinary(text)]

    return encode_text


def hf_encoder(hf):
    """The same for what tiktoken cannot run (Mistral 7B, Llama 2): by Hugging Face's package."""
    try:
        import tokenizers
    except ImportError:
        raise InputError("this tokenizer.json needs a package: pip install tokenizers") from None
    other = tokenizers.Tokenizer.from_str(json.dumps(hf))
    other.encode_special_tokens = True  # text stays text
    return lambda text: other.encode(text, add_special_tokens=False).ids


# --------------------------------------------------------------------------------------------------
# Chat: a conversation in the form that the model was taught

ANSWER = "\ud800"  # stands for an answer: half a character, which no text holds
LLAMA3_CHAT = ("<|begin_of_text|>{% for message in messages %}<|start_header_id|>"
               "{{ message.role }}<|end_header_id|>\n\n{{ message.content | trim }}<|eot_id|>"
               "{% endfor %}<|start_header_id|>assistant<|end_header_id|>{{ '\n\n' }}")


class Chat:
    """A model's chat template (Jinja), or Llama 3's for a model that has none but its tokens.

    Only the template writes special tokens: those that a user types are taken out.
    """

    def __init__(self, name_or_path, tokenizer):
        settings = read_json(name_or_path, "tokenizer_config.json", required=False)
        path = find_file(name_or_path, "chat_template.jinja", required=False)  # its newer place
        template = path.read_text(encoding="utf-8") if path else settings.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = {one["name"]: one["template"] for one in template}.get("default")
        if not template and not tokenizer.special.keys() >= LLAMA3_SPECIAL.keys():
            raise InputError(f"model '{name_or_path}' has no chat template, nor Llama 3's special "
                             "tokens; use its instruct version, or --prompt")
        self.name, self.template, self.tokenizer = name_or_path, template or LLAMA3_CHAT, tokenizer
        self.variables = {key: value["content"] if isinstance(value, dict) else value
                          for key, value in settings.items() if key.endswith("_token") and value}
        longest_first = sorted(tokenizer.special, key=len, reverse=True)
        self.special = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")

    def message(self, role, text):
        while self.special.search(text):  # what surrounds one may, without it, form another
            text = self.special.sub("", text)
        return {"role": role, "content": text}

    def render(self, messages):
        """The conversation as text, as far as the header of the answer to come."""
        try:
            import jinja2.sandbox
        except ImportError:
            raise InputError("--chat needs another package: pip install jinja2") from None

        def refuse(reason):
            raise jinja2.TemplateError(reason)

        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.globals.update(raise_exception=refuse, strftime_now=time.strftime)
        try:
            return environment.from_string(self.template).render(
                messages=messages, add_generation_prompt=True, **self.variables)
        except Exception as error:  # a template can fail in any way
            raise InputError(f"the chat template of '{self.name}' does not take this conversation "
                             f"({error}); fix it, or do without a system prompt") from None

    def new_tokens(self, messages):
        """Ids of what comes after the last answer (its end of turn is first), or of all. An answer
        is a message that says ANSWER: its tokens have passed the model, and need no text again."""
        text, ids = self.render(messages).rpartition(ANSWER)[2], []
        for part in self.special.split(text):
            ids += ([self.tokenizer.special[part]] if part in self.tokenizer.special else
                    self.tokenizer.encode(part, bos=False))
        return ids


if __name__ == "__main__":
    model = Llama.from_pretrained("tiny", "cpu", torch.float32)
    tokenizer = Tokenizer.from_pretrained("tiny")
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters: {model.config}")
    tokens = torch.tensor([tokenizer.encode("Once upon a time")])
    for _ in range(40):  # the slow way: without a cache, every token runs the whole text again
        tokens = torch.cat((tokens, model(tokens, last_only=True).argmax(-1)), dim=1)
    print(tokenizer.decode(tokens[0].tolist()))
