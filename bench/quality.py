"""What compression costs: memory against fidelity, for this project's cache and for its peers.

Text is decoded with the right tokens given (teacher forcing), through a cache in which every token
older than the buffer is compressed. Each layer sees what the compressed layers below made of its
input, so errors compound as in real decoding; but all positions run at once: query t sees token u
as it is if t - u < buffer, else as it comes back from the codes. Against the full cache we take

    KL      mean KL(full || compressed) of the next-token distributions, in nats
    top-1   how often both find the same token likeliest
    ppl     perplexity of the text
    recall  how often a fact that was told once, somewhere far back, is recalled to the last digit

in the second half of every row. Memory is the bytes of a compressed vector over 2 m, those of 16-bit
numbers. Buffer and sinks, the same for all methods, are not counted in it. The peers are short
simulations (peers.py).

    python bench/quality.py --rows 3 --only "KIVI|auto" --figure quality.png"""

import functools
import io
import random
import re
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tiny")]

from bench import peers  # noqa: E402
from lexico import CODINGS, Dictionaries  # noqa: E402
from model import InputError, Llama, NoCache, Tokenizer, best_device, door  # noqa: E402
from omp import omp, omp_beam, reconstruct  # noqa: E402
from train_dict import Parser, Simulated, between, output_file, run_program  # noqa: E402

# ---- Methods -------------------------------------------------------------------------------------

def lexico(dictionaries, sparsity, coding, pursuit=omp):
    """The real codes of the real cache, written and read back, as a compress for Simulated.
    sparsity: one number, or one for each dictionary (2, L)."""
    table = np.broadcast_to(sparsity, dictionaries.scale.shape)

    def round_trip(kind, layer, x):  # (B, H, 1, T, m)
        D, scale = dictionaries.atoms[kind, layer], dictionaries.scale[kind, layer]
        (B, H, _, T, _), s = x.shape, int(table[kind, layer])
        codes = CODINGS[coding](D, scale, s, B, H)
        codes.reserve(T)
        parts = codes.encode(D[None], (x / scale).flatten(0, 3)[None], s, pursuit)
        codes.write(torch.arange(T, device=x.device), parts)
        indices, z = codes.read(0, T)  # (B H, T, s)
        return reconstruct(D * scale, indices.flatten(0, 1), z.flatten(0, 1)).view_as(x)

    return lambda layer, q, k, v: (round_trip(0, layer, k), round_trip(1, layer, v), None)

def methods(model, dictionaries, calibration, sinks=0, buffer=32, length=1024):
    """name -> (bytes of a vector over 2 m, start -> cache). dictionaries: by name."""
    m, kept = model.config.head_dim, {"buffer": buffer, "sinks": sinks}
    table = {"dense": (1.0, lambda start: NoCache())}
    table |= {name: rest for name, *rest in peers.methods(model, calibration, sinks, buffer, length)}
    for label, d in dictionaries.items():
        rows = [(f"{coding} {label} s={s}", s, coding, omp)
                for coding in ("fp8", "word") for s in (2, 4, 6, 8, 11, 15)]
        rows += [(f"word {label} beam {W} s={s}", s, "word", functools.partial(omp_beam, width=W))
                 for W in (2, 4) for s in (4, 8)]
        if "divergence" in d.metadata:
            rows += [(f"word {label} auto:{share:.0%}", d.allocate(share, "word"), "word", omp)
                     for share in (0.06, 0.09, 0.12, 0.15, 0.18, 0.2, 0.25, 0.3)]
        for name, s, coding, pursuit in rows:
            N = d.atoms.shape[2]
            if np.max(s) <= min(N, m) and N <= CODINGS[coding].most_atoms:
                size = np.mean([CODINGS[coding].nbytes_each(each) for each in np.ravel(s)])
                table[f"Lexico {name}"] = size / (2 * m), lambda start, c=lexico(
                    d, s, coding, pursuit): Simulated(c, **kept)
    return table

# ---- Measures ------------------------------------------------------------------------------------

def rows_of(tokenizer, text, length, starts):
    """Rows of tokens (rows, length), each with what begins a text, from these places in its ids."""
    ids, bos = tokenizer.encode(text, bos=False), tokenizer.encode("")
    return torch.tensor([(bos + ids[i:])[:length] for i in starts])

class Judge:
    """A model, texts and facts to recall, and what the full cache makes of them. spare: rows of the
    text that are not measured, to calibrate by."""

    def __init__(self, model, tokenizer, text, rows=4, length=1024, facts=0, seed=0):
        config, device, rng = model.config, model.norm.weight.device, random.Random(seed)
        ids = tokenizer.encode(text, bos=False)
        tokenizer.check(ids, config)
        if length > config.context:
            raise InputError(f"rows of {length} tokens are longer than the model's context of "
                             f"{config.context}; give a smaller --length")
        if len(ids) <= length or facts and len(text) <= 3 * length:
            raise InputError(f"the text has {len(ids)} tokens, too few for rows of {length}; give a "
                             "longer --text, or a smaller --length")
        self.model, self.half = model, length // 2
        starts = [rng.randrange(len(ids) - length) for _ in range(rows)]
        self.rows = rows_of(tokenizer, text, length, starts).to(device)
        spare = [i for i in range(0, len(ids) - length, length)
                 if all(abs(i - start) >= length for start in starts)]
        self.spare = rows_of(tokenizer, text, length, spare).to(device)
        self.full = [self.log_p(row, lambda start: NoCache()) for row in self.rows]
        self.facts = [self.fact(rng, tokenizer, text, length, i) for i in range(facts)]

    def fact(self, rng, tokenizer, text, length, i):
        """One of eight facts in a text, told at any depth: a row of tokens, and where the question
        and the answer begin in it."""
        from pretrain import recall
        place = rng.randrange(len(text) - 3 * length)
        context, [question] = recall(rng, text[place:][:3 * length], 8, 1, (i % 8) / 8)
        parts = [tokenizer.encode(context)]
        parts += [tokenizer.encode(part, bos=False) for part in question]
        row = torch.tensor([sum(parts, [])], device=self.rows.device)
        if row.shape[1] > self.model.config.context:
            raise InputError(f"a text with a fact has {row.shape[1]} tokens, more than the model's "
                             f"context of {self.model.config.context}; give a smaller --length")
        return row, len(parts[0]), len(parts[0] + parts[1])

    @torch.inference_mode()
    def logits(self, row, make, start):
        """Logits (1, T, vocab) of a row (1, T) through a new cache."""
        cache = make(start)
        if isinstance(cache, peers.AllLayers):
            self.model(row, cache, last_only=True)  # exactly, for the codes
        return self.model(row, cache)

    def log_p(self, row, make):
        """Log-probabilities (length / 2, vocab) of the second half of a row (length,)."""
        return self.logits(row[None], make, self.half)[0, self.half - 1:-1].float().log_softmax(-1)

    def fidelity(self, make):
        """KL(full || method), top-1 agreement and perplexity of the method."""
        sums = torch.zeros(3, dtype=torch.float64)
        for row, p in zip(self.rows, self.full):
            q = self.log_p(row, make)
            sums += torch.stack(((p.exp() * (p - q)).sum(-1).mean(),
                                 (p.argmax(-1) == q.argmax(-1)).float().mean(),
                                 -q.gather(-1, row[self.half:, None]).mean())).cpu()
        kl, top1, nats = (sums / len(self.rows)).tolist()
        return {"kl": kl, "top1": top1, "ppl": np.exp(nats)}

    def recall(self, make):
        """Share of the facts recalled with every token right. The text before a question was
        compressed without knowing the question."""
        right = [torch.equal(self.logits(row, make, question).argmax(-1)[:, answer - 1:-1],
                             row[:, answer:]) for row, question, answer in self.facts]
        return sum(right) / len(right)

# ---- The command ---------------------------------------------------------------------------------

def draw(points, format):
    """A picture of memory against KL, from (name, memory, KL), a line for each kind of method."""
    import matplotlib.pyplot as plt
    kinds, (figure, axes), picture = {}, plt.subplots(figsize=(8, 5)), io.BytesIO()
    for name, memory, kl in points:
        kinds.setdefault(re.sub(r"[ :]([sd]=)?\d+( bit|%)?$", "", name), []).append((memory, kl))
    for kind, line in kinds.items():
        style = "s--" if kind.startswith("Lexico fp8") else "o-" if "Lexico" in kind else "^:"
        axes.plot(*zip(*sorted(line)), style, label=kind)
    axes.set(yscale="log", xlim=(0, 0.36), xlabel="bytes of a vector, as a share of 16 bit",
             ylabel="KL(full || compressed) per token, nats")
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", fontsize="small")
    figure.savefig(picture, dpi=120, bbox_inches="tight", format=format)
    return picture.getvalue()

def read(option, path):
    with door(f"{option} {path} cannot be read", "name a file of UTF-8 text"):
        return Path(path).expanduser().read_text(encoding="utf-8-sig")

def parse_arguments():
    parser = Parser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add, number = parser.add_argument, between
    add("--model", default="tiny", help='a folder, a Hub id, or "tiny" (default)')
    add("--dictionary", nargs="+", metavar="FILE", help="default: the one of the model's folder")
    add("--text", default=ROOT / "tiny" / "held-out.txt", metavar="FILE", help="what is decoded")
    add("--calibrate", metavar="FILE", help="text for the methods that calibrate; default: --text's "
        "first 32 rows that are not measured")
    add("--rows", type=number(int, 1, 2**20), default=8, help="how many texts (8)")
    add("--length", type=number(int, 64, 2**20), default=1024, help="tokens of each (1024)")
    add("--facts", type=number(int, 0, 2**20), default=0, help="to recall, of tiny/pretrain.py (0)")
    add("--buffer", type=number(int, 1, 2**20), default=32, help="newest tokens kept dense (32)")
    add("--sinks", type=number(int, 0, 2**20), default=0, help="first tokens kept dense (0)")
    add("--only", default="", metavar="REGEX", help="methods with this in the name")
    add("--figure", metavar="FILE", help="draw memory against KL: .png, .pdf or .svg (matplotlib)")
    args = parser.parse_args()
    with door(f"--only {args.only!r} is no regular expression", "give one, such as 'KIVI|auto'"):
        re.compile(args.only)
    if args.buffer + args.sinks > args.length // 2:
        parser.error(f"--buffer {args.buffer} and --sinks {args.sinks} leave nothing to compress in "
                     f"the first half of --length {args.length}")
    if args.figure:
        with door("--figure needs matplotlib", 'pip install matplotlib, or do without'):
            import matplotlib  # noqa: F401
        if Path(args.figure).suffix not in (".png", ".pdf", ".svg"):
            parser.error(f"--figure {args.figure} ends neither in .png nor in .pdf or .svg")
    return args

def main():
    args, device, points = parse_arguments(), best_device(), []
    with output_file(args.figure) if args.figure else nullcontext() as write:
        model, loaded = Llama.from_pretrained(args.model, device, torch.float32), {}
        tokenizer, text = Tokenizer.from_pretrained(args.model), read("--text", args.text)
        for path in args.dictionary or [Dictionaries.find(args.model)]:
            d = Dictionaries.load(path, device).check(model.config)
            label = f"N={d.atoms.shape[2]}"
            loaded[f"{label} {Path(path).stem}" if label in loaded else label] = d
        other = read("--calibrate", args.calibrate) if args.calibrate else None

        @functools.cache
        def calibration():
            rows = judge.spare
            if other is not None:
                count = len(tokenizer.encode(other, bos=False)) // args.length
                rows = rows_of(tokenizer, other, args.length, range(0, count * args.length, args.length))
            if not len(rows):
                raise InputError("there is no text left to calibrate on; give --calibrate FILE, or "
                                 "methods that need none with --only")
            return peers.record(model, rows[:32].to(device))

        table = methods(model, loaded, calibration, args.sinks, args.buffer, args.length)
        chosen = [name for name in table if re.search(args.only, name)]
        if set(chosen) <= ({"dense"} if args.figure else set()):
            raise InputError(f"--only {args.only!r} leaves no method to measure or draw; its names "
                             f"are like {', '.join([*table][:2] + [*table][-1:])}")
        judge = Judge(model, tokenizer, text, args.rows, args.length, args.facts)
        print(f"{'method':30} memory      KL   top-1      ppl" + "  recall" * (args.facts > 0))
        for name in chosen:
            memory, make = table[name]
            row = judge.fidelity(make)
            recall = f"  {judge.recall(make):6.1%}" if args.facts else ""
            print(f"{name:30} {memory:6.1%}  {row['kl']:.4f}  {row['top1']:6.1%}  {row['ppl']:7.3f}"
                  + recall, flush=True)
            points += [(name, memory, row["kl"])] * (name != "dense")
        if write:
            with door(f"--figure {args.figure} cannot be written", "name a file where there is room"):
                write(draw(points, Path(args.figure).suffix[1:]))

if __name__ == "__main__":
    run_program(main)
