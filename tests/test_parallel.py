"""What torchrun promises: two processes do what one does, and one of them talks and listens."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_generate import HELD_OUT, ROOT, TEMPLATES, call
from test_lexico import dictionaries
from test_model import model_folder, random_model, says

from kernels.parallel import parallelize, world
from lexico import DenseCache, Dictionaries, SparseCache

LEARN = (f"train_dict.py --model small --text {HELD_OUT} --tokens 2048 --batch 512 --atoms 64 "
         "--sparsity 3 --device cpu --checkpoint-seconds 0 --force")
SAMPLE = "generate.py --device cpu --quiet --temperature 0.9 --buffer 8 --max-new-tokens 12"
CHAT = "generate.py --device cpu --dense --quiet --chat --model small --max-new-tokens 4"

def logits(rank, ranks):
    """Of a prompt and then of tokens one by one, through a dense and a sparse cache."""
    model = random_model(dim=48, n_layers=3, n_heads=6, head_dim=16, qkv_bias=True, out_bias=True)
    model, parts = parallelize(model, rank, ranks), torch.arange(40)[None].split([20] + [1] * 20, 1)
    caches = (DenseCache(model.config, device="cpu"),
              SparseCache(model.config, dictionaries(), 3, 4, coding="fp8"))
    return [torch.cat([model(part, cache) for part in parts], dim=1) for cache in caches]

def listen(command, given, rank=0):
    """Run a command that reads standard input, which other ranks had better not touch."""
    Path("stdin").write_text(given)
    sys.stdin = open("stdin") if rank == 0 else None
    return call(command)

def work():
    """What both ranks do, in the tests' folder: they leave behind what the tests look at."""
    _, rank, ranks = world("cpu")
    Path.unlink = lambda *path, **options: None  # the checkpoint of the last step stays
    time.sleep = lambda seconds: None  # nobody has to wait to be ended
    torch.save({
        "two": call(f"{LEARN} --out two"), "resumed": call(f"{LEARN} --out resumed --resume"),
        "odd": call(f"{LEARN} --batch 384"), "sampled": call(f"{SAMPLE} --json sampled{rank}"),
        "read": listen(f"{SAMPLE} --prompt -", "The dog", rank), "logits": logits(rank, ranks),
        "empty": listen(f"{SAMPLE} --prompt -", " ", rank), "chat": listen(CHAT, "Hi\nYes", rank),
    }, f"rank{rank}")

@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank has seen, in a folder that holds a run of one process too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("parallel"))
        patch.setattr(Path, "unlink", lambda *path, **options: None)
        patch.setattr(sys, "stdin", None)
        patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT}/tests")
        shape = dict(vocab_size=4096, dim=64, n_heads=6, head_dim=64, ffn_dim=64, context=128)
        template = {"chat_template": json.loads(TEMPLATES)["plain"]}
        Path(model_folder("small", random_model(**shape)), "tokenizer_config.json").write_text(
            json.dumps(template))
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
        torch.testing.assert_close(rank["logits"], logits(0, 1), rtol=1e-3, atol=1e-3)

def test_ranks_do_what_one_process_does_and_the_first_one_talks_and_reads_for_all(ranks):
    assert ranks[0]["sampled"] == call(SAMPLE) and "written" in ranks[0]["two"][1]
    assert ranks[0]["read"] == listen(f"{SAMPLE} --prompt -", "The dog") != ranks[0]["sampled"]
    assert ranks[0]["chat"] == listen(CHAT, "Hi\nYes") and ranks[0]["chat"][1].count("\n") >= 2
    assert "the prompt is empty" in ranks[0]["empty"][2] and ranks[1]["empty"][:2] == (2, "")
    assert all(ranks[1][name] == (0, "", "") for name in ("sampled", "read", "chat"))
    assert not ranks[1]["two"][1] and Path("sampled0").exists() and not Path("sampled1").exists()

def test_what_does_not_divide_is_refused_in_one_line(ranks):
    code, _, error = ranks[0]["odd"]
    assert code == 2 and "cannot share 3 rows" in error and ranks[1]["odd"][:2] == (2, "")
    assert says("kv_heads = 2 cannot be shared by 3", parallelize, random_model(), 0, 3)

if __name__ == "__main__":
    with torch.inference_mode():
        work()
