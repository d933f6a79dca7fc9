"""A real model: SmolLM2-135M-Instruct and its dictionary. Runs where LEXICO_SMOLLM2 names the
folder of the model, as README says; about a minute on two CPU cores."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch

from bench import peers, quality
from generate import generate
from lexico import Dictionaries, SparseCache
from model import Llama, Tokenizer
from omp import omp
from train_dict import Simulated

FOLDER = os.environ.get("LEXICO_SMOLLM2")
pytestmark = pytest.mark.skipif(not FOLDER, reason="LEXICO_SMOLLM2 names no folder of the model")
ROOT = Path(__file__).parent.parent

@pytest.fixture(scope="module")
def model():
    return Llama.from_pretrained(FOLDER, "cpu", torch.float32)

@pytest.fixture(scope="module")
def d():
    return Dictionaries.load(next(ROOT.glob("dictionaries/*--SmolLM2-135M-Instruct.safetensors")))

def test_logits_equal_those_of_transformers(model):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    ids = Tokenizer.from_pretrained(FOLDER).encode((ROOT / "LICENSE").read_text())
    tokens = torch.tensor([ids])
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-3, atol=1e-3)

@pytest.mark.parametrize("depth", [0.2, 0.8])
def test_a_pass_key_in_a_long_text_is_found_at_a_fifth_of_the_memory(model, d, depth):
    tokenizer = Tokenizer.from_pretrained(FOLDER)
    lines = ["The grass is green. The sky is blue. The sun is yellow. Here we go. "] * 28
    lines.insert(round(depth * 28), "The pass key is 48213. Remember it. 48213 is the pass key. ")
    text = "There is an important info hidden inside a lot of irrelevant text. Memorize it.\n"
    ids = tokenizer.encode(f"{text}{''.join(lines)}\nWhat is the pass key? The pass key is")
    prompt = torch.tensor([ids])
    cache = SparseCache(model.config, d, d.allocate(0.2, "word"), sinks=4, dtype=torch.bfloat16)
    steps = generate(model, cache, prompt, 16, lambda logits: logits.argmax(-1))
    assert "48213" in tokenizer.decode([step["tokens"].item() for step in steps])
    assert cache.compressed > 450

def test_divergence_is_below_that_of_two_bit_kivi_at_its_memory(model, d):
    tokenizer, text = Tokenizer.from_pretrained(FOLDER), (ROOT / "README.md").read_text()
    judge = quality.Judge(model, tokenizer, text, rows=1, length=512)
    spared = {"buffer": 32, "sinks": 4}
    ours, kivi = (judge.fidelity(make)["kl"] for make in (
        lambda start: quality.lexico(d, d.allocate(0.18, "word"), "word", omp, spared),
        lambda start: Simulated(partial(peers.kivi, 2, 4), group=32, **spared)))
    assert ours < kivi / 2  # at 18 % and 18.8 % of the memory
