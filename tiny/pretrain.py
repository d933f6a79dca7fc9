"""Pretrain the tiny Llama that ships here: `prepare` on a CPU, then `train` on one GPU.

    python tiny/pretrain.py prepare --text stories --out .data
    python tiny/pretrain.py train --data .data --out tiny

With 17 M tokens of stories the model reads each many times; dropout and strong weight decay keep it
from learning them by heart. A tenth of every batch is recall text, to learn to look things up.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from stories import GROUPS, ROW, VOCAB, prepare

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # model.py lies one folder up
from model import Config, Llama, Tokenizer

SETTINGS = dict(text="stories", data=".data", out="tiny", steps=4810, batch=48,
                lr=3e-3, decay=0.5, dropout=0.2, shares="11,15,27,34,13", layers=6, dim=384)


def sample_batch(data, shares, size, digits):
    "Rows from all groups by their shares, from anywhere in them -> tokens, is_answer: (B, ROW)."
    rows = []
    for group, share in shares.items():
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
def evaluate(model, data, shares):
    "Held-out loss of every group, and the share of recall answers with all their tokens right."
    report = ""
    for group in shares:
        rows = data[f"{group}.held"].unfold(0, ROW, ROW)[:32]
        with torch.autocast(rows.device.type, torch.bfloat16):
            loss, right = losses(model.eval(), rows % VOCAB)
        report += f"{group} {loss.mean().item():.3f} "
    model.train()
    answer = rows >= VOCAB  # in the last group, recall: number the answers, count the wrong ones
    number = (answer[:, 1:] & ~answer[:, :-1]).flatten().cumsum(0)
    wrong = number[(answer[:, 1:] & ~right).flatten()].unique()
    return report + f"answers {1 - len(wrong) / number[-1].item():.3f}"


def train(args):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    digits = Tokenizer.from_pretrained(args.data).encode("0123456789", bos=False)
    digits, arrays = torch.tensor(digits, device=device), np.load(f"{args.data}/tokens.npz")
    data = {name: torch.from_numpy(arrays[name].astype("int64")).to(device) for name in arrays}
    shares = dict(zip([*GROUPS, "recall"], map(float, args.shares.split(","))))
    model = Llama(Config(
        vocab_size=VOCAB, dim=args.dim, n_layers=args.layers, n_heads=args.dim // 64, kv_heads=2,
        head_dim=64, ffn_dim=args.dim * 8 // 3, context=ROW - 1, tied=True, bos_id=0, eos_ids=(1,)))
    model.init_weights().to(device)
    for layer in model.layers:  # dropout on what each half of a layer adds to the residual stream
        for half in (layer.self_attn, layer.mlp):
            half.register_forward_hook(lambda half, _, x: F.dropout(x, args.dropout, half.training))
    matrices = [p for p in model.layers.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() == 1] + [model.embed_tokens.weight]
    optimizers = [
        torch.optim.Muon(matrices, weight_decay=args.decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]
    print("untrained:", evaluate(model, data, shares), flush=True)
    fast_losses = torch.compile(losses) if device == "cuda" else losses

    for step in range(args.steps):
        tokens, is_answer = sample_batch(data, shares, args.batch, digits)
        with torch.autocast(device, torch.bfloat16):
            loss, _ = fast_losses(model, tokens)
        weight = 1 + 4 * is_answer[:, 1:]  # answers are few, but they are the point
        ((loss * weight).sum() / weight.sum()).backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:  # up within 100 steps, then linearly down to zero
                group["lr"] = args.lr * min((step + 1) / 100, 1 - step / args.steps)
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % 250 == 0 or step + 1 == args.steps:
            print(f"{step + 1}: train {loss.mean().item():.3f}, held-out:",
                  evaluate(model, data, shares), flush=True)
    model.save_pretrained(args.out, torch.bfloat16)
    Path(args.out, "tokenizer.json").write_bytes(Path(args.data, "tokenizer.json").read_bytes())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("command", choices=("prepare", "train"))
    for name, value in SETTINGS.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    args = parser.parse_args()
    prepare(args.text, args.out) if args.command == "prepare" else train(args)
