"""What torchrun promises: two processes do what one does, and one of them talks."""

import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_lexico import dictionaries
from test_model import random_model
from test_programs import HELD_OUT, ROOT, TINY, call

from lexico import DenseCache, Dictionaries, SparseCache
from model import Llama, parallelize, world

LEARN = (f"train_dict.py --model small --text {HELD_OUT} --tokens 2048 --batch 512 --atoms 64 "
         "--sparsity 3 --device cpu")
SAMPLE = "generate.py --device cpu --quiet --temperature 0.9 --buffer 8 --max-new-tokens 12"
SHAPE = dict(dim=48, n_layers=3, n_heads=6, head_dim=16, qkv_bias=True, out_bias=True)


def learn(options):
    """Run train_dict.py and keep its last checkpoint, of the step before the last."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", lambda path, missing_ok: None)
        return call(f"{LEARN} --checkpoint-seconds 0 {options}")


def logits(rank, ranks):
    """Of a prompt and then of tokens one by one, through a dense and a sparse cache."""
    model, tokens = parallelize(random_model(**SHAPE), rank, ranks), torch.arange(40)[None]
    caches = (DenseCache(model.config, device="cpu"),
              SparseCache(model.config, dictionaries(), 3, 4, coding="float32"))
    return [torch.cat([model(part, cache) for part in tokens.split([20] + [1] * 20, dim=1)], dim=1)
            for cache in caches]


def work():
    """What both ranks do, in the tests' folder: they leave behind what the tests look at."""
    _, rank, ranks = world("cpu")
    time.sleep = lambda seconds: None  # nobody has to wait to be ended
    torch.save({
        "two": learn("--out two"), "resumed": learn("--out resumed --resume"),
        "sampled": call(f"{SAMPLE} --json sampled{rank}"),
        "odd rows": call(f"{LEARN} --batch 384"),
        "odd heads": call("generate.py --device cpu --model odd --dense"),
        "logits": logits(rank, ranks),
        "random": Llama.random(TINY, "cpu", None, rank, ranks).layers[0].self_attn.k_proj.weight,
    }, f"rank{rank}")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank has seen, in a folder that holds a run of one process too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("distributed"))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(ROOT))
        for name, kv_heads in (("small", 2), ("odd", 1)):
            config = replace(TINY, dim=64, ffn_dim=64, n_layers=2, context=128, kv_heads=kv_heads)
            Llama.random(config, "cpu").save_pretrained(name)
            shutil.copy(ROOT / "tiny" / "tokenizer.json", name)
        assert learn("--out one")[0] == 0
        shutil.copy("one.checkpoint", "resumed.checkpoint")
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                        "--nproc-per-node", "2", __file__], check=True, timeout=100)
        yield [torch.load(f"rank{rank}") for rank in range(2)]


def test_two_ranks_learn_what_one_does(ranks):
    assert [rank["two"][0] for rank in ranks] == [0, 0]
    torch.testing.assert_close(load_file("two.checkpoint"), load_file("one.checkpoint"),
                               rtol=1e-4, atol=1e-4)


def test_a_checkpoint_goes_on_with_another_number_of_ranks(ranks):
    shutil.copy("two.checkpoint", "back.checkpoint")
    assert ranks[0]["resumed"][0] == learn("--out back --resume")[0] == 0
    one = Dictionaries.load("one")
    for d in map(Dictionaries.load, ("two", "resumed", "back")):
        torch.testing.assert_close(d.atoms, one.atoms, rtol=2**-7, atol=1e-4)  # a bit of bfloat16
        torch.testing.assert_close(d.scale, one.scale, rtol=1e-4, atol=1e-4)
        for name in ("key_errors", "value_errors", "divergence"):
            parts = (torch.tensor(of.metadata[name]) for of in (d, one))
            torch.testing.assert_close(*parts, rtol=1e-4, atol=1e-4)


def test_every_rank_has_the_logits_of_one_process(ranks):
    for rank in ranks:
        torch.testing.assert_close(rank["logits"], logits(0, 1), rtol=1e-4, atol=1e-4)


def test_ranks_sample_what_one_process_does_and_the_first_one_talks(ranks):
    assert ranks[0]["sampled"] == call(SAMPLE) and ranks[1]["sampled"] == (0, "", "")
    assert "written" in ranks[0]["two"][1] and not ranks[1]["two"][1]
    assert Path("sampled0").exists() and not Path("sampled1").exists()


def test_what_does_not_divide_is_refused_in_one_line(ranks):
    for name, words in (("odd rows", "cannot share 3 rows"), ("odd heads", "kv_heads = 1")):
        (code, _, error), (code_1, _, error_1) = (rank[name] for rank in ranks)
        assert code == code_1 == 2 and words in error and error.count("\n") == 1 and not error_1


def test_a_random_model_is_made_in_shares(ranks):
    assert all(rank["random"].shape == (64, 384) for rank in ranks)


if __name__ == "__main__":
    with torch.inference_mode():
        work()
