"""A checkpoint as people quantize from, small enough to do it dozens of times: MiniMax-M2 in FP8 with a tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_rotor.bundled import MODEL

CONFIG = {
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "rotary_dim": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "attn_type_list": [1, 1],
    "max_position_embeddings": 512,
}
LARGE = 256  # times usual, of one expert's up rows under `write(overflow=True)`


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The folder of such a checkpoint, which no test may change."""
    return write(tmp_path_factory.mktemp("small") / "source")


def write(folder: Path, *, overflow: bool = False) -> Path:
    """Random weights in three shards. `overflow`: layer 1's expert 2 has intermediate values float16 can't hold."""
    folder.mkdir(parents=True)
    config = json.loads((MODEL / "config.json").read_text()) | CONFIG
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(MODEL / name, folder)
    tensors, rng = {}, np.random.default_rng(3)
    hidden, inner, vocabulary = CONFIG["hidden_size"], CONFIG["intermediate_size"], config["vocab_size"]

    def dense(name, *shape, scale=0.3, mean=0.0):
        values = mx.array(rng.normal(mean, scale, shape).astype(np.float32)).astype(mx.bfloat16)
        tensors[f"{name}.weight"] = np.array(values.view(mx.uint16))

    def blocks(name, rows, columns, factor=1.0):
        values = mx.array(rng.normal(0, 100, (rows, columns)).clip(-400, 400).astype(np.float32))
        tensors[f"{name}.weight"] = np.array(mx.to_fp8(values))
        factors = rng.uniform(0.5, 2, (-(-rows // 128), -(-columns // 128))) * factor * 2e-3
        tensors[f"{name}.weight_scale_inv"] = factors.astype(np.float32)

    dense("model.embed_tokens", vocabulary, hidden)
    for layer in range(CONFIG["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            dense(f"{at}.{norm}", hidden, scale=0.1, mean=1.0)
        for kind, rows in (("q", 128), ("k", 64)):
            dense(f"{at}.self_attn.{kind}_norm", rows, scale=0.1, mean=1.0)
        for kind, rows, columns in (("q", 128, hidden), ("k", 64, hidden), ("v", 64, hidden), ("o", hidden, 128)):
            blocks(f"{at}.self_attn.{kind}_proj", rows, columns)
        moe = f"{at}.block_sparse_moe"
        dense(f"{moe}.gate", CONFIG["num_local_experts"], hidden)
        tensors[f"{moe}.e_score_correction_bias"] = rng.normal(0, 0.1, CONFIG["num_local_experts"]).astype(np.float32)
        for expert in range(CONFIG["num_local_experts"]):
            for kind, rows, columns in (("w1", inner, hidden), ("w2", hidden, inner), ("w3", inner, hidden)):
                large = overflow and (layer, expert, kind) == (1, 2, "w3")
                blocks(f"{moe}.experts.{expert}.{kind}", rows, columns, LARGE**2 if large else 1.0)
    dense("model.norm", hidden, scale=0.1, mean=1.0)
    dense("lm_head", vocabulary, hidden)
    _save(folder, tensors)
    return folder


KINDS = {"uint16": "BF16", "uint8": "F8_E4M3", "float32": "F32"}


def _save(folder, tensors, shards=3):
    names, where = list(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part, table, end = names[i * len(names) // shards : (i + 1) * len(names) // shards], {}, 0
        for name in part:
            values = tensors[name]
            offsets = [end, end := end + values.nbytes]
            table[name] = {"dtype": KINDS[values.dtype.name], "shape": list(values.shape), "data_offsets": offsets}
        header = json.dumps(table).encode()
        data = b"".join(tensors[name].tobytes() for name in part)
        (folder / file).write_bytes(len(header).to_bytes(8, "little") + header + data)
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
