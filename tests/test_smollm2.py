"""A real model: SmolLM2-135M-Instruct and its dictionary. Runs where LEXICO_SMOLLM2 names the
folder of the model, as README says; about a minute on two CPU cores."""

import os
import re

import pytest
import torch
from conftest import ROOT
from test_generate import call

from bench.needle import HAY, TEXT
from model import Llama, Tokenizer

FOLDER = os.environ.get("LEXICO_SMOLLM2")
pytestmark = pytest.mark.skipif(not FOLDER, reason="LEXICO_SMOLLM2 names no folder of the model")
WITH = (f"--model {FOLDER} --dictionary "
        f"{ROOT}/dictionaries/HuggingFaceTB--SmolLM2-135M-Instruct.safetensors")

def test_logits_equal_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    ids = Tokenizer.from_pretrained(FOLDER).encode((ROOT / "LICENSE").read_text())
    tokens, ours = torch.tensor([ids]), Llama.from_pretrained(FOLDER, "cpu", torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-3, atol=1e-3)

@pytest.mark.parametrize("depth", [0.2, 0.8])
def test_a_pass_key_in_a_long_text_is_found_at_a_fifth_of_the_memory(depth, tmp_path):
    above = round(28 * depth)
    (tmp_path / "prompt").write_text(TEXT.format(HAY * above, 48213, HAY * (28 - above)))
    out = call(f"generate.py {WITH} --prompt-file {tmp_path}/prompt --max-new-tokens 16")[1]
    assert "48213" in out.rpartition("What is the pass key?")[2]

def test_divergence_is_below_that_of_two_bit_kivi_at_its_memory():
    out = call(f"bench/quality.py {WITH} --text {ROOT}/README.md --rows 1 --length 512 "
               "--only 'KIVI 2 bit|auto:18%'")[1]
    kivi, ours = map(float, re.findall(r"% +([\d.]+) +[\d.]+% ", out))
    assert ours < kivi / 2  # at 18 % and 18.8 % of the memory
