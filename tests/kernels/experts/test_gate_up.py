"""Both projections into experts and the activation, against the reference; experts not chosen have no numbers."""

import mlx.core as mx
import numpy as np
import pytest

from expert_cases import SOME, agree, gate_up_off, normal, weights
from grids import grid
from kernel_cases import SCHEDULES, needs_kernels, needs_simulator, running
from mlx_rotor.errors import RotorError
from mlx_rotor.kernels.experts import gate_up
from mlx_rotor.kernels.experts.few_rows import gate_up_metal

INDICES = mx.array([[5, 1, 3], [1, 5, 0]], mx.uint32)  # of 7 experts; two that both tokens chose


def stacks(gate, up, rows, columns, **how):
    return weights(gate, (7, rows), columns, seed=1, **how), weights(up, (7, rows), columns, seed=2, **how)


@needs_kernels
@grid(1, activation=["swiglu", "geglu", "gpt_oss"], bias=[False, True])
def test_activations(activation, bias):
    gate, up = stacks(("affine", 2, 64), ("affine", 3, 32), 33, 128, bias=bias)
    agree(gate_up_off, normal(2, 128), gate, up, INDICES, activation)


@needs_kernels
@pytest.mark.parametrize("activation", ["swiglu", "geglu", "gpt_oss"])
def test_activations_far_out(activation):
    """No infinity and no other number than the reference's where an exponential would overflow."""
    gate, up = stacks(("affine", 4, 32), ("affine", 4, 32), 9, 64)
    agree(gate_up_off, 300 * normal(2, 64), gate, up, INDICES, activation)


@needs_kernels
@pytest.mark.parametrize("gate", SOME, ids=str)
def test_formats_side_by_side(gate):
    up = SOME[(SOME.index(gate) + 1) % len(SOME)]
    agree(gate_up_off, normal(2, 512), *stacks(gate, up, 9, 512), INDICES)


@needs_kernels
@grid(1, rows=[1, 33], columns=[64, 96, 160, 2880])
def test_shapes(rows, columns):
    agree(gate_up_off, normal(1, columns), *stacks(("affine", 3, 32), ("affine", 4, 32), rows, columns), INDICES[:1])


@needs_kernels
@pytest.mark.parametrize(("tokens", "slots"), [(1, 1), (8, 2), (3, 7)])
def test_tokens_and_experts_each(tokens, slots):
    rng = np.random.default_rng(slots)
    indices = mx.array(np.stack([rng.permutation(7)[:slots] for _ in range(tokens)]).astype(np.uint32))
    agree(gate_up_off, normal(tokens, 64), *stacks(("affine", 2, 32), ("affine", 2, 32), 20, 64), indices)
    agree(gate_up_off, normal(tokens, 64), *stacks(("q8", 8, 32), ("q8", 8, 32), 2, 64), indices.astype(mx.int32))


@needs_kernels
@grid(1, beside=[mx.float16, mx.bfloat16, mx.float32], dtype=[mx.float16, mx.bfloat16])
def test_dtypes(beside, dtype):
    gate, up = stacks(("affine", 2, 64), ("lloyd", 2, 64), 33, 128, dtype=beside, bias=True)
    agree(gate_up_off, normal(2, 128, dtype=dtype), gate, up, INDICES)


@needs_simulator
@pytest.mark.parametrize("options", SCHEDULES, ids=lambda o: o.order)
def test_no_schedule_matters(options):
    gate, up = stacks(("affine", 3, 64), ("lloyd", 3, 256), 33, 512, bias=True)
    agree(gate_up_off, normal(2, 512), gate, up, INDICES, options=options)


@needs_simulator
def test_results_do_not_depend_on_the_order():
    gate, up = stacks(("affine", 3, 64), ("lloyd", 3, 256), 33, 512)
    got = []
    for options in SCHEDULES[::2]:
        with running(options):
            got.append(np.array(gate_up(normal(2, 512), gate, up, INDICES, "swiglu")))
    assert np.array_equal(*got)


def test_what_it_does_not_take():
    gate, up = stacks(("affine", 4, 32), ("affine", 4, 32), 8, 64)
    x = normal(2, 64)
    with pytest.raises(RotorError, match="relu"):
        gate_up_metal(x, gate, up, INDICES, "relu")
    with pytest.raises(RotorError, match="do not fit"):
        gate_up_metal(x, gate, weights(("affine", 4, 32), (7, 9), 64), INDICES, "swiglu")
    with pytest.raises(RotorError, match="do not fit"):
        gate_up_metal(x[:1], gate, up, INDICES, "swiglu")
    with pytest.raises(RotorError, match="zeros"):
        gate_up_metal(x, gate, weights(("affine", 4, 32), (7, 8), 64, bias=True), INDICES, "swiglu")
    with pytest.raises(RotorError, match="columns"):
        gate_up_metal(normal(2, 32), gate, up, INDICES, "swiglu")
