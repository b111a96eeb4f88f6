"""Checkpoints of tiny models with random codes in every weight format, and the float32 models they stand for."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_rotor.bundled import MODEL
from mlx_rotor.experts import formats
from mlx_rotor.experts.formats.base import Tensor
from mlx_rotor.host.skeleton import skeleton

BASE = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "vocab_size": 512,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
CONFIGS = {
    "minimax": {"shared_intermediate_size": 0, "rotary_dim": 32},
    "mixtral": {},
    "gpt_oss": {"sliding_window": 8, "rope_scaling": None, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen3": {"tie_word_embeddings": True},
    "deepseek_v3": {
        "moe_intermediate_size": 128,
        "kv_lora_rank": 64,
        "q_lora_rank": 64,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "num_key_value_heads": 4,
        "rope_scaling": None,
    },
}
LLOYD, IQ4, Q8 = ("lloyd", 2, 256), ("iq4_nl", 4, 16), ("q8", 8, 32)
AFFINE = ("affine", 4, 64)
# By the end of a module's path; the first that fits.
MIXED = {
    "gate_proj": LLOYD,
    "up_proj": ("lloyd", 3, 128),
    "down_proj": IQ4,
    "q_proj": ("lloyd", 4, 64),
    "k_proj": AFFINE,
    "v_proj": ("iq4_nl", 4, 32),
    "o_proj": Q8,
    "embed_q": ("iq4_nl", 4, 32),
    "unembed_out": Q8,
    "embed_tokens": Q8,
    "lm_head": ("lloyd", 4, 128),
}


def config(model_type, **changes):
    return {"model_type": model_type, **BASE, **CONFIGS[model_type], **changes}


def random_parts(form, lead, columns, seed=0, dtype=None):
    """(codes, *beside) of random weights of about unit variance, in stored dtypes or beside in `dtype`."""
    rng = np.random.default_rng(seed)
    words, *beside = form.tensors(tuple(lead), columns)
    codes = rng.integers(0, 2**32, words.shape, dtype=np.uint32)
    return mx.array(codes), *(mx.array(_numbers(form, tensor, rng)).astype(dtype or tensor.dtype) for tensor in beside)


def _numbers(form, tensor: Tensor, rng):
    if tensor.kind == "codebooks":
        books = rng.normal(0, 1, tensor.shape)
        return np.sort(books.reshape(*tensor.shape[:-1], -1, 2**form.bits), axis=-1).reshape(tensor.shape)
    spread = {"iq4_nl": 65, "q8": 74, "affine": 2**form.bits / 3.5}[form.mode]
    if tensor.kind == "biases":
        return rng.normal(-1.75, 0.1, tensor.shape)
    return rng.uniform(0.7, 1.3, tensor.shape) / spread


def spec_of(path, specs):
    return next((spec for end, spec in specs.items() if path.endswith(end)), None)


def write(folder: Path, model_type="minimax", specs=MIXED, *, dtype=mx.float32, tokenizer=False, fields=(), **changes):
    """A checkpoint: `specs` says which modules are packed and how, everything else is `dtype`. Returns the float32
    model with the same weights, expanded."""
    folder.mkdir(parents=True, exist_ok=True)
    model, tensors, expanded = skeleton(config(model_type, **changes)), {}, {}
    quantization = {"group_size": 64, "bits": 4, "mode": "affine"}
    for path, module in model.named_modules():
        weight, spec = module.get("weight"), spec_of(path, specs)
        if weight is None or weight.ndim < 2 or spec is None:
            continue
        form = formats.get(*spec)
        *lead, columns = weight.shape
        parts = random_parts(form, lead, columns, zlib.crc32(path.encode()))
        # Rows of unit norm, by what stands beside the codes.
        parts = parts[0], *((part.astype(mx.float32) * columns**-0.5).astype(part.dtype) for part in parts[1:])
        tensors |= {f"{path}.{name}": part for name, part in zip(("weight", *form.beside), parts, strict=True)}
        expanded[f"{path}.weight"] = form.decode(parts, columns)
        quantization[path] = {"group_size": spec[2], "bits": spec[1], "mode": spec[0]}
    rng = np.random.default_rng(7)
    for name, value in tree_flatten(model.parameters()):
        if name not in expanded:
            norm = value.ndim == 1 and name.endswith("norm.weight")
            plain = mx.array(rng.normal(float(norm), 0.1, value.shape)).astype(mx.float32)
            if value.ndim > 1:
                plain = plain * (10 * value.shape[-1] ** -0.5)
            tensors[name] = plain.astype(dtype)
            expanded[name] = tensors[name].astype(mx.float32)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx"})
    described = {**config(model_type, **changes), "quantization": quantization, **dict(fields)}
    (folder / "config.json").write_text(json.dumps(described))
    if tokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(MODEL / name, folder)
    model.update(tree_unflatten(list(expanded.items())))
    model.eval()
    mx.eval(model.parameters())
    return model


def without(folder: Path, name: str):
    """Takes a tensor out of the checkpoint."""
    file = str(folder / "model.safetensors")
    tensors = mx.load(file)
    mx.eval(tensors)
    del tensors[name]
    mx.save_safetensors(file, tensors, {"format": "mlx"})


def distance(a, b):
    """Of logits, relative."""
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    return float(mx.linalg.norm(a - b) / mx.linalg.norm(b))
