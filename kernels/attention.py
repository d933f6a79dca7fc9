"""Attention of one new token over its codes and its dense tokens, in four launches:

  products_and_dense  q D_k^T on the tensor cores, and beside it attention over the dense tokens.
  attend_codes_chunk  Scores, softmax weights and the values' table of every chunk (codes.cu).
  combine             The chunks' tables, each by its share of the softmax, in one: w (rows, N).
  addmm               w D_v, plus what the dense tokens gave.

No shape depends on how many tokens are coded, which the device reads for itself: a CUDA graph can
replay all this at every length. If a code spans several KV heads, it serves the queries of all. A
row of q meets only its head's part of D_k, but all of D_v: a fifth launch copies its part."""

import functools
from pathlib import Path

import torch
import triton
import triton.language as tl

SHORTEST = 256  # tokens of a chunk, at least

@triton.jit
def products_and_dense(q, D, scale, keys, values, seen, products, dense_out, stats, rows, slots, N,
                       CHUNKS: tl.constexpr, G: tl.constexpr, HEADS: tl.constexpr, M: tl.constexpr,
                       TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Each of the first programs takes a KV head's dense tokens, the rest products. M: head_dim."""
    program, m = tl.program_id(0).to(tl.int64), tl.arange(0, M)[None, :]
    kv_heads, blocks = rows // G, N // BLOCK
    unit = 1.4426950408889634 / M**0.5  # the softmax counts in powers of two
    if program >= kv_heads:  # BLOCK atoms with TILE rows of q, of one place among a code's HEADS
        n = (program - kv_heads) % blocks * BLOCK + tl.arange(0, BLOCK)[:, None]
        tile, head = (program - kv_heads) // blocks // HEADS, (program - kv_heads) // blocks % HEADS
        i = tile * TILE + tl.arange(0, TILE)[:, None]
        r, real = (i // G * HEADS + head) * G + i % G, i < rows // HEADS
        product = tl.dot(tl.load(q + r * M + m, mask=real, other=0.0),
                         tl.trans(tl.load(D + (n * HEADS + head) * M + m)))
        tl.store(products + r * N + tl.trans(n), product * (unit * tl.load(scale)), mask=real)
    else:  # the G rows of a KV head with BLOCK slots at a time
        g = tl.arange(0, 16)[:, None]
        row = program * G + g
        query = tl.load(q + row * M + m, mask=g < G, other=0.0)
        top, total = tl.full([16, 1], -1e30, tl.float32), tl.zeros([16, 1], tl.float32)
        out = tl.zeros([16, M], tl.float32)
        for start in range(0, slots, BLOCK):
            slot = start + tl.arange(0, BLOCK)
            keep = tl.load(seen + slot, mask=slot < slots, other=0) != 0
            here = (program * slots + slot[:, None]) * M + m
            k = tl.load(keys + here, mask=slot[:, None] < slots, other=0.0)  # not waiting for keep
            v = tl.load(values + here, mask=slot[:, None] < slots, other=0.0)
            scores = tl.where(keep[None, :], tl.dot(query, tl.trans(k)) * unit, -1e30)
            higher = tl.maximum(top, tl.max(scores, axis=1, keep_dims=True))
            p = tl.where(keep[None, :], tl.exp2(scores - higher), 0.0)
            fade, top = tl.exp2(top - higher), higher
            total = total * fade + tl.sum(p, axis=1, keep_dims=True)
            out = out * fade + tl.dot(p.to(v.dtype), v)
        tl.store(dense_out + row * M + m, out, mask=g < G)
        tl.store(stats + row * (CHUNKS + 1) * 2, top, mask=g < G)  # those of the chunks follow
        tl.store(stats + row * (CHUNKS + 1) * 2 + 1, total, mask=g < G)

@triton.jit
def combine(tables, stats, dense_out, scale, compressed, w, base, N, CHUNKS: tl.constexpr,
            SHORTEST: tl.constexpr, PADDED: tl.constexpr, G: tl.constexpr, HEADS: tl.constexpr,
            M: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK numbers of a row of w, and its head's part of base: what dense tokens give."""
    row, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    coded, c, m = tl.load(compressed).to(tl.int32), tl.arange(0, PADDED)[:, None], tl.arange(0, M)
    used = c < tl.cdiv(coded, tl.maximum(tl.cdiv(coded, CHUNKS), SHORTEST))  # (PADDED, 1)
    table = tl.load(tables + (row * CHUNKS + c) * N + n, mask=used & (n < N), other=0.0)
    stats += row * (CHUNKS + 1) * 2  # (largest score, sum) of the dense tokens, and of each chunk
    tops = tl.load(stats + 2 + c * 2, mask=used, other=-1e30)
    sums = tl.load(stats + 3 + c * 2, mask=used, other=0.0)
    dense_top = tl.load(stats)
    highest = tl.maximum(tl.max(tops), dense_top)
    share, dense_share = tl.exp2(tops - highest) * sums, tl.exp2(dense_top - highest)
    total = tl.sum(share) + dense_share * tl.load(stats + 1)
    if PADDED < 16:
        x = tl.sum(table.to(tl.float32) * (share / total), axis=0, keep_dims=True)  # (1, BLOCK)
    else:  # on the tensor cores, which take 16 rows: all alike, and the first is stored
        share = tl.broadcast_to(tl.trans(share / total), [16, PADDED])
        x = tl.dot(share.to(tl.float16), table)  # (16, BLOCK)
    r = tl.arange(0, 1 if PADDED < 16 else 16)[:, None]
    tl.store(w + (row + r) * N + n, x * tl.load(scale), mask=(r == 0) & (n < N))
    if tl.program_id(1) == 0:
        own = base + (row * HEADS + row // G % HEADS) * M
        tl.store(own + m, tl.load(dense_out + row * M + m) * (dense_share / total))

@functools.cache
def compile_codes_cu(shared, **constants):
    """The kernel of codes.cu for these constants and so many bytes of shared memory."""
    kernel = torch.cuda._compile_kernel(
        Path(__file__).with_name("codes.cu").read_text(), "attend_codes_chunk",
        nvcc_options=["-use_fast_math", *(f"-D{name}={x}" for name, x in constants.items())])
    kernel.set_shared_memory_config(shared)
    return kernel

def launch(q, key_codes, value_codes, compressed, keys, values, seen):
    """attend_fused on a GPU; None for what the kernels are not made for."""
    (B, H, slots, m), D, (N, M), bits = keys.shape, key_codes.D, key_codes.D.shape, key_codes.bits
    G, heads = q.shape[1] // H, M // m  # rows of q for each KV head, KV heads in a code
    codes, rows, R, RP = B * H // heads, B * H * G, heads * G, triton.next_power_of_2(heads * G)
    (*_, capacity, s_k), (*_, room_v, s_v) = key_codes.parts[0].shape, value_codes.parts[0].shape
    chip = torch.cuda.get_device_properties(q.device)
    shared = chip.shared_memory_per_block_optin - 256  # codes.cu declares less than that itself
    room = shared // (2 * RP) - 2 * N  # for the scores of so many tokens, behind a table
    if (m not in (64, 128) or N % 64 or RP > 16 or max(s_k, s_v) > 128 or room < 2 * SHORTEST
            or capacity != room_v or D.dtype != keys.dtype
            or key_codes.decode.__qualname__ not in ("FP8Codes.decode", "WordCodes.decode")):
        return None
    # As many chunks as fill the processors, or so many times more if a chunk's scores had no room.
    chunks = max(chip.multi_processor_count // codes, 1)
    chunks *= max(triton.cdiv(capacity, chunks * room), 1)
    products, tables = (q.new_empty(rows, n, N, dtype=torch.float16) for n in (1, chunks))
    stats, dense_out = (q.new_empty(rows, n, dtype=torch.float32) for n in (2 * chunks + 2, m))
    w, base = D.new_empty(rows, N), D.new_empty(rows, M)
    tile = 32 if rows <= 128 * heads else 64
    products_and_dense[(B * H + heads * triton.cdiv(rows // heads, tile) * (N // 64),)](
        q.to(D.dtype).contiguous(), D, key_codes.scale, keys, values, seen, products, dense_out,
        stats, rows, slots, N, chunks, G, heads, m, tile, 64)
    attend_codes_chunk = compile_codes_cu(shared, N=N, R=R, RP=RP, S_K=s_k, S_V=s_v, BITS=bits,
                                          CHUNKS=chunks, SHORTEST=SHORTEST)
    attend_codes_chunk((chunks, codes, 1), (1024, 1, 1), [
        products, *key_codes.parts, *value_codes.parts, compressed, capacity, stats, tables],
        2 * RP * (2 * N + max(SHORTEST, triton.cdiv(capacity, chunks))))
    padded = triton.next_power_of_2(chunks)
    block = min(triton.next_power_of_2(N), 2**14 // padded)
    combine[rows, triton.cdiv(N, block)](tables, stats, dense_out, value_codes.scale, compressed, w,
                                         base, N, chunks, SHORTEST, padded, G, heads, m, block)
    out = base.addmm_(w, value_codes.D).view(codes, heads, G, heads, m)  # heads of row and of part
    return out.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).reshape(q.shape).to(q.dtype)
