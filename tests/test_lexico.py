"""What the sparse cache promises: exact where it should be, small to the byte, never dense."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_model import MALFORMED, random_model, says
from test_omp import BEAM, strongest
from torch.utils._python_dispatch import TorchDispatchMode

import lexico
from lexico import DenseCache, Dictionaries, SparseCache, shape_of
from omp import omp, reconstruct

MODEL = random_model(dim=48, n_layers=3, n_heads=6, head_dim=16, tied=True)
CONFIG = MODEL.config

def dictionaries(N=64, scale=0.05, heads=1):
    torch.manual_seed(1)
    atoms = F.normalize(torch.randn(2, CONFIG.n_layers, N, heads * CONFIG.head_dim), dim=-1)
    scales = scale * torch.linspace(0.5, 1.5, 2 * CONFIG.n_layers).view(2, -1)  # all different
    return Dictionaries(atoms, scales, shape_of(CONFIG), model="test")

def sparse(sparsity, buffer, d=None, window=1, coding="fp8", sinks=0, **options):
    d = d or dictionaries()
    return SparseCache(CONFIG, d, sparsity, buffer, window, sinks, coding=coding, **options)

def run(cache, lengths, batch=1):
    """Random tokens and their logits, of a prompt and chunks of these lengths."""
    tokens = torch.randint(0, 200, (batch, sum(lengths)))
    return tokens, torch.cat([MODEL(part, cache) for part in tokens.split(lengths, dim=1)], dim=1)

def feed(cache, q, k, v):
    """The attention of layer 1, as the network asks for it; and how many tokens were coded then."""
    cache.begin(q.shape[2])
    compressed, out = cache.compressed, cache.attend(1, q, k, v)
    cache.end(q.shape[2])
    return out, compressed

def round_trip(x, *args, **options):
    """Codes of keys and values x (2, B, H, T, m) in a cache without a buffer, indices and
    coefficients in units of the scale; and what they give back."""
    cache = sparse(args[0], 0, *args[1:], **options)
    feed(cache, torch.zeros(len(x[0]), CONFIG.n_heads, *x.shape[3:]), *x)
    codes = [cache.codes[kind, 1] for kind in range(2)]
    read = [one.read(0, x.shape[3]) for one in codes]
    return read, torch.stack([reconstruct(one.D, n.long(), z * one.scale).view_as(x[0])
                              for one, (n, z) in zip(codes, read)])

# ---- Attention -----------------------------------------------------------------------------------

def lossy(x, d, kind, sparsity):
    """What must come back of vectors x (B, H, T, m) of layer 1 in the published format."""
    D, scale = d.atoms[kind, 1], d.scale[kind, 1]
    joined = x.unflatten(1, (-1, d.heads)).transpose(2, 3)  # (B, H / heads, T, heads, m)
    indices, z = omp(D, joined.flatten(3).flatten(0, 2) / scale, sparsity)
    z = scale * z.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    return (z[..., None] * D[indices]).sum(1).view_as(joined).transpose(2, 3).flatten(1, 2)

@pytest.mark.parametrize("sinks, buffer, window, heads, piece, queries, size", [
    (0, 8, 1, 1, 2**21, 16, 1), (5, 8, 3, 1, 50, 2, 1e4), (2, 0, 2, 2, 500, 3, 1),
    (40, 20, 8, 1, 2**21, 16, 1e-4)])
def test_attention_is_that_over_what_comes_back_of_old_tokens_and_over_the_others_as_they_are(
        sinks, buffer, window, heads, piece, queries, size, monkeypatch):
    monkeypatch.setattr(lexico, "PIECE", piece)
    monkeypatch.setattr(lexico, "QUERIES", queries)
    d, t, end = dictionaries(scale=size / 20, heads=heads), torch.arange(90), 0
    cache, q = sparse(3, buffer, d, window, sinks=sinks, batch=2), torch.randn(2, 6, 90, 16) / size
    kv = size * torch.randn(2, 2, 2, 90, 16)
    kv[:, 0, 0, 9] *= 1e6  # coefficients beyond FP8 become its largest number, not NaN
    back = torch.stack([lossy(x, d, kind, 3) for kind, x in enumerate(kv)])
    assert (back - kv)[:, 1].norm() < 0.8 * kv[:, 1].norm()  # scales bring all sizes into FP8
    for T in (30, *[1] * 20, 7, *[1] * 14, 2, 3, *[1] * 14):
        now, end = slice(end, end + T), end + T
        out, compressed = feed(cache, q[:, :, now], *kv[..., now, :])
        old = (t >= sinks) & (t < sinks + compressed)  # of a prompt, to itself, none
        seen, mask = torch.where(old[:, None], back, kv)[..., :end, :], t[:end] <= t[now, None]
        expected = F.scaled_dot_product_attention(q[:, :, now], *seen, mask, enable_gqa=True)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5 * size)
        waiting = end - min(end, sinks) - cache.compressed
        assert min(buffer, end - sinks) <= waiting <= buffer + window

class Exact(lexico.FP8Codes):
    """A format of a fork's own: coefficients in float32."""
    columns = staticmethod(lambda s: ((s, torch.int16), (s, torch.float32)))
    encode = staticmethod(lambda D, Y, sparsity, pursuit: pursuit(D, Y, sparsity))
    decode = staticmethod(lambda indices, coefficients: (indices.int(), coefficients))

@pytest.fixture
def exact(monkeypatch):
    monkeypatch.setitem(lexico.CODINGS, "exact", Exact)

@pytest.mark.parametrize("buffer, window, sinks", [(0, 1, 0), (4, 1, 3), (4, 3, 0), (64, 1, 0)])
def test_a_complete_basis_at_full_sparsity_equals_the_dense_cache(buffer, window, sinks, exact):
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
            feed(cache, torch.randn(1, 6, T, 16), *torch.randn(2, 1, 2, T, 16))
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

@pytest.mark.parametrize("sparsity, total, heads", [
    (5, 30, 1), ([[5, 3, 5], [2, 5, 5]], 25, 1), (6, 36, 2)])
def test_memory_is_counted_to_the_byte_and_dictionaries_are_there_once(sparsity, total, heads):
    cache = sparse(sparsity, 8, dictionaries(heads=heads), 2, sinks=3, batch=2, capacity=83)
    run(cache, [50, *[1] * 20], batch=2)
    counted, codes = cache.nbytes(), 3 * total * 4 // heads * cache.compressed
    buffer = (70 - cache.compressed) * 24 * CONFIG.head_dim * 4  # 24: kinds, layers, batch, heads
    dense, share = 70 * 24 * CONFIG.head_dim * 2, 3 * total / (6 * heads * CONFIG.head_dim * 2)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors(cache)
                if x.dtype not in (torch.int64, torch.bool)}  # which count and mask
    expected = {"codes": codes, "buffer": buffer, "total": codes + buffer, "dense": dense,
                "vector": share, "allocated": sum(storages.values())}
    assert counted == {"dictionaries": counted["dictionaries"], **expected}
    assert cache.codes[0, 0].parts[0].shape[2] == 72  # what was reserved did not have to grow

@pytest.mark.parametrize("cache", [sparse(2, 4), DenseCache(CONFIG, device="cpu")])
def test_room_that_has_to_grow_doubles(cache):
    rooms = [run(cache, [1]) and cache.nbytes()["allocated"] for _ in range(130)]
    assert len(set(rooms)) <= 10 and cache.length == 130

def test_coding_on_request_needs_a_whole_window_that_waits():
    cache = sparse(3, 8, window=4)
    for T, compressed in ((3, 0), (4, 4)):
        run(cache, [T])
        assert cache.compress() is cache.compress() and cache.compressed == compressed

@pytest.mark.parametrize("coding", ["fp8", "word"])
def test_any_pursuit_can_code_all_and_omp_codes_all_layers_in_one_call(coding, monkeypatch):
    def watched(pursuit, D, Y, sparsity):
        calls.append((*D.shape, *Y.shape))
        return pursuit(D, Y, sparsity)

    calls, mine, d = [], partial(watched, strongest), dictionaries()
    x = torch.randn(2, 1, 2, 20, 16)
    for kind, (indices, _) in enumerate(round_trip(x, 4, d, coding=coding, pursuit=mine)[0]):
        chosen = strongest(d.atoms[kind, 1], x[kind, 0] / d.scale[kind, 1], 4)[0]
        assert torch.equal(indices, chosen) and calls.pop() == (64, 16, 40, 16)
    run(sparse(4, 2, d, 4, coding, pursuit=mine), [20, *[1] * 9])
    assert calls == [(64, 16, 2 * 18, 16)] * 6 + [(64, 16, 2 * 4, 16)] * 12
    calls.clear()
    monkeypatch.setattr(lexico, "omp_beam", watched)
    run(sparse(4, 2, d, 4, coding, pursuit=partial(watched, omp)), [20, *[1] * 9])
    assert calls == [(1, 64, 16, 1, 2 * 18, 16)] * 6 + [(6, 64, 16, 6, 2 * 4, 16)] * 2

@pytest.mark.parametrize("N, coding, nbytes, worse", [
    (64, "fp8", 12, 1.02), (64, "word", 9, 1.01), (4096, "word", 9, 1.15)])  # 10 bits a level, or 4
def test_words_take_two_bytes_a_coefficient_and_err_little_more(N, coding, nbytes, worse, exact):
    x, d = torch.randn(2, 1, 2, 200, 16), dictionaries(N)
    least, ours, better = ((round_trip(x, 4, d, 1, coding, pursuit=pursuit)[1] - x).norm()
                           for coding, pursuit in (("exact", omp), (coding, omp), (coding, BEAM)))
    assert lexico.CODINGS[coding].nbytes_each(4) == nbytes
    assert least < ours < worse * least and better < ours

# ---- Dictionaries --------------------------------------------------------------------------------

def test_dictionaries_come_back_as_they_were_saved_and_serve_the_model_that_they_are_for(tmp_path):
    d = dictionaries(heads=2)
    d.save(tmp_path / "d")
    back = Dictionaries.load(tmp_path / "d").check(CONFIG)
    torch.testing.assert_close(back.atoms, d.atoms.bfloat16().float())
    assert torch.equal(back.scale, d.scale) and back.heads == 2 and back.metadata == d.metadata
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
    assert says("n_layers = 3, not 4", d.check, replace(CONFIG, n_layers=4))
    assert says("KV heads", d.check, replace(CONFIG, kv_heads=3, n_heads=3))
    assert says("word (up to 8192)", sparse, 2, 4, dictionaries(8193), 1, "word")
    assert says(f"train_dict.py --model {tmp_path}", Dictionaries.find, tmp_path)

@pytest.mark.parametrize("name, values", MALFORMED["dictionary"].items())
def test_damaged_dictionaries_are_refused_by_name(tmp_path, name, values):
    for value in values:
        d, path = dictionaries(), tmp_path / "d.safetensors"
        if isinstance(value, float):
            getattr(d, name)[1, 2] = value
        else:
            (vars(d) if name == "shape" else d.metadata).update({name: value})
        d.save(path)
        path.write_bytes(path.read_bytes()[:value if name == "length" else None])
        assert says(f"dictionary '{path}' is damaged", Dictionaries.load, path), value
