"""Synthetic MiniMax-M2 checkpoints, written and decoded without the code under test."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "host"))  # zoo_configs: a tiny config of every architecture

Tensors = dict[str, tuple[str, np.ndarray]]  # name -> safetensors dtype, raw values (bf16 as uint16, FP8 as uint8)


def e4m3_table() -> np.ndarray:
    """Value of every FP8 E4M3 code: sign, 4 exponent bits with bias 7, 3 mantissa bits; S.1111.111 is NaN."""
    code = np.arange(256)
    sign, exponent, mantissa = np.where(code & 128, -1.0, 1.0), (code >> 3) & 15, code & 7
    subnormal, normal = mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0)
    values = sign * np.where(exponent == 0, subnormal, normal)
    values[(code & 127) == 127] = np.nan
    return values.astype(np.float32)


TABLE = e4m3_table()
ORDER = np.argsort(TABLE[:255])[:-1]  # finite codes by value (NaN codes sort last or are left out)


def bf16(values: np.ndarray) -> np.ndarray:
    """float32 -> raw bf16, round to nearest even."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def to_fp8(values: np.ndarray) -> np.ndarray:
    known = TABLE[ORDER]
    right = np.clip(np.searchsorted(known, values), 1, len(known) - 1)
    nearest = right - (values - known[right - 1] < known[right] - values)
    return ORDER[nearest].astype(np.uint8)


def write_safetensors(path: Path, tensors: Tensors) -> None:
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, values) in tensors.items():
        table[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [end, end + values.nbytes]}
        end += values.nbytes
    header = json.dumps(table).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"".join(v.tobytes() for _, v in tensors.values()))


def decoded(tensors: Tensors, name: str) -> np.ndarray:
    """A tensor as float32, FP8 blocks of 128 x 128 multiplied out."""
    dtype, values = tensors[name]
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    if dtype == "F8_E4M3":
        factors = tensors[f"{name}_scale_inv"][1]
        full = np.kron(factors, np.ones((128, 128), np.float32))
        return TABLE[values] * full[: values.shape[0], : values.shape[1]]
    return values.astype(np.float32)


CONFIG = {
    "architectures": ["MiniMaxM2ForCausalLM"],
    "model_type": "minimax_m2",
    "hidden_size": 192,  # one and a half FP8 blocks
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "rotary_dim": 32,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "shared_intermediate_size": 0,
    "rms_norm_eps": 1e-6,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "vocab_size": 200,
    "torch_dtype": "bfloat16",
}


def make_tensors(config: dict[str, Any], fp8: bool, router: str) -> Tensors:
    rng = np.random.default_rng(7)
    hidden, inter, experts = (config[k] for k in ("hidden_size", "intermediate_size", "num_local_experts"))
    q, kv = (config[k] * config["head_dim"] for k in ("num_attention_heads", "num_key_value_heads"))
    tensors: Tensors = {}

    def put(name: str, *shape: int, dtype: str = "BF16") -> None:
        values = rng.normal(0, 0.05, shape).astype(np.float32)
        tensors[name] = (dtype, bf16(values) if dtype == "BF16" else values)

    def linear(name: str, out: int, inner: int) -> None:
        if not fp8:
            return put(name, out, inner)
        blocks = (-(-out // 128), -(-inner // 128))
        factors = rng.uniform(0.5, 2.0, blocks).astype(np.float32) * 2e-4
        tensors[name] = ("F8_E4M3", to_fp8(rng.normal(0, 60, (out, inner))))
        tensors[f"{name}_scale_inv"] = ("F32", factors)

    put("model.embed_tokens.weight", config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for norm, size in (("input", hidden), ("post_attention", hidden)):
            put(f"{at}{norm}_layernorm.weight", size)
        put(f"{at}self_attn.q_norm.weight", q)
        put(f"{at}self_attn.k_norm.weight", kv)
        for name, out, inner in (("q", q, hidden), ("k", kv, hidden), ("v", kv, hidden), ("o", hidden, q)):
            linear(f"{at}self_attn.{name}_proj.weight", out, inner)
        put(f"{at}block_sparse_moe.gate.weight", experts, hidden, dtype=router)
        put(f"{at}block_sparse_moe.e_score_correction_bias", experts, dtype="F32")
        for expert in range(experts):
            for name, out, inner in (("w1", inter, hidden), ("w2", hidden, inter), ("w3", inter, hidden)):
                linear(f"{at}block_sparse_moe.experts.{expert}.{name}.weight", out, inner)
    put("model.norm.weight", hidden)
    if not config["tie_word_embeddings"]:
        put("lm_head.weight", config["vocab_size"], hidden)
    return tensors


Make = Callable[..., tuple[Path, Tensors]]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Make:
    """`checkpoint(fp8=True, shards=2, alter=None, **config)` -> (folder, tensors); `alter(tensors)` before writing."""

    def make(
        fp8: bool = True,
        shards: int = 2,
        router: str = "BF16",
        alter: Callable[[Tensors], Any] | None = None,
        name: str = "source",
        **changes: Any,
    ) -> tuple[Path, Tensors]:
        folder = tmp_path / name
        folder.mkdir()
        config = CONFIG | changes
        if fp8:
            config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "generation_config.json").write_text("{}")
        tensors = make_tensors(CONFIG | changes, fp8, router)
        if alter:
            alter(tensors)
        names, where = list(tensors), {}
        for i in range(shards):
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
            write_safetensors(folder / file, {n: tensors[n] for n in part})
            where |= dict.fromkeys(part, file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
        return folder, tensors

    return make


@pytest.fixture
def truth() -> Callable[[Tensors, str], np.ndarray]:
    return decoded


@pytest.fixture
def fp8_table() -> np.ndarray:
    return TABLE
