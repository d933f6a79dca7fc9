"""Learn the dictionaries of a model: one for the keys and one for the values of every layer.

Run the model over text, and all 2 L dictionaries learn at once from the key and value vectors that
pass. Two steps alternate (Engan et al. 1999, the method of optimal directions; Mairal et al. 2010,
its online form). With X a batch of vectors, each a row:

    code:     Z = OMP(D, X)                               s coefficients a row, D fixed
    update:   D = argmin_D || X - Z D ||^2 = (Z^T Z)^-1 Z^T X,   then atoms back to unit norm

The sums A = Z^T Z and B = Z^T X run over all batches seen, old ones fading, so that every update
rests on far more vectors than one batch holds, and the closed form needs no learning rate. An atom
that hardly any vector uses is replaced by a vector that the others serve badly.

    python train_dict.py --text stories.txt --out dictionary.safetensors"""

import argparse
import hashlib
import json
import os
import sys
import time
from contextlib import contextmanager, suppress
from math import ceil, inf
from pathlib import Path

import numpy as np
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # waiting threads soon sleep: cores may be busy
import torch
import torch.nn.functional as F
from tqdm import tqdm

from kernels.parallel import from_rank_0, gather, world
from lexico import Dictionaries, WordCodes, join, shape_of, split
from model import Config, InputError, Llama, NoCache, Tokenizer, door
from omp import omp, omp_levels, reconstruct, relative_error

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
def vectors(model, rows, heads=1):
    """Keys and values of token rows (B, T), `heads` heads of a layer a vector: (2 L, V, M)."""
    recorder = Recorder()
    model(rows, recorder, last_only=True)
    kv = torch.stack(recorder.kv, dim=1)  # (2, L, B, H, T, m)
    return join(kv, heads).flatten(2, 4).flatten(0, 1).float()

class Simulated(NoCache):
    """A whole text in one pass, as decoding sees it through a lossy cache: a query finds the newest
    tokens as they are, older ones as compression left them. Errors of all layers add up.

    compress(layer, q, k, v), with q (B, H, G, T, m), k and v (B, H, 1, T, m), returns None (nothing
    is lost), or k, v as they come back and which tokens stay visible, (..., T), None for all. A
    token is old once `buffer` newer ones have come; `group` tokens are compressed at a time, none
    for queries before `start`, and never the first `sinks`."""

    def __init__(self, compress, buffer=32, sinks=4, group=1, start=0):
        self.compress, self.buffer, self.sinks = compress, buffer, sinks
        self.group, self.start = group, start

    def attend(self, layer, q, k, v):
        by_head = q.unflatten(1, (k.shape[1], -1)), k[:, :, None], v[:, :, None]
        lossy = self.compress(layer, *by_head)
        if lossy is None:
            return super().attend(layer, q, k, v)
        (q, k, v), (k_lossy, v_lossy, kept) = by_head, lossy
        t = torch.arange(q.shape[3], device=q.device)
        leaves = (t // self.group + 1) * self.group - 1 + self.buffer  # when a token's group goes
        old = (t[:, None] >= leaves.clamp(min=self.start)) & (t >= self.sinks)  # (T, T)
        unseen = t > t[:, None] if kept is None else (t > t[:, None]) | (old & ~kept)
        scores = torch.where(old, q @ k_lossy.mT, q @ k.mT) / q.shape[4]**0.5  # (B, H, G, T, T)
        p = scores.masked_fill(unseen, -torch.inf).softmax(-1)
        return ((p * ~old) @ v + (p * old) @ v_lossy).flatten(1, 2)

@torch.inference_mode()
def divergence(model, atoms, scale, first, rows, sparsities):
    """What each dictionary alone costs, (n, sparsities): mean KL(full || coded) of the next token,
    in nats, over rows (R, T), when it codes (in words) and nothing else does. atoms (n, N, M) and
    scale (n,) are the model's dictionaries from number `first` on."""
    bits, config = max(3, WordCodes.level_bits(atoms.shape[1])), model.config
    heads = atoms.shape[2] // config.head_dim
    full = model(rows).float().log_softmax(dim=-1)  # (R, T, vocabulary)

    def cost(i, s):
        kind, changed = divmod(first + i, config.n_layers)
        def compress(layer, q, *kv):
            if layer != changed:
                return None
            x = join(kv[kind][:, :, 0], heads)  # (R, H / heads, T, M)
            indices, level, e = omp_levels(atoms[i], x.flatten(0, 2) / scale[i], s, bits)
            z = scale[i] * level * torch.exp2(e / 16 - 8)
            x = split(reconstruct(atoms[i], indices, z).view_as(x), heads)
            return *kv[:kind], x[:, :, None].to(q.dtype), *kv[kind + 1:], None  # None: all are kept
        log_p = model(rows, Simulated(compress)).float().log_softmax(dim=-1)
        return F.kl_div(log_p, full, log_target=True, reduction="sum").clamp(min=0) / rows.numel()

    return torch.tensor([[cost(i, s) for s in sparsities] for i in range(len(atoms))]).to(full)

# ---- Text ----------------------------------------------------------------------------------------

class Text:
    """Rows of tokens from anywhere in some files; the same ones for the same seed."""

    def __init__(self, paths, tokenizer, row_length, seed):
        self.tokenizer, self.row_length, self.seed = tokenizer, row_length, seed
        files = [read_text(Path(os.path.expanduser(path))) for path in paths]
        if sum(map(len, files)) < 100 * row_length:
            raise InputError(f"{', '.join(map(str, paths))}: too little text to learn from; give "
                             f"{ceil(row_length / 10)} kB or more")
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
                end = start + 8 * self.row_length
                piece = data[start:end].decode("utf-8", "ignore")
                ids = self.tokenizer.encode(piece, bos=not tokens)
                if start == 0 and not ids:
                    raise InputError("the tokenizer makes no tokens of this text; give another one")
                tokens, start = tokens + ids, end if end < len(data) else 0
            rows.append(tokens[:self.row_length])
        return torch.tensor(rows)

def read_text(path):
    """The bytes of a UTF-8 file, or of the "text" fields of a .jsonl or .parquet file."""
    with door(f"text '{path}' cannot be read",
              'give UTF-8 text, or a "text" in every row of .jsonl or (with pyarrow) .parquet'):
        if path.suffix == ".parquet":
            import pyarrow.parquet
            rows = pyarrow.parquet.read_table(path)["text"].to_pylist()
            lines = all(row[-1:] in ("", "\n") for row in rows)  # as in WikiText; or documents
            return plain_text(("" if lines else "\n\n").join(rows)).encode()
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".jsonl":
            text = "\n\n".join(json.loads(row)["text"] for row in text.split("\n") if row.strip())
        return plain_text(text).encode()

def wikitext():
    """Paths of WikiText-103's training text, the paper's choice, fetched from the Hub."""
    with door("without --text, WikiText-103 comes from the Hub", "give --text FILE"):
        from huggingface_hub import hf_hub_download
        names = [f"wikitext-103-raw-v1/train-0000{i}-of-00002.parquet" for i in range(2)]
        return [hf_hub_download("Salesforce/wikitext", name, repo_type="dataset") for name in names]

# ---- Learning ------------------------------------------------------------------------------------

class Learner:
    """Dictionaries D (n, N, M), n = 2 L or a rank's share, and what makes them better: the sums
    A = Z^T Z (n, N, N) and B = Z^T X (n, N, M), each atom's uses, `used` (n, N), and the largest
    coefficient met, `largest` (n,). All are plain tensors: a checkpoint is a copy."""

    def __init__(self, D, sparsity, fade):
        n, N, M = D.shape
        self.sparsity, self.fade = sparsity, fade
        self.state = {"D": D, "A": D.new_zeros(n, N, N), "B": D.new_zeros(n, N, M),
                      "used": D.new_zeros(n, N), "largest": D.new_zeros(n)}

    @torch.inference_mode()
    def step(self, X):
        """Learn from vectors X (n, V, M): how many atoms of each dictionary were replaced (n,)."""
        D, *sums, largest = self.state.values()
        indices, Z = omp(D, X, self.sparsity)  # (n, V, s)
        largest.copy_(largest.maximum(Z.abs().amax(dim=(1, 2))))
        residual = (X - reconstruct(D, indices, Z)).norm(dim=-1)  # (n, V)
        # One dictionary at a time: its tensors (N, N), (V, s, s) and (V, s, M) are large.
        replaced = map(self._update, D, *sums, X, indices, Z, residual)
        return torch.tensor([*replaced], device=X.device)

    def _update(self, D, A, B, used, X, indices, Z, residual):
        """Make one dictionary better, in place: how many atoms were replaced."""
        # The sums. Z stays sparse: a vector adds s^2 numbers to A, and s rows to B.
        N, rows = len(D), indices.flatten()
        pairs = (indices[:, :, None] * N + indices[:, None]).flatten()  # (V s s,), positions in A
        A.mul_(self.fade).view(-1).index_add_(0, pairs, (Z[:, :, None] * Z[:, None]).flatten())
        B.mul_(self.fade).index_add_(0, rows, (Z[..., None] * X[:, None]).flatten(0, 1))
        used.mul_(self.fade).add_(rows.bincount(Z.flatten() != 0, minlength=N))
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
        """Mean relative error of vectors X (n, V, M), for each dictionary (n,)."""
        D = self.state["D"]
        return relative_error(D, X, *omp(D, X, self.sparsity)).mean(dim=-1)

def learn(args, model, tokenizer):
    """Learn as args say: Dictionaries, with their errors and divergences.

    Ranks share the work twice: each runs the model over its rows of a batch, vectors go where they
    belong, and each learns its dictionaries from the vectors of all rows: any number of ranks gives
    the same."""
    config, device, rank, ranks = model.config, args.device, args.rank, args.ranks
    count, total = ceil(args.batch / min(config.context, 1024)), 2 * config.n_layers
    text = Text(args.text, tokenizer, args.batch // count, args.seed)
    tokens = count * text.row_length  # of a batch, in `count` rows
    steps = max(1, round(args.tokens / tokens))
    if count % ranks or total % ranks:
        raise InputError(f"{ranks} processes cannot share {count} rows and {total} dictionaries "
                         "evenly; change --batch or --nproc-per-node")
    # Refused at once if there is no memory for the vectors of a batch and the sums A.
    torch.empty(4 * total * (args.atoms**2 + 3 * args.batch * config.kv_heads * config.head_dim)
                // ranks, dtype=torch.uint8, device=device)
    mine = slice(total * rank // ranks, total * (rank + 1) // ranks)  # dictionaries of this rank

    def batch(number, held_out=False):
        rows = text.rows(count, number, held_out).chunk(ranks)[rank]
        tokenizer.check(rows.flatten().tolist(), config)
        X = gather(vectors(model, rows.to(device), args.heads), dim=1)[mine]
        largest = X.abs().amax(dim=(1, 2))  # of each dictionary's numbers; NaN if one is NaN
        if not ((0 < largest) & (largest < inf)).all():
            raise InputError(f"model '{args.model}' gives keys or values that are no finite numbers"
                             ", or a layer's that are all 0; use other weights")
        return X

    if args.fine_tune:
        D = Dictionaries.load(args.fine_tune, device).atoms.flatten(0, 1)[mine]
    else:  # atoms start as vectors of the text
        batches = ceil(args.atoms * args.heads / (tokens * config.kv_heads))
        X = torch.cat([batch(i) for i in range(batches)], dim=1)
        D = F.normalize(X[:, torch.randperm(X.shape[1])[:args.atoms].to(device)], dim=-1)
    learner, held_out, done = Learner(D, args.sparsity, args.fade), batch(0, held_out=True), 0
    settings = {"text": text.digest, "fine-tune": args.fine_tune, **{name: getattr(args, name) for
                name in ("model", "heads", "atoms", "sparsity", "tokens", "batch", "fade", "seed")}}
    if args.resume:
        done = load_checkpoint(args.checkpoint, settings, steps, learner.state, mine)
    began = saved = shown = from_rank_0(time.time)  # one clock, for it decides what all do together
    for step in tqdm(range(done + 1, steps + 1), initial=done, total=steps, disable=rank > 0):
        replaced, now = learner.step(batch(step)), from_rank_0(time.time)
        # A run that has lasted leaves a last checkpoint, too, in case its result cannot be written.
        if now - saved > args.checkpoint_seconds or (step == steps and saved > began):
            state, saved = {name: gather(x) for name, x in learner.state.items()}, now
            if rank == 0:
                save_checkpoint(args.checkpoint, (step, settings, state))
        if now - shown > 5 or step in (done + 1, steps):
            shown, errors = now, gather(learner.errors(held_out)).view(2, -1).mean(dim=1).tolist()
            tqdm.write(f"{step}/{steps}  held-out error keys {errors[0]:.3f} values {errors[1]:.3f}"
                       f"  {gather(replaced).sum()} atoms replaced")
    # Stored coefficients get head room: the largest one met becomes 64 of FP8's 448.
    D, scale = learner.state["D"], (learner.state["largest"] / 64).clamp(min=1e-8)
    # How much each dictionary matters, on text that was learned from.
    sparsities = sorted({ceil(D.shape[2] * i / 64) for i in (3, 10, 24)})
    rows = text.rows(8 if device.type == "cuda" else 2, 1)[:, :512].to(device)
    kl = divergence(model, D, scale, mine.start, rows, sparsities)
    results = D, scale, kl, learner.errors(held_out)
    D, scale, kl, errors = (gather(x).unflatten(0, (2, -1)) for x in results)
    return Dictionaries(D, scale, shape_of(config), model=str(args.model), sparsity=args.sparsity,
                        text=[Path(path).name for path in args.text], tokens=steps * tokens,
                        key_errors=errors[0].tolist(), value_errors=errors[1].tolist(),
                        divergence={"sparsity": sparsities, "kl": kl.tolist()})

def save_checkpoint(path, content):
    """Write a checkpoint, whole or not at all. A full disk is no reason to stop learning."""
    part = Path(f"{path}.part")
    try:
        torch.save(content, part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        print(f"warning: no checkpoint {path} ({error}); learning goes on", file=sys.stderr)
    finally:
        part.unlink(missing_ok=True)

def load_checkpoint(path, settings, steps, state, mine):
    """Fill `state` with its rows `mine` of a checkpoint, and return the step after which it was
    made. Raises InputError if there is none, or of another run."""
    with door(f"--resume: {path} is absent, damaged or of another shape", "start without --resume"):
        step, made_with, saved = torch.load(path, map_location="cpu", mmap=True)
        other = ["--%s %s" % option for option in sorted(made_with.items() - settings.items())]
        if made_with != settings:
            raise InputError(f"{path} was made with {', '.join(other)}; repeat that, or delete it")
        if type(step) is not int or not 0 < step <= steps:
            raise ValueError(f"step {step} of {steps}")
        for name, tensor in state.items():
            if saved[name][mine].shape != tensor.shape or not saved[name].isfinite().all():
                raise ValueError(f"{name} is of another shape, or not finite")
            tensor.copy_(saved[name][mine])
    return step

# ---- Programs: arguments, errors, files that are whole or not there ------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message}; see --help")

    def refuse(self, option, *others):
        """Refuse options that would be ignored beside this one."""
        given = {argument.partition("=")[0] for argument in sys.argv[1:]}
        for other in others:
            if {option, other} <= given:
                self.error(f"{option} and {other} do not go together")

def between(kind, least, most):
    """A type for an argument: a number within least .. most."""
    def number(text):
        if not least <= kind(text) <= most:
            raise argparse.ArgumentTypeError(f"{text} is outside {least} .. {most}")
        return kind(text)
    return number

def plain_text(text):
    """A text as it means the same from every source: no byte order mark, lines end in a newline."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")

@contextmanager
def output_file(path, way_out="name a file where there is room"):
    """A function that writes a file (or nothing, if path is None), whose place is taken before the
    work that makes its content.

    A temporary file beside it takes its name once all is written, and goes if nothing comes. A link
    is followed. What is no ordinary file is added to as it is: a pipe, or where our output goes."""
    if path is None:
        yield lambda data: None
        return
    ordinary = os.path.isfile(path) or not os.path.exists(path)
    with suppress(OSError):  # there is no such file, or that output is closed
        ordinary &= not any(os.path.samestat(os.stat(path), os.fstat(n)) for n in (1, 2))
    path = Path(os.path.realpath(path) if ordinary else path)
    part = Path(f"{path}.{os.getpid()}.part") if ordinary else path
    checked = lambda: door(f"{path} cannot be written", way_out)

    def write(data):
        with checked(), part.open("ab") as file:
            print(end="", flush=True)  # what was said before comes before
            file.write(data)
        with checked():
            if ordinary:
                os.replace(part, path)

    with checked():
        if ordinary or path.is_dir():  # a folder fails to open, as it should
            part.open("ab").close()
    try:
        yield write
    finally:
        if ordinary:
            part.unlink(missing_ok=True)

def run_program(main):
    """Run a program: exit with what main returns, or with one line and 2 for bad input."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal need not know every character
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever read our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (InputError, OSError, MemoryError, RuntimeError) as error:
        first, message = os.environ.get("LOCAL_RANK", "0") == "0", error
        lacks = {"allocate", "overflowed"} & {*str(error).split()}  # memory, as torch says it
        if not first:
            time.sleep(10)  # rank 0 says what is wrong; then torchrun ends the others
        if isinstance(error, RuntimeError) and not lacks:
            raise
        if isinstance(error, (MemoryError, RuntimeError)):
            message = "out of memory; ask for fewer tokens, a smaller batch, buffer or dictionary"
        if first and sys.stderr:
            print("error:", message, file=sys.stderr)
        sys.exit(2)

# ---- The command ---------------------------------------------------------------------------------

def parse_arguments():
    parser = Parser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add, number = parser.add_argument, between
    add("--text", nargs="+", metavar="FILE", help="text, .jsonl, .parquet; default: WikiText-103")
    add("--model", default="tiny", help='a folder, a Hub id, or "tiny" (default)')
    add("--heads", type=number(int, 1, 2**12), default=1, help="KV heads that one vector spans (1, "
        "as published; more at equal bytes lose less where memory is short)")
    add("--atoms", type=number(int, 1, 2**15), default=1024, help="atoms of a dictionary (1024)")
    add("--sparsity", type=number(int, 1, 2**12), default=8, help="coefficients a vector (8)")
    add("--tokens", type=number(int, 1, inf), default=1_000_000, help="to learn from (1000000)")
    add("--batch", type=number(int, 16, 2**24), default=2048, help="tokens of a step (2048)")
    add("--fade", type=number(float, 0, 1), default=0.9, help="what a step keeps of sums (0.9)")
    add("--out", type=Path, metavar="FILE", help="default: MODEL.dictionary.safetensors")
    add("--force", action="store_true", help="replace --out if it is there")
    add("--fine-tune", metavar="FILE", help="start from these dictionaries, with their atoms")
    add("--resume", action="store_true", help="go on from the last checkpoint")
    add("--checkpoint-seconds", type=number(float, 0, inf), default=30, metavar="S")
    add("--seed", type=number(int, 0, 2**32), default=0)
    add("--device", help="default: the best there is")
    args = parser.parse_args()
    parser.refuse("--fine-tune", "--atoms", "--heads")
    args.batch = min(args.batch, max(16, args.tokens))
    args.out = args.out or Path(f"{Path(args.model).name}.dictionary.safetensors")
    args.checkpoint = Path(f"{args.out}.checkpoint")
    if args.out.is_file() and not args.force:
        parser.error(f"--out {args.out} exists; name another file, or give --force")
    if args.checkpoint.exists() and not args.resume:
        parser.error(f"{args.checkpoint} is of an earlier run; go on with --resume, or delete it")
    config = Config.from_pretrained(args.model)
    if args.fine_tune:
        d = Dictionaries.load(args.fine_tune).check(config)
        args.heads, args.atoms = d.heads, d.atoms.shape[2]
    M = args.heads * config.head_dim
    if config.kv_heads % args.heads or not args.sparsity <= M <= args.atoms:
        parser.error(f"--heads {args.heads} must divide {config.kv_heads}; a vector's length, {M}, "
                     f"must be within --sparsity {args.sparsity} .. --atoms {args.atoms}")
    args.device, args.rank, args.ranks = world(args.device)
    return args

def main():
    args, began = parse_arguments(), time.time()
    args.text = args.text or wikitext()
    torch.manual_seed(args.seed)
    way_out = f"name a file where there is room, and --resume if {args.checkpoint} is there"
    with output_file(args.out if args.rank == 0 else None, way_out) as write:
        dtype = torch.float32 if args.device.type == "cpu" else None
        model = Llama.from_pretrained(args.model, args.device, dtype)
        learned = learn(args, model, Tokenizer.from_pretrained(args.model))
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
