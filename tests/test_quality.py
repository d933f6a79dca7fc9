"""What compression costs, on a small slice: the claims of quality.py, and that it is real."""

import pytest
import torch

import quality
from lexico import Dictionaries, SparseCache
from model import Llama, Tokenizer


@pytest.fixture(scope="module")
def judge():
    model = Llama.from_pretrained("tiny", "cpu", torch.float32)
    text = (quality.ROOT / "tiny" / "held-out.txt").read_text()
    tokenizer = Tokenizer.from_pretrained("tiny")
    return quality.Judge(model, tokenizer, text, rows=1, length=512, facts=12)


@pytest.fixture(scope="module")
def make(judge):
    """start -> Simulated, for a method of quality.py by its name."""
    d = Dictionaries.load(Dictionaries.find("tiny"))
    table = quality.methods(judge.model.config, [d])
    return lambda name: table[name][1]


@pytest.mark.parametrize("coding", ["fp8", "word"])
def test_the_simulation_gives_what_the_real_cache_gives(judge, coding):
    d, config = Dictionaries.load(Dictionaries.find("tiny")), judge.model.config
    tokens = judge.rows[:, :80]
    cache = SparseCache(config, d, 4, buffer=8, coding=coding)
    with torch.inference_mode():
        real = torch.cat([judge.model(token, cache) for token in tokens.split(1, dim=1)], dim=1)
        simulated = quality.Simulated(quality.lexico(config, d, 4, coding=coding), buffer=9)
        torch.testing.assert_close(judge.model(tokens, simulated), real, rtol=1e-3, atol=1e-2)


def test_divergence_falls_as_sparsity_grows_and_is_below_two_bit_kivi_at_its_memory(judge, make):
    kl = {name: judge.fidelity(make(name))["kl"] for name in (
        "Lexico word N=1024 s=2", "Lexico word N=1024 s=4", "Lexico word N=1024 s=8",
        "Lexico word N=1024 s=11", "KIVI 2 bit", "dense")}  # 23 of 128 bytes against 24
    order = list(kl.values())
    assert order[0] > order[1] > order[2] > order[3] and kl["dense"] < 1e-6
    assert kl["Lexico word N=1024 s=11"] < kl["KIVI 2 bit"]


def test_facts_are_recalled_through_the_cache_and_lost_with_evicted_tokens(judge, make):
    dense, sparse, evicted = (judge.recall(make(name)) for name in (
        "dense", "Lexico word N=1024 s=12", "SnapKV 20%"))
    assert dense >= 0.9 and sparse >= dense - 0.02 and evicted < dense - 0.2
