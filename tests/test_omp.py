"""What orthogonal matching pursuit, beam search and levels promise, checked with numpy."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from omp import omp, omp_beam, omp_levels, reconstruct, relative_error

BEAM = partial(omp_beam, width=4)

@pytest.fixture(autouse=True, params=[2**24, 1000])
def chunk(request, monkeypatch):
    """All holds with every vector at once, and with a few at a time."""
    monkeypatch.setattr("omp.CHUNK", request.param)

def dictionary(N, m, seed=0, coherence=0.0):
    """Random unit-norm atoms (N, m); coherence moves them all towards one direction."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(1, m, generator=generator)
    return F.normalize(torch.randn(N, m, generator=generator) + coherence * common, dim=-1)

def strongest(D, Y, sparsity):
    """A pursuit of one's own: the atoms that correlate best, without a look at each other."""
    indices = (Y @ D.T).abs().topk(sparsity).indices
    return indices, (Y @ D.T).gather(-1, indices)

def fit(atoms, y):
    """Least squares in float64: the coefficients of y over all these atoms, and the residual."""
    atoms, y = np.asarray(atoms, "float64"), np.asarray(y, "float64")
    z = np.linalg.lstsq(atoms.T, y, rcond=None)[0]
    return z, y - z @ atoms

@pytest.mark.parametrize("N, m, sparsity, coherence", [
    (96, 32, 1, 0), (100, 24, 7, 0), (512, 64, 16, 0), (256, 32, 12, 1)])
def test_omp_equals_the_textbook_version_for_many_dictionaries_at_once(N, m, sparsity, coherence):
    many = torch.stack([dictionary(N, m, seed, coherence) for seed in range(3)])
    Y = torch.randn(3, 30, m)
    for D, *codes in zip(many, Y, *omp(many, Y, sparsity)):
        for y, found, z in zip(*codes):
            chosen, residual = [], y.numpy()
            for _ in range(sparsity):  # a fresh least-squares problem at every step
                correlation = np.abs(D.double().numpy() @ residual)
                correlation[chosen] = -1
                chosen.append(int(correlation.argmax()))
                expected, residual = fit(D[chosen], y)
            assert found.tolist() == chosen
            np.testing.assert_allclose(z, expected, rtol=1e-3, atol=1e-4)

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

@pytest.mark.parametrize("coder", [omp, BEAM])
def test_of_an_orthonormal_basis_the_largest_products_are_kept(coder):
    basis, Y = torch.linalg.qr(torch.randn(32, 32))[0], torch.randn(100, 32)
    assert torch.equal(coder(basis, Y, 4)[0].sort().values, strongest(basis, Y, 4)[0].sort().values)

def test_error_never_rises_with_sparsity_and_tolerance_stops_as_soon_as_it_is_met():
    D, Y = dictionary(256, 32), torch.randn(64, 32)
    errors = torch.stack([relative_error(D, Y, *omp(D, Y, s)) for s in range(1, 21)])
    assert (errors.diff(dim=0) <= 1e-5).all()
    used = (omp(D, Y, 20, tol=0.5)[1] != 0).sum(-1)
    assert torch.equal(used, 1 + (errors > 0.5).sum(0))

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

def test_levels_are_nearly_the_best_of_their_lattice_and_better_than_rounded_coefficients():
    D, Y = F.normalize(torch.randn(64, 16) + 0.4, dim=-1), torch.randn(200, 16)
    indices, level, e = omp_levels(D, Y, 3, bits=4)
    every = torch.cartesian_prod(*[torch.arange(-7, 8)] * 3) * torch.exp2(e / 16 - 8)[..., None]
    best = (Y[:, None] - every @ D[indices]).norm(dim=-1).amin(dim=-1)
    error = relative_error(D, Y, indices, level * torch.exp2(e / 16 - 8)) * Y.norm(dim=-1)
    assert (error >= best - 1e-5).all() and error.mean() < 1.001 * best.mean()
    indices, level, e = omp_levels(D, Y, 10, bits=4)
    step = torch.exp2(e / 16 - 8)
    rounded = (omp(D, Y, 10)[1] / step).round().clamp(-7, 7)
    error, apart = (relative_error(D, Y, indices, x * step).mean() for x in (level, rounded))
    assert error < 0.99 * apart

def test_levels_are_found_for_the_atoms_of_any_pursuit():
    D, Y = dictionary(64, 16), 16 * torch.randn(20, 16)
    indices, level, e = omp_levels(D, Y, 5, bits=12, pursuit=strongest)
    error = (Y - reconstruct(D, indices, level * torch.exp2(e / 16 - 8))).norm(dim=-1)
    least = [np.linalg.norm(fit(D[chosen], y)[1]) for chosen, y in zip(strongest(D, Y, 5)[0], Y)]
    assert (error < 1.01 * torch.tensor(least)).all()  # 12 bits are nearly as good as all

@pytest.mark.parametrize("D, Y, sparsity", [
    ((8, 4), (3, 5), 2), ((8, 4), (1, 3, 4), 2), ((2, 8, 4), (3, 3, 4), 2),
    ((8, 4), (3, 4), 0), ((8, 4), (3, 4), 5)])
def test_shapes_and_sparsities_that_do_not_fit_are_refused(D, Y, sparsity):
    for coder in (omp, BEAM, partial(omp_levels, bits=4)):
        with pytest.raises(ValueError):
            coder(torch.randn(D), torch.randn(Y), sparsity)
    with pytest.raises(ValueError, match="width 0"):
        omp_beam(dictionary(8, 4), torch.randn(3, 4), 2, width=0)
    assert [len(part) for part in omp(dictionary(8, 4), torch.empty(0, 4), 2)] == [0, 0]
