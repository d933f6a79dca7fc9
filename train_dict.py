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
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from lexico import Dictionaries, default_path
from model import Config, InputError, Llama, Tokenizer, run_program, world
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


class Simulated:
    """A cache for whole texts that attends as decoding would: every query finds what is older than
    the buffer as compression left it. compress(layer, q, k, v) gives

        group (tokens that are coded together), k and v as decoded, and kept (..., T), what eviction
        leaves of the tokens, or None for all,

    or None where nothing is compressed. Layers see what the layers below made of their input, so
    errors compound. buffer: newest tokens that stay as they are. start: the first query that finds
    anything coded.
    """

    position = 0

    def __init__(self, compress=None, buffer=32, start=0):
        self.compress, self.buffer, self.start = compress, buffer, start

    def attend(self, layer, q, k, v):
        B, heads, T, m = q.shape
        q, k, v = q.view(B, k.shape[1], -1, T, m), k[:, :, None], v[:, :, None]  # (B, H, G, T, m)
        compressed = self.compress and self.compress(layer, q, k, v)
        t = torch.arange(T, device=q.device)
        scores, unseen = q @ k.mT, t > t[:, None]  # (B, H, G, T, T)
        if not compressed:
            p = (scores / m**0.5).masked_fill(unseen, -torch.inf).softmax(-1)
            return (p @ v).view(B, heads, T, m)
        group, k_hat, v_hat, kept = compressed
        leaves = (t // group + 1) * group - 1 + self.buffer  # a group leaves the buffer as a whole
        old = (t[:, None] >= leaves) & (t[:, None] >= self.start)  # (T, T)
        scores = torch.where(old, q @ k_hat.mT, scores) / m**0.5
        if kept is not None:
            unseen = unseen | old & ~kept
        p = scores.masked_fill(unseen, -torch.inf).softmax(-1)
        return ((p * ~old) @ v + (p * old) @ v_hat).view(B, heads, T, m)


def probed(m):
    """The two sparsities at which divergence is measured."""
    return [-(-m * i // 64) for i in (4, 15)]


@torch.inference_mode()
def divergence(model, atoms, first, rows, sparsities):
    """What each dictionary alone costs: mean KL(full || coded) of the next token, in nats, over
    rows (R, T) when one dictionary codes and nothing else does: (n, sparsities), for atoms
    (n, N, m), from number `first` on."""
    full = [model(row[None], Simulated()).float().log_softmax(dim=-1) for row in rows]

    def harm(D, kind, layer, s):
        def compress(at, q, k, v):
            if at != layer:
                return None
            kv = [k, v]
            x = kv[kind]
            kv[kind] = reconstruct(D, *omp(D, x.flatten(0, 3), s)).view_as(x).to(x.dtype)
            return 1, *kv, None
        coded = [model(row[None], Simulated(compress)).float().log_softmax(-1) for row in rows]
        return sum(F.kl_div(*pair, log_target=True, reduction="sum")
                   for pair in zip(coded, full)) / rows.numel()

    harms = [harm(D, *divmod(i, model.config.n_layers), s)
             for i, D in enumerate(atoms, first) for s in sparsities]
    return torch.stack(harms).view(len(atoms), -1)


@torch.inference_mode()
def vectors(model, rows):
    """Keys and values of token rows (B, T), all heads of a layer together: (2 L, B T H, m)."""
    recorder = Recorder()
    model(rows, recorder, last_only=True)
    return torch.stack(recorder.kv, dim=1).flatten(2, 4).flatten(0, 1).float()


def exchange(X, ranks):
    """From vectors of all dictionaries, of this rank's rows of text (M, V, m), to those of this
    rank's dictionaries, of all rows: (M / ranks, ranks V, m)."""
    if ranks == 1:
        return X
    out = torch.empty_like(X)
    dist.all_to_all_single(out, X)
    return out.unflatten(0, (ranks, -1)).transpose(0, 1).flatten(1, 2)


def gather(x, ranks):
    """The x of all ranks, one after the other along the first dimension."""
    if ranks == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(ranks)]
    dist.all_gather(parts, x)
    return torch.cat(parts)


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
        return dead.sum(dim=-1)  # (M,)

    def errors(self, X):
        """Mean relative error of vectors X (M, V, m), for each dictionary (M,)."""
        D = self.state["D"]
        return relative_error(D, X, *omp(D, X, self.sparsity)).mean(dim=-1)


def learn(args, model, tokenizer, settings):
    """Learn as args say: atoms (2 L, N, m), their largest coefficients and held-out errors (2 L,),
    and the divergence table (2 L, 2).

    Ranks share the work twice: each runs the model over its rows of a batch, and then, once all
    vectors have gone where they belong, learns its dictionaries from the vectors of all rows. A
    dictionary is learned in one place, so that any number of ranks gives the same.
    """
    rank, ranks, total = args.rank, args.ranks, 2 * model.config.n_layers
    device, row_length = model.norm.weight.device, min(model.config.context, 1024)
    text, count = Text(args.text, tokenizer, row_length), max(1, args.batch // row_length)
    if count % ranks or total % ranks:
        raise InputError(f"{ranks} processes cannot share {count} rows of {row_length} tokens and "
                         f"{total} dictionaries evenly; change --batch or --nproc-per-node")
    mine = slice(total // ranks * rank, total // ranks * (rank + 1))

    def batch(seed, held_out=False):
        rows = text.rows(count, seed, held_out).chunk(ranks)[rank]
        return exchange(vectors(model, rows.to(device)), ranks)

    def clock():  # one for all, for it decides what they do together
        return gather(torch.tensor([time.time()], dtype=torch.float64), ranks)[0].item()

    steps, held_out = max(1, round(args.tokens / (count * row_length))), batch(0, held_out=True)
    if args.fine_tune:
        atoms = Dictionaries.load(args.fine_tune, device).check(model.config).atoms
        args.atoms, atoms = atoms.shape[2], atoms.flatten(0, 1)[mine]
    else:  # atoms start as vectors of the text
        X = torch.cat([batch(seed) for seed in range(-(-args.atoms // held_out.shape[1]))], dim=1)
        atoms = F.normalize(X[:, torch.randperm(X.shape[1])[:args.atoms].to(device)], dim=-1)
    learner, checkpoint = Learner(atoms, args.sparsity, args.fade), f"{args.out}.checkpoint"
    first = step = load_checkpoint(checkpoint, learner, settings, mine) if args.resume else 0
    began = saved = shown = clock()
    while step < steps:
        replaced = learner.step(batch(1 + step))  # (2 L / ranks,)
        step, now = step + 1, clock()
        if now - saved > args.checkpoint_seconds and step < steps:
            state = {name: gather(part, ranks) for name, part in learner.state.items()}
            if rank == 0:
                save_checkpoint(checkpoint, state, settings, step)
            saved = now
        if now - shown > 5 or step in (first + 1, steps):
            errors = gather(learner.errors(held_out), ranks)
            keys, values = errors.view(2, -1).mean(dim=1).tolist()
            dead = gather(replaced, ranks).sum().item()
            left = (now - began) / (step - first) * (steps - step)
            bar = "#" * (30 * step // steps)
            print(f"[{bar:30}] {step}/{steps}  held-out error keys {keys:.3f} values {values:.3f}  "
                  f"{dead} atoms replaced  {left:.0f} s left", flush=True)
            shown = now
    # How much each dictionary matters, on text that was learned from.
    D, largest = learner.state["D"], learner.state["largest"]
    harm = divergence(model, D, mine.start, text.rows(2, 1)[:, :512].to(device),
                      probed(model.config.head_dim))
    return [gather(x, ranks) for x in (D, largest, learner.errors(held_out), harm)]


def save_checkpoint(path, state, settings, step):
    header = {"settings": json.dumps(settings), "step": str(step)}
    save_file(state, f"{path}.part", metadata=header)
    os.replace(f"{path}.part", path)


def load_checkpoint(path, learner, settings, mine):
    """Put the dictionaries `mine` of a checkpoint into learner: the step to go on from."""
    if not os.path.exists(path):
        raise InputError(f"--resume: there is no checkpoint {path}; start without --resume")
    with safe_open(path, "pt") as file:
        was = json.loads(file.metadata()["settings"])
        differing = [f"--{name} {value}" for name, value in was.items() if value != settings[name]]
        if differing:
            raise InputError(f"--resume: {path} was made with {', '.join(differing)}; repeat that, "
                             "or start without --resume")
        for name, tensor in learner.state.items():
            tensor.copy_(file.get_slice(name)[mine])
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
    device, args.rank, args.ranks = world(args.device)
    dtype = torch.float32 if device.type == "cpu" else None
    model = Llama.from_pretrained(args.model, device, dtype)
    began = time.time()
    tokenizer = Tokenizer.from_pretrained(args.model)
    atoms, largest, errors, harm = (x.cpu().unflatten(0, (2, -1)) for x in
                                    learn(args, model, tokenizer, settings))
    keys, values = errors.tolist()
    # Stored coefficients get head room: the largest one met becomes 64 of FP8's 448.
    scale = (largest / 64).clamp(min=1e-8)
    names = [Path(path).name for path in args.text]
    learned = Dictionaries(
        atoms, scale, config, model=str(args.model), sparsity=args.sparsity, text=names,
        tokens=args.tokens, key_errors=keys, value_errors=values,
        divergence={"sparsity": probed(config.head_dim), "kl": harm.tolist()})
    if args.rank == 0:
        save_folder(learned, args.out) if is_folder else learned.save(args.out)
        Path(f"{args.out}.checkpoint").unlink(missing_ok=True)
    print(f"\nrelative error on held-out text\n{error_table(keys, values)}")
    print(f"{args.out} written after {time.time() - began:.0f} s")


if __name__ == "__main__":
    run_program(main)
