"""Generate text with the sparse-coded cache, and see what every token costs.

    python generate.py --prompt "Once upon a time" --sparsity 8

A line for each token: the time of its forward pass, the time of coding, and the bytes of the cache
beside those of a dense one. --compare runs both caches, --chat holds a conversation over one."""

import functools
import json
import os
import runpy
import sys
import time
from contextlib import suppress
from math import inf
from pathlib import Path
from statistics import fmean

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # waiting threads soon sleep: cores may be busy
import torch
import torch.nn.functional as F

from kernels.graphs import Replayed, compile_layers
from kernels.parallel import from_rank_0, parallelize, world
from lexico import CODINGS, DenseCache, Dictionaries, SparseCache
from model import InputError, Llama, Tokenizer, door, find_folder
from omp import omp, omp_beam
from train_dict import Parser, between, output_file, plain_text, run_program

# ---- Decoding ------------------------------------------------------------------------------------

def sampler(args):
    """A function logits (B, vocab) -> next tokens (B,): the likeliest one at temperature 0; else
    drawn from the smallest set of tokens that holds top_p of the probability (Holtzman et al.
    2020). Each new sampler draws the same numbers again."""
    generator = torch.Generator().manual_seed(args.seed)

    def sample(logits):
        if args.temperature < 1e-6:  # logits divided by less may overflow
            return logits.argmax(dim=-1)
        p, tokens = (logits.float() / args.temperature).softmax(-1).sort(dim=-1, descending=True)
        p[p.cumsum(dim=-1) - p >= args.top_p] = 0  # what comes before a token alone reaches top_p
        choice = torch.multinomial(p.cpu(), 1, generator=generator).to(tokens.device)
        return tokens.gather(-1, choice)[:, 0]

    return sample

def clock(device):
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

def peak_memory(device):
    """Bytes in use at most since the last call: on a GPU of tensors, else of the process, where
    Linux tells (0 elsewhere)."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    with suppress(OSError, IndexError):  # IndexError: the line is not there
        peak = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        return 1024 * int(peak)
    return 0

@torch.inference_mode()
def generate(model, cache, prompt, count, choose, record=False, ends=()):
    """Run the prompt (B, T) in one piece, then decode: `count` new tokens in all, or up to one of
    `ends` in the first sequence. choose(logits) gives the next tokens. record: whether steps become
    CUDA graphs: then the cache must have room for all tokens. Yields a dict for each new token (the
    first one's forward pass is the prompt's): tokens (B,), logits (B, vocab), forward and coding in
    seconds, bytes (the cache's nbytes) and memory (see peak_memory)."""
    device, token = prompt.device, prompt[:, -1:].clone()  # (B, 1): a step's input
    may_record = lambda: record and cache.replayable
    step = Replayed(lambda: model(token, cache, last_only=True)[:, -1],
                    lambda: cache.advance(1, replayed=True), may_record)
    code = Replayed(lambda: cache.compress(),
                    lambda: cache.advance(compressed=cache.window, replayed=True), may_record)
    peak_memory(device)  # counts from here
    for i in range(count):
        start = clock(device)
        logits = step() if i else model(prompt, cache, last_only=True)[:, -1]
        if not logits.isfinite().all():
            raise InputError(f"the model's output is no finite number in {str(logits.dtype)[6:]}; "
                             "try --dtype float32, or other weights")
        token.copy_(choose(logits)[:, None])
        middle = clock(device)
        if isinstance(cache, SparseCache) and cache.waiting >= cache.ring:
            code()
        yield {"tokens": token[:, 0].clone(), "logits": logits.clone(), "forward": middle - start,
               "coding": clock(device) - middle, "bytes": cache.nbytes(),
               "memory": peak_memory(device)}
        if token[0].item() in ends:
            return

# ---- What a run took -----------------------------------------------------------------------------

def size(nbytes):
    """Bytes, as one reads them."""
    power = min(3, (len(str(int(nbytes))) - 1) // 3)
    return f"{nbytes / 1000**power:.{min(power, 1)}f} {('B', 'kB', 'MB', 'GB')[power]}"

def line(number, piece, step):
    """A step, as one reads it. A dense cache counts as 100 %, even in 32 bits."""
    forward, coding, cache = 1e3 * step["forward"], 1e3 * step["coding"], step["bytes"]
    whole = cache["total"] / cache["dense"] if "vector" in cache else 1
    return (f"{number:5d}  {piece!r:16.16}  {forward:9.2f}  {coding:9.2f}  "
            f"{cache.get('vector', 1):8.1%}  {size(cache['total']):>9}  {whole:8.1%}\n")

def summary(steps, ended, prompt):
    """What a run took: a dict of plain numbers, in seconds and bytes."""
    times = [step["forward"] + step["coding"] for step in steps]
    latency = times[(len(steps) + 1) // 2:] or [0.0]  # once all is warm: in the second half
    median, p95 = torch.tensor(latency).quantile(torch.tensor([0.5, 0.95])).tolist()
    return {"prompt_tokens": prompt.shape[1], "new_tokens": len(steps), "ended": ended,
            "prefill": times[0], "mean": fmean(latency), "median": median, "p95": p95,
            "tokens_per_second": len(prompt) / (fmean(latency) or inf),
            "cache": steps[-1]["bytes"], "prefill_memory": steps[0]["memory"],
            "peak_memory": max(step["memory"] for step in steps[1:] or steps)}

def describe(name, s):
    """A summary, as one reads it."""
    cache, of_it = s["cache"], ""
    sizes = {part: size(n) for part, n in cache.items()}
    parts = f", {sizes['dense']} in 16 bit"
    if "vector" in cache:
        parts = (f", codes {sizes['codes']}, buffer {sizes['buffer']}: "
                 f"{cache['total'] / cache['dense']:.1%} of a dense 16-bit cache "
                 f"({sizes['dense']}), a coded vector {cache['vector']:.1%} of one")
        of_it = f", {sizes['dictionaries']} of it dictionaries, for any context and batch"
    return (f"{name}: {s['prompt_tokens']} + {s['new_tokens']} tokens, {s['ended']}\n"
            f"  time      prefill {1e3 * s['prefill']:.1f} ms, then {1e3 * s['mean']:.2f} ms a "
            f"token (median {1e3 * s['median']:.2f}, 95 % within {1e3 * s['p95']:.2f}), "
            f"{s['tokens_per_second']:.1f} tokens/s\n"
            f"  cache     {sizes['total']}{parts}\n  allocated {sizes['allocated']}{of_it}\n"
            f"  memory    at most {size(s['prefill_memory'])} in use for the prompt, then "
            f"{size(s['peak_memory'])}")

def agreement(sparse, dense, forced):
    """First tokens that both share; how far forced (sparse, fed dense's tokens) is from dense."""
    same = [torch.equal(a["tokens"], b["tokens"]) for a, b in zip(sparse, dense)] + [False]
    kl, top1 = [], []
    for steps in zip(dense, forced):
        p, q = (step["logits"].to(step["tokens"].device).float().log_softmax(-1) for step in steps)
        kl.append(F.kl_div(q, p, log_target=True, reduction="batchmean").item())
        top1.append((p.argmax(-1) == q.argmax(-1)).float().mean().item())
    return {"shared_tokens": same.index(False), "top1": fmean(top1), "kl": fmean(kl)}

# ---- Chat ----------------------------------------------------------------------------------------

ANSWER = "An <answer> & \"its\" 'end' \\"  # stands for an answer; has what templates escape

class Chat:
    """A model's chat template, as transformers renders it: the tokens that come before each answer.
    Only the template writes special tokens: those that a user types are taken out."""

    def __init__(self, name_or_path, tokenizer):
        with door(f"the chat template of '{name_or_path}' cannot be read",
                  "--chat needs pip install transformers jinja2, and a model's whole folder"):
            import jinja2, transformers  # noqa: E401, F401
            transformers.logging.set_verbosity_error()
            reader = transformers.PreTrainedTokenizerFast
            self.hf = reader.from_pretrained(find_folder(name_or_path))
        if not self.hf.chat_template:
            raise InputError(f"model '{name_or_path}' has no chat template; use its instruct "
                             "version, or --prompt")
        self.name, self.tokenizer = name_or_path, tokenizer

    def message(self, role, text):
        while typed := [name for name in (*self.tokenizer.special, ANSWER) if name in text]:
            text = text.replace(max(typed, key=len), "")  # what was around it may form another
        return {"role": role, "content": text}

    def new_tokens(self, messages):
        """Ids of what comes after the last answer (its end of turn is first), or of all. An answer
        is a message that says ANSWER: its tokens have passed the model, and need no text again."""
        with door(f"the chat template of '{self.name}' does not take this conversation",
                  "fix it, or do without a system prompt"):
            text = self.hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if text.count(ANSWER) != sum(message["content"] == ANSWER for message in messages):
            raise InputError(f"the chat template of '{self.name}' hides or rewrites answers, which "
                             "stay in the cache as they were; ask each question in a new chat")
        return self.tokenizer.encode(text.rpartition(ANSWER)[2], bos=False, special=True)

def read_turn(prompt):
    """A line of standard input; "" at its end."""
    with door("standard input cannot be read", "type or pipe UTF-8 text"), suppress(EOFError):
        return plain_text(input(prompt)).strip()
    return ""

def chat(args, model, tokenizer, cache):
    """A conversation over one cache, a line of standard input a turn. What was said is in the cache
    and never passes the model again: a turn feeds what comes after the last answer."""
    template, config, choose = Chat(args.model, tokenizer), model.config, sampler(args)
    ends = {*config.eos_ids, template.hf.eos_token_id, tokenizer.special.get("<|eot_id|>")}
    messages = [template.message("system", args.system)] if args.system else []
    unfed = []  # a token that was sampled but has not passed the model
    prompt_sign = "> " if sys.stdin and sys.stdin.isatty() and not args.quiet else ""
    while text := from_rank_0(lambda: read_turn(prompt_sign)):
        asked = [*messages, template.message("user", text)]
        new = unfed + template.new_tokens(asked)
        tokenizer.check(new, config)
        room = config.context - cache.length - len(new)
        if room < 0:
            if args.rank == 0:
                print(f"error: {len(new)} new tokens do not fit: {cache.length} of the context's "
                      f"{config.context} are taken; shorten it, or start anew", file=sys.stderr)
            continue
        messages = [*asked, {"role": "assistant", "content": ANSWER}]
        stream, seconds = tokenizer.stream(), []
        prompt, count = torch.tensor([new], device=args.device), min(args.max_new_tokens, room + 1)
        for step in generate(model, cache, prompt, count, choose, ends=ends):
            seconds.append(step["forward"] + step["coding"])
            token = step["tokens"].item()
            print(stream(token), end="", flush=True)
        print(stream(None))
        unfed = [token] if token not in ends else []  # the template ends the turn itself
        if not args.quiet:
            print(f"[{len(new)} + {len(seconds)} tokens, {1e3 * fmean(seconds[1:] or [0]):.2f} ms "
                  f"a token, cache {size(step['bytes']['total'])}]")

# ---- The command ---------------------------------------------------------------------------------

def read_sparsity(text):
    """A number of coefficients, or "auto:20%" as a share."""
    with door(f"--sparsity: '{text}' is no whole number, nor like auto:20%", "give one of these"):
        return float(text[5:-1]) / 100 if text[:5] == "auto:" and text[-1] == "%" else int(text)

def read_pursuit(text):
    """The function that "my_file.py:my_function" names."""
    path, _, name = text.rpartition(":")
    with door(f"--pursuit {text} cannot be loaded", "give FILE.py:FUNCTION"):
        function = runpy.run_path(path)[name]
        if not callable(function):
            raise TypeError(f"{name} is no function")
        return function

def read_prompt(args):
    """The prompt's text, from --prompt, --prompt-file or standard input ("-")."""
    text, source = args.prompt, "-" if args.prompt == "-" else args.prompt_file
    with door(f"the prompt from {source or '--prompt'} cannot be read", "give UTF-8 text"):
        if source is not None:
            text = (sys.stdin.buffer.read() if source == "-" else
                    Path(source).expanduser().read_bytes()).decode()
        text.encode()  # fails for what a terminal gave that is no text
    text = plain_text(text)
    if source is not None:
        text = text.removesuffix("\n")  # which ends a file's last line
    if not text.strip():
        raise InputError("the prompt is empty; give some text with --prompt or --prompt-file")
    return text

def parse_arguments():
    parser = Parser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add, number = parser.add_argument, between
    add("--prompt", default="Once upon a time", help='the text to go on from; "-": standard input')
    add("--prompt-file", metavar="FILE", help='a UTF-8 text file instead; "-": standard input')
    add("--chat", action="store_true", help="converse, a line a turn, until an empty one")
    add("--system", metavar="TEXT", help="the system prompt of --chat")
    add("--model", default="tiny", help='a folder, a Hub id, or "tiny" (default)')
    add("--dictionary", help="a file, a folder or a Hub id; default: the one for the model")
    add("--sparsity", default="auto:20%", type=read_sparsity, help="coefficients a vector, or "
        "(default) auto:20%%: those that serve best in 20%% of a vector's 16-bit size on average")
    add("--buffer", type=number(int, 0, 2**24), default=32, help="newest tokens kept dense (32)")
    add("--window", type=number(int, 1, 2**24), default=16, help="tokens coded at a time (16)")
    add("--sinks", type=number(int, 0, 2**24), default=4, help="first tokens kept dense (4)")
    add("--coding", choices=CODINGS, default="word", help="how codes are stored (word)")
    add("--beam", type=number(int, 1, 64), default=1, help="width of the search (1: plain OMP)")
    add("--pursuit", type=read_pursuit, metavar="FILE.py:FUNCTION", default=omp, help="your own "
        "search: (D, Y, sparsity) -> indices, coefficients, for D (N, m) and Y (V, m)")
    add("--max-new-tokens", type=number(int, 1, inf), default=200)
    add("--batch", type=number(int, 1, 2**31), default=1, help="copies of the prompt, together (1)")
    add("--compile", action="store_true", help="torch.compile the layers (some seconds at first)")
    add("--temperature", type=number(float, 0, inf), default=0.0, help="0 (default): the likeliest")
    add("--top-p", type=number(float, 1e-6, 1), default=1.0)
    add("--seed", type=number(int, 0, 2**63), default=0)
    add("--device", help="default: the best there is")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: as stored, on a "
        "CPU float32")
    add("--dense", action="store_true", help="the usual cache instead")
    add("--compare", action="store_true", help="both caches, side by side")
    add("--quiet", action="store_true", help="print the text and nothing else")
    add("--json", metavar="FILE", help="write all figures there too")
    args = parser.parse_args()
    cache = "--sparsity", "--buffer", "--window", "--sinks", "--coding", "--beam", "--pursuit"
    parser.refuse("--dense", "--dictionary", "--compare", *cache)
    parser.refuse("--chat", "--prompt", "--prompt-file", "--batch", "--compare", "--json")
    parser.refuse("--prompt", "--prompt-file")
    parser.refuse("--beam", "--pursuit")
    if args.system and not args.chat:
        parser.error("--system goes with --chat alone")
    if args.beam > 1:
        args.pursuit = functools.partial(omp_beam, width=args.beam)
    args.device, args.rank, args.ranks = world(args.device)
    return args

def load(args):
    """Model, tokenizer, dictionaries (None with --dense), and a line about the cache."""
    dtype = args.dtype or ("float32" if args.device.type == "cpu" else None)
    model = Llama.from_pretrained(args.model, args.device if args.ranks == 1 else "cpu",
                                  dtype and getattr(torch, dtype))
    dictionaries, about = None, "the usual cache: keys and values as they are"
    if not args.dense:
        path, s = args.dictionary or Dictionaries.find(args.model), args.sparsity
        kept = torch.bfloat16 if args.device.type == "cuda" else torch.float32  # what kernels take
        dictionaries = Dictionaries.load(path, args.device, kept).check(model.config)
        if isinstance(s, float):
            args.sparsity, s = dictionaries.allocate(s, args.coding), f"auto:{100 * s:g}%"
        about = (f"dictionary {path}: N = {dictionaries.atoms.shape[2]}, coding {args.coding}, "
                 f"sparsity {s}; the first {args.sinks} and newest {args.buffer} to "
                 f"{args.buffer + args.window} tokens stay dense, {args.window} at a time become "
                 "codes")
    model = parallelize(model, args.rank, args.ranks).to(args.device)
    return model, Tokenizer.from_pretrained(args.model), dictionaries, about

def new_cache(args, model, dictionaries, dense, capacity=0):
    """The cache that args ask for, with room for `capacity` tokens."""
    if dense:
        return DenseCache(model.config, args.batch, capacity, args.device, model.norm.weight.dtype)
    return SparseCache(model.config, dictionaries, args.sparsity, args.buffer, args.window,
                       args.sinks, args.batch, capacity, args.coding, args.pursuit, torch.bfloat16)

def main():
    args = parse_arguments()
    with output_file(args.json if args.rank == 0 else None) as write:
        model, tokenizer, dictionaries, about = load(args)
        config = model.config
        say = (lambda text: None) if args.quiet else print
        model.verbose = args.rank == 0 and not args.quiet
        if args.compile:
            compile_layers()

        if args.chat:
            return chat(args, model, tokenizer, new_cache(args, model, dictionaries, args.dense))
        ids = tokenizer.encode(from_rank_0(lambda: read_prompt(args)))
        tokenizer.check(ids, config)
        if len(ids) > config.context:
            raise InputError(f"the prompt has {len(ids)} tokens, more than the model's context of "
                             f"{config.context}; shorten it")
        prompt = torch.tensor([ids], device=args.device).repeat(args.batch, 1)  # (B, T)
        count = min(args.max_new_tokens, config.context - len(ids) + 1)  # the last is never fed

        def start(dense, choose):  # the steps of a new run, one by one
            cache = new_cache(args, model, dictionaries, dense, len(ids) + count)
            return generate(model, cache, prompt, count, choose, prompt.is_cuda, config.eos_ids)

        def run(dense, shown):  # all steps of a run, and their summary
            if args.compare:  # so that what is measured awaits no compiler
                next(start(dense, sampler(args)))
            steps, stream, ended = [], tokenizer.stream(), "interrupted"
            todo = start(dense, sampler(args))
            if shown:
                say(f"{about}\n step  token             forward ms  coding ms  a vector      cache"
                    "  of dense")
            try:
                for step in todo:
                    step["token"] = step["tokens"][0].item()  # of the first sequence
                    step["logits"] = step["logits"].cpu()  # off the memory that is measured
                    steps.append(step)
                    if shown:
                        piece = stream(step["token"])
                        piece = piece if args.quiet else line(len(steps), piece, step)
                        print(piece, end="", flush=True)
                ended = ("end of text" if step["token"] in config.eos_ids else
                         "context full" if count < args.max_new_tokens else "as asked for")
            except KeyboardInterrupt:
                if not steps:  # nothing to sum up yet
                    raise
            if shown:
                print(stream(None))
            return steps, summary(steps, ended, prompt)

        name, (steps, taken) = "dense" if args.dense else "sparse", run(args.dense, shown=True)
        figures = {"text": tokenizer.decode([step["token"] for step in steps]), name: taken}
        say(f"{tokenizer.decode(ids)}{figures['text']}\n\n{describe(name, taken)}")
        if args.compare and taken["ended"] != "interrupted":
            dense, taken = run(True, shown=False)
            figures["dense"] = taken
            say(describe("dense", taken))
        if args.compare and taken["ended"] != "interrupted":
            given = iter(dense)
            forced = start(False, lambda logits: next(given)["tokens"])
            figures["agreement"] = same = agreement(steps, dense, forced)
            say(f"agreement: the first {same['shared_tokens']} tokens are shared. Along the dense "
                f"text, mean KL(dense || sparse) is {same['kl']:.4f} and the likeliest token the "
                f"same {same['top1']:.1%} of the time" + (
                    "" if steps[-1]["bytes"]["codes"] else "; but nothing was coded yet"))
        figures["steps"] = [{"token": step["token"], "forward": step["forward"],
                             "coding": step["coding"], **step["bytes"]} for step in steps]
        write((json.dumps(figures, indent=1) + "\n").encode())
        return 130 if taken["ended"] == "interrupted" else 0

if __name__ == "__main__":
    run_program(main)
