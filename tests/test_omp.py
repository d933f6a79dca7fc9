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


def numpy_omp(D, y, sparsity):
    """The textbook: a fresh least-squares problem at every step."""
    D, y, chosen, residual = D.double().numpy(), y.double().numpy(), [], y.double().numpy()
    for _ in range(sparsity):
        correlation = np.abs(D @ residual)
        correlation[chosen] = -1
        chosen.append(int(correlation.argmax()))
        z = np.linalg.lstsq(D[chosen].T, y, rcond=None)[0]
        residual = y - z @ D[chosen]
    return chosen, z


def best_support(D, y, sparsity):
    """The least error that any `sparsity` atoms reach, by trying them all."""
    D, y = D.double().numpy(), y.double().numpy()
    return min(np.linalg.norm(y - np.linalg.lstsq(D[list(c)].T, y, rcond=None)[0] @ D[list(c)])
               for c in itertools.combinations(range(len(D)), sparsity))


@pytest.mark.parametrize("N, m, sparsity", [(96, 32, 1), (100, 24, 7), (512, 64, 16)])
def test_omp_equals_the_textbook_version(N, m, sparsity):
    D, Y = dictionary(N, m), torch.randn(20, m)
    indices, coefficients = omp(D, Y, sparsity)
    for y, found, z in zip(Y, indices.tolist(), coefficients):
        chosen, expected = numpy_omp(D, y, sparsity)
        assert found == chosen
        np.testing.assert_allclose(z.numpy(), expected, rtol=1e-3, atol=1e-4)


def test_sparse_signals_are_recovered_exactly():
    D = dictionary(128, 64)
    support = torch.stack([torch.randperm(128)[:3] for _ in range(50)])
    z = 1 + torch.rand(50, 3)
    indices, coefficients = omp(D, reconstruct(D, support, z), 3)
    found = torch.zeros(50, 128).scatter(1, indices, coefficients)
    expected = torch.zeros(50, 128).scatter(1, support, z)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_residual_is_orthogonal_to_chosen_atoms():
    D, Y = dictionary(256, 32, coherence=1.0), torch.randn(40, 32)
    indices, coefficients = omp(D, Y, 12)
    residual = (Y - reconstruct(D, indices, coefficients)).double()
    inner = torch.einsum("bm,bsm->bs", residual, D[indices].double())
    assert inner.abs().max() < 1e-4


def test_error_never_rises_with_sparsity():
    D, Y = dictionary(256, 32), torch.randn(64, 32)
    errors = torch.stack([relative_error(D, Y, *omp(D, Y, s)) for s in range(1, 17)])
    assert (errors.diff(dim=0) <= 1e-5).all()


def test_a_batch_of_dictionaries_equals_one_at_a_time_and_chunks_do_not_matter(monkeypatch):
    D, Y = torch.stack([dictionary(128, 16, seed) for seed in range(3)]), torch.randn(3, 30, 16)
    together = omp(D, Y, 5)
    monkeypatch.setattr("omp.CHUNK", 1000)
    for i in range(3):
        for got, expected in zip(omp(D[i], Y[i], 5), together):
            torch.testing.assert_close(got, expected[i])


def test_an_atom_is_never_chosen_twice_and_odd_input_stays_finite():
    D = dictionary(64, 16)
    D[32:] = D[:32]  # every atom twice
    low_rank = F.normalize(torch.cat((torch.randn(64, 3), torch.zeros(64, 13)), 1), dim=-1)
    Y = torch.cat((torch.zeros(2, 16), torch.randn(6, 16), 1e6 * torch.randn(2, 16), D[:2]))
    for atoms, coder in itertools.product((D, low_rank), (omp, lambda *a: omp_beam(*a, width=3))):
        indices, coefficients = coder(atoms, Y, 10)
        assert coefficients.isfinite().all()
        assert (indices.sort(-1).values.diff(dim=-1) > 0).all()
        assert (coefficients[:2] == 0).all()
        best = np.linalg.lstsq(atoms.T.double().numpy(), Y.T.double().numpy(), rcond=None)[0].T
        least = np.linalg.norm(Y.double().numpy() - best @ atoms.double().numpy(), axis=-1)
        error = (Y - reconstruct(atoms, indices, coefficients)).norm(dim=-1)
        assert (error + 1e-4 * (1 + Y.norm(dim=-1)) > torch.tensor(least)).all()


def test_tolerance_stops_a_vector_as_soon_as_it_is_met():
    D, Y = dictionary(256, 32), torch.randn(50, 32)
    indices, coefficients = omp(D, Y, 20, tol=0.5)
    for count, y in zip((coefficients != 0).sum(-1).tolist(), Y):
        errors = [relative_error(D, y[None], *omp(D, y[None], s)) for s in (count - 1, count)]
        assert errors[1] <= 0.5 < errors[0]


def test_beam_is_never_worse_than_greedy_and_width_one_is_greedy():
    D, Y = dictionary(256, 32, coherence=1.0), torch.randn(100, 32)
    greedy = relative_error(D, Y, *omp(D, Y, 6))
    before = greedy.mean()
    for width in (1, 2, 4, 8):
        errors = relative_error(D, Y, *omp_beam(D, Y, 6, width))
        assert (errors <= greedy + 1e-5).all()
        assert errors.mean() < before if width > 1 else torch.allclose(errors, greedy, atol=1e-5)
        before = errors.mean()


def test_a_beam_with_room_for_everything_is_exhaustive_search():
    D, Y = dictionary(9, 6, coherence=0.5), torch.randn(8, 6)
    indices, coefficients = omp_beam(D, Y, 3, width=84)  # 9 choose 3
    errors = (Y - reconstruct(D, indices, coefficients)).norm(dim=-1)
    expected = [best_support(D, y, 3) for y in Y]
    np.testing.assert_allclose(errors.numpy(), expected, rtol=1e-4)


def test_an_orthonormal_basis_makes_all_coders_keep_the_largest_products():
    basis, Y = torch.linalg.qr(torch.randn(32, 32))[0], torch.randn(20, 32)
    largest = (Y @ basis.T).abs().topk(4).indices.sort(-1).values
    for coder in (omp, iht, lasso, lambda *a: omp_beam(*a, width=2)):
        assert torch.equal(coder(basis, Y, 4)[0].sort(-1).values, largest)


def test_coders_rank_as_in_the_paper():
    D, Y = dictionary(512, 32), torch.randn(100, 32)
    beam, greedy, soft, hard = (relative_error(D, Y, *coder(D, Y, 8)).mean() for coder in (
        lambda *a: omp_beam(*a, width=4), omp, lasso, iht))
    assert beam < greedy < min(soft, hard)


@pytest.mark.parametrize("D, Y, sparsity", [((8, 4), (3, 5), 2), ((8, 4), (1, 3, 4), 2),
                                            ((2, 8, 4), (3, 3, 4), 2), ((8, 4), (3, 4), 0),
                                            ((8, 4), (3, 4), 5)])
def test_shapes_and_sparsities_that_do_not_fit_are_refused(D, Y, sparsity):
    with pytest.raises(ValueError):
        omp(torch.randn(D), torch.randn(Y), sparsity)
