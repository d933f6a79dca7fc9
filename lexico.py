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

import functools
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.nn.attention.bias import causal_lower_right

from model import Config, InputError, best_device, find_file
from omp import jit, milliseconds, omp_beam, omp_levels, on_gpu, reconstruct, tl, triton

KEYS, VALUES = 0, 1  # the first dimension of everything that exists for both
FORMAT = "lexico-dictionaries-1"
PIECE, ROWS = 2**21, 16  # numbers that attention over codes holds at a time, and queries


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
        kl = np.log(np.maximum(self.metadata["divergence"]["kl"], 1e-9)).reshape(-1, 2)  # (2 L, 2)
        slope = (kl[:, 1:] - kl[:, :1]) / (high - low)
        rungs = np.array(sorted({-(-m * i // 64) for i in (2, 3, 4, 6, 8, 11, 15, 20, 26)}))
        harm = np.exp(kl[:, :1] + slope * (rungs - low))  # (2 L, rungs)
        size = np.array([code_bytes(coding, s) for s in rungs])
        if not size[0] <= 2 * m * share <= size[-1]:
            raise InputError(f"--sparsity auto:{100 * share:g}% is outside {size[0] / (2 * m):.1%} "
                             f".. {size[-1] / (2 * m):.1%}, what coding {coding} offers")
        left = (2 * m * share - size[0]) * len(harm)  # bytes
        cost, rung = np.diff(size), np.zeros(len(harm), int)
        gain = -np.diff(harm) / cost  # for a byte; it falls from rung to rung
        for best in np.argsort(-gain, axis=None):
            place, step = divmod(best, len(cost))
            if rung[place] == step and cost[step] <= left:
                rung[place] += 1
                left -= cost[step]
        return rungs[rung].reshape(2, -1).tolist()

    def save(self, path):
        """Write one safetensors file, atoms in bfloat16; a reader never sees half a file."""
        keys, values = self.atoms.to(torch.bfloat16).contiguous()
        about = json.dumps({"shape": self.shape, **self.metadata})
        tensors = {"keys": keys, "values": values, "scale": self.scale.contiguous()}
        Path(f"{path}.part").write_bytes(save(tensors, {"format": FORMAT, "about": about}))
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
            about = json.loads(header["about"])
            atoms, shape = torch.stack((keys, values)).to(dtype), about.pop("shape")
            L, _, m = keys.shape
            if (L, m) != (shape["n_layers"], shape["head_dim"]) or scale.shape != (2, L):
                raise ValueError(f"shape {tuple(atoms.shape)}")
        except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
            raise InputError(f"dictionary '{path}' is damaged ({error}); learn it again") from None
        return cls(atoms, scale, shape, **about)

    @classmethod
    def random(cls, config, n_atoms, device):
        """Random atoms for a model of any shape, to measure time and memory with."""
        shape = 2, config.n_layers, n_atoms, config.head_dim
        scale = torch.full(shape[:2], 1 / 64, device=device)
        return cls(F.normalize(torch.randn(shape, device=device), dim=-1), scale, config)

    @classmethod
    def find(cls, model):
        """Path of a model's dictionary: where train_dict.py puts it, or in the model's folder."""
        path = Path(default_path(model))
        if not path.is_file():
            path = find_file(model, "dictionary.safetensors", required=False)
        if path is None:
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
    word     2 s + 1 bytes: s words of 16 bits, the index in the upper bits, in the rest a signed
             level, and beside them a byte e. A coefficient is level x 2^(e/16 - 8) in units of the
             scale.
    float32  6 s bytes: coefficients as they are, to see sparsity alone.

    D: (n, N, m) atoms. scale: (n,), what a coefficient of 1 stands for.
    """

    def __init__(self, D, scale, sparsity, batch, kv_heads, coding="fp8", beam=1):
        self.D, self.scale, self.sparsity, self.coding = D, scale, sparsity, coding
        self.beam = beam
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
        """Code vectors x (n, B, H, T, m) of the dictionaries `rows`, a slice, as tokens `positions`
        (T,)."""
        D, scale = self.D[rows], self.scale[rows].view(-1, 1, 1, 1, 1)
        Y = (x / scale).flatten(1, 3)  # (n, B H T, m), float32
        if self.coding == "word":
            indices, level, e = omp_levels(D, Y, self.sparsity, self.bits, self.beam)
            # What passes 2^15 wraps when it is stored as int16: the bits are the same.
            parts = indices << self.bits | level & (1 << self.bits) - 1, e
        else:
            indices, z = omp_beam(D, Y, self.sparsity, self.beam)  # (n, B H T, s)
            parts = indices, z.clamp(-448, 448) if self.coding == "fp8" else z
        for stored, part in zip(self.parts, parts):
            part = part.view(*x.shape[:4], -1).to(stored.dtype)
            # As bytes, for not every operation knows FP8.
            stored[rows].view(torch.uint8).index_copy_(3, positions, part.view(torch.uint8))

    def read(self, row, start, end):
        """Indices int32 and coefficients float32, (B H, T, s), of tokens start .. end; coefficients
        are in units of scale[row]."""
        first, second = (part[row, :, :, start:end].flatten(0, 1) for part in self.parts)
        if self.coding == "fp8":
            # E4M3's sign, exponent and mantissa move to their places in a float, which is 2^120 too
            # small then. (torch's own conversion takes ten times as long on a CPU.)
            bits = second.view(torch.int8).int() << 20 & 0x87F00000 - 2**32
            return first.int(), bits.view(torch.float32) * 2.0**120
        if self.coding == "float32":
            return first.int(), second
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
    indices, coefficients: (P, T, s). Returns (P, R, T).
    """
    (P, R, m), (T, s), N = q.shape, indices.shape[1:], len(D)
    table = (q.reshape(P * R, m) @ D.T).view(P, R, N).mT  # every query with every atom
    first = torch.arange(0, P * N, N, dtype=torch.int32, device=q.device)  # each head's own table
    out = F.embedding_bag((indices + first[:, None, None]).view(P * T, s), table.reshape(P * N, R),
                          per_sample_weights=coefficients.reshape(P * T, s), mode="sum")
    return out.view(P, T, R).mT


def add_over_codes(w, p, indices, coefficients):
    """Add p z to the table w (R, P, N), at z's indices. p: (P, R, T), codes: (P, T, s)."""
    R, P, N = w.shape
    first = torch.arange(0, P * N, N, dtype=torch.int32, device=w.device)
    places = (indices + first[:, None, None]).view(1, -1).long().expand(R, -1)  # (R, P T s)
    added = p.transpose(0, 1).contiguous()[..., None] * coefficients  # (R, P, T, s)
    w.view(R, P * N).scatter_add_(1, places, added.view(R, -1))


# --------------------------------------------------------------------------------------------------
# On a GPU
#
# One decoded token reads every code once: 3 s bytes for a key, 3 s for a value. Nothing else that
# grows with the context may move, so the work at the codes happens in the processors' shared
# memory. Four launches, of the same shape for every length (the number of coded tokens is read on
# the device, and blocks with nothing to do leave at once), so that a CUDA graph can replay them:
#
#   products_and_ring  q D_k^T for all rows of q, on the tensor cores. In the same launch, as
#                      neither waits for the other: plain attention over the ring.
#   codes              A block takes a chunk of one KV head's tokens, and copies the head's products
#                      to shared memory, N atoms x G query heads. s look-ups make a token's scores,
#                      which stay there, too; their maximum known, a second look turns them into
#                      weights. The products' place becomes the values' table: for every token, add
#                      weight x coefficient at its atoms. That table leaves, and 3 stats.
#   combine            The chunks' tables, each by its share of the softmax, in one: w (rows, N).
#   addmm              w D_v, plus the ring's output.
#
# Sums of floats depend on the order in which threads come; sums of integers do not, and are what
# shared memory adds by itself. So the table counts in fixed point. A chunk's weights are divided by
# their sum, in which each counts with the scale of its token; then no entry can pass the LARGEST
# coefficient, 2^30 stands for that, and 31 bits are enough. The same bits come out every run.
#
# What costs time in the end is that 32 threads ask for 32 random atoms, and those in one bank of
# the memory wait for each other. Hence products in half precision, and hence two neighbouring
# threads (LANES) share a token's values, EACH heads for either: a warp asks for half the atoms.
#
# This one is CUDA C++, for Triton knows no look-ups in shared memory; torch compiles it when it is
# first called. Constants in capitals come from attend_codes. GP is G, rounded up to a power of 2.
# `Array` is aligned so that a thread reads it in pieces of up to 16 bytes, the next token's code
# while it works at this one's. Coefficients become floats without a conversion: E4M3's bits move to
# their places in a float, which is 2^120 too small then; a level's bits become the last ones of a
# float 2^23 + LARGEST + level.

CODES = r"""
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
__device__ float to_float(u16 half) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(half));
  return x;
}
__device__ u16 to_half(float x) {
  u16 half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
  return half;
}
__device__ float power(float x) {                        // 2^x
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}
__device__ float scale(u8 e) { return BITS ? power(e / 16.0f - 8) : 1; }
__device__ constexpr int piece(int bytes) { return bytes % 16 ? bytes & -bytes : 16; }
template <class T, int COUNT> struct __align__(piece(sizeof(T) * COUNT)) Array { T at[COUNT]; };
typedef Array<u16, GP> Products;
typedef Array<float, GP> Scores;
template <int S> struct Code {
  Array<u16, S> first;
  Array<u8, BITS ? 1 : S> second;
  __device__ Code(const u16* firsts, const u8* seconds, size_t token)
      : first(((Array<u16, S>*)firsts)[token]),
        second(((Array<u8, BITS ? 1 : S>*)seconds)[token]) {}
  __device__ int atom(int j) { return first.at[j] >> BITS; }
  __device__ float coefficient(int j) {
    int level = first.at[j] & (2 * LARGEST - 1), e4m3 = (second.at[BITS ? 0 : j] << 24) >> 4;
    return BITS ? __int_as_float(level ^ (0x4b000000 | LARGEST)) - (8388608 + LARGEST)
                : __int_as_float(e4m3 & 0x87f00000) * 1.329227995784916e36f;
  }
};
template <bool MAX> __device__ float both(float x, float y) { return MAX ? fmaxf(x, y) : x + y; }
template <bool MAX, int COUNT> __device__ void reduce(float* x) {  // COUNT over all threads
  __shared__ float parts[COUNT][32], whole[COUNT];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, step = 16;
  #pragma unroll
  for (int half = COUNT / 2; half; half /= 2, step /= 2)  // two lanes: each takes half the numbers
    for (int i = 0; i < half; i++) {
      float mine = lane & step ? x[i + half] : x[i], other = lane & step ? x[i] : x[i + half];
      x[i] = both<MAX>(mine, __shfl_xor_sync(~0u, other, step));
    }
  for (; step; step /= 2) x[0] = both<MAX>(x[0], __shfl_xor_sync(~0u, x[0], step));
  parts[lane * COUNT / 32][warp] = x[0];
  __syncthreads();
  if (warp < COUNT) {
    float part = parts[warp][lane];
    for (step = 16; step; step /= 2) part = both<MAX>(part, __shfl_xor_sync(~0u, part, step));
    whole[warp] = part;
  }
  __syncthreads();
  for (int i = 0; i < COUNT; i++) x[i] = whole[i];
}
extern "C" __global__ void __launch_bounds__(1024) codes(
    const u16* products, const u16* k_first, const u8* k_second, const u16* v_first,
    const u8* v_second, const long long* n_coded, int capacity, float4* stats, u16* tables) {
  extern __shared__ uint4 shared[];
  Products* table = (Products*)shared;                   // (N,), at first
  int* values = (int*)shared;                            // (EACH, N, LANES), in its place later
  Scores* scores = (Scores*)(values + GP * N);           // (count,), behind both
  int n = *n_coded, length = max((n + CHUNKS - 1) / CHUNKS, SHORTEST), begin = blockIdx.x * length;
  int head = blockIdx.y, count = min(length, n - begin), thread = threadIdx.x;
  if (count <= 0) return;
  size_t token = (size_t)head * capacity + begin;        // the first of the chunk
  Code<S_K> key(k_first, k_second, token + min(thread, count - 1));
  for (int i = thread; i < N / 2; i += 1024) {           // two atoms
    Array<u16, 2 * GP> pair;
    for (int g = 0; g < G; g++) {
      u32 x = ((u32*)products)[(head * G + g) * (N / 2) + i];
      pair.at[g] = x;
      pair.at[GP + g] = x >> 16;
    }
    ((Array<u16, 2 * GP>*)table)[i] = pair;
  }
  __syncthreads();
  float top[GP], sums[2 * GP] = {};                      // sums of weights, then times scales
  for (int g = 0; g < GP; g++) top[g] = -1e30f;
  for (int t = thread; t < count; t += 1024) {           // scores
    Code<S_K> code = key;
    key = Code<S_K>(k_first, k_second, token + min(t + 1024, count - 1));
    float unit = scale(k_second[token + t]);
    Scores score = {};
    for (int j = 0; j < S_K; j++) {
      Products x = table[code.atom(j)];
      for (int g = 0; g < G; g++) score.at[g] += code.coefficient(j) * to_float(x.at[g]);
    }
    for (int g = 0; g < G; g++) top[g] = fmaxf(top[g], score.at[g] *= unit);
    scores[t] = score;
  }
  int lane = thread % LANES, first = thread / LANES, step = 1024 / LANES;
  Code<S_V> value(v_first, v_second, token + min(first, count - 1));
  reduce<true, GP>(top);
  for (int i = thread; i < N * GP / 4; i += 1024) shared[i] = make_uint4(0, 0, 0, 0);
  for (int t = thread; t < count; t += 1024) {           // weights
    float unit = scale(v_second[token + t]);
    Scores x = scores[t];
    for (int g = 0; g < G; g++) {
      float weight = power(x.at[g] - top[g]);
      sums[g] += weight;
      sums[GP + g] += x.at[g] = weight * unit;
    }
    scores[t] = x;
  }
  reduce<false, 2 * GP>(sums);
  float units[EACH] = {};                                // of the heads lane * EACH and following
  for (int g = 0; g < G; g++)
    if (g / EACH == lane) units[g % EACH] = (1 << 30) / (LARGEST * sums[GP + g]);
  for (int t = first; t < count; t += step) {            // the values' table
    Code<S_V> code = value;
    value = Code<S_V>(v_first, v_second, token + min(t + step, count - 1));
    Array<float, EACH> weight = ((Array<float, EACH>*)scores)[t * LANES + lane];
    for (int k = 0; k < EACH; k++) weight.at[k] *= units[k];
    for (int j = 0; j < S_V; j++)
      for (int k = 0; k < EACH; k++)
        if (lane * EACH + k < G) atomicAdd(&values[(k * N + code.atom(j)) * LANES + lane],
                                           __float2int_rn(weight.at[k] * code.coefficient(j)));
  }
  __syncthreads();
  size_t chunk = (size_t)head * G * CHUNKS + blockIdx.x;  // of the first head
  for (int k = 0; k < EACH; k++)
    for (int i = thread; i < N / 2; i += 1024) {         // 2^30 leaves as 2^15, in half precision
      Array<int, 2 * LANES> pair = ((Array<int, 2 * LANES>*)values)[k * (N / 2) + i];
      for (int g = k, l = 0; g < G; g += EACH, l++)
        ((u32*)tables)[(chunk + g * CHUNKS) * (N / 2) + i] =
            to_half(pair.at[l] / 32768.0f) | to_half(pair.at[LANES + l] / 32768.0f) << 16;
    }
  for (int g = 0; g < G; g++)
    if (thread == 0) stats[chunk + g * CHUNKS] = make_float4(top[g], sums[g], sums[GP + g], 0);
}
"""
SHORTEST = 256  # tokens of a chunk, at least
STATIC = 4096  # bytes of shared memory that reduce takes, at most


@functools.lru_cache(None)
def compile_codes(shared, **constants):
    options = [f"-D{name}={value}" for name, value in constants.items()]
    kernel = torch.cuda._compile_kernel(CODES, "codes", nvcc_options=options)
    kernel.set_shared_memory_config(shared)
    return kernel


@jit
def products_and_ring(q, D, scale, keys, values, seen, products, ring_out, rows, heads, slots, N,
                      G: tl.constexpr, M: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr):
    program, m = tl.program_id(0).to(tl.int64), tl.arange(0, M)[None, :]
    unit = 1.4426950408889634 / M**0.5                   # the softmax counts in powers of two
    if program >= heads:                                 # TILE rows of q with BLOCK atoms
        r = (program - heads) // (N // BLOCK) * TILE + tl.arange(0, TILE)[:, None]
        n = (program - heads) % (N // BLOCK) * BLOCK + tl.arange(0, BLOCK)[:, None]
        product = tl.dot(tl.load(q + r * M + m, mask=r < rows, other=0.0),
                         tl.trans(tl.load(D + n * M + m))) * (unit * tl.load(scale))
        tl.store(products + r * N + tl.trans(n), product, mask=r < rows)
    else:                                                # a head's G rows, BLOCK slots at a time
        g = tl.arange(0, 16)[:, None]
        row = program * G + g
        x = tl.load(q + row * M + m, mask=g < G, other=0.0)
        top, total = tl.full([16, 1], -1e30, tl.float32), tl.zeros([16, 1], tl.float32)
        out = tl.zeros([16, M], tl.float32)
        for start in range(0, slots, BLOCK):
            slot = start + tl.arange(0, BLOCK)
            keep = tl.load(seen + slot, mask=slot < slots, other=0) != 0
            at = (program * slots + slot[:, None]) * M + m
            k = tl.load(keys + at, mask=slot[:, None] < slots, other=0.0)  # waits not for keep
            v = tl.load(values + at, mask=slot[:, None] < slots, other=0.0)
            scores = tl.where(keep[None, :], tl.dot(x, tl.trans(k)) * unit, -1e30)
            higher = tl.maximum(top, tl.max(scores, axis=1, keep_dims=True))
            p = tl.where(keep[None, :], tl.exp2(scores - higher), 0.0)
            fade, top = tl.exp2(top - higher), higher
            total = total * fade + tl.sum(p, axis=1, keep_dims=True)
            out = out * fade + tl.dot(p.to(v.dtype), v)
        to = ring_out + row * (M + 2)                    # the output, and beside it top and sum
        tl.store(to + m, out, mask=g < G)
        tl.store(to + M, top, mask=g < G)
        tl.store(to + M + 1, total, mask=g < G)


@jit
def combine(tables, stats, ring_out, scale, n_coded, w, base, unit, N, CHUNKS: tl.constexpr,
            SHORTEST: tl.constexpr, PADDED: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr):
    row, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    coded, c, m = tl.load(n_coded), tl.arange(0, PADDED), tl.arange(0, M)
    used = c < tl.cdiv(coded, tl.maximum(tl.cdiv(coded, CHUNKS), SHORTEST))
    chunk, ring_out = row * CHUNKS + c, ring_out + row * (M + 2)
    x = tl.load(tables + chunk[:, None] * N + n, mask=used[:, None] & (n < N), other=0.0)
    tops = tl.load(stats + chunk * 4, mask=used, other=-1e30)
    sums = tl.load(stats + chunk * 4 + 1, mask=used, other=0.0)
    scaled_sums = tl.load(stats + chunk * 4 + 2, mask=used, other=0.0)
    ring_top = tl.load(ring_out + M)
    top = tl.maximum(tl.max(tops, axis=0), ring_top)
    share, ring_share = tl.exp2(tops - top), tl.exp2(ring_top - top)
    total = tl.sum(share * sums, axis=0) + ring_share * tl.load(ring_out + M + 1)
    x = tl.sum(x.to(tl.float32) * (share * scaled_sums)[:, None], axis=0)
    x *= unit * tl.load(scale) / total
    tl.store(w + row * N + n, x, mask=n < N)
    if tl.program_id(1) == 0:
        tl.store(base + row * M + m, tl.load(ring_out + m) * (ring_share / total))


def attention_fits(D, config, sparsity, coding):
    """Whether attend_codes serves a cache of this shape with dictionaries D (N, m)."""
    if not on_gpu(D) or D.dtype != torch.bfloat16 or coding == "float32":
        return False
    (N, m), G = D.shape, config.n_heads // config.kv_heads
    table = 4 * triton.next_power_of_2(G) * (N + 2 * SHORTEST)  # and some tokens' scores
    return m in (64, 128) and N % 64 == 0 and G <= 8 and sparsity <= 32 and table <= (
        torch.cuda.get_device_properties(D.device).shared_memory_per_block_optin - STATIC)


def attend_codes(q, key_codes, value_codes, n_coded, ring, seen, bits):
    """Attention of one new token of each sequence over its codes and its ring, in one softmax.

    q: (B, G H, m). key_codes, value_codes: D (N, m), its scale () and the two parts of the codes,
    (B, H, capacity, .), the first n_coded tokens of which count; n_coded () is on the device.
    ring: (2, B, H, slots, m), of it seen (slots,). bits: see Codes. Returns (B, G H, m).
    """
    (Dk, k_scale, *k_parts), (Dv, v_scale, *v_parts) = key_codes, value_codes
    (B, H, slots, M), (N, capacity) = ring.shape[1:], (len(Dk), k_parts[0].shape[2])
    heads, rows, G = B * H, B * q.shape[1], q.shape[1] // H
    GP, largest = triton.next_power_of_2(G), 1 << bits - 1 if bits else 448
    # As many chunks as fill the processors, and more if a chunk's scores had no room.
    chip = torch.cuda.get_device_properties(q.device)
    shared = chip.shared_memory_per_block_optin - STATIC
    room = shared // (4 * GP) - N
    chunks = max(chip.multi_processor_count // heads, triton.cdiv(capacity, room), 1)
    longest = max(SHORTEST, triton.cdiv(capacity, chunks))
    new = functools.partial(torch.empty, device=q.device)
    products, tables = (new(rows, n, N, dtype=torch.float16) for n in (1, chunks))
    stats, ring_out = new(rows, chunks, 4), new(rows, M + 2)
    w, base = new(rows, N, dtype=q.dtype), new(rows, M, dtype=q.dtype)
    tile = 32 if rows <= 128 else 64
    products_and_ring[(heads + triton.cdiv(rows, tile) * (N // 64),)](
        q, Dk, k_scale, *ring, seen, products, ring_out, rows, heads, slots, N, G, M, tile, 64)
    codes = compile_codes(
        shared, N=N, G=G, GP=GP, LANES=min(GP, 2), EACH=max(GP // 2, 1), S_K=k_parts[0].shape[3],
        S_V=v_parts[0].shape[3], BITS=bits, LARGEST=largest, CHUNKS=chunks, SHORTEST=SHORTEST)
    codes((chunks, heads, 1), (1024, 1, 1), [
        products, *k_parts, *v_parts, n_coded, capacity, stats, tables], 4 * GP * (N + longest))
    wide = triton.next_power_of_2(chunks)
    block = min(triton.next_power_of_2(N), 2**15 // wide)
    combine[rows, triton.cdiv(N, block)](
        tables, stats, ring_out, v_scale, n_coded, w, base, largest / 2**15, N, chunks, SHORTEST,
        wide, M, block, num_warps=8)
    return base.addmm_(w, Dv).view_as(q)


# --------------------------------------------------------------------------------------------------
# Caches

class DenseCache:
    """Every key and value as it is: the baseline, (2, L, B, H, capacity, m)."""

    replayable = True

    def __init__(self, config, batch=1, capacity=0, device=None, dtype=torch.float32):
        self.config, self.length = config, 0
        self.kv = torch.zeros(2, config.n_layers, batch, config.kv_heads, capacity,
                              config.head_dim, device=device or best_device(), dtype=dtype)
        self.position = torch.zeros((), dtype=torch.long, device=self.kv.device)

    def attend(self, layer, q, k, v):
        """Append k, v (B, H, T, m), attend with q (B, G H, T, m): the output, shaped as q."""
        start, end = self.length, self.length + q.shape[2]
        if end > self.kv.shape[4]:
            old, capacity = self.kv, max(end, 2 * start)
            self.kv = old.new_zeros(*old.shape[:4], capacity, old.shape[5])
            self.kv[..., :start, :] = old[..., :start, :]
        if layer == 0:
            self.new = self.position + torch.arange(end - start, device=q.device)  # (T,)
        for x, cached in zip((k, v), self.kv[:, layer]):
            cached.index_copy_(2, self.new, x.to(cached.dtype))
        keys, values = self.kv[:, layer].to(q.dtype)
        if q.is_cuda and end - start == 1:  # one launch for every length: a step can be replayed
            if layer == 0:
                self.seen = torch.arange(keys.shape[2], device=q.device) <= self.position
            mask = self.seen.expand(len(q), 1, 1, -1)
        else:
            keys, values = keys[:, :, :end], values[:, :, :end]
            mask = causal_lower_right(end - start, end) if start and end - start > 1 else None
        if layer == self.config.n_layers - 1:
            self.position += end - start
            self.count(end - start)
        return F.scaled_dot_product_attention(q, keys, values, mask, is_causal=start == 0 and
                                              mask is None, enable_gqa=True)

    def count(self, tokens):
        """Count tokens that have come (the device counts for itself)."""
        self.length += tokens

    def nbytes(self):
        used = self.kv[..., :self.length, :].numel()
        return {"total": used * self.kv.itemsize, "dense": used * 2, "allocated": self.kv.nbytes}


class SparseCache:
    """Codes of all tokens but the newest, which wait dense in a ring.

    dictionaries: learned for this model (train_dict.py). sparsity: coefficients a vector, one
    number or one for each dictionary (2, L). buffer: tokens always kept dense. window: tokens coded
    at a time once the buffer overflows. batch: sequences, all of one length. capacity: tokens to
    reserve room for, where known. beam: width of the search (1: plain OMP). coding: how codes are
    stored (see Codes). dtype: of the buffer.
    """

    def __init__(self, config, dictionaries, sparsity=8, buffer=128, window=1, batch=1, capacity=0,
                 beam=1, coding="fp8", dtype=None):
        dictionaries.check(config)
        table = [[sparsity] * config.n_layers] * 2 if isinstance(sparsity, int) else sparsity
        flat, largest = table[KEYS] + table[VALUES], min(config.head_dim, dictionaries.n_atoms)
        if not 1 <= min(flat) <= max(flat) <= largest:
            raise InputError(f"sparsity {sparsity} is outside 1 .. {largest}: vectors have "
                             f"{config.head_dim} numbers, {dictionaries.n_atoms} atoms serve them")
        if buffer < 0 or window < 1 or beam < 1:
            raise InputError(f"buffer {buffer}, window {window} and beam {beam} must be at least "
                             "0, 1 and 1")
        if coding not in CODINGS:
            raise InputError(f"coding '{coding}' is unknown; there are {', '.join(CODINGS)}")
        if dictionaries.n_atoms > (most := 2**13 if coding == "word" else 2**15):
            raise InputError(f"coding {coding} has room for {most} atoms, not for the "
                             f"dictionary's {dictionaries.n_atoms}; use fp8, or fewer atoms")
        self.config, self.dictionaries = config, dictionaries
        self.buffer, self.window = buffer, window
        # Dictionaries of one sparsity are coded together, as one group.
        atoms, scale = dictionaries.atoms.flatten(0, 1), dictionaries.scale.flatten()
        self.groups, self.place = [], {}  # place: (kind, layer) -> its codes, and the row there
        for s in sorted(set(flat)):
            members = [i for i, of in enumerate(flat) if of == s]
            rows = slice(None)  # of all: a view, no copy
            if len(members) < len(flat):
                rows = torch.tensor(members, device=atoms.device)
            codes = Codes(atoms[rows], scale[rows], s, batch, config.kv_heads, coding, beam)
            codes.reserve(max(0, capacity - buffer))
            self.groups.append((rows, codes))
            for row, i in enumerate(members):
                self.place[divmod(i, config.n_layers)] = codes, row
        # Token t waits in slot t mod (buffer + window). Keys carry their position (they are kept
        # after RoPE), so attention does not mind the order.
        self.ring = torch.zeros(2, config.n_layers, batch, config.kv_heads, buffer + window,
                                config.head_dim, device=atoms.device, dtype=dtype or atoms.dtype)
        # Tokens seen, and how many of them are coded: here for shapes, and on the device, where a
        # recorded step reads them.
        self.length = self.coded = 0
        self.position, self.n_coded = torch.zeros(2, dtype=torch.long, device=atoms.device)
        self.slots = torch.arange(buffer + window, device=atoms.device)
        # With kernels for every part, a step is the same launches at every length.
        self.fused = (attention_fits(self.codes_of(KEYS, 0)[0], config, max(flat), coding)
                      and self.ring.dtype == torch.bfloat16)
        self.replayable = self.fused and beam == 1

    def codes_of(self, kind, layer):
        """Atoms (N, m), their scale, and the codes' two parts (B, H, capacity, .)."""
        codes, row = self.place[kind, layer]
        return codes.D[row], codes.scale[row], *(part[row] for part in codes.parts)

    @property
    def full(self):
        """Whether it is time to code the oldest tokens of the ring."""
        return self.length - self.coded >= self.buffer + self.window

    def attend(self, layer, q, k, v):
        """Append k, v (B, H, T, m), attend with q (B, G H, T, m): the output, shaped as q."""
        T = q.shape[2]
        if T > 1:
            out = self._prefill(layer, q, k, v)
        else:
            if layer == 0:
                if self.full:
                    self.compress()
                self.slot = self.position.view(1) % len(self.slots)
                age = (self.position - self.slots) % len(self.slots)  # 0: the newest token
                self.seen = age <= self.position - self.n_coded
            ring = self.ring[:, layer]
            ring[KEYS].index_copy_(2, self.slot, k.to(ring.dtype))
            ring[VALUES].index_copy_(2, self.slot, v.to(ring.dtype))
            out = self.attend_one(layer, q)
        if layer == self.config.n_layers - 1:
            coded = max(0, self.length + T - self.buffer - self.coded) if T > 1 else 0
            self.position += T
            self.n_coded += coded
            self.count(T, coded)
        return out

    def attend_one(self, layer, q):
        """Attention of the newest token, once it is in the ring: q and output (B, G H, 1, m)."""
        ring = self.ring[:, layer]
        if not self.fused:
            return self._attend(layer, q, *ring, self.seen[None])
        out = attend_codes(q[:, :, 0].bfloat16().contiguous(), self.codes_of(KEYS, layer),
                           self.codes_of(VALUES, layer), self.n_coded, ring, self.seen,
                           self.place[KEYS, layer][0].bits)
        return out[:, :, None].to(q.dtype)

    def count(self, tokens, coded=0):
        """Count tokens that have come and that were coded (the device counts for itself)."""
        self.length += tokens
        self.coded += coded

    def _prefill(self, layer, q, k, v):
        """Attend with T > 1 queries, then code at once what does not stay in the buffer."""
        end = self.length + q.shape[2]
        if self.length == 0:
            keys, values = k, v
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            waiting = torch.arange(self.coded, self.length, device=q.device) % len(self.slots)
            keys = torch.cat((self.ring[KEYS, layer][:, :, waiting].to(k.dtype), k), dim=2)
            values = torch.cat((self.ring[VALUES, layer][:, :, waiting].to(v.dtype), v), dim=2)
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
        """Code the oldest `window` tokens of the ring, for all layers, keys and values together.

        Called by every decoding step that finds the ring full. A caller that wants to time it, or
        to have it done while it waits, calls it between steps.
        """
        positions = self.n_coded + torch.arange(self.window, device=self.ring.device)
        oldest = self.ring.index_select(4, positions % len(self.slots)).flatten(0, 1)
        for rows, codes in self.groups:
            codes.reserve(self.coded + self.window)
            codes.write(slice(None), positions, oldest[rows])  # (n, B, H, window, m)
        self.n_coded += self.window
        self.count(0, self.window)

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
        q = q.reshape(P, -1, T, m).float() / m**0.5  # (P, G, T, m)
        keys, values = keys.flatten(0, 1).float(), values.flatten(0, 1).float()
        size = max(1, PIECE // (P * q.shape[1] * min(T, ROWS) * value_codes.sparsity))
        pieces = [(start, min(start + size, self.coded)) for start in range(0, self.coded, size)]
        outs = []
        for rows, allowed in zip(q.split(ROWS, dim=2), seen.split(ROWS)):
            rows = rows.flatten(1, 2)  # (P, R, m)
            scores = [scores_over_codes(rows * key_codes.scale[k], Dk, *key_codes.read(k, *piece))
                      for piece in pieces]
            dense = (rows @ keys.mT).unflatten(1, (-1, len(allowed)))  # (P, G, T, S)
            scores.append(dense.masked_fill(~allowed, -torch.inf).flatten(1, 2))
            p = torch.softmax(torch.cat(scores, dim=-1), dim=-1)  # (P, R, coded + S)
            out = p[..., self.coded:] @ values  # (P, R, m)
            if pieces:
                w = p.new_zeros(rows.shape[1], P, len(Dv))  # (R, P, N)
                for start, end in pieces:
                    add_over_codes(w, p[..., start:end], *value_codes.read(v, start, end))
                out += (w @ Dv).transpose(0, 1) * value_codes.scale[v]
            outs.append(out.unflatten(1, (-1, len(allowed))))  # (P, G, T, m)
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


def attention_table(device):
    """Microseconds of one decoded token's attention in one layer of Llama-3.1-8B's shape (N = 4096,
    s = 8, 128 tokens in the buffer): over a dense cache, and over codes that use all atoms alike
    or, as real ones do, some far more than others (Zipf)."""
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    L = 8 if cuda else 1  # layers in turn, so that the processor's caches are cold
    config = Config(vocab_size=1, dim=4096, n_layers=L, n_heads=32, kv_heads=8, head_dim=128,
                    ffn_dim=1, context=1)
    d = Dictionaries.random(config, 4096, device)
    d.atoms = d.atoms.to(dtype)
    lengths = (2048, 8192, 32768, 131072) if cuda else (8192, 32768)
    print("us a layer           dense        fp8   fp8 Zipf       word  word Zipf   on", device)
    for batch, T in [(1, T) for T in lengths] + [(32, 8192)] * cuda:
        q = torch.randn(batch, 32, 1, 128, device=device).to(dtype)
        kv = torch.randn(L, 2, batch, 8, T, 128, device=device, dtype=dtype)
        row = [milliseconds(lambda: [F.scaled_dot_product_attention(q, *layer, enable_gqa=True)
                                     for layer in kv])]
        del kv
        for coding in ("fp8", "word"):
            cache = SparseCache(config, d, 8, 128, 1, batch, T, coding=coding, dtype=dtype)
            cache.seen = cache.slots < 128
            cache.count(T, T - 128)
            cache.n_coded += T - 128
            [(_, codes)] = cache.groups
            first, second = codes.parts
            for zipf in (False, True):
                u = torch.rand(first.shape, device=device)
                word = (4096**u - 1 if zipf else 4096 * u).int() << codes.bits
                first.copy_(word)
                second.copy_(torch.full(second.shape, 100) if coding == "word" else 2 * u - 1)
                row.append(milliseconds(lambda: [cache.attend_one(i, q) for i in range(L)]))
        print(f"{batch:2d} x {T:6d} tokens" + "".join(f"{1e3 * ms / L:11.1f}" for ms in row))


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
        each = (time.perf_counter() - start) * 1e3 / 64
        q = torch.cat(logits).log_softmax(-1)
        if name == "dense":
            full = q
        kl = F.kl_div(q, full, log_target=True, reduction="none").sum(-1).mean().item()
        print(f"{name:8}{nbytes:16d}  {nbytes / (2 * model.config.head_dim):9.1%}  {kl:11.4f}  "
              f"{each:10.2f}")
    with torch.inference_mode():
        attention_table(device)
