"""What the sparse cache promises: exact where it should be, small to the byte, never dense."""

import pytest
import torch
import torch.nn.functional as F
from test_model import random_model
from torch.utils._python_dispatch import TorchDispatchMode

import lexico
from lexico import KEYS, VALUES, Dictionaries, SparseCache
from omp import omp, omp_levels, reconstruct, relative_error

MODEL = random_model(dim=48, n_layers=3, n_heads=6, head_dim=16, tied=True)
CONFIG = MODEL.config


def dictionaries(N=64, scale=0.05):
    torch.manual_seed(1)
    atoms = F.normalize(torch.randn(2, CONFIG.n_layers, N, CONFIG.head_dim), dim=-1)
    scales = scale * torch.linspace(0.5, 1.5, 2 * CONFIG.n_layers).view(2, -1)  # all different
    return Dictionaries(atoms, scales, CONFIG, model="test")


def sparse(sparsity, buffer, d=None, **options):
    return SparseCache(CONFIG, d or dictionaries(), sparsity, buffer, **options)


def run(cache, lengths, batch=1):
    """Random tokens and their logits, of a prompt and chunks of these lengths."""
    tokens = torch.randint(0, 200, (batch, sum(lengths)))
    return tokens, torch.cat([MODEL(part, cache) for part in tokens.split(lengths, dim=1)], dim=1)


@pytest.mark.parametrize("buffer, window", [(0, 1), (4, 1), (4, 3), (64, 1)])
def test_a_complete_basis_at_full_sparsity_equals_the_dense_cache(buffer, window):
    d = dictionaries(N=16)
    d.atoms = torch.linalg.qr(d.atoms)[0]
    cache = sparse(16, buffer, d, window=window, batch=2, coding="float32")
    tokens, logits = run(cache, [11, 9, *[1] * 10, 3, *[1] * 7], batch=2)
    torch.testing.assert_close(logits, MODEL(tokens), rtol=1e-3, atol=1e-3)
    waiting = cache.length - cache.coded
    assert cache.length == 40 and min(buffer, 40) <= waiting <= buffer + window


def test_prefill_attends_exactly_whatever_the_dictionary():
    tokens, logits = run(sparse(2, 4), [50])
    torch.testing.assert_close(logits, MODEL(tokens), rtol=1e-4, atol=1e-4)


def test_attention_over_codes_equals_attention_over_the_reconstructed_keys_and_values():
    d = dictionaries()
    cache = sparse(3, 8, d, batch=2)
    run(cache, [30, *[1] * 25], batch=2)
    cache.compress()
    q, new, dense = torch.randn(2, 6, 1, 16), torch.randn(2, 2, 2, 1, 16), []
    for kind in (KEYS, VALUES):  # the codes' vectors, then the ring's, then new
        (codes, row) = cache.place[kind, 0]
        indices, units = codes.read(row, 0, cache.coded)
        old = reconstruct(d.atoms[kind, 0], indices.long(), units * d.scale[kind, 0])
        ring = cache.ring[kind, 0][:, :, torch.arange(cache.coded, cache.length) % 9]
        dense.append(torch.cat((old.view(2, 2, -1, 16), ring, new[kind]), dim=2))
    expected = F.scaled_dot_product_attention(q, *dense, enable_gqa=True)
    torch.testing.assert_close(cache.attend(0, q, *new), expected, rtol=1e-4, atol=1e-5)


def test_queries_in_blocks_and_tokens_in_pieces_change_nothing(monkeypatch):
    logits = []
    for piece, rows in ((8192, 16), (7, 2)):
        monkeypatch.setattr(lexico, "PIECE", piece)
        monkeypatch.setattr(lexico, "ROWS", rows)
        logits.append(run(sparse(4, 4), [40, 1, 1, 18])[1])  # the same tokens: dictionaries() seeds
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_memory_is_three_bytes_a_coefficient_and_counted_to_the_byte():
    cache = sparse(5, 8, window=2, batch=2, capacity=80)
    run(cache, [50, *[1] * 20], batch=2)
    vectors = 2 * CONFIG.n_layers * 2 * CONFIG.kv_heads  # a token's: kinds, layers, batch, heads
    counted, d = cache.nbytes(), cache.dictionaries
    assert counted["codes"] == 3 * 5 * vectors * cache.coded
    assert counted["buffer"] == (70 - cache.coded) * vectors * CONFIG.head_dim * 4
    assert counted["dense"] == 70 * vectors * CONFIG.head_dim * 2
    [(_, codes)] = cache.groups
    tensors = (*codes.parts, cache.ring, d.atoms, d.scale)
    assert counted["allocated"] == sum(t.untyped_storage().nbytes() for t in tensors)
    assert codes.parts[0].shape[3] == 72  # what was reserved did not have to grow


def test_decoding_codes_all_layers_keys_and_values_in_one_call(monkeypatch):
    calls, real = [], lexico.omp_beam
    monkeypatch.setattr(lexico, "omp_beam",
                        lambda D, Y, *a: (calls.append(Y.shape), real(D, Y, *a))[1])
    run(sparse(2, buffer=4, window=3), [10, *[1] * 9])
    n = 2 * CONFIG.n_layers
    prompt, decoding = [(1, 2 * 6, 16)] * n, [(n, 2 * 3, 16)] * 2
    assert calls == prompt + decoding  # one at a time, then all at once, every third token


class Largest(TorchDispatchMode):
    """Watches every tensor that any operation makes: the largest number of elements."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and not func.is_view:
                self.elements = max(self.elements, tensor.numel())
        return out


def test_decoding_never_makes_a_dense_key_value_or_token_by_atom_matrix(monkeypatch):
    monkeypatch.setattr(lexico, "PIECE", 512)
    cache, tokens = sparse(1, buffer=4), 3000
    for T in (tokens, 1):
        with Largest() as largest:
            for layer in range(CONFIG.n_layers):
                cache.attend(layer, torch.randn(1, 6, T, 16), *torch.randn(2, 1, 2, T, 16))
    # Scores, one for each token and query head, are the largest thing that decoding needs.
    assert 0 < largest.elements <= (tokens + 10) * CONFIG.n_heads < 2 * tokens * CONFIG.head_dim


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_scales_bring_large_and_small_vectors_into_fp8(size):
    cache, x = sparse(8, 0, dictionaries(scale=size / 64)), size * torch.randn(2, 1, 2, 50, 16)
    assert (cache.round_trip(0, x) - x).norm() < 0.4 * x.norm()
    codes, row = cache.place[VALUES, 0]
    assert (codes.read(row, 0, 50)[1] != 0).float().mean() > 0.99


def test_coefficients_beyond_fp8_become_its_largest_number_not_nan():
    d = dictionaries(scale=1.0)
    atoms = d.atoms[:, :1, None, :20]  # (2, 1, 1, 20, m)
    x = torch.cat((1e6 * atoms, -1e6 * atoms), dim=2)
    largest = 448 * d.scale[:, 0].view(2, 1, 1, 1, 1)
    torch.testing.assert_close(sparse(1, 0, d).round_trip(0, x), largest * x / 1e6)


def test_words_take_two_bytes_a_coefficient_and_one_a_vector_and_round_trip_as_well_as_fp8():
    def error(coding, N, sizes={"fp8": 12, "word": 9, "float32": 24}):
        cache = sparse(4, 0, dictionaries(N), coding=coding)
        assert lexico.code_bytes(coding, 4) == sizes[coding]
        return (cache.round_trip(1, x) - x).norm()

    x = torch.randn(2, 1, 2, 200, 16)
    assert error("float32", 64) < error("fp8", 64) < 1.02 * error("float32", 64)
    assert error("word", 64) < 1.01 * error("float32", 64)  # 10 bits for a level
    assert error("word", 4096) < 1.15 * error("float32", 4096)  # 4 bits


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


def test_beam_search_reaches_the_cache():
    x = torch.randn(2, 1, 2, 50, 16)
    greedy, beam = ((sparse(4, 0, beam=width).round_trip(0, x) - x).norm() for width in (1, 4))
    assert beam < greedy


def test_dictionaries_come_back_as_they_were_saved(tmp_path):
    d = dictionaries()
    d.save(tmp_path / "d")
    back = Dictionaries.load(tmp_path / "d").check(CONFIG)
    torch.testing.assert_close(back.atoms, d.atoms.bfloat16().float())
    assert back.metadata == {"model": "test"} and torch.equal(back.scale, d.scale)
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_a_dictionary_learned_here_comes_before_the_model_s_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Dictionaries.find("tiny").parent.name == "tiny"
    dictionaries().save("tiny.dictionary.safetensors")
    assert Dictionaries.load(Dictionaries.find("tiny")).metadata == {"model": "test"}
