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

import torch
import torch.nn.functional as F

CHUNK = 2**24  # correlations held at a time: 64 MB in float32, whatever the number of vectors


def omp(D, Y, sparsity, tol=None):
    """Code every vector of Y over dictionary D by orthogonal matching pursuit.

    D: (N, m) atoms of unit norm, or (L, N, m), a batch of dictionaries.
    Y: (B, m) vectors, or (L, B, m), each coded over the dictionary of its batch.
    tol: stop a vector once its relative error ||y - z D|| / ||y|| is at most tol (default: never).
    Returns indices (..., B, s) int64, distinct in each vector, and coefficients (..., B, s) in Y's
    dtype, float32 at least. Coefficients that are not needed are 0: zero vectors, a residual that
    is used up, a vector that met tol. Raises ValueError for shapes or a sparsity that do not fit.
    """
    return over_chunks(pursue, D, Y, sparsity, 1, tol)


def omp_beam(D, Y, sparsity, width):
    """OMP that keeps the `width` best partial supports of every vector instead of one.

    A step extends each support by its `width` best-correlated atoms, computes the exact error of
    every extension, merges equal supports (the same atoms in another order), and keeps the best.
    The greedy support always keeps its place, so the result is never worse than omp's; width 1 is
    omp, and with room for every support it is exhaustive search. Arguments and results as for omp.
    """
    return over_chunks(pursue_beam, D, Y, sparsity, width**2, width)


@torch.no_grad()
def over_chunks(coder, D, Y, sparsity, cost, *arguments):
    """Check the arguments, bring them to (L, N, m) and (L, B, m), run coder over pieces of B."""
    if D.dim() not in (2, 3) or D.dim() != Y.dim() or D.shape[-1] != Y.shape[-1]:
        raise ValueError(f"D {tuple(D.shape)} and Y {tuple(Y.shape)} do not fit: (N, m), (B, m) "
                         "or (L, N, m), (L, B, m)")
    N, m = D.shape[-2:]
    if not 1 <= sparsity <= min(N, m):
        raise ValueError(f"sparsity {sparsity} is not within 1 .. {min(N, m)} (N = {N}, m = {m})")
    dtype = torch.promote_types(Y.dtype, torch.float32)
    D3 = D.to(dtype).reshape(-1, N, m).contiguous()
    Y3 = Y.to(dtype).reshape(-1, *Y.shape[-2:])
    if D3.shape[0] != Y3.shape[0]:
        raise ValueError(f"{D3.shape[0]} dictionaries for {Y3.shape[0]} batches of vectors")
    pieces = Y3.split(max(1, CHUNK // (D3.shape[0] * N * cost)), dim=1)
    parts = [coder(D3, piece, sparsity, *arguments) for piece in pieces]
    return tuple(torch.cat(part, dim=1).view(*Y.shape[:-1], -1) for part in zip(*parts))


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


def solve_upper(Q, atoms, Qy):
    """Coefficients (..., s) from basis and atoms (..., s, m) and projections Qy (..., s)."""
    U = (Q @ atoms.mT).triu()  # atoms = U^T Q
    diagonal = U.diagonal(dim1=-2, dim2=-1)
    diagonal.masked_fill_(diagonal == 0, 1)  # an atom that added nothing: its q and Qy are 0
    return torch.linalg.solve_triangular(U, Qy[..., None], upper=True)[..., 0]


def pursue(D, Y, sparsity, tol=None):
    """OMP for D (L, N, m) and Y (L, B, m): indices and coefficients (L, B, s)."""
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
    return indices, solve_upper(Q, gather_atoms(D, indices), Qy)


def pursue_beam(D, Y, sparsity, width):
    """Beam search for D (L, N, m) and Y (L, B, m): indices and coefficients (L, B, s)."""
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
    Q, Qy, indices = (take(x, first)[:, :, 0] for x in (Q, Qy, indices))
    return indices, solve_upper(Q, gather_atoms(D, indices), Qy)


def reconstruct(D, indices, coefficients):
    """Vectors z D, (..., B, m), of codes (..., B, s) over D (N, m) or (L, N, m)."""
    table = D.reshape(-1, D.shape[-1])  # (L N, m)
    if D.dim() == 3:
        first = torch.arange(D.shape[0], device=D.device) * D.shape[1]
        indices = indices + first[:, None, None]
    out = F.embedding_bag(indices.flatten(0, -2), table, mode="sum",
                          per_sample_weights=coefficients.flatten(0, -2).to(table.dtype))
    return out.view(*indices.shape[:-1], -1)


def omp_levels(D, Y, sparsity, bits, width=1):
    """OMP (or beam search) with coefficients of few bits: multiples of a step for each vector.

    A coefficient is level * 2^(e / 16 - 8) with |level| < 2^(bits - 1) and e in 0 .. 255.
    Returns indices and levels (..., B, s) and e (..., B, 1), int64.
    """
    return over_chunks(pursue_levels, D, Y, sparsity, width**2, bits, width)


def pursue_levels(D, Y, sparsity, bits, width):
    """omp_levels for D (L, N, m) and Y (L, B, m).

    Levels are found one at a time, all else fixed: the best for an atom rounds its part of what
    the others leave, and so corrects their rounding. Twice round; and where levels are coarse, once
    more, last atom first, each atom chosen anew (one may then come twice: its levels add up).
    """
    indices, z = pursue_beam(D, Y, sparsity, width) if width > 1 else pursue(D, Y, sparsity)
    limit = 2 ** (bits - 1) - 1
    e = 16 * (torch.log2(z.abs().amax(dim=-1, keepdim=True) / limit) + 8)  # the largest just fits
    e = e.ceil().clamp(0, 255)  # (L, B, 1)
    step = torch.exp2(e / 16 - 8)
    level, atoms = (z / step).round(), gather_atoms(D, indices)  # (L, B, s), (L, B, s, m)
    residual = Y - (level[..., None, :] * step[..., None] @ atoms)[..., 0, :]
    anew = [*reversed(range(sparsity))] if bits <= 4 else []
    for turn, j in enumerate([*range(sparsity)] * 2 + anew):
        residual = residual + level[..., j, None] * step * atoms[..., j, :]
        if turn >= 2 * sparsity:
            indices[..., j] = argmax_rows((residual @ D.mT).abs_())
            atoms[..., j, :] = gather_atoms(D, indices[..., j])
        atom = atoms[..., j, :]
        part = (residual * atom).sum(-1, keepdim=True) / (atom * atom).sum(-1, keepdim=True)
        new = (part / step).round().clamp(-limit, limit)  # (L, B, 1)
        residual, level[..., j] = residual - new * step * atom, new[..., 0]
    return indices, level.long(), e.long()


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


if __name__ == "__main__":  # the paper's comparison of coders, beam search added, on real vectors
    import time

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
    coders = {"omp": omp, "iht": iht, "lasso": lasso}
    coders.update({f"beam {W}": lambda *a, W=W: omp_beam(*a, width=W) for W in (2, 4, 8)})
    for kind in ("keys", "values"):
        D, Y = atoms[kind][layer].to(device, torch.float32), Record.kv[layer][kind]
        print(f"{len(Y)} {kind} of layer {layer}, N = {len(D)}, m = {D.shape[1]}, on {device}")
        print("          " + "".join(f"   s = {s:2d}: error    ms" for s in (4, 8, 16)))
        for name in ("omp", "beam 2", "beam 4", "beam 8", "iht", "lasso"):
            row = f"  {name:8}"
            for s in (4, 8, 16):
                start = time.perf_counter()
                codes = coders[name](D, Y, s)
                error = relative_error(D, Y, *codes).mean().item()  # waits for the device
                row += f"          {error:.3f} {(time.perf_counter() - start) * 1e3:5.0f}"
            print(row)
