"""Learn the dictionaries of a model: one for the keys and one for the values of every layer.

Run the model over text, and all 2 L dictionaries learn at once from the key and value vectors that
pass. Two steps alternate (Engan et al. 1999, the method of optimal directions; Mairal et al. 2010,
its online form). With X a batch of vectors, each a row:

    code:     Z = OMP(X, D)                               s coefficients a row, D fixed
    update:   D = argmin_D || X - Z D ||^2 = (Z^T Z)^-1 Z^T X,   then atoms back to unit norm

The sums A = Z^T Z and B = Z^T X run over all batches seen, old ones fading, so that every update
rests on far more vectors than one batch holds, and the closed form needs no learning rate. An atom
that hardly any vector uses is replaced by a vector that the others serve badly.

    python train_dict.py --text stories.txt --out dictionary.safetensors"""

import hashlib
import json
import os
import sys
import time
from math import ceil, inf
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from kernels.parallel import exchange, gather, world
from lexico import Dictionaries, shape_of
from model import (Config, InputError, Llama, NoCache, Parser, Tokenizer, between, door, output_file,
                   plain_text, run_program)
from omp import omp, reconstruct, relative_error

HELD_OUT = 0.05  # the last part of every file, never learned from

# ---- Vectors of a text, and what coding them does to the model -----------------------------------

class Recorder(NoCache):
    """A cache that keeps each layer's keys and values (2, B, H, T, m), and lets attention pass."""

    def __init__(self):
        self.kv = []

    def attend(self, layer, q, k, v):
        self.kv.append(torch.stack((k, v)))
        return super().attend(layer, q, k, v)

@torch.inference_mode()
def vectors(model, rows):
    """Keys and values of token rows (B, T), all heads of a layer together: (2 L, B T H, m)."""
    recorder = Recorder()
    model(rows, recorder, last_only=True)
    return torch.stack(recorder.kv, dim=1).flatten(2, 4).flatten(0, 1).float()

class Simulated(NoCache):
    """A whole text in one pass, as decoding would see it through a lossy cache: a query finds the
    newest tokens as they are, and older ones as compression left them. Each layer's input comes
    from compressed layers below, so errors add up as they do in decoding.

    compress(layer, q, k, v), with q (B, H, G, T, m), k and v (B, H, 1, T, m), returns None (nothing
    is lost here), or k and v as they come back and which tokens are kept at all, (..., T) or None.
    A token is old once `buffer` newer ones have come; `group` tokens are compressed at a time, none
    for queries before `start`, and never the first `sinks`."""

    def __init__(self, compress, buffer=32, sinks=0, group=1, start=0):
        self.compress, self.buffer, self.sinks = compress, buffer, sinks
        self.group, self.start = group, start

    def attend(self, layer, q, k, v):
        (B, heads, T, m), grouped = q.shape, (q.unflatten(1, (k.shape[1], -1)), k[:, :, None],
                                              v[:, :, None])
        lossy = self.compress(layer, *grouped)
        if lossy is None:
            return super().attend(layer, q, k, v)
        (q, k, v), (k_lossy, v_lossy, kept) = grouped, lossy
        t = torch.arange(T, device=q.device)
        leaves = (t // self.group + 1) * self.group - 1 + self.buffer  # when a token's group goes
        old = (t[:, None] >= leaves) & (t[:, None] >= self.start) & (t >= self.sinks)  # (T, T)
        unseen = t > t[:, None] if kept is None else (t > t[:, None]) | (old & ~kept)
        scores = torch.where(old, q @ k_lossy.mT, q @ k.mT) / m**0.5  # (B, H, G, T, T)
        p = scores.masked_fill(unseen, -torch.inf).softmax(-1)
        return ((p * ~old) @ v + (p * old) @ v_lossy).view(B, heads, T, m)

@torch.inference_mode()
def divergence(model, atoms, first, rows, sparsities):
    """What each dictionary alone costs: mean KL(full || coded) of the next token, in nats, over
    rows (R, T) when one dictionary codes and nothing else does: (n, sparsities), for atoms
    (n, N, m), the dictionaries from number `first` on."""
    full = model(rows).float().log_softmax(dim=-1)  # (R, T, vocabulary)

    def harm(D, kind, layer, s):
        def compress(at, q, *kv):
            coded = reconstruct(D, *omp(D, kv[kind].flatten(0, 3), s)).view_as(kv[kind])
            return (*kv[:kind], coded.to(q.dtype), *kv[kind + 1:], None) if at == layer else None
        log_p = model(rows, Simulated(compress)).float().log_softmax(dim=-1)
        return F.kl_div(log_p, full, log_target=True, reduction="sum") / rows.numel()

    return torch.tensor([[harm(D, *divmod(i, model.config.n_layers), s) for s in sparsities]
                         for i, D in enumerate(atoms, first)], device=rows.device)

# ---- Text ----------------------------------------------------------------------------------------

class Text:
    """Rows of tokens from anywhere in some files; the same ones for the same seed."""

    def __init__(self, paths, tokenizer, row_length, seed):
        self.tokenizer, self.row_length, self.seed = tokenizer, row_length, seed
        files = [read_text(Path(path).expanduser()) for path in paths]
        if sum(map(len, files)) < 100 * row_length:
            raise InputError(f"{', '.join(map(str, paths))}: too little text to learn from; "
                             f"give at least {ceil(row_length / 10)} kB")
        cuts = [int(len(data) * (1 - HELD_OUT)) for data in files]
        self.learned = b"".join(data[:cut] for data, cut in zip(files, cuts))
        self.held_out = b"".join(data[cut:] for data, cut in zip(files, cuts))
        self.digest = hashlib.sha256(b"\0".join(files)).hexdigest()

    def rows(self, count, number, held_out=False):
        """Rows (count, row_length) from the parts to learn from, or from the held-out parts."""
        data, rows = self.held_out if held_out else self.learned, []
        chance = np.random.default_rng([self.seed, number, held_out])
        for start in chance.integers(len(data), size=count):
            tokens = []
            while len(tokens) < self.row_length:  # from the end, a row goes on at the beginning
                piece = data[start:start + 8 * self.row_length].decode("utf-8", "ignore")
                tokens += self.tokenizer.encode(piece, bos=not tokens)
                start = 0
            rows.append(tokens[:self.row_length])
        return torch.tensor(rows)

def read_text(path):
    """The bytes of a UTF-8 file, or of the "text" fields of a .jsonl or .parquet file."""
    with door(f"text '{path}' cannot be read", "give UTF-8 text, .jsonl or .parquet (which needs "
              "pyarrow) whose every row has a \"text\""):
        if path.suffix == ".parquet":
            import pyarrow.parquet
            return "".join(pyarrow.parquet.read_table(path)["text"].to_pylist()).encode()
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            text = "\n\n".join(json.loads(row)["text"] for row in text.split("\n") if row.strip())
        return plain_text(text).encode()

def wikitext():
    """Paths of WikiText-103's training text, the paper's choice, fetched from the Hub."""
    from huggingface_hub import hf_hub_download
    with door("without --text, WikiText-103 comes from the Hub", "give --text FILE"):
        return [hf_hub_download("Salesforce/wikitext", repo_type="dataset", filename=(
            f"wikitext-103-raw-v1/train-0000{i}-of-00002.parquet")) for i in range(2)]

# ---- Learning ------------------------------------------------------------------------------------

class Learner:
    """Dictionaries D (M, N, m), M = 2 L, and all that is known to make them better.

    A (M, N, N) and B (M, N, m) are the sums Z^T Z and Z^T X, `used` (M, N) counts each atom's uses,
    `largest` (M,) is the largest coefficient met. All are plain tensors: a checkpoint is a copy."""

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
        return torch.tensor([self._update(*own) for own in
                             zip(D, *sums, X, indices, Z, residual)], device=X.device)

    def _update(self, D, A, B, used, X, indices, Z, residual):
        """Make one dictionary better, in place: how many atoms were replaced."""
        N = len(D)
        # The sums. Z stays sparse: a vector adds s^2 numbers to A, and s rows to B.
        pairs = indices[:, :, None] * N + indices[:, None]  # (V, s, s), positions in A
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
    dictionary is learned in one place, so that any number of ranks gives the same."""
    rank, ranks, total, device = args.rank, args.ranks, 2 * model.config.n_layers, args.device
    count = ceil(args.batch / min(model.config.context, 1024))  # rows of a batch
    row_length = args.batch // count
    text = Text(args.text, tokenizer, row_length, args.seed)
    settings = {**settings, "text": text.digest}
    if count % ranks or total % ranks:
        raise InputError(f"{ranks} processes cannot share {count} rows of {row_length} tokens and "
                         f"{total} dictionaries evenly; change --batch or --nproc-per-node")
    mine = slice(total // ranks * rank, total // ranks * (rank + 1))

    def batch(number, held_out=False):
        rows = text.rows(count, number, held_out).chunk(ranks)[rank]
        tokenizer.check(rows.flatten().tolist(), model.config)
        X = exchange(vectors(model, rows.to(device)))
        if not X.isfinite().all():
            raise InputError(f"model '{args.model}' gives keys or values that are no finite numbers; "
                             "give other weights")
        return X

    def clock():  # one for all, for it decides what they do together
        return gather(torch.tensor([time.time()], dtype=torch.float64))[0].item()

    steps, held_out = max(1, round(args.tokens / (count * row_length))), batch(0, held_out=True)
    if args.fine_tune:
        D = Dictionaries.load(args.fine_tune, device).check(model.config).atoms.flatten(0, 1)[mine]
    else:  # atoms start as vectors of the text
        batches = ceil(args.atoms / held_out.shape[1])
        X = torch.cat([batch(number) for number in range(batches)], dim=1)
        D = F.normalize(X[:, torch.randperm(X.shape[1])[:args.atoms].to(device)], dim=-1)
    learner, done = Learner(D, args.sparsity, args.fade), 0
    if args.resume:
        done, state = load_checkpoint(args.checkpoint, settings, steps)
        with door(f"--resume: {args.checkpoint} is of another shape", "delete it and start anew"):
            for name, tensor in learner.state.items():
                tensor.copy_(state[name][mine])
    began = saved = shown = clock()
    for step in tqdm(range(done + 1, steps + 1), initial=done, total=steps, disable=rank > 0):
        replaced, now = learner.step(batch(step)), clock()
        # A run that has lasted leaves a last checkpoint, too, in case its result cannot be written.
        if now - saved > args.checkpoint_seconds or (step == steps and saved > began):
            state = {name: gather(tensor) for name, tensor in learner.state.items()}
            if rank == 0:
                save_checkpoint(args.checkpoint, (step, settings, state))
            saved = now
        if now - shown > 5 or step in (done + 1, steps):
            shown, errors = now, gather(learner.errors(held_out)).view(2, -1)
            keys, values = errors.mean(dim=1).tolist()
            tqdm.write(f"{step}/{steps}  held-out error keys {keys:.3f} values {values:.3f}  "
                       f"{gather(replaced).sum()} atoms replaced")
    if done == steps:
        errors = gather(learner.errors(held_out)).view(2, -1)
    # How much each dictionary matters, on text that was learned from.
    sparsities = [ceil(model.config.head_dim * i / 64) for i in (4, 15)]
    D, largest = learner.state["D"], learner.state["largest"]
    harm = divergence(model, D, mine.start, text.rows(2, 1)[:, :512].to(device), sparsities)
    D, largest, harm = (gather(x).unflatten(0, (2, -1)) for x in (D, largest, harm))
    # Stored coefficients get head room: the largest one met becomes 64 of FP8's 448.
    return Dictionaries(
        D, (largest / 64).clamp(min=1e-8), shape_of(model.config), model=str(args.model),
        sparsity=args.sparsity, text=[Path(path).name for path in args.text],
        tokens=steps * count * row_length, key_errors=errors[0].tolist(),
        value_errors=errors[1].tolist(), divergence={"sparsity": sparsities, "kl": harm.tolist()})

def save_checkpoint(path, content):
    """Write a checkpoint, whole or not at all. A disk that is full is no reason to stop learning."""
    part = Path(f"{path}.part")
    try:
        torch.save(content, part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        print(f"warning: no checkpoint {path} ({error}); learning goes on", file=sys.stderr)

def load_checkpoint(path, settings, steps):
    """Step and state of a checkpoint. Raises InputError if there is none, or of other settings."""
    if not path.exists():
        raise InputError(f"--resume: there is no checkpoint {path}; start without --resume")
    with door(f"--resume: {path} is damaged", "delete it and start anew"):
        step, made_with, state = torch.load(path, map_location="cpu", mmap=True)
        differing = [f"--{name} {value}" for name, value in made_with.items()
                     if value != settings.get(name)]
        if type(step) is not int or not 0 < step <= steps and not differing:
            raise ValueError(f"step {step} of {steps}")
    if differing:
        raise InputError(f"--resume: {path} was made with {', '.join(differing)}; repeat that, or "
                         "delete it and start anew")
    return step, state

# ---- The command ---------------------------------------------------------------------------------

def parse_arguments():
    parser = Parser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add, number = parser.add_argument, between
    add("--text", nargs="+", metavar="FILE", help="text, .jsonl or .parquet files; default: "
        "WikiText-103 from the Hub")
    add("--model", default="tiny", help='a folder, a Hub id, or "tiny" (default)')
    add("--atoms", type=number(int, 1, 2**15), default=1024, help="atoms of a dictionary (1024)")
    add("--sparsity", type=number(int, 1, 2**12), default=8, help="coefficients a vector (8)")
    add("--tokens", type=number(int, 1, inf), default=100_000, help="to learn from (100000)")
    add("--batch", type=number(int, 16, 2**24), default=2048, help="tokens of a step (2048)")
    add("--fade", type=number(float, 0, 1), default=0.9, help="what a step leaves of old sums")
    add("--out", type=Path, metavar="FILE", help="default: MODEL.dictionary.safetensors")
    add("--force", action="store_true", help="replace --out if it is there")
    add("--fine-tune", metavar="FILE", help="start from these dictionaries, with their atoms")
    add("--resume", action="store_true", help="go on from the last checkpoint")
    add("--checkpoint-seconds", type=number(float, 0, inf), default=30, metavar="S")
    add("--seed", type=number(int, 0, 2**32), default=0)
    add("--device", help="default: the best there is")
    args = parser.parse_args()
    parser.refuse("--fine-tune", "--atoms")
    args.out = args.out or Path(f"{Path(args.model).name}.dictionary.safetensors")
    args.checkpoint = Path(f"{args.out}.checkpoint")
    if args.out.is_file() and not args.force:
        parser.error(f"--out {args.out} exists; name another file, or give --force")
    if args.checkpoint.exists() and not args.resume:
        parser.error(f"{args.checkpoint} is there from another run; go on with --resume, or delete it")
    return args

def main():
    args, began = parse_arguments(), time.time()
    settings = {name: value for name, value in vars(args).items() if name not in
                ("text", "out", "force", "resume", "checkpoint", "checkpoint_seconds", "device")}
    config = Config.from_pretrained(args.model)
    if args.sparsity > min(config.head_dim, args.atoms) or args.atoms < config.head_dim:
        raise InputError(f"--sparsity {args.sparsity} and --atoms {args.atoms} do not fit vectors "
                         f"of {config.head_dim} numbers: sparsity at most that, atoms at least")
    torch.manual_seed(args.seed)
    args.device, args.rank, args.ranks = world(args.device)
    args.text = args.text or wikitext()
    with output_file(args.out if args.rank == 0 else os.devnull) as write:
        dtype = torch.float32 if args.device.type == "cpu" else None
        model = Llama.from_pretrained(args.model, args.device, dtype)
        learned = learn(args, model, Tokenizer.from_pretrained(args.model), settings)
        with door(f"--out {args.out} cannot be written", f"if {args.checkpoint} is there, it keeps "
                  "what was learned: make room, then --resume"):
            write(learned.serialise())
    if args.rank == 0:
        args.checkpoint.unlink(missing_ok=True)
    print("\nrelative error on held-out text\n| layer | keys | values |\n|---|---|---|")
    errors = np.array([learned.metadata["key_errors"], learned.metadata["value_errors"]])
    for layer, (keys, values) in [*enumerate(errors.T), ("mean", errors.mean(axis=1))]:
        print(f"| {layer} | {keys:.3f} | {values:.3f} |")
    print(f"{args.out} written after {time.time() - began:.0f} s")

if __name__ == "__main__":
    run_program(main)
