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

import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from lexico import Dictionaries, default_path
from model import Config, InputError, Llama, Parser, Tokenizer, run_program, world
from omp import omp, reconstruct, relative_error

HELD_OUT = 0.05  # the last part of every file, never learned from


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
        grouped = q.view(B, k.shape[1], -1, T, m), k[:, :, None], v[:, :, None]  # (B, H, G, T, m)
        compressed = self.compress and self.compress(layer, *grouped)
        if not compressed:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        (q, k, v), (group, k_hat, v_hat, kept) = grouped, compressed
        t = torch.arange(T, device=q.device)
        leaves = (t // group + 1) * group - 1 + self.buffer  # a group leaves the buffer as a whole
        old = (t[:, None] >= leaves) & (t[:, None] >= self.start)  # (T, T)
        unseen = t > t[:, None]
        if kept is not None:
            unseen = unseen | old & ~kept
        scores = torch.where(old, q @ k_hat.mT, q @ k.mT) / m**0.5  # (B, H, G, T, T)
        p = scores.masked_fill(unseen, -torch.inf).softmax(-1)
        return ((p * ~old) @ v + (p * old) @ v_hat).view(B, heads, T, m)


@torch.inference_mode()
def vectors(model, rows):
    """Keys and values of token rows (B, T), all heads of a layer together: (2 L, B T H, m)."""
    kv = []  # of each layer: (2, B, H, 1, T, m)
    model(rows, Simulated(lambda layer, q, *both: kv.append(torch.stack(both))), last_only=True)
    return torch.stack(kv, dim=1).flatten(2, 5).flatten(0, 1).float()


@torch.inference_mode()
def divergence(model, atoms, first, rows, sparsities):
    """What each dictionary alone costs: mean KL(full || coded) of the next token, in nats, over
    rows (R, T) when one dictionary codes and nothing else does: (n, sparsities), for atoms
    (n, N, m), from number `first` on."""
    def predict(compress=None):
        return model(rows, Simulated(compress)).float().log_softmax(dim=-1)  # (R, T, vocabulary)

    def harm(D, kind, layer, s):
        def compress(at, q, *kv):
            if at != layer:
                return None
            coded, x = list(kv), kv[kind]
            coded[kind] = reconstruct(D, *omp(D, x.flatten(0, 3), s)).view_as(x).to(x.dtype)
            return 1, *coded, None
        return F.kl_div(predict(compress), full, log_target=True, reduction="sum") / rows.numel()

    full = predict()
    return torch.tensor([[harm(D, *divmod(i, model.config.n_layers), s) for s in sparsities]
                         for i, D in enumerate(atoms, first)], device=rows.device)


def exchange(X):
    """From vectors of all dictionaries, of this rank's rows of text (M, V, m), to those of this
    rank's dictionaries, of all rows: (M / ranks, ranks V, m)."""
    if not dist.is_initialized():
        return X
    out = torch.empty_like(X)
    dist.all_to_all_single(out, X)
    return out.unflatten(0, (dist.get_world_size(), -1)).transpose(0, 1).flatten(1, 2)


def gather(x):
    """The x of all ranks, one after the other along the first dimension."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)


class Text:
    """Rows of tokens from anywhere in some files; the same ones for the same seed."""

    def __init__(self, paths, tokenizer, row_length):
        self.tokenizer, self.row_length = tokenizer, row_length
        files = [read_text(path) for path in paths]
        if sum(map(len, files)) < 100 * row_length:
            raise InputError(f"{', '.join(map(str, paths))}: too little text to learn from; "
                             f"give at least {100 * row_length // 1000} kB")
        cuts = [int(len(data) * (1 - HELD_OUT)) for data in files]
        self.learned = b"".join(data[:cut] for data, cut in zip(files, cuts))
        self.held_out = b"".join(data[cut:] for data, cut in zip(files, cuts))

    def rows(self, count, seed, held_out=False):
        """Rows (count, row_length) from the parts to learn from, or from the held-out parts."""
        data, rows = self.held_out if held_out else self.learned, []
        for place in np.random.default_rng([seed, held_out]).integers(len(data), size=count):
            tokens = []
            while len(tokens) < self.row_length:  # from the end, a row goes on at the beginning
                piece = data[place:place + 8 * self.row_length].decode("utf-8", "ignore")
                tokens += self.tokenizer.encode(piece, bos=not tokens)
                place = 0
            rows.append(tokens[:self.row_length])
        return torch.tensor(rows)


def read_text(path):
    """The bytes of a UTF-8 file, or of the "text" fields of a .jsonl or .parquet file."""
    try:
        if Path(path).suffix == ".parquet":
            import pyarrow.parquet
            return "".join(pyarrow.parquet.read_table(path)["text"].to_pylist()).encode()
        text = Path(path).read_text(encoding="utf-8")
        if Path(path).suffix == ".jsonl":
            lines = [line for line in text.split("\n") if line.strip()]
            text = "\n\n".join(json.loads(line)["text"] for line in lines)
        return text.encode()
    except (OSError, ImportError) as error:
        raise InputError(f"text '{path}': {error}; give a text or .jsonl file, or .parquet with "
                         "pyarrow installed") from None
    except UnicodeDecodeError:
        raise InputError(f"text '{path}' is not UTF-8; convert it first") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"text '{path}': not every row has a \"text\"; mend it") from None


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
        """Learn from vectors X (M, V, m): how many atoms of each dictionary were replaced (M,)."""
        D, *sums, largest = self.state.values()
        indices, Z = omp(D, X, self.sparsity)  # (M, V, s)
        largest.copy_(torch.maximum(largest, Z.abs().amax(dim=(1, 2))))
        residual = (X - reconstruct(D, indices, Z)).norm(dim=-1)  # (M, V)
        # One dictionary at a time, for what is (N, N) or (V, s, m) is large.
        return torch.tensor([self._update(*parts) for parts in
                             zip(D, *sums, X, indices, Z, residual)], device=X.device)

    def _update(self, D, A, B, used, X, indices, Z, residual):
        """Make one dictionary better, in place: how many atoms were replaced."""
        N = len(D)
        # The sums. Z stays sparse: a vector adds s^2 numbers to A, and s rows to B.
        pairs = indices[:, :, None] * N + indices[:, None]  # (V, s, s), places in A
        A.mul_(self.fade).view(-1).index_add_(
            0, pairs.flatten(), (Z[:, :, None] * Z[:, None]).flatten())
        B.mul_(self.fade).index_add_(
            0, indices.flatten(), (Z[..., None] * X[:, None]).flatten(0, 1))
        used.mul_(self.fade).add_(indices.flatten().bincount(minlength=N))
        # The closed form, with a little weight on the atoms as they are: it holds those in place
        # that too few vectors have used yet, and keeps A invertible.
        hold = 0.01 * A.diagonal().mean()
        factor = torch.linalg.cholesky(A + hold * torch.eye(N, device=A.device))
        D.copy_(F.normalize(torch.cholesky_solve(B + hold * D, factor), dim=-1))
        # Atoms used less than a twentieth of the average make way for the worst-served vectors.
        dead = (used < 0.05 * used.mean()).nonzero().flatten()[:len(X)]
        D[dead] = F.normalize(X[residual.topk(len(dead)).indices], dim=-1)
        A[dead], A[:, dead], B[dead] = 0, 0, 0
        used[dead] = used.mean()  # a new atom has time to prove itself
        return len(dead)

    def errors(self, X):
        """Mean relative error of vectors X (M, V, m), for each dictionary (M,)."""
        D = self.state["D"]
        return relative_error(D, X, *omp(D, X, self.sparsity)).mean(dim=-1)


def learn(args, model, tokenizer, settings):
    """Learn as args say: Dictionaries, with their errors and divergences.

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
        return exchange(vectors(model, rows.to(device)))

    def clock():  # one for all, for it decides what they do together
        return gather(torch.tensor([time.time()], dtype=torch.float64))[0].item()

    steps, held_out = max(1, round(args.tokens / (count * row_length))), batch(0, held_out=True)
    if args.fine_tune:
        d = Dictionaries.load(args.fine_tune, device).check(model.config)
        D = d.atoms.flatten(0, 1)[mine]
    else:  # atoms start as vectors of the text
        batches = math.ceil(args.atoms / held_out.shape[1])
        X = torch.cat([batch(seed) for seed in range(batches)], dim=1)
        D = F.normalize(X[:, torch.randperm(X.shape[1])[:args.atoms].to(device)], dim=-1)
    learner = Learner(D, args.sparsity, args.fade)
    first, checkpoint = 0, f"{args.out}.checkpoint"
    if args.resume:
        first, state = load_checkpoint(checkpoint, settings)
        for name, tensor in learner.state.items():
            tensor.copy_(state[name][mine])
    began = saved = shown = clock()
    for step in range(first + 1, steps + 1):
        replaced, now = learner.step(batch(step)), clock()
        if now - saved > args.checkpoint_seconds and step < steps:
            state = {name: gather(tensor) for name, tensor in learner.state.items()}
            if rank == 0:
                torch.save((step, settings, state), f"{checkpoint}.part")
                os.replace(f"{checkpoint}.part", checkpoint)
            saved = now
        if now - shown > 5 or step in (first + 1, steps):
            shown = now
            errors = gather(learner.errors(held_out)).view(2, -1)
            keys, values = errors.mean(dim=1).tolist()
            seconds = (now - began) / (step - first)
            print(f"[{'#' * (30 * step // steps):30}] {step}/{steps}  held-out error keys "
                  f"{keys:.3f} values {values:.3f}  {gather(replaced).sum()} atoms replaced  "
                  f"{seconds * (steps - step):.0f} s left", flush=True)
    print(f"learning took {1e6 * seconds / (count * row_length):.0f} s per million tokens")
    # How much each dictionary matters, on text that was learned from.
    sparsities = [math.ceil(model.config.head_dim * i / 64) for i in (4, 15)]
    D, largest = learner.state["D"], learner.state["largest"]
    harm = divergence(model, D, mine.start, text.rows(2, 1)[:, :512].to(device), sparsities)
    D, largest, harm = (gather(x).unflatten(0, (2, -1)) for x in (D, largest, harm))
    # Stored coefficients get head room: the largest one met becomes 64 of FP8's 448.
    return Dictionaries(
        D, (largest / 64).clamp(min=1e-8), model.config, model=str(args.model),
        sparsity=args.sparsity, text=[Path(path).name for path in args.text],
        tokens=steps * count * row_length,
        key_errors=errors[0].tolist(), value_errors=errors[1].tolist(),
        divergence={"sparsity": sparsities, "kl": harm.tolist()})


def load_checkpoint(path, settings):
    """Step and state of a checkpoint. Raises InputError if there is none, or of other settings."""
    if not os.path.exists(path):
        raise InputError(f"--resume: there is no checkpoint {path}; start without --resume")
    try:
        step, made_with, state = torch.load(path, map_location="cpu", mmap=True)
        differing = [f"--{name} {value}" for name, value in made_with.items()
                     if value != settings.get(name)]
    except Exception as error:  # there are many ways to be no checkpoint
        reason = f"{error} ".splitlines()[0].strip()
        raise InputError(f"--resume: {path} is damaged ({reason}); start without --resume"
                         ) from None
    if differing:
        raise InputError(f"--resume: {path} was made with {', '.join(differing)}; repeat that, or "
                         "start without --resume")
    return step, state


def wikitext():
    """Paths of WikiText-103's training text, the paper's choice, fetched from the Hub."""
    from huggingface_hub import hf_hub_download
    try:
        return [hf_hub_download("Salesforce/wikitext", repo_type="dataset", filename=(
            f"wikitext-103-raw-v1/train-0000{i}-of-00002.parquet")) for i in range(2)]
    except Exception as error:  # whatever keeps the Hub from us, the way out is the same
        raise InputError("without --text, WikiText-103 comes from the Hub, but: "
                         f"{str(error).strip().splitlines()[0]}; give --text FILE") from None


def error_table(d):
    """Mean relative error of each dictionary on held-out text, as Markdown."""
    keys, values = d.metadata["key_errors"], d.metadata["value_errors"]
    rows = [*zip(range(len(keys)), keys, values), ("mean", np.mean(keys), np.mean(values))]
    return "| layer | keys | values |\n|---|---|---|\n" + "\n".join(
        f"| {layer} | {key:.3f} | {value:.3f} |" for layer, key, value in rows)


def card(d, name):
    """A README.md that the Hub can read. Its licence is left to whoever shares it."""
    about, (_, n_layers, n_atoms, head_dim) = d.metadata, d.atoms.shape
    # Only a Hub id may be a base_model.
    is_hub_id = about["model"].count("/") == 1 and not Path(about["model"]).exists()
    base_model = f"base_model: {about['model']}\n" if is_hub_id else ""
    return f"""---
library_name: lexico
{base_model}tags: [kv-cache-compression, sparse-coding]
---
# Lexico dictionaries for {about["model"]}

For a KV cache of sparse codes ([Lexico](https://arxiv.org/abs/2412.08890)): for the keys and for
the values of each of {n_layers} layers {n_atoms} atoms of {head_dim} numbers. Learned from
{about["tokens"]} tokens of {", ".join(about["text"])}, with {about["sparsity"]} atoms a vector.

    python generate.py --model {about["model"]} --dictionary OWNER/{name}

Mean relative error on held-out text, with as many atoms:

{error_table(d)}
"""


def save_folder(d, folder):
    """Write a folder that can be uploaded, dictionaries and card. It appears when it is whole."""
    part = Path(f"{folder}.part")
    part.mkdir(parents=True, exist_ok=True)
    d.save(part / "dictionary.safetensors")
    (part / "README.md").write_text(card(d, folder.name), encoding="utf-8")
    os.replace(part, folder)


def main():
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--text", nargs="+", metavar="FILE",
                        help="text or .jsonl files; default: WikiText-103 from the Hub")
    parser.add_argument("--model", default="tiny", help='a folder, a Hub id, or "tiny" (default)')
    parser.add_argument("--atoms", type=int, default=1024, help="atoms of a dictionary (1024; with "
                        "--fine-tune: as many as there are)")
    parser.add_argument("--sparsity", type=int, default=8, help="coefficients a vector (8)")
    parser.add_argument("--tokens", type=int, default=100_000, help="tokens to learn from (100000)")
    parser.add_argument("--batch", type=int, default=2048, help="tokens of a step (2048)")
    parser.add_argument("--fade", type=float, default=0.9, help="what a step leaves of old sums")
    parser.add_argument("--out", type=Path, help="FILE.safetensors, or a new folder, to share, "
                        "with a model card (default: MODEL.dictionary.safetensors)")
    parser.add_argument("--fine-tune", metavar="DICT", help="start from these dictionaries")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--checkpoint-seconds", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="default: the best there is")
    args, began = parser.parse_args(), time.time()
    config = Config.from_pretrained(args.model)
    parser.check(args, sparsity=(1, config.head_dim), atoms=(config.head_dim, 2**15),
                 tokens=(1, math.inf), batch=(1, math.inf), fade=(0, 1), seed=(0, 2**32),
                 checkpoint_seconds=(0, math.inf))
    args.out = args.out or Path(default_path(args.model))
    is_folder = args.out.suffix != ".safetensors"
    if args.out.is_dir() or is_folder and args.out.exists():
        raise InputError(f"--out {args.out} exists; name a new folder, or a FILE.safetensors")
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {args.out}: {error.strerror}; name another place") from None
    args.text = args.text or wikitext()
    settings = {name: value for name, value in vars(args).items()
                if name not in ("out", "resume", "checkpoint_seconds", "device")}
    torch.manual_seed(args.seed)
    device, args.rank, args.ranks = world(args.device)
    model = Llama.from_pretrained(args.model, device,
                                  torch.float32 if device.type == "cpu" else None)
    learned = learn(args, model, Tokenizer.from_pretrained(args.model), settings)
    if args.rank == 0:
        save_folder(learned, args.out) if is_folder else learned.save(args.out)
        Path(f"{args.out}.checkpoint").unlink(missing_ok=True)
    print(f"\nrelative error on held-out text\n{error_table(learned)}")
    print(f"{args.out} written after {time.time() - began:.0f} s")


if __name__ == "__main__":
    run_program(main)
