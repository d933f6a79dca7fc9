"""The sparse-coded KV cache of Lexico (Kim et al. 2025, arXiv 2412.08890).

A language model keeps a key and a value of every token, head and layer, each m numbers of 16 bits.
Lexico keeps a vector x as s coefficients z over a dictionary D of N atoms. The keys and the values
of each layer have a dictionary each, learned once for a model (train_dict.py):

    x  becomes  z D = sum_j z_j d_(n_j)       3 s bytes: s indices of 16 bits, s coefficients of 8

Attention needs neither K nor V back. With q one query, and t running over the coded tokens,

    score_t = <q, k_t>   becomes  sum_j z_tj (q D_k^T)_(n_tj)    N products once, s look-ups a token
    out = sum_t p_t v_t  becomes  w D_v,   w_n = sum of p_t z_tj over all (t, j) with n_tj = n

times 1 / sqrt(m) and a dictionary's scale. Both work on tables of N numbers. The newest tokens
stay dense in a buffer, and one softmax runs over both parts. A prompt attends exactly, and is coded
layer by layer as it passes. Ours, beside what was published: WordCodes, a sparsity for each
dictionary, first tokens that stay dense (sinks), several heads as one vector."""

import json
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from kernels import attend_fused
from model import InputError, best_device, door, find_folder
from omp import in_one_table, omp, omp_beam, omp_levels, one_by_one

KEYS, VALUES = 0, 1  # the first dimension of everything that exists for both
FORMAT = "lexico-dictionaries-1"
PIECE, QUERIES = 2**21, 16  # what attention over codes holds at a time: products, and queries

# ---- Dictionaries --------------------------------------------------------------------------------

class Dictionaries:
    """The 2 L dictionaries of a model, with what is known of their making.
    atoms: (2, L, N, M), unit norm. M = heads x head_dim: a vector spans so many KV heads of a layer
    (1 in the paper). scale: (2, L), what a stored coefficient of 1 stands for, so that 8 bits serve
    large keys and small values alike. shape: of the model (see shape_of)."""

    def __init__(self, atoms, scale, shape, **metadata):
        self.atoms, self.scale, self.shape, self.metadata = atoms, scale, shape, metadata
        self.heads = atoms.shape[3] // shape["head_dim"]

    def check(self, config):
        """Raise InputError unless these were learned for a model of this shape."""
        wrong = [f"{name} = {self.shape.get(name)}, not {value}"
                 for name, value in shape_of(config).items() if value != self.shape.get(name)]
        if config.kv_heads % self.heads:
            wrong.append(f"{self.heads} heads a vector, no divisor of {config.kv_heads} KV heads")
        if wrong:
            raise InputError(f"the dictionary was learned for another model ({', '.join(wrong)}); "
                             "learn one for this model with train_dict.py")
        return self

    def allocate(self, share, coding):
        """Sparsity (2, L) of each dictionary, so that a vector takes `share` of its 16-bit bytes on
        average and the model's output suffers least. train_dict.py measured the divergence that
        each dictionary alone causes at a few sparsities. Between them it falls about exponentially,
        and those of several about add up: so spend bytes step by step, where they help most. Nine
        sparsities at most are offered, for dictionaries of equal sparsity share a call."""
        if "divergence" not in self.metadata:
            raise InputError("this dictionary holds no divergences to allocate sparsity by; give "
                             "--sparsity a number, or learn it anew with train_dict.py")
        M, tried = self.atoms.shape[3], np.array(self.metadata["divergence"]["sparsity"])
        log_kl = np.log(np.maximum(self.metadata["divergence"]["kl"], 1e-9)).reshape(-1, len(tried))
        offers = np.unique(-(-M * np.array((2, 3, 4, 6, 8, 11, 15, 20, 26)) // 64))
        after = np.searchsorted(tried, offers).clip(1, len(tried) - 1)  # the line's upper end
        slope = (log_kl[:, after] - log_kl[:, after - 1]) / (tried[after] - tried[after - 1])
        harm = np.exp(log_kl[:, after - 1] + slope * (offers - tried[after - 1]))  # (2 L, offers)
        size = np.array([CODINGS[coding].nbytes_each(s) for s in offers]) / (2 * M)  # as shares
        if not size[0] <= share <= size[-1]:
            raise InputError(f"--sparsity auto:{100 * share:g}% is outside {100 * size[0]:.6g}% .. "
                             f"{100 * size[-1]:.6g}%, what {coding} offers; choose within it")
        left, cost, taken = (share - size[0]) * len(harm), np.diff(size), np.zeros(len(harm), int)
        gain = np.minimum.accumulate(-np.diff(harm) / cost, axis=1)  # per byte, made never to rise
        for best in np.argsort(-gain, axis=None, kind="stable"):
            dictionary, step = divmod(best, len(cost))
            if taken[dictionary] == step and cost[step] <= left:
                taken[dictionary] += 1
                left -= cost[step]
        return offers[taken].reshape(2, -1).tolist()

    def serialise(self):
        """The bytes of a safetensors file, atoms in bfloat16."""
        keys, values = self.atoms.to(torch.bfloat16).contiguous()
        tensors = {"keys": keys, "values": values, "scale": self.scale.contiguous()}
        about = json.dumps({"shape": self.shape, **self.metadata})
        return safetensors.torch.save(tensors, {"format": FORMAT, "about": about})

    @classmethod
    def load(cls, path, device="cpu", dtype=torch.float32):
        """Read serialise's bytes: a file, or a folder or Hub id with dictionary.safetensors in it.
        Raises InputError for what is missing, damaged or not ours."""
        path = Path(path).expanduser()
        hub_id = len(path.parts) == 2 and path.suffix != ".safetensors" and not path.exists()
        if path.is_dir() or hub_id or str(path) == "tiny":
            path = find_folder(path, ["dictionary.safetensors"]) / "dictionary.safetensors"
        if not path.is_file():
            raise InputError(f"dictionary '{path}' does not exist; learn one with train_dict.py")
        damage = door(f"dictionary '{path}' is damaged", "learn it again")
        with damage, safetensors.safe_open(path, "pt") as file:
            if (header := file.metadata() or {}).get("format") != FORMAT:
                raise ValueError(f"it is not a dictionary of format {FORMAT}")
            keys, values, scale = map(file.get_tensor, ("keys", "values", "scale"))
            atoms, about = torch.stack((keys, values)).to(dtype), json.loads(header["about"])
            (L, _, M), shape = keys.shape, about["shape"]
            measured = about.get("divergence", {"kl": np.ones((2, L, 2)), "sparsity": (1, 2)})
            kl, tried = (np.array(measured[name], float) for name in ("kl", "sparsity"))
            if not (shape["n_layers"] == L and M % shape["head_dim"] == 0 and scale.shape == (2, L)
                    and type(shape["head_dim"]) is int and len(tried) > 1
                    and kl.shape == (2, L, len(tried)) and ((kl >= 0) & (kl < np.inf)).all()
                    and (np.diff(tried, prepend=0) > 0).all() and scale.log().isfinite().all()
                    and ((atoms.float().norm(dim=-1) - 1).abs() < 0.02).all() and keys.numel()):
                raise ValueError("NaN, atoms not of length 1, a scale not above 0, or other shapes")
            dictionaries = cls(atoms, scale, **about)
        dictionaries.atoms, dictionaries.scale = atoms.to(device), scale.to(device)
        return dictionaries

    @classmethod
    def find(cls, model):
        """Path of a model's dictionary: in its own folder, or else in dictionaries/."""
        path = Path(model).absolute()
        owner = "*" if path.is_dir() else path.parent.name  # the latter of a Hub id
        learned = Path(__file__).parent.glob(f"dictionaries/{owner}--{path.name}.safetensors")
        for path in (find_folder(model) / "dictionary.safetensors", *learned):
            if path.is_file():
                return path
        raise InputError(f"no dictionary is known for '{model}'; give --dictionary FILE, or learn "
                         f"one: python train_dict.py --model {model}")

def shape_of(config):
    """What must agree between dictionaries and a model. Not kv_heads: all heads share the atoms."""
    return {name: getattr(config, name)
            for name in ("vocab_size", "dim", "n_layers", "head_dim", "rope_theta")}

# ---- Codes: how indices and coefficients are stored ----------------------------------------------

class Codes:
    """The coded vectors of one dictionary, (B, H / heads, capacity) of them, s coefficients each.

    D: (N, M) atoms. scale: (), what a stored coefficient of 1 stands for. parts: two tensors,
    (B, H / heads, capacity, .), whose last dimension and type a subclass names in `columns`. Its
    encode turns vectors Y (n, V, M), in units of the scale, over D (n, N, M) into parts, its decode
    parts into indices and coefficients. level_bits(N): bits of a word's level, or 0."""
    most_atoms, level_bits = 2**15, staticmethod(lambda n_atoms: 0)

    def __init__(self, D, scale, sparsity, batch, vectors, capacity=0):
        self.D, self.scale, self.sparsity, self.bits = D, scale, sparsity, self.level_bits(len(D))
        self.parts = [torch.zeros(batch, vectors, capacity, width, dtype=dtype, device=D.device)
                      for width, dtype in self.columns(sparsity)]

    def reserve(self, capacity):
        """Make room for `capacity` tokens in all."""
        self.parts = [with_room(part, capacity) for part in self.parts]

    def write(self, positions, parts):
        """Store what encode gave for vectors (B, H / heads, T), at places `positions` (T,). As
        bytes: few operations know FP8."""
        for stored, part in zip(self.parts, parts):
            part = part.view(*stored.shape[:2], len(positions), -1).to(stored.dtype)
            stored.view(torch.uint8).index_copy_(2, positions, part.view(torch.uint8))

    def read(self, start, end):
        """Indices int32 and coefficients float32, in units of the scale, of tokens start .. end:
        (P, T, s), P = B H / heads."""
        return self.decode(*(part[:, :, start:end].flatten(0, 1) for part in self.parts))

    @classmethod
    def nbytes_each(cls, sparsity):
        """Bytes of one coded vector."""
        return sum(width * dtype.itemsize for width, dtype in cls.columns(sparsity))

def with_room(x, tokens):
    """x (..., room, .), copied into at least twice the room if so many tokens do not fit."""
    *outer, room, width = x.shape
    more = max(tokens - room, room)
    return x if tokens <= room else torch.cat((x, x.new_zeros(*outer, more, width)), dim=-2)

class FP8Codes(Codes):
    """The published format, 3 s bytes: s int16 indices, s coefficients in FP8 E4M3 (a sign, 4 bits
    of exponent, 3 of mantissa). What is larger than E4M3's largest number, 448, becomes that."""
    columns = staticmethod(lambda s: ((s, torch.int16), (s, torch.float8_e4m3fn)))
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # of each byte

    def encode(self, D, Y, sparsity, pursuit):
        indices, z = pursuit(D, Y, sparsity)  # (n, V, s)
        return indices, z.clamp(-448, 448)

    def decode(self, indices, coefficients):
        byte = coefficients.view(torch.uint8).flatten().int()  # torch converts FP8 slowly on a CPU
        z = self.numbers.to(byte.device).index_select(0, byte)
        return indices.int(), z.view(indices.shape)

class WordCodes(Codes):
    """Ours, 2 s + 1 bytes: s words of 16 bits, the index in the upper bits, in the rest a signed
    level, and a byte e beside them. A coefficient is level * 2^(e / 16 - 8) in units of the scale.
    With N = 2048 it errs as little as FP8 in two thirds of the bytes."""
    most_atoms, level_bits = 2**13, staticmethod(lambda n_atoms: 16 - (n_atoms - 1).bit_length())
    columns = staticmethod(lambda s: ((s, torch.int16), (1, torch.uint8)))

    def encode(self, D, Y, sparsity, pursuit):
        indices, level, e = omp_levels(D, Y, sparsity, self.bits, pursuit)
        # What passes 2^15 wraps when it is stored as int16: the bits are the same.
        return (indices << self.bits) | (level & ((1 << self.bits) - 1)), e

    def decode(self, words, e):
        words = words.int()
        level = (words << (32 - self.bits)) >> (32 - self.bits)  # the low bits, with their sign
        return (words & 0xFFFF) >> self.bits, level * torch.exp2(e.float() / 16 - 8)

CODINGS = {"fp8": FP8Codes, "word": WordCodes}

# ---- Attention over codes ------------------------------------------------------------------------

def scores_over_codes(q, D, indices, coefficients):
    """<q, z D> of every query and coded token, without z D. q: (P, R, m), R queries for each of the
    P codes of a token, head by head. D: (N, M), where a query meets the m numbers of its own head.
    indices, coefficients: (P, T, s). Returns (P, R, T)."""
    (P, R, m), (T, s), (N, M) = q.shape, indices.shape[1:], D.shape
    q, D = q.unflatten(1, (M // m, -1)), D.unflatten(1, (M // m, m))
    table = torch.einsum("phrm,nhm->pnhr", q, D)  # every query with every atom
    out = F.embedding_bag(in_one_table(indices, N).view(P * T, s), table.reshape(P * N, R),
                          per_sample_weights=coefficients.reshape(P * T, s), mode="sum")
    return out.view(P, T, R).mT

def add_over_codes(w, p, indices, coefficients):
    """Add p z to the table w (P, R, N), at z's indices. p: (P, R, T), codes: (P, T, s)."""
    targets = indices.flatten(1)[:, None].long().expand(-1, w.shape[1], -1)  # (P, R, T s)
    w.scatter_add_(2, targets, (p[..., None] * coefficients[:, None]).flatten(2))

def attend_codes(q, key_codes, value_codes, compressed, keys, values, seen):
    """Attention over coded tokens and dense ones, in one softmax.

    q: (B, G H, T, m). key_codes, value_codes: Codes, of which the first `compressed` tokens count
    (a number, or a tensor () on the device). keys, values: (B, H, S, m), dense. seen: (T, S).
    Returns the output, shaped as q. Tokens are taken in pieces: what is held beside the scores
    stays small, whatever the context."""
    n, (B, H, S, m) = int(compressed), keys.shape
    Dk, Dv, heads = key_codes.D.float(), value_codes.D.float(), key_codes.D.shape[1] // m
    q_heads = q.reshape(B * H, -1, m).float() / m**0.5  # (B H, G T, m)
    q_codes = q_heads.view(B * H // heads, -1, m)  # (P, R, m): a code serves R = heads G T queries
    size = max(1, PIECE * m // (q.numel() * value_codes.sparsity))
    pieces = [(start, min(start + size, n)) for start in range(0, n, size)]
    scores = [scores_over_codes(q_codes * key_codes.scale, Dk, *key_codes.read(*piece))
              for piece in pieces]
    dense = (q_heads @ keys.flatten(0, 1).float().mT).view(B, -1, *seen.shape)  # (B, G H, T, S)
    scores.append(dense.masked_fill(~seen, -torch.inf).view(*q_codes.shape[:2], S))
    p = torch.softmax(torch.cat(scores, dim=-1), dim=-1)  # (P, R, n + S)
    w = p.new_zeros(*p.shape[:2], len(Dv))
    for start, end in pieces:
        add_over_codes(w, p[..., start:end], *value_codes.read(start, end))
    # w counts whole atoms. A query takes from each the m numbers of its own head.
    out = torch.einsum("phrn,nhm->phrm", w.unflatten(1, (heads, -1)), Dv.unflatten(1, (heads, m)))
    dense = p[..., n:].reshape(B * H, -1, S) @ values.flatten(0, 1).float()  # (B H, G T, m)
    return (out.reshape(dense.shape) * value_codes.scale + dense).view(q.shape).to(q.dtype)

def join(x, heads):
    """Vectors of one head x (..., H, T, m) as vectors of several, (..., H / heads, T, heads m)."""
    return x.unflatten(-3, (-1, heads)).transpose(-3, -2).flatten(-2)

def split(x, heads):
    """The other way: (..., H / heads, T, heads m) as (..., H, T, m)."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2).flatten(-4, -3)

# ---- Caches --------------------------------------------------------------------------------------

class Counters:
    """How many tokens a cache has seen and coded: length and compressed on the host, for shapes;
    position and boundary, the same numbers on the device, where a recorded step reads them."""

    def __init__(self, device):
        self.length = self.compressed = self.leaving = 0  # leaving: coded by this chunk
        self.position, self.boundary = torch.zeros(2, dtype=torch.long, device=device)

    def advance(self, tokens=0, compressed=0, replayed=False):
        """The one place where counters move. A replayed step has moved the device's by itself."""
        self.length += tokens
        self.compressed += compressed
        if not replayed:
            self.position += tokens
            self.boundary += compressed

    def end(self, T):
        self.advance(T, self.leaving)

class DenseCache(Counters):
    """Every key and value as it is: the baseline, (2, L, B, H, capacity, m)."""
    replayable = True  # a decoding step is the same launches at every length

    def __init__(self, config, batch=1, capacity=0, device=None, dtype=torch.float32):
        super().__init__(device or best_device())
        self.kv = torch.zeros(2, config.n_layers, batch, config.kv_heads, capacity,
                              config.head_dim, device=self.position.device, dtype=dtype)

    def begin(self, T):
        self.last = self.length + T
        self.kv = with_room(self.kv, self.last)
        self.new = self.position + torch.arange(T, device=self.kv.device)  # (T,)
        self.mask = causal_lower_right(T, self.last) if T > 1 else None
        if T == 1 and self.kv.is_cuda:  # over all of the room, so that every step looks alike
            self.last = self.kv.shape[4]
            self.mask = (torch.arange(self.last, device=self.kv.device) <= self.position)[None]

    def attend(self, layer, q, k, v):
        for x, cached in zip((k, v), self.kv[:, layer]):
            cached.index_copy_(2, self.new, x.to(cached.dtype))
        keys, values = self.kv[:, layer, :, :, :self.last].to(q.dtype)
        return F.scaled_dot_product_attention(q, keys, values, self.mask, enable_gqa=True)

    def nbytes(self):
        used = self.kv[..., :self.length, :].numel()
        return {"total": used * self.kv.itemsize, "dense": used * 2, "allocated": self.kv.nbytes}

class SparseCache(Counters):
    """Codes of all tokens but the first and the newest, which stay dense.

    sparsity: coefficients a vector, one number or one for each dictionary (2, L). buffer: newest
    tokens always kept dense. window: tokens coded at a time once the buffer overflows. sinks: first
    tokens, dense for good: heads that find nothing to look at look there (arXiv 2309.17453). batch:
    sequences of one length. capacity: tokens to reserve room for. coding: how codes are stored
    (CODINGS). pursuit: a function (D, Y, sparsity) -> indices, coefficients for D (N, m) and
    Y (V, m), in float32. dtype: of what is dense."""

    def __init__(self, config, dictionaries, sparsity=8, buffer=32, window=16, sinks=4, batch=1,
                 capacity=0, coding="word", pursuit=omp, dtype=None):
        atoms, scale = dictionaries.check(config).atoms, dictionaries.scale
        super().__init__(atoms.device)
        table, (N, M) = np.broadcast_to(sparsity, (2, config.n_layers)), atoms.shape[2:]
        if coding not in CODINGS or N > CODINGS[coding].most_atoms:
            raise InputError(f"coding '{coding}' holds no {N} atoms; use " + " or ".join(
                f"{name} (up to {kind.most_atoms})" for name, kind in CODINGS.items()))
        if not 1 <= table.min() <= table.max() <= min(N, M):
            raise InputError(f"sparsity {sparsity} is not within 1 .. {min(N, M)}, the lesser of "
                             "N and M; choose within it")
        if min(buffer, window - 1, sinks) < 0:
            raise InputError(f"buffer {buffer}, window {window} or sinks {sinks} is too low; give "
                             "0 or more, and a window of 1 or more")
        self.dictionaries, self.sinks, self.scale = dictionaries, sinks, scale.tolist()
        self.buffer, self.window, self.ring = buffer, window, buffer + window
        # Ours (--beam: a partial) take all dictionaries at once; yours is called for each in turn.
        batched = getattr(pursuit, "func", pursuit) in (omp, omp_beam)
        self.pursuit = pursuit if batched else one_by_one(pursuit)
        vectors, room = config.kv_heads // dictionaries.heads, max(0, capacity - buffer - sinks)
        self.codes = {  # (kind, layer) -> Codes
            pair: CODINGS[coding](atoms[pair], scale[pair], int(table[pair]), batch, vectors, room)
            for pair in np.ndindex(table.shape)}
        # Dense tokens lie in slots: the sinks first, each for good, then a ring (see slot_of). Keys
        # carry their position (they are kept after RoPE), so attention does not mind the order.
        self.slots = torch.arange(sinks + self.ring, device=atoms.device)
        self.dense = torch.zeros(2, config.n_layers, batch, config.kv_heads, len(self.slots),
                                 config.head_dim, device=atoms.device, dtype=dtype or atoms.dtype)

    def slot_of(self, t):
        return torch.where(t < self.sinks, t, self.sinks + (t - self.sinks) % self.ring)

    @property
    def waiting(self):
        """Tokens in the ring, not coded yet."""
        return self.length - self.sinks - self.compressed

    def begin(self, T):
        """Work out, for all layers, where T new tokens go and what they see."""
        if T == 1:
            if self.waiting >= self.ring:  # it is full
                self.compress()
            self.leaving, self.replayable = 0, self.pursuit is omp  # attend may deny it
            self.tokens, first = self.position.view(1), self.sinks + self.boundary
            newest = self.position - (self.position - self.slots) % self.ring  # in each slot
            self.seen = torch.where(self.slots < self.sinks, self.slots <= self.position,
                                    newest >= first)[None]  # (1, S)
        else:  # a chunk codes at once all that is older than the newest `buffer` tokens
            self.leaving = max(0, self.waiting + T - self.buffer)
            t = torch.arange(self.length + T, device=self.slots.device)
            self.tokens = t[(t < self.sinks) | (t >= self.sinks + self.compressed)]  # dense ones
        self.places = self.slot_of(self.tokens)

    def attend(self, layer, q, k, v):
        """Append k, v (B, H, T, m), attend with q (B, G H, T, m): the output, shaped as q."""
        dense, codes = self.dense[:, layer], [self.codes[kind, layer] for kind in (KEYS, VALUES)]
        T, kv = q.shape[2], (k, v)
        if T == 1:
            dense.index_copy_(3, self.places, torch.stack(kv).to(dense.dtype))
            step = q, *codes, self.boundary, *dense, self.seen
            out = attend_fused(*step)
            self.replayable &= out is not None
            return attend_codes(*step) if out is None else out
        if self.length == 0:  # a prompt attends exactly
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            earlier = dense[:, :, :, self.places[:-T]].to(q.dtype)
            kv = [torch.cat(pair, dim=2) for pair in zip(earlier, kv)]
            # A few queries at a time: nothing is held for all pairs of tokens.
            few = zip(q.split(QUERIES, dim=2), self.tokens[-T:].split(QUERIES))
            out = torch.cat([attend_codes(part, *codes, self.compressed, *kv,
                                          self.tokens <= t[:, None]) for part, t in few], dim=2)
        leaves = slice(self.sinks, self.sinks + self.leaving)
        if self.leaving:
            x = k.new_empty(2, *k.shape[:2], self.leaving, k.shape[3])  # keys and values
            for new, vectors, scale in zip(x, kv, self.scale):
                torch.div(vectors[:, :, leaves], scale[layer], out=new)
            self.encode([(KEYS, layer), (VALUES, layer)], self.tokens[leaves] - self.sinks, x)
        for stay in (slice(leaves.start), slice(leaves.stop, None)):  # those before and after
            for x, kept in zip(kv, dense):
                kept[:, :, self.places[stay]] = x[:, :, stay].to(dense.dtype)
        return out

    def compress(self):
        """Code the oldest `window` tokens of the ring, for all layers, keys and values together; do
        nothing if there are fewer. A decoding step that finds the ring full calls it. So may a
        caller between steps: to time it, or to have it done while it waits."""
        if self.waiting < self.window:
            return
        coded = self.boundary + torch.arange(self.window, device=self.slots.device)
        oldest = self.dense.index_select(4, self.slot_of(self.sinks + coded))
        scale = self.dictionaries.scale.view(-1, 1, 1, 1, 1)
        self.encode([*self.codes], coded, oldest.flatten(0, 1) / scale)
        self.advance(compressed=self.window)

    def encode(self, pairs, positions, x):
        """Code x (n, B, H, T, m), in units of the scale, for n dictionaries `pairs`, as tokens
        sinks + positions. Those of equal sparsity share a call: more vectors fill a GPU better."""
        for s in {self.codes[pair].sparsity for pair in pairs}:
            equal = [i for i, pair in enumerate(pairs) if self.codes[pair].sparsity == s]
            group, D = [self.codes[pairs[i]] for i in equal], self.dictionaries.atoms.flatten(0, 1)
            if len(group) < len(self.codes):  # else all of them, without a copy
                D = torch.stack([codes.D for codes in group])
            theirs = x if len(group) == len(x) else torch.stack([x[i] for i in equal])
            Y = join(theirs, self.dictionaries.heads).flatten(1, 3)  # (n, V, M)
            parts = group[0].encode(D, Y, s, self.pursuit)
            for codes, *own in zip(group, *parts):
                codes.reserve(self.compressed + x.shape[3])
                codes.write(positions, own)

    def nbytes(self):
        """Bytes in use by codes, by what is dense and in total; of dictionaries (there once, for
        all contexts and batches); allocated in all; of a dense 16-bit cache. And "vector": the
        share of a vector's 16-bit bytes that its code takes."""
        atoms, parts = self.dictionaries.atoms, [p for c in self.codes.values() for p in c.parts]
        codes = sum(part[:, :, :self.compressed].nbytes for part in parts)
        token, constant = self.dense[..., 0, :], atoms.nbytes + self.dictionaries.scale.nbytes
        buffer = token.nbytes * (self.length - self.compressed)
        allocated = constant + self.dense.nbytes + sum(part.nbytes for part in parts)
        vector = sum(c.nbytes_each(c.sparsity) for c in self.codes.values())
        return {"codes": codes, "buffer": buffer, "total": codes + buffer, "allocated": allocated,
                "dense": 2 * token.numel() * self.length, "dictionaries": constant,
                "vector": vector / (2 * atoms[:, :, 0].numel())}
