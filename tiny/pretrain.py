"""The recipe of the tiny Llama that ships here: `prepare` on a CPU, then `train` on one GPU.

    python tiny/pretrain.py prepare --text stories --out .data
    python tiny/pretrain.py train --data .data --out tiny

Folders of children's stories become arrays of tokens, with made-up recall text among them. Batches
take a fixed share from each group, whatever its size: there is far less simple text than old prose,
and a small model writes better for reading the simple text more often. With 17 M tokens of stories
it reads each many times; dropout and strong weight decay keep it from learning them by heart. A
tenth of every batch is recall text, to learn to look things up.
"""
import argparse
import functools
import json
import os
import random
import re
import sys
import unicodedata
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # model.py lies one folder up
from model import HF_NAMES, LLAMA3_SPLIT, Config, Llama, Tokenizer

SETTINGS = dict(text="stories", data=".data", out="tiny", steps=4810, batch=48, layers=6, dim=384)
VOCAB, BOS, EOS = 4096, 0, 1
ROW = 2049  # a training row: 2048 inputs and, one later, their 2048 targets
SHARES = dict(modern=11, tales=15, classics=27, novels=34, recall=13)  # of a batch, in percent
GROUPS = {"modern": "tinystories african_storybook pratham_storyweaver aesop_loc",
          "tales": "fairytaleqa folk_fairy_tales_pg nltk_gutenberg",
          "classics": "classic_books_kids", "novels": "clic_chilit english_novels_easy"}
# The worse copy of a book that is there twice, scholarship about stories, language not to learn.
SKIP = re.compile("smallGPT|Treasury|Stevenson_Treas|Captains_1896|princess.txt|Aladdin|pg17208|"
                  "jemima|bunny|flopsy|mice|rabbit|pg34206|pg22373|chesterton|edgeworth|Ford|Troop")
NOT_STORY = re.compile(r"(chapter|contents|illustrat|story notes|\W?\d)|.*(http|nigger)", re.I)

REMEMBER = "Read and remember.\n\n"  # begins every recall document, so that stories stay stories
NAMES = "Lily Tom Ben Mia Anna Sam Max Sara Tim Lucy Jack Sue Bob Amy Kate Peter Jane".split()
PLACES = "barn garden kitchen forest church cave tower stable mill school well cellar".split()
PETS = "Rex Spot Bella Daisy Coco Rover Misty Ginger Patch Snowy Teddy Sunny".split()
COLOURS = "red blue green yellow black white brown grey pink purple golden silver".split()
OBJECTS = "box bag book key lamp ring boat drum kite clock basket bottle chest coat cup".split()
THINGS = [f"the {colour} {thing}" for colour in COLOURS for thing in OBJECTS]
NUMBERS = range(1000, 10000)
FACTS = [  # a fact, its question, its keys, their answers
    ("The code of {} is {}.", "What is the code of {}?", THINGS, NUMBERS),
    ("The telephone number of {} is {}.", "What is the telephone number of {}?", NAMES, NUMBERS),
    ("{} belongs to {}.", "Who owns {}?", THINGS, NAMES),
    ("{} is hidden in the {}.", "In which place is {} hidden?", THINGS, PLACES),
    ("{} lives in the {} house.", "What colour is the house of {}?", NAMES, COLOURS),
    ("The dog of {} is called {}.", "What is the dog of {} called?", NAMES, PETS)]


def recall(rng, filler, n_facts=4, n_questions=1, depth=None):
    """Hide facts among the sentences of a text -> context, [(question, answer), ...].

    The prompt is context + question; an answer begins with a space, as its first token does. All
    facts have one of two forms, so only the key tells them apart. The asked ones stand at `depth`,
    0 for the beginning and 1 for the end, or anywhere; the others always stand anywhere."""
    lines = re.findall(r"[^.!?]+[.!?]+[\"']*\s*", filler)
    forms, facts = rng.sample(FACTS, 2), {}  # facts: question -> fact, answer
    while len(facts) < n_facts:
        fact, question, keys, answers = rng.choice(forms)
        answer, key = rng.choice(answers), rng.choice(keys)
        facts[question.format(key)] = fact.format(key, answer), answer
    asked = list(facts)[:n_questions]
    for question, (fact, _) in reversed(facts.items()):  # the asked last, or others would move them
        place = rng.random() if depth is None or question not in asked else depth
        lines.insert(round(place * len(lines)), fact[0].upper() + fact[1:] + " ")
    questions = [("\n\n" + question, f" {facts[question][1]}") for question in asked]
    return REMEMBER + "".join(lines).rstrip(), questions


def recall_row(rng, text, encode):
    "One row of recall documents, few long or many short. Tokens of answers have VOCAB added."
    row, n_docs = [], rng.choice((1, 1, 2, 3, 6, 12, 24, 40))
    while len(row) < ROW:  # the last document comes out cut off, or not at all
        n_facts = rng.randint(1, 2 + 14 // n_docs)
        size = max(0, int(3.5 * (ROW / n_docs - 42 * n_facts)))  # of the filler, in characters
        start = text.find("\n\n", rng.randrange(len(text) - size)) + 2  # with a paragraph
        context, questions = recall(rng, text[start : start + size], n_facts, n_facts)
        row += [BOS, *encode(context)]
        for question, answer in rng.choices(questions, k=n_facts):  # some twice, some never
            row += encode(question) + [VOCAB + token for token in encode(answer)] + encode(".")
        row.append(EOS)
    return row[:ROW]


def clean(text):
    "Plain ASCII paragraphs, without notes, captions, headings, italics and hard-wrapped lines."
    text = text.replace("—", "--").translate(str.maketrans("‘’“”–", "''\"\"-", "_*`|"))
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    text = re.sub(r"(?s)^(.{50000}.*?)\n(NOTES|APPENDIX|Notes and Ref).*", r"\1", text)
    text = re.sub(r" *(\[[^]]*\]|\{[^}]*\}|\(\d+\))", "", text)
    text = re.sub(r" *-{2,} *| - ", " - ", re.sub(r"\.( ?\.)+", "...", text))
    text = re.sub(r" - (?=[\"']\s)", " -", text)  # cut off in mid-speech
    text = re.sub(r"([^\n]{45}[\w,;])\n+(?=[\w\"'])", r"\1 ", text)  # hard-wrapped lines
    text = re.sub(r"([.!?,-][\"']) (?=[\"'])", r"\1\n", text)  # another one speaks
    lines = [" ".join(line.split()) for line in text.split("\n")]
    is_story = re.compile(r"[^a-z]*[a-z].*[.!?,;:\"')-]$")  # headings do not end like sentences
    return "\n\n".join(line for line in lines if is_story.match(line) and not NOT_STORY.match(line))


def train_tokenizer(texts):
    "A byte-level BPE as Llama 3 has it, but small, and with every digit a token of its own."
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    tokenizer, as_bytes = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(False, use_regex=False)
    words = pre_tokenizers.Split(Regex(LLAMA3_SPLIT.replace("{1,3}", "")), "isolated")
    bos, eos = "<|begin_of_text|>", "<|end_of_text|>"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", None, [(bos, BOS)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[bos, eos], initial_alphabet=as_bytes.alphabet()))
    return tokenizer


def prepare(args, n_rows=3000):
    "Write tokenizer.json, tokens.npz, train.txt and held-out.txt into --out."
    rng, out, arrays = random.Random(0), Path(args.out), {}
    parts = {part: {group: [] for group in GROUPS} for part in ("train", "held")}
    for group, names in GROUPS.items():
        paths = [path for name in names.split() for path in Path(args.text, name).glob("*.txt")]
        texts = [path.read_text("utf-8") for path in sorted(paths) if not SKIP.search(path.name)]
        docs = [clean(doc) for text in texts for doc in text.split("<|endoftext|>")]
        docs = [doc for doc in docs if len(doc) > 200]
        rng.shuffle(docs)
        room = 0.015 * sum(map(len, docs))  # whole documents are held out, not windows of them
        for doc in docs:
            part = "held" if len(doc) < room else "train"
            room -= len(doc) * (part == "held")
            parts[part][group].append(doc)
    # All but the novels.
    simple = {part: sum(list(groups.values())[:3], []) for part, groups in parts.items()}
    out.mkdir(parents=True, exist_ok=True)
    train_tokenizer(simple["train"]).save(str(out / "tokenizer.json"))
    encode = functools.partial(Tokenizer.from_pretrained(out).encode, bos=False)
    for part, n, name in (("train", n_rows, "train.txt"), ("held", 64, "held-out.txt")):
        for group, docs in parts[part].items():
            arrays[f"{group}.{part}"] = [i for doc in docs for i in (BOS, *encode(doc), EOS)]
        filler = "\n\n".join(simple[part])
        arrays[f"recall.{part}"] = np.ravel([recall_row(rng, filler, encode) for _ in range(n)])
        (out / name).write_text("\n\n\n".join(simple[part]))
    np.savez_compressed(out / "tokens.npz", **{k: np.uint16(v) for k, v in arrays.items()})
    print("\n".join(f"{name:15} {len(array):10,} tokens" for name, array in arrays.items()))


def init_weights(model):
    "GPT-2's initialisation: normal(0.02), less for the projections that write to x."
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:  # the others, weights of RMSNorm, are 1
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(parameter, std=0.02 / (2 * model.config.n_layers) ** (writes / 2))
    return model


def to_hf(config):
    "The dict of the config.json that Config.from_hf reads."
    kind = "qwen2" if config.qkv_bias and not config.out_bias else "llama"
    kind = "qwen3" if config.qk_norm else kind
    hf = {name: getattr(config, ours) for ours, name in HF_NAMES.items()}
    if kind == "qwen2":  # it has no such field, its biases are a matter of course
        del hf["attention_bias"]
    if config.rope_scaling:
        hf["rope_scaling"] = {"rope_type": "llama3", **config.rope_scaling}
    return {"architectures": [f"{kind.capitalize()}ForCausalLM"], "model_type": kind,
            "hidden_act": "silu", **hf, "eos_token_id": list(config.eos_ids)}


def save_pretrained(model, folder, dtype=torch.bfloat16):
    "Write config.json and model.safetensors in Hugging Face's layout, each whole or not at all."
    Path(folder).mkdir(parents=True, exist_ok=True)
    state = {name if name == "lm_head.weight" else f"model.{name}": parameter.detach().to(dtype)
             for name, parameter in model.named_parameters()}
    config = {**to_hf(model.config), "torch_dtype": str(dtype)[6:]}
    for name, data in (("model.safetensors", save(state, {"format": "pt"})),
                       ("config.json", f"{json.dumps(config, indent=2)}\n".encode())):
        Path(folder, f"{name}.part").write_bytes(data)
        os.replace(Path(folder, f"{name}.part"), Path(folder, name))


def sample_batch(data, size, digits):
    "Rows from all groups by their shares, from anywhere in them -> tokens, is_answer: (B, ROW)."
    rows = []
    for group, share in SHARES.items():
        tokens, step = data[f"{group}.train"], ROW if group == "recall" else 1  # recall has rows
        starts = torch.randint((len(tokens) - ROW) // step, (round(size * share / 100), 1)) * step
        rows.append(tokens[(starts + torch.arange(ROW)).to(tokens.device)])
    rows = torch.cat(rows)
    # Every row swaps its digits about: codes are new each time, and can only be looked up.
    swap = torch.arange(VOCAB, device=rows.device).repeat(len(rows), 1)
    swap[:, digits] = digits[torch.rand(len(rows), 10, device=rows.device).argsort(1)]
    return swap.gather(1, rows % VOCAB), rows >= VOCAB


def losses(model, tokens):
    "Cross-entropy of every next token (B, ROW - 1), and whether it was the likeliest one."
    logits = model(tokens[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return loss.view(len(tokens), -1), logits.argmax(-1) == tokens[:, 1:]


@torch.no_grad()
def evaluate(model, data):
    "Held-out loss of every group, and the share of recall answers with all their tokens right."
    report = ""
    for group in SHARES:
        rows = data[f"{group}.held"].unfold(0, ROW, ROW)[:32]
        loss, right = losses(model.eval(), rows % VOCAB)
        report += f"{group} {loss.mean().item():.3f} "
    model.train()
    answer = rows >= VOCAB  # in the last group, recall: number the answers, count the wrong ones
    number = (answer[:, 1:] & ~answer[:, :-1]).flatten().cumsum(0)
    wrong = number[(answer[:, 1:] & ~right).flatten()].unique()
    return report + f"answers {1 - len(wrong) / number[-1].item():.3f}"


def train(args):
    "Write the model that `args.steps` batches make of the data in --data into --out."
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    digits = Tokenizer.from_pretrained(args.data).encode("0123456789", bos=False)
    digits, arrays = torch.tensor(digits, device=device), np.load(f"{args.data}/tokens.npz")
    data = {name: torch.from_numpy(arrays[name].astype("int64")).to(device) for name in arrays}
    config = Config(VOCAB, args.dim, args.layers, args.dim // 64, kv_heads=2, head_dim=64,
                    ffn_dim=args.dim * 8 // 3, context=ROW - 1, norm_eps=1e-5, tied=True,
                    eos_ids=(1,))
    model = init_weights(Llama(config)).to(device)
    for layer in model.layers:  # dropout on what each half of a layer adds to the residual stream
        for half in (layer.self_attn, layer.mlp):
            half.register_forward_hook(lambda half, _, x: F.dropout(x, 0.2, half.training))
    matrices = [p for p in model.layers.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() == 1] + [model.embed_tokens.weight]
    muon = torch.optim.Muon(matrices, weight_decay=0.5, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    fast_losses = torch.compile(losses) if device == "cuda" else losses
    for step in range(1, args.steps + 1):
        tokens, is_answer = sample_batch(data, args.batch, digits)
        with torch.autocast(device, torch.bfloat16):
            loss, _ = fast_losses(model, tokens)
        weight = 1 + 4 * is_answer[:, 1:]  # answers are few, but they are the point
        ((loss * weight).sum() / weight.sum()).backward()
        for optimizer in (muon, adamw):  # the rate goes up within 100 steps, linearly down to zero
            optimizer.param_groups[0]["lr"] = 3e-3 * min(step / 100, 1 - (step - 1) / args.steps)
            optimizer.step()
            optimizer.zero_grad()
        if step % 250 == 0 or step == args.steps:
            print(f"{step}: train {loss.mean().item():.3f} {evaluate(model, data)}", flush=True)
    save_pretrained(model, args.out)
    Path(args.out, "tokenizer.json").write_bytes(Path(args.data, "tokenizer.json").read_bytes())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("command", choices=("prepare", "train"))
    for name, value in SETTINGS.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    args = parser.parse_args()
    {"prepare": prepare, "train": train}[args.command](args)
