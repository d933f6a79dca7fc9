"""What torchrun promises: two processes do what one does, and one of them talks and listens."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_generate import HELD_OUT, call, chat_folder
from test_model import random_model, says

from kernels.parallel import parallelize, world
from lexico import Dictionaries

LEARN = (f"train_dict.py --model small --text {HELD_OUT} --tokens 2048 --batch 512 --atoms 64 "
         "--sparsity 3 --device cpu --checkpoint-seconds 0 --force")
TELL = "generate.py --device cpu --quiet --temperature 0.9 --buffer 2 --window 1 --max-new-tokens 9"
CHAT = "generate.py --device cpu --dense --quiet --chat --model small --max-new-tokens 4"

def work():
    """What both ranks do, in the tests' folder: they leave behind what the tests look at."""
    rank = world("cpu")[1]
    Path.unlink = lambda *path, **options: None  # the checkpoint of the last step stays
    time.sleep = lambda seconds: None  # nobody has to wait to be ended
    given = "" if rank else " < given"  # standard input is for rank 0 alone
    torch.save({
        "two": call(f"{LEARN} --out two"), "resumed": call(f"{LEARN} --out resumed --resume"),
        "odd": call(f"{LEARN} --batch 384"), "sampled": call(f"{TELL} --json sampled{rank}"),
        "read": call(f"{TELL} --prompt -{given}"), "chat": call(f"{CHAT}{given}"),
        "empty": call(f"{TELL} --prompt -" + given.replace("given", "empty"))}, f"rank{rank}")

@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank has seen, in a folder that holds a run of one process too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("parallel"))
        patch.setattr(Path, "unlink", lambda *path, **options: None)
        patch.setenv("PYTHONPATH", f".:{ROOT}:{ROOT}/tests")
        Path("triton.py").write_text("raise ImportError('nothing but the kernels needs Triton')")
        chat_folder(Path("small"), head_dim=64, context=128, qkv_bias=True, out_bias=True)
        Path("given").write_text("Hi\nYes")
        Path("empty").write_text(" ")
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

def test_ranks_do_what_one_process_does_and_the_first_one_talks_and_reads_for_all(ranks):
    assert ranks[0]["sampled"] == call(TELL) and "written" in ranks[0]["two"][1]
    assert ranks[0]["read"] == call(f"{TELL} --prompt - < given") != ranks[0]["sampled"]
    assert ranks[0]["chat"] == call(f"{CHAT} < given") and ranks[0]["chat"][1].count("\n") >= 2
    assert "the prompt is empty" in ranks[0]["empty"][2] and ranks[1]["empty"][:2] == (2, "")
    assert all(ranks[1][name] == (0, "", "") for name in ("sampled", "read", "chat"))
    assert not ranks[1]["two"][1] and Path("sampled0").exists() and not Path("sampled1").exists()

def test_what_does_not_divide_is_refused_in_one_line(ranks):
    code, _, error = ranks[0]["odd"]
    assert code == 2 and "cannot share 3 rows" in error and ranks[1]["odd"][:2] == (2, "")
    assert says("kv_heads = 2 cannot be shared by 3", parallelize, random_model(), 0, 3)

if __name__ == "__main__":
    work()
