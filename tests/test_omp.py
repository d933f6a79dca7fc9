"""What orthogonal matching pursuit, beam search and levels promise, checked with numpy."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SHAPES

from omp import omp, omp_beam, omp_levels, reconstruct, relative_error

BEAM = partial(omp_beam, width=4)

@pytest.fixture(autouse=True, params=[2**24, 1000])
def chunk(request, monkeypatch):
    """All holds with every vector at once, and with a few at a time."""
    monkeypatch.setattr("omp.CHUNK", request.param)
    torch.manual_seed(0)

def dictionary(N, m, coherence=0.0):
    """Random unit-norm atoms (N, m); coherence moves them all towards one direction."""
    return F.normalize(torch.randn(N, m) + coherence * torch.randn(1, m), dim=-1)

def fit(atoms, y):
    """Least squares in float64: the coefficients of y over all these atoms, and the residual."""
    atoms, y = np.asarray(atoms, "float64"), np.asarray(y, "float64")
    z = np.linalg.lstsq(atoms.T, y, rcond=None)[0]
    return z, y - z @ atoms

@pytest.mark.parametrize("N, m, sparsity, coherence, tol", SHAPES["omp"])
def test_omp_equals_the_textbook_version_for_many_dictionaries(N, m, sparsity, coherence, tol):
    many, Y = torch.stack([dictionary(N, m, coherence) for _ in range(3)]), torch.randn(3, 30, m)
    for D, *codes in zip(many, Y, *omp(many, Y, sparsity, tol)):
        for y, found, z in zip(*codes):
            chosen, expected, residual, enough = [], [], y.numpy(), (tol or 0) * y.norm()
            while len(chosen) < sparsity and np.linalg.norm(residual) > enough:
                correlations = np.abs(D.double().numpy() @ residual)
                correlations[chosen] = -1
                chosen.append(int(correlations.argmax()))
                expected, residual = fit(D[chosen], y)  # a fresh least-squares problem a step
            k = len(chosen)
            assert found[:k].tolist() == chosen and (z[k:] == 0).all()
            np.testing.assert_allclose(z[:k], expected, rtol=1e-3, atol=1e-4)

@pytest.mark.parametrize("coder", [omp, BEAM])
def test_an_atom_is_never_chosen_twice_and_odd_input_stays_finite(coder):
    twice = dictionary(32, 16).repeat(2, 1)  # every atom is there twice
    low_rank = F.pad(dictionary(64, 3), (0, 13))
    Y = torch.cat((torch.zeros(2, 16), torch.randn(6, 16), 1e6 * torch.randn(2, 16), twice[:2]))
    for D in (twice, low_rank):
        indices, coefficients = coder(D, Y, 10)
        assert coefficients.isfinite().all() and (coefficients[:2] == 0).all()
        assert (indices.sort(-1).values.diff(dim=-1) > 0).all()
        assert (relative_error(D, Y, indices, coefficients) < 1 + 1e-5).all()
        assert ((coefficients != 0).sum(-1) <= torch.linalg.matrix_rank(D)).all()  # no idle ones
        zero = relative_error(D, Y[:2].half(), indices[:2], coefficients[:2])
        assert (zero == 0).all() and omp_levels(D, Y[:0], 10, 4, coder)[1].shape == (0, 10)

def test_beam_is_never_worse_than_greedy_and_width_one_is_greedy():
    D, Y = dictionary(256, 32, coherence=1.0), torch.randn(100, 32)
    greedy = relative_error(D, Y, *omp(D, Y, 6))
    one, *wider = (relative_error(D, Y, *omp_beam(D, Y, 6, width)) for width in (1, 2, 4, 8))
    torch.testing.assert_close(one, greedy, atol=1e-5, rtol=0)
    for narrow, wide in itertools.pairwise((greedy, *wider)):
        assert (wide <= greedy + 1e-5).all() and wide.mean() < narrow.mean()

def test_a_beam_with_room_for_everything_is_exhaustive_search():
    D, Y = dictionary(9, 6, coherence=0.5), torch.randn(30, 6)
    found = reconstruct(D, *omp_beam(D, Y, 4, width=84))  # all 9 choose 3 triples, each once
    supports = [list(support) for support in itertools.combinations(range(9), 4)]
    expected = [min(np.linalg.norm(fit(D[support], y)[1]) for support in supports) for y in Y]
    np.testing.assert_allclose((Y - found).norm(dim=-1), expected, rtol=1e-4)

@pytest.mark.parametrize("sparsity", [3, 10])
def test_levels_are_nearly_the_best_of_their_lattice_and_better_than_rounded(sparsity):
    D, Y = F.normalize(torch.randn(64, 16) + 0.4, dim=-1), torch.randn(200, 16)
    indices, level, e = omp_levels(D, Y, sparsity, bits=4)
    step = torch.exp2(e / 16 - 8)
    rounded = (omp(D, Y, sparsity)[1] / step).round().clamp(-7, 7)
    error, apart = ((Y - reconstruct(D, indices, x * step)).norm(dim=-1) for x in (level, rounded))
    assert level.abs().max() <= 7 and error.mean() < (0.99 if sparsity == 10 else 1) * apart.mean()
    if sparsity == 3:
        every = torch.cartesian_prod(*[torch.arange(-7, 8)] * 3) * step[..., None]
        best = (Y[:, None] - every @ D[indices]).norm(dim=-1).amin(dim=-1)
        assert (error >= best - 1e-5).all() and error.mean() < 1.001 * best.mean()

@pytest.mark.parametrize("D, Y, sparsity", SHAPES["omp refuses"])
def test_shapes_and_sparsities_that_do_not_fit_are_refused(D, Y, sparsity):
    for coder in (omp, BEAM, partial(omp_levels, bits=4)):
        with pytest.raises(ValueError):
            coder(torch.randn(D), torch.randn(Y), sparsity)
    with pytest.raises(ValueError, match="width 0"):
        omp_beam(dictionary(8, 4), torch.randn(3, 4), 2, width=0)
    assert [len(part) for part in omp(dictionary(8, 4), torch.empty(0, 4), 2)] == [0, 0]
