"""What compression costs: memory against fidelity, for this project's cache and for its peers.

Text is decoded with the right tokens given (teacher forcing), through a cache in which every token
older than the buffer is compressed. Each layer sees what the compressed layers below made of its
input, so errors compound as in real decoding, but all positions run at once: query t sees token u
as it is if t - u < buffer, else as it comes back from the codes. Against the full cache we take

    KL      mean KL(full || compressed) of the next-token distributions, in nats
    top-1   how often both find the same token likeliest
    ppl     perplexity of the text
    recall  how often a fact that was told once, somewhere far back, is recalled to the last digit

the first three in the second half of every row. Memory is the bytes of a compressed vector over
those of its numbers in 16 bits. Buffer and sinks, the same for all methods, are not counted. Peers:
peers.py.

    python bench/quality.py --rows 3 --only "KIVI|auto" --figure quality.png"""

import io
import os
import random
import re
import sys
from functools import cache, partial
from math import ceil
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from bench import peers
from lexico import CODINGS, KEYS, VALUES, Dictionaries, join, split
from model import InputError, Llama, NoCache, Tokenizer, best_device, door
from omp import omp, omp_beam, reconstruct
from tiny.pretrain import recall
from train_dict import Parser, Simulated, Text, between, output_file, read_text, run_program

# ---- Methods -------------------------------------------------------------------------------------

def lexico(d, sparsity, coding, pursuit, spared, start=0):
    """The real codes of the real cache, written and read back. d: Dictionaries. sparsity: one
    number, or one for each dictionary (2, L)."""
    def code(kind, layer, x):
        D, scale, Y = d.atoms[kind, layer], d.scale[kind, layer], join(x[:, :, 0], d.heads)
        (B, H, T, _), s = Y.shape, int(np.broadcast_to(sparsity, d.scale.shape)[kind, layer])
        codes = CODINGS[coding](D, scale, s, B, H, T)
        parts = codes.encode(D[None], (Y / scale).flatten(0, 2)[None], s, pursuit)
        codes.write(torch.arange(T, device=x.device), parts)
        indices, z = codes.read(0, T)  # (B H, T, s)
        back = reconstruct(D * scale, indices.flatten(0, 1), z.flatten(0, 1)).view_as(Y)
        return split(back, d.heads)[:, :, None]
    return Simulated(lambda layer, q, k, v: (code(KEYS, layer, k), code(VALUES, layer, v), None),
                     **spared)

def methods(model, dictionaries, calibration, spared, length=1024):
    """name -> (bytes of a vector over those in 16 bits, start -> cache). dictionaries: by name.
    spared: buffer and sinks. calibration(): what to calibrate on, as peers.record gives it."""
    table = {"dense": (1.0, lambda start: NoCache()),
             **peers.methods(model, calibration, spared, length)}
    for label, d in dictionaries.items():
        N, M = d.atoms.shape[2:]
        ladder = [ceil(M * i / 64) for i in (2, 4, 6, 8, 11, 15)]
        rows = [(f"{coding} {label} s={s}", s, coding, omp) for coding in CODINGS for s in ladder]
        rows += [(f"word {label} beam {W} s={s}", s, "word", partial(omp_beam, width=W))
                 for W in (2, 4) for s in (ladder[1], ladder[3])]
        if "divergence" in d.metadata:
            rows += [(f"word {label} auto:{share:g}%", d.allocate(share / 100, "word"), "word", omp)
                     for share in (6.5, 9, 10, 13, 15, 18, 20, 25, 30)]
        for name, s, coding, pursuit in rows:
            if N <= CODINGS[coding].most_atoms:
                size = np.mean([CODINGS[coding].nbytes_each(each) for each in np.ravel(s)])
                make = partial(lexico, d, s, coding, pursuit, spared)
                table[f"Lexico {name}"] = size / (2 * M), make
    return table

def asked_for(args, model, rows, length):
    """Of all methods, those that args ask for. rows(): rows of tokens to calibrate on."""
    dictionaries, device = {}, model.norm.weight.device
    for path in args.dictionary or [Dictionaries.find(args.model)]:
        d = Dictionaries.load(path, device).check(model.config)
        label = f"N={d.atoms.shape[2]}" + f" heads={d.heads}" * (d.heads > 1)
        dictionaries[f"{label} {path}" if label in dictionaries else label] = d
    calibration = cache(lambda: peers.record(model, rows().to(device)))
    table = methods(model, dictionaries, calibration,
                    {"buffer": args.buffer, "sinks": args.sinks}, length)
    with door(f"--only {args.only} is no regular expression", "give one, as 'KIVI|auto'"):
        chosen = {name: row for name, row in table.items() if re.search(args.only, name)}
    if not {*chosen} - ({"dense"} if args.figure else set()):
        raise InputError(f"--only {args.only} leaves no method to measure or draw; names are "
                         f"{', '.join([*table][:6])}, ... {[*table][-1]}")
    return chosen

# ---- Measures ------------------------------------------------------------------------------------

class Judge:
    """A model, texts and facts to recall, and what the full cache makes of them. spare: rows of the
    text that are not measured, to calibrate on."""

    def __init__(self, model, tokenizer, text, rows=4, length=1024, facts=0, seed=0):
        self.model, self.half, self.facts, rng = model, length // 2, [], random.Random(seed)
        ids, bos = tokenizer.encode(text, bos=False), tokenizer.encode("")
        tokenizer.check(ids, model.config)
        longest = min(model.config.context, len(ids) - 1, len(text) // 3 - 1 if facts else length)
        if length > longest:
            raise InputError(f"--length {length} is more than the {longest} that the model's "
                             "context and the text leave room for; give less, or a longer --text")
        starts = [rng.randrange(len(ids) - length) for _ in range(rows)]
        spare = [i for i in range(0, len(ids) - length, length)
                 if all(abs(i - start) >= length for start in starts)]
        self.rows, self.spare = (torch.tensor([(bos + ids[i:])[:length] for i in places]).to(
            model.norm.weight.device) for places in (starts, spare))
        self.full = [self.log_p(row, lambda start: NoCache()) for row in self.rows]
        for i in range(facts):  # one of eight facts in a text, told at any depth
            place = rng.randrange(len(text) - 3 * length)
            context, [question] = recall(rng, text[place:][:3 * length], 8, 1, (i % 8) / 8)
            told, asked, answer = (tokenizer.encode(part, bos=part is context)
                                   for part in (context, *question))
            row = self.rows.new_tensor([told + asked + answer])
            self.facts.append((row, len(told), len(told + asked)))

    @torch.inference_mode()
    def logits(self, row, make, start):
        """Logits (1, T, vocab) of a row (1, T) through a new cache."""
        cache = make(start)
        if hasattr(cache, "see"):
            cache.see(peers.record(self.model, row))
        return self.model(row, cache)

    def log_p(self, row, make):
        """Log-probabilities (length / 2, vocab) of the second half of a row (length,)."""
        return self.logits(row[None], make, self.half)[0, self.half - 1:-1].float().log_softmax(-1)

    def fidelity(self, make):
        """KL(full || method), top-1 agreement and perplexity of the method."""
        each = []
        for row, p in zip(self.rows, self.full):
            q = self.log_p(row, make)
            each.append([(p.exp() * (p - q)).sum(-1).mean().item(),
                         (p.argmax(-1) == q.argmax(-1)).float().mean().item(),
                         -q.gather(-1, row[self.half:, None]).mean().item()])
        kl, top1, nats = np.mean(each, axis=0)
        return {"kl": kl, "top1": top1, "ppl": np.exp(nats)}

    def recall(self, make):
        """Share of the facts recalled with every token right. The text before a question was
        compressed without knowing the question."""
        return np.mean([torch.equal(self.logits(row, make, asked).argmax(-1)[:, answer - 1:-1],
                                    row[:, answer:]) for row, asked, answer in self.facts])

# ---- The command ---------------------------------------------------------------------------------

def draw(points):
    """A PNG of memory against KL, from (name, memory, KL), a line for each kind of method."""
    import matplotlib.pyplot as plt
    kinds, (figure, axes), png = {}, plt.subplots(figsize=(8, 6)), io.BytesIO()
    for name, *point in points:
        kinds.setdefault(re.sub(r"[ :]([sd]=)?[\d.]+( bit|%)?$", "", name), []).append(point)
    for kind, line in kinds.items():
        style = "s--" if "fp8" in kind else "o-" if "Lexico" in kind else "^:"
        axes.plot(*zip(*sorted(line)), style, label=kind)
    axes.set(yscale="log", xlim=(0, 0.36), xlabel="bytes of a vector, as a share of 16 bit",
             ylabel="KL(full || compressed) per token, nats")
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(png, dpi=120, bbox_inches="tight")
    return png.getvalue()

def parse_arguments():
    parser = Parser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add, count = parser.add_argument, partial(between, int)
    add("--model", default="tiny", help='a folder, a Hub id, or "tiny" (default)')
    add("--dictionary", nargs="+", metavar="FILE", help="default: the one known for the model")
    add("--text", type=Path, default=ROOT / "tiny" / "held-out.txt", help="what is decoded")
    add("--calibrate", type=Path, help="text for methods that are calibrated; default: the first "
        "32 rows of --text that are not measured")
    add("--rows", type=count(1, 2**20), default=8, help="how many texts (8)")
    add("--length", type=count(128, 2**20), default=1024, help="tokens of each (1024)")
    add("--facts", type=count(0, 2**20), default=0, help="to recall, as tiny learned to (0)")
    add("--buffer", type=count(1, 2**20), default=32, help="newest tokens kept dense (32)")
    add("--sinks", type=count(0, 2**20), default=4, help="first tokens kept dense (4)")
    add("--only", default="", metavar="REGEX", help="methods with this in the name")
    add("--figure", metavar="FILE", help="a PNG of memory against KL (needs matplotlib)")
    args = parser.parse_args()
    if args.buffer + args.sinks >= args.length // 2:
        parser.error(f"--length {args.length} leaves nothing to compress before its second half, "
                     f"beside --buffer {args.buffer} and --sinks {args.sinks}")
    if args.figure:
        with door("--figure needs matplotlib", "pip install matplotlib, or leave it out"):
            import matplotlib.pyplot
    return args

def main():
    args, points = parse_arguments(), []
    with output_file(args.figure) as write:
        model = Llama.from_pretrained(args.model, best_device(), torch.float32)
        tokenizer, text = Tokenizer.from_pretrained(args.model), read_text(args.text).decode()
        other = args.calibrate and Text([args.calibrate], tokenizer, args.length, 0).rows(32, 0)
        table = asked_for(args, model, lambda: judge.spare[:32] if other is None else other,
                          args.length)
        judge = Judge(model, tokenizer, text, args.rows, args.length, args.facts)
        print(f"{'method':30} memory      KL   top-1      ppl" + "  recall" * (args.facts > 0))
        for name, (memory, make) in table.items():
            row, recall = judge.fidelity(make), f"  {judge.recall(make):6.1%}" if args.facts else ""
            print(f"{name:30} {memory:6.1%}  {row['kl']:.4f}  {row['top1']:6.1%}  {row['ppl']:7.3f}"
                  + recall, flush=True)
            points += [(name, memory, row["kl"])] * (name != "dense")
        if args.figure:
            write(draw(points))

if __name__ == "__main__":
    run_program(main)
