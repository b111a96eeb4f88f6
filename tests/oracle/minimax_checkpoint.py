"""A MiniMax-M2 with random weights, its dimensions' ratios and forms the published model's, as a checkpoint in bf16.

Knows neither transformers nor mlx_rotor: names and shapes are those of the published files.
"""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np

CONFIG = {
    "architectures": ["MiniMaxM2ForCausalLM"],
    "model_type": "minimax_m2",
    "hidden_size": 512,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,  # six query heads for each, as published
    "head_dim": 128,
    "rotary_dim": 64,
    "rope_theta": 5000000,
    "num_local_experts": 32,
    "num_experts_per_tok": 8,
    "scoring_func": "sigmoid",
    "use_routing_bias": True,
    "use_qk_norm": True,
    "qk_norm_type": "per_layer",
    "attn_type_list": [1, 1, 1],
    "shared_intermediate_size": 0,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-06,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "dtype": "bfloat16",
}
# What attention and experts write is scaled by this, so that each adds some 5 to 10 % of the residual stream's norm, as
# a layer in the middle of a deep model does. Three layers of usual random weights would add as much as there is.
WRITTEN = 0.25


def tensors(seed: int = 6) -> dict[str, mx.array]:
    """Name to values, bf16; the router's correction bias float32, as published."""
    rng = np.random.default_rng(seed)
    hidden, inner, experts = (CONFIG[k] for k in ("hidden_size", "intermediate_size", "num_local_experts"))
    q, kv = (CONFIG[k] * CONFIG["head_dim"] for k in ("num_attention_heads", "num_key_value_heads"))
    made: dict[str, mx.array] = {}

    def normal(name: str, *shape: int, scale: float, mean: float = 0.0) -> None:
        values = mean + scale * rng.standard_normal(shape, np.float32)
        made[f"{name}.weight"] = mx.array(values.astype(np.float32)).astype(mx.bfloat16)

    def linear(name: str, rows: int, columns: int, scale: float = 1.0) -> None:
        """Outputs as large as inputs, times `scale`."""
        normal(name, rows, columns, scale=scale * columns**-0.5)

    normal("model.embed_tokens", CONFIG["vocab_size"], hidden, scale=1.0)
    for layer in range(CONFIG["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            normal(f"{at}.{norm}", hidden, scale=0.1, mean=1.0)
        for name, size in (("q", q), ("k", kv)):  # above 1: attention that looks somewhere
            normal(f"{at}.self_attn.{name}_norm", size, scale=0.1, mean=1.5)
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            linear(f"{at}.self_attn.{name}_proj", rows, hidden)
        linear(f"{at}.self_attn.o_proj", hidden, q, WRITTEN)
        moe = f"{at}.block_sparse_moe"
        linear(f"{moe}.gate", experts, hidden)
        bias = rng.normal(0.5, 0.1, experts).astype(np.float32)
        made[f"{moe}.e_score_correction_bias"] = mx.array(bias)
        for expert in range(experts):
            linear(f"{moe}.experts.{expert}.w1", inner, hidden)
            linear(f"{moe}.experts.{expert}.w2", hidden, inner, WRITTEN)
            linear(f"{moe}.experts.{expert}.w3", inner, hidden)
    normal("model.norm", hidden, scale=0.1, mean=1.0)
    linear("lm_head", CONFIG["vocab_size"], hidden, 2.0)
    return made


def write(folder: Path) -> Path:
    """config.json and model.safetensors in a new folder. Returns it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    mx.save_safetensors(str(folder / "model.safetensors"), tensors(), metadata={"format": "pt"})
    return folder


def prompt(tokens: int, seed: int = 0) -> np.ndarray:
    """Random tokens [tokens], int64."""
    return np.random.default_rng([seed, tokens]).integers(0, CONFIG["vocab_size"], tokens)
