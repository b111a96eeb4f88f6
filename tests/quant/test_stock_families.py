"""Checkpoints of other families through a whole job, and what stock mlx_lm loads of the result."""

import json

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from quantizing import quantize

import zoo_configs
from mlx_rotor.quant.plan import make_plan
from mlx_rotor.quant.policy import parse
from mlx_rotor.quant.source import Checkpoint

POLICY = parse(
    """
    group_size = [64, 32]
    [[rule]]
    names = ["*.layers.0.*"]
    bits = 8
    [[rule]]
    roles = ["attn.o", "linear.out"]
    mode = "mxfp4"
    [[rule]]
    roles = ["*.down"]
    mode = "mxfp8"
    [[rule]]
    roles = ["*.gate", "*.gate_up"]
    mode = "nvfp4"
    [[rule]]
    roles = ["expert.up"]
    bits = 3
    [[rule]]
    roles = ["*"]
    bits = 5
    """,
    "mixed",
)
WORST = {3: 0.35, 4: 0.2, 5: 0.06, 8: 0.05}  # |w - stored| / |w| of Gaussian weights, by bits; unrelated weights: 1.4
SIZES = dict.fromkeys(("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"), 64) | {
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}


@pytest.mark.parametrize(
    "model_type", ["deepseek_v3", "qwen3_next", "gpt_oss", "mistral4", "granitemoe", "phi3", "gemma3_text"]
)
def test_stock_mlx_lm_loads_what_a_job_made(tmp_path, model_type):
    config = zoo_configs.config(model_type)
    config |= {key: value for key, value in SIZES.items() if key in config} | {"torch_dtype": "bfloat16"}
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    mx.random.seed(11)
    tensors = {}
    for entry in make_plan(config, POLICY).entries:
        for name in entry.sources:
            shape = entry.layout.shape if entry.layout else entry.source_shape
            tensors[name] = mx.random.normal(shape).astype(mx.bfloat16)
    mx.save_safetensors(str(source / "model.safetensors"), tensors)
    if model_type == "gpt_oss":  # mlx_lm takes it only as it has converted it itself
        reference = read_by_us(source, config)
    else:
        reference = dict(tree_flatten(load_model(source)[0].parameters()))

    result = quantize(source, out, POLICY, fit="fast", shard_bytes=100_000)
    model, _ = load_model(out)
    stored = dict(tree_flatten(model.parameters()))
    modules = dict(model.named_modules())
    for entry in result.plan.entries:
        if entry.spec is None:
            name = entry.outputs[0].name
            assert mx.array_equal(stored[name], reference[name].astype(stored[name].dtype)), name
            continue
        module, spec = modules[entry.module], entry.spec
        assert (module.bits, module.group_size, module.mode) == (spec.bits, spec.group_size, spec.mode)
        parts = [stored.get(f"{entry.module}.{part}") for part in ("weight", "scales", "biases")]
        values = mx.dequantize(*parts, group_size=spec.group_size, bits=spec.bits, mode=spec.mode).astype(mx.float32)
        w = reference[f"{entry.module}.weight"].astype(mx.float32)
        assert (mx.linalg.norm((values - w).flatten()) / mx.linalg.norm(w.flatten())).item() < WORST[spec.bits], (
            entry.module
        )
    assert mx.all(mx.isfinite(model(mx.array([[1, 2, 3]])))).item()


def read_by_us(source, config):
    checkpoint = Checkpoint.open(source, config)
    found = {}
    for entry in make_plan(config, POLICY, checkpoint.dtypes).entries:
        parts = [checkpoint.read(entry, part) for part in range(entry.parts)]
        found[entry.name] = mx.stack(parts) if entry.stacked else parts[0]
    return found
