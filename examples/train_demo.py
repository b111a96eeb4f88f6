"""Trains the bundled model: MiniMax-M2's architecture at 10.5 M parameters, on Python source and retrieval tasks.

Needs the `[train]` extra (PyTorch, CPU or CUDA). Downloads nothing: the corpus is Python source on this machine, the
standard library first, less the files `mlx_rotor/bundled/held_out.txt` lists, then packages already installed.

    python examples/train_demo.py --minutes 90 --out run            # trains; stop and continue with --resume
    python examples/train_demo.py --out run --export mlx_rotor/bundled/model # writes the FP8 checkpoint and its figures
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import pathlib
import random
import sysconfig
import time
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedTokenizerFast

from mlx_rotor import bundled
from mlx_rotor.quality import chat as conversations
from mlx_rotor.quality import needle

DEMO = bundled.MODEL.parent
# MiniMax-M2's shape, scaled: half of each head rotated, 16 experts, 2 active, no shared expert.
VOCAB, DIM, LAYERS, HEADS, KV_HEADS, HEAD, ROTARY, EXPERTS, TOP, INTER = 2048, 256, 8, 4, 2, 128, 64, 16, 2, 64
THETA, EPS = 10000.0, 1e-6
SKIP = {"site-packages", "test", "tests", "testing", "idlelib", "lib2to3", "turtledemo", "__pycache__", "encodings"}
PACKAGES = ("mlx_lm", "numpy", "transformers", "torch")
PACKAGE_BYTES = 8_000_000


# ---------------------------------------------------------------- corpus
def sources(root: pathlib.Path) -> list[pathlib.Path]:
    files = (p for p in root.rglob("*.py") if not SKIP & set(p.relative_to(root).parts))
    return sorted(p for p in files if not p.name.startswith("test_"))


def read_corpus() -> tuple[list[str], list[str], list[str]]:
    """Texts of (standard library, packages, held out). A package gives PACKAGE_BYTES at most, by a fixed seed."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    held = set((DEMO / "held_out.txt").read_text().split())
    library, valid = [], []
    for p in sources(root):
        (valid if p.relative_to(root).as_posix() in held else library).append(p.read_text("utf-8", "ignore"))
    packages = []
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            continue
        files, size = sources(pathlib.Path(spec.origin).parent), 0
        random.Random(0).shuffle(files)
        for p in files:
            text = p.read_text("utf-8", "ignore")
            if len(text) < 100_000 and size < PACKAGE_BYTES:
                packages.append(text)
                size += len(text)
    return library, packages, valid


class Mix:
    """Rows of tokens and loss weights: source text, look-ups, needles in filler, chats in the model's own template."""

    def __init__(self, tokenizer, library, packages):
        self.tokenizer, self.library, self.packages = tokenizer, library, packages

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)

    def text(self, n, rng):
        tokens = self.library if rng.random() < 0.65 or not len(self.packages) else self.packages
        i = rng.randrange(len(tokens) - n)
        return tokens[i : i + n].tolist()

    def lookup(self, n, rng):
        out = []
        while len(out) < n:
            table = {k: needle.random_code(rng, 4, 4) for k in rng.sample(needle.NAMES, rng.randint(3, 8))}
            asked = rng.choices(list(table), k=6)
            rows = [*table.items(), *((k, table[k]) for k in asked)]
            out += self.encode("".join(f"{k} = {v}\n" for k, v in rows) + "\n")
        return out[:n]

    def chat(self, chat):
        """(tokens, index of the assistant's first token) of a chat."""
        render = self.tokenizer.apply_chat_template
        prompt = render(chat.prompt, tools=chat.tools, tokenize=False, add_generation_prompt=True)
        whole = render(chat.messages, tools=chat.tools, tokenize=False)
        return self.encode(whole), len(self.encode(prompt))

    def row(self, n, rng):
        z, weights = rng.random(), [1.0] * n
        if z < 0.06:
            return self.lookup(n, rng), weights
        if z < 0.26:
            trial = needle.hide(self.encode, self.text(n, rng), n, rng)
            weights[-len(trial.answer) :] = [4.0] * len(trial.answer)
            return trial.prompt + trial.answer, weights
        if z < 0.38:
            row, weights = [], []
            while len(row) < n:
                filler = self.tokenizer.decode(self.text(rng.randrange(16, n // 2), rng)) if rng.random() < 0.4 else ""
                tokens, start = self.chat(conversations.draw_conversation(rng, filler))
                row += tokens
                weights += [0.3] * start + [2.0] * (len(tokens) - start)
            return row[:n], weights[:n]
        return self.text(n, rng), weights


# ---------------------------------------------------------------- model
class RMSNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        x = x.float()
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * self.weight


def rope(x, positions):
    inverse = THETA ** (-torch.arange(0, ROTARY, 2, device=x.device) / ROTARY)
    angle = positions[:, None] * inverse[None]
    c, s = angle.cos(), angle.sin()
    a, b, rest = x[..., : ROTARY // 2], x[..., ROTARY // 2 : ROTARY], x[..., ROTARY:]
    return torch.cat([a * c - b * s, b * c + a * s, rest], -1)


def linear(i, o, std=0.04):
    layer = nn.Linear(i, o, bias=False)
    nn.init.normal_(layer.weight, std=std)
    return layer


class Layer(nn.Module):
    """One decoder layer. w1, w3: [experts × inter, dim]; w2: [dim, experts × inter]."""

    def __init__(self):
        super().__init__()
        deep = 0.04 / math.sqrt(2 * LAYERS)
        self.n1, self.n2 = RMSNorm(DIM), RMSNorm(DIM)
        self.q, self.k, self.v = linear(DIM, HEADS * HEAD), linear(DIM, KV_HEADS * HEAD), linear(DIM, KV_HEADS * HEAD)
        self.o = linear(HEADS * HEAD, DIM, deep)
        self.qn, self.kn = RMSNorm(HEADS * HEAD), RMSNorm(KV_HEADS * HEAD)
        self.gate = linear(DIM, EXPERTS)
        self.w1 = nn.Parameter(torch.randn(EXPERTS * INTER, DIM) * 0.04)
        self.w3 = nn.Parameter(torch.randn(EXPERTS * INTER, DIM) * 0.04)
        self.w2 = nn.Parameter(torch.randn(DIM, EXPERTS * INTER) * deep)
        self.register_buffer("bias", torch.zeros(EXPERTS))  # e_score_correction_bias, moved to balance the load

    def attention(self, x, positions):
        B, L, _ = x.shape
        h = self.n1(x)
        q = self.qn(self.q(h)).view(B, L, HEADS, HEAD).transpose(1, 2)
        k = self.kn(self.k(h)).view(B, L, KV_HEADS, HEAD).transpose(1, 2)
        v = self.v(h).view(B, L, KV_HEADS, HEAD).transpose(1, 2)
        q, k = rope(q, positions).to(v.dtype), rope(k, positions).to(v.dtype)
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(out.transpose(1, 2).reshape(B, L, -1))

    def experts(self, x):
        """Every expert computed and masked: at this size faster than gathering rows, on a CPU too."""
        B, L, _ = x.shape
        h = self.n2(x).view(B * L, DIM)
        scores = torch.sigmoid(F.linear(h, self.gate.weight.float()))
        chosen = (scores + self.bias).topk(TOP, -1).indices
        w = torch.zeros_like(scores).scatter(-1, chosen, scores.gather(-1, chosen))
        w = w / (w.sum(-1, keepdim=True) + 1e-20)
        if self.training:
            with torch.no_grad():
                load = (w > 0).float().mean(0)
                self.bias += 0.001 * torch.sign(load.mean() - load)
        u = F.silu(F.linear(h, self.w1)) * F.linear(h, self.w3)
        u = u.view(-1, EXPERTS, INTER) * w[..., None].to(u.dtype)
        return F.linear(u.reshape(B * L, -1), self.w2).view(B, L, -1)

    def forward(self, x, positions):
        x = x + self.attention(x, positions)
        return x + self.experts(x)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.head, self.n = nn.Embedding(VOCAB, DIM), nn.Linear(DIM, VOCAB, bias=False), RMSNorm(DIM)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        nn.init.normal_(self.emb.weight, std=0.02)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, ids):
        positions = torch.arange(ids.shape[1], device=ids.device).float()
        x = self.emb(ids)
        for layer in self.layers:
            x = layer(x, positions)
        return self.head(self.n(x)).float()


# ---------------------------------------------------------------- evaluation
@torch.no_grad()
def evaluate(model, mix, valid, device, *, windows=32, needles=21, chat_count=20, length=768):
    """Held-out perplexity, and needles and chats whose every greedy token is the expected one. Seeds of its own."""
    model.eval()
    loss = count = 0
    with torch.autocast(device, torch.bfloat16):
        for i in range(0, min(len(valid) - 1025, windows * 1024), 1024):
            row = torch.tensor(valid[i : i + 1025].astype(np.int64), device=device)[None]
            loss += F.cross_entropy(model(row[:, :-1])[0], row[0, 1:], reduction="sum").item()
            count += 1024

        def exact(tokens, start):
            row = torch.tensor(tokens, device=device)[None]
            return bool((model(row[:, :-1])[0, start - 1 :].argmax(-1) == row[0, start:]).all())

        rng, hits = random.Random("needle"), 0
        for t in range(needles):
            at = rng.randrange(len(valid) - length)
            filler = valid[at : at + length].tolist()
            trial = needle.hide(mix.encode, filler, length, rng, depth=(0.1, 0.5, 0.9)[t % 3])
            hits += exact(trial.prompt + trial.answer, len(trial.prompt))
        rng, good = random.Random("chat"), {}
        for t in range(chat_count):
            chat = (conversations.recall, conversations.tool_call, conversations.tool_answer)[t % 3](rng)
            tokens, start = mix.chat(chat)
            good.setdefault(chat.kind, []).append(exact(tokens, start))
    model.train()
    flat = [ok for oks in good.values() for ok in oks]
    return {
        "perplexity": round(math.exp(loss / count), 4),
        "needle": round(hits / max(needles, 1), 4),
        "chat": round(sum(flat) / max(len(flat), 1), 4),
        "chat_by_kind": {k: round(sum(v) / len(v), 4) for k, v in good.items()},
        "windows": windows,
        "needles": needles,
        "chats": chat_count,
    }


# ---------------------------------------------------------------- training
def optimizers(model, lr):
    """Muon for the attention projections, AdamW for the rest: AdamW alone learns to retrieve far later."""
    hidden = [p for n, p in model.named_parameters() if n.split(".")[-2] in ("q", "k", "v", "o")]
    others = [p for p in model.parameters() if not any(p is h for h in hidden)]
    groups = [
        {"params": [p for p in others if p.dim() > 1], "weight_decay": 0.05},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
    ]
    muon = torch.optim.Muon(hidden, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95)), muon


def train(a, model, mix, valid, device):
    state = {"steps": 0, "tokens": 0, "runs": []}
    checkpoint = a.out / "model.pt"
    if a.resume:
        saved = torch.load(checkpoint, map_location=device)
        model.load_state_dict(saved["m"])
        state = saved.get("state") or {"steps": saved.get("step", 0), "tokens": saved.get("seen", 0), "runs": []}
    run = {"minutes": a.minutes, "lr": a.lr, "device": device, "first_step": state["steps"]}
    state["runs"].append(run)
    adam, muon = optimizers(model, a.lr)
    first, rng, start = state["steps"], random.Random(1 + state["steps"]), time.time()
    batch = a.batch_tokens or (131072 if device == "cuda" else 8192)

    def save():
        torch.save({"m": model.state_dict(), "state": state}, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)

    while (done := (time.time() - start) / 60 / a.minutes) < 1:
        step, fresh = state["steps"], first == 0
        n = 256 if fresh and done < 0.4 else 512 if done < (0.75 if fresh else 0.4) else 1024
        lr = a.lr * min(1, (step - first + 1) / 100) * min(1, max(0.02, (1 - done) / (0.4 if fresh else 0.6)))
        for optimizer, factor in ((adam, 1), (muon, 2)):
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
        rows, weights = zip(*(mix.row(n + 1, rng) for _ in range(batch // n)), strict=True)
        ids = torch.tensor(rows, device=device)
        w = torch.tensor(weights, device=device)[:, 1:].reshape(-1)
        with torch.autocast(device, torch.bfloat16):
            logits = model(ids[:, :-1])
        losses = F.cross_entropy(logits.reshape(-1, VOCAB), ids[:, 1:].reshape(-1), reduction="none")
        loss = (losses * w).sum() / w.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in (adam, muon):
            optimizer.step()
            optimizer.zero_grad()
        state["steps"] += 1
        state["tokens"] += ids.numel()
        if state["steps"] % 20 == 0:
            print(f"step {step + 1} {done:.0%} loss {loss.item():.3f} {state['tokens'] / 1e6:.1f}M tokens", flush=True)
        if state["steps"] % 200 == 0:
            run["last"] = evaluate(model, mix, valid, device)
            print(f"step {step + 1}: {run['last']}", flush=True)
            save()
    run["last_step"], run["loss"] = state["steps"], round(loss.item(), 4)
    save()
    return state


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=float, default=90)
    p.add_argument("--out", type=pathlib.Path, default=pathlib.Path("run"))
    p.add_argument("--batch-tokens", type=int, help="tokens a step (default: 8192 on a CPU, 131072 on a GPU)")
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--resume", action="store_true", help="continue from OUT/model.pt")
    p.add_argument("--export", type=pathlib.Path, help="write the checkpoint OUT/model.pt to this folder; no training")
    a = p.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(DEMO / "model" / "tokenizer.json"))
    tokenizer.chat_template = (DEMO / "model" / "chat_template.jinja").read_text()
    corpus = read_corpus()
    library, packages, valid = (
        np.array([t for text in texts for t in [*tokenizer.encode(text, add_special_tokens=False), 0]], dtype=np.int32)
        for texts in corpus
    )
    print(f"{len(library):,} + {len(packages):,} training tokens, {len(valid):,} held out, on {device}", flush=True)
    model, mix = Model().to(device), Mix(tokenizer, library, packages)
    if a.export:
        import export_demo

        saved = torch.load(a.out / "model.pt", map_location=device)
        model.load_state_dict(saved["m"])
        check = partial(evaluate, mix=mix, valid=valid, device=device, windows=96, needles=60, chat_count=40)
        export_demo.export(model, saved["state"], a.export, check, corpus)
    else:
        train(a, model, mix, valid, device)


if __name__ == "__main__":
    main()
