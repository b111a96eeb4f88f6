"""A synthetic FP8 checkpoint of one layer with a large model's dimensions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..errors import RotorError
from ..quant.job.workplace import check_disk
from ..quant.plan import Output
from ..quant.safetensors_io import ShardWriter

DIMENSIONS: Mapping[str, Mapping[str, int]] = {
    "minimax": {
        "hidden_size": 3072,
        "intermediate_size": 1536,
        "num_local_experts": 256,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 2048,
    },
    "small": {
        "hidden_size": 256,
        "intermediate_size": 128,
        "num_local_experts": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 128,
        "vocab_size": 256,
    },
}
CHOSEN = 8  # experts a token goes to
BLOCK = 128  # of the FP8 source, rows and columns
SHARD_BYTES = 2_000_000_000
POOL = 1 << 24  # random codes that tensors are cut from


def make_checkpoint(folder: Path, dimensions: str = "minimax", experts: int = 0) -> int:
    """Writes the synthetic checkpoint into the new folder `folder`; bytes of its tensors. The same bytes every time.
    `experts` 0: as many as the dimensions say.

    Raises:
        RotorError: no such dimensions, no room.
    """
    if dimensions not in DIMENSIONS:
        raise RotorError(f"unknown dimensions {dimensions!r}; there are {', '.join(DIMENSIONS)}")
    dims = dict(DIMENSIONS[dimensions])
    dims["num_local_experts"] = experts or dims["num_local_experts"]
    every = list(tensors(dims))
    total = sum(t.nbytes for t in every)
    check_disk(folder, total)
    folder.mkdir(parents=True)
    config = {
        "architectures": ["MiniMaxM2ForCausalLM"],
        "model_type": "minimax_m2",
        **dims,
        "num_hidden_layers": 1,
        "num_experts_per_tok": min(CHOSEN, dims["num_local_experts"]),
        "rotary_dim": dims["head_dim"] // 2,
        "rope_theta": 5e6,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "shared_intermediate_size": 0,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    shards: list[list[Output]] = [[]]
    for tensor in every:
        if sum(t.nbytes for t in shards[-1]) + tensor.nbytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    rng = np.random.default_rng(0)
    codes = np.tile(np.array(mx.to_fp8(mx.array(rng.standard_normal(POOL, np.float32)) * 60)), 2)
    where = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        writer = ShardWriter(folder / name, shard)
        for tensor in shard:
            writer.write(tensor.name, 0, _contents(tensor, rng, codes))
            where[tensor.name] = name
        writer.publish()
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def tensors(dims: Mapping[str, int]) -> Iterator[Output]:
    """Of a layer, the embeddings and the head, in the order of the files."""
    hidden, inter, vocab = dims["hidden_size"], dims["intermediate_size"], dims["vocab_size"]
    q, kv = (dims[k] * dims["head_dim"] for k in ("num_attention_heads", "num_key_value_heads"))

    def linear(name: str, rows: int, columns: int) -> Iterator[Output]:
        yield Output(f"{name}.weight", "F8_E4M3", (rows, columns))
        yield Output(f"{name}.weight_scale_inv", "F32", (-(-rows // BLOCK), -(-columns // BLOCK)))

    yield Output("model.embed_tokens.weight", "BF16", (vocab, hidden))
    at = "model.layers.0"
    for norm, size in (("input_layernorm", hidden), ("post_attention_layernorm", hidden)):
        yield Output(f"{at}.{norm}.weight", "BF16", (size,))
    yield Output(f"{at}.self_attn.q_norm.weight", "BF16", (q,))
    yield Output(f"{at}.self_attn.k_norm.weight", "BF16", (kv,))
    for name, rows, columns in (("q", q, hidden), ("k", kv, hidden), ("v", kv, hidden), ("o", hidden, q)):
        yield from linear(f"{at}.self_attn.{name}_proj", rows, columns)
    yield Output(f"{at}.block_sparse_moe.gate.weight", "BF16", (dims["num_local_experts"], hidden))
    yield Output(f"{at}.block_sparse_moe.e_score_correction_bias", "F32", (dims["num_local_experts"],))
    for expert in range(dims["num_local_experts"]):
        for name, rows, columns in (("w1", inter, hidden), ("w2", hidden, inter), ("w3", inter, hidden)):
            yield from linear(f"{at}.block_sparse_moe.experts.{expert}.{name}", rows, columns)
    yield Output("model.norm.weight", "BF16", (hidden,))
    yield Output("lm_head.weight", "BF16", (vocab, hidden))


def _contents(tensor: Output, rng: np.random.Generator, codes: np.ndarray) -> bytes:
    """A tensor's bytes: weights of about 0.012 standard deviation."""
    count = prod(tensor.shape)
    if tensor.dtype == "F8_E4M3":
        start = int(rng.integers(0, POOL))
        return np.resize(codes[start : start + min(count, POOL)], count).tobytes()
    if tensor.dtype == "F32":
        return (rng.uniform(0.5, 1.5, count).astype(np.float32) * 2e-4).tobytes()
    values = np.resize(rng.standard_normal(min(count, 1 << 20), np.float32) * 0.012, count)
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()  # bf16, rounded towards zero
