"""The sparse-coded KV cache of Lexico (Kim et al. 2025, arXiv 2412.08890).

A language model keeps a key and a value of every token, head and layer, each m numbers of 16 bits.
Lexico keeps a vector x as s coefficients z over a dictionary D of N atoms. The keys and the values
of each layer have a dictionary each, learned once for a model (train_dict.py):

    x  becomes  z D = sum_j z_j d_(n_j)       3 s bytes: s indices of 16 bits, s coefficients of 8

Attention needs neither K nor V back. With q one query, and t running over the coded tokens,

    score_t = <q, k_t>   becomes  sum_j z_tj (q D_k^T)_(n_tj)    N products once, s look-ups a token
    out = sum_t p_t v_t  becomes  w D_v,   w_n = sum of p_t z_tj over all (t, j) with n_tj = n

so both work on tables of N numbers. The newest tokens stay dense in a buffer, a ring, and a softmax
runs over both parts together. A prompt attends exactly, and is coded layer by layer as it passes.

`python lexico.py` shows what sparsity costs and saves on the embedded model.
"""

import json
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.attention.bias import causal_lower_right

from model import InputError, best_device, find_file
from omp import omp, omp_beam, omp_levels, reconstruct

KEYS, VALUES = 0, 1  # the first dimension of everything that exists for both
FORMAT = "lexico-dictionaries-1"
PIECE, ROWS = 8192, 16  # coded tokens, and queries, that attention takes at a time


# --------------------------------------------------------------------------------------------------
# Dictionaries

class Dictionaries:
    """The 2 L dictionaries of a model, with what is known of their making.

    atoms: (2, L, N, m), unit norm. scale: (2, L), what a stored coefficient of 1 stands for, so
    that 8 bits serve large keys and small values alike.
    """

    def __init__(self, atoms, scale, config, **metadata):
        self.atoms, self.scale, self.metadata = atoms, scale, metadata
        self.shape = config if isinstance(config, dict) else shape_of(config)
        self.n_atoms, self.device = atoms.shape[2], atoms.device

    def check(self, config):
        """Raise InputError unless these were learned for a model of this shape."""
        for name, wanted in shape_of(config).items():
            if self.shape.get(name) != wanted:
                made_for = self.metadata.get("model", "another model")
                raise InputError(f"the dictionary was learned for {made_for}, of {name} = "
                                 f"{self.shape.get(name)}, not {wanted}; give --dictionary, or "
                                 "learn one for this model with train_dict.py")
        return self

    def allocate(self, share, coding):
        """Sparsity (2, L) of each dictionary, so that a vector takes `share` of its 16-bit bytes on
        average and the model's output suffers least.

        train_dict.py measured the divergence that each dictionary alone causes, at two
        sparsities. It falls about exponentially as they grow, and the divergences of several
        dictionaries about add up: so spend bytes, rung by rung, where they help most. There are
        few rungs, for dictionaries of equal sparsity are coded at once.
        """
        if "divergence" not in self.metadata:
            raise InputError("this dictionary holds no divergences to allocate sparsity by; give "
                             "--sparsity a number, or learn it anew with train_dict.py")
        m, (low, high) = self.atoms.shape[3], self.metadata["divergence"]["sparsity"]
        kl = np.log(np.maximum(self.metadata["divergence"]["kl"], 1e-9))  # (2, L, 2)
        slope = (kl[..., 1] - kl[..., 0]) / (high - low)
        rungs = sorted({-(-m * i // 64) for i in (2, 3, 4, 6, 8, 11, 15, 20, 26)})
        size = [code_bytes(coding, s) for s in rungs]
        harm = {place: np.exp(kl[place][0] + slope[place] * (np.array(rungs) - low))
                for place in np.ndindex(slope.shape)}
        rung = dict.fromkeys(harm, 0)
        left = (2 * m * share - size[0]) * len(rung)
        if left < 0:
            raise InputError(f"--sparsity auto:{share:.0%} is less than the least possible, "
                             f"{size[0] / (2 * m):.1%}")
        while True:
            gains = [((harm[place][i] - harm[place][i + 1]) / (size[i + 1] - size[i]), place)
                     for place, i in rung.items()
                     if i + 1 < len(rungs) and size[i + 1] - size[i] <= left]
            if not gains:
                table = np.array([rungs[i] for i in rung.values()]).reshape(slope.shape)
                return table.tolist()
            place = max(gains)[1]
            left -= size[rung[place] + 1] - size[rung[place]]
            rung[place] += 1

    def save(self, path):
        """Write one safetensors file, atoms in bfloat16; a reader never sees half a file."""
        keys, values = self.atoms.to(torch.bfloat16).contiguous()
        about = json.dumps({"shape": self.shape, **self.metadata})
        save_file({"keys": keys, "values": values, "scale": self.scale.contiguous()},
                  f"{path}.part", metadata={"format": FORMAT, "about": about})
        os.replace(f"{path}.part", path)

    @classmethod
    def load(cls, path, device="cpu", dtype=torch.float32):
        """Read what save wrote: a file, or a folder or Hub id that holds dictionary.safetensors.
        Raises InputError for what is missing, damaged or not ours."""
        if Path(path).suffix != ".safetensors" and not Path(path).is_file():
            path = find_file(path, "dictionary.safetensors", required=False) or path
        if not Path(path).is_file():
            raise InputError(f"dictionary '{path}' does not exist; learn one with train_dict.py")
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                header = file.metadata() or {}
                if header.get("format") != FORMAT:
                    raise InputError(f"'{path}' is not a dictionary of format {FORMAT}; "
                                     "give a file that train_dict.py wrote")
                keys, values, scale = map(file.get_tensor, ("keys", "values", "scale"))
        except (SafetensorError, OSError) as error:
            raise InputError(f"dictionary '{path}' is damaged ({error}); learn it again") from None
        about = json.loads(header["about"])
        return cls(torch.stack((keys, values)).to(dtype), scale, about.pop("shape"), **about)

    @classmethod
    def find(cls, model):
        """Path of a model's dictionary: in its folder, or where train_dict.py puts it."""
        path = find_file(model, "dictionary.safetensors", required=False)
        path = path or Path(default_path(model))
        if not path.is_file():
            raise InputError(f"no dictionary is known for model '{model}'; give --dictionary or "
                             f"--dense, or learn one: python train_dict.py --model {model}")
        return path


def default_path(model):
    """Where train_dict.py puts a model's dictionary unless told otherwise."""
    return f"{str(model).strip('/').replace('/', '--')}.dictionary.safetensors"


def shape_of(config):
    """What must agree between a dictionary and a model. A layer's heads share its atoms."""
    names = ("vocab_size", "dim", "n_layers", "head_dim", "rope_theta")
    return {name: getattr(config, name) for name in names}


# --------------------------------------------------------------------------------------------------
# Codes: how indices and coefficients are stored

CODINGS = {  # the parts of a vector's code: numbers in it (0: s) and their type
    "fp8": ((0, torch.int16), (0, torch.float8_e4m3fn)),
    "word": ((0, torch.int16), (1, torch.uint8)),
    "float32": ((0, torch.int16), (0, torch.float32))}


def code_bytes(coding, sparsity):
    """Bytes of one coded vector."""
    return sum((width or sparsity) * dtype.itemsize for width, dtype in CODINGS[coding])


class Codes:
    """Coded vectors (n, B, H, capacity) of n dictionaries, s coefficients each, in one of 3 forms.

    fp8      the published one, 3 s bytes: s int16 indices, s coefficients in FP8 E4M3 (4 bits of
             exponent, 3 of mantissa) in units of the dictionary's scale. What is larger than
             E4M3's largest number, 448, becomes that, not NaN.
    word     2 s + 1 bytes: s words of 16 bits, the index in the high log2 N, in the rest a signed
             level, and a byte e. A coefficient is level x 2^(e/16 - 8) in units of the scale.
    float32  6 s bytes: coefficients as they are, to see sparsity alone.

    D: (n, N, m) atoms. scale: (n,), what a coefficient of 1 stands for.
    """

    def __init__(self, D, scale, sparsity, batch, kv_heads, coding="fp8", beam=1, tol=None):
        self.D, self.scale, self.sparsity, self.coding = D, scale, sparsity, coding
        self.beam, self.tol = beam, tol
        self.bits = 16 - (D.shape[1] - 1).bit_length() if coding == "word" else 0  # of a level
        self.parts = [torch.empty(len(D), batch, kv_heads, 0, width or sparsity, dtype=dtype,
                                  device=D.device) for width, dtype in CODINGS[coding]]

    def reserve(self, capacity):
        """Make room for `capacity` tokens in all."""
        for i, old in enumerate(self.parts):
            if capacity > old.shape[3]:
                self.parts[i] = old.new_empty(*old.shape[:3], capacity, old.shape[4])
                self.parts[i][..., :old.shape[3], :] = old

    def write(self, rows, positions, x):
        """Code vectors x (n, B, H, T, m) of the dictionaries `rows` as tokens `positions` (T,)."""
        D, Y = self.D[rows], x.flatten(1, 3).to(self.D.dtype)  # (n, N, m), (n, B H T, m)
        Y = Y / self.scale[rows, None, None]
        if self.coding == "word":
            indices, level, e = omp_levels(D, Y, self.sparsity, self.bits, self.beam)
            word = indices << self.bits | level & (1 << self.bits) - 1
            parts = word - (word >= 1 << 15) * (1 << 16), e  # as signed 16 bits
        else:
            indices, z = (omp_beam(D, Y, self.sparsity, self.beam) if self.beam > 1 else
                          omp(D, Y, self.sparsity, self.tol))  # (n, B H T, s)
            parts = indices, z.clamp(-448, 448) if self.coding == "fp8" else z
        for stored, part in zip(self.parts, parts):
            part = part.view(*x.shape[:4], -1).to(stored.dtype)
            # As bytes, for not every operation knows FP8.
            stored[rows].view(torch.uint8).index_copy_(3, positions, part.view(torch.uint8))

    def read(self, row, start, end):
        """Indices int32 and coefficients float32, (B H, T, s), of tokens start .. end; coefficients
        are in units of scale[row]."""
        first, second = (part[row, :, :, start:end].flatten(0, 1) for part in self.parts)
        if self.coding != "word":
            return first.int(), second.float()
        word = first.int()
        level = word << 32 - self.bits >> 32 - self.bits  # the low bits, with their sign
        return (word & 0xFFFF) >> self.bits, level * torch.exp2(second.float() / 16 - 8)

    def nbytes(self, tokens):
        """Bytes of so many tokens' codes."""
        return math.prod(self.parts[0].shape[:3]) * tokens * code_bytes(self.coding, self.sparsity)


# --------------------------------------------------------------------------------------------------
# Attention over codes

def scores_over_codes(q, D, indices, coefficients):
    """<q, z D> of every query and coded token, without z D.

    q: (P, R, m), R query rows for each of the P = B H KV heads. D: (N, m).
    indices, coefficients: (P, T, s). Returns (P, T, R).
    """
    P, T, s = indices.shape
    N = D.shape[0]
    table = D @ q.mT  # (P, N, R): the product of every query with every atom
    first = torch.arange(0, P * N, N, dtype=torch.int32, device=q.device)  # each head's own table
    out = F.embedding_bag((indices + first[:, None, None]).view(P * T, s), table.flatten(0, 1),
                          per_sample_weights=coefficients.reshape(P * T, s), mode="sum")
    return out.view(P, T, -1)


def add_over_codes(w, p, indices, coefficients):
    """Add p z to the table w (P, N, R), at z's indices. p: (P, T, R), codes: (P, T, s)."""
    P, N, R = w.shape
    first = torch.arange(0, P * N, N, dtype=torch.int32, device=w.device)
    weighted = coefficients[..., None] * p[:, :, None]  # (P, T, s, R)
    w.view(P * N, R).index_add_(0, (indices + first[:, None, None]).flatten(), weighted.view(-1, R))


# --------------------------------------------------------------------------------------------------
# Caches

class DenseCache:
    """Every key and value as it is: the baseline, (2, L, B, H, capacity, m)."""

    def __init__(self, config, batch=1, capacity=0, device=None, dtype=torch.float32):
        self.config, self.length = config, 0
        self.kv = torch.empty(2, config.n_layers, batch, config.kv_heads, capacity,
                              config.head_dim, device=device or best_device(), dtype=dtype)
        self.position = torch.zeros((), dtype=torch.long, device=self.kv.device)

    def attend(self, layer, q, k, v):
        """Append k, v (B, H, T, m), attend with q (B, G H, T, m): the output, shaped as q."""
        start, end = self.length, self.length + q.shape[2]
        if end > self.kv.shape[4]:
            old, capacity = self.kv, max(end, 2 * start)
            self.kv = old.new_empty(*old.shape[:4], capacity, old.shape[5])
            self.kv[..., :start, :] = old[..., :start, :]
        self.kv[KEYS, layer, :, :, start:end] = k
        self.kv[VALUES, layer, :, :, start:end] = v
        if layer == self.config.n_layers - 1:
            self.length = end
            self.position += end - start
        keys, values = self.kv[:, layer, :, :, :end]
        mask = causal_lower_right(end - start, end) if start and end - start > 1 else None
        return F.scaled_dot_product_attention(q, keys.to(q.dtype), values.to(q.dtype), mask,
                                              is_causal=start == 0, enable_gqa=True)

    def nbytes(self):
        used = self.kv[..., :self.length, :].numel()
        return {"total": used * self.kv.itemsize, "dense": used * 2, "allocated": self.kv.nbytes}


class SparseCache:
    """Codes of all tokens but the newest, which wait dense in a ring.

    dictionaries: learned for this model (train_dict.py). sparsity: coefficients a vector, one
    number or one for each dictionary (2, L). buffer: tokens always kept dense. window: tokens coded
    at a time once the buffer overflows. batch: sequences, all of one length. capacity: tokens to
    reserve room for, where known. beam: width of the search (1: plain OMP). tol: relative error at
    which a vector needs no more. coding: how codes are stored (see Codes). dtype: of the buffer.
    """

    def __init__(self, config, dictionaries, sparsity=8, buffer=128, window=1, batch=1, capacity=0,
                 beam=1, tol=None, coding="fp8", dtype=None):
        dictionaries.check(config)
        table = [[sparsity] * config.n_layers] * 2 if isinstance(sparsity, int) else sparsity
        flat, largest = table[KEYS] + table[VALUES], min(config.head_dim, dictionaries.n_atoms)
        if not 1 <= min(flat) <= max(flat) <= largest:
            raise InputError(f"sparsity {sparsity} is outside 1 .. {largest}: vectors have "
                             f"{config.head_dim} numbers, {dictionaries.n_atoms} atoms serve them")
        if tol is not None and (beam > 1 or coding == "word"):
            raise InputError(f"tol {tol} works with beam 1 and coding fp8 or float32 only")
        if buffer < 0 or window < 1 or beam < 1:
            raise InputError(f"buffer {buffer}, window {window} and beam {beam} must be at least "
                             "0, 1 and 1")
        if coding not in CODINGS:
            raise InputError(f"coding '{coding}' is unknown; there are {', '.join(CODINGS)}")
        if coding == "word" and dictionaries.n_atoms > 2**13:
            raise InputError(f"coding word has no room for {dictionaries.n_atoms} atoms; use fp8")
        self.config, self.dictionaries = config, dictionaries
        self.buffer, self.window = buffer, window
        # Dictionaries of one sparsity are coded together: one group (all of them, as a rule).
        atoms, scale = dictionaries.atoms.flatten(0, 1), dictionaries.scale.flatten()
        self.groups, self.place = [], {}  # place: (kind, layer) -> its codes, and the row there
        for s in sorted(set(flat)):
            members = [i for i, of in enumerate(flat) if of == s]
            rows = members if len(members) < len(flat) else slice(None)  # all: views, no copies
            codes = Codes(atoms[rows], scale[rows], s, batch, config.kv_heads, coding, beam, tol)
            codes.reserve(max(0, capacity - buffer))
            self.groups.append((members, codes))
            for row, i in enumerate(members):
                self.place[divmod(i, config.n_layers)] = codes, row
        # Token t waits in slot t mod (buffer + window). Keys carry their position (they are kept
        # after RoPE), so attention does not mind the order.
        self.ring = torch.zeros(2, config.n_layers, batch, config.kv_heads, buffer + window,
                                config.head_dim, device=atoms.device, dtype=dtype or atoms.dtype)
        # Tokens seen, and the oldest of them, coded: for shapes, and on the device, where alone a
        # recorded step finds them.
        self.length = self.coded = 0
        self.position, self.n_coded = torch.zeros(2, dtype=torch.long, device=atoms.device)
        self.slots = torch.arange(buffer + window, device=atoms.device)

    def attend(self, layer, q, k, v):
        """Append k, v (B, H, T, m), attend with q (B, G H, T, m): the output, shaped as q."""
        T, last = q.shape[2], layer == self.config.n_layers - 1
        if T > 1:
            out = self._prefill(layer, q, k, v)
        else:
            if layer == 0:
                self.compress()
                self.slot = self.position.view(1) % len(self.slots)
                age = (self.position - self.slots) % len(self.slots)  # 0: the newest token
                self.seen = age <= self.position - self.n_coded
            ring = self.ring[:, layer]
            ring[KEYS].index_copy_(2, self.slot, k.to(ring.dtype))
            ring[VALUES].index_copy_(2, self.slot, v.to(ring.dtype))
            out = self._attend(layer, q, *ring, self.seen[None])
        if last:
            coded = max(self.coded, self.length + T - self.buffer) if T > 1 else self.coded
            self.advance(T, coded - self.coded)
        return out

    def advance(self, tokens, coded):
        """Count tokens that have come and tokens that were coded."""
        self.position += tokens
        self.n_coded += coded
        self.length += tokens
        self.coded += coded

    def _prefill(self, layer, q, k, v):
        """Attend with T > 1 queries, then code at once what does not stay in the buffer."""
        end = self.length + q.shape[2]
        waiting = torch.arange(self.coded, self.length, device=q.device) % len(self.slots)
        keys = torch.cat((self.ring[KEYS, layer][:, :, waiting].to(k.dtype), k), dim=2)
        values = torch.cat((self.ring[VALUES, layer][:, :, waiting].to(v.dtype), v), dim=2)
        if self.length == 0:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            position = torch.arange(self.length, end, device=q.device)[:, None]
            seen = torch.arange(self.coded, end, device=q.device) <= position  # (T, waiting + T)
            out = self._attend(layer, q, keys, values, seen)
        over = max(0, end - self.buffer - self.coded)
        positions = torch.arange(self.coded, end, device=q.device)
        for kind, x in enumerate((keys, values)):
            if over:
                codes, row = self.place[kind, layer]
                codes.reserve(self.coded + over)
                codes.write(slice(row, row + 1), positions[:over], x[None, :, :, :over])
            rest = positions[over:] % len(self.slots)
            self.ring[kind, layer][:, :, rest] = x[:, :, over:].to(self.ring.dtype)
        return out

    def compress(self):
        """Code what overflows the buffer, for all layers, keys and values together.

        Called by every decoding step that finds the buffer full. A caller that wants to time it,
        or to have it done while it waits, calls it between steps.
        """
        if self.length - self.coded < self.buffer + self.window:
            return
        positions = self.n_coded + torch.arange(self.window, device=self.ring.device)
        oldest = self.ring.index_select(4, positions % len(self.slots)).flatten(0, 1)
        for members, codes in self.groups:
            codes.reserve(self.coded + self.window)
            x = oldest if len(members) == len(oldest) else oldest[members]
            codes.write(slice(None), positions, x)  # (n, B, H, window, m)
        self.advance(0, self.window)

    def round_trip(self, layer, x):
        """Vectors x (2, B, H, T, m) of a layer as their codes give them back: to look at. Attention
        never needs them. Overwrites what the cache holds."""
        T, back = x.shape[3], []
        for kind in (KEYS, VALUES):
            codes, row = self.place[kind, layer]
            codes.reserve(T)
            codes.write(slice(row, row + 1), torch.arange(T, device=x.device), x[kind, None])
            indices, z = codes.read(row, 0, T)  # (B H, T, s)
            D = codes.D[row] * codes.scale[row]
            back.append(reconstruct(D, indices.flatten(0, 1), z.flatten(0, 1)).view_as(x[kind]))
        return torch.stack(back)

    def _attend(self, layer, q, keys, values, seen):
        """Attention over all codes and over dense keys, values (B, H, S, m) where seen (T, S).

        Queries are taken a few at a time, and tokens in pieces: what is held beside the scores
        stays small, whatever the context.
        """
        (B, _, T, m), P, dtype = q.shape, keys.shape[0] * keys.shape[1], q.dtype
        (key_codes, k), (value_codes, v) = self.place[KEYS, layer], self.place[VALUES, layer]
        Dk, Dv = key_codes.D[k].float(), value_codes.D[v].float()  # (N, m)
        q = q.reshape(P, -1, T, m).float()  # (P, G, T, m)
        keys, values = keys.flatten(0, 1).float(), values.flatten(0, 1).float()
        pieces = [(start, min(start + PIECE, self.coded)) for start in range(0, self.coded, PIECE)]
        outs = []
        for rows, allowed in zip(q.split(ROWS, dim=2), seen.split(ROWS)):
            rows = rows.flatten(1, 2)  # (P, R, m)
            hidden = ~allowed.mT.repeat(1, rows.shape[1] // allowed.shape[0])  # (S, R)
            scores = [scores_over_codes(rows * key_codes.scale[k], Dk, *key_codes.read(k, *piece))
                      for piece in pieces]
            scores.append((keys @ rows.mT).masked_fill(hidden, -torch.inf))
            p = torch.softmax(torch.cat(scores, dim=1) / m**0.5, dim=1)  # (P, coded + S, R)
            out = p[:, self.coded:].mT @ values  # (P, R, m)
            if pieces:
                w = p.new_zeros(P, Dv.shape[0], rows.shape[1])  # (P, N, R)
                for start, end in pieces:
                    add_over_codes(w, p[:, start:end], *value_codes.read(v, start, end))
                out += (w.mT @ Dv) * value_codes.scale[v]
            outs.append(out.unflatten(1, (-1, allowed.shape[0])))  # (P, G, T, m)
        return torch.cat(outs, dim=2).reshape(B, -1, T, m).to(dtype)

    def nbytes(self):
        """Bytes in use by codes, by the buffer and in total, of the dictionaries (which are there
        once, whatever context and batch), allocated in all, and of a dense 16-bit cache."""
        waiting = self.ring[..., :self.length - self.coded, :].numel()
        codes = sum(codes.nbytes(self.coded) for _, codes in self.groups)
        buffer = waiting * self.ring.itemsize
        dictionaries = sum(codes.D.nbytes + codes.scale.nbytes for _, codes in self.groups)
        reserved = sum(part.nbytes for _, codes in self.groups for part in codes.parts)
        return {"codes": codes, "buffer": buffer, "total": codes + buffer,
                "dense": 2 * self.length * self.ring[..., 0, :].numel(),
                "dictionaries": dictionaries,
                "allocated": reserved + self.ring.nbytes + dictionaries}


if __name__ == "__main__":  # what sparsity saves and what it costs, decoding a text
    import time

    from model import Llama, Tokenizer

    device = best_device()
    model = Llama.from_pretrained("tiny", device, torch.float32)
    dictionaries = Dictionaries.load(Dictionaries.find("tiny"), device)
    text = find_file("tiny", "held-out.txt").read_text(encoding="utf-8")
    tokens = Tokenizer.from_pretrained("tiny").encode(text[:3000])[:448]
    tokens = torch.tensor([tokens], device=device)
    print("384 tokens of held-out text as a prompt, 64 fed one by one; tiny, buffer 32, on", device)
    print("          bytes a vector  of 16 bit  KL to dense  ms a token")
    for name in ("dense", "fp8 2", "fp8 4", "fp8 8", "fp8 16", "word 4", "word 8", "word 12"):
        cache, nbytes = DenseCache(model.config, device=device), 2 * model.config.head_dim
        if name != "dense":
            coding, sparsity = name.split()
            cache = SparseCache(model.config, dictionaries, int(sparsity), 32, coding=coding)
            nbytes = code_bytes(coding, int(sparsity))
        with torch.inference_mode():
            logits, start = [model(tokens[:, :384], cache)[:, -1]], time.perf_counter()
            logits += [model(token, cache)[:, -1] for token in tokens[:, 384:].split(1, dim=1)]
        milliseconds = (time.perf_counter() - start) * 1e3 / 64
        q = torch.cat(logits).log_softmax(-1)
        if name == "dense":
            full = q
        kl = F.kl_div(q, full, log_target=True, reduction="none").sum(-1).mean().item()
        print(f"{name:8}{nbytes:16d}  {nbytes / (2 * model.config.head_dim):9.1%}  {kl:11.4f}  "
              f"{milliseconds:10.2f}")
