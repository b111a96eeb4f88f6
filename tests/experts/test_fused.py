"""Fused experts as arrays: the weighted sum that a model's own code asks for, and any other use of what they give."""

import mlx.core as mx
import pytest

from mlx_rotor.experts import formats
from mlx_rotor.experts import fused as fused_module
from mlx_rotor.experts.fused import Counts, ExpertOutput, FusedExperts, run
from mlx_rotor.kernels.experts import reference
from mlx_rotor.kernels.spec import PackedWeight

EXPERTS, HIDDEN, INNER, CHOSEN = 6, 64, 96, 3


def packed(rows, columns, bits, seed, bias=False):
    weight = mx.random.normal((EXPERTS, rows, columns), key=mx.random.key(seed)) * columns**-0.5
    parts = mx.quantize(weight, 32, bits)
    extra = mx.random.normal((EXPERTS, rows), key=mx.random.key(seed + 9)) if bias else None
    return PackedWeight(formats.get("affine", bits, 32), tuple(parts), columns, extra)


@pytest.fixture
def layer():
    gate, up = packed(INNER, HIDDEN, 2, 1, bias=True), packed(INNER, HIDDEN, 4, 2, bias=True)
    return FusedExperts(gate, up, packed(HIDDEN, INNER, 3, 3, bias=True), "swiglu")


def inputs(*lead, dtype=mx.float32):
    x = mx.random.normal((*lead, HIDDEN), key=mx.random.key(4)).astype(dtype)
    indices = mx.random.randint(0, EXPERTS, (*lead, CHOSEN), key=mx.random.key(5)).astype(mx.uint32)
    weights = mx.random.uniform(shape=(*lead, CHOSEN), key=mx.random.key(6)).astype(dtype)
    return x, indices, weights


def plainly(layer, x, indices):
    """What each expert makes of its rows, one matrix product at a time, float32."""
    out = []
    for row, chosen in zip(x.astype(mx.float32).reshape(-1, HIDDEN), indices.reshape(-1, CHOSEN).tolist(), strict=True):
        for e in chosen:
            gate, up = (w.decoded()[e] @ row + w.bias[e] for w in (layer.gate, layer.up))
            h = gate * mx.sigmoid(gate) * up
            out.append(layer.down.decoded()[e] @ h + layer.down.bias[e])
    return mx.stack(out).reshape(*indices.shape, HIDDEN)


def close(got, want, off=2e-5):
    assert got.shape == want.shape
    return mx.abs(got - want).max().item() <= off * max(1.0, mx.abs(want).max().item())


@pytest.fixture
def no_unweighted(monkeypatch):
    """What the experts give without weights is NaN: whoever reads it instead of the fused sum is found out."""
    real = reference.down

    def down(h, w, indices, weights=None):
        out = real(h, w, indices, weights)
        return out if weights is not None else mx.full(out.shape, mx.nan, out.dtype)

    monkeypatch.setattr(fused_module.kernels, "down", down)


SUMS = {
    "most models": lambda y, w: (y * w[..., None]).sum(axis=-2),
    "cast back": lambda y, w: (y * w[..., None]).sum(axis=-2).astype(y.dtype),
    "weights first": lambda y, w: (w[..., None] * y).sum(-2),
    "expanded": lambda y, w: (y * mx.expand_dims(w, -1)).sum(axis=-2),
    "float32 weights": lambda y, w: (y * w[..., None].astype(mx.float32)).sum(axis=-2).astype(y.dtype),
    "counted from the front": lambda y, w: (y * w[..., None]).sum(axis=y.ndim - 2),
}


@pytest.mark.parametrize("lead", [(1,), (5,), (2, 3), (1, 1)])
@pytest.mark.parametrize("how", SUMS)
def test_a_models_sum_is_the_second_launch(layer, no_unweighted, lead, how):
    x, indices, weights = inputs(*lead)
    counts = Counts()
    y = run(layer, x, indices, counts)
    assert type(y) is ExpertOutput and y.shape == (*lead, CHOSEN, HIDDEN) and y.dtype == x.dtype
    want = (plainly(layer, x, indices) * weights[..., None]).sum(axis=-2)
    assert close(SUMS[how](y, weights), want)
    assert (counts.fused, counts.summed) == (1, 1)
    assert close(layer.weighted(*(a.reshape(-1, a.shape[-1]) for a in (x, indices, weights))).reshape(want.shape), want)


@pytest.mark.parametrize("lead", [(11,), (2, 7), (1, 1)])
def test_many_tokens_are_sorted_once_and_come_back_in_their_order(layer, lead):
    x, indices, _ = inputs(*lead)
    got = layer.many(x, indices, lambda up, gate: gate * mx.sigmoid(gate) * up)
    assert close(got, plainly(layer, x, indices)) and not layer.tiled


OTHERS = {
    "the array": lambda y, w: y,
    "another sum": lambda y, w: (y * w[..., None]).sum(axis=-1),
    "kept dimension": lambda y, w: (y * w[..., None]).sum(axis=-2, keepdims=True),
    "two axes": lambda y, w: (y * w[..., None]).sum(axis=(-2, -1)),
    "everything": lambda y, w: (y * w[..., None]).sum(),
    "a number": lambda y, w: (y * 2.0).sum(axis=-2),
    "full weights": lambda y, w: (y * mx.broadcast_to(w[..., None], y.shape)).sum(axis=-2),
    "one for all": lambda y, w: (y * w[:1, :1, None]).sum(axis=-2),
    "mx.sum": lambda y, w: mx.sum(y * w[..., None], axis=-2),
    "einsum": lambda y, w: mx.einsum("tkd,tk->td", y, w),
    "after a product": lambda y, w: (y * w[..., None] * 2).sum(axis=-2),
    "a slice": lambda y, w: (y[..., :8] * w[..., None]).sum(axis=-2),
}


@pytest.mark.parametrize("how", OTHERS)
def test_any_other_use_is_an_array_operation(layer, how):
    x, indices, weights = inputs(4)
    counts = Counts()
    got = OTHERS[how](run(layer, x, indices, counts), weights)
    assert close(got, OTHERS[how](plainly(layer, x, indices), weights))
    assert (counts.fused, counts.summed) == (1, 0)


@pytest.mark.parametrize("weights_in", [mx.bfloat16, mx.float32])
def test_dtypes_are_those_of_the_expression(layer, weights_in):
    """bfloat16 activations: weights in float32 make it float32, and a model's cast back leaves the sum as it was."""
    x, indices, weights = inputs(3, dtype=mx.bfloat16)
    weights = weights.astype(weights_in)
    y = run(layer, x, indices, Counts())
    plain = mx.zeros(y.shape, y.dtype)
    total, want = (SUMS["most models"](a, weights) for a in (y, plain))
    assert total.dtype == want.dtype == weights_in
    assert total.astype(mx.bfloat16).dtype == mx.bfloat16 and total.astype(mx.float16).dtype == mx.float16
    exact = (plainly(layer, x, indices) * weights.astype(mx.float32)[..., None]).sum(axis=-2)
    assert close(total.astype(mx.bfloat16).astype(mx.float32), exact, 1e-2)
    assert close(total.astype(mx.float32), exact, 1e-2)


def test_one_output_summed_twice(layer):
    """With other weights each time, and read as it is in between."""
    x, indices, weights = inputs(2)
    y, want = run(layer, x, indices, Counts()), plainly(layer, x, indices)
    first = (y * weights[..., None]).sum(axis=-2)
    assert close(y + 0, want)
    assert close((y * -weights[..., None]).sum(axis=-2), -first)
