"""What the sparse cache promises: exact where it should be, small to the byte, never dense."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from test_model import NAN, random_model, says
from test_omp import strongest
from torch.utils._python_dispatch import TorchDispatchMode

import lexico
from lexico import KEYS, VALUES, DenseCache, Dictionaries, FP8Codes, SparseCache, shape_of
from omp import omp, omp_beam, reconstruct

MODEL = random_model(dim=48, n_layers=3, n_heads=6, head_dim=16, tied=True)
CONFIG = MODEL.config

def dictionaries(N=64, scale=0.05, heads=1):
    torch.manual_seed(1)
    atoms = F.normalize(torch.randn(2, CONFIG.n_layers, N, heads * CONFIG.head_dim), dim=-1)
    scales = scale * torch.linspace(0.5, 1.5, 2 * CONFIG.n_layers).view(2, -1)  # all different
    return Dictionaries(atoms, scales, shape_of(CONFIG), model="test")

def sparse(sparsity, buffer, d=None, window=1, coding="fp8", **options):
    return SparseCache(CONFIG, d or dictionaries(), sparsity, buffer, window, coding=coding, **options)

def run(cache, lengths, batch=1):
    """Random tokens and their logits, of a prompt and chunks of these lengths."""
    tokens = torch.randint(0, 200, (batch, sum(lengths)))
    return tokens, torch.cat([MODEL(part, cache) for part in tokens.split(lengths, dim=1)], dim=1)

def feed(cache, layer, q, k, v):
    """One layer's attention, as the network asks for it."""
    cache.begin(q.shape[2])
    out = cache.attend(layer, q, k, v)
    cache.end(q.shape[2])
    return out

def round_trip(cache, x):
    """What codes give back of keys and values x (2, B, H, T, m) of layer 1, in a cache without a
    buffer; and the codes, indices and coefficients in units of the scale."""
    feed(cache, 1, torch.zeros(len(x[0]), CONFIG.n_heads, *x.shape[3:]), *x)
    codes = [cache.codes[kind, 1] for kind in (KEYS, VALUES)]
    read = [one.read(0, x.shape[3]) for one in codes]
    return torch.stack([reconstruct(one.D, indices.long(), z * one.scale).view_as(x[0])
                        for one, (indices, z) in zip(codes, read)]), read

# ---- Attention -----------------------------------------------------------------------------------

def lossy(x, d, kind, layer, sparsity):
    """What must come back of vectors x (B, H, T, m) in the published format."""
    D, scale = d.atoms[kind, layer], d.scale[kind, layer]
    joined = x.unflatten(1, (-1, d.heads)).transpose(2, 3)  # (B, H / heads, T, heads, m)
    indices, z = omp(D, joined.flatten(3).flatten(0, 2) / scale, sparsity)
    z = scale * z.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    return (z[..., None] * D[indices]).sum(1).view_as(joined).transpose(2, 3).flatten(1, 2)

@pytest.mark.parametrize("sinks, buffer, window, heads, piece, queries", [
    (0, 8, 1, 1, 2**21, 16), (5, 8, 3, 1, 50, 2), (2, 0, 2, 2, 500, 3), (40, 20, 8, 1, 2**21, 16)])
def test_attention_is_that_over_what_comes_back_of_old_tokens_and_over_the_others_as_they_are(
        sinks, buffer, window, heads, piece, queries, monkeypatch):
    monkeypatch.setattr(lexico, "PIECE", piece)
    monkeypatch.setattr(lexico, "QUERIES", queries)
    d, t, end = dictionaries(heads=heads), torch.arange(90), 0
    cache, q, kv = sparse(3, buffer, d, window, sinks=sinks, batch=2), torch.randn(2, 6, 90, 16), (
        torch.randn(2, 2, 2, 90, 16))
    back = torch.stack([lossy(x, d, kind, 1, 3) for kind, x in enumerate(kv)])
    for T in (30, *[1] * 20, 7, *[1] * 14, 2, 3, *[1] * 14):
        now, end = slice(end, end + T), end + T
        cache.begin(T)
        old = (t >= sinks) & (t < sinks + cache.compressed)  # a prompt's tokens are not, to itself
        out = cache.attend(1, q[:, :, now], *kv[..., now, :])
        cache.end(T)
        seen = torch.where(old[:, None], back, kv)[..., :end, :]
        expected = F.scaled_dot_product_attention(q[:, :, now], *seen, t[:end] <= t[now, None],
                                                  enable_gqa=True)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        waiting = end - min(end, sinks) - cache.compressed
        assert min(buffer, end - sinks) <= waiting <= buffer + window

class Exact(FP8Codes):
    """A format of a fork's own: coefficients in float32."""
    columns = staticmethod(lambda s: ((s, torch.int16), (s, torch.float32)))
    encode = staticmethod(lambda D, Y, sparsity, pursuit: pursuit(D, Y, sparsity))

    def decode(self, indices, coefficients):
        return indices.int(), coefficients

@pytest.mark.parametrize("buffer, window, sinks", [(0, 1, 0), (4, 1, 3), (4, 3, 0), (64, 1, 0)])
def test_a_complete_basis_at_full_sparsity_equals_the_dense_cache(buffer, window, sinks, monkeypatch):
    monkeypatch.setitem(lexico.CODINGS, "exact", Exact)
    d = dictionaries(N=16)
    d.atoms = torch.linalg.qr(d.atoms)[0]
    cache = sparse(16, buffer, d, window, "exact", sinks=sinks, batch=2)
    tokens, logits = run(cache, [11, 9, *[1] * 10, 3, *[1] * 7], batch=2)
    torch.testing.assert_close(logits, MODEL(tokens), rtol=1e-3, atol=1e-3)

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
            feed(cache, 1, torch.randn(1, 6, T, 16), *torch.randn(2, 1, 2, T, 16))
    # Scores, one for each token and query head, are the largest thing that decoding needs.
    assert 0 < largest.elements <= (tokens + 10) * CONFIG.n_heads < 2 * tokens * CONFIG.head_dim

# ---- Memory and coding ---------------------------------------------------------------------------

def tensors(thing):
    """All tensors that an object holds."""
    if isinstance(thing, torch.Tensor):
        return [thing]
    thing = getattr(thing, "__dict__", thing)
    held = thing.values() if isinstance(thing, dict) else thing
    return sum(map(tensors, held), []) if isinstance(thing, (dict, list, tuple)) else []

@pytest.mark.parametrize("sparsity, heads", [(5, 1), ([[5, 3, 5], [2, 5, 5]], 1), (6, 2)])
def test_memory_is_counted_to_the_byte_and_dictionaries_are_there_once(sparsity, heads):
    cache = sparse(sparsity, 8, dictionaries(heads=heads), 2, sinks=3, batch=2, capacity=83)
    run(cache, [50, *[1] * 20], batch=2)
    each = 3 * (sum(map(sum, sparsity)) if heads == 1 and sparsity != 5 else 6 * sparsity)
    counted, vectors = cache.nbytes(), 4 // heads  # codes of a token, layer and kind: batch, heads
    assert counted["codes"] == each * vectors * cache.compressed
    assert counted["buffer"] == (70 - cache.compressed) * 24 * CONFIG.head_dim * 4
    assert counted["dense"] == 70 * 24 * CONFIG.head_dim * 2
    assert counted["total"] == counted["codes"] + counted["buffer"]
    assert counted["vector"] == each / (6 * heads * CONFIG.head_dim * 2)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors(cache)
                if x.dtype not in (torch.int64, torch.bool)}  # which count and mask
    assert counted["allocated"] == sum(storages.values())
    assert cache.codes[0, 0].parts[0].shape[2] == 72  # what was reserved did not have to grow

@pytest.mark.parametrize("cache", [sparse(2, 4), DenseCache(CONFIG, device="cpu")])
def test_room_that_has_to_grow_doubles(cache):
    rooms = {MODEL(torch.zeros(1, 1, dtype=torch.long), cache) is None or cache.nbytes()["allocated"]
             for _ in range(130)}
    assert len(rooms) <= 10 and cache.length == 130

def test_coding_on_request_needs_a_whole_window_that_waits():
    cache = sparse(3, 8, window=4)
    for T, compressed in ((3, 0), (4, 4)):
        run(cache, [T])
        cache.compress()
        cache.compress()
        assert cache.compressed == compressed

def test_decoding_codes_all_layers_keys_and_values_in_one_call(monkeypatch):
    calls, real = [], lexico.omp
    monkeypatch.setattr(lexico, "omp", lambda D, Y, s: (calls.append(Y.shape), real(D, Y, s))[1])
    run(sparse(2, 4, window=3, pursuit=lexico.omp), [10, *[1] * 9])
    prompt, decoding = [(1, 2 * 6, 16)] * 6, [(6, 2 * 3, 16)] * 2
    assert calls == prompt + decoding  # one at a time, then all at once, every third token

@pytest.mark.parametrize("coding", ["fp8", "word"])
def test_any_pursuit_of_one_dictionary_can_do_all_coding(coding):
    def pursuit(D, Y, sparsity):
        calls.append((*D.shape, *Y.shape))
        return strongest(D, Y, sparsity)

    calls, x, d = [], torch.randn(2, 1, 2, 20, 16), dictionaries()
    run(sparse(4, 2, d, 4, coding, pursuit=pursuit), [20, *[1] * 9])
    assert calls == [(64, 16, 2 * 18, 16)] * 6 + [(64, 16, 2 * 4, 16)] * 12
    for kind, (indices, z) in enumerate(round_trip(sparse(4, 0, d, 1, coding, pursuit=pursuit), x)[1]):
        chosen, products = strongest(d.atoms[kind, 1], x[kind, 0] / d.scale[kind, 1], 4)
        assert torch.equal(indices, chosen)
        assert coding == "word" or torch.allclose(z, products, rtol=2**-4)

@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_scales_bring_large_and_small_vectors_into_fp8(size):
    x = size * torch.randn(2, 1, 2, 50, 16)
    back, read = round_trip(sparse(8, 0, dictionaries(scale=size / 64)), x)
    assert (back - x).norm() < 0.4 * x.norm() and (read[VALUES][1] != 0).float().mean() > 0.99

def test_coefficients_beyond_fp8_become_its_largest_number_not_nan():
    d = dictionaries(scale=1.0)
    atoms = d.atoms[:, 1, None, None, :20]  # (2, 1, 1, 20, m)
    x = torch.cat((1e6 * atoms, -1e6 * atoms), dim=2)
    largest = 448 * d.scale[:, 1].view(2, 1, 1, 1, 1)
    torch.testing.assert_close(round_trip(sparse(1, 0, d), x)[0], largest * x / 1e6)

def test_words_take_two_bytes_a_coefficient_and_one_a_vector_and_err_as_little_as_fp8(monkeypatch):
    monkeypatch.setitem(lexico.CODINGS, "exact", Exact)
    x = torch.randn(2, 1, 2, 200, 16)

    def error(coding, N, pursuit=omp):
        cache = sparse(4, 0, dictionaries(N), 1, coding, pursuit=pursuit)
        assert lexico.CODINGS[coding].nbytes_each(4) == {"fp8": 12, "word": 9, "exact": 24}[coding]
        return (round_trip(cache, x)[0] - x).norm()

    assert error("exact", 64) < error("fp8", 64) < 1.02 * error("exact", 64)
    assert error("word", 64) < 1.01 * error("exact", 64)  # 10 bits for a level
    assert error("word", 4096) < 1.15 * error("exact", 4096)  # 4 bits
    for coding in ("fp8", "word"):
        assert error(coding, 64, partial(omp_beam, width=4)) < error(coding, 64)

def test_what_a_cache_cannot_do_is_refused():
    for words, change in (("65", {"sparsity": 65}), ("sparsity 0", {"sparsity": 0}), ("window 0", {
            "window": 0}), ("sinks -1", {"sinks": -1}), ("'fp4'", {"coding": "fp4"})):
        assert says(words, lambda: sparse(**{"sparsity": 2, "buffer": 4, **change}))
    assert says("up to 8192", lambda: sparse(2, 4, dictionaries(8193), coding="word"))
    assert says("n_layers = 3, not 4", dictionaries().check, replace(CONFIG, n_layers=4))
    assert says("KV heads", dictionaries(heads=2).check, replace(CONFIG, kv_heads=3, n_heads=3))

# ---- Dictionaries --------------------------------------------------------------------------------

def test_dictionaries_come_back_as_they_were_saved(tmp_path):
    d = dictionaries(heads=2)
    d.save(tmp_path / "d")
    back = Dictionaries.load(tmp_path / "d").check(CONFIG)
    torch.testing.assert_close(back.atoms, d.atoms.bfloat16().float())
    assert back.metadata == {"model": "test"} and torch.equal(back.scale, d.scale) and back.heads == 2
    assert [path.name for path in tmp_path.iterdir()] == ["d"]

HARM = {"sparsity": [2, 5], "kl": torch.ones(2, 3, 2).tolist()}

@pytest.mark.parametrize("change", [
    {"keys": NAN}, {"values": torch.inf}, {"scale": NAN}, {"scale": 0.0}, {"scale": -1.0},
    {"shape": None}, {"shape": {"n_layers": 3}}, {"shape": {"n_layers": 4, "head_dim": 16}},
    {"shape": {"n_layers": 3, "head_dim": 0}}, {"divergence": None}, {"divergence": []},
    {"divergence": {**HARM, "kl": None}}, {"divergence": {**HARM, "kl": [[1, 2]]}},
    {"divergence": {**HARM, "sparsity": [5, 2]}}, {"divergence": {**HARM, "sparsity": 3}}])
def test_damaged_dictionaries_are_refused_by_name(tmp_path, change):
    d, path = dictionaries(), tmp_path / "d.safetensors"
    for name, value in change.items():
        if isinstance(value, float):
            {"keys": d.atoms[0], "values": d.atoms[1], "scale": d.scale}[name][0, ...] = value
        else:
            setattr(d, name, value) if name == "shape" else d.metadata.update({name: value})
    d.save(path)
    assert says(f"dictionary '{path}' is damaged", Dictionaries.load, path)

def test_what_is_no_dictionary_is_refused(tmp_path):
    path = tmp_path / "d.safetensors"
    save_file({"keys": torch.ones(2)}, path)
    assert says("not a dictionary", Dictionaries.load, path)
    dictionaries().save(path)
    path.write_bytes(path.read_bytes()[:-100])
    assert says("is damaged", Dictionaries.load, path)
    assert says("does not exist", Dictionaries.load, "absent.safetensors")
    assert says(f"train_dict.py --model {tmp_path}", Dictionaries.find, tmp_path)
