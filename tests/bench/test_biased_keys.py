"""Keys with a constant part: taking means off repairs what packing does to their scores."""

import importlib

import mlx.core as mx
import numpy as np
import pytest

import mlx_rotor
from mlx_rotor.bench.codecs import keys, score_error
from mlx_rotor.bench.codecs import measure_biased_keys as measure


@pytest.mark.parametrize(
    ("codec", "centred", "plain"), [("turbo4", 0.02, 0.1), ("trellis4", 0.02, 0.07), ("turbo3", 0.05, 0.35)]
)
def test_means_repair_biased_keys(codec, centred, plain):
    found = measure(codec)
    assert found.centred <= centred and found.plain >= plain


def test_means_cost_nothing_where_there_is_no_bias():
    found = measure("turbo4", bias=0.0)
    assert found.centred <= found.plain <= 0.01


@pytest.mark.parametrize("chunk", [32, 2048])
def test_small_and_large_chunks_are_repaired_alike(chunk):
    q, k = keys(2048, 25.0, 4)
    assert score_error("turbo4", True, q, k, chunk) <= 0.02


def test_a_model_with_biased_keys_keeps_its_logits():
    """mlx_lm's own Qwen2, whose key projections have biases, with 25 standard deviations on a few channels."""
    module = importlib.import_module("mlx_lm.models.qwen2")
    mx.random.seed(1)
    config = {
        "model_type": "qwen2", "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 256,
        "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
        "tie_word_embeddings": False,
    }  # fmt: skip
    model = module.Model(module.ModelArgs.from_dict(config))
    rng = np.random.default_rng(0)
    for layer in model.layers:
        k_proj, q_proj = layer.self_attn.k_proj, layer.self_attn.q_proj
        k_proj.weight, q_proj.weight = k_proj.weight * 2, q_proj.weight * 2
        sigma = float(mx.sqrt(mx.mean(k_proj.weight**2) * 128))
        bias = np.zeros(64, np.float32)
        bias[rng.choice(np.arange(20, 32), 4, replace=False)] = 25 * sigma
        k_proj.bias = mx.array(bias)
    mx.eval(model.parameters())
    tokens = mx.array(rng.integers(0, 256, (1, 256)))

    def logits(kv, **how):
        caches = mlx_rotor.make_prompt_cache(model, kv, **how)
        out = [model(tokens[:, at : at + 32], cache=caches) for at in range(0, 256, 32)]
        return mx.concatenate(out, axis=1)

    exact = logits("exact")
    scheme = mlx_rotor.cache.parse("turbo4", sinks=0, ring=0, protect_layers=0)
    errors = [mx.mean((logits(scheme.keeping(centre=c)) - exact) ** 2).item() for c in (True, False)]
    assert errors[0] < errors[1] / 4, errors
