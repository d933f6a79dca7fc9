"""What the sparse cache promises: exact where it should be, small to the byte, never dense."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

import lexico
from lexico import KEYS, VALUES, Dictionaries, SparseCache
from model import Config, InputError, Llama
from omp import reconstruct

CONFIG = Config(vocab_size=200, dim=48, n_layers=3, n_heads=6, kv_heads=2, head_dim=16, ffn_dim=64,
                context=4096, tied=True)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Llama.random(CONFIG, "cpu")
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3) if parameter.dim() == 2 else None
    return model


def dictionaries(N=64, complete=False, scale=0.05):
    torch.manual_seed(1)
    m, L = CONFIG.head_dim, CONFIG.n_layers
    if complete:
        atoms = torch.linalg.qr(torch.randn(2, L, m, m))[0]
    else:
        atoms = F.normalize(torch.randn(2, L, N, m), dim=-1)
    return Dictionaries(atoms, torch.full((2, L), scale), CONFIG, model="test")


def run(model, cache, tokens, parts):
    return torch.cat([model(part, cache) for part in tokens.split(parts, dim=1)], dim=1)


@pytest.mark.parametrize("buffer, window", [(0, 1), (4, 1), (4, 3), (64, 1)])
def test_a_complete_basis_at_full_sparsity_equals_the_dense_cache(model, buffer, window):
    tokens = torch.randint(0, 200, (2, 40))
    d = dictionaries(complete=True)
    cache = SparseCache(CONFIG, d, 16, buffer, window, batch=2, coding="float32")
    logits = run(model, cache, tokens, [11, 9, *[1] * 10, 3, *[1] * 7])
    torch.testing.assert_close(logits, model(tokens), rtol=1e-4, atol=1e-4)
    waiting = cache.length - cache.coded
    assert cache.length == 40 and min(buffer, 40) <= waiting <= buffer + window


def test_prefill_attends_exactly_whatever_the_dictionary(model):
    tokens = torch.randint(0, 200, (1, 50))
    logits = model(tokens, SparseCache(CONFIG, dictionaries(), 2, 4))
    torch.testing.assert_close(logits, model(tokens), rtol=1e-4, atol=1e-4)


def test_attention_over_codes_equals_attention_over_the_reconstructed_keys_and_values(model):
    d, tokens = dictionaries(), torch.randint(0, 200, (2, 60))
    cache = SparseCache(CONFIG, d, 3, buffer=8, batch=2)
    run(model, cache, tokens[:, :55], [30, *[1] * 25])
    cache.compress()
    q, k, v = torch.randn(2, 6, 1, 16), torch.randn(2, 2, 1, 16), torch.randn(2, 2, 1, 16)
    dense = []
    for kind, new in ((KEYS, k), (VALUES, v)):  # the codes' vectors, then the ring's, then new
        indices, units = cache.codes.read(kind, 0, 0, cache.coded)
        old = reconstruct(d.atoms[kind, 0], indices.long(), units * d.scale[kind, 0])
        ring = cache.ring[kind, 0][:, :, torch.arange(cache.coded, cache.length) % 9]
        dense.append(torch.cat((old.view(2, 2, -1, 16), ring, new), dim=2))
    expected = F.scaled_dot_product_attention(q, *dense, enable_gqa=True)
    torch.testing.assert_close(cache.attend(0, q, k, v), expected, rtol=1e-4, atol=1e-5)


def test_queries_in_blocks_and_tokens_in_pieces_change_nothing(model, monkeypatch):
    tokens, logits = torch.randint(0, 200, (1, 60)), []
    for piece, rows in ((8192, 16), (7, 2)):
        monkeypatch.setattr(lexico, "PIECE", piece)
        monkeypatch.setattr(lexico, "ROWS", rows)
        logits.append(run(model, SparseCache(CONFIG, dictionaries(), 4, 4), tokens, [40, 1, 1, 18]))
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_memory_is_three_bytes_a_coefficient_and_counted_to_the_byte(model):
    d, sparsity, buffer = dictionaries(), 5, 8
    cache = SparseCache(CONFIG, d, sparsity, buffer, window=2, batch=2, capacity=80)
    run(model, cache, torch.randint(0, 200, (2, 70)), [50, *[1] * 20])
    vectors = 2 * CONFIG.n_layers * 2 * CONFIG.kv_heads  # a token's: kinds, layers, batch, heads
    counted = cache.nbytes()
    assert counted["codes"] == 3 * sparsity * vectors * cache.coded
    assert counted["buffer"] == (70 - cache.coded) * vectors * CONFIG.head_dim * 4
    assert counted["dense"] == 70 * vectors * CONFIG.head_dim * 2
    tensors = (*cache.codes.parts, cache.ring, d.atoms, d.scale)
    assert counted["allocated"] == sum(t.untyped_storage().nbytes() for t in tensors)
    assert cache.codes.parts[0].shape[4] == 72  # what was reserved did not have to grow


def test_decoding_codes_all_layers_keys_and_values_in_one_call(model, monkeypatch):
    calls, real = [], lexico.omp
    monkeypatch.setattr(lexico, "omp", lambda D, Y, *a: (calls.append(Y.shape), real(D, Y, *a))[1])
    cache = SparseCache(CONFIG, dictionaries(), 2, buffer=4, window=3)
    run(model, cache, torch.randint(0, 200, (1, 10)), [10])
    assert calls == [(2, 2 * 6, 16)] * CONFIG.n_layers  # the prompt: a layer at a time
    calls.clear()
    run(model, cache, torch.randint(0, 200, (1, 9)), 1)
    assert calls == [(2 * CONFIG.n_layers, 2 * 3, 16)] * 2  # then all at once, every third token


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
    m, N, tokens, sparsity = CONFIG.head_dim, 64, 3000, 1
    monkeypatch.setattr(lexico, "PIECE", 512)
    cache = SparseCache(CONFIG, dictionaries(N), sparsity, buffer=4)
    for layer in range(CONFIG.n_layers):
        cache.attend(layer, torch.randn(1, 6, tokens, m), *torch.randn(2, 1, 2, tokens, m))
    with Largest() as largest:
        for layer in range(CONFIG.n_layers):
            cache.attend(layer, torch.randn(1, 6, 1, m), *torch.randn(2, 1, 2, 1, m))
    # Scores, one for each token and query head, are the largest thing needed.
    scores = (tokens + 10) * CONFIG.n_heads
    assert 0 < largest.elements <= scores < 2 * tokens * m < 2 * tokens * N


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_scales_bring_large_and_small_vectors_into_fp8(size):
    d = dictionaries(scale=size / 64)
    cache = SparseCache(CONFIG, d, 8, buffer=0)
    k, v = size * torch.randn(2, 1, 2, 50, 16)
    cache.attend(0, torch.zeros(1, 6, 50, 16), k, v)
    for kind, x in ((KEYS, k), (VALUES, v)):
        indices, units = cache.codes.read(kind, 0, 0, 50)
        assert units.isfinite().all() and (units != 0).float().mean() > 0.99
        back = reconstruct(d.atoms[kind, 0], indices.long(), units * d.scale[kind, 0])
        assert (back.view_as(x) - x).norm() < 0.4 * x.norm()


def test_words_take_two_bytes_a_coefficient_and_one_a_vector_and_round_trip_as_well_as_fp8():
    d, x = dictionaries(N=64), torch.randn(2, 1, 2, 200, 16)
    caches = {coding: SparseCache(CONFIG, d, 4, 0, coding=coding) for coding in lexico.CODINGS}
    assert [c.codes.vector_bytes for c in caches.values()] == [12, 9, 24]
    error = {coding: (c.round_trip(1, x) - x).norm() / x.norm() for coding, c in caches.items()}
    assert error["float32"] < error["fp8"] < 1.02 * error["float32"]
    assert error["word"] < 1.01 * error["float32"]  # 10 bits for a level at N = 64
    big = dictionaries(N=4096)  # 4 bits a level, and still near what the support allows
    fine, coarse = (SparseCache(CONFIG, big, 4, 0, coding=c).round_trip(1, x) for c in (
        "float32", "word"))
    assert (coarse - x).norm() < 1.15 * (fine - x).norm()


def test_levels_are_the_best_on_their_lattice_one_at_a_time():
    D, Y = F.normalize(torch.randn(1, 128, 16), dim=-1), torch.randn(1, 30, 16)
    indices, z = lexico.omp(D, Y, 4)
    level, e = lexico.round_to_levels(D, Y, indices, z, 4)
    step = torch.exp2(e / 16 - 8)[..., None]
    assert level.abs().max() <= 7

    def error(level):
        return (Y[0] - reconstruct(D[0], indices[0], (level * step)[0])).norm(dim=-1)

    for j in range(4):
        for change in (-1, 1):
            moved = level.clone()
            moved[..., j] = (moved[..., j] + change).clamp(-7, 7)
            assert (error(moved) >= 0.98 * error(level)).all()


def test_coefficients_beyond_fp8_become_its_largest_number_not_nan():
    d = dictionaries(scale=1.0)
    cache = SparseCache(CONFIG, d, 1, buffer=0)
    k = 1e6 * torch.stack((d.atoms[KEYS, 0, :20], -d.atoms[KEYS, 0, :20]))[None]  # (1, 2, 20, m)
    cache.attend(0, torch.zeros(1, 6, 20, 16), k, k)
    assert cache.codes.read(KEYS, 0, 0, 20)[1].unique().tolist() == [-448, 448]


def test_beam_search_and_tolerance_reach_the_cache(model):
    tokens, errors = torch.randint(0, 200, (1, 60)), []
    for options in ({}, {"beam": 4}, {"tol": 0.9}):
        cache = SparseCache(CONFIG, dictionaries(), 4, buffer=0, coding="float32", **options)
        run(model, cache, tokens, [60])
        z = cache.codes.read(KEYS, 0, 0, 60)[1]
        assert ((z != 0).sum(-1).min() < 4) == ("tol" in options)
        x = torch.randn(2, 1, 2, 50, 16)
        errors.append((cache.round_trip(0, x) - x).norm().item())
    assert errors[1] < errors[0]


def test_dictionaries_come_back_as_they_were_saved(tmp_path):
    d = dictionaries()
    d.save(tmp_path / "d")
    back = Dictionaries.load(tmp_path / "d").check(CONFIG)
    torch.testing.assert_close(back.atoms, d.atoms.bfloat16().float())
    assert back.metadata == {"model": "test"} and torch.equal(back.scale, d.scale)
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_bad_dictionaries_are_refused_in_one_line(tmp_path):
    dictionaries().save(tmp_path / "good")
    data = (tmp_path / "good").read_bytes()
    (tmp_path / "cut").write_bytes(data[:-100])
    (tmp_path / "noise").write_bytes(np.random.bytes(1000))
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign")
    for name, words in (("cut", "damaged"), ("noise", "damaged"), ("foreign", "not a dictionary"),
                        ("absent", "does not exist")):
        with pytest.raises(InputError, match=words) as error:
            Dictionaries.load(tmp_path / name)
        assert "\n" not in str(error.value)
    other = Config(**{**vars(CONFIG), "n_layers": 2})
    with pytest.raises(InputError, match="n_layers"):
        Dictionaries.load(tmp_path / "good").check(other)
    for sparsity in (0, 17):
        with pytest.raises(InputError, match=f"sparsity {sparsity}"):
            SparseCache(CONFIG, dictionaries(), sparsity)
