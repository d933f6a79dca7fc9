"""What orthogonal matching pursuit and beam search promise, checked with numpy."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from omp import iht, lasso, omp, omp_beam, reconstruct, relative_error


def dictionary(N, m, seed=0, coherence=0.0):
    """Random unit-norm atoms (N, m); coherence moves them all towards one direction."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(1, m, generator=generator)
    return F.normalize(torch.randn(N, m, generator=generator) + coherence * common, dim=-1)


def beam(D, Y, sparsity):
    return omp_beam(D, Y, sparsity, width=4)


def fit(atoms, y):
    """Least squares in float64: the coefficients of y over all these atoms, and the residual."""
    atoms, y = np.asarray(atoms, "float64"), np.asarray(y, "float64")
    z = np.linalg.lstsq(atoms.T, y, rcond=None)[0]
    return z, y - z @ atoms


@pytest.mark.parametrize("N, m, sparsity, coherence", [
    (96, 32, 1, 0), (100, 24, 7, 0), (512, 64, 16, 0), (256, 32, 12, 1)])
def test_omp_equals_the_textbook_version(N, m, sparsity, coherence):
    D, Y = dictionary(N, m, coherence=coherence), torch.randn(20, m)
    for y, found, z in zip(Y, *omp(D, Y, sparsity)):
        chosen, residual = [], y.numpy()
        for _ in range(sparsity):  # a fresh least-squares problem at every step
            correlation = np.abs(D.double().numpy() @ residual)
            correlation[chosen] = -1
            chosen.append(int(correlation.argmax()))
            expected, residual = fit(D[chosen], y)
        assert found.tolist() == chosen
        np.testing.assert_allclose(z, expected, rtol=1e-3, atol=1e-4)
        assert (D[found] @ (y - z @ D[found])).abs().max() < 1e-4  # orthogonal to every atom


def test_sparse_signals_are_recovered_exactly():
    D, z = dictionary(128, 64), 1 + torch.rand(50, 3)
    support = torch.stack([torch.randperm(128)[:3] for _ in range(50)])
    codes = omp(D, reconstruct(D, support, z), 3)
    found, expected = (torch.zeros(50, 128).scatter(1, *code) for code in (codes, (support, z)))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_a_batch_of_dictionaries_equals_one_at_a_time_and_chunks_do_not_matter(monkeypatch):
    D, Y = torch.stack([dictionary(128, 16, seed) for seed in range(3)]), torch.randn(3, 30, 16)
    together = omp(D, Y, 5)
    monkeypatch.setattr("omp.CHUNK", 1000)
    for alone, *expected in zip((omp(*pair, 5) for pair in zip(D, Y)), *together):
        torch.testing.assert_close([*alone], expected)


@pytest.mark.parametrize("coder", [omp, beam])
def test_an_atom_is_never_chosen_twice_and_odd_input_stays_finite(coder):
    twice = dictionary(32, 16).repeat(2, 1)  # every atom is there twice
    low_rank = F.pad(dictionary(64, 3), (0, 13))
    Y = torch.cat((torch.zeros(2, 16), torch.randn(6, 16), 1e6 * torch.randn(2, 16), twice[:2]))
    for D in (twice, low_rank):
        indices, coefficients = coder(D, Y, 10)
        assert coefficients.isfinite().all() and (coefficients[:2] == 0).all()
        assert (indices.sort(-1).values.diff(dim=-1) > 0).all()
        for y, code in zip(Y, reconstruct(D, indices, coefficients)):  # no better than all atoms
            least = np.linalg.norm(fit(D, y)[1])
            assert (y - code).norm() + 1e-4 * (1 + y.norm()) > least


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


def test_an_orthonormal_basis_makes_all_coders_keep_the_largest_products():
    basis, Y = torch.linalg.qr(torch.randn(32, 32))[0], torch.randn(20, 32)
    largest = (Y @ basis.T).abs().topk(4).indices.sort(-1).values
    for coder in (omp, iht, lasso, beam):
        assert torch.equal(coder(basis, Y, 4)[0].sort(-1).values, largest)


def test_coders_rank_as_in_the_paper():
    D, Y = dictionary(512, 32), torch.randn(100, 32)
    best, greedy, *others = (relative_error(D, Y, *coder(D, Y, 8)).mean()
                             for coder in (beam, omp, lasso, iht))
    assert best < greedy < min(others)


@pytest.mark.parametrize("D, Y, sparsity", [
    ((8, 4), (3, 5), 2), ((8, 4), (1, 3, 4), 2), ((2, 8, 4), (3, 3, 4), 2),
    ((8, 4), (3, 4), 0), ((8, 4), (3, 4), 5)])
def test_shapes_and_sparsities_that_do_not_fit_are_refused(D, Y, sparsity):
    with pytest.raises(ValueError):
        omp(torch.randn(D), torch.randn(Y), sparsity)
