"""Sparse coding: orthogonal matching pursuit, beam search over it, and two methods to compare with.

Given a dictionary D of N unit-norm atoms, its rows, and a vector y, find coefficients z that

    minimise  || y - z D ||   subject to   || z ||_0 <= s

Orthogonal matching pursuit (Pati, Rezaiifar, Krishnaprasad 1993) is greedy. s times over:

    n_k = argmax_n |<r, d_n>|                   the atom that correlates best with the residual r
    z   = argmin_z || y - z D[n_1 .. n_k] ||    refit all coefficients by least squares
    r   = y - z D[n_1 .. n_k]                   the new residual, orthogonal to every chosen atom

Refitting from scratch is a least-squares problem a step. An orthonormal basis q_1 .. q_k of the
chosen atoms makes it one projection, r = r - <r, q_k> q_k, and as chosen atoms A and basis Q are
tied by A = U^T Q, U upper triangular, all coefficients follow at the end from one small triangular
system, U z = Q y. No (N x N) Gram matrix is needed, and nothing loops over vectors.

`python omp.py` compares the coders on keys and values of the embedded model.
"""

import functools
import os
import sys
import time

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
    from triton import jit
except ImportError:  # the kernels below stay text, and torch does the work
    triton = None

    class tl:
        constexpr = None

    def jit(function=None, **options):
        return function or jit

CHUNK = 2**24  # correlations held at a time: 64 MB in float32, whatever the number of vectors
ATOMS = 64  # of a tile, for the kernel


def omp(D, Y, sparsity, tol=None):
    """Code every vector of Y over dictionary D by orthogonal matching pursuit.

    D: (N, m) atoms of unit norm, or (L, N, m), a batch of dictionaries.
    Y: (B, m) vectors, or (L, B, m), each coded over the dictionary of its batch.
    tol: stop a vector once its relative error ||y - z D|| / ||y|| is at most tol (default: never).
    Returns indices (..., B, s) int64 and coefficients (..., B, s) in Y's dtype, float32 at least.
    Coefficients that are not needed are 0: zero vectors, a residual that is used up, a vector that
    met tol. Atoms of the others are distinct. Raises ValueError for what does not fit.
    """
    return code(D, Y, sparsity, tol=tol)


def omp_beam(D, Y, sparsity, width):
    """OMP that keeps the `width` best partial supports of every vector instead of one.

    A step extends each support by its `width` best-correlated atoms, computes the exact error of
    every extension, merges equal supports (the same atoms in another order), and keeps the best.
    The greedy support always keeps its place, so the result is never worse than omp's; width 1 is
    omp, and with room for every support it is exhaustive search. Arguments and results as for omp.
    """
    return code(D, Y, sparsity, width)


def omp_levels(D, Y, sparsity, bits, width=1):
    """OMP (or beam search) with coefficients of few bits: multiples of a step for each vector.

    A coefficient is level * 2^(e / 16 - 8) with |level| < 2^(bits - 1) and e in 0 .. 255.
    Returns indices and levels (..., B, s) and e (..., B, 1), int64.
    """
    return code(D, Y, sparsity, width, bits=bits)


@torch.no_grad()
def code(D, Y, sparsity, width=1, tol=None, bits=0):
    """All of the above: check the arguments, bring them to (L, N, m) and (L, B, m), and pursue, by
    the GPU's kernel where that serves, else piece by piece of B."""
    if D.dim() not in (2, 3) or D.dim() != Y.dim() or D.shape[-1] != Y.shape[-1]:
        raise ValueError(f"D {tuple(D.shape)} and Y {tuple(Y.shape)} do not fit: (N, m), (B, m) "
                         "or (L, N, m), (L, B, m)")
    N, m = D.shape[-2:]
    if not 1 <= sparsity <= min(N, m) or width < 1:
        raise ValueError(f"sparsity {sparsity} is not within 1 .. {min(N, m)} (N = {N}, m = {m}), "
                         f"or width {width} is not at least 1")
    D3, Y3 = (x if x.dim() == 3 else x[None] for x in (D, Y))
    if len(D3) != len(Y3):
        raise ValueError(f"{len(D3)} dictionaries for {len(Y3)} batches of vectors")
    if width == 1 and tol is None and fits(D3, Y3, sparsity):
        parts = [omp_fused(D3, Y3, sparsity, bits)]
    else:
        dtype = torch.promote_types(Y.dtype, torch.float32)
        D3, Y3, parts = D3.to(dtype), Y3.to(dtype), []
        for piece in Y3.split(max(1, CHUNK // (len(D3) * N * width**2)), dim=1):
            found = (pursue_beam(D3, piece, sparsity, width) if width > 1 else
                     pursue(D3, piece, sparsity, tol))
            parts.append(solve(D3, *found, bits))
    return tuple(torch.cat(part, dim=1).view(*Y.shape[:-1], part[0].shape[-1])
                 for part in zip(*parts))


def argmax_rows(x):
    """Index of the largest number of every row of x (L, B, N).

    In two steps, the best block of 64 and the best in that block: on a CPU a plain maximum runs at
    full vector width, argmax does not, and it would cost as much as the product that x comes from.
    """
    if x.shape[-1] % 64 or x.numel() < 2**15:
        return x.argmax(dim=-1)
    blocks = x.unflatten(-1, (-1, 64))  # (L, B, N / 64, 64)
    block = blocks.amax(dim=-1).argmax(dim=-1)  # (L, B)
    chosen = blocks.gather(2, block[..., None, None].expand(-1, -1, 1, 64))  # (L, B, 1, 64)
    return block * 64 + chosen[:, :, 0].argmax(dim=-1)


def gather_atoms(D, indices):
    """Atoms (L, ..., m) of the dictionaries D (L, N, m) at indices (L, ...)."""
    L, N, m = D.shape
    first = torch.arange(0, L * N, N, device=D.device).view(L, *[1] * (indices.dim() - 1))
    rows = D.reshape(L * N, m).index_select(0, (indices + first).flatten())
    return rows.view(*indices.shape, m)


def solve(D, indices, Q, Qy, bits=0):
    """What a pursuit ends with: its indices (L, B, s) and the coefficients of those atoms, from the
    basis Q (L, B, s, m) of their span and y's coordinates in it, Qy (L, B, s).

    With bits, levels (see omp_levels): coefficients are rounded on the way, from the last one back,
    and each makes up for the rounding of those after it (Babai 1986, the nearest plane).
    """
    U = (Q @ gather_atoms(D, indices).mT).triu()  # atoms = U^T Q
    diagonal = U.diagonal(dim1=-2, dim2=-1)
    diagonal.masked_fill_(diagonal == 0, 1)  # an atom that added nothing: its q and Qy are 0
    z = torch.linalg.solve_triangular(U, Qy[..., None], upper=True)[..., 0]
    if not bits:
        return indices, z
    limit, level = 2 ** (bits - 1) - 1, torch.zeros_like(z)
    e = 16 * (torch.log2(z.abs().amax(dim=-1, keepdim=True) / limit) + 8)  # the largest about fits
    e = e.round().clamp(0, 255)  # (L, B, 1)
    U, Qy = U * torch.exp2(e / 16 - 8)[..., None], Qy.clone()  # U in steps
    for k in reversed(range(z.shape[-1])):
        level[..., k] = (Qy[..., k] / U[..., k, k]).round().clamp(-limit, limit)
        Qy -= U[..., k] * level[..., k, None]
    return indices, level.long(), e.long()


def pursue(D, Y, sparsity, tol=None):
    """OMP for D (L, N, m) and Y (L, B, m): indices (L, B, s), and Q and Qy (see solve)."""
    L, B, m = Y.shape
    indices = torch.zeros(L, B, sparsity, dtype=torch.long, device=Y.device)
    Q = Y.new_zeros(L, B, sparsity, m)  # orthonormal basis of the chosen atoms
    Qy = Y.new_zeros(L, B, sparsity)
    correlation = Y.new_empty(L, B, D.shape[1])
    residual = Y
    if tol is not None:
        goal = tol * Y.norm(dim=-1)  # (L, B)
    for k in range(sparsity):
        torch.bmm(residual, D.mT, out=correlation)  # (L, B, N)
        correlation.abs_().scatter_(-1, indices[..., :k], -1)  # an atom is chosen once
        indices[..., k] = best = argmax_rows(correlation)
        atom = gather_atoms(D, best)  # (L, B, m)
        inner = (Q[..., :k, :] * atom[..., None, :]).sum(-1, keepdim=True)  # (L, B, k, 1)
        q = atom - (Q[..., :k, :] * inner).sum(-2)  # what is new in this atom
        norm = q.norm(dim=-1).clamp_(min=1e-4)  # (L, B)
        useful = norm > 1e-4  # else the atom adds nothing to those chosen: coefficient 0
        if tol is not None:
            useful &= residual.norm(dim=-1) > goal
        q = q * (useful / norm)[..., None]
        Q[..., k, :] = q
        Qy[..., k] = projection = (residual * q).sum(-1)
        residual = residual - projection[..., None] * q
    return indices, Q, Qy


def pursue_beam(D, Y, sparsity, width):
    """Beam search for D (L, N, m) and Y (L, B, m): indices (L, B, s), and Q and Qy (see solve)."""
    (L, N, m), B, W = D.shape, Y.shape[1], 1  # W beams now: one empty support, later up to width
    label = torch.randint(2**62, (N,), generator=torch.Generator().manual_seed(0)).to(Y.device)
    indices = torch.zeros(L, B, W, 0, dtype=torch.long, device=Y.device)
    Q, Qy = Y.new_zeros(L, B, W, 0, m), Y.new_zeros(L, B, W, 0)
    residual = Y[:, :, None]  # (L, B, W, m)
    error = residual.square().sum(-1)  # (L, B, W), infinite for a beam that holds nothing
    for k in range(sparsity):
        # Candidates: the C best-correlated atoms of every beam, and the part of each that is new.
        correlation = (residual.flatten(1, 2) @ D.mT).unflatten(1, (B, W))  # (L, B, W, N)
        correlation.abs_().scatter_(-1, indices, -1)
        best = correlation.topk(min(width, N - k), dim=-1).indices  # (L, B, W, C)
        C = best.shape[-1]
        atom = gather_atoms(D, best)  # (L, B, W, C, m)
        q = atom - (atom @ Q.mT) @ Q  # (L, B, W, C, m)
        norm = q.norm(dim=-1).clamp_(min=1e-4)  # (L, B, W, C)
        q = q * ((norm > 1e-4) / norm)[..., None]
        step = (q @ residual[..., None])[..., 0]  # (L, B, W, C)
        after = (error[..., None] - step.square()).flatten(2)  # (L, B, W C)

        # A support's key is the sum of its atoms' random labels, whatever their order. Candidate 0
        # extends the greedy beam by its greedy choice: never a duplicate, and always first.
        key = (label[indices].sum(-1)[..., None] + label[best]).flatten(2)  # (L, B, W C)
        equal = key[..., :, None] == key[..., None, :]  # (L, B, W C, W C)
        after.masked_fill_(equal.tril(-1).any(dim=-1), torch.inf)
        rank = after.clone()
        rank[..., 0] = -torch.inf
        keep = rank.topk(min(width, W * C), dim=-1, largest=False).indices  # (L, B, W)
        W, parent = keep.shape[-1], keep // C

        def take(x, index):  # the kept rows of x (L, B, candidates or beams, ...)
            shape = index.shape + x.shape[3:]
            return x.gather(2, index.reshape(index.shape + (1,) * (x.dim() - 3)).expand(shape))

        q, step = take(q.flatten(2, 3), keep), take(step.flatten(2), keep)
        Q = torch.cat((take(Q, parent), q[..., None, :]), dim=-2)  # (L, B, W, k + 1, m)
        Qy = torch.cat((take(Qy, parent), step[..., None]), dim=-1)
        indices = torch.cat((take(indices, parent), take(best.flatten(2), keep)[..., None]), dim=-1)
        residual = take(residual, parent) - step[..., None] * q
        error = residual.square().sum(-1).masked_fill(take(after, keep).isinf(), torch.inf)
    first = error.argmin(dim=-1, keepdim=True)  # (L, B, 1)
    return tuple(take(x, first)[:, :, 0] for x in (indices, Q, Qy))


def reconstruct(D, indices, coefficients):
    """Vectors z D, (..., B, m), of codes (..., B, s) over D (N, m) or (L, N, m)."""
    table = D.reshape(-1, D.shape[-1])  # (L N, m)
    if D.dim() == 3:
        first = torch.arange(D.shape[0], device=D.device) * D.shape[1]
        indices = indices + first[:, None, None]
    out = F.embedding_bag(indices.flatten(0, -2), table, mode="sum",
                          per_sample_weights=coefficients.flatten(0, -2).to(table.dtype))
    return out.view(*indices.shape[:-1], -1)


# --------------------------------------------------------------------------------------------------
# On a GPU
#
# A step of OMP is one large product, all atoms with all residuals, and a little algebra on the
# atoms that won. Done one operation at a time, the correlations (vectors x atoms, float32) go out
# to memory only to be read back and reduced to one index each, s times over. Here they never leave
# the registers they are computed in:
#
#   - A program keeps the residuals of ROWS vectors in shared memory, as bf16 for the tensor cores,
#     and streams the dictionary past them, ATOMS atoms at a time: 2 N m bytes for each step, from
#     the L2 cache where a dictionary (1 MB) stays. Besides, k rows of the float32 basis for each
#     vector in step k. Little else moves.
#   - Every register keeps its own running maximum of |correlation|. Threads compare theirs once,
#     when the sweep is over. The number of the winning tile rides in the lowest bits of the float
#     itself (positive floats sort like integers), so that the maximum alone is enough.
#   - Only the choice of the atom sees bf16. A correlation that is off by 2^-9 may swap two atoms
#     that are nearly as good; the refit of the one chosen is exact to float32, and the next step
#     chooses for what it really left. The error of the codes is that of float32 throughout.
#   - Few vectors (one decoded token) would leave most of the chip idle. Then SPLIT programs share
#     a dictionary: each sweeps its part, they agree by an atomic maximum, and wait for each other.
#     They all must run at once, so only as many are started as the chip has processors.
#   - Many vectors share the scratch of few programs: each takes group after group of ROWS vectors.


@jit
def sweep(D, residual, first, back, TILES: tl.constexpr, TILE_BITS: tl.constexpr,
          ATOMS: tl.constexpr):
    """The atom of largest |<r, d_n>|, among TILES tiles of ATOMS atoms, for residual (ROWS, M).

    back: whether to begin with the last tile, which a sweep before may have left in the L2 cache.
    Returns (ROWS, 1) the correlations as integers to compare by, and the indices of the atoms.
    """
    M: tl.constexpr = residual.shape[1]
    tile = tl.arange(0, ATOMS)[:, None] * M + tl.arange(0, M)[None, :]
    r = tl.trans(residual.to(D.dtype.element_ty))  # (M, ROWS)
    best = tl.zeros([ATOMS, residual.shape[0]], tl.int32)
    for t in range(TILES):
        i = first + tl.where(back, TILES - 1 - t, t)
        correlation = tl.dot(tl.load(D + i * ATOMS * M + tile), r)  # (ATOMS, ROWS)
        # Clear the sign and the bits that the number of the tile takes.
        size = correlation.to(tl.int32, bitcast=True) & (0x7FFFFFFF - TILE_BITS)
        best = tl.maximum(best, size | i)
    value, place = tl.max(best, axis=0, return_indices=True)  # (ROWS,)
    return value[:, None], ((value & TILE_BITS) * ATOMS + place)[:, None]


@jit
def substitute(z, triangle, r, j, step, ROWS: tl.constexpr, S: tl.constexpr,
               S_PADDED: tl.constexpr, LIMIT: tl.constexpr):
    """Solve U c = z (ROWS, S_PADDED) from the last coefficient back; LIMIT: in levels (see solve),
    rounded by adding 1.5 * 2^23, which leaves a float no room for a fraction."""
    for i in range(S):
        k = S - 1 - i
        U = tl.load(triangle + (k * ROWS + r) * S_PADDED + j, mask=j <= k, other=0.0)
        c = tl.sum(tl.where(j == k, z * U, 0), axis=1)[:, None]  # 1 / U[k, k] is stored there
        if LIMIT > 0:
            c = tl.minimum(tl.maximum(c / step, -LIMIT), LIMIT) + 12582912.0 - 12582912.0
        z = tl.where(j == k, c, z - U * (c * step))
    return z


@jit(do_not_specialize=["items", "B"])
def omp_kernel(Y, D, D_half, scratch, sync, indices, coefficients, exponents, items, B,
               SIZE: tl.constexpr, N: tl.constexpr, M: tl.constexpr, S: tl.constexpr,
               S_PADDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
               ATOMS: tl.constexpr, TILE_BITS: tl.constexpr, SPLIT: tl.constexpr,
               LIMIT: tl.constexpr):
    """OMP of B vectors for each dictionary; an item of work is ROWS vectors of one of them."""
    TILES: tl.constexpr = N // ATOMS // SPLIT
    part, groups = tl.program_id(0) % SPLIT, tl.cdiv(B, ROWS)
    r, m, j = tl.arange(0, ROWS)[:, None], tl.arange(0, M)[None, :], tl.arange(0, S_PADDED)[None, :]
    residual = scratch + tl.program_id(0).to(tl.int64) * SIZE  # the scratch of this program
    basis = residual + ROWS * M
    triangle = basis + S * ROWS * M  # U of A = U^T Q, column k in row k; row S: Q y
    picks = triangle + (S + 1) * ROWS * S_PADDED
    for item in range(tl.program_id(0) // SPLIT, items, tl.num_programs(0) // SPLIT):
        dictionary, group = (item // groups).to(tl.int64), item % groups
        row, real = dictionary * B + group * ROWS + r, r < B - group * ROWS  # (ROWS, 1)
        tl.store(residual + r * M + m, tl.load(Y + row * M + m, mask=real, other=0.0))
        for k in range(S):
            # 1. The choice, agreed with the programs that sweep the other parts.
            tl.debug_barrier()
            value, pick = sweep(D_half + dictionary * N * M, tl.load(residual + r * M + m),
                                part * TILES, k % 2 == 1, TILES, TILE_BITS, ATOMS)  # (ROWS, 1)
            if SPLIT > 1:
                winner = sync + items + row * S + k
                tl.atomic_max(winner, value.to(tl.int64) << 32 | pick, mask=real)
                tl.debug_barrier()
                tl.atomic_add(sync + item, 1, sem="release")
                while tl.atomic_add(sync + item, 0, sem="acquire") < SPLIT * (k + 1):
                    pass
                winner = tl.load(winner, mask=real, other=0, cache_modifier=".cg")
                pick = (winner & 0xFFFFFFFF).to(tl.int32)
            tl.store(picks + r * S_PADDED + k, pick.to(tl.float32))  # exact: less than 2^24
            tl.debug_barrier()
            for b in range(ROWS // BLOCK):  # as many vectors at a time as registers hold
                a = b * BLOCK + tl.arange(0, BLOCK)[:, None]
                here, corner = a * M + m, a * S_PADDED
                # 2. Gram-Schmidt: what of the new atom is orthogonal to those chosen before. One
                # that adds no direction (it came again: nothing is left) gets the coefficient 0.
                # All that is needed soon is loaded now: the L2 cache is far.
                rest, ahead = tl.load(residual + here), tl.load(basis + here)
                new = tl.load(picks + corner + k).to(tl.int32)  # (BLOCK, 1)
                atom = tl.load(D + (dictionary * N + new) * M + m).to(tl.float32)  # (BLOCK, M)
                for i in range(k):
                    q, ahead = ahead, tl.load(basis + (i + 1) * ROWS * M + here)
                    p = tl.sum(atom * q, axis=1)[:, None]
                    atom -= p * q
                    tl.store(triangle + k * ROWS * S_PADDED + corner + i, p)
                norm2 = tl.sum(atom * atom, axis=1)[:, None]
                scale = tl.where(norm2 > 1e-8, 1 / tl.sqrt(tl.maximum(norm2, 1e-8)), 0.0)
                tl.store(triangle + k * ROWS * S_PADDED + corner + k, scale)  # 1 / U[k, k]
                # 3. The refit: take the new direction out of the residual.
                q = atom * scale
                tl.store(basis + k * ROWS * M + here, q)
                projection = tl.sum(rest * q, axis=1)[:, None]
                tl.store(residual + here, rest - projection * q)
                tl.store(triangle + S * ROWS * S_PADDED + corner + k, projection)
        tl.debug_barrier()
        # 4. The coefficients.
        z = tl.load(triangle + (S * ROWS + r) * S_PADDED + j, mask=j < S, other=0.0)
        c = substitute(z, triangle, r, j, 1.0, ROWS, S, S_PADDED, 0)
        if LIMIT > 0:
            e = tl.floor(16 * (tl.log2(tl.max(tl.abs(c), axis=1)[:, None] / LIMIT) + 8) + 0.5)
            e = tl.minimum(tl.maximum(e, 0.0), 255.0)  # (ROWS, 1)
            c = substitute(z, triangle, r, j, tl.exp2(e / 16 - 8), ROWS, S, S_PADDED, LIMIT)
            tl.store(exponents + row, e.to(tl.int64), mask=real)
        if part == 0:
            chosen = tl.load(picks + r * S_PADDED + j, mask=j < S, other=0.0).to(tl.int64)
            tl.store(indices + row * S + j, chosen, mask=real & (j < S))
            tl.store(coefficients + row * S + j, c.to(coefficients.dtype.element_ty),
                     mask=real & (j < S))


def fits(D, Y, sparsity):
    """Whether the kernels take D and Y (see omp)."""
    N, m = D.shape[-2:]
    return (on_gpu(D) and D.dtype in (torch.bfloat16, torch.float32) and Y.dtype != torch.float64
            and m in (64, 128) and N % ATOMS == 0 and N <= 2**15 and sparsity <= 32
            and Y.numel() > 0)


@functools.lru_cache(None)
def kernels_serve(device):
    """Whether this GPU can run our kernels; a line says why it cannot, once."""
    if os.environ.get("LEXICO_KERNELS") == "0":
        return False
    try:
        if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
            raise RuntimeError("the kernels need an NVIDIA GPU of compute capability 8.0")
        if triton is None:
            raise RuntimeError("Triton is not installed")
        torch.cuda._compile_kernel('extern "C" __global__ void nothing() {}', "nothing")
        return True
    except (AttributeError, RuntimeError, OSError) as error:
        print(f"no kernels here ({str(error).splitlines()[0]}): torch serves", file=sys.stderr)
        return False


def on_gpu(x):
    return x.is_cuda and kernels_serve(x.device)


def plan(D, B):
    """ROWS, BLOCK, processors, and options for the compiler.

    Few vectors wait for the memory and want tiles in flight; many feed the tensor cores and want
    three programs on a processor.
    """
    if not D.is_cuda:  # for Triton's interpreter
        return 16, 16, 1, {}
    rows, block = (16, 16) if B <= 32 else (32, 32) if B <= 128 else (64, 32)
    options = dict(num_warps=4, num_stages=4 if B <= 32 else 3)
    if B > 128:
        options["maxnreg"] = 168
    return rows, block, torch.cuda.get_device_properties(D.device).multi_processor_count, options


def omp_fused(D, Y, sparsity, bits=0):
    """pursue and solve for D (L, N, m) and Y (L, B, m) that fit, in one launch."""
    (L, N, m), B, padded = D.shape, Y.shape[1], triton.next_power_of_2(sparsity)
    rows, block, processors, options = plan(D, B)
    items, split = L * triton.cdiv(B, rows), 1
    tile_bits = triton.next_power_of_2(N // ATOMS) - 1
    while 2 * split * items <= processors and N % (2 * split * ATOMS) == 0:
        split *= 2
    # Numbers of scratch a program needs. 256 MB of it serve any number of vectors.
    size = rows * ((1 + sparsity) * m + (2 + sparsity) * padded)
    programs = min(items * split, 3 * processors, 2**26 // size)
    new = functools.partial(torch.empty, device=D.device)
    scratch = new(programs * size)
    # A counter for each item, and the winner of each choice.
    sync = new(items + L * B * sparsity if split > 1 else 1, dtype=torch.int64).zero_()
    indices = new(L, B, sparsity, dtype=torch.int64)
    coefficients = new(L, B, sparsity, dtype=torch.int64 if bits else torch.float32)
    exponents = new(L, B, 1, dtype=torch.int64)
    # The sweep multiplies in bf16. Triton's interpreter, on a CPU, cannot.
    D_half = (D.bfloat16() if D.is_cuda else D.float()).contiguous()
    omp_kernel[(programs,)](
        Y.float().contiguous(), D.contiguous(), D_half, scratch, sync, indices, coefficients,
        exponents, items, B, size, N, m, sparsity, padded, rows, block, ATOMS, tile_bits, split,
        2.0 ** (bits - 1) - 1 if bits else 0, **options)
    return (indices, coefficients, exponents) if bits else (indices, coefficients)


# --------------------------------------------------------------------------------------------------
# To compare with

def iht(D, Y, sparsity, steps=100):
    """Iterative hard thresholding (Blumensath, Davies 2008): z = H_s(z + (y - z D) D^T / ||D||^2).

    H_s keeps the s largest coefficients. D (N, m), Y (B, m); codes as for omp.
    """
    D, Y = D.float(), Y.float()
    rate = 1 / torch.linalg.matrix_norm(D, 2) ** 2
    Z = Y.new_zeros(Y.shape[0], D.shape[0])  # (B, N)
    for _ in range(steps):
        Z = Z + rate * (Y - Z @ D) @ D.T
        indices = Z.abs().topk(sparsity, dim=-1).indices
        Z = torch.zeros_like(Z).scatter_(-1, indices, Z.gather(-1, indices))
    return indices, Z.gather(-1, indices)


def lasso(D, Y, sparsity, penalty=0.1, steps=100):
    """Lasso by FISTA (Beck, Teboulle 2009), cut to the s largest coefficients.

    Minimises 1/2 ||y - z D||^2 + lambda ||z||_1, lambda = penalty max |<y, d_n>| for each vector.
    """
    D, Y = D.float(), Y.float()
    rate = 1 / torch.linalg.matrix_norm(D, 2) ** 2
    threshold = rate * penalty * (Y @ D.T).abs().amax(dim=-1, keepdim=True)  # (B, 1)
    Z = ahead = Y.new_zeros(Y.shape[0], D.shape[0])  # (B, N)
    t = 1.0
    for _ in range(steps):
        before, t_before = Z, t
        Z = ahead + rate * (Y - ahead @ D) @ D.T
        Z = Z.sign() * (Z.abs() - threshold).clamp(min=0)
        t = (1 + (1 + 4 * t**2) ** 0.5) / 2
        ahead = Z + (t_before - 1) / t * (Z - before)
    indices = Z.abs().topk(sparsity, dim=-1).indices
    return indices, Z.gather(-1, indices)


def relative_error(D, Y, indices, coefficients):
    """||y - z D|| / ||y|| of every vector, (..., B); 0 for zero vectors."""
    difference = Y - reconstruct(D, indices, coefficients).to(Y.dtype)
    return difference.norm(dim=-1) / Y.norm(dim=-1).clamp(min=1e-12)


def milliseconds(function, runs=9):
    """Median time of function(), after a warm-up; on a GPU as a CUDA graph, the device's time."""
    times = []
    function()
    if not torch.cuda.is_available():
        for _ in range(runs):
            start = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - start))
        return sorted(times)[runs // 2]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    for _ in range(2 * runs):  # the first half warms the clocks
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times[runs:])[runs // 2]


if __name__ == "__main__":  # the paper's comparison of coders, beam search added, on real vectors
    from safetensors.torch import load_file

    from model import Llama, Tokenizer, best_device, find_file

    class Record:
        """A cache that keeps one layer's vectors and lets attention pass."""

        position, kv = 0, {}

        def attend(self, layer, q, k, v):
            self.kv[layer] = {"keys": k.flatten(0, 2), "values": v.flatten(0, 2)}
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    device, layer = best_device(), 3
    model = Llama.from_pretrained("tiny", device, torch.float32)
    atoms = load_file(find_file("tiny", "dictionary.safetensors"))
    text = find_file("tiny", "held-out.txt").read_text(encoding="utf-8")
    tokens = Tokenizer.from_pretrained("tiny").encode(text[:2000])[:256]
    model(torch.tensor([tokens], device=device), Record())
    beams = {f"beam {W}": functools.partial(omp_beam, width=W) for W in (2, 4, 8)}
    coders = {"omp": omp, **beams, "iht": iht, "lasso": lasso}
    for kind in ("keys", "values"):
        D, Y = atoms[kind][layer].to(device, torch.float32), Record.kv[layer][kind]
        print(f"{len(Y)} {kind} of layer {layer}, N = {len(D)}, m = {D.shape[1]}, on {device}")
        print("          " + "".join(f"   s = {s:2d}: error    ms" for s in (4, 8, 16)))
        for name, coder in coders.items():
            row = f"  {name:8}"
            for s in (4, 8, 16):
                start = time.perf_counter()
                error = relative_error(D, Y, *coder(D, Y, s)).mean().item()  # waits for the device
                row += f"          {error:.3f} {(time.perf_counter() - start) * 1e3:5.0f}"
            print(row)

    # Random vectors in Llama-3.1-8B's shape: a decoded token of all layers, and a prompt of one.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    print("ms to code, m = 128, on", device)
    for L, B in ((64, 8), (1, 20_000)) if device.type == "cuda" else ((4, 8), (1, 1000)):
        for N, s in ((4096, 8), (4096, 16), (2048, 8)):
            D = F.normalize(torch.randn(L, N, 128, device=device), dim=-1).to(dtype)
            Y = torch.randn(L, B, 128, device=device)
            print(f"  {L:2d} x {B:5d} vectors, N = {N}, s = {s:2d}: "
                  f"fp8 {milliseconds(lambda: omp(D, Y, s)):8.3f}, "
                  f"word {milliseconds(lambda: omp_levels(D, Y, s, 17 - N.bit_length())):8.3f}")
