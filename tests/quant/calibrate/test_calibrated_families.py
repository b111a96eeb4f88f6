"""Calibration on checkpoints of other families: hidden states are mlx_lm's, and weights get their inputs' moments."""

import json

import mlx.core as mx
import numpy as np
import pytest

import zoo_configs
from mlx_rotor.host.skeleton import skeleton
from mlx_rotor.quant import policy
from mlx_rotor.quant.calibrate import Calibration
from mlx_rotor.quant.calibrate.measure import measurable
from mlx_rotor.quant.plan import make_plan
from mlx_rotor.quant.source import Checkpoint

TOKENS = (np.arange(6 * 16).reshape(6, 16) * 31 % 61).astype(np.int32)
SIZES = dict.fromkeys(("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"), 64) | {
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}
FOUR = policy.parse('group_size = 32\n[[rule]]\nroles = ["*"]\nbits = 4', "four")
# Latent attention multiplies what is kept by the first of its two factors from the other side.
TURNED = ("embed_q",)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "qwen3_next", "gpt_oss", "granitemoe", "gemma3_text"])
def test_every_weight_gets_statistics(tmp_path, model_type):
    config = zoo_configs.config(model_type)
    config |= {key: value for key, value in SIZES.items() if key in config} | {"torch_dtype": "bfloat16"}
    plan = make_plan(config, FOUR)
    mx.random.seed(11)
    tensors = {}
    for entry in plan.entries:
        for name in entry.sources:
            shape = entry.layout.shape if entry.layout else entry.source_shape
            tensors[name] = (0.2 * mx.random.normal(shape)).astype(mx.bfloat16)
    mx.save_safetensors(str(tmp_path / "model.safetensors"), tensors)
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint.open(tmp_path, config)
    plan = make_plan(config, FOUR, checkpoint.dtypes)

    guide = Calibration(config, checkpoint, plan, TOKENS, tmp_path / "job", chunk=48)
    wanted, without = measurable(plan), []
    for layer in (*range(plan.layers), None):
        group = [e for e in wanted if e.layer == layer and e.role != "embed"]
        _, statistics = guide.layer(layer, group)
        for entry in group:
            for part in range(entry.parts):
                found = statistics.importance(entry, part)
                if found is None:
                    mixture = statistics._mixtures.get(entry.module.rpartition(".")[0])
                    if mixture is None or mixture.counts[part]:
                        without.append(entry.module)
                else:
                    assert found.shape == (entry.shape[-1],) and mx.all(mx.isfinite(found)).item()
    assert all(module.endswith(TURNED) for module in without), without

    model = skeleton(config)
    loaded = {}
    for entry in plan.entries:
        parts = [checkpoint.read(entry, part) for part in range(entry.parts)]
        loaded[entry.name] = mx.stack(parts).reshape(entry.shape)
    if model_type == "gemma3_text":  # ties its head when it is given none
        model.sanitize(loaded)
    model.load_weights(list(loaded.items()))
    with guide.walk.end() as run:
        got = run(mx.array(guide.hidden(plan.layers)))
    want = model(mx.array(TOKENS))
    assert (mx.abs(got - want).max() / mx.abs(want).max()).item() <= 1e-5
