"""The projections out of experts and their sum, against the reference; experts not chosen have no numbers."""

import mlx.core as mx
import numpy as np
import pytest

from expert_cases import SOME, agree, down_off, normal, weights
from grids import grid
from kernel_cases import SCHEDULES, TOLERANCE, distance, needs_kernels, needs_simulator, running
from mlx_rotor.errors import RotorError
from mlx_rotor.kernels.experts import down, gather, reference
from mlx_rotor.kernels.experts.few_rows import down_metal

INDICES = mx.array([[5, 1, 3], [1, 5, 0]], mx.uint32)  # of 7 experts; two that both tokens chose


def shares(tokens, slots, dtype=mx.float32):
    return mx.array(np.random.default_rng(slots).random((tokens, slots)).astype(np.float32)).astype(dtype)


@needs_kernels
@grid(1, name=SOME, bias=[False, True], weighted=[False, True])
def test_formats(name, bias, weighted):
    w = weights(name, (7, 33), 256, bias=bias)
    agree(down_off, normal(2, 3, 256), w, INDICES, shares(2, 3) if weighted else None)


@needs_kernels
@grid(1, rows=[1, 70], columns=[64, 96, 160, 1536])
def test_shapes(rows, columns):
    w = weights(("affine", 3, 32), (7, rows), columns)
    agree(down_off, normal(1, 3, columns), w, INDICES[:1], shares(1, 3))


@needs_kernels
@pytest.mark.parametrize(("tokens", "slots"), [(1, 1), (8, 2), (3, 7)])
def test_tokens_and_experts_each(tokens, slots):
    rng = np.random.default_rng(slots)
    indices = mx.array(np.stack([rng.permutation(7)[:slots] for _ in range(tokens)]).astype(np.uint32))
    w = weights(("affine", 2, 32), (7, 20), 64, bias=True)
    agree(down_off, normal(tokens, slots, 64), w, indices, shares(tokens, slots))
    agree(down_off, normal(tokens, slots, 64), w, indices.astype(mx.int32))


@needs_kernels
@grid(1, share=[mx.float16, mx.bfloat16, mx.float32], dtype=[mx.float16, mx.bfloat16])
def test_dtypes(share, dtype):
    w = weights(("affine", 3, 64), (7, 33), 128, dtype=mx.bfloat16, bias=True)
    agree(down_off, normal(2, 3, 128, dtype=dtype), w, INDICES, shares(2, 3, share))


@needs_kernels
def test_rows_each_with_its_expert():
    x, w, indices = normal(5, 128), weights(("iq4_nl", 4, 32), (7, 33), 128, bias=True), mx.array([0, 0, 3, 6, 6])
    with running() as simulator:
        got = gather(x, w, indices)
        assert distance(got, reference.gather(x, w, indices)) <= TOLERANCE[mx.float32]
    assert simulator.objections == []


@needs_simulator
@grid(1, name=[("affine", 3, 64), ("lloyd", 3, 256)], options=SCHEDULES)
def test_no_schedule_matters(name, options):
    w = weights(name, (7, 33), 512, bias=True)
    agree(down_off, normal(2, 3, 512), w, INDICES, shares(2, 3), options=options)


@needs_simulator
def test_results_do_not_depend_on_the_order():
    h, w = normal(2, 3, 512), weights(("lloyd", 3, 256), (7, 33), 512)
    got = []
    for options in SCHEDULES[::2]:
        with running(options):
            got.append(np.array(down(h, w, INDICES, shares(2, 3))))
    assert np.array_equal(*got)


def test_what_it_does_not_take():
    h, w = normal(2, 3, 64), weights(("affine", 4, 32), (7, 8), 64)
    with pytest.raises(RotorError, match="does not fit indices"):
        down_metal(h[:, :2], w, INDICES)
    with pytest.raises(RotorError, match="and weights"):
        down_metal(h, w, INDICES, shares(2, 2))
    with pytest.raises(RotorError, match="int32"):
        down_metal(h.astype(mx.int32), w, INDICES)
