"""The recipe of the tiny Llama that ships here: `prepare` on a CPU, then `train` on one GPU.

    python -m tiny.pretrain prepare stories .data
    python -m tiny.pretrain train .data tiny

Folders of children's stories become arrays of tokens, with made-up recall text among them. Batches
take a fixed share from each group, whatever its size: there is far less simple text than old prose,
and a small model writes better for reading the simple text more often. With 17 M tokens of stories
it reads each many times; dropout and strong weight decay keep it from learning them by heart. An
eighth of every batch is recall text, to learn to look things up.

The tables are in pretrain.json: how many rows of a batch come from each group, folders of a group,
files to skip (the worse copy of a book that is there twice, scholarship about stories, language not
to learn), what to edit in a text and why, lines that are story, facts to recall and their words."""

import argparse
import json
import random
import re
import unicodedata
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers, trainers

from model import HF_NAMES, Config, Llama, Tokenizer, best_device

# How many tokens there are, those of begin, end and the digit 0, and how many are a training row:
# 2048 inputs and, one later, their 2048 targets.
VOCAB, BOS, EOS, ZERO, ROW = 4096, 0, 1, 17, 2049
TABLES = json.loads(Path(__file__).with_name("pretrain.json").read_text())
BATCH, GROUPS, SKIP, EDITS, STORY, FORMS, WORDS = TABLES.values()
WORDS["things"] = [f"the {c} {thing}" for c in WORDS["colours"] for thing in WORDS["objects"]]
WORDS["numbers"] = range(1000, 10000)

# ---- Data ----------------------------------------------------------------------------------------

def recall(rng, filler, n_facts=4, n_questions=1, depth=None):
    """Hide facts among the sentences of a text -> context, [(question, answer), ...].

    The prompt is context + question; an answer begins with a space, as its first token does. All
    facts have one of two forms, so only the key tells them apart. The asked ones stand at `depth`,
    0 for the beginning and 1 for the end, or anywhere; the others always stand anywhere."""
    lines = re.findall(r"[^.!?]+[.!?]+[\"']*\s*", filler)
    forms, facts = rng.sample(FORMS, 2), {}  # facts: question -> fact, answer
    while len(facts) < n_facts:
        fact, question, keys, answers = rng.choice(forms)
        answer, key = rng.choice(WORDS[answers]), rng.choice(WORDS[keys])
        facts["\n\n" + question.format(key)] = fact.format(key, answer), f" {answer}"
    for i, (fact, _) in reversed([*enumerate(facts.values())]):  # so that no later one moves those
        place = rng.random() if depth is None or i >= n_questions else depth  # that are asked
        lines.insert(round(place * len(lines)), fact[0].upper() + fact[1:] + " ")
    context = "Read and remember.\n\n" + "".join(lines).rstrip()  # no story begins so
    return context, [(question, facts[question][1]) for question in facts][:n_questions]

def recall_row(rng, text, encode):
    """One row of recall documents, few long or many short. Tokens of answers have VOCAB added."""
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
    """Plain ASCII paragraphs, without notes, captions, headings, italics and hard-wrapped lines."""
    text = text.replace("—", "--").translate(str.maketrans("‘’“”–", "''\"\"-", "_*`|"))
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    for _, pattern, replacement in EDITS:
        text = re.sub(pattern, replacement, text)
    return "\n\n".join(line for line in text.split("\n") if re.match(STORY, line))

def prepare(stories, out, n_rows=3000):
    """Write tokenizer.json, tokens.npz, train.txt and held-out.txt, made of folders of stories."""
    rng, arrays = random.Random(0), {}
    parts = {"train": {group: [] for group in GROUPS}, "held": {group: [] for group in GROUPS}}
    for group, folders in GROUPS.items():
        paths = sorted(path for name in folders for path in Path(stories, name).glob("*.txt"))
        texts = [path.read_text("utf-8") for path in paths if path.name not in SKIP]
        docs = [clean(doc) for text in texts for doc in text.split("<|endoftext|>")]
        docs = [doc for doc in docs if len(doc) > 200]
        rng.shuffle(docs)
        room = 0.015 * sum(map(len, docs))  # whole documents are held out, not windows of them
        for doc in docs:
            part = "held" if len(doc) < room else "train"
            room -= len(doc) * (part == "held")
            parts[part][group].append(doc)
    # All but the novels.
    simple = {part: sum([*groups.values()][:3], []) for part, groups in parts.items()}
    # A byte-level BPE as Llama 3 has it, but every digit is a token; its merges are learned anew.
    tokenizer, alphabet = Tokenizer.from_pretrained("tiny"), pre_tokenizers.ByteLevel.alphabet()
    tokenizer.backend.train_from_iterator(simple["train"], trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[*tokenizer.special], initial_alphabet=alphabet))
    Path(out).mkdir(parents=True, exist_ok=True)
    tokenizer.backend.save(str(Path(out, "tokenizer.json")))
    encode = lambda text: tokenizer.encode(text, bos=False)
    for part, n, name in (("train", n_rows, "train.txt"), ("held", 64, "held-out.txt")):
        for group, docs in parts[part].items():
            arrays[f"{group}.{part}"] = [i for doc in docs for i in (BOS, *encode(doc), EOS)]
        filler = "\n\n".join(simple[part])
        arrays[f"recall.{part}"] = np.ravel([recall_row(rng, filler, encode) for _ in range(n)])
        Path(out, name).write_text("\n\n\n".join(simple[part]))
    np.savez_compressed(Path(out, "tokens.npz"), **{k: np.uint16(v) for k, v in arrays.items()})
    print("\n".join(f"{name:15} {len(array):10,} tokens" for name, array in arrays.items()))

# ---- Training ------------------------------------------------------------------------------------

def losses(model, tokens):
    """Cross-entropy of every next token of (B, ROW), and whether it was the likeliest: flat."""
    logits, targets = model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return loss, logits.argmax(-1) == targets

@torch.no_grad()
def evaluate(model, windows, report):
    """To a report: held-out loss of every group, and the share of recall answers with all their
    tokens right."""
    for group in BATCH:
        rows = windows[f"{group}.held"][::ROW][:32]
        loss, right = losses(model.eval(), rows % VOCAB)
        report += f" {group} {loss.mean():.3f}"
    # In the last group, recall: number the answers, count the wrong ones.
    answer, before = (rows[:, 1:] >= VOCAB).flatten(), (rows[:, :-1] >= VOCAB).flatten()
    number = (answer & ~before).cumsum(0)
    return f"{report} answers {1 - len(number[answer & ~right].unique()) / number[-1]:.3f}"

def train(data, out, steps=4810):
    """Write the model that so many batches of prepared data make into a folder."""
    device = best_device().type
    torch.manual_seed(0)
    windows = {name: torch.from_numpy(array.astype("int64")).to(device).unfold(0, ROW, 1)
               for name, array in np.load(Path(data, "tokens.npz")).items()}
    # Windows begin at every token; those of recall, at its rows.
    pool = [windows[f"{group}.train"][:: ROW if group == "recall" else 1] for group in BATCH]
    model = Llama(Config.from_pretrained("tiny")).to(device)  # of the shape that config.json says
    matrices = [p for p in model.layers.parameters() if p.dim() == 2]
    others = [model.embed_tokens.weight, *(p for p in model.parameters() if p.dim() == 1)]
    for weight in (model.embed_tokens.weight, *matrices):  # as in GPT-2; RMSNorm's weights are 1
        torch.nn.init.normal_(weight, std=0.02)
    for layer in model.layers:
        for last in (layer.self_attn.o_proj, layer.mlp.down_proj):  # what it adds to the stream is
            last.weight.data /= (2 * len(model.layers)) ** 0.5  # little at first, and has dropout
            last.register_forward_hook(lambda last, _, x: torch.dropout(x, 0.2, last.training))
    muon = torch.optim.Muon(matrices, weight_decay=0.5, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    fast_losses = torch.autocast(device, torch.bfloat16)(torch.compile(losses))
    for step in range(1, steps + 1):
        rows = torch.cat([w[torch.randint(len(w) - 1, (n,))] for w, n in zip(pool, BATCH.values())])
        # Every row swaps its digits about: codes are new each time, and can only be looked up.
        swap = torch.arange(VOCAB, device=device).repeat(len(rows), 1)
        swap[:, ZERO : ZERO + 10] = ZERO + torch.rand(len(rows), 10, device=device).argsort(1)
        loss, _ = fast_losses(model.train(), swap.gather(1, rows % VOCAB))
        weight = 1 + 4 * (rows[:, 1:] >= VOCAB).flatten()  # answers are few, but they are the point
        ((loss * weight).sum() / weight.sum()).backward()
        for optimizer in (muon, adamw):  # the rate goes up within 100 steps, linearly down to zero
            optimizer.param_groups[0]["lr"] = 3e-3 * min(step / 100, 1 - (step - 1) / steps)
            optimizer.step()
            optimizer.zero_grad()
        if step % 250 == 0 or step == steps:
            print(evaluate(model, windows, f"{step}: train {loss.mean():.3f}"), flush=True)
    save_pretrained(model, out)
    Path(out, "tokenizer.json").write_bytes(Path(data, "tokenizer.json").read_bytes())

# ---- Files ---------------------------------------------------------------------------------------

def to_hf(config, dtype=torch.bfloat16):
    """The dict of the config.json that Config.from_hf reads."""
    kind = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias > config.out_bias else "llama"
    return {"architectures": [f"{kind.capitalize()}ForCausalLM"], "model_type": kind,
            **{hf: getattr(config, ours) for ours, hf in HF_NAMES.items()}, "hidden_act": "silu",
            "rope_scaling": config.rope_scaling and {"rope_type": "llama3", **config.rope_scaling},
            "eos_token_id": list(config.eos_ids), "torch_dtype": str(dtype)[6:]}

def save_pretrained(model, folder, dtype=torch.bfloat16):
    """Write config.json and model.safetensors in Hugging Face's layout."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    state = {f"model.{name}".replace("model.lm_head", "lm_head"): weight.detach().to(dtype)
             for name, weight in model.named_parameters()}
    save_file(state, Path(folder, "model.safetensors"), {"format": "pt"})
    Path(folder, "config.json").write_text(json.dumps(to_hf(model.config, dtype), indent=2) + "\n")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("command", choices=("prepare", "train"))
    parser.add_argument("source", help="folders of stories, or the folder of prepared data")
    parser.add_argument("out", help="a folder")
    args = parser.parse_args()
    {"prepare": prepare, "train": train}[args.command](args.source, args.out)
