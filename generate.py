"""Generate text with the sparse-coded cache, and see what every token costs.

    python generate.py --prompt "Once upon a time" --sparsity 8

A line for each token: the time of its forward pass, the time of coding, and the bytes of the cache
beside those of a dense one in 16 bits. --dense runs the usual cache, --compare runs both, --chat
holds a conversation over one cache.
"""

import json
import os
import resource
import sys
import time
from math import inf
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F

from lexico import CODINGS, DenseCache, Dictionaries, SparseCache
from model import (ANSWER, Chat, Config, InputError, Llama, Parser, Tokenizer, compile_layers,
                   parallelize, run_program, world)


def sample(logits, temperature, top_p, generator):
    """Next tokens (B,) from logits (B, vocab): the likeliest one at temperature 0; else drawn from
    the smallest set of tokens that holds top_p of the probability (Holtzman et al. 2020)."""
    if temperature < 1e-6:  # logits divided by less may overflow
        return logits.argmax(dim=-1)
    p, tokens = (logits.float() / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    p[p.cumsum(dim=-1) - p >= top_p] = 0  # what comes before a token alone reaches top_p
    choice = torch.multinomial(p.cpu(), 1, generator=generator).to(tokens.device)
    return tokens.gather(-1, choice)[:, 0]


def sampler(args):
    """A function for generate, logits -> tokens, that repeats itself with every new one."""
    generator = torch.Generator().manual_seed(args.seed)
    return lambda logits: sample(logits, args.temperature, args.top_p, generator)


def clock(device):
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Recorded:
    """A function without arguments that becomes a CUDA graph with its third call.

    A decoding step is hundreds of kernels, most of them over before Python has launched the next. A
    graph launches them all at once, at the same addresses. Before that the function runs twice as
    it is: kernels compile, libraries find their memory. count() does for a replay what Python did
    beside launching.
    """

    def __init__(self, function, count, record):
        self.function, self.count, self.record = function, count, record
        self.calls, self.graph = 0, None

    def __call__(self):
        self.calls += 1
        if not self.record or self.calls <= 2:
            return self.function()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # nothing runs, but Python counts
                self.out = self.function()
        else:
            self.count()
        self.graph.replay()
        return self.out


def peak_memory(device):
    """Bytes that were in use at most: on a GPU since the last call, else by the process so far."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@torch.inference_mode()
def generate(model, cache, prompt, count, choose, record=False, ends=()):
    """Run the prompt (B, T), then decode: `count` new tokens in all, or up to one of `ends` in the
    first sequence. Yields for each one a dict of

        tokens (B,), logits (B, vocab), forward and coding in seconds, bytes (the cache's nbytes),
        memory (see peak_memory).

    The first one's forward pass is the prompt's. choose(logits) gives the next tokens (B,).
    record: whether steps become CUDA graphs: then the cache must have room for all tokens.
    """
    peak_memory(prompt.device)  # counts from here
    token, sparse = prompt[:, -1:].clone(), isinstance(cache, SparseCache)  # (B, 1): a step's input
    step = Recorded(lambda: model(token, cache, last_only=True)[:, -1], lambda: cache.count(1),
                    record)
    code = Recorded(lambda: cache.compress(), lambda: cache.count(0, cache.window), record)
    for i in range(count):
        start = clock(prompt.device)
        logits = step() if i else model(prompt, cache, last_only=True)[:, -1]
        token.copy_(choose(logits)[:, None])
        middle = clock(prompt.device)
        if sparse and cache.full:
            code()
        end = clock(prompt.device)
        yield {"tokens": token[:, 0].clone(), "logits": logits.clone(), "forward": middle - start,
               "coding": end - middle, "bytes": cache.nbytes(),
               "memory": peak_memory(prompt.device)}
        if token[0].item() in ends:
            return


def show_progress(model, quiet):
    """Unless quiet, a bar on stderr while the next tokens pass, should that take over two seconds.

    A prompt of any length passes in one go, so that it attends exactly: the activations of one
    layer bound the memory that it takes beside the cache.
    """
    n, device = len(model.layers), model.norm.weight.device

    def passed(layer, inputs, output):
        done = layer.self_attn.layer + 1
        if clock(device) - start > 2:
            print(f"\r[{'#' * (30 * done // n):30}] layer {done} of {n}", end="\n" * (done == n),
                  file=sys.stderr, flush=True)
        hooks.pop(0).remove()

    hooks = [layer.register_forward_hook(passed) for layer in model.layers if not quiet]
    start = clock(device)


def size(nbytes):
    """Bytes, as one reads them."""
    power = min(3, (len(str(int(nbytes))) - 1) // 3)
    return f"{nbytes / 1000**power:.{min(power, 1)}f} {('B', 'kB', 'MB', 'GB')[power]}"


def summary(steps, ended, prompt):
    """What a run took: a dict of plain numbers, in seconds and bytes."""
    # A step, once all is warm: in the second half.
    latency = [step["forward"] + step["coding"] for step in steps[1:][len(steps) // 2:]] or [0.0]
    median, p95 = torch.tensor(latency).quantile(torch.tensor([0.5, 0.95])).tolist()
    return {"prompt_tokens": prompt.shape[1], "new_tokens": len(steps), "ended": ended,
            "prefill": steps[0]["forward"] + steps[0]["coding"],
            "mean": fmean(latency), "median": median, "p95": p95,
            "tokens_per_second": len(prompt) / (fmean(latency) or inf),
            "cache": steps[-1]["bytes"], "prefill_memory": steps[0]["memory"],
            "peak_memory": max(step["memory"] for step in steps[1:] or steps)}


def describe(name, s):
    """A summary, as one reads it."""
    cache = s["cache"]
    parts = [f", {part} {size(cache[part])}" for part in ("codes", "buffer") if part in cache]
    constant = ("\n  constant  dictionaries "
                f"{size(cache['dictionaries'])}, whatever context and batch") if parts else ""
    return (f"{name}: {s['prompt_tokens']} + {s['new_tokens']} tokens, {s['ended']}\n"
            f"  time      prefill {1e3 * s['prefill']:.1f} ms, then {1e3 * s['mean']:.2f} ms a "
            f"token (median {1e3 * s['median']:.2f}, 95 % within {1e3 * s['p95']:.2f}), "
            f"{s['tokens_per_second']:.1f} tokens/s\n"
            f"  cache     {size(cache['total'])}{''.join(parts)}: "
            f"{cache['total'] / cache['dense']:.1%} of a dense 16-bit cache "
            f"({size(cache['dense'])}){constant}\n"
            f"  memory    at most {size(s['prefill_memory'])} in use for the prompt, then "
            f"{size(s['peak_memory'])}")


def agreement(sparse, dense, forced):
    """How far two runs agree, and how far along the dense one's text, which forced was given."""
    same = [torch.equal(a["tokens"], b["tokens"]) for a, b in zip(sparse, dense)] + [False]
    kl, top1 = [], []
    for steps in zip(dense, forced):
        p, q = (step["logits"].to(step["tokens"].device).float().log_softmax(-1) for step in steps)
        kl.append(F.kl_div(q, p, log_target=True, reduction="batchmean").item())
        top1.append((p.argmax(-1) == q.argmax(-1)).float().mean().item())
    return {"shared_tokens": same.index(False), "top1": fmean(top1), "kl": fmean(kl)}


def read(name, function, *args):
    """The text that function(*args) reads from what is called name; "" at its end."""
    try:
        return function(*args)
    except EOFError:
        return ""
    except UnicodeDecodeError:
        raise InputError(f"{name} is not UTF-8; convert it") from None
    except OSError as error:
        raise InputError(f"{name}: {error.strerror}; name a text file") from None


def read_prompt(args):
    """The prompt's text, from --prompt, --prompt-file or standard input ("-")."""
    text = args.prompt
    if "-" in (args.prompt, args.prompt_file):
        text = read("standard input", lambda: sys.stdin.buffer.read().decode("utf-8-sig"))
    elif args.prompt_file is not None:
        path = Path(args.prompt_file)
        text = read(f"--prompt-file {path}", path.read_text, "utf-8-sig")
    if not text.strip():
        raise InputError("the prompt is empty; give some text with --prompt or --prompt-file")
    return text


def chat(args, model, tokenizer, cache):
    """A conversation over one cache, a line of standard input a turn.

    What was said is in the cache and never passes the model again: a turn feeds what comes after
    the last answer, in the template's words.
    """
    template, config, choose = Chat(args.model, tokenizer), model.config, sampler(args)
    ends = {*config.eos_ids, tokenizer.special.get("<|eot_id|>")}
    messages = [template.message("system", args.system)] if args.system else []
    unfed = []  # a token that was sampled but has not passed the model
    while text := read("standard input", input, "" if args.quiet else "> ").strip():
        asked = [*messages, template.message("user", text)]
        new = unfed + template.new_tokens(asked)
        room = config.context - cache.length - len(new)
        if room < 0:
            print(f"error: {len(new)} new tokens do not fit: {cache.length} of the context's "
                  f"{config.context} are taken; shorten it, or start anew", file=sys.stderr)
            continue
        messages = [*asked, {"role": "assistant", "content": ANSWER}]
        stream, seconds = tokenizer.stream(), []
        prompt, count = torch.tensor([new], device=args.device), min(args.max_new_tokens, room + 1)
        show_progress(model, args.quiet)
        for step in generate(model, cache, prompt, count, choose, ends=ends):
            seconds.append(step["forward"] + step["coding"])
            token = step["tokens"].item()
            print(stream(token), end="", flush=True)
        print(stream(None))
        unfed = [token] if token not in ends else []  # the template ends the turn itself
        if not args.quiet:
            print(f"[{len(new)} + {len(seconds)} tokens, {1e3 * fmean(seconds[1:] or [0]):.2f} ms "
                  f"a token, cache {size(step['bytes']['total'])}]")


def read_sparsity(text):
    """A number of coefficients, or "auto:20%" as a share."""
    try:
        return float(text[5:-1]) / 100 if text[:5] == "auto:" and text[-1] == "%" else int(text)
    except ValueError:
        raise InputError(f"--sparsity {text} is neither a number nor like auto:20%") from None


def parse_arguments():
    parser = Parser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    either = parser.add_mutually_exclusive_group().add_argument
    add("--prompt", default="Once upon a time", help='the text to go on from; "-": standard input')
    add("--prompt-file", help='a UTF-8 text file instead; "-": standard input')
    either("--chat", action="store_true", help="converse, a line a turn, until an empty one")
    add("--system", help="the system prompt of --chat")
    add("--model", default="tiny", help='a folder, a Hub id, or "tiny" (default)')
    add("--dictionary", help="a file, a folder or a Hub id; default: the one known for the model")
    add("--sparsity", default="auto:20%", type=read_sparsity, help="coefficients a vector, or "
        "(default) auto:20%%: those that serve best in 20%% of a vector's 16-bit size on average")
    add("--buffer", type=int, default=32, help="newest tokens kept dense (default 32)")
    add("--window", type=int, default=16, help="tokens coded at a time (default 16)")
    add("--beam", type=int, default=1, help="width of the search (default 1: plain OMP)")
    add("--coding", choices=CODINGS, default="word", help="how codes are stored (default word)")
    add("--max-new-tokens", type=int, default=200)
    add("--batch", type=int, default=1, help="copies of the prompt, decoded together (default 1)")
    add("--prompt-length", type=int, default=0, metavar="N", help="N random tokens as a prompt")
    either("--random-weights", action="store_true", help="to measure; --model: any config.json")
    add("--atoms", type=int, default=4096, help="atoms of random dictionaries (default 4096)")
    add("--compile", action="store_true", help="torch.compile the layers (some seconds at first)")
    add("--temperature", type=float, default=0.0, help="0 (default): always the likeliest token")
    add("--top-p", type=float, default=1.0)
    add("--seed", type=int, default=0)
    add("--device", help="default: the best there is")
    add("--dtype", choices=("float32", "bfloat16", "float16"),
        help="default: float32 on a CPU, else that of the weights")
    add("--dense", action="store_true", help="the usual cache instead")
    add("--compare", action="store_true", help="both caches, side by side")
    add("--quiet", action="store_true", help="print the text and nothing else")
    add("--json", metavar="FILE", help="write all figures there too")
    args = parser.parse_args()
    parser.check(args, max_new_tokens=(1, inf), batch=(1, 1 if args.chat else inf), top_p=(1e-6, 1),
                 prompt_length=(0, inf), atoms=(1, 2**15), temperature=(0, inf), seed=(0, 2**63),
                 buffer=(0, 2**24), window=(1, 2**24))
    if args.chat and (args.json or args.compare):
        parser.error("--chat goes with neither --json nor --compare")
    out = args.json and Path(args.json)
    if out and (out.exists() and not out.is_file() or not out.absolute().parent.is_dir()):
        parser.error(f"--json {out} cannot be written; name a file in a folder that exists")
    args.device, args.rank, args.ranks = world(args.device)
    return args


def load(args):
    """Model, tokenizer, dictionaries (None with --dense), prompt (B, T)."""
    config, device, dictionaries = Config.from_pretrained(args.model), args.device, None
    dtype = args.dtype or ("float32" if device.type == "cpu" else None)
    dtype = dtype and getattr(torch, dtype)
    torch.manual_seed(args.seed)
    if not args.dense:
        if args.random_weights:
            dictionaries = Dictionaries.random(config, args.atoms, device)
        else:
            path = args.dictionary or Dictionaries.find(args.model)
            dictionaries = Dictionaries.load(path, device).check(config)
        if device.type == "cuda":  # as in the file; the kernels multiply it so
            dictionaries.atoms = dictionaries.atoms.bfloat16()
        if isinstance(args.sparsity, float):
            args.sparsity = dictionaries.allocate(args.sparsity, args.coding)
    if args.random_weights:
        args.prompt_length = args.prompt_length or 512
        model = Llama.random(config, device, dtype or torch.bfloat16, args.rank, args.ranks)
        tokenizer = Tokenizer(None, {}, {}, None)  # knows no word
    else:
        model = Llama.from_pretrained(args.model, device if args.ranks == 1 else "cpu", dtype)
        model = parallelize(model, args.rank, args.ranks).to(device)
        tokenizer = Tokenizer.from_pretrained(args.model)
    if args.prompt_length:
        prompt = torch.randint(config.vocab_size, (args.batch, args.prompt_length)).to(device)
    else:
        prompt = torch.tensor([tokenizer.encode(read_prompt(args))] * args.batch, device=device)
    if prompt.shape[1] > config.context:
        raise InputError(f"the prompt has {prompt.shape[1]} tokens, more than the model's context "
                         f"of {config.context}; shorten it")
    return model, tokenizer, dictionaries, prompt


def main():
    args = parse_arguments()
    model, tokenizer, dictionaries, prompt = load(args)
    config, name = model.config, "dense" if args.dense else "sparse"
    if args.compile:
        compile_layers()
    count = min(args.max_new_tokens, config.context - prompt.shape[1] + 1)
    ends = set() if args.prompt_length else set(config.eos_ids)

    def new_cache(name):
        capacity = 0 if args.chat else prompt.shape[1] + count
        if name == "dense":
            return DenseCache(config, args.batch, capacity, args.device, model.norm.weight.dtype)
        return SparseCache(config, dictionaries, args.sparsity, args.buffer, args.window,
                           args.batch, capacity, args.beam, coding=args.coding,
                           dtype=torch.bfloat16)

    if args.chat:
        return chat(args, model, tokenizer, new_cache(name))

    def start(name, choose):
        """The steps of a new run, one by one."""
        cache = new_cache(name)
        show_progress(model, args.quiet)
        record = args.device.type == "cuda" and args.ranks == 1 and cache.replayable
        return generate(model, cache, prompt, count, choose, record, ends)

    def run(name, show=lambda step: None):
        """Generate with one cache: the list of steps, and their summary."""
        steps, ended = [], "context full" if count < args.max_new_tokens else "as asked for"
        try:
            if args.compare or args.random_weights:  # so that what is measured awaits no compiler
                next(start(name, sampler(args)))
            for step in start(name, sampler(args)):
                step["logits"] = step["logits"].cpu()  # off the memory that is measured
                steps.append(step)
                show(step)
            if step["tokens"][0].item() in ends:
                ended = "end of text"
        except KeyboardInterrupt:
            if not steps:  # nothing to sum up yet
                raise
            ended = "interrupted"
        return steps, summary(steps, ended, prompt)

    say, stream, tokens = (lambda text: None) if args.quiet else print, tokenizer.stream(), []

    def show(step):
        tokens.append(step["tokens"][0].item())
        piece, cache = stream(tokens[-1]), step["bytes"]
        line = (f"{len(tokens):5d}  {piece!r:16.16}  {step['forward'] * 1e3:9.2f}  "
                f"{step['coding'] * 1e3:9.2f}  {size(cache['total']):>9}  "
                f"{cache['total'] / cache['dense']:8.1%}\n")
        print(piece if args.quiet else line, end="", flush=True)

    say(" step  token             forward ms  coding ms      cache  of dense")
    steps, first = run(name, show)
    figures = {"text": tokenizer.decode(tokens), name: first}
    print(stream(None))
    if not args.prompt_length:
        say(f"{tokenizer.decode(prompt[0].tolist())}{figures['text']}\n")
    say(describe(name, first))
    interrupted = first["ended"] == "interrupted"
    if args.compare and not args.dense and not interrupted:
        dense, figures["dense"] = run("dense")
        say(describe("dense", figures["dense"]))
        interrupted = figures["dense"]["ended"] == "interrupted"
        if not args.random_weights:  # whose text means nothing
            given = iter(dense)
            forced = start("sparse", lambda logits: next(given)["tokens"])
            figures["agreement"] = same = agreement(steps, dense, forced)
            say(f"agreement: the first {same['shared_tokens']} tokens are shared. Along the dense "
                f"text, mean KL(dense || sparse) is {same['kl']:.4f} and the likeliest token the "
                f"same {same['top1']:.1%} of the time")
    if args.json and args.rank == 0:
        figures["steps"] = [{"token": token, "forward": step["forward"], "coding": step["coding"],
                             **step["bytes"]} for token, step in zip(tokens, steps)]
        try:
            Path(f"{args.json}.part").write_text(json.dumps(figures, indent=1) + "\n")
            os.replace(f"{args.json}.part", args.json)
        except OSError as error:
            raise InputError(f"--json {args.json} cannot be written: {error.strerror}") from None
    return 130 if interrupted else 0


if __name__ == "__main__":
    run_program(main)
