"""What compression costs: memory against fidelity, for this project's cache and for its peers.

Text is decoded with the right tokens given (teacher forcing), through a cache in which every token
older than the buffer is compressed. Each layer sees what the compressed layers below made of its
input, so errors compound as in real decoding; but all positions run at once: query t sees token u
as it is if t - u < buffer, else as it comes back from the codes. Against the full cache we take

    KL      mean KL(full || compressed) of the next-token distributions, in nats
    top-1   how often both find the same token likeliest
    ppl     perplexity of the text
    recall  how often a fact that was told once, somewhere far back, is recalled to the last digit

Memory is the bytes of a compressed vector over 2 m, those of 16-bit numbers. The peers are short
simulations: KIVI (Liu et al. 2024, arXiv 2402.02750), per-token quantisation, SnapKV (Li et al.
2024, arXiv 2404.14469).

    python tests/quality.py --rows 3 --facts 24 --only "KIVI|auto" --figure quality.png
"""

import argparse
import random
import re
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tiny")]

from lexico import Dictionaries, SparseCache, code_bytes  # noqa: E402
from model import Llama, Tokenizer, best_device, run_program  # noqa: E402
from train_dict import Simulated  # noqa: E402


# --------------------------------------------------------------------------------------------------
# Methods

def lexico(config, dictionaries, sparsity, **options):
    """The real codes of the real cache, written and read back."""
    def compress(layer, q, k, v):
        shape = k[:, :, 0].shape  # (B, H, T, m)
        cache = SparseCache(config, dictionaries, sparsity, 0, batch=shape[0], **options)
        back = cache.round_trip(layer, torch.stack((k[:, :, 0], v[:, :, 0])))
        return 1, *back[:, :, :, None], None
    return compress


def round_to(x, bits, dim):
    """x on an even grid of 2^bits levels between its extremes along dim, both kept in 16 bits."""
    low, high = x.amin(dim, keepdim=True).half().float(), x.amax(dim, keepdim=True)
    step = ((high - low) / (2**bits - 1)).half().float().clamp(min=1e-8)
    return ((x - low) / step).round().clamp(0, 2**bits - 1) * step + low


def per_token(bits):
    """A grid for every vector."""
    return lambda layer, q, k, v: (1, round_to(k, bits, -1), round_to(v, bits, -1), None)


def kivi(bits, group=32):
    """Keys: a grid for each channel and 32 tokens. Values: for each token and 32 channels."""
    def compress(layer, q, k, v):
        T = k.shape[-2] // group * group
        keys = round_to(k[..., :T, :].unflatten(-2, (-1, group)), bits, -2).flatten(-3, -2)
        values = round_to(v.unflatten(-1, (-1, group)), bits, -1).flatten(-2)
        return group, torch.cat((keys, k[..., T:, :]), dim=-2), values, None
    return compress


def snapkv(share, start, window=32, pool=7):
    """Of the tokens before `start`, keep the share that the last `window` queries there attended to
    most (summed over a KV head's queries, smoothed over neighbours), and that window itself."""
    def compress(layer, q, k, v):
        asked = slice(start - window, start)
        scores = q[..., asked, :] @ k[..., :start, :].mT / k.shape[-1] ** 0.5
        unseen = torch.ones(window, start, device=q.device).triu(start - window + 1).bool()
        votes = scores.masked_fill(unseen, -torch.inf).softmax(-1).sum((2, 3))  # (B, H, start)
        votes = torch.nn.functional.max_pool1d(votes, pool, 1, pool // 2)
        votes[..., asked] = torch.inf
        chosen = votes.topk(max(window, round(share * start)), dim=-1).indices
        kept = torch.ones(*k.shape[:2], k.shape[-2], dtype=torch.bool, device=q.device)
        kept[..., :start] = False
        return 1, k, v, kept.scatter(-1, chosen, True)[:, :, None, None]
    return compress


def methods(config, dictionaries, buffer=32):
    """name -> (bytes of a vector over 2 m, start -> Simulated). dictionaries: a list."""
    m, table = config.head_dim, {"dense": (1.0, lambda start: Simulated())}
    for bits in (2, 3, 4):
        table[f"KIVI {bits} bit"] = bits / 16 + 2 / 32, lambda start, b=bits: Simulated(
            kivi(b), buffer)
        table[f"per token {bits} bit"] = bits / 16 + 2 / m, lambda start, b=bits: Simulated(
            per_token(b), buffer)
    for share in (0.1, 0.2, 0.3):
        table[f"SnapKV {share:.0%}"] = share, lambda start, r=share: Simulated(
            snapkv(r, start), buffer, start)
    for d in dictionaries:
        rows = [(f"{coding} N={d.n_atoms} s={s}", s, {"coding": coding})
                for coding in ("fp8", "word") for s in (2, 4, 6, 8, 11, 15)]
        rows += [(f"word N={d.n_atoms} beam {W} s={s}", s, {"coding": "word", "beam": W})
                 for W in (2, 4) for s in (4, 8)]
        rows += [(f"word N={d.n_atoms} auto:{share:.0%}", d.allocate(share, "word"),
                  {"coding": "word"}) for share in (0.06, 0.09, 0.12, 0.15, 0.18, 0.2, 0.25, 0.3)]
        for name, s, options in rows:
            size = np.mean([code_bytes(options["coding"], s) for s in np.ravel(s)])
            codec = lexico(config, d, s, **options)
            table[f"Lexico {name}"] = size / (2 * m), lambda start, c=codec: Simulated(c, buffer)
    return table


# --------------------------------------------------------------------------------------------------
# Measures

class Judge:
    """A model, texts and facts to recall, and what the full cache makes of them."""

    def __init__(self, model, tokenizer, text, rows=4, length=1024, facts=24, seed=0):
        from pretrain import recall
        self.model, self.half = model, length // 2
        device, rng = next(model.parameters()).device, random.Random(seed)
        ids, bos = tokenizer.encode(text, bos=False), tokenizer.encode("")
        starts = [rng.randrange(len(ids) - length) for _ in range(rows)]
        self.rows = torch.tensor([(bos + ids[i:])[:length] for i in starts], device=device)
        self.full = self._decode(lambda start: Simulated())
        self.facts = []  # a row of tokens, and where the question and the answer begin in it
        for i in range(facts):  # one of eight facts in a text, told at any depth
            place = rng.randrange(len(text) - 3 * length)
            context, [question] = recall(rng, text[place:][:3 * length], 8, 1, (i % 8) / 8)
            parts = [tokenizer.encode(context)]
            parts += [tokenizer.encode(part, bos=False) for part in question]
            row = torch.tensor([sum(parts, [])], device=device)
            self.facts.append((row, len(parts[0]), len(parts[0] + parts[1])))

    @torch.inference_mode()
    def _decode(self, make):
        """Log-probabilities (rows, length / 2, vocab) of the second half of every text."""
        return torch.cat([self.model(row[None], make(self.half))[:, self.half - 1:-1]
                          .float().log_softmax(-1) for row in self.rows])

    def fidelity(self, make):
        """KL(full || method), top-1 agreement and perplexity of the method."""
        q, p = self._decode(make), self.full
        return {"kl": (p.exp() * (p - q)).sum(-1).mean().item(),
                "top1": (p.argmax(-1) == q.argmax(-1)).float().mean().item(),
                "ppl": q.gather(-1, self.rows[:, self.half:, None]).mean().neg().exp().item()}

    @torch.inference_mode()
    def recall(self, make):
        """Share of the facts recalled with every token right. The text before a question was
        compressed without knowing the question."""
        right = [torch.equal(self.model(row, make(question)).argmax(-1)[:, answer - 1:-1],
                             row[:, answer:]) for row, question, answer in self.facts]
        return sum(right) / len(right)


def draw(points, path):
    """Memory against KL, a line for each kind of method, from (name, memory, KL)."""
    import matplotlib.pyplot as plt
    kinds, (figure, axes) = {}, plt.subplots(figsize=(8, 5))
    for name, memory, kl in points[1:]:  # the first is the full cache
        kinds.setdefault(re.sub(r"[ :](s=)?\d+( bit|%)?$", "", name), []).append((memory, kl))
    for kind, line in kinds.items():
        style = {"Lexico fp8": "s--", "Lexico word": "o-"}.get(kind[:11].strip(), "^:")
        axes.plot(*zip(*sorted(line)), style, label=kind)
    axes.set(yscale="log", xlim=(0, 0.36), xlabel="bytes of a vector, as a share of 16 bit",
             ylabel="KL(full || compressed) per token, nats")
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--dictionary", nargs="*", help="default: the one known for the model")
    parser.add_argument("--text", default=str(ROOT / "tiny" / "held-out.txt"))
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--facts", type=int, default=100, help="0: no recall")
    parser.add_argument("--only", default="", metavar="REGEX", help="methods with this in the name")
    parser.add_argument("--figure", metavar="FILE", help="draw memory against KL (matplotlib)")
    args = parser.parse_args()
    device = best_device()
    model = Llama.from_pretrained(args.model, device, torch.float32)
    paths = args.dictionary or [Dictionaries.find(args.model)]
    loaded = [Dictionaries.load(path, device).check(model.config) for path in paths]
    text = Path(args.text).read_text(encoding="utf-8")
    judge = Judge(model, Tokenizer.from_pretrained(args.model), text, args.rows, facts=args.facts)
    print(f"{'method':30} memory      KL   top-1      ppl" + "  recall" * (args.facts > 0))
    points = []
    for name, (memory, make) in methods(model.config, loaded).items():
        if not re.search(args.only, name):
            continue
        row = judge.fidelity(make)
        recall = f"  {judge.recall(make):6.1%}" if args.facts else ""
        print(f"{name:30} {memory:6.1%}  {row['kl']:.4f}  {row['top1']:6.1%}  {row['ppl']:7.3f}"
              + recall, flush=True)
        points.append((name, memory, row["kl"]))
    if args.figure:
        draw(points, args.figure)


if __name__ == "__main__":
    run_program(main)
