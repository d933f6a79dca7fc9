"""What the sparse cache promises: exact where it should be, small to the byte, never dense."""

from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from conftest import SHAPES
from test_model import MALFORMED, random_model, says
from test_omp import BEAM
from torch.profiler import ProfilerActivity, profile

import lexico
from lexico import DenseCache, Dictionaries, SparseCache, attend_codes, shape_of
from omp import omp, relative_error

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
    """Random tokens pass, a prompt and chunks of these lengths."""
    for T in lengths:
        MODEL(torch.randint(0, 200, (batch, T)), cache)

def feed(cache, q, k, v):
    """The attention of layer 1, as the network asks for it; and how many tokens were coded then."""
    cache.begin(q.shape[2])
    compressed, out = cache.compressed, cache.attend(1, q, k, v)
    cache.end(q.shape[2])
    return out, compressed

# ---- Attention -----------------------------------------------------------------------------------

def strongest(D, Y, sparsity):
    """A pursuit of one's own: the atoms that correlate best, without a look at each other."""
    indices = (Y @ D.T).abs().topk(sparsity).indices
    return indices, (Y @ D.T).gather(-1, indices)

class Exact(lexico.FP8Codes):
    """A format of a fork's own: coefficients in float32."""
    columns = staticmethod(lambda s: ((s, torch.int16), (s, torch.float32)))
    encode = staticmethod(lambda D, Y, sparsity, pursuit: pursuit(D, Y, sparsity))
    decode = staticmethod(lambda indices, coefficients: (indices.int(), coefficients))

def lossy(x, d, kind, pursuit, coding):
    """What must come back of vectors x (B, H, T, m) of layer 1, of 3 coefficients each."""
    D, scale = d.atoms[kind, 1], d.scale[kind, 1]
    joined = x.unflatten(1, (-1, d.heads)).transpose(2, 3)  # (B, H / heads, T, heads, m)
    indices, z = pursuit(D, joined.flatten(3).flatten(0, 2) / scale, 3)
    z = z if coding == "exact" else z.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    back = (scale * z[..., None] * D[indices]).sum(1)
    return back.view_as(joined).transpose(2, 3).flatten(1, 2)

@pytest.mark.parametrize("sinks, buffer, window, heads, piece, queries, size, pursuit, coding",
                         SHAPES["cache"])
def test_attention_is_that_over_what_comes_back_of_old_tokens_and_over_the_others_as_they_are(
        sinks, buffer, window, heads, piece, queries, size, pursuit, coding, monkeypatch):
    pursuit = {"omp": omp, "beam": BEAM, "strongest": strongest}[pursuit]
    monkeypatch.setattr(lexico, "PIECE", piece)
    monkeypatch.setattr(lexico, "QUERIES", queries)
    monkeypatch.setitem(lexico.CODINGS, "exact", Exact)
    d, t, end = dictionaries(scale=size / 20, heads=heads), torch.arange(90), 0
    cache = sparse(3, buffer, d, window, coding, sinks, batch=2, pursuit=pursuit)
    q, kv = torch.randn(2, 6, 90, 16) / size, size * torch.randn(2, 2, 2, 90, 16)
    kv[:, 0, 0, 9] *= 1e6  # coefficients beyond FP8 become its largest number, not NaN
    back = torch.stack([lossy(x, d, kind, pursuit, coding) for kind, x in enumerate(kv)])
    assert (back - kv)[:, 1].norm() < 0.9 * kv[:, 1].norm()  # scales bring all sizes into FP8
    for T in (30, *[1] * 20, 7, *[1] * 14, 2, 3, *[1] * 14):
        now, end = slice(end, end + T), end + T
        out, compressed = feed(cache, q[:, :, now], *kv[..., now, :])
        old = (t >= sinks) & (t < sinks + compressed)  # of a prompt, to itself, none
        seen, mask = torch.where(old[:, None], back, kv)[..., :end, :], t[:end] <= t[now, None]
        expected = F.scaled_dot_product_attention(q[:, :, now], *seen, mask, enable_gqa=True)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5 * size)
        waiting = end - min(end, sinks) - cache.compressed
        assert min(buffer, end - sinks) <= waiting <= buffer + window

def test_no_prompt_makes_a_token_by_token_matrix_and_no_step_a_dense_key_or_a_token_by_atom_one(
        monkeypatch):
    monkeypatch.setattr(lexico, "PIECE", 512)
    cache, tokens = sparse(1, buffer=4), 3000
    # Scores, one for each token and query head, are the largest thing that decoding needs.
    scores = 4 * (tokens + 10) * CONFIG.n_heads
    for T, most in ((tokens, tokens**2 // 2), (1, scores)):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            feed(cache, torch.randn(1, 6, T, 16), *torch.randn(2, 1, 2, T, 16))
        assert 0 < max(event.self_cpu_memory_usage for event in seen.events()) <= most
    assert scores < 4 * 2 * tokens * CONFIG.head_dim

@pytest.mark.parametrize("served", [[True, True, True], [False, True, True], [True, True, False]])
def test_a_step_is_recorded_only_if_a_kernel_serves_every_layer(served, monkeypatch):
    answers = iter(served)
    monkeypatch.setattr(lexico, "attend_fused", lambda *step: attend_codes(*step)
                        if next(answers) else None)
    cache = sparse(3, 4)
    run(cache, [20, 1])
    assert cache.replayable == all(served)

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
    numbers, coded = 24 * CONFIG.head_dim, cache.compressed  # 24: kinds, layers, batch, heads
    codes, buffer = 3 * total * 4 // heads * coded, 4 * numbers * (70 - coded)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors(cache)
                if x.dtype not in (torch.int64, torch.bool)}  # which count and mask
    assert cache.nbytes() == {
        "codes": codes, "buffer": buffer, "total": codes + buffer, "dense": 2 * numbers * 70,
        "vector": total / (4 * heads * CONFIG.head_dim), "allocated": sum(storages.values()),
        "dictionaries": 4 * (6 * 64 * heads * CONFIG.head_dim + 6)}
    assert cache.codes[0, 0].parts[0].shape[2] == 72  # what was reserved did not have to grow

@pytest.mark.parametrize("cache", [sparse(2, 4), DenseCache(CONFIG, device="cpu")])
def test_room_that_has_to_grow_doubles(cache):
    rooms = [run(cache, [1]) or cache.nbytes()["allocated"] for _ in range(130)]
    assert len(set(rooms)) <= 10 and cache.length == 130

def test_coding_on_request_needs_a_whole_window_that_waits():
    cache = sparse(3, 8, window=4)
    for T, compressed in ((3, 0), (4, 4)):
        run(cache, [T])
        assert cache.compress() is cache.compress() and cache.compressed == compressed

@pytest.mark.parametrize("coding", ["fp8", "word"])
def test_omp_codes_a_prompt_layer_by_layer_and_then_all_layers_in_one_call(coding, monkeypatch):
    watched = Mock(wraps=omp)
    monkeypatch.setattr(lexico, "omp", watched)
    run(sparse(4, 2, None, 4, coding, pursuit=watched), [20, *[1] * 9])
    shapes = [(*D.shape, *Y.shape) for D, Y, _ in (call.args for call in watched.call_args_list)]
    assert shapes == [(2, 64, 16, 2, 2 * 18, 16)] * 3 + [(6, 64, 16, 6, 2 * 4, 16)] * 2

@pytest.mark.parametrize("coding", ["fp8", "word"])
def test_a_pursuit_of_other_shapes_is_refused(coding):
    short = lambda D, Y, sparsity: omp(D, Y, sparsity - 1)
    with pytest.raises(ValueError, match=r"shapes \[\(36, 3\), \(36, 3\)\]; .* must be \(36, 4\)"):
        run(sparse(4, 2, None, 4, coding, pursuit=short), [20])

@pytest.mark.parametrize("N, coding, nbytes, worse", [
    (64, "fp8", 12, 1.02), (64, "word", 9, 1.01), (4096, "word", 9, 1.15)])  # 10 bits a level, or 4
def test_words_take_two_bytes_a_coefficient_and_err_little_more(N, coding, nbytes, worse):
    D, Y, errors = dictionaries(N).atoms[0, :1], 20 * torch.randn(1, 400, 16), []
    codes = lexico.CODINGS[coding](D[0], torch.tensor(1.0), 4, 1, 1)
    codes.reserve(400)
    for pursuit in (omp, BEAM):
        codes.write(torch.arange(400), codes.encode(D, Y, 4, pursuit))
        indices, z = codes.read(0, 400)
        errors.append(relative_error(D, Y, indices.long(), z).mean())
    least, (ours, better) = relative_error(D, Y, *omp(D, Y, 4)).mean(), errors
    assert codes.nbytes_each(4) == nbytes and better < ours and least < ours < worse * least

# ---- Dictionaries --------------------------------------------------------------------------------

def test_dictionaries_come_back_as_they_were_saved_and_must_fit(tmp_path):
    d = dictionaries(heads=2)
    (tmp_path / "d").write_bytes(d.serialise())
    back = Dictionaries.load(tmp_path / "d").check(CONFIG)
    torch.testing.assert_close(back.atoms, d.atoms.bfloat16().float())
    assert torch.equal(back.scale, d.scale) and back.heads == 2 and back.metadata == d.metadata
    assert says("KV heads", d.check, replace(CONFIG, kv_heads=3, n_heads=3))
    assert says("word (up to 8192)", sparse, 2, 4, dictionaries(8193), 1, "word")
    with pytest.raises((AssertionError, RuntimeError)):  # torch's own, and no word of damage
        Dictionaries.load(tmp_path / "d", "cuda:99")

def test_a_dictionary_is_found_by_the_owner_too(tmp_path, monkeypatch):
    monkeypatch.setattr(lexico, "find_folder", lambda model: tmp_path)  # instead of the Hub
    name = "SmolLM2-135M-Instruct"
    assert Dictionaries.find(f"HuggingFaceTB/{name}").name == f"HuggingFaceTB--{name}.safetensors"
    assert says("no dictionary is known", Dictionaries.find, f"nobody/{name}")

@pytest.mark.parametrize("name, values", MALFORMED["dictionary"].items())
def test_damaged_dictionaries_are_refused_by_name(tmp_path, name, values):
    for value in values:
        d, path = dictionaries(), tmp_path / "d.safetensors"
        if isinstance(value, float):
            getattr(d, name)[1, 2] = value
        else:
            (vars(d) if name == "shape" else d.metadata).update({name: value})
        path.write_bytes(d.serialise())
        path.write_bytes(path.read_bytes()[:value if name == "length" else None])
        assert says(f"dictionary '{path}' is damaged", Dictionaries.load, path), value
