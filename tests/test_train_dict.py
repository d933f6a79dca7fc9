"""What learning promises: vectors, texts, dictionaries that get better, and nothing that is lost."""

import json
import os
import re
import shutil
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from test_generate import HELD_OUT, TINY, call, refused, start
from test_model import random_model, says

from lexico import DenseCache, Dictionaries
from model import Config, Llama, Tokenizer
from tiny.pretrain import save_pretrained
from train_dict import Text, output_file, vectors

ERROR = re.compile(r"keys ([\d.]+) values")

@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """The folder of a model, the first layer of the embedded one, and of dictionaries "d" that an
    unbroken run learned for it; the run's command without --out, and what it printed."""
    folder, model = tmp_path_factory.mktemp("learned"), Llama.from_pretrained("tiny", "cpu")
    model.config, model.layers = replace(model.config, n_layers=1), model.layers[:1]
    save_pretrained(model, folder)
    shutil.copy(TINY / "tokenizer.json", folder)
    command = (f"train_dict.py --model {folder} --text {HELD_OUT} --tokens 4096 --batch 1024 "
               "--atoms 128 --sparsity 4")
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

@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_a_text_is_the_same_from_every_source_and_its_rows_depend_on_the_seed(tmp_path, kind):
    text = HELD_OUT.read_text()[:20_000]
    foreign = text.replace("\n", "\r\n")
    (tmp_path / "plain").write_text(text)
    if kind == "txt":
        (tmp_path / "a.txt").write_bytes(f"\ufeff{foreign}".encode())
    elif kind == "jsonl":
        (tmp_path / "a.jsonl").write_bytes(f"\ufeff{json.dumps({'text': foreign})}\r\n".encode())
    else:
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"text": [foreign]}), tmp_path / "a.parquet")
    tokenizer = Tokenizer.from_pretrained("tiny")
    plain, same = (Text([tmp_path / name], tokenizer, 32, 0) for name in ("plain", f"a.{kind}"))
    assert plain.digest == same.digest and torch.equal(plain.rows(4, 1), same.rows(4, 1))
    for other in (Text([tmp_path / "plain"], tokenizer, 32, 1).rows(4, 1), plain.rows(4, 2)):
        assert not torch.equal(other, plain.rows(4, 1))
    assert all(tokenizer.decode(row.tolist())[:50] in text[18_000:] for row in plain.rows(4, 1, True))

def test_learning_lowers_the_held_out_error_and_fine_tuning_starts_from_there(learned, tmp_path):
    folder, command, out = learned
    first, last = map(float, ERROR.findall(out))
    assert last < first and "mean" in out
    d = Dictionaries.load(folder / "d.safetensors").check(Config.from_pretrained(folder))
    assert d.metadata["sparsity"] == 4 and d.metadata["text"] == ["held-out.txt"]
    torch.testing.assert_close(d.atoms.norm(dim=-1), torch.ones(2, 1, 128), atol=5e-3, rtol=0)
    command = command.replace("--atoms 128", f"--fine-tune {folder}/d.safetensors")
    assert float(ERROR.findall(call(f"{command} --out {tmp_path}/d")[1])[0]) < first

def test_heads_that_make_one_vector_share_atoms(learned, tmp_path):
    command = learned[1].replace("--sparsity 4", "--sparsity 8")
    code, out, _ = call(f"{command} --heads 2 --out {tmp_path}/d.safetensors")
    d = Dictionaries.load(tmp_path / "d.safetensors").check(Config.from_pretrained(learned[0]))
    assert code == 0 and d.heads == 2 and d.atoms.shape == (2, 1, 128, 128)

# ---- Nothing is lost -----------------------------------------------------------------------------

def test_a_killed_run_resumes_to_what_an_unbroken_one_gives(learned, tmp_path):
    command = f"{learned[1]} --out {tmp_path}/d.safetensors --checkpoint-seconds 0"
    process = start(command)
    while not (tmp_path / "d.safetensors.checkpoint").exists():
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (tmp_path / "d.safetensors").exists()
    shutil.copy(HELD_OUT, tmp_path / "other.txt")
    with open(tmp_path / "other.txt", "a") as file:
        file.write("The end.")
    refused(command, {"": "is of another run", "--resume --tokens 8192": "--tokens 4096",
                      f"--resume --text {tmp_path}/other.txt": "--text"})
    assert call(f"{command} --resume")[0] == 0
    whole, resumed = load_file(learned[0] / "d.safetensors"), load_file(tmp_path / "d.safetensors")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert not (tmp_path / "d.safetensors.checkpoint").exists()

def test_a_disk_that_is_full_at_the_end_leaves_the_checkpoint_and_the_old_file(
        learned, tmp_path, monkeypatch):
    out, real = tmp_path / "d.safetensors", os.replace
    command = f"{learned[1]} --out {out} --checkpoint-seconds 0"

    def full(name):
        def replace(source, target):
            if target.name == name:
                raise OSError(28, "No space left on device")
            real(source, target)
        return replace

    out.write_bytes(b"old")
    refused(command, {"": "exists"})
    monkeypatch.setattr(os, "replace", full(out.name))
    refused(command, {"--force": f"{out}.checkpoint"})
    assert out.read_bytes() == b"old" and {path.name for path in tmp_path.iterdir()} == {
        "d.safetensors", "d.safetensors.checkpoint"}
    monkeypatch.setattr(os, "replace", full(f"{out.name}.checkpoint"))
    code, _, error = call(f"{command} --force --resume")
    assert code == 0 and Dictionaries.load(out)
    code, _, error = call(f"{command} --force")  # a checkpoint is not worth stopping for
    assert code == 0 and "warning: no checkpoint" in error and Dictionaries.load(out)

def test_files_are_written_whole_through_links_and_to_what_is_no_file(tmp_path):
    real, link, fifo = (tmp_path / name for name in ("real", "link", "fifo"))
    real.write_bytes(b"old")
    link.symlink_to(real)
    os.mkfifo(fifo)
    with pytest.raises(KeyError), output_file(link):
        raise KeyError
    with output_file(link) as write:
        assert real.read_bytes() == b"old"
        write(b"new")
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    with output_file(fifo) as write:
        write(b"through")
    assert os.read(reader, 99) == b"through" and real.read_bytes() == b"new" and link.is_symlink()
    for place in (tmp_path, tmp_path / "absent" / "file", real / "file"):
        assert says(f"{place} cannot be written", output_file(place).__enter__)
    assert {path.name for path in tmp_path.iterdir()} == {"real", "link", "fifo"}

def test_bad_input_gets_one_line_and_exit_code_2(learned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, data in (("latin", b"caf\xe9"), ("long", b"word " * 3000), ("r.checkpoint", b"none"),
                       ("a.jsonl", b'{"text": 3}'), ("a.parquet", b"PAR1")):
        (tmp_path / name).write_bytes(data)
    refused("train_dict.py", {
        "--text absent": "No such file", "--text latin": "'latin' cannot be read",
        "--text a.jsonl": "'a.jsonl' cannot be read", "--text a.parquet": "'a.parquet' cannot be read",
        "--text long": "too little text", "--text long --sparsity 65": "--sparsity 65",
        "--text long --atoms 7": "--atoms 7", "--text long --heads 3": "--heads 3",
        "--text long --device abacus": "--device abacus", "--text long --batch 15": "--batch: 15",
        "--text long --fade nan": "--fade", "--text long --out no/d": "no/d.* cannot be written",
        "--text long --fine-tune d --atoms 64": "--atoms", "--text long --out .": "cannot be written",
        f"--text {HELD_OUT} --resume --out d": "absent", f"--text {HELD_OUT} --resume --out r": "damaged",
        f"--text {HELD_OUT} --fine-tune {learned[0]}/d.safetensors": "n_layers = 1, not 6"})
