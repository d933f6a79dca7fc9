"""How fast it is, in any shape: weights, atoms and codes are random, there is nothing to download.

    python bench/speed.py omp                           coding, in the shape of Llama-3.1-8B
    python bench/speed.py attention                     one layer's attention for one token
    python bench/speed.py decode --config config.json --prompt-length 32768 [--dense]

Times are medians after a warm-up. On a GPU, omp and attention give those of a CUDA graph, the
device's own time; decode gives whole steps, with Python, sampling and coding: the second half of
them, after all has run once. Under torchrun, decode shares the model out over several GPUs."""

import json
import sys
import timeit
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from generate import describe, generate, new_cache, summary
from kernels import attend_fused
from kernels.graphs import compile_layers
from kernels.parallel import parallelize, world
from lexico import CODINGS, Dictionaries, SparseCache, attend_codes, shape_of
from model import Config, Llama, door
from omp import omp, omp_levels
from train_dict import Parser, between, run_program

def milliseconds(function, cuda):
    """Median time of function(), once it is warm; on a GPU as a CUDA graph, the device's time."""
    if cuda:
        from triton.testing import do_bench_cudagraph
        return do_bench_cudagraph(function, return_mode="median")
    function()
    return 1e3 * median(timeit.repeat(function, number=1, repeat=9))

def random_dictionaries(args, config):
    shape = 2, config.n_layers, args.atoms, args.heads * config.head_dim
    atoms = F.normalize(torch.randn(shape, device=args.device), dim=-1).to(args.dtype)
    return Dictionaries(atoms, torch.full(shape[:2], 1 / 64, device=args.device), shape_of(config))

def time_omp(args):
    """coding: a decoded token of all layers, then a prompt of one"""
    print("ms to code, m = 128, on", args.device)
    for L, B in ((64, 8), (1, 20_000)) if args.cuda else ((4, 8), (1, 1000)):
        for N, s in ((4096, 8), (4096, 16), (2048, 8)):
            D = F.normalize(torch.randn(L, N, 128, device=args.device), dim=-1).to(args.dtype)
            Y, bits = torch.randn(L, B, 128, device=args.device), CODINGS["word"].level_bits(N)
            print(f"  {L:2d} x {B:5d} vectors, N = {N}, s = {s:2d}: "
                  f"fp8 {milliseconds(lambda: omp(D, Y, s), args.cuda):8.3f}, "
                  f"word {milliseconds(lambda: omp_levels(D, Y, s, bits), args.cuda):8.3f}")

def time_attention(args):
    """a token's attention in one layer of Llama-3.1-8B's shape: over a dense cache, over codes that
    use all atoms alike or, as real ones do, some far more than others (Zipf)"""
    L = 8 if args.cuda else 1  # layers in turn, so that the processor's caches are cold
    config = Config(vocab_size=1, dim=4096, n_layers=L, n_heads=32, kv_heads=8, head_dim=128,
                    ffn_dim=1, context=1)
    d = random_dictionaries(args, config)
    sizes = (1, 2048), (1, 8192), (1, 32768), (1, 131072), (32, 8192)
    names = "".join(f"{name:>11}" for name in ("dense", "fp8", "fp8 Zipf", "word", "word Zipf"))
    print(f"{'us a layer':18}{names}   on {args.device}")
    for B, T in sizes if args.cuda else sizes[1:3]:
        q = torch.randn(B, 32, 1, 128, device=args.device, dtype=args.dtype)
        kv = torch.randn(L, 2, B, 8, T, 128, device=args.device, dtype=args.dtype)
        row = [milliseconds(lambda: [F.scaled_dot_product_attention(q, *layer, enable_gqa=True)
                                     for layer in kv], args.cuda)]
        del kv
        for coding, zipf in (("fp8", False), ("fp8", True), ("word", False), ("word", True)):
            cache = SparseCache(config, d, args.sparsity, 128, 1, 0, B, T, coding, dtype=args.dtype)
            cache.advance(T, T - 128)
            cache.begin(1)
            for codes in cache.codes.values():
                first, second = codes.parts
                u = torch.rand(first.shape, device=args.device)
                index = args.atoms**u - 1 if zipf else args.atoms * u
                level = torch.randint(2**codes.bits, first.shape, device=args.device)
                first.copy_((index.int() << codes.bits) | level)  # level: 0 for FP8, which has none
                second.copy_(100 * torch.ones(second.shape) if codes.bits else 2 * u - 1)
            steps = [(q, cache.codes[0, i], cache.codes[1, i], cache.boundary, *cache.dense[:, i],
                      cache.seen) for i in range(L)]
            attend = attend_codes if attend_fused(*steps[0]) is None else attend_fused
            row.append(milliseconds(lambda: [attend(*step) for step in steps], args.cuda))
        print(f"{B:2d} x {T:6d} tokens" + "".join(f"{1e3 * ms / L:11.1f}" for ms in row))

def time_decode(args):
    """whole decoding steps after a random prompt"""
    with door(f"--config {args.config} is no config.json", "give that of a Llama, Mistral or Qwen"):
        config = Config.from_hf(json.loads(args.config.expanduser().read_text("utf-8")))
    torch.manual_seed(0)
    with torch.device("meta"):
        model = parallelize(Llama(config).to(args.dtype), args.rank, args.ranks)
    for weights in model.to_empty(device=args.device).parameters():
        weights.normal_(0, 0.02)
    prompt = torch.randint(config.vocab_size, (args.batch, args.prompt_length)).to(args.device)
    length, d = args.prompt_length + args.max_new_tokens, random_dictionaries(args, config)
    if args.compile:
        compile_layers()

    def start():
        cache = new_cache(args, model, d, args.dense, length)
        return generate(model, cache, prompt, args.max_new_tokens,
                        lambda logits: logits.argmax(-1), record=args.cuda)
    next(start())  # so that what is measured awaits no compiler
    steps = [{**step, "logits": None} for step in start()]
    name = f"batch {args.batch}, {'dense' if args.dense else 'sparse'}"
    print(describe(name, summary(steps, "as asked for", prompt)))

SHAPE = {"atoms": 4096, "sparsity": 8, "heads": 1}  # of dictionaries and codes
STEPS = {"batch": 1, "prompt-length": 512, "max-new-tokens": 64,
         "buffer": 128, "window": 16, "sinks": 4}

def parse_arguments():
    parser = Parser(description=__doc__.partition(":")[0], allow_abbrev=False)
    tables = parser.add_subparsers(required=True, metavar="omp | attention | decode")
    for run, numbers in (time_omp, {}), (time_attention, SHAPE), (time_decode, {**SHAPE, **STEPS}):
        table = tables.add_parser(run.__name__[5:], help=run.__doc__, allow_abbrev=False)
        table.set_defaults(run=run)
        for name, default in numbers.items():
            table.add_argument(f"--{name}", type=between(int, min(default, 1), 2**24),
                               default=default, help=f"default: {default}")
        table.add_argument("--device", help="default: the best there is")
    table.add_argument("--config", type=Path, required=True, help="any model's config.json")
    table.add_argument("--coding", choices=CODINGS, default="word")
    table.add_argument("--compile", action="store_true", help="torch.compile the layers")
    table.add_argument("--dense", action="store_true", help="the usual cache instead")
    table.set_defaults(pursuit=omp)
    args = parser.parse_args()
    args.device, args.rank, args.ranks = world(args.device)
    args.cuda = args.device.type == "cuda"
    args.dtype = torch.bfloat16 if args.cuda else torch.float32
    return args

@torch.inference_mode()
def main():
    args = parse_arguments()
    args.run(args)

if __name__ == "__main__":
    run_program(main)
