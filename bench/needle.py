"""Needle in a haystack: a pass key, told once in a text that says nothing, asked for at its end.

As in quality.py, a prompt and its answer pass in one go through a simulated cache. The prompt
attends exactly, as through every real cache. Then all but its newest tokens are compressed, and the
answer sees what is left of them. A key is found if each of its tokens is the likeliest, given the
right ones before it: then greedy decoding prints it. SnapKV, PyramidKV and ZipCache rank tokens by
what the prompt's queries attended to, its end among them: they know the question, all others do
not. What is calibrated sees 32 rows of --calibrate, by default the stories that `tiny` was held to.

The table gives the share of keys found at each length, then at each depth (0: the first line, 1:
the last), and the memory at the least length, where what is stored once for all tokens weighs most.

    python bench/needle.py --lengths 512 1024 --only "dense|auto:20%|KIVI 2|SnapKV" """

import random
import sys
from functools import partial
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from bench import quality
from model import InputError, Llama, Tokenizer, best_device
from train_dict import Parser, Text, between, run_program

HAY = "The grass is green. The sky is blue. The sun is yellow. Here we go. "
TEXT = ("There is an important info hidden inside a lot of irrelevant text. Memorize it.\n"
        "{0}The pass key is {1}. Remember it. {1} is the pass key. {2}\n"
        "What is the pass key? The pass key is")
# Ours, and of each peer the settings nearest to 20 %, and to 10 and 6 % where it goes so low: for
# vectors of 64 numbers, as SmolLM2's. Eviction begins at 10 %.
ONLY = (r"dense|word .*auto:(6.5|10|20)%|KIVI 2|(per token|TurboQuant|QJL) 3|ZipCache 60%|product|"
        r"(transform|KVTC) (6|9|18)%|(SnapKV|PyramidKV) [12]0%")

class Haystack(quality.Judge):
    """Prompts of about `length` tokens that tell a key at this depth, each another one."""

    def __init__(self, model, tokenizer, length, depth, trials):
        self.model, self.facts, seed = model, [], length + round(100 * depth)
        n = round(10 * (length - len(tokenizer.encode(TEXT))) / len(tokenizer.encode(10 * HAY)))
        above = round(depth * n)
        for key in random.Random(seed).sample(range(10_000, 100_000), trials):
            text = TEXT.format(HAY * above, key, HAY * (n - above))
            row, asked = torch.tensor([tokenizer.encode(f"{text} {key}")]), tokenizer.encode(text)
            self.facts.append((row.to(model.norm.weight.device), len(asked), len(asked)))

    def logits(self, row, make, start):
        cache = make(start)
        cache.start = start  # no query before the answer finds anything compressed
        return super().logits(row, lambda start: cache, start)

def main():
    parser = Parser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add, count = parser.add_argument, partial(between, int)
    add("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a folder or a Hub id")
    add("--dictionary", nargs="+", metavar="FILE", help="default: the one known for the model")
    add("--calibrate", default=quality.ROOT / "tiny" / "held-out.txt", help="a text (stories)")
    add("--lengths", type=count(256, 2**20), nargs="+", default=[512, 1024, 2048, 4096],
        help="tokens of a prompt, about (512 1024 2048 4096)")
    add("--depths", type=count(2, 2**10), default=5, help="evenly from 0 to 1 (5)")
    add("--trials", type=count(1, 2**10), default=4, help="keys for each length and depth (4)")
    add("--buffer", type=count(1, 64), default=32, help="newest tokens kept dense (32)")
    add("--sinks", type=count(0, 64), default=4, help="first tokens kept dense (4)")
    add("--only", default=ONLY, metavar="REGEX", help="methods with this in the name")
    parser.set_defaults(figure=None)  # which quality.py draws
    args = parser.parse_args()
    model = Llama.from_pretrained(args.model, best_device(), torch.float32)
    tokenizer, longest = Tokenizer.from_pretrained(args.model), max(args.lengths)
    if longest + 32 > model.config.context:  # for lines do not divide it, and the answer follows
        raise InputError(f"--lengths {longest} is beyond the model's context; give less")
    # Keys depend on positions, so rows are as long as the longest prompt, or as the text allows.
    text = Text([args.calibrate], tokenizer, min(longest, 2048), seed=0)
    # A prompt counts as half of a row: quality.py begins to measure in the middle of its rows.
    table = quality.asked_for(args, model, lambda: text.rows(32, 0), 2 * min(args.lengths))
    depths = [i / (args.depths - 1) for i in range(args.depths)]
    cells = [Haystack(model, tokenizer, T, x, args.trials) for T in args.lengths for x in depths]
    head = "method", "memory", *args.lengths, *(f"depth {depth:.2g}" for depth in depths)
    print(f"| {' | '.join(map(str, head))} |\n{'|---' * len(head)}|")
    for name, (memory, make) in table.items():
        found = torch.tensor([each.recall(make) for each in cells]).view(-1, len(depths))
        shares = found.mean(1).tolist() + found.mean(0).tolist()
        print(f"| {name} | {memory:.1%} |", *(f"{x:.0%} |" for x in shares), flush=True)

if __name__ == "__main__":
    run_program(main)
