"""Generate text with the sparse-coded cache, and see what every token costs.

    python generate.py --prompt "Once upon a time" --sparsity 8

A line for each token: the time of its forward pass, the time of coding, and the bytes of the cache
beside those of a dense one in 16 bits. --dense runs the usual cache, --compare runs both.
"""

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from lexico import DenseCache, Dictionaries, SparseCache
from model import Config, InputError, Llama, Tokenizer, best_device, run_program


def sample(logits, temperature, top_p, generator):
    """Next tokens (B,) from logits (B, vocab): the likeliest one at temperature 0; else drawn from
    the smallest set of tokens that holds top_p of the probability (Holtzman et al. 2020)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    p, tokens = (logits.float() / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    p[p.cumsum(dim=-1) - p >= top_p] = 0  # what comes before a token alone reaches top_p
    choice = torch.multinomial(p.cpu(), 1, generator=generator).to(tokens.device)
    return tokens.gather(-1, choice)[:, 0]


def clock(device):
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.inference_mode()
def generate(model, cache, prompt, max_new_tokens, choose):
    """Run the prompt (B, T), then decode. Yields for each new token a dict of

        tokens (B,), logits (B, vocab), forward and coding in seconds.

    The first one's forward pass is the prompt's. choose(logits, step) gives the next tokens (B,).
    """
    tokens = prompt
    for step in range(max_new_tokens):
        start = clock(prompt.device)
        logits = model(tokens, cache, last_only=True)[:, -1]
        tokens = choose(logits, step)[:, None]
        middle = clock(prompt.device)
        if isinstance(cache, SparseCache):
            cache.compress()
        end = clock(prompt.device)
        yield {"tokens": tokens[:, 0], "logits": logits,
               "forward": middle - start, "coding": end - middle}


def run(args, model, tokenizer, cache, prompt, forced=None, show=None):
    """Generate with one cache: the list of steps, and the reason for its end.

    forced: tokens to take instead of choosing. show(step, text, record): called as each is made.
    """
    generator, stream = torch.Generator().manual_seed(args.seed), tokenizer.stream()
    room = model.config.context - prompt.shape[1]  # the last new token need not fit

    def choose(logits, step):
        if forced is not None:
            return forced[step]
        return sample(logits, args.temperature, args.top_p, generator)

    count = min(args.max_new_tokens, room + 1) if forced is None else len(forced)
    steps, reason = [], "context full" if count < args.max_new_tokens else "as many as asked for"
    try:
        for record in generate(model, cache, prompt, count, choose):
            token = record["tokens"][0].item()
            record["bytes"] = cache.nbytes()
            steps.append(record)
            if token in model.config.eos_ids and forced is None:
                reason = "end of text"
                break
            if show:
                show(len(steps), stream(token), record)
    except KeyboardInterrupt:
        reason = "interrupted"
    if show:
        show(None, stream(None), None)
    return steps, reason


def peak_memory(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def size(nbytes):
    """Bytes, as one reads them."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000


def summary(steps, reason, device):
    """What a run took: a dict of plain numbers, seconds and bytes."""
    latency = torch.tensor([r["forward"] + r["coding"] for r in steps[1:]] or [0.0])
    coding = torch.tensor([r["coding"] for r in steps[1:]] or [0.0])
    return {"new_tokens": len(steps), "ended": reason,
            "prefill": steps[0]["forward"], "median": latency.median().item(),
            "p95": latency.quantile(0.95).item(), "median_coding": coding.median().item(),
            "tokens_per_second": len(latency) / max(latency.sum().item(), 1e-9),
            "cache": steps[-1]["bytes"], "peak_memory": peak_memory(device)}


def print_summary(name, s, prompt_length):
    cache = s["cache"]
    print(f"{name}: {prompt_length} + {s['new_tokens']} tokens, {s['ended']}")
    prefill, median, p95 = (s[key] * 1e3 for key in ("prefill", "median", "p95"))
    print(f"  time      prefill {prefill:.1f} ms, then {median:.2f} ms a token (95 % within "
          f"{p95:.2f}), {s['tokens_per_second']:.1f} tokens/s")
    parts = [f", {part} {size(cache[part])}" for part in ("codes", "buffer") if part in cache]
    print(f"  cache     {size(cache['total'])}{''.join(parts)}: {cache['total'] / cache['dense']:.1%} "
          f"of the {size(cache['dense'])} of a dense 16-bit cache")
    if "dictionaries" in cache:
        print(f"  constant  dictionaries {size(cache['dictionaries'])}, whatever context and batch")
    print(f"  memory    at most {size(s['peak_memory'])} in use")


def print_comparison(sparse, dense, forced):
    """Sparse and dense side by side; forced is the sparse cache run over the dense cache's text."""
    a, b = ([r["tokens"][0].item() for r in steps] for steps in (sparse, dense))
    same = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    p, q = (torch.cat([r["logits"] for r in steps]).float().log_softmax(-1)
            for steps in (dense, forced))
    kl = F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean().item()
    agree = (p.argmax(-1) == q.argmax(-1)).float().mean().item()
    print(f"agreement: the texts share their first {same} tokens; on the dense text, mean KL(dense "
          f"|| sparse) {kl:.4f}, the same likeliest token {agree:.1%} of the time")
    return {"shared_tokens": same, "kl": kl, "top1_agreement": agree}


def read_prompt(args):
    """The prompt's text, from --prompt, --prompt-file or standard input ("-")."""
    try:
        if "-" in (args.prompt, args.prompt_file):
            text = sys.stdin.buffer.read().decode("utf-8")
        elif args.prompt_file is not None:
            text = Path(args.prompt_file).read_text(encoding="utf-8")
        else:
            text = args.prompt
    except UnicodeDecodeError:
        raise InputError(f"prompt file '{args.prompt_file}' is not UTF-8 text") from None
    except OSError as error:
        raise InputError(f"prompt file '{args.prompt_file}': {error.strerror}") from None
    if not text.strip():
        raise InputError("the prompt is empty; give some text with --prompt or --prompt-file")
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", default="Once upon a time", help='"-": standard input')
    source.add_argument("--prompt-file", help='a UTF-8 text file, or "-" for standard input')
    parser.add_argument("--model", default="tiny", help='a folder, a Hub id, or "tiny" (default)')
    parser.add_argument("--dictionary", help="default: the one known for the model")
    parser.add_argument("--sparsity", type=int, default=8, help="coefficients a vector (default 8)")
    parser.add_argument("--buffer", type=int, default=32, help="newest tokens kept dense (32)")
    parser.add_argument("--window", type=int, default=1, help="tokens coded at a time (1)")
    parser.add_argument("--beam", type=int, default=1, help="width of the search (1: plain OMP)")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): the likeliest")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="default: the best there is")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"),
                        help="default: float32 on a CPU, else that of the weights")
    parser.add_argument("--dense", action="store_true", help="the usual cache instead")
    parser.add_argument("--compare", action="store_true", help="both caches, side by side")
    parser.add_argument("--quiet", action="store_true", help="print the text and nothing else")
    parser.add_argument("--json", metavar="FILE", help="write all figures there too")
    args = parser.parse_args()
    for name, good in (("max_new_tokens", args.max_new_tokens >= 1), ("top_p", 0 < args.top_p <= 1),
                       ("temperature", args.temperature >= 0)):
        if not good:
            option, value = name.replace("_", "-"), getattr(args, name)
            raise InputError(f"--{option} {value} is out of range; see --help")
    try:
        device = torch.device(args.device or best_device())
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {args.device} cannot be used here ({reason})") from None
    text = read_prompt(args)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    if dtype is None and device.type == "cpu":
        dtype = torch.float32
    config = Config.from_pretrained(args.model)
    dictionaries = None
    if not args.dense:
        path = args.dictionary or Dictionaries.find(args.model)
        dictionaries = Dictionaries.load(path, device).check(config)
    tokenizer = Tokenizer.from_pretrained(args.model)
    prompt = torch.tensor([tokenizer.encode(text)], device=device)
    if prompt.shape[1] > config.context:
        raise InputError(f"the prompt has {prompt.shape[1]} tokens, more than the model's context "
                         f"of {config.context}; shorten it")
    model = Llama.from_pretrained(args.model, device, dtype)

    def new_cache(dense):
        if dense:
            return DenseCache(config, device=device, dtype=model.norm.weight.dtype)
        return SparseCache(config, dictionaries, args.sparsity, args.buffer, args.window,
                           beam=args.beam, dtype=torch.bfloat16)

    def show(step, text, record):
        if args.quiet or step is None:
            print(text, end="" if step else "\n", flush=True)
            return
        total, dense = record["bytes"]["total"], record["bytes"]["dense"]
        print(f"{step:5d}  {text!r:16.16}  {record['forward'] * 1e3:9.2f}  "
              f"{record['coding'] * 1e3:9.2f}  {size(total):>9}  {total / dense:7.1%}", flush=True)

    if not args.quiet:
        print(" step  token             forward ms  coding ms      cache  of dense")
    steps, reason = run(args, model, tokenizer, new_cache(args.dense), prompt, show=show)
    figures = {"arguments": vars(args), "prompt_tokens": prompt.shape[1]}
    if not steps:
        return 130
    new = [record["tokens"][0].item() for record in steps]
    figures["text"] = tokenizer.decode(new)
    name = "dense" if args.dense else "sparse"
    figures[name] = summary(steps, reason, device)
    if not args.quiet:
        print(text + figures["text"])
        print()
        print_summary(name, figures[name], prompt.shape[1])
    if args.compare and not args.dense and reason != "interrupted":
        other, other_reason = run(args, model, tokenizer, new_cache(True), prompt)
        forced, _ = run(args, model, tokenizer, new_cache(False), prompt,
                        forced=[record["tokens"] for record in other])
        figures["dense"] = summary(other, other_reason, device)
        if not args.quiet:
            print_summary("dense", figures["dense"], prompt.shape[1])
            figures["agreement"] = print_comparison(steps, other, forced)
    if args.json:
        figures["steps"] = [{"token": t, "forward": r["forward"], "coding": r["coding"],
                             **r["bytes"]} for t, r in zip(new, steps)]
        write_json(args.json, figures)
    return 130 if reason == "interrupted" else 0


def write_json(path, figures):
    try:
        Path(f"{path}.part").write_text(json.dumps(figures, indent=1) + "\n")
        os.replace(f"{path}.part", path)
    except OSError as error:
        raise InputError(f"--json {path} cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    run_program(main)
