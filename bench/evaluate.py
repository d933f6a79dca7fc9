"""The paper's tasks by one command, through lm-evaluation-harness (pip install -e ".[eval]").

    python bench/evaluate.py --tasks gsm8k --model meta-llama/Llama-3.1-8B-Instruct --sparsity 24

A prompt attends exactly and becomes codes. Every further token passes by itself, over the codes of
what came before: those that are generated, and those whose log-likelihood is asked for. (The first
of them comes from the exact pass: choices of a single token say nothing of a cache.) A context that
does not fit in the model's is cut from the left. Every request has a new cache."""

import argparse
import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Without this folder: the harness wants Hugging Face's `evaluate`, which this file would hide.
sys.path = [str(HERE.parent), *(path for path in sys.path if Path(path).resolve() != HERE)]

import torch
from tqdm import tqdm

import generate
from model import InputError, door, find_folder
from train_dict import Parser, between, output_file, run_program

try:
    from lm_eval import simple_evaluate, tasks, utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError:  # --help does without, and main says what to do
    TemplateLM = object

class Lexico(TemplateLM):
    """What the harness asks of a model: log-likelihoods, answers, its chat template."""
    eot_token_id = tokenizer_name = prefix_token_id = None  # it wants all, and uses the last

    def __init__(self, args):
        super().__init__()
        self.model, self.text, self.dictionaries, about = generate.load(args)
        self.args, self.config, self.choose = args, self.model.config, generate.sampler(args)
        self.begin = self.text.encode("")
        self.prefix_token_id = [*self.begin, *self.config.eos_ids][0]  # before what has no context
        self.chat = args.apply_chat_template and generate.Chat(args.model, self.text).hf
        print(about)

    def tok_encode(self, string, add_special_tokens=True, **_):
        ids = self.text.encode(string, bos=False, special=True)
        begin = self.begin if add_special_tokens else []  # which chat templates write themselves
        return ids if ids[:len(begin)] == begin else begin + ids

    def steps(self, ids, count, choose, ends=()):
        """What generate yields for a prompt and `count` tokens more, through a new cache."""
        args, config, room = self.args, self.config, self.config.context + 1 - count
        if room < 1:
            raise InputError(f"{count} tokens after a prompt are more than the model's context of "
                             f"{config.context}; give fewer (--max-new-tokens), or another task")
        ids = (ids or [self.prefix_token_id])[-room:]
        self.text.check(ids, config)
        prompt, room = torch.tensor([ids], device=args.device), len(ids) + count  # (1, T)
        cache = generate.new_cache(args, self.model, self.dictionaries, args.dense, room)
        return generate.generate(self.model, cache, prompt, count, choose, prompt.is_cuda, ends)

    def score(self, context, continuation):
        """log p of a continuation after a context, and whether its tokens are the likeliest."""
        given, total, likeliest = iter(continuation), 0.0, True
        forced = lambda logits: torch.tensor([next(given)], device=logits.device)
        for step in self.steps(context, len(continuation), forced):
            log_p, token = step["logits"][0].float().log_softmax(-1), step["tokens"].item()
            total, likeliest = total + log_p[token].item(), likeliest and log_p.argmax() == token
        return total, bool(likeliest)

    def answer(self, text, options):
        """What the model says after a text, up to one of the task's stop strings."""
        options, stream, said = normalize_gen_kwargs(options, 256), self.text.stream(), ""
        until, special = [stop for stop in options["until"] if stop], self.text.special
        ends = {*self.config.eos_ids, *(special.get(stop) for stop in until)}
        count = self.args.max_new_tokens or options["max_gen_toks"]
        for step in self.steps(self.tok_encode(text), count, self.choose, ends):
            said += stream(step["tokens"].item())
            if any(stop in said for stop in until):
                break
        said += stream(None)
        return said[:min((said.index(stop) for stop in until if stop in said), default=None)]

    def each(self, function, requests):
        with tqdm(requests, disable=self.args.rank > 0) as bar:
            return [function(*request) for request in bar]

    def _loglikelihood_tokens(self, requests, **_):
        return self.each(lambda _, *ids: self.score(*ids), requests)

    def loglikelihood_rolling(self, requests, **_):  # of texts that fit in the context
        encode = lambda text: self.tok_encode(text, add_special_tokens=False)  # score's [] begins
        return self.each(lambda text: self.score([], encode(text))[0],
                         [request.args for request in requests])

    def generate_until(self, requests, **_):
        return self.each(self.answer, [request.args for request in requests])

    def apply_chat_template(self, messages, add_generation_prompt=True):
        with door("the model's chat template does not take this conversation", "do without it"):
            return self.chat.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt)

# ---- The command ---------------------------------------------------------------------------------

def parse_arguments():
    parser = Parser(description=__doc__.partition("\n")[0], allow_abbrev=False, epilog="And, as in "
                    "generate.py: --model --dictionary --sparsity --buffer --window --sinks "
                    "--coding --beam --pursuit --dense --temperature --top-p --seed --device "
                    "--dtype --json")
    add, number = parser.add_argument, between
    add("--tasks", required=True, metavar="NAME,...", help="of the harness: lm-eval ls tasks")
    add("--include-path", metavar="FOLDER", help="tasks of your own (YAML), instead of its")
    add("--limit", type=number(int, 1, 2**31), help="examples of each (all)")
    add("--num-fewshot", type=number(int, 0, 2**10), help="default: the task's")
    add("--max-new-tokens", type=number(int, 1, 2**24), help="default: the task's, or 256")
    add("--lengths", type=number(int, 128, 2**24), nargs="+", default=[4096], metavar="T",
        help="of prompts, for tasks that are made to a length, as niah_... (4096)")
    add("--apply-chat-template", action="store_true", help="for a model that converses")
    ours, others = parser.parse_known_args()
    parser.refuse("--tasks", "--prompt", "--prompt-file", "--chat", "--system", "--batch",
                  "--compile", "--compare", "--quiet")
    sys.argv[1:] = others
    return argparse.Namespace(**vars(generate.parse_arguments()) | vars(ours))

def main():
    args = parse_arguments()
    if TemplateLM is object:
        raise InputError("lm-evaluation-harness is not installed; pip install -e '.[eval]'")
    if args.include_path and not Path(args.include_path).is_dir():
        raise InputError(f"--include-path {args.include_path} is no folder; name the one of tasks")
    names = args.tasks.split(",")
    about = {"tokenizer": str(find_folder(args.model)), "max_seq_lengths": args.lengths}
    with door(f"--tasks {args.tasks} cannot be loaded", "check network, packages, --include-path"):
        manager = tasks.TaskManager(include_path=args.include_path, metadata=about,
                                    include_defaults=not args.include_path)
        if unknown := {*names} - {*manager.all_tasks}:
            raise InputError(f"there is no task '{min(unknown)}'; see lm-eval ls tasks")
        loaded = manager.load(names)  # before the model, which takes longer, and only once
    manager.load = lambda names: loaded
    with output_file(args.json if args.rank == 0 else None) as write:
        results = simple_evaluate(Lexico(args), tasks=names, task_manager=manager,
                                  limit=args.limit, num_fewshot=args.num_fewshot,
                                  apply_chat_template=args.apply_chat_template)
        if results:  # the harness gives them to rank 0 alone
            for table in ("results", "groups")[:1 + ("groups" in results)]:
                print(utils.make_table(results, table))
            text = json.dumps(results, indent=1, default=utils.handle_non_serializable)
            write(f"{text}\n".encode())

if __name__ == "__main__":
    run_program(main)
