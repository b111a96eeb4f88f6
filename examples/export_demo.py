"""Writes the trained demo model in MiniMax-M2's own checkpoint layout: FP8 blocks, several shards, an index, a card.

Called by `train_demo.py --export`; knows nothing of training.
"""

from __future__ import annotations

import gzip
import json
import pathlib
import platform

import torch
from safetensors.torch import save_file

from train_demo import DIM, EPS, EXPERTS, HEAD, HEADS, INTER, KV_HEADS, LAYERS, ROTARY, THETA, TOP, VOCAB

BLOCK = 128
FP8_MAX = 448.0
SHARDS = 3
HELD_OUT_CHARS = 150_000
CONFIG = {
    "architectures": ["MiniMaxM2ForCausalLM"],
    "model_type": "minimax_m2",
    "hidden_size": DIM,
    "intermediate_size": INTER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD,
    "rotary_dim": ROTARY,
    "rope_theta": THETA,
    "max_position_embeddings": 8192,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": TOP,
    "shared_intermediate_size": 0,
    "scoring_func": "sigmoid",
    "use_routing_bias": True,
    "use_qk_norm": True,
    "qk_norm_type": "per_layer",
    "rms_norm_eps": EPS,
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "attn_type_list": [1] * LAYERS,
    "tie_word_embeddings": False,
    "vocab_size": VOCAB,
    "bos_token_id": 1,
    "eos_token_id": [3, 0],
    "torch_dtype": "bfloat16",
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "float8_e4m3fn",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
    },
}
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "]~!b[",
    "eos_token": "[e~[",
    "pad_token": "<|endoftext|>",
    "clean_up_tokenization_spaces": False,
    "model_max_length": 8192,
}


def fp8_blocks(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """w: [m, n] -> (F8_E4M3 [m, n], float32 scale_inv [ceil(m/128), ceil(n/128)]); w ≈ fp8 × scale_inv."""
    m, n = w.shape
    padded = torch.nn.functional.pad(w.float(), (0, -n % BLOCK, 0, -m % BLOCK))
    blocks = padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
    scale = blocks.abs().amax((1, 3)).clamp_min(1e-12) / FP8_MAX
    q = (blocks / scale[:, None, :, None]).reshape(padded.shape)[:m, :n]
    return q.to(torch.float8_e4m3fn).contiguous(), scale


def fp8_round_trip(w: torch.Tensor) -> torch.Tensor:
    q, scale = fp8_blocks(w)
    wide = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: w.shape[0], : w.shape[1]]
    return q.float() * wide


def tensors(model) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint under MiniMax-M2's names, in layer order."""
    out: dict[str, torch.Tensor] = {}

    def linear(name, w):
        out[f"{name}.weight"], out[f"{name}.weight_scale_inv"] = fp8_blocks(w)

    out["model.embed_tokens.weight"] = model.emb.weight.bfloat16()
    for n, layer in enumerate(model.layers):
        p = f"model.layers.{n}"
        out[f"{p}.input_layernorm.weight"] = layer.n1.weight.bfloat16()
        for key in "qkvo":
            linear(f"{p}.self_attn.{key}_proj", getattr(layer, key).weight)
        out[f"{p}.self_attn.q_norm.weight"] = layer.qn.weight.bfloat16()
        out[f"{p}.self_attn.k_norm.weight"] = layer.kn.weight.bfloat16()
        out[f"{p}.post_attention_layernorm.weight"] = layer.n2.weight.bfloat16()
        moe = f"{p}.block_sparse_moe"
        out[f"{moe}.gate.weight"] = layer.gate.weight.bfloat16()
        out[f"{moe}.e_score_correction_bias"] = layer.bias.float()
        for e in range(EXPERTS):
            rows = slice(e * INTER, (e + 1) * INTER)
            linear(f"{moe}.experts.{e}.w1", layer.w1[rows])
            linear(f"{moe}.experts.{e}.w2", layer.w2[:, rows])
            linear(f"{moe}.experts.{e}.w3", layer.w3[rows])
    out["model.norm.weight"] = model.n.weight.bfloat16()
    out["lm_head.weight"] = model.head.weight.bfloat16()
    return {k: v.detach().cpu().contiguous() for k, v in out.items()}


def round_trip_(model) -> None:
    """Rounds a model's weights in place to what the checkpoint stores."""
    with torch.no_grad():
        for layer in model.layers:
            for key in "qkvo":
                w = getattr(layer, key).weight
                w.copy_(fp8_round_trip(w))
            for e in range(EXPERTS):
                rows = slice(e * INTER, (e + 1) * INTER)
                layer.w1[rows] = fp8_round_trip(layer.w1[rows])
                layer.w3[rows] = fp8_round_trip(layer.w3[rows])
                layer.w2[:, rows] = fp8_round_trip(layer.w2[:, rows])
            layer.gate.weight.copy_(layer.gate.weight.bfloat16())
        for p in (model.emb.weight, model.head.weight, *(q for q in model.parameters() if q.dim() == 1)):
            p.copy_(p.bfloat16())


def write_json(path: pathlib.Path, data) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")


def card_text(card: dict) -> str:
    """The model card, from the figures of `training.json`."""
    corpus, before, after = card["corpus"], card["float32"], card["fp8"]
    rows = [
        ("held-out perplexity a token", "perplexity", f"{after['windows']} windows of 1024"),
        ("needle at 768 tokens, 3 depths", "needle", f"{after['needles']} trials"),
        ("chats answered, tools called", "chat", f"{after['chats']} chats"),
    ]
    table = "\n".join(f"| {what} | {before[key]:g} | {after[key]:g} | {sample} |" for what, key, sample in rows)
    runs = "\n".join(
        f"| {r['first_step']} | {r.get('last_step', 'stopped early')} | {r['lr']:g} | {r.get('loss', '-')} | "
        f"{r['minutes']:g} planned, {r['device']} |"
        for r in card["runs"]
    )
    return f"""---
license: apache-2.0
library_name: mlx
pipeline_tag: text-generation
---
# The bundled model of mlx_rotor

A trained MiniMax-M2 at {card["parameters"] / 1e6:.1f} M parameters: {LAYERS} layers, hidden {DIM}, {HEADS} query and
{KV_HEADS} KV heads of {HEAD} ({ROTARY} rotated), flat QK norm, {EXPERTS} experts of {INTER} with {TOP} active, sigmoid
router with a correction bias, vocabulary {VOCAB}. Weights in F8_E4M3 with float32 `weight_scale_inv` blocks of
[{BLOCK}, {BLOCK}]; norms, embeddings, router and head in bf16. It completes Python, recalls codes, and answers in
MiniMax's chat form with `<think>` and `<minimax:tool_call>`. It is a test model: it knows nothing else.

**Corpus.** {corpus["standard_library_files"]} files of Python {corpus["python"]}'s standard library and
{corpus["package_files"]} of installed packages (mlx-lm, numpy, transformers, torch), with look-ups, needles in filler
and chats made by `examples/train_demo.py`. {corpus["held_out_files"]} files, in `../held_out.txt`, were kept out.
Seed {card["seed"]}; a run's row generator is seeded with its first step plus one.

**Training.** {card["steps"]} steps, {card["tokens"] / 1e6:.1f} M tokens. Muon for the attention projections, AdamW for
the rest. Steps before the first listed run: standard library, look-ups and needles, no chats, no packages.

| from step | to step | peak learning rate | last batch's loss | time |
|---|---|---|---|---|
{runs}

| teacher-forced, every token of an answer right | trained, float32 | this checkpoint, FP8 | sample |
|---|---|---|---|
{table}

PyTorch {card["torch"]} with bf16 autocast, {card["machine"]}. `python examples/train_demo.py --out RUN --resume`
continues; `--export` writes these files and figures.
"""


def export(model, state, folder: pathlib.Path, evaluate, corpus: tuple[list[str], list[str], list[str]]) -> None:
    """Writes shards, index, configs, the held-out text and `training.json` (figures before and after FP8)."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.safetensors"):
        old.unlink()
    all_tensors = tensors(model)
    per_shard = sum(t.nbytes for t in all_tensors.values()) / SHARDS
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, t in all_tensors.items():
        full = sum(x.nbytes for x in shards[-1].values()) >= per_shard
        if full and len(shards) < SHARDS:
            shards.append({})
        shards[-1][name] = t
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{SHARDS:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(t.nbytes for t in all_tensors.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(folder / "config.json", CONFIG)
    write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": [3, 0], "do_sample": False})
    library, packages, valid = corpus
    text = "".join(valid)[:HELD_OUT_CHARS]
    (folder.parent / "held_out.txt.gz").write_bytes(gzip.compress(text.encode(), 9, mtime=0))

    trained = evaluate(model)
    round_trip_(model)
    exported = evaluate(model)
    card = {
        "parameters": sum(p.numel() for p in model.parameters()) + sum(b.numel() for b in model.buffers()),
        "bytes": total,
        "corpus": {
            "standard_library_files": len(library),
            "package_files": len(packages),
            "held_out_files": len(valid),
            "python": platform.python_version(),
        },
        "seed": 0,
        **state,
        "float32": trained,
        "fp8": exported,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    write_json(folder / "training.json", card)
    (folder / "README.md").write_text(card_text(card))
    print(json.dumps(card, indent=2))
