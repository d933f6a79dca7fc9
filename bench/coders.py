"""Coders compared at equal sparsity, as in the paper: orthogonal matching pursuit, beams, and two
methods of another kind, on keys and values of the embedded model.

Iterative hard thresholding and the Lasso are judged by the atoms that they choose: their own
coefficients are shrunk, or not converged, so both end with a least-squares refit on their support.
Both are pursuits (D, Y, sparsity) -> indices, coefficients:

    python bench/coders.py
    python generate.py --pursuit bench/coders.py:iht"""

import functools
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from lexico import Dictionaries
from model import Llama, Tokenizer, best_device, find_folder
from omp import omp, omp_beam, relative_error
from train_dict import Parser, run_program, vectors

def iht(D, Y, sparsity, steps=100, refit=True):
    """Iterative hard thresholding (Blumensath, Davies 2008): z = H_s(z + (y - z D) D^T / ||D||^2).

    H_s keeps the s largest coefficients. D (N, m), Y (V, m). Codes are as for omp."""
    D, Y = D.float(), Y.float()
    rate = 1 / torch.linalg.matrix_norm(D, 2) ** 2
    Z = Y.new_zeros(Y.shape[0], D.shape[0])  # (V, N)
    for _ in range(steps):
        Z = Z + rate * (Y - Z @ D) @ D.T
        Z = torch.zeros_like(Z).scatter_(-1, *largest(D, Y, Z, sparsity, refit=False))
    return largest(D, Y, Z, sparsity, refit)

def lasso(D, Y, sparsity, penalty=0.1, steps=100, refit=True):
    """Lasso by FISTA (Beck, Teboulle 2009), cut to the s largest coefficients.

    Minimises 1/2 ||y - z D||^2 + lambda ||z||_1, with lambda = penalty max |<y, d_n>|."""
    D, Y = D.float(), Y.float()
    rate = 1 / torch.linalg.matrix_norm(D, 2) ** 2
    threshold = rate * penalty * (Y @ D.T).abs().amax(dim=-1, keepdim=True)  # (V, 1)
    Z = ahead = Y.new_zeros(Y.shape[0], D.shape[0])  # (V, N)
    t = 1.0
    for _ in range(steps):
        before, t_before = Z, t
        Z = ahead + rate * (Y - ahead @ D) @ D.T
        Z = Z.sign() * (Z.abs() - threshold).clamp(min=0)
        t = (1 + (1 + 4 * t**2) ** 0.5) / 2
        ahead = Z + (t_before - 1) / t * (Z - before)
    return largest(D, Y, Z, sparsity, refit)

def largest(D, Y, Z, sparsity, refit):
    """Indices and coefficients (V, s) of the largest in Z (V, N), or of a least-squares refit."""
    indices = Z.abs().topk(sparsity, dim=-1).indices
    if refit:
        return indices, torch.linalg.lstsq(D[indices].mT, Y[..., None]).solution[..., 0]
    return indices, Z.gather(-1, indices)

def main():
    Parser(description=__doc__.partition(":")[0]).parse_args()
    device, layer = best_device(), 3
    model = Llama.from_pretrained("tiny", device, torch.float32)
    dictionaries = Dictionaries.load(Dictionaries.find("tiny"), device)
    text = (find_folder("tiny") / "held-out.txt").read_text(encoding="utf-8")
    tokens = Tokenizer.from_pretrained("tiny").encode(text[:2000])[:256]
    X = vectors(model, torch.tensor([tokens], device=device)).unflatten(0, (2, -1))[:, layer]
    raw = {f"{coder.__name__} raw": functools.partial(coder, refit=False) for coder in (iht, lasso)}
    beams = {f"beam {W}": functools.partial(omp_beam, width=W) for W in (2, 4, 8)}
    for kind, D, Y in zip(("keys", "values"), dictionaries.atoms[:, layer], X):
        print(f"{len(Y)} {kind} of layer {layer}, N = {len(D)}, m = {D.shape[1]}, on {device}")
        print(" " * 11 + "".join(f"   s = {s:2d}: error    ms" for s in (4, 8, 16)))
        for name, coder in {"omp": omp, **beams, "iht": iht, "lasso": lasso, **raw}.items():
            row = f"  {name:9}"
            for s in (4, 8, 16):
                start = time.perf_counter()
                error = relative_error(D, Y, *coder(D, Y, s)).mean().item()  # waits for the device
                row += f"          {error:.3f} {(time.perf_counter() - start) * 1e3:5.0f}"
            print(row)

if __name__ == "__main__":
    run_program(main)
