"""What learning promises: dictionaries that get better, from any text, and nothing is lost."""

import json
import os
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_generate import HELD_OUT, call, refused, start
from test_model import model_folder, random_model

from lexico import DenseCache, Dictionaries
from model import Config, Llama, Tokenizer
from train_dict import Learner, Text, save_checkpoint, vectors

ERROR = re.compile(r"keys ([\d.]+) values")

@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """The folder of a model, the first layer of the embedded one, and of dictionaries "d" that an
    unbroken run learned for it; the run's command without --out, and what it printed."""
    folder, model = tmp_path_factory.mktemp("learned"), Llama.from_pretrained("tiny", "cpu")
    model.config, model.layers = replace(model.config, n_layers=1, context=128), model.layers[:1]
    command = (f"train_dict.py --model {model_folder(folder, model)} --text {HELD_OUT} --sparsity 4"
               " --tokens 2048 --batch 512 --atoms 128 --checkpoint-seconds 0")
    code, out, _ = call(f"{command} --out {folder}/d.safetensors")
    assert code == 0
    return folder, command, out

@pytest.mark.parametrize("heads", [1, 2])
def test_vectors_are_the_keys_and_values_that_a_cache_holds(heads):
    model, rows = random_model(), torch.randint(0, 300, (2, 9))
    cache = DenseCache(model.config, batch=2, device="cpu")
    model(rows, cache)
    kv = cache.kv.unflatten(3, (-1, heads)).transpose(4, 5)  # (2, L, B, H / heads, T, heads, m)
    assert torch.equal(vectors(model, rows, heads), kv.flatten(5).flatten(2, 4).flatten(0, 1))

def test_a_text_is_the_same_from_every_source_and_rows_depend_on_the_seed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, tokenizer = HELD_OUT.read_text()[:19_999] + "\n", Tokenizer.from_pretrained("tiny")
    foreign, parquet = text.replace("\n", "\r\n"), pytest.importorskip("pyarrow.parquet")
    documents, lines = foreign.split("\r\n\r\n"), foreign.splitlines(keepends=True)
    for name, rows in (("a", [foreign]), ("b", documents), ("c", lines)):
        parquet.write_table(parquet.core.pa.table({"text": rows}), f"{name}.parquet")
    for name, data in (("plain", text), ("a.txt", f"\ufeff{foreign}"),
                       ("a.jsonl", f"\ufeff{json.dumps({'text': foreign})}\r\n")):
        Path(name).write_bytes(data.encode())
    one, *same = (Text([name], tokenizer, 32, 0) for name in ("plain", *os.listdir()))
    assert len(same) == 6 and {each.digest for each in same} == {one.digest}
    for rows in Text(["plain"], tokenizer, 32, 1).rows(4, 1), one.rows(4, 2), one.rows(4, 1, True):
        assert not torch.equal(rows, one.rows(4, 1))
    for held_out, part in ((True, text[18_900:]), (False, text[:19_100])):
        starts = [tokenizer.decode(row.tolist())[:25] for row in one.rows(40, 1, held_out)]
        assert sum(start in part for start in starts) >= 38  # others go on at the beginning

def test_learning_lowers_the_held_out_error_and_fine_tuning_starts_from_there(learned, tmp_path):
    folder, command, out = learned
    first, last = map(float, ERROR.findall(out))
    assert last < first and "mean" in out
    d = Dictionaries.load(folder / "d.safetensors").check(Config.from_pretrained(folder))
    assert d.metadata["sparsity"] == 4 and d.metadata["text"] == ["held-out.txt"]
    torch.testing.assert_close(d.atoms.norm(dim=-1), torch.ones(2, 1, 128), atol=5e-3, rtol=0)
    tuned = command.replace("--atoms 128", f"--fine-tune {folder}/d.safetensors")
    assert float(ERROR.findall(call(f"{tuned} --out {tmp_path}/d")[1])[0]) < first
    assert call(f"{command} --heads 2 --out {tmp_path}/wide.safetensors")[0] == 0
    assert Dictionaries.load(tmp_path / "wide.safetensors").atoms.shape == (2, 1, 128, 128)

def test_an_atom_that_serves_none_makes_way_for_a_vector():
    X = F.pad(torch.randn(1, 300, 7), (1, 0))  # none has a part along the first axis
    D = torch.cat((F.normalize(X[:, :15], dim=-1), torch.eye(8)[None, :1]), dim=1)
    learner = Learner(D, 2, fade=0.9)
    assert learner.step(X) == 1
    assert (F.normalize(X[0], dim=-1) @ learner.state["D"][0, 15]).max() > 0.999

def test_vectors_of_zero_keep_no_atom():
    def vectors():  # of which every other one is 0, as of a head that is pruned
        return torch.randn(1, 400, 8) * (torch.arange(400) % 2)[:, None]

    learner = Learner(F.normalize(vectors()[:, :32], dim=-1), 3, fade=0.9)
    for _ in range(40):
        learner.step(vectors())
    torch.testing.assert_close(learner.state["D"].norm(dim=-1), torch.ones(1, 32))

# ---- Nothing is lost -----------------------------------------------------------------------------

def test_neither_a_kill_nor_a_full_disk_loses_anything(learned, tmp_path, monkeypatch, capsys):
    out, checkpoint = tmp_path / "d.safetensors", tmp_path / "d.safetensors.checkpoint"
    command, changed, full = f"{learned[1]} --out {out}", tmp_path / "changed.txt", [out]
    process, real = start(command), os.replace
    while not checkpoint.exists():
        time.sleep(0.01)
    process.kill()
    process.communicate()
    changed.write_text(HELD_OUT.read_text() + "The end.")
    out.write_bytes(b"old")

    def replace(source, target):
        if target in full:
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    for options, words in (("--tokens 4096", "--tokens 2048"), (f"--text {changed}", "--text"),
                           ("", f"{out} cannot be written .*{checkpoint}")):
        refused(f"{command} --force --resume {options}", words)
    assert out.read_bytes() == b"old" and full.pop() == out
    assert call(f"{command} --force --resume")[0] == 0 and not checkpoint.exists()
    torch.testing.assert_close(load_file(out), load_file(learned[0] / out.name), rtol=0, atol=0)
    save_checkpoint(tmp_path / "absent/checkpoint", 1)  # which is not worth stopping for
    assert "warning: no checkpoint" in capsys.readouterr().err
