"""The sparse-coded KV cache of Lexico (Kim et al. 2025, arXiv 2412.08890).

A language model keeps a key and a value of every token, head and layer, each m numbers of 16 bits.
Lexico keeps a vector x as s coefficients z over a dictionary D of N atoms. The keys and the values
of each layer have a dictionary each, learned once for a model (train_dict.py):

    x  becomes  z D = sum_j z_j d_(n_j)       3 s bytes: s indices of 16 bits, s coefficients of 8

Attention needs neither K nor V back. With q one query, and t running over the coded tokens,

    score_t = <q, k_t>   becomes  sum_j z_tj (q D_k^T)_(n_tj)    N products once, s look-ups a token
    out = sum_t p_t v_t  becomes  w D_v,   w_n = sum of p_t z_tj over all (t, j) with n_tj = n

so both work on tables of N numbers. The newest tokens stay dense in a buffer, and a softmax runs
over both parts together. A prompt attends exactly, and is coded layer by layer as it passes. Ours,
beside the published method: words of levels, a sparsity for each dictionary, dense first tokens."""

import functools
import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from torch.nn.attention.bias import causal_lower_right

from kernels import attend_fused
from model import InputError, Llama, Tokenizer, best_device, door, find_folder
from omp import omp, omp_beam, omp_levels

KEYS, VALUES = 0, 1  # the first dimension of everything that exists for both
FORMAT = "lexico-dictionaries-1"
PIECE, QUERIES = 2**21, 16  # numbers that attention over codes holds at a time, and queries

# ---- Dictionaries --------------------------------------------------------------------------------

class Dictionaries:
    """The 2 L dictionaries of a model, with what is known of their making.

    atoms: (2, L, N, M), unit norm. M = heads x head_dim: so many KV heads of a layer make one vector
    (1 in the paper). scale: (2, L), what a stored coefficient of 1 stands for, so that 8 bits serve
    large keys and small values alike. shape: of the model (see shape_of)."""

    def __init__(self, atoms, scale, shape, **metadata):
        self.atoms, self.scale, self.shape, self.metadata = atoms, scale, shape, metadata
        self.heads = atoms.shape[3] // shape["head_dim"]

    def check(self, config):
        """Raise InputError unless these were learned for a model of this shape."""
        for name, wanted in shape_of(config).items():
            if self.shape.get(name) != wanted:
                raise InputError(f"the dictionary was learned for {self.metadata.get('model')}, where "
                                 f"{name} = {self.shape.get(name)}, not {wanted}; learn one for this "
                                 "model with train_dict.py")
        if config.kv_heads % self.heads:
            raise InputError(f"the dictionary codes {self.heads} heads as one vector, which does not "
                             f"divide the {config.kv_heads} KV heads here; learn another one")
        return self

    def allocate(self, share, coding):
        """Sparsity (2, L) of each dictionary, so that a vector takes `share` of its 16-bit bytes on
        average and the model's output suffers least. Ours: it halves the divergence, and more.

        train_dict.py measured the divergence that each dictionary alone causes at a few sparsities.
        Between them it falls about exponentially, and the divergences of several dictionaries about
        add up: so spend bytes, step by step, where they help most. Few sparsities are on offer, for
        dictionaries of equal sparsity are coded at once."""
        if "divergence" not in self.metadata:
            raise InputError("this dictionary holds no divergences to allocate sparsity by; give "
                             "--sparsity a number, or learn it anew with train_dict.py")
        M, tried = self.atoms.shape[3], np.array(self.metadata["divergence"]["sparsity"])
        kl = np.log(np.maximum(self.metadata["divergence"]["kl"], 1e-9)).reshape(-1, len(tried))
        offers = np.array(sorted({-(-M * i // 64) for i in (2, 3, 4, 6, 8, 11, 15, 20, 26)}))
        after = np.searchsorted(tried, offers).clip(1, len(tried) - 1)  # a measured one, and before
        slope = (kl[:, after] - kl[:, after - 1]) / (tried[after] - tried[after - 1])
        harm = np.exp(kl[:, after - 1] + slope * (offers - tried[after - 1]))  # (2 L, offers)
        size = np.array([CODINGS[coding].nbytes_each(s) for s in offers])
        if not size[0] <= 2 * M * share <= size[-1]:
            raise InputError(f"--sparsity auto:{100 * share:g}% is outside {size[0] / (2 * M):.1%} "
                             f".. {size[-1] / (2 * M):.1%}, what coding {coding} offers")
        left = (2 * M * share - size[0]) * len(harm)  # bytes
        cost, taken = np.diff(size), np.zeros(len(harm), int)
        gain = np.minimum.accumulate(-np.diff(harm) / cost, axis=1)  # for a byte; it never rises
        for best in np.argsort(-gain, axis=None, kind="stable"):
            dictionary, step = divmod(best, len(cost))
            if taken[dictionary] == step and cost[step] <= left:
                taken[dictionary] += 1
                left -= cost[step]
        return offers[taken].reshape(2, -1).tolist()

    def serialise(self):
        """The bytes of a safetensors file, atoms in bfloat16."""
        keys, values = self.atoms.to(torch.bfloat16).contiguous()
        return save({"keys": keys, "values": values, "scale": self.scale.contiguous()}, {
            "format": FORMAT, "about": json.dumps({"shape": self.shape, **self.metadata})})

    def save(self, path):
        """Write one safetensors file; a reader never sees half of it."""
        Path(f"{path}.part").write_bytes(self.serialise())
        os.replace(f"{path}.part", path)

    @classmethod
    def load(cls, path, device="cpu", dtype=torch.float32):
        """Read what save wrote: a file, or a folder or Hub id that holds dictionary.safetensors.
        Raises InputError for what is missing, damaged or not ours."""
        path = Path(path).expanduser()
        if path.is_dir() or not path.exists() and path.suffix != ".safetensors":
            path = find_folder(path, ["dictionary.safetensors"]) / "dictionary.safetensors"
        if not path.is_file():
            raise InputError(f"dictionary '{path}' does not exist; learn one with train_dict.py")
        with door(f"dictionary '{path}' is damaged", "learn it again"):
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
                if header.get("format") != FORMAT:
                    raise InputError(f"'{path}' is not a dictionary of format {FORMAT}; give one that "
                                     "train_dict.py wrote")
                keys, values, scale = map(file.get_tensor, ("keys", "values", "scale"))
            atoms, about = torch.stack((keys, values)).to(dtype), json.loads(header["about"])
            shape, (L, _, M) = about.pop("shape"), keys.shape
            harm = about.get("divergence", {"kl": np.ones((2, L, 2)), "sparsity": (1, 2)})
            kl, tried = (np.array(harm[name], float) for name in ("kl", "sparsity"))
            if not (shape["n_layers"] == L and M % shape["head_dim"] == 0 and scale.shape == (2, L)
                    and kl.shape == (2, L, len(tried)) and (kl >= 0).all() and len(tried) > 1
                    and (np.diff(tried, prepend=0) > 0).all() and (scale > 0).all()
                    and atoms.isfinite().all() and scale.isfinite().all()):
                raise ValueError("NaN, a scale that is not above 0, or shapes that do not agree")
        return cls(atoms.to(device), scale.to(device), shape, **about)

    @classmethod
    def find(cls, model):
        """Path of the dictionary that lies in a model's folder, or for it in dictionaries/."""
        name = f"dictionaries/*--{Path(model).name}.safetensors"
        for path in [find_folder(model) / "dictionary.safetensors", *Path(__file__).parent.glob(name)]:
            if path.is_file():
                return path
        raise InputError(f"no dictionary is known for model '{model}'; give --dictionary or --dense, "
                         f"or learn one: python train_dict.py --model {model}")

def shape_of(config):
    """What must agree between a dictionary and a model. A layer's heads share its atoms."""
    return {name: getattr(config, name)
            for name in ("vocab_size", "dim", "n_layers", "head_dim", "rope_theta")}

# ---- Codes: how indices and coefficients are stored ----------------------------------------------

class Codes:
    """The coded vectors of one dictionary, (B, H, capacity) of them, with s coefficients each.

    D: (N, M) atoms. scale: (), what a stored coefficient of 1 stands for. parts: two tensors,
    (B, H, capacity, .), whose last dimension and type a subclass names in `columns`. It also says
    how vectors Y (n, B, M) over D (n, N, M) become parts, and parts indices and coefficients."""

    def __init__(self, D, scale, sparsity, batch, kv_heads):
        self.D, self.scale, self.sparsity, self.bits = D, scale, sparsity, self.level_bits(len(D))
        self.parts = [torch.empty(batch, kv_heads, 0, width, dtype=dtype, device=D.device)
                      for width, dtype in self.columns(sparsity)]

    def reserve(self, capacity):
        """Make room for `capacity` tokens in all; room that has to grow at least doubles."""
        for i, old in enumerate(self.parts):
            if capacity > (room := old.shape[2]):
                self.parts[i] = old.new_empty(*old.shape[:2], max(capacity, 2 * room), old.shape[3])
                self.parts[i][:, :, :room] = old

    def write(self, positions, parts):
        """Store what encode gave for vectors (B, H, T) as tokens `positions` (T,)."""
        for stored, part in zip(self.parts, parts):
            part = part.view(*stored.shape[:2], len(positions), -1).to(stored.dtype)
            # As bytes, for not every operation knows FP8.
            stored.view(torch.uint8).index_copy_(2, positions, part.view(torch.uint8))

    def read(self, start, end):
        """Indices int32 and coefficients float32, (B H, T, s), of tokens start .. end; coefficients
        are in units of the scale."""
        return self.decode(*(part[:, :, start:end].flatten(0, 1) for part in self.parts))

    @classmethod
    def nbytes_each(cls, sparsity):
        """Bytes of one coded vector."""
        return sum(width * dtype.itemsize for width, dtype in cls.columns(sparsity))

class FP8Codes(Codes):
    """The published format, 3 s bytes: s int16 indices, s coefficients in FP8 E4M3 (a sign, 4 bits
    of exponent, 3 of mantissa). What is larger than E4M3's largest number, 448, becomes that."""

    most_atoms, level_bits = 2**15, staticmethod(lambda n_atoms: 0)
    columns = staticmethod(lambda s: ((s, torch.int16), (s, torch.float8_e4m3fn)))
    # What the 256 bytes mean. (A look-up: torch converts FP8 slowly on a CPU.)
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()

    @staticmethod
    def encode(D, Y, sparsity, pursuit):
        indices, z = pursuit(D, Y, sparsity)  # (n, B, s)
        return indices, z.clamp(-448, 448)

    def decode(self, indices, coefficients):
        which = coefficients.view(torch.uint8).flatten().int()
        floats = self.numbers.to(which.device).index_select(0, which)
        return indices.int(), floats.view(indices.shape)

class WordCodes(Codes):
    """Ours, 2 s + 1 bytes: s words of 16 bits, the index in the upper bits, in the rest a signed
    level, and a byte e beside them. A coefficient is level * 2^(e / 16 - 8) in units of the scale.
    With N = 2048 it errs as little as FP8 in two thirds of the bytes."""

    most_atoms, level_bits = 2**13, staticmethod(lambda n_atoms: 16 - (n_atoms - 1).bit_length())
    columns = staticmethod(lambda s: ((s, torch.int16), (1, torch.uint8)))

    @staticmethod
    def encode(D, Y, sparsity, pursuit):
        bits = WordCodes.level_bits(D.shape[1])
        indices, level, e = omp_levels(D, Y, sparsity, bits, pursuit)
        # What passes 2^15 wraps when it is stored as int16: the bits are the same.
        return (indices << bits) | (level & ((1 << bits) - 1)), e

    def decode(self, words, e):
        words = words.int()
        level = (words << (32 - self.bits)) >> (32 - self.bits)  # the low bits, with their sign
        return (words & 0xFFFF) >> self.bits, level * torch.exp2(e.float() / 16 - 8)

CODINGS = {"fp8": FP8Codes, "word": WordCodes}

# ---- Attention over codes ------------------------------------------------------------------------

def attend_codes(q, key_codes, value_codes, compressed, keys, values, seen):
    """Attention over coded tokens and dense ones, in one softmax.

    q: (B, G H, T, m). key_codes, value_codes: Codes, of which the first `compressed` tokens count
    (a number, or a tensor () on the device). keys, values: (B, H, S, m), dense, where seen (T, S).
    Returns the output, shaped as q. Queries are taken a few at a time, and tokens in pieces: what
    is held beside the scores stays small, whatever the context.

    If a vector holds several heads, as M = heads x m numbers, every row of q is one of M numbers, 0
    but for its own head's, and of the output (M numbers) its own head's are taken."""
    (B, _, T, m), H, n, dtype = q.shape, keys.shape[1], int(compressed), q.dtype
    Dk, Dv, heads = key_codes.D.float(), value_codes.D.float(), key_codes.D.shape[1] // m  # (N, M)
    own = torch.eye(heads, device=q.device).view(1, heads, 1, 1, heads, 1)
    q = q.reshape(B * H, -1, T, m).float() / m**0.5  # (B H, G, T, m)
    keys, values = keys.flatten(0, 1).float(), values.flatten(0, 1).float()  # (B H, S, m)
    P, G = B * H // heads, q.shape[1]
    size = max(1, PIECE // (P * heads * G * min(T, QUERIES) * value_codes.sparsity))
    pieces = [(start, min(start + size, n)) for start in range(0, n, size)]
    outs = []
    for rows, allowed in zip(q.split(QUERIES, dim=2), seen.split(QUERIES)):
        wide = (rows.view(P, heads, G, -1, 1, m) * own).flatten(4).flatten(1, 3)  # (P, R, M)
        scores = [scores_over_codes(wide * key_codes.scale, Dk, *key_codes.read(*piece))
                  for piece in pieces]
        dense = (rows.flatten(1, 2) @ keys.mT).unflatten(1, (G, -1))  # (B H, G, T, S)
        scores.append(dense.masked_fill(~allowed, -torch.inf).view(P, wide.shape[1], -1))
        p = torch.softmax(torch.cat(scores, dim=-1), dim=-1)  # (P, R, n + S), R = heads G T
        out = p[..., n:].reshape(B * H, -1, keys.shape[1]) @ values  # (B H, G T, m)
        if pieces:
            w = p.new_zeros(wide.shape[1], P, len(Dv))  # (R, P, N)
            for start, end in pieces:
                add_over_codes(w, p[..., start:end], *value_codes.read(start, end))
            wide = (w @ Dv).transpose(0, 1) * value_codes.scale  # (P, R, M)
            wide = wide.view(P, heads, G, -1, heads, m) * own
            out = out + wide.sum(4).view_as(out)
        outs.append(out.unflatten(1, (G, -1)))  # (B H, G, T, m)
    return torch.cat(outs, dim=2).reshape(B, -1, T, m).to(dtype)

def join(x, heads):
    """Vectors of one head x (..., H, T, m) as vectors of several, (..., H / heads, T, heads m)."""
    return x.unflatten(-3, (-1, heads)).transpose(-3, -2).flatten(-2)

def split(x, heads):
    """The other way: (..., H / heads, T, heads m) as (..., H, T, m)."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2).flatten(-4, -3)

def scores_over_codes(q, D, indices, coefficients):
    """<q, z D> of every query and coded token, without z D. q: (P, R, m), R query rows for each of
    P codes of a token. D: (N, m). indices, coefficients: (P, T, s). Returns (P, R, T)."""
    (P, R, m), (T, s), N = q.shape, indices.shape[1:], len(D)
    table = (q.reshape(P * R, m) @ D.T).view(P, R, N).mT  # every query with every atom
    offset = torch.arange(0, P * N, N, dtype=torch.int32, device=q.device)  # of each one's table
    out = F.embedding_bag((indices + offset[:, None, None]).view(P * T, s), table.reshape(P * N, R),
                          per_sample_weights=coefficients.reshape(P * T, s), mode="sum")
    return out.view(P, T, R).mT

def add_over_codes(w, p, indices, coefficients):
    """Add p z to the table w (R, P, N), at z's indices. p: (P, R, T), codes: (P, T, s)."""
    R, P, N = w.shape
    offset = torch.arange(0, P * N, N, dtype=torch.int32, device=w.device)
    targets = (indices + offset[:, None, None]).view(1, -1).long().expand(R, -1)  # (R, P T s)
    added = p.transpose(0, 1).contiguous()[..., None] * coefficients  # (R, P, T, s)
    w.view(R, P * N).scatter_add_(1, targets, added.view(R, -1))

# ---- Caches --------------------------------------------------------------------------------------

class Counters:
    """Tokens that a cache has seen, and how many of them are coded: on the host, for shapes, and on
    the device, where a recorded step reads them."""

    def __init__(self, device):
        self.length = self.compressed = 0
        self.position, self.boundary = torch.zeros(2, dtype=torch.long, device=device)

    def advance(self, tokens=0, compressed=0, replayed=False):
        """The one place where counters move. A replayed step has moved the device's by itself."""
        self.length += tokens
        self.compressed += compressed
        if not replayed:
            self.position += tokens
            self.boundary += compressed

class DenseCache(Counters):
    """Every key and value as it is: the baseline, (2, L, B, H, capacity, m)."""

    replayable = True  # a decoding step is the same launches at every length

    def __init__(self, config, batch=1, capacity=0, device=None, dtype=torch.float32):
        super().__init__(device or best_device())
        self.kv = torch.zeros(2, config.n_layers, batch, config.kv_heads, capacity,
                              config.head_dim, device=self.position.device, dtype=dtype)

    def begin(self, T):
        old, room, self.last = self.kv, self.kv.shape[4], self.length + T
        if self.last > room:
            self.kv = old.new_zeros(*old.shape[:4], max(self.last, 2 * room), old.shape[5])
            self.kv[..., :room, :] = old
        self.new = self.position + torch.arange(T, device=self.kv.device)  # (T,)
        self.mask = causal_lower_right(T, self.last) if T > 1 and self.length else None
        if T == 1 and self.kv.is_cuda:  # over all of the room, so that every step looks alike
            self.last = self.kv.shape[4]
            self.mask = (torch.arange(self.last, device=self.kv.device) <= self.position)[None]

    def attend(self, layer, q, k, v):
        """Append k, v (B, H, T, m), attend with q (B, G H, T, m): the output, shaped as q."""
        for x, cached in zip((k, v), self.kv[:, layer]):
            cached.index_copy_(2, self.new, x.to(cached.dtype))
        keys, values = self.kv[:, layer, :, :, :self.last].to(q.dtype)
        causal = self.mask is None and q.shape[2] > 1
        return F.scaled_dot_product_attention(q, keys, values, self.mask, is_causal=causal,
                                              enable_gqa=True)

    def end(self, T):
        self.advance(T)

    def nbytes(self):
        used = self.kv[..., :self.length, :].numel()
        return {"total": used * self.kv.itemsize, "dense": used * 2, "allocated": self.kv.nbytes}

class SparseCache(Counters):
    """Codes of all tokens but the first and the newest, which stay dense.

    sparsity: coefficients a vector, one number or one for each dictionary (2, L). buffer: newest
    tokens always kept dense. window: tokens coded at a time once the buffer overflows. sinks: first
    tokens that stay dense for good. batch: sequences, all of one length. capacity: tokens to
    reserve room for, where known. coding: how codes are stored (CODINGS). pursuit: a function
    (D, Y, sparsity) -> indices, coefficients for D (N, m) and Y (B, m). dtype: of what is dense."""

    replayable = False  # until a step was seen to be the same launches at every length

    def __init__(self, config, dictionaries, sparsity=8, buffer=32, window=16, sinks=0, batch=1,
                 capacity=0, coding="word", pursuit=omp, dtype=None):
        atoms, scale = dictionaries.check(config).atoms, dictionaries.scale
        super().__init__(atoms.device)
        table = [[sparsity] * config.n_layers] * 2 if isinstance(sparsity, int) else sparsity
        (N, M), flat = atoms.shape[2:], table[KEYS] + table[VALUES]
        if coding not in CODINGS or N > CODINGS[coding].most_atoms:
            raise InputError(f"coding '{coding}' is unknown, or has no room for {N} atoms; use " + ", ".
                             join(f"{name} (up to {CODINGS[name].most_atoms})" for name in CODINGS))
        if not 1 <= min(flat) <= max(flat) <= min(N, M) or min(buffer, window - 1, sinks) < 0:
            raise InputError(f"sparsity {sparsity} is outside 1 .. {min(N, M)}, for vectors of {M} "
                             f"numbers, or buffer {buffer}, window {window} or sinks {sinks} too low")
        self.config, self.dictionaries = config, dictionaries
        self.buffer, self.window, self.sinks = buffer, window, sinks
        # A search that was written for one dictionary is called for one after the other.
        batched = getattr(pursuit, "func", pursuit) in (omp, omp_beam)
        self.pursuit = pursuit if batched else functools.partial(one_by_one, pursuit)
        self.codes = {(kind, layer): CODINGS[coding](atoms[kind, layer], scale[kind, layer], s, batch,
                                                     config.kv_heads // dictionaries.heads)
                      for kind in (KEYS, VALUES) for layer, s in enumerate(table[kind])}
        for codes in self.codes.values():
            codes.reserve(max(0, capacity - buffer - sinks))
        # Dense tokens lie in slots: the sinks first, each for good, then a ring (see slot_of). Keys
        # carry their position (they are kept after RoPE), so attention does not mind the order.
        self.slots = torch.arange(sinks + buffer + window, device=atoms.device)
        self.dense = torch.zeros(2, config.n_layers, batch, config.kv_heads, len(self.slots),
                                 config.head_dim, device=atoms.device, dtype=dtype or atoms.dtype)

    def slot_of(self, t):
        ring = self.buffer + self.window
        return torch.where(t < self.sinks, t, self.sinks + (t - self.sinks) % ring)

    @property
    def waiting(self):
        """Tokens in the ring, not coded yet."""
        return self.length - self.sinks - self.compressed

    @property
    def full(self):
        """Whether it is time to code the oldest tokens of the ring."""
        return self.waiting >= self.buffer + self.window

    def begin(self, T):
        """Work out, for all layers, where T new tokens go and what they see."""
        if T == 1 and self.full:
            self.compress()
        # As many of the ring's and of the new tokens as pass the buffer are coded at once.
        self.leaving = max(0, self.waiting + T - self.buffer) if T > 1 else 0
        if T == 1:
            self.tokens, ring = self.position.view(1), self.buffer + self.window
            age = (self.position - self.slots) % ring  # of the ring's slots, 0: the newest token
            waiting = self.position + 1 - self.sinks - self.boundary
            self.seen = torch.where(self.slots < self.sinks, self.slots <= self.position,
                                    age < waiting)[None]  # (1, S)
        else:
            t = torch.arange(self.length + T, device=self.slots.device)
            self.tokens = t[(t < self.sinks) | (t >= self.sinks + self.compressed)]  # all dense ones
            self.seen = self.tokens <= t[self.length:, None]  # (T, S)

    def attend(self, layer, q, k, v):
        """Append k, v (B, H, T, m), attend with q (B, G H, T, m): the output, shaped as q."""
        dense, codes = self.dense[:, layer], [self.codes[kind, layer] for kind in (KEYS, VALUES)]
        T, slots = q.shape[2], self.slot_of(self.tokens)
        if T == 1:
            for x, stored in zip((k, v), dense):
                stored.index_copy_(2, slots, x.to(stored.dtype))
            step = q, *codes, self.boundary, *dense, self.seen
            out = attend_fused(*step)
            self.replayable = out is not None and self.pursuit is omp
            return attend_codes(*step) if out is None else out
        if self.length == 0:  # a prompt attends exactly
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            k, v = (torch.cat((stored[:, :, slots[:-T]].to(x.dtype), x), dim=2)
                    for stored, x in zip(dense, (k, v)))  # (B, H, S, m)
            out = attend_codes(q, *codes, self.boundary, k, v, self.seen)
        leaves = slice(self.sinks, self.sinks + self.leaving)
        stays = torch.ones_like(slots, dtype=torch.bool)
        stays[leaves] = False
        for kind, x in enumerate((k, v)):
            if self.leaving:
                self.encode([(kind, layer)], self.tokens[leaves] - self.sinks, x[None, :, :, leaves])
            dense[kind][:, :, slots[stays]] = x[:, :, stays].to(dense.dtype)
        return out

    def end(self, T):
        self.advance(T, self.leaving)

    def compress(self):
        """Code the oldest `window` tokens of the ring, for all layers, keys and values together.

        Called by every decoding step that finds the ring full. A caller that wants to time it, or
        to have it done while it waits, calls it between steps. With fewer tokens it does nothing.
        """
        if self.waiting < self.window:
            return
        coded = self.boundary + torch.arange(self.window, device=self.slots.device)
        oldest = self.dense.index_select(4, self.slot_of(self.sinks + coded))
        groups = {}  # dictionaries of equal sparsity are pursued at once
        for key, codes in self.codes.items():
            groups.setdefault(codes.sparsity, []).append(key)
        for keys in groups.values():
            self.encode(keys, coded, torch.stack([oldest[key] for key in keys]))
        self.advance(compressed=self.window)

    def encode(self, keys, positions, x):
        """Code vectors x (n, B, H, T, m) of the n dictionaries `keys`, which have one sparsity, as
        tokens `positions` (T,)."""
        group, D = [self.codes[key] for key in keys], self.dictionaries.atoms.flatten(0, 1)
        if len(group) < len(self.codes):  # all of them are there without a copy
            D = torch.stack([codes.D for codes in group]) if len(group) > 1 else group[0].D[None]
        scale = torch.stack([codes.scale for codes in group]).view(-1, 1, 1, 1, 1)
        Y = join(x / scale, self.dictionaries.heads).flatten(1, 3)  # (n, B H T, M), float32
        parts = group[0].encode(D, Y, group[0].sparsity, self.pursuit)
        for codes, *own in zip(group, *parts):
            codes.reserve(self.compressed + x.shape[3])
            codes.write(positions, own)

    def nbytes(self):
        """Bytes in use by codes, by what is dense and in total, of the dictionaries (which are there
        once, whatever context and batch), allocated in all, and of a dense 16-bit cache; and the
        share of a vector's 16-bit bytes that its code takes."""
        each = [codes.nbytes_each(codes.sparsity) for codes in self.codes.values()]
        B, H = self.dense.shape[2:4]
        plain = 2 * self.config.head_dim * len(each) * B * H  # of a token, in 16 bits
        packed = sum(each) * B * H // self.dictionaries.heads
        codes, waiting = packed * self.compressed, self.length - self.compressed
        constant = self.dictionaries.atoms.nbytes + self.dictionaries.scale.nbytes
        reserved = sum(part.nbytes for codes in self.codes.values() for part in codes.parts)
        buffer = waiting * self.dense[..., 0, :].nbytes
        return {"codes": codes, "buffer": buffer, "total": codes + buffer,
                "dense": plain * self.length, "dictionaries": constant,
                "allocated": reserved + self.dense.nbytes + constant, "vector": packed / plain}

def one_by_one(pursuit, D, Y, sparsity):
    """A pursuit of one dictionary (N, m), for each of D (n, N, m) and its vectors Y (n, B, m)."""
    return tuple(torch.stack(part) for part in zip(*(pursuit(*one, sparsity) for one in zip(D, Y))))

if __name__ == "__main__":  # 100 tokens of a text one by one: bytes of a vector, KL to dense
    model, d = Llama.from_pretrained("tiny"), Dictionaries.load(Dictionaries.find("tiny"))
    text = (find_folder("tiny") / "held-out.txt").read_text(encoding="utf-8")
    tokens = torch.tensor([Tokenizer.from_pretrained("tiny").encode(text)[:400]])
    full = model(tokens)[0, 300:].float().log_softmax(-1)
    for s in (2, 4, 8, 16):
        cache = SparseCache(model.config, d, s, coding="fp8")
        steps = [model(part, cache) for part in tokens.split([300] + [1] * 100, dim=1)]
        log_p = torch.cat(steps, dim=1)[0, 300:].float().log_softmax(-1)
        kl = (full.exp() * (full - log_p)).sum(-1).mean()
        print(f"s = {s:2d}  {cache.nbytes()['vector']:6.1%}  KL {kl:.4f}")
