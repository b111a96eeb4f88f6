"""Measured sensitivities against the divergence of mlx_lm's own model with one weight exchanged."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_rotor.errors import RotorError
from mlx_rotor.host.skeleton import skeleton
from mlx_rotor.quant import policy
from mlx_rotor.quant.budget import sensitivity
from mlx_rotor.quant.calibrate import kept
from mlx_rotor.quant.calibrate.measure import _ratios, measurable, measure, specs
from mlx_rotor.quant.plan import make_plan, read_config
from mlx_rotor.quant.policy import Spec
from mlx_rotor.quant.source import Checkpoint

TOKENS = (np.arange(3 * 20).reshape(3, 20) * 7919 % 191).astype(np.int32)
REFERENCE = Spec(3, 64)


def opened(checkpoint, **changes):
    """A checkpoint whose weights are large enough for each to matter."""

    def enlarge(tensors):
        for name, (_, values) in tensors.items():
            if name.endswith("_scale_inv"):
                values *= 8
            elif "norm" in name:
                values[:] = 0x4000 if "q_norm" in name or "k_norm" in name else 0x3F80  # 2 and 1 as raw bf16

    folder, _ = checkpoint(alter=enlarge, **changes)
    config = read_config(folder)
    found = Checkpoint.open(folder, config)
    return config, found, make_plan(config, policy.load("uniform-4bit"), found.dtypes)


def divergences(config, weights, plan, modules):
    """Module -> mean KL divergence with that module at the reference spec, by plain mx.quantize of all its weights."""
    model, source = skeleton(config), {}
    for entry in plan.entries:
        parts = [weights.read(entry, p) for p in range(entry.parts)]
        source[entry.name] = (mx.stack(parts) if entry.parts > 1 else parts[0]).reshape(entry.shape)
    assert source.keys() == {name for name, _ in tree_flatten(model.parameters())}

    def predictions():
        logits = np.array(model(mx.array(TOKENS)), np.float64)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    model.load_weights(list(source.items()))
    base, found = predictions(), {}
    for entry in plan.entries:
        if entry.module in modules:
            packed = mx.quantize(source[entry.name].astype(mx.bfloat16), 64, 3)
            stored = mx.dequantize(*(a if a.dtype == mx.uint32 else a.astype(mx.float32) for a in packed), 64, 3)
            model.load_weights([(entry.name, stored)], strict=False)
            found[entry.module] = float((np.exp(base) * (base - predictions())).sum(-1).mean())
            model.load_weights([(entry.name, source[entry.name])], strict=False)
    return found


@pytest.mark.parametrize("tied", [False, True])
def test_a_weights_cost_is_the_divergence_it_alone_causes(checkpoint, tmp_path, tied):
    config, weights, plan = opened(checkpoint, tie_word_embeddings=tied)
    found = measure(config, weights, plan, TOKENS, tmp_path / "job", fit="fast", chunk=40)
    assert set(found.costs) == {entry.module for entry in measurable(plan)}
    assert ("lm_head" in found.costs) is not tied
    direct = divergences(config, weights, plan, set(found.costs))
    for module, cost in direct.items():
        assert cost > 1e-7
        assert found.costs[module][REFERENCE] == pytest.approx(cost, rel=0.02), module


@pytest.mark.nightly
def test_better_specs_and_fits_cost_less(checkpoint, tmp_path):
    config, weights, plan = opened(checkpoint)
    fast, searched = (
        measure(config, weights, plan, TOKENS, tmp_path / fit, source="words", fit=fit) for fit in ("fast", "search")
    )
    for entry in measurable(plan):
        costs = fast.costs[entry.module]
        assert list(costs) == specs(entry)
        assert costs[Spec(2, 64)] > costs[REFERENCE] > costs[Spec(4, 64)] > costs[Spec(6, 32)] > 0
        assert costs[Spec(2, 32)] < costs[Spec(2, 64)]
        assert searched.costs[entry.module][Spec(2, 64)] < costs[Spec(2, 64)]
    assert (searched.source, searched.fit) == ("words", "search")
    path = tmp_path / "costs.json"
    searched.write(path)
    assert sensitivity.read(path, plan).digest == searched.digest


def test_a_weight_of_zeros_costs_nothing(checkpoint, tmp_path):
    _, weights, plan = opened(checkpoint, num_hidden_layers=1)
    entry = next(e for e in plan.entries if e.role == "attn.o")
    statistics = type("Ones", (), {"importance": lambda *_: mx.ones(entry.shape[-1])})()
    zeros = type("Zeros", (), {"read": lambda self, e, *_: mx.zeros(e.source_shape)})()
    assert set(_ratios(entry, zeros, statistics, "search").values()) == {0.0}
    assert min(_ratios(entry, weights, statistics, "search").values()) > 0


class Stopped(Exception):
    pass


def test_a_measurement_that_was_killed_goes_on_with_the_same_numbers(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "SECONDS", 0.0)
    config, weights, plan = opened(checkpoint)
    folder, ran = tmp_path / "cut", []

    def run(folder, tokens=TOKENS, stop="", **more):
        ran.clear()

        def progress(what, done, total):
            ran.append(what)
            if what == stop and done == 2:
                raise Stopped

        return measure(config, weights, plan, tokens, folder, fit="fast", chunk=40, progress=progress, **more)

    whole = run(tmp_path / "whole")
    with pytest.raises(Stopped):
        run(folder, stop="layer 1")
    assert run(folder).digest == whole.digest and ran[0] == "layer 1"
    # What another measurement left is of no use, and doesn't get in the way.
    assert run(folder, identity="another model").digest == whole.digest and ran[0] == "layer 0"
    (path,) = folder.glob("copies-*")
    assert path.name == "copies-0002.npy"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(RotorError, match=r"copies-0002.npy: not readable .*delete .*cut, and measuring starts again"):
        run(folder, identity="another model")


def test_unquantizable_weights_are_not_measured(checkpoint):
    _, _, plan = opened(checkpoint)
    roles = {entry.role for entry in measurable(plan)}
    assert not roles & {"norm", "router", "router.bias"} and {"embed", "head", "attn.q", "expert.down"} <= roles
