"""What compression costs, on a small slice: the claims of bench/, and that its measure is real."""

from functools import cache
from math import isfinite

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SHAPES
from test_model import random_model

from bench import coders, peers, quality
from lexico import Dictionaries, SparseCache, shape_of
from model import Llama, Tokenizer
from omp import omp, relative_error
from train_dict import Learner, vectors

MODEL, SPARED = Llama.from_pretrained("tiny", "cpu", torch.float32), {"buffer": 32, "sinks": 0}
TOKENIZER, DICTIONARIES = Tokenizer.from_pretrained("tiny"), Dictionaries.load("tiny")
HELD_OUT = (ROOT / "tiny/held-out.txt").read_text()

JUDGE = quality.Judge(MODEL, TOKENIZER, HELD_OUT, rows=1, length=384, facts=3)
CALIBRATION = cache(lambda: peers.record(MODEL, JUDGE.spare[:2]))
# name -> (share of the memory, start -> cache)
TABLE = quality.methods(MODEL, {"N=2048": DICTIONARIES}, CALIBRATION, SPARED, length=384)

@cache
def kl(name):
    """The divergence of the method of a name."""
    return JUDGE.fidelity(TABLE[name][1])["kl"]

def test_heads_of_any_width_have_peers_that_fit_them():
    model = random_model(vocab_size=4096, head_dim=20)
    judge = quality.Judge(model, TOKENIZER, HELD_OUT, rows=1, length=64, facts=0)
    table = peers.methods(model, lambda: peers.record(model, judge.spare[:2]), SPARED, 64)
    assert "KIVI 2 bit" not in table and "product quantisation d=4" in table
    assert all(isfinite(judge.fidelity(make)["kl"]) for _, make in table.values())

# ---- Lexico --------------------------------------------------------------------------------------

@pytest.mark.parametrize("coding, sinks", [("fp8", 0), ("word", 3)])
def test_the_simulation_gives_what_the_real_cache_gives(coding, sinks):
    tokens, spared = JUDGE.rows[:, :48], {"buffer": 9, "sinks": sinks}
    cache = SparseCache(MODEL.config, DICTIONARIES, 4, 8, window=1, sinks=sinks, coding=coding)
    with torch.inference_mode():
        real = torch.cat([MODEL(token, cache) for token in tokens.split(1, dim=1)], dim=1)
        simulated = MODEL(tokens, quality.lexico(DICTIONARIES, 4, coding, omp, spared))
    torch.testing.assert_close(simulated, real, rtol=1e-3, atol=1e-2)

def test_divergence_falls_as_sparsity_grows_and_most_where_it_is_allocated():
    s2, s4, s11, auto = (kl(f"Lexico word N=2048 {s}") for s in ("s=2", "s=4", "s=11", "auto:18%"))
    assert s2 > s4 > s11 > auto and kl("dense") < 1e-6
    assert s11 < kl("KIVI 2 bit") and auto < kl("Lexico fp8 N=2048 s=8") / 2  # in 18 to 19 %
    assert 0.178 < TABLE["Lexico word N=2048 auto:18%"][0] <= 0.18

def test_facts_are_recalled_through_the_cache_and_lost_with_evicted_tokens():
    dense, sparse, evicted = (JUDGE.recall(TABLE[name][1]) for name in (
        "dense", "Lexico word N=2048 auto:20%", "SnapKV 20%"))
    assert dense >= 0.9 and sparse >= dense - 0.02 and evicted < dense - 0.2

def test_dictionaries_of_stories_serve_stories_better_than_those_of_source_code():
    kl = []
    for text in HELD_OUT, (ROOT / "lexico.py").read_text():
        tokens = torch.tensor([TOKENIZER.encode(text[-10_000:])[:1024]])
        X = vectors(MODEL, tokens)  # (2 L, V, m)
        learner = Learner(F.normalize(X[:, ::8], dim=-1), 4, fade=0.9)  # N = 256
        learner.step(X)
        d = Dictionaries(learner.state["D"].unflatten(0, (2, -1)), torch.ones(2, 6) / 16,
                         shape_of(MODEL.config))
        kl.append(JUDGE.fidelity(lambda start: quality.lexico(d, 4, "fp8", omp, SPARED))["kl"])
    assert kl[0] < 0.8 * kl[1]

# ---- Peers and coders ----------------------------------------------------------------------------

def test_every_peer_loses_less_in_more_memory():
    kinds = {}
    for name in sorted(TABLE.keys() - {"dense"}, key=lambda name: TABLE[name][0]):
        kinds.setdefault(name.split()[0], []).append(name)
    del kinds["Lexico"]
    assert len(kinds) == 10
    for least, more, *_ in kinds.values():
        assert kl(least) > kl(more) > 0, least

def test_memory_is_counted_whole():
    for name, bits in SHAPES["peers"].items():
        assert 64 * 16 * TABLE[name][0] == bits, name

@pytest.mark.parametrize("bits, largest, error", [
    (1, 0.7979, 0.3634), (2, 1.5104, 0.1175), (3, 2.1520, 0.0345), (4, 2.7326, 0.0095)])
def test_levels_are_those_of_lloyd_and_max_and_turboquant_errs_as_they_do(bits, largest, error):
    levels, exact = peers.lloyd_max(bits)
    assert levels[-1] == pytest.approx(largest, abs=1e-2)
    assert exact == pytest.approx(error, abs=1e-4)
    x = torch.randn(1, 1, 1, 5000, 128)
    back = peers.turboquant(bits, 0, None, x, x)[0]
    assert (x - back).square().mean() == pytest.approx(error, rel=0.05)

def test_transform_codes_err_as_their_bits_say_and_signs_of_projections_are_right_on_average():
    turn = torch.linalg.qr(torch.randn(3, 3))[0]
    x = 5 + torch.randn(1, 1, 1, 50_000, 3) * torch.tensor([8.0, 2, 1]) @ turn
    error = (x - peers.components(x, 2 / 16)(x)).square().mean()
    expected = 64 * peers.lloyd_max(4)[1] + 4 * peers.lloyd_max(2)[1] + 1  # of 4, 2 and 0 bits
    assert error == pytest.approx(expected / 3, rel=0.03)
    k = torch.randn(1, 1, 1, 400, 64)
    q, back = k + torch.randn(k.shape), peers.qjl(16, 0, None, k, k)[0]
    assert (q * back).sum() / (q * k).sum() == pytest.approx(1, abs=0.05)

@pytest.mark.parametrize("coder", [coders.iht, coders.lasso])
def test_a_refit_makes_other_coders_better_and_omp_is_ahead(coder):
    D, Y = F.normalize(torch.randn(256, 32), dim=-1), torch.randn(50, 32)
    raw, refit = (relative_error(D, Y, *coder(D, Y, 6, refit=refit)) for refit in (False, True))
    assert (refit <= raw + 1e-5).all() and refit.mean() < raw.mean()
    assert relative_error(D, Y, *omp(D, Y, 6)).mean() < refit.mean()
