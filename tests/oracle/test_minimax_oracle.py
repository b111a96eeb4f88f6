"""MiniMax-M2 through mlx_lm and mlx_rotor against transformers' in PyTorch, layer by layer in float32."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_side
import numpy as np
import pytest
from minimax_checkpoint import CONFIG, prompt
from mlx_lm.generate import generate_step
from tiers import Bars, Cosines, changes
from traces import cosine, largest_error, rms

import mlx_rotor
from kernel_cases import needs_kernels, running
from metal_sim import SUPPORTED
from mlx_rotor.cache import Scheme
from mlx_rotor.experts.fused import Counts
from mlx_rotor.host import report
from mlx_rotor.host.experts import attach_experts, detach_experts

LOSSLESS = Scheme("raw32", "raw32", sinks=2, ring=8, protect_layers=0)
LAYERS = range(CONFIG["num_hidden_layers"])
# The first two bars are those that hipfire reports for its own kernels; what experts add has no published one.
TIERS = {"mq4": Bars(0.9996, 0.9999, 0.97), "mq3-lloyd": Bars(0.9994, 0.9999, 0.945)}
FORMS = {"mq4": ("affine", 4), "mq3-lloyd": ("lloyd", 3)}  # of gate and up
STEPS = 16
FEW = 12  # tokens where they come a few at a time
FEWEST = 2  # in the simulator
SAME = 3e-5  # the largest difference that summing in another order makes, against the rms


@pytest.fixture(scope="module", params=TIERS)
def tier(request: pytest.FixtureRequest, quantized: Any) -> tuple[str, Any]:
    return request.param, quantized(request.param)


def test_the_checkpoint_behaves_as_a_trained_one(truth):
    for layer in truth.layers:
        assert 0.5 < rms(layer.left) < 2
        for _, out in (layer.attention, layer.experts):
            assert 0.03 < rms(out) / rms(layer.left) < 0.3


def test_every_layer_of_the_unquantized_model_is_transformers(unquantized, truth, truth_tokens):
    found = mlx_side.trace(unquantized, truth_tokens)
    for a, b in zip(found.layers, truth.layers, strict=True):
        for ours, theirs in ((a.left, b.left), (a.attention[1], b.attention[1]), (a.experts[1], b.experts[1])):
            assert cosine(ours, theirs) >= 1 - 1e-9 and largest_error(ours, theirs) < SAME
    assert cosine(found.logits, truth.logits) >= 1 - 1e-9 and largest_error(found.logits, truth.logits) < SAME


def test_the_unquantized_router_chooses_as_transformers_does(unquantized, oracle, truth):
    for i in LAYERS:
        hidden = truth.layers[i].experts[0]
        theirs, margin = oracle.route(i, hidden)
        assert ((theirs > 0).sum(axis=1) == CONFIG["num_experts_per_tok"]).all() and margin.min() > 1e-5
        ours = mlx_side.route(unquantized, i, hidden)
        assert changes(ours, theirs) == changes(theirs, ours) == 0
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


def test_the_correction_bias_decides(unquantized, oracle, truth):
    block = unquantized.model.layers[0].block_sparse_moe
    kept, hidden = block.e_score_correction_bias, truth.layers[0].experts[0]
    try:
        block.e_score_correction_bias = mx.zeros_like(kept)
        ours = mlx_side.route(unquantized, 0, hidden)
    finally:
        block.e_score_correction_bias = kept
    assert changes(ours, oracle.route(0, hidden)[0]) > len(hidden)


@pytest.mark.parametrize("cache", ["stock", "compressed"])
def test_greedy_decoding_is_transformers(unquantized, oracle, cache):
    """`compressed`: through our cache and attention, with a codec that loses nothing."""
    tokens = prompt(40, seed=1)
    expected, lead = oracle.greedy(tokens, STEPS)
    assert lead > 1e-3 and len(set(expected)) > STEPS // 2
    ours = cache == "compressed"
    caches = mlx_rotor.make_prompt_cache(unquantized, LOSSLESS) if ours else mlx_side.caches(unquantized)
    found = generate_step(mx.array(tokens), unquantized, max_tokens=STEPS, prompt_cache=caches)
    assert [int(token) for token, _ in found] == expected
    if ours:
        told = report.layers(caches)
        assert told.fused_calls > len(LAYERS) * STEPS and told.fallback_calls == 0
        assert all(c.body.length > 30 for c in caches)


def test_a_tier_has_its_forms(tier):
    name, model = tier
    for layer in model.model.layers:
        experts = layer.block_sparse_moe.switch_mlp
        for kind in (experts.gate_proj, experts.up_proj):
            assert (kind.mode, kind.bits) == FORMS[name]
        assert (experts.down_proj.mode, experts.down_proj.bits) == ("affine", 4)
        for linear in (*(layer.self_attn[f"{kind}_proj"] for kind in "qkvo"), layer.block_sparse_moe.gate):
            assert (linear.mode, linear.bits) == ("q8", 8)


def test_a_tier_is_near_transformers(tier, truth, truth_tokens):
    name, model = tier
    found = mlx_side.trace(model, truth_tokens)
    cosines = Cosines.of(model, found, truth)
    print(
        f"{name}: cosines by layer", *cosines.lines(), f"  logits    {cosine(found.logits, truth.logits):.6f}", sep="\n"
    )
    assert cosines.below(TIERS[name]) == []


def test_a_tiers_router_chooses_as_transformers_does_with_its_weights(tier, oracle, truth):
    name, model = tier
    moved = 0
    for i in LAYERS:
        hidden = truth.layers[i].experts[0]
        theirs, margin = oracle.route(i, hidden, mlx_side.router(model, i))
        ours = mlx_side.route(model, i, hidden)
        assert changes(ours, theirs) == changes(theirs, ours) == 0, f"layer {i}, least margin {margin.min():.1e}"
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
        moved += changes(ours, oracle.route(i, hidden)[0])
    choices = len(LAYERS) * len(hidden) * CONFIG["num_experts_per_tok"]
    print(f"{name}: {moved} of {choices} choices are not the unquantized router's")
    assert 0 < moved < choices / 50


def test_fewer_bits_miss_the_bars(quantized, truth, truth_tokens):
    model = quantized("mq2")
    cosines = Cosines.of(model, mlx_side.trace(model, truth_tokens), truth)
    for bars in TIERS.values():
        missed = cosines.below(bars)
        assert any("hidden" in m for m in missed) and sum("experts" in m for m in missed) == len(LAYERS)
        assert not any("attention" in m for m in missed)


def test_attention_in_four_bits_misses_its_bar(checkpoint, truth):
    model = mlx_side.load(checkpoint)
    for i in LAYERS:
        nn.quantize(model.model.layers[i].self_attn, 64, 4)
        out = mlx_side.attention(model, i, truth.layers[i].attention[0])
        assert cosine(out, truth.layers[i].attention[1]) < TIERS["mq4"].attention


@pytest.mark.parametrize("step", [8, 3])
def test_fused_experts_are_as_near(tier, oracle, step):
    name, model = tier
    tokens = prompt(FEW, seed=2)
    truth, stock = oracle.trace(tokens), mlx_side.trace(model, tokens)
    experts = attach_experts(model, "fused")
    try:
        found = mlx_side.trace(model, tokens, mlx_side.caches(model), step)
    finally:
        detach_experts(model)
    assert len(experts.fused) == len(LAYERS)
    calls = -(-FEW // step)
    for layer in experts.fused:
        assert layer.counts == Counts(fused=calls, summed=calls, routed=calls, stock=0)
    for a, b, plain in zip(found.layers, truth.layers, stock.layers, strict=True):
        assert cosine(a.left, b.left) >= TIERS[name].hidden
        assert largest_error(a.left, plain.left) < SAME and largest_error(a.experts[1], plain.experts[1]) < SAME


@needs_kernels
def test_a_layers_experts_through_the_kernels_are_as_near(tier, truth, monkeypatch):
    name, model = tier
    hidden, theirs = (x[:FEWEST] for x in truth.layers[0].experts)
    plain = mlx_side.experts(model, 0, hidden)
    attach_experts(model, "fused")
    try:
        with running() as simulator:
            monkeypatch.setenv("MLX_ROTOR_BACKEND", "metal")
            found = mlx_side.experts(model, 0, hidden)
    finally:
        detach_experts(model)
    assert simulator.objections == []
    if SUPPORTED:
        kernels = [kernel.removeprefix("mlx_rotor_").rpartition("_")[0] for kernel, _ in simulator.reports]
        print(f"{name}: {', '.join(kernels)}")
        assert kernels[-3:] == ["route", "gate_up", "down"]
    assert largest_error(found, plain) < SAME and cosine(found, theirs) >= TIERS[name].experts
