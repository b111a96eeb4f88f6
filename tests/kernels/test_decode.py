"""Decode attention against its reference, in the simulator: every codec pair of a named scheme, every shape."""

import mlx.core as mx
import numpy as np
import pytest

from grids import grid, thinned
from kernel_cases import (
    DIMS,
    MIXED,
    PAIRS,
    SCHEDULES,
    TOLERANCE,
    attend_segments,
    distance,
    needs_kernels,
    needs_simulator,
    problem,
    running,
)  # fmt: skip
from metal_sim import SUPPORTED
from mlx_rotor import RotorError, kernels
from mlx_rotor.kernels import AttentionArgs, reference


def off(q, segments, **how) -> float:
    """How far the kernels are from the reference, which computes in float32 from the same inputs."""
    how = {"scale": q.shape[-1] ** -0.5, "mask": "causal", **how}
    got = attend_segments(q, segments, **how)
    assert got.dtype == q.dtype
    if how.get("lengths") is None:
        segments = [segment for segment in segments if segment]
    with mx.stream(mx.cpu):
        want = reference.attend(q.astype(mx.float32), segments, AttentionArgs(**how))
    return distance(got, want)


def agree(q, segments, options=None, **how) -> None:
    with running(options) as simulator:
        assert off(q, segments, **how) <= TOLERANCE[q.dtype]
    assert simulator.objections == []


@needs_kernels
@pytest.mark.parametrize("pair", [*thinned(PAIRS, 9), *MIXED], ids="-".join)
def test_every_pair_of_codecs(pair):
    agree(*problem(pair, 128, 127))


@needs_kernels
@grid(1, pair=[("turbo4", "turbo3"), ("trellis3", "trellis2"), ("trellis4", "rotor3")], dim=DIMS)
def test_every_head_dimension(pair, dim):
    agree(*problem(pair, dim, 70))


@needs_kernels
@pytest.mark.parametrize("length", thinned([0, 1, 31, 32, 33, 127, 1000, 4096], [0, 1, 31, 32, 33]))
def test_lengths(length):
    agree(*problem(length=length))
    agree(*problem(length=length, first=0, recent=1))
    if length:
        agree(*problem(length=length, first=0, recent=0))


@needs_kernels
@pytest.mark.parametrize(
    ("group", "queries"),
    thinned([(1, 1), (1, 2), (1, 8), (3, 1), (3, 2), (4, 1), (4, 2), (6, 1), (7, 1), (8, 1)], 2, spread=True),
)
def test_query_heads_and_rows(group, queries):
    agree(*problem(group=group, queries=queries))


@needs_kernels
@grid(1, dim=[80, 128, 256], dtype=[mx.float16, mx.bfloat16])
def test_half_precision(dim, dtype):
    agree(*problem(("trellis4", "turbo2"), dim, 130, dtype=dtype, recent=140))


@needs_kernels
def test_values_of_another_dimension():
    agree(*problem(("turbo4", "turbo3"), 192, 100, v_dim=128))
    agree(*problem(("turbo2", "trellis3"), 64, 100, v_dim=96))


@needs_kernels
def test_masks():
    q, segments = problem(batch=2, queries=2, group=2, length=75)
    slots = sum(segment.length for segment in segments)
    rng = np.random.default_rng(3)
    agree(q, segments, mask=None)
    for shape in [(slots,), (2, slots), (2, 1, 2, slots), (1, 4, 1, slots)]:
        agree(q, segments, mask=mx.array(rng.random(shape) < 0.6))
        agree(q, segments, mask=mx.array(rng.standard_normal(shape).astype(np.float32)))
    agree(
        q.astype(mx.float32),
        segments,
        mask=mx.array(np.where(rng.random((2, slots)) < 0.5, 0, -np.inf)).astype(mx.float16),
    )
    nothing = mx.zeros((2, slots), mx.bool_)
    with running():
        assert not np.array(attend_segments(q, segments, scale=1.0, mask=nothing)).any()


@needs_kernels
def test_sink_logits():
    q, segments = problem(group=3)
    for logits in (mx.array([0.5, -2.0, 30.0, 0.0, 1.0, -30.0]), mx.zeros((6,), mx.bfloat16)):
        agree(q, segments, sink_logits=logits)
    agree(*problem(group=4, length=50), sink_logits=mx.arange(8).astype(mx.float16))


@needs_kernels
@pytest.mark.parametrize("window", thinned([1, 5, 40, 100, 139, 1000], 2))
def test_windows(window):
    agree(*problem(queries=2, length=200, group=2), window=window)
    agree(*problem(queries=1, length=200, first=0, recent=20), window=window)


@needs_kernels
def test_ragged_batches():
    q, segments = problem(batch=3, queries=2, group=2, length=100)
    lengths = mx.array([[4, 100, 37], [4, 33, 5], [2, 0, 0]])
    agree(q, segments, lengths=lengths)
    agree(q, segments, lengths=lengths, window=30)
    agree(q, segments, lengths=lengths, mask=None, sink_logits=mx.zeros((4,)))


@needs_kernels
def test_inputs_of_under_eight_elements():
    """MLX passes them in constant memory: lengths of one batch row, a mask over few slots, logits of few heads."""
    q, segments = problem(kv_heads=1, group=1, length=3, first=0, recent=2, room=0)
    agree(q, segments, mask=mx.array([True, False, True, True, True]), sink_logits=mx.array([0.1]))
    agree(q, segments, mask=mx.array([0.0, 1.0, 0.5, -1.0, 2.0]))


@needs_simulator
@grid(1, pair=[("turbo4", "turbo2"), ("trellis3", "trellis2"), ("iso3", "rotor3")], options=SCHEDULES)
def test_no_schedule_matters(pair, options):
    agree(*problem(pair, 80, 600, queries=2, group=3, recent=70), options=options)


@needs_kernels
def test_what_no_kernel_takes_is_named():
    q, segments = problem()
    with pytest.raises(RotorError, match="int32"):
        attend_segments(q.astype(mx.int32), segments, scale=1.0)
    with pytest.raises(RotorError, match="float16"):
        attend_segments(q.astype(mx.float16), segments, scale=1.0)
    with pytest.raises(RotorError, match="96"):
        attend_segments(mx.zeros((1, 6, 1, 96)), segments, scale=1.0)
    with pytest.raises(RotorError, match="exact tokens alone"):
        attend_segments(q, [segments[0], segments[2]], scale=1.0)


@needs_kernels
def test_the_packages_attend_uses_it(monkeypatch):
    monkeypatch.setenv("MLX_ROTOR_BACKEND", "metal")
    q, segments = problem()
    with running() as simulator:
        got = kernels.attend(q, segments, AttentionArgs(scale=0.1, mask="causal"))
        assert len(simulator.reports) == (2 if SUPPORTED else 0)
    assert (
        distance(got, reference.attend(q, segments, AttentionArgs(scale=0.1, mask="causal"))) <= TOLERANCE[mx.float32]
    )
