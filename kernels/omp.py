"""Orthogonal matching pursuit in one launch.

In torch the products of all atoms with all residuals go to memory and back, to end as an index
each. Here they stay in registers:

- In each step, a program keeps the residuals of ROWS vectors in shared memory, in FP8 for the
  tensor cores (bf16 where a GPU has no FP8), and streams the dictionary past them, a tile of ATOMS
  atoms at a time, from the L2 cache. Sums of FP8 products are float16.
- Every register keeps its own maximum of |product|, and threads compare theirs once, after all
  tiles. As float32, a float16 has free low bits: there stands the number of the atom.
- FP8 may take one atom for another that is nearly as good: so the two best (of different lanes, a
  lane being each 64th atom) compete again in float32. (Without, the final error grows by 0.5 %, and
  by 0.1 % with it, on real vectors.) The refit is in float32, and the next step chooses for what is
  really left. Only the basis is in half precision if atoms are in bf16: it overflows the L2 cache.
- Few vectors would leave most of the GPU idle. So SPLIT programs, all running at once, sweep a part
  of the dictionary each, in bf16, agree on the best atom by an atomic maximum, and all refit."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

ATOMS = tl.constexpr(64)  # of a tile

@triton.jit
def substitute(Qy, triangle, r, j, step, ROWS: tl.constexpr, S: tl.constexpr,
               S_PADDED: tl.constexpr, LIMIT: tl.constexpr):
    """Solve U z = Q y (ROWS, S_PADDED) from the last coefficient back, in Qy's place; with LIMIT in
    steps, rounded: adding 1.5 * 2^23 leaves a float no room for a fraction."""
    for k in range(S - 1, -1, -1):
        U = tl.load(triangle + (k * ROWS + r) * S_PADDED + j, mask=j <= k, other=0.0)
        z = tl.sum(tl.where(j == k, Qy * U, 0), axis=1)[:, None]  # 1 / U[k, k] is stored there
        if LIMIT > 0:
            z = tl.minimum(tl.maximum(z / step, -LIMIT), LIMIT) + 12582912.0 - 12582912.0
        Qy = tl.where(j == k, z, Qy - U * (z * step))
    return Qy

@triton.jit(do_not_specialize=["items", "V"])
def omp_kernel(Y, D, D_low, scratch, directions, sync, indices, coefficients, exponents, items,
               V, SIZE: tl.constexpr, N: tl.constexpr, M: tl.constexpr, S: tl.constexpr,
               S_PADDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
               INDEX_MASK: tl.constexpr, SPLIT: tl.constexpr, LIMIT: tl.constexpr):
    """OMP of V vectors for each dictionary; an item of work is ROWS vectors of one of them."""
    TILES: tl.constexpr = N // ATOMS // SPLIT
    part, items_each = tl.program_id(0) % SPLIT, tl.cdiv(V, ROWS)  # items of each dictionary
    r, m, j = tl.arange(0, ROWS)[:, None], tl.arange(0, M)[None, :], tl.arange(0, S_PADDED)[None, :]
    residual = scratch + tl.program_id(0).to(tl.int64) * SIZE  # (ROWS, M), the program's own
    basis = directions + tl.program_id(0).to(tl.int64) * S * ROWS * M  # (S, ROWS, M)
    triangle = residual + ROWS * M  # (S + 1, ROWS, S_PADDED): columns of U (A = U^T Q), then Q y
    chosen = triangle + (S + 1) * ROWS * S_PADDED  # (ROWS, S_PADDED) atoms
    for item in range(tl.program_id(0) // SPLIT, items, tl.num_programs(0) // SPLIT):
        dictionary, group = (item // items_each).to(tl.int64), item % items_each
        vector, real = dictionary * V + group * ROWS + r, r < V - group * ROWS  # (ROWS, 1)
        y = tl.load(Y + vector * M + m, mask=real, other=0.0)
        tl.store(residual + r * M + m, y.to(tl.float32))
        for k in range(S):
            # 1. The choice of the atom with the largest |<r, d_n>|. Every other step begins with
            # the last tile, which the step before may have left in the L2 cache.
            tl.debug_barrier()
            atoms, columns = D_low + dictionary * N * M, tl.load(residual + r * M + m)
            if SPLIT == 1:  # in the middle of FP8's range, whatever the residual's length
                columns *= 64 / tl.sqrt(tl.sum(columns * columns, axis=1) + 1e-30)[:, None]
            first_tile, backward = part * TILES, k % 2 == 1
            lane = tl.arange(0, ATOMS)[:, None]
            columns = tl.trans(columns.to(D_low.dtype.element_ty))  # (M, ROWS): the residuals
            largest = tl.zeros([ATOMS, ROWS], tl.int32)
            # Sums of FP8 products as float16: as float32, they end in 13 zero bits.
            half: tl.constexpr = D_low.dtype.element_ty == tl.float8e4nv and INDEX_MASK < 2**13
            for t in range(TILES):
                tile = first_tile + tl.where(backward, TILES - 1 - t, t)
                product = tl.dot(tl.load(atoms + tile * ATOMS * M + lane * M + m), columns,
                                 out_dtype=tl.float16 if half else tl.float32)
                # As integers, which sort like positive floats, with the atom's number added in the
                # lowest bits: sum and maximum are one instruction of a GPU.
                absolute = tl.abs(product).to(tl.float32).to(tl.int32, bitcast=True)
                if not half:
                    absolute &= -1 - INDEX_MASK
                largest = tl.maximum(largest, absolute + (tile * ATOMS + lane))  # (ATOMS, ROWS)
            best = tl.max(largest, axis=0)  # (ROWS,)
            if SPLIT == 1:  # the second best waits where Q y's number k will be
                second = tl.max(tl.where(largest == best[None, :], 0, largest), axis=0)[:, None]
                tl.store(triangle + (S * ROWS + r) * S_PADDED + k,
                         (second & INDEX_MASK).to(tl.float32))
                best = best[:, None]
            else:
                agreed = sync + items + vector * S + k  # behind a counter for each item
                tl.atomic_max(agreed, best[:, None], mask=real)
                tl.debug_barrier()
                tl.atomic_add(sync + item, 1, sem="release")
                while tl.atomic_add(sync + item, 0, sem="acquire") < SPLIT * (k + 1):
                    pass
                best = tl.load(agreed, mask=real, other=0, cache_modifier=".cg")
            best &= INDEX_MASK
            tl.store(chosen + r * S_PADDED + k, best.to(tl.float32))  # exact up to 2^24
            tl.debug_barrier()
            for b in range(ROWS // BLOCK):  # as many vectors at a time as registers hold
                a = b * BLOCK + tl.arange(0, BLOCK)[:, None]
                here, corner = a * M + m, a * S_PADDED
                # 2. Gram-Schmidt: what of the new atom is orthogonal to those chosen before. If it
                # is one of them, nothing: its coefficient is 0.
                rest = tl.load(residual + here)  # (BLOCK, M)
                new = tl.load(chosen + corner + k).to(tl.int32)  # (BLOCK, 1)
                atom = tl.load(D + (dictionary * N + new) * M + m).to(tl.float32)  # (BLOCK, M)
                if SPLIT == 1:  # the better of the two
                    other = tl.load(triangle + S * ROWS * S_PADDED + corner + k).to(tl.int32)
                    rival = tl.load(D + (dictionary * N + other) * M + m).to(tl.float32)
                    ours, theirs = tl.sum(atom * rest, axis=1), tl.sum(rival * rest, axis=1)
                    wins = (tl.abs(theirs) > tl.abs(ours))[:, None]  # (BLOCK, 1)
                    atom = tl.where(wins, rival, atom)
                    tl.store(chosen + corner + k, tl.where(wins, other, new).to(tl.float32))
                for i in tl.range(0, k, num_stages=3):  # loads run two ahead of their use
                    q = tl.load(basis + i * ROWS * M + here).to(tl.float32)
                    p = tl.sum(atom * q, axis=1)[:, None]
                    atom -= p * q
                    tl.store(triangle + k * ROWS * S_PADDED + corner + i, p)
                norm2 = tl.sum(atom * atom, axis=1)[:, None]
                scale = tl.where(norm2 > 1e-8, 1 / tl.sqrt(tl.maximum(norm2, 1e-8)), 0.0)
                tl.store(triangle + k * ROWS * S_PADDED + corner + k, scale)  # 1 / U[k, k]
                # 3. The refit: take the new direction out of the residual.
                q = (atom * scale).to(directions.dtype.element_ty)
                tl.store(basis + k * ROWS * M + here, q)
                q = q.to(tl.float32)
                projection = tl.sum(rest * q, axis=1)[:, None]
                tl.store(residual + here, rest - projection * q)
                tl.store(triangle + S * ROWS * S_PADDED + corner + k, projection)
        tl.debug_barrier()
        # 4. The coefficients.
        Qy = tl.load(triangle + (S * ROWS + r) * S_PADDED + j, mask=j < S, other=0.0)
        z = substitute(Qy, triangle, r, j, 1.0, ROWS, S, S_PADDED, 0)
        if LIMIT > 0:
            e = tl.floor(16 * (tl.log2(tl.max(tl.abs(z), axis=1)[:, None] / LIMIT) + 8) + 0.5)
            e = tl.minimum(tl.maximum(e, 0.0), 255.0)  # (ROWS, 1)
            z = substitute(Qy, triangle, r, j, tl.exp2(e / 16 - 8), ROWS, S, S_PADDED, LIMIT)
            tl.store(exponents + vector, e.to(tl.int64), mask=real)
        if part == 0:
            final = tl.load(chosen + r * S_PADDED + j, mask=j < S, other=0.0).to(tl.int64)
            tl.store(indices + vector * S + j, final, mask=real & (j < S))
            tl.store(coefficients + vector * S + j, z.to(coefficients.dtype.element_ty),
                     mask=real & (j < S))

def launch(D, Y, sparsity, bits=0):
    """omp_fused on a GPU; None for what the kernel is not made for."""
    (L, N, m), V, padded = D.shape, Y.shape[1], triton.next_power_of_2(sparsity)
    if (N % ATOMS.value or N > 2**15 or m % 16 or m > 256 or sparsity > 128 or Y.numel() == 0
            or D.dtype not in (torch.bfloat16, torch.float32) or Y.dtype == torch.float64):
        return None
    M = max(64, triton.next_power_of_2(m))
    if m < M:
        D, Y = (F.pad(x, (0, M - m)) for x in (D, Y))
    # As measured: few vectors want many loads in flight, many want three programs on a processor,
    # and very many, if few atoms are chosen, fewer reads of the dictionary.
    rows = 16 if V <= 32 else 32 if V <= 128 else 64
    if L * V >= 2**17 and M <= 128 and sparsity <= 8:
        rows = 128
    stages = 3 if M > 128 or rows in (32, 128) else 4
    size = rows * (M + (2 + sparsity) * padded)  # scratch of a program, in numbers
    room = 2**26 // (rows * sparsity * M)  # programs: bases of 256 MB serve any number
    processors = torch.cuda.get_device_properties(D.device).multi_processor_count
    tiles, items, split = N // ATOMS.value, L * triton.cdiv(V, rows), 1
    while 2 * split * items <= min(processors, room) and tiles % (2 * split) == 0:
        split *= 2
    programs = min(items * split, 3 * processors, room)
    scratch = D.new_empty(programs * size, dtype=torch.float32)
    kept = torch.float16 if D.dtype == torch.bfloat16 else torch.float32  # all programs' bases
    directions = D.new_empty(programs * sparsity * rows * M, dtype=kept)
    sync = D.new_zeros(items + L * V * sparsity if split > 1 else 1, dtype=torch.int32)
    indices, exponents = (D.new_empty(L, V, n, dtype=torch.int64) for n in (sparsity, 1))
    coefficients = D.new_empty(L, V, sparsity, dtype=torch.int64 if bits else torch.float32)
    D_low = D  # Triton's interpreter multiplies neither in bf16 nor in FP8
    if D.is_cuda:
        fp8 = split == 1 and torch.cuda.get_device_capability(D.device) >= (8, 9)
        D_low = (16 * D).to(torch.float8_e4m3fn) if fp8 else D.to(torch.bfloat16)
    omp_kernel[(programs,)](
        Y.contiguous(), D.contiguous(), D_low.contiguous(), scratch, directions, sync,
        indices, coefficients, exponents, items, V, size, N, M, sparsity, padded, rows,
        min(rows, 4096 // M), triton.next_power_of_2(N) - 1, split,
        2.0 ** (bits - 1) - 1 if bits else 0, num_warps=4, num_stages=stages,
        maxnreg=168 if V > 128 else None)
    return (indices, coefficients, exponents) if bits else (indices, coefficients)
