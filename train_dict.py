"""Learn the dictionaries of a model: one for the keys and one for the values of every layer.

Run the model over text, and all 2 L dictionaries learn at once from the key and value vectors that
pass. Two steps alternate (Engan et al. 1999, the method of optimal directions; Mairal et al. 2010,
its online form). With X a batch of vectors, each a row:

    code:     Z = OMP(X, D)                               s coefficients a row, D fixed
    update:   D = argmin_D || X - Z D ||^2 = (Z^T Z)^-1 Z^T X,   then atoms back to unit norm

The sums A = Z^T Z and B = Z^T X run over all batches seen, old ones fading, so that every update
rests on far more vectors than one batch holds, and the closed form needs no learning rate. An atom
that hardly any vector uses is replaced by a vector that the others serve badly.

    python train_dict.py --text stories.txt --out dictionary.safetensors
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from lexico import LADDER, Dictionaries, default_path
from model import Config, InputError, Llama, Tokenizer, best_device, run_program
from omp import omp, reconstruct, relative_error

HELD_OUT = 0.05  # the last part of every file, never learned from


class Recorder:
    """A cache that keeps nothing but what passes: keys and values (2, L, B, H, T, m)."""

    position = 0

    def __init__(self):
        self.kv = []

    def attend(self, layer, q, k, v):
        self.kv.append(torch.stack((k, v)))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class Probe:
    """A cache in which one dictionary codes what passes, and all else stays as it is."""

    position = 0

    def __init__(self, D, kind, layer, sparsity):
        self.D, self.kind, self.layer, self.sparsity = D, kind, layer, sparsity

    def attend(self, layer, q, k, v):
        kv = [k, v]
        if layer == self.layer:
            x = kv[self.kind]
            codes = omp(self.D, x.flatten(0, 2), self.sparsity)
            kv[self.kind] = reconstruct(self.D, *codes).view_as(x).to(x.dtype)
        return F.scaled_dot_product_attention(q, *kv, is_causal=True, enable_gqa=True)


@torch.inference_mode()
def divergence(model, atoms, rows):
    """Mean KL(full || coded) of the next token over rows (B, T), in nats, when one dictionary of
    atoms (2, L, N, m) codes and all others do not: (2, L, rungs of LADDER)."""
    def predict(cache):
        return model(rows, cache).float().log_softmax(dim=-1)
    p = predict(None)
    return [[[F.kl_div(predict(Probe(D, kind, layer, s)), p, log_target=True, reduction="none")
              .sum(-1).mean().item() for s in LADDER]
             for layer, D in enumerate(layers)] for kind, layers in enumerate(atoms)]


@torch.inference_mode()
def vectors(model, rows):
    """Keys and values of token rows (B, T), all heads of a layer together: (2 L, B T H, m)."""
    recorder = Recorder()
    model(rows, recorder, last_only=True)
    return torch.stack(recorder.kv, dim=1).flatten(2, 4).flatten(0, 1).float()


class Text:
    """Rows of tokens from anywhere in some files; the same ones for the same seed."""

    def __init__(self, paths, tokenizer, row_length):
        self.tokenizer, self.row_length = tokenizer, row_length
        self.files = [read_text(path) for path in paths]
        if sum(map(len, self.files)) < 100 * row_length:
            raise InputError(f"{', '.join(map(str, paths))}: too little text to learn from; "
                             f"give at least {100 * row_length // 1000} kB")

    def rows(self, count, seed, held_out=False):
        """Rows (count, row_length) from the parts to learn from, or from the held-out parts."""
        rng = np.random.default_rng([seed, held_out])
        sizes = np.array([len(data) for data in self.files])
        return torch.tensor([self._row(self.files[i], rng, held_out) for i in
                             rng.choice(len(sizes), count, p=sizes / sizes.sum())])

    def _row(self, data, rng, held_out):
        cut = int(len(data) * (1 - HELD_OUT))
        start, end = (cut, len(data)) if held_out else (0, cut)
        tokens, place = [], start + int(rng.random() * (end - start))
        while len(tokens) < self.row_length:  # a row that reaches the end goes on at the beginning
            piece = data[place:min(place + 8 * self.row_length, end)].decode("utf-8", "ignore")
            tokens += self.tokenizer.encode(piece, bos=not tokens)
            place = start
        return tokens[:self.row_length]


def read_text(path):
    """The bytes of a UTF-8 file, or of the "text" fields of a .jsonl or .parquet file."""
    try:
        if Path(path).suffix == ".parquet":
            import pyarrow.parquet
            return "".join(pyarrow.parquet.read_table(path)["text"].to_pylist()).encode()
        data = Path(path).read_bytes()
        if Path(path).suffix == ".jsonl":
            data = "\n\n".join(json.loads(line)["text"] for line in data.splitlines()).encode()
        data.decode("utf-8")
        return data
    except ImportError:
        raise InputError(f"text '{path}' needs another package: pip install pyarrow") from None
    except UnicodeDecodeError:
        raise InputError(f"text '{path}' is not UTF-8; convert it first") from None
    except OSError as error:
        raise InputError(f"text '{path}': {error.strerror}; give a text or .jsonl file") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"text '{path}': not every line is JSON with a \"text\" field") from None


class Learner:
    """Dictionaries D (M, N, m), M = 2 L, and all that is known to make them better.

    A (M, N, N) and B (M, N, m) are the sums Z^T Z and Z^T X, `used` (M, N) counts each atom's uses,
    `largest` (M,) is the largest coefficient met. All are plain tensors: a checkpoint is a copy.
    """

    def __init__(self, D, sparsity, fade):
        M, N, m = D.shape
        self.sparsity, self.fade = sparsity, fade
        self.state = {"D": D, "A": D.new_zeros(M, N, N), "B": D.new_zeros(M, N, m),
                      "used": D.new_zeros(M, N), "largest": D.new_zeros(M)}

    @torch.inference_mode()
    def step(self, X):
        """Learn from vectors X (M, V, m)."""
        D, A, B, used, largest = self.state.values()
        M, N, m = D.shape
        indices, Z = omp(D, X, self.sparsity)  # (M, V, s)
        residual = X.norm(dim=-1) * relative_error(D, X, indices, Z)  # (M, V)
        largest.copy_(torch.maximum(largest, Z.abs().amax(dim=(1, 2))))
        # The sums. Z stays sparse: a vector adds s^2 numbers to A, and s rows to B.
        for total in (A, B, used):
            total.mul_(self.fade)
        places = torch.arange(0, M * N, N, device=X.device)[:, None, None] + indices  # (M, V, s)
        used.view(-1).index_add_(0, places.flatten(), torch.ones_like(Z).flatten())
        for j in range(self.sparsity):  # one coefficient of all vectors at a time, to save memory
            row, z = places[..., j], Z[..., j, None]  # (M, V), (M, V, 1)
            A.view(-1).index_add_(0, (row[..., None] * N + indices).flatten(), (z * Z).flatten())
            B.view(M * N, m).index_add_(0, row.flatten(), (z * X).flatten(0, 1))
        # The closed form, with a little weight on the atoms as they are: it holds those in place
        # that too few vectors have used yet, and keeps A invertible.
        hold = 0.01 * A.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[:, None, None]  # (M, 1, 1)
        factor = torch.linalg.cholesky(A + hold * torch.eye(N, device=A.device))
        D.copy_(F.normalize(torch.cholesky_solve(B + hold * D, factor), dim=-1))
        # Atoms used less than a twentieth of the average make way for the worst-served vectors.
        dead = used < 0.05 * used.mean(dim=-1, keepdim=True)  # (M, N)
        worst = residual.argsort(dim=-1, descending=True)  # (M, V)
        for i in dead.any(dim=-1).nonzero().flatten().tolist():
            atoms = dead[i].nonzero().flatten()[:X.shape[1]]
            D[i, atoms] = F.normalize(X[i, worst[i, :len(atoms)]], dim=-1)
            A[i, atoms], A[i, :, atoms], B[i, atoms] = 0, 0, 0
            used[i, atoms] = used[i].mean()  # a new atom has time to prove itself
        return dead.sum().item()

    def errors(self, X):
        """Mean relative error of vectors X (M, V, m), for each dictionary (M,)."""
        D = self.state["D"]
        return relative_error(D, X, *omp(D, X, self.sparsity)).mean(dim=-1)


def learn(args, model, tokenizer, settings):
    """Learn as args say: the Learner, its held-out errors (2 L,), and the divergence table."""
    device, row_length = model.norm.weight.device, min(model.config.context, 1024)
    text, count = Text(args.text, tokenizer, row_length), max(1, args.batch // row_length)

    def batch(seed, held_out=False):
        return vectors(model, text.rows(count, seed, held_out).to(device))

    steps, held_out = max(1, round(args.tokens / (count * row_length))), batch(0, held_out=True)
    if args.fine_tune:
        atoms = Dictionaries.load(args.fine_tune, device).check(model.config).atoms.flatten(0, 1)
        args.atoms = atoms.shape[1]
    else:  # atoms start as vectors of the text
        X = torch.cat([batch(seed) for seed in range(-(-args.atoms // held_out.shape[1]))], dim=1)
        atoms = F.normalize(X[:, torch.randperm(X.shape[1])[:args.atoms].to(device)], dim=-1)
    learner, checkpoint = Learner(atoms, args.sparsity, args.fade), f"{args.out}.checkpoint"
    first = step = load_checkpoint(checkpoint, learner, settings) if args.resume else 0
    began = saved = shown = time.time()
    while step < steps:
        replaced = learner.step(batch(1 + step))
        step, now = step + 1, time.time()
        if now - saved > args.checkpoint_seconds and step < steps:
            save_checkpoint(checkpoint, learner, settings, step)
            saved = now
        if now - shown > 5 or step in (first + 1, steps):
            keys, values = learner.errors(held_out).view(2, -1).mean(dim=1).tolist()
            left = (now - began) / (step - first) * (steps - step)
            bar = "#" * (30 * step // steps)
            print(f"[{bar:30}] {step}/{steps}  held-out error keys {keys:.3f} values {values:.3f}  "
                  f"{replaced} atoms replaced  {left:.0f} s left", flush=True)
            shown = now
    # How much each dictionary matters, on text that was learned from.
    atoms = learner.state["D"].view(2, model.config.n_layers, args.atoms, -1)
    harm = divergence(model, atoms, text.rows(2, steps).to(device))
    return learner, learner.errors(held_out), harm


def save_checkpoint(path, learner, settings, step):
    header = {"settings": json.dumps(settings), "step": str(step)}
    save_file(learner.state, f"{path}.part", metadata=header)
    os.replace(f"{path}.part", path)


def load_checkpoint(path, learner, settings):
    """Put a checkpoint's state into learner: the step to go on from."""
    if not os.path.exists(path):
        raise InputError(f"--resume: there is no checkpoint {path}; start without --resume")
    with safe_open(path, "pt") as file:
        was = json.loads(file.metadata()["settings"])
        differing = [f"--{name} {value}" for name, value in was.items() if value != settings[name]]
        if differing:
            raise InputError(f"--resume: {path} was made with {', '.join(differing)}; repeat that, "
                             "or start without --resume")
        for name, tensor in learner.state.items():
            tensor.copy_(file.get_tensor(name))
        return int(file.metadata()["step"])


def wikitext():
    """Paths of WikiText-103's training text, the paper's choice, fetched from the Hub."""
    from huggingface_hub import hf_hub_download
    try:
        return [hf_hub_download("Salesforce/wikitext", repo_type="dataset", filename=(
            f"wikitext-103-raw-v1/train-0000{i}-of-00002.parquet")) for i in range(2)]
    except Exception as error:  # whatever keeps the Hub from us, the way out is the same
        raise InputError("without --text, WikiText-103 comes from the Hub, but: "
                         f"{str(error).strip().splitlines()[0]}; give --text FILE") from None


def error_table(keys, values):
    """Mean relative error of each dictionary on held-out text, as Markdown."""
    rows = [*enumerate(zip(keys, values)), ("mean", (np.mean(keys), np.mean(values)))]
    return "| layer | keys | values |\n|---|---|---|\n" + "\n".join(
        f"| {layer} | {key:.3f} | {value:.3f} |" for layer, (key, value) in rows)


CARD = """---
library_name: lexico
{base}tags: [kv-cache-compression, sparse-coding]
---
# Lexico dictionaries for {model}

For a KV cache of sparse codes ([Lexico](https://arxiv.org/abs/2412.08890)): for the keys and for
the values of each of {n_layers} layers {atoms} atoms of {head_dim} numbers. Learned from {tokens}
tokens of {text}, with {sparsity} atoms a vector.

    python generate.py --model {model} --dictionary OWNER/{name}

Mean relative error on held-out text, with as many atoms:

{errors}
"""


def save_folder(d, folder):
    """Write a folder that can be uploaded: dictionaries and a README.md that the Hub can read.

    It appears when it is whole. Its licence is left to whoever shares it.
    """
    part, about = Path(f"{folder}.part"), {**d.shape, **d.metadata}
    part.mkdir(parents=True, exist_ok=True)
    d.save(part / "dictionary.safetensors")
    # Only a Hub id may be a base_model.
    hub_id = about["model"].count("/") == 1 and not Path(about["model"]).exists()
    about.update(base=f"base_model: {about['model']}\n" if hub_id else "", atoms=d.n_atoms,
                 text=", ".join(about["text"]), name=folder.name,
                 errors=error_table(about["key_errors"], about["value_errors"]))
    (part / "README.md").write_text(CARD.format(**about), encoding="utf-8")
    os.replace(part, folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--text", nargs="+", metavar="FILE",
                        help="text or .jsonl files; default: WikiText-103 from the Hub")
    parser.add_argument("--model", default="tiny", help='a folder, a Hub id, or "tiny" (default)')
    parser.add_argument("--atoms", type=int, default=1024, help="atoms of a dictionary (1024)")
    parser.add_argument("--sparsity", type=int, default=8, help="coefficients a vector (8)")
    parser.add_argument("--tokens", type=int, default=100_000, help="tokens to learn from (100000)")
    parser.add_argument("--batch", type=int, default=2048, help="tokens of a step (2048)")
    parser.add_argument("--fade", type=float, default=0.9, help="what a step leaves of old sums")
    parser.add_argument("--out", help="FILE.safetensors, or a new folder, to share, "
                        "with a model card (default: MODEL.dictionary.safetensors)")
    parser.add_argument("--fine-tune", metavar="DICT", help="start from these dictionaries")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--checkpoint-seconds", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="default: the best there is")
    args = parser.parse_args()
    config = Config.from_pretrained(args.model)
    for name, least, most in (("sparsity", 1, config.head_dim), ("atoms", config.head_dim, 32768),
                              ("tokens", 1, 10**12), ("batch", 1, 10**9)):
        if not least <= getattr(args, name) <= most:
            raise InputError(f"--{name} {getattr(args, name)} is outside {least} .. {most}")
    args.out = Path(args.out or default_path(args.model))
    is_folder = args.out.suffix != ".safetensors"
    if is_folder and args.out.exists():
        raise InputError(f"--out {args.out} exists; name a new folder, or a FILE.safetensors")
    args.text = args.text or wikitext()
    settings = {name: value for name, value in vars(args).items()
                if name not in ("out", "resume", "checkpoint_seconds", "device")}
    torch.manual_seed(args.seed)
    device = torch.device(args.device or best_device())
    dtype = torch.float32 if device.type == "cpu" else None
    model = Llama.from_pretrained(args.model, device, dtype)
    began = time.time()
    learner, errors, harm = learn(args, model, Tokenizer.from_pretrained(args.model), settings)
    keys, values = errors.view(2, -1).tolist()
    # Stored coefficients get head room: the largest one met becomes 64 of FP8's 448.
    scale = (learner.state["largest"] / 64).clamp(min=1e-8).view(2, -1).cpu()
    atoms = learner.state["D"].view(2, -1, args.atoms, config.head_dim).cpu()
    names = [Path(path).name for path in args.text]
    learned = Dictionaries(
        atoms, scale, config, model=str(args.model), sparsity=args.sparsity, text=names,
        tokens=args.tokens, key_errors=keys, value_errors=values, divergence=harm)
    save_folder(learned, args.out) if is_folder else learned.save(args.out)
    Path(f"{args.out}.checkpoint").unlink(missing_ok=True)
    print(f"\nrelative error on held-out text\n{error_table(keys, values)}")
    print(f"{args.out} written after {time.time() - began:.0f} s")


if __name__ == "__main__":
    run_program(main)
