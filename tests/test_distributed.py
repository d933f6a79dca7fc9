"""What torchrun promises: two processes do what one does, and one of them talks."""

import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_lexico import dictionaries
from test_model import random_model
from test_programs import HELD_OUT, ROOT, TINY, call

from lexico import DenseCache, Dictionaries, SparseCache
from model import InputError, Llama, parallelize, world

LEARN = (f"train_dict.py --model small --text {HELD_OUT} --tokens 2048 --batch 512 --atoms 64 "
         "--sparsity 3 --device cpu --checkpoint-seconds 0")
SAMPLE = "generate.py --device cpu --quiet --temperature 0.9 --buffer 8 --max-new-tokens 12"


def logits(rank, ranks):
    """Of a prompt and then of tokens one by one, through a dense and a sparse cache."""
    model = random_model(dim=48, n_layers=3, n_heads=6, head_dim=16, qkv_bias=True, out_bias=True)
    model, parts = parallelize(model, rank, ranks), torch.arange(40)[None].split([20] + [1] * 20, 1)
    caches = (DenseCache(model.config, device="cpu"),
              SparseCache(model.config, dictionaries(), 3, 4, coding="float32"))
    return [torch.cat([model(part, cache) for part in parts], dim=1) for cache in caches]


def work():
    """What both ranks do, in the tests' folder: they leave behind what the tests look at."""
    _, rank, ranks = world("cpu")
    Path.unlink = lambda *path, **options: None  # the checkpoint of the step before the last stays
    time.sleep = lambda seconds: None  # nobody has to wait to be ended
    torch.save({
        "two": call(f"{LEARN} --out two"), "resumed": call(f"{LEARN} --out resumed --resume"),
        "odd": call(f"{LEARN} --batch 384"), "sampled": call(f"{SAMPLE} --json sampled{rank}"),
        "logits": logits(rank, ranks),
        "random": Llama.random(TINY, "cpu", None, rank, ranks).layers[0].self_attn.k_proj.weight,
    }, f"rank{rank}")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank has seen, in a folder that holds a run of one process too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("distributed"))
        patch.setattr(Path, "unlink", lambda *path, **options: None)
        patch.setenv("PYTHONPATH", str(ROOT))
        config = replace(TINY, dim=64, ffn_dim=64, n_layers=2, context=128)
        Llama.random(config, "cpu").save_pretrained("small")
        shutil.copy(ROOT / "tiny" / "tokenizer.json", "small")
        assert call(f"{LEARN} --out one")[0] == 0
        shutil.copy("one.checkpoint", "resumed.checkpoint")
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                        "--nproc-per-node", "2", __file__], check=True, timeout=100)
        yield [torch.load(f"rank{rank}") for rank in range(2)]


def test_two_ranks_learn_what_one_does_and_each_goes_on_from_the_others_checkpoint(ranks):
    (*one, sums), (*two, sums_of_two) = map(torch.load, ("one.checkpoint", "two.checkpoint"))
    assert one == two  # the step and the settings
    torch.testing.assert_close(sums_of_two, sums, rtol=1e-4, atol=1e-4)
    shutil.copy("two.checkpoint", "back.checkpoint")
    assert call(f"{LEARN} --out back --resume")[0] == 0
    one, *others = ([d.atoms, d.scale, torch.tensor(d.metadata["divergence"]["kl"])]
                    for d in map(Dictionaries.load, ("one", "two", "resumed", "back")))
    for other in others:
        torch.testing.assert_close(other, one, rtol=2**-7, atol=1e-4)  # a bit of bfloat16


def test_ranks_share_a_model_and_each_has_the_logits_of_one_process(ranks):
    for rank in ranks:
        torch.testing.assert_close(rank["logits"], logits(0, 1), rtol=1e-4, atol=1e-4)
        assert rank["random"].shape == (64, 384)  # half of the keys' weights


def test_ranks_sample_what_one_process_does_and_the_first_one_talks(ranks):
    assert ranks[0]["sampled"] == call(SAMPLE) and ranks[1]["sampled"] == (0, "", "")
    assert "written" in ranks[0]["two"][1] and not ranks[1]["two"][1]
    assert Path("sampled0").exists() and not Path("sampled1").exists()


def test_what_does_not_divide_is_refused_in_one_line(ranks):
    code, _, error = ranks[0]["odd"]
    assert code == 2 and "cannot share 3 rows" in error and error.count("\n") == 1
    assert ranks[1]["odd"] == (2, "", "")
    with pytest.raises(InputError, match="kv_heads = 2 cannot be shared by 3"):
        parallelize(random_model(), 0, 3)


if __name__ == "__main__":
    with torch.inference_mode():
        work()
