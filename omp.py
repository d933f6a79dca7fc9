"""Sparse coding: orthogonal matching pursuit, beam search over it, coefficients of few bits.

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

Whatever has the signature (D, Y, sparsity) -> indices, coefficients is a pursuit, and can take
omp's place in the cache of lexico.py. `python omp.py` compares greedy search with beams."""

import time

import torch
import torch.nn.functional as F

from kernels import omp_fused

CHUNK = 2**22  # correlations held at a time: 16 MB in float32, which a CPU's caches serve best

@torch.no_grad()
def omp(D, Y, sparsity, tol=None):
    """Code every vector of Y over dictionary D by orthogonal matching pursuit.

    D: (N, m) atoms of unit norm, or (L, N, m), a batch of dictionaries.
    Y: (V, m) vectors, or (L, V, m), each coded over the dictionary of its batch.
    tol: stop a vector once its relative error ||y - z D|| / ||y|| is at most tol (default: never).
    Returns indices (..., V, s) int64 and coefficients (..., V, s) in Y's dtype, float32 at least.
    A coefficient is 0 where none is needed: a zero vector, no residual left, tol met. Other atoms
    of a vector are distinct. Raises ValueError for what does not fit."""
    D3, Y3 = with_batch(D, Y, sparsity)
    found = omp_fused(D3, Y3, sparsity) if tol is None else None
    return unbatch(Y, found or sliced(lambda D, Y: solve(*pursue(D, Y, sparsity, tol)), D3, Y3))

@torch.no_grad()
def omp_beam(D, Y, sparsity, width):
    """OMP that keeps the `width` best partial supports of every vector instead of one.

    A step extends each support by its `width` best-correlated atoms, computes the exact error of
    every extension, merges equal supports (the same atoms in another order), and keeps the best.
    The greedy support always keeps its place, so the result is never worse than omp's; width 1 is
    omp, and with room for every support it is exhaustive search. The rest is as for omp."""
    if width < 1:
        raise ValueError(f"width {width} is not at least 1")
    if width == 1:
        return omp(D, Y, sparsity)
    D3, Y3 = with_batch(D, Y, sparsity)
    search = lambda D, Y: solve(*pursue(D, Y, sparsity, chosen=pursue_beam(D, Y, sparsity, width)))
    return unbatch(Y, sliced(search, D3, Y3, each=width**2))

@torch.no_grad()
def omp_levels(D, Y, sparsity, bits, pursuit=omp):
    """Coefficients of few bits for the atoms that a pursuit chooses: multiples of a step for each
    vector. A coefficient is level * 2^(e / 16 - 8), |level| < 2^(bits - 1), e in 0 .. 255.

    Returns indices and levels (..., V, s) and e (..., V, 1), int64."""
    D3, Y3 = with_batch(D, Y, sparsity)
    found = omp_fused(D3, Y3, sparsity, bits) if pursuit is omp else None
    chosen = []
    if pursuit is not omp:
        chosen.append(pursuit(D, Y, sparsity)[0].reshape(*Y3.shape[:2], sparsity))
    levels = lambda D, Y, chosen=None: solve(*pursue(D, Y, sparsity, chosen=chosen), bits=bits)
    return unbatch(Y, found or sliced(levels, D3, Y3, *chosen))

def one_by_one(pursuit):
    """Make a pursuit of one dictionary (N, m) and its vectors (V, m), both in float32, take a batch
    of them."""
    def many(D, Y, sparsity):
        found = [pursuit(d.float(), y.float(), sparsity) for d, y in zip(D, Y)]
        shapes, fits = [tuple(part.shape) for part in found[0]], (Y.shape[1], sparsity)
        if shapes != [fits, fits]:
            raise ValueError(f"the pursuit gave shapes {shapes}; its indices and its coefficients "
                             f"must be {fits}")
        return tuple(torch.stack(part) for part in zip(*found))
    return many

def with_batch(D, Y, sparsity):
    """D (L, N, m) and Y (L, V, m), L = 1 where they come without it, if they fit each other."""
    D3, Y3 = (x[None] if x.dim() == 2 else x for x in (D, Y))
    if D3.dim() != 3 or D.dim() != Y.dim() or D3.shape[::2] != Y3.shape[::2]:  # L, m
        raise ValueError(f"D {tuple(D.shape)} and Y {tuple(Y.shape)} do not fit: (N, m), (V, m) "
                         "or (L, N, m), (L, V, m)")
    most = min(D3.shape[1:])
    if not 1 <= sparsity <= most:
        raise ValueError(f"sparsity {sparsity} is not within 1 .. {most}, the lesser of N and m")
    return D3, Y3

def sliced(function, D, Y, *others, each=1):
    """function(D, Y, *others) in float32 at least, on slices along V of at most CHUNK correlations
    (four times that on a GPU), `each` times N a vector; its tuple of results (L, V, .)."""
    dtype, most = torch.promote_types(Y.dtype, torch.float32), CHUNK * (4 if Y.is_cuda else 1)
    D, size = D.to(dtype), max(1, most // (D.shape[0] * D.shape[1] * each))
    slices = zip(*(x.split(size, dim=1) for x in (Y.to(dtype), *others)))
    results = [function(D, *part) for part in slices]
    return tuple(torch.cat(result, dim=1) for result in zip(*results))

def unbatch(Y, found):
    """Results (L, V, .) in the shape of Y, with or without the batch of dictionaries."""
    return tuple(x.view(*Y.shape[:-1], x.shape[-1]) for x in found)

# ---- The searches, for D (L, N, m) and Y (L, V, m) -----------------------------------------------

def pursue(D, Y, sparsity, tol=None, chosen=None):
    """OMP: indices (L, V, s), and what gives their coefficients: U (L, V, s, s) and Qy (L, V, s).
    Q is the basis of the chosen atoms A = U^T Q, and Qy holds y's coordinates in it. chosen: the
    indices that another search has found: then only U and Qy are computed."""
    (L, V, m), s = Y.shape, sparsity
    indices = Y.new_zeros(L, V, s, dtype=torch.long) if chosen is None else chosen.long()
    Q, U, Qy = Y.new_zeros(L, V, s, m), Y.new_zeros(L, V, s, s), Y.new_zeros(L, V, s)
    residual, correlation = Y, Y.new_empty(L, V, D.shape[1])
    for k in range(s):
        if chosen is None:
            torch.bmm(residual, D.mT, out=correlation)  # (L, V, N)
            correlation.abs_().scatter_(-1, indices[..., :k], -1)  # an atom is chosen once
            indices[..., k] = argmax_rows(correlation)
        q, column = new_part(gather_atoms(D, indices[..., k:k + 1]), Q[..., :k, :])
        if tol is not None:
            goes_on = residual.norm(dim=-1, keepdim=True) > tol * Y.norm(dim=-1, keepdim=True)
            q = q * goes_on[..., None]  # an atom whose q is 0 has the coefficient 0
        Q[..., k:k + 1, :], U[..., :k + 1, k] = q, column[..., 0, :]
        Qy[..., k:k + 1] = (q @ residual[..., None])[..., 0]  # (L, V, 1), as <q, y>
        residual = residual - Qy[..., k:k + 1] * q[..., 0, :]
    return indices, U, Qy

def new_part(atoms, Q):
    """What of each atom (..., C, m) is new to a basis Q (..., k, m), at unit length (Gram-Schmidt):
    q (..., C, m), and the atom's coordinates in Q and q, a column of U (..., C, k + 1). q is 0 if
    the atom adds nothing: then its coefficient is 0."""
    products = atoms @ Q.mT  # (..., C, k)
    q = atoms - products @ Q
    norm = q.norm(dim=-1, keepdim=True)  # (..., C, 1)
    length = norm.clamp(min=1e-4)
    return q * torch.where(norm > 1e-4, 1 / length, 0), torch.cat((products, length), dim=-1)

def pursue_beam(D, Y, sparsity, width):
    """Beam search: indices (L, V, s) of the best support found."""
    def take(x, index):  # entries of x (L, V, beams or candidates, ...) by index (L, V, W)
        index = index.view(index.shape + (1,) * (x.dim() - 3))
        return x.gather(2, index.expand(*index.shape[:3], *x.shape[3:]))

    (L, N, m), V, W = D.shape, Y.shape[1], 1  # W beams now: one empty support, later up to width
    label = torch.randint(2**62, (N,), generator=torch.Generator().manual_seed(0)).to(Y.device)
    indices = torch.zeros(L, V, W, 0, dtype=torch.long, device=Y.device)
    Q, residual = Y.new_zeros(L, V, W, 0, m), Y[:, :, None]  # (L, V, W, k, m), (L, V, W, m)
    error = residual.square().sum(-1)  # (L, V, W); inf marks an unused beam
    for k in range(sparsity):
        # Candidates: the C best-correlated atoms of every beam, and what of each is new to it.
        correlation = (residual.flatten(1, 2) @ D.mT).unflatten(1, (V, W))  # (L, V, W, N)
        correlation.abs_().scatter_(-1, indices, -1)
        best = correlation.topk(min(width, N - k), dim=-1).indices  # (L, V, W, C)
        q, C = new_part(gather_atoms(D, best), Q)[0], best.shape[-1]  # (L, V, W, C, m)
        step = (q @ residual[..., None])[..., 0]  # (L, V, W, C)
        after = (error[..., None] - step.square()).flatten(2)  # (L, V, W C)

        # A support's key is the sum of its atoms' random labels, whatever their order. Candidate 0
        # extends the greedy beam by its greedy choice: never a duplicate, and always kept.
        key = (label[indices].sum(-1)[..., None] + label[best]).flatten(2)  # (L, V, W C)
        equal = key[..., :, None] == key[..., None, :]  # (L, V, W C, W C)
        after.masked_fill_(equal.tril(-1).any(dim=-1), torch.inf)
        rank = F.pad(after[..., 1:], (1, 0), value=-torch.inf)
        keep = rank.topk(min(width, W * C), dim=-1, largest=False).indices  # (L, V, W)
        W, parent = keep.shape[-1], keep // C
        q, step = take(q.flatten(2, 3), keep), take(step.flatten(2), keep)
        Q = torch.cat((take(Q, parent), q[..., None, :]), dim=-2)  # (L, V, W, k + 1, m)
        indices = torch.cat((take(indices, parent), take(best.flatten(2), keep)[..., None]), dim=-1)
        residual = take(residual, parent) - step[..., None] * q
        error = residual.square().sum(-1).masked_fill(take(after, keep).isinf(), torch.inf)
    return take(indices, error.argmin(dim=-1, keepdim=True))[:, :, 0]

def argmax_rows(x):
    """Index of the largest number of every row of x (L, V, N).

    In two steps, the best block of 64 and the best in it: on a CPU a plain maximum runs at full
    vector width, argmax does not, and it would cost as much as the product that x comes from."""
    if x.shape[-1] % 64 or x.numel() < 2**15:
        return x.argmax(dim=-1)
    blocks = x.unflatten(-1, (-1, 64))  # (L, V, N / 64, 64)
    block = blocks.amax(dim=-1).argmax(dim=-1)  # (L, V)
    first = torch.arange(0, x.numel() // 64, x.shape[-1] // 64, device=x.device).view_as(block)
    chosen = F.embedding(first + block, blocks.flatten(0, 2))  # (L, V, 64)
    return block * 64 + chosen.argmax(dim=-1)

# ---- Coefficients, and vectors again -------------------------------------------------------------

def solve(indices, U, Qy, bits=0):
    """From what pursue returns to coefficients, by back substitution of U z = Q y. Returns indices
    and coefficients (L, V, s), or with bits: indices, levels and e (see omp_levels).

    Levels are rounded on the way, from the last coefficient back, and each makes up for the
    rounding of those after it (Babai 1986, the nearest plane)."""
    z = torch.linalg.solve_triangular(U, Qy[..., None], upper=True)[..., 0]
    if not bits:
        return indices, z
    limit, level = 2 ** (bits - 1) - 1, torch.zeros_like(z)
    e = 16 * (torch.log2(z.abs().amax(dim=-1, keepdim=True) / limit) + 8)
    e = e.round().clamp(0, 255)  # (L, V, 1): the largest |z| is about `limit` steps
    U, Qy = U * torch.exp2(e / 16 - 8)[..., None], Qy.clone()  # for z counted in steps
    for k in reversed(range(z.shape[-1])):
        level[..., k] = (Qy[..., k] / U[..., k, k]).round().clamp(-limit, limit)
        Qy -= U[..., k] * level[..., k, None]
    return indices, level.long(), e.long()

def in_one_table(indices, N):
    """Indices (L, ...) of rows of L tables, N rows each, once these are one table of L N rows."""
    offset = torch.arange(0, N * len(indices), N, dtype=indices.dtype, device=indices.device)
    return indices + offset.view(-1, *[1] * (indices.dim() - 1))

def gather_atoms(D, indices):
    """Atoms (L, ..., m) of the dictionaries D (L, N, m) at indices (L, ...)."""
    return F.embedding(in_one_table(indices, D.shape[1]), D.flatten(0, 1))

def reconstruct(D, indices, coefficients):
    """Vectors z D, (..., V, m), of codes (..., V, s) over D (N, m) or (L, N, m)."""
    if D.dim() == 3:
        indices, D = in_one_table(indices, D.shape[1]), D.flatten(0, 1)
    out = F.embedding_bag(indices.flatten(0, -2), D, mode="sum",
                          per_sample_weights=coefficients.flatten(0, -2).to(D.dtype))
    return out.view(*indices.shape[:-1], D.shape[-1])

def relative_error(D, Y, indices, coefficients):
    """||y - z D|| / ||y|| of every vector, (..., V), float32 at least; 0 for zero vectors."""
    Y = Y.to(torch.promote_types(Y.dtype, torch.float32))
    norm = Y.norm(dim=-1)
    difference = (Y - reconstruct(D.to(Y.dtype), indices, coefficients)).norm(dim=-1)
    return torch.where(norm > 0, difference / norm, 0)

if __name__ == "__main__":
    D = F.normalize(torch.randn(1024, 64), dim=-1)
    Y = (torch.randn(500, 16, 1) * D[torch.randint(1024, (500, 16))]).sum(1)  # 16 atoms each
    print(f"500 vectors, N = 1024, m = 64, on {D.device}; a beam of width 1 is omp")
    for width in (1, 2, 4, 8):
        for s in (4, 8, 16):
            start = time.perf_counter()
            error = relative_error(D, Y, *omp_beam(D, Y, s, width)).mean()
            ms = 1e3 * (time.perf_counter() - start)
            print(f"width {width}   s = {s:2d}   error {error:.3f}   {ms:6.1f} ms")
