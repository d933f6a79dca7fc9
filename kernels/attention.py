"""Attention of one new token over its codes and its dense tokens, in four launches:

  products_and_dense  q D_k^T on the tensor cores, and beside it attention over the dense tokens.
  attend_codes_chunk  Scores, softmax weights and the values' table of every chunk (codes.cu).
  combine             The chunks' tables, each by its share of the softmax, in one: w (rows, N).
  addmm               w D_v, plus what the dense tokens gave.

None of their shapes depends on how many tokens are coded, which the device reads for itself. So a
CUDA graph can replay them at every length."""

import functools
from pathlib import Path

import torch
import triton
import triton.language as tl

SHORTEST = 256  # tokens of a chunk, at least
STATIC = 4096  # bytes of shared memory that codes.cu declares by itself, at most


@triton.jit
def products_and_dense(q, D, scale, keys, values, seen, products, dense_out, rows, heads, slots, N,
                       G: tl.constexpr, M: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """The first programs attend to the dense tokens of a KV head each, the others form products."""
    program, m = tl.program_id(0).to(tl.int64), tl.arange(0, M)[None, :]
    unit = 1.4426950408889634 / M**0.5  # the softmax counts in powers of two
    if program >= heads:  # TILE rows of q with BLOCK atoms
        r = (program - heads) // (N // BLOCK) * TILE + tl.arange(0, TILE)[:, None]
        n = (program - heads) % (N // BLOCK) * BLOCK + tl.arange(0, BLOCK)[:, None]
        product = tl.dot(tl.load(q + r * M + m, mask=r < rows, other=0.0),
                         tl.trans(tl.load(D + n * M + m))) * (unit * tl.load(scale))
        tl.store(products + r * N + tl.trans(n), product, mask=r < rows)
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
        result = dense_out + row * (M + 2)  # the output, then the largest score and the sum
        tl.store(result + m, out, mask=g < G)
        tl.store(result + M, top, mask=g < G)
        tl.store(result + M + 1, total, mask=g < G)


@triton.jit
def combine(tables, stats, dense_out, scale, compressed, w, base, unit, N, CHUNKS: tl.constexpr,
            SHORTEST: tl.constexpr, PADDED: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK numbers of a row of w, and that row of base: the dense tokens' part of the output."""
    row, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    coded, c, m = tl.load(compressed), tl.arange(0, PADDED), tl.arange(0, M)
    used = c < tl.cdiv(coded, tl.maximum(tl.cdiv(coded, CHUNKS), SHORTEST))
    chunk, dense_out = row * CHUNKS + c, dense_out + row * (M + 2)
    x = tl.load(tables + chunk[:, None] * N + n, mask=used[:, None] & (n < N), other=0.0)
    tops = tl.load(stats + chunk * 4, mask=used, other=-1e30)
    sums = tl.load(stats + chunk * 4 + 1, mask=used, other=0.0)
    scaled_sums = tl.load(stats + chunk * 4 + 2, mask=used, other=0.0)
    dense_top = tl.load(dense_out + M)
    highest = tl.maximum(tl.max(tops, axis=0), dense_top)
    share, dense_share = tl.exp2(tops - highest), tl.exp2(dense_top - highest)
    total = tl.sum(share * sums, axis=0) + dense_share * tl.load(dense_out + M + 1)
    x = tl.sum(x.to(tl.float32) * (share * scaled_sums)[:, None], axis=0)
    x *= unit * tl.load(scale) / total
    tl.store(w + row * N + n, x, mask=n < N)
    if tl.program_id(1) == 0:
        tl.store(base + row * M + m, tl.load(dense_out + m) * (dense_share / total))


@functools.lru_cache(None)
def compile_codes_cu(shared, **constants):
    """The kernel of codes.cu for these constants and so many bytes of shared memory."""
    kernel = torch.cuda._compile_kernel(
        Path(__file__).with_name("codes.cu").read_text(), "attend_codes_chunk",
        nvcc_options=[f"-D{name}={value}" for name, value in constants.items()])
    kernel.set_shared_memory_config(shared)
    return kernel


def launch(q, key_codes, value_codes, compressed, keys, values, seen):
    """attend_fused on a GPU; None for what the kernels are not made for."""
    (B, H, slots, m), (N, _), G = keys.shape, key_codes.D.shape, q.shape[1] // keys.shape[1]
    heads, rows, GP, D = B * H, B * H * G, triton.next_power_of_2(G), key_codes.D
    (*_, capacity, s_k), (*_, room_v, s_v) = key_codes.parts[0].shape, value_codes.parts[0].shape
    bits, largest = key_codes.bits, 1 << (key_codes.bits - 1) if key_codes.bits else 448
    chip = torch.cuda.get_device_properties(q.device)
    shared = chip.shared_memory_per_block_optin - STATIC
    room = shared // (4 * GP) - N  # for the scores of so many tokens, behind a table
    if (m not in (64, 128) or N % 64 or G > 8 or max(s_k, s_v) > 32 or room < 2 * SHORTEST
            or capacity != room_v or D.dtype != keys.dtype
            or key_codes.parts[1].dtype != (torch.uint8 if bits else torch.float8_e4m3fn)):
        return None
    # As many chunks as fill the processors, and more if a chunk's scores had no room.
    chunks = max(chip.multi_processor_count // heads, triton.cdiv(capacity, room), 1)
    products, tables = (q.new_empty(rows, n, N, dtype=torch.float16) for n in (1, chunks))
    stats, dense_out = (q.new_empty(rows, n, dtype=torch.float32) for n in (4 * chunks, m + 2))
    w, base = D.new_empty(rows, N), D.new_empty(rows, m)
    tile = 32 if rows <= 128 else 64
    products_and_dense[(heads + triton.cdiv(rows, tile) * (N // 64),)](
        q.to(D.dtype).contiguous(), D, key_codes.scale, keys, values, seen, products, dense_out,
        rows, heads, slots, N, G, m, tile, 64)
    attend_codes_chunk = compile_codes_cu(
        shared, N=N, G=G, GP=GP, PER_TOKEN=min(GP, 2), PER_THREAD=max(GP // 2, 1), S_K=s_k,
        S_V=s_v, BITS=bits, LARGEST=largest, CHUNKS=chunks, SHORTEST=SHORTEST)
    attend_codes_chunk((chunks, heads, 1), (1024, 1, 1), [
        products, *key_codes.parts, *value_codes.parts, compressed, capacity, stats, tables],
        4 * GP * (N + max(SHORTEST, triton.cdiv(capacity, chunks))))
    padded = triton.next_power_of_2(chunks)
    block = min(triton.next_power_of_2(N), 2**15 // padded)
    combine[rows, triton.cdiv(N, block)](
        tables, stats, dense_out, value_codes.scale, compressed, w, base, largest / 2**15, N,
        chunks, SHORTEST, padded, m, block, num_warps=8)
    return base.addmm_(w, value_codes.D).view_as(q).to(q.dtype)
