"""What compression costs: memory against fidelity, for this project's cache and for its peers.

Text is decoded with the right tokens given (teacher forcing), through a cache in which every token
older than the buffer is compressed. Each layer sees what the compressed layers below made of its
input, so errors compound as in real decoding; but all positions run at once: query t sees token u
as it is if t - u < buffer, else as it comes back from the codes. Against the full cache we take

    KL     mean KL(full || compressed) of the next-token distributions, in nats
    top-1  how often both find the same token likeliest
    ppl    perplexity of the text
    recall how often a fact told once, far back, is recalled to the last digit

Memory is the bytes of a compressed vector over 2 m, those of 16-bit numbers. The peers are short
simulations: KIVI (Liu et al. 2024, arXiv 2402.02750), per-token quantisation, SnapKV (Li et al.
2024, arXiv 2404.14469).

    python tests/quality.py --text held-out.txt --figure frontier.png
"""

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tiny")]

from lexico import Dictionaries, SparseCache  # noqa: E402
from model import InputError, Llama, Tokenizer, best_device, run_program  # noqa: E402


class Simulated:
    """A cache for one whole text at a time. compress(layer, k, v) gives what decoding would read.

    buffer: newest tokens that are kept as they are. start: compression begins with that query.
    """

    length = 0

    def __init__(self, compress=None, buffer=32, start=0):
        self.compress, self.buffer, self.start = compress, buffer, start

    def attend(self, layer, q, k, v):
        B, heads, T, m = q.shape
        q = q.view(B, k.shape[1], -1, T, m)  # (B, H, G, T, m)
        k, v = k[:, :, None], v[:, :, None]  # (B, H, 1, T, m)
        t = torch.arange(T, device=q.device)
        exact = q @ k.mT / m**0.5  # (B, H, G, T, T)
        seen = t <= t[:, None]
        if self.compress is None:
            p = exact.masked_fill(~seen, -torch.inf).softmax(-1)
            return (p @ v).view(B, heads, T, m)
        group, k_hat, v_hat, kept = self.compress(layer, q, k, v)
        leaves = (t // group + 1) * group - 1 + self.buffer  # a group is compressed as a whole
        old = (t[:, None] >= leaves) & (t[:, None] >= self.start)  # (T, T)
        scores = torch.where(old, q @ k_hat.mT / m**0.5, exact).masked_fill(~seen, -torch.inf)
        if kept is not None:  # (B, H, 1, 1, T): what eviction leaves
            scores = scores.masked_fill(old & ~kept, -torch.inf)
        p = scores.softmax(-1)
        out = (p * ~old) @ v + (p * old) @ v_hat
        return out.view(B, heads, T, m)


# --------------------------------------------------------------------------------------------------
# Methods: compress(layer, q, k, v) -> (tokens coded together, k as decoded, v as decoded, kept)

def lexico(config, dictionaries, **options):
    """The real codes of the real cache, written and read back."""
    def compress(layer, q, k, v):
        shape = k[:, :, 0].shape  # (B, H, T, m)
        cache = SparseCache(config, dictionaries, batch=shape[0], buffer=0, **options)
        cache.codes.reserve(shape[2])
        cache._code(slice(layer, layer + 1), 0, torch.stack((k[:, :, 0], v[:, :, 0]))[:, None])
        back = [cache.codes.vectors(kind, layer, 0, shape[2]).view_as(k) for kind in (0, 1)]
        return 1, *back, None
    return compress


def round_to(x, bits, dim):
    """x on an even grid of 2^bits levels between its least and largest number along dim (16-bit
    scale and offset)."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).half().float().clamp(min=1e-8)
    low = low.half().float()
    return ((x - low) / scale).round().clamp(0, 2**bits - 1) * scale + low


def per_token(bits):
    """One grid for each vector."""
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
    """Of the tokens before `start`, keep the share that its last `window` queries attended to most
    (summed over a KV head's queries, smoothed over neighbours), and that window."""
    def compress(layer, q, k, v):
        asked = slice(start - window, start)
        scores = q[..., asked, :] @ k[..., :start, :].mT / k.shape[-1] ** 0.5
        hidden = torch.ones(window, start, device=q.device).triu(start - window + 1).bool()
        votes = scores.masked_fill(hidden, -torch.inf).softmax(-1).sum((2, 3))  # (B, H, start)
        votes = torch.nn.functional.max_pool1d(votes, pool, 1, pool // 2)
        votes[..., asked] = torch.inf
        chosen = votes.topk(max(window, round(share * start)), dim=-1).indices
        kept = torch.ones(*votes.shape[:2], k.shape[-2], dtype=torch.bool, device=q.device)
        kept[..., :start] = False
        return 1, k, v, kept.scatter(-1, chosen, True)[:, :, None, None]
    return compress


# --------------------------------------------------------------------------------------------------
# Measures

class Judge:
    """A model, texts and recall prompts, and what the full cache makes of them."""

    def __init__(self, model, tokenizer, text, count=4, length=1024, facts=24, seed=0, buffer=32):
        self.model, self.buffer, self.half = model, buffer, length // 2
        device, rng = next(model.parameters()).device, random.Random(seed)
        ids = tokenizer.encode(text, bos=False)
        starts = [rng.randrange(len(ids) - length) for _ in range(count)]
        bos = [tokenizer.bos_id] * (tokenizer.bos_id is not None)
        self.rows = torch.tensor([(bos + ids[start:])[:length] for start in starts], device=device)
        self.full = self._decode(lambda start: None)
        self.recalls = []  # token rows, and where the answer and the question begin in them
        for i in range(facts):  # one fact to find among eight, told at any depth of the text
            place = rng.randrange(len(text) - 4 * length)
            context, questions = recall(rng, text[place:place + 3 * length], 8, 1, (i % 8) / 8)
            parts = [tokenizer.encode(context)[-length:]]
            parts += [tokenizer.encode(part, bos=False) for part in questions[0]]
            row = torch.tensor([sum(parts, [])], device=device)
            self.recalls.append((row, len(parts[0]) + len(parts[1]), len(parts[0])))

    def _cache(self, method, start):
        return Simulated(method(start), self.buffer, start if method(start) in EVICTING else 0)

    @torch.inference_mode()
    def _decode(self, method):
        """Log-probabilities (rows, half, vocab) of the second half of every text."""
        return torch.cat([self.model(row[None], self._cache(method, self.half))[:, self.half - 1:-1]
                          .float().log_softmax(-1) for row in self.rows])

    def fidelity(self, method):
        """KL(full || method), top-1 agreement and perplexity. method: start -> compress."""
        q, p = self._decode(method), self.full
        targets = self.rows[:, self.half:, None]
        return {"kl": (p.exp() * (p - q)).sum(-1).mean().item(),
                "top1": (p.argmax(-1) == q.argmax(-1)).float().mean().item(),
                "ppl": q.gather(-1, targets).mean().neg().exp().item()}

    @torch.inference_mode()
    def recall(self, method):
        """Share of facts recalled with every token right. What comes before the question is
        compressed without having seen it."""
        right = 0
        for row, answer, question in self.recalls:
            best = self.model(row, self._cache(method, question)).argmax(-1)
            right += torch.equal(best[:, answer - 1:-1], row[:, answer:])
        return right / len(self.recalls)
