"""The rotate kernel in the simulator against the codecs' own rotations, there and back, in every order and layout."""

import mlx.core as mx
import numpy as np
import pytest

from grids import grid, thinned
from kernel_cases import (
    SCHEDULES,
    TOLERANCE,
    barriers,
    distance,
    mutated,
    needs_kernels,
    needs_simulator,
    objections,
    running,
    vectors,
)
from mlx_rotor import codec
from mlx_rotor.kernels.prefill import rotate_metal


def order_of(name, dim):
    """Where a quantizer's levels come in: position of every element, from the layout that codec/fields.h describes."""
    fields = {2: 16, 3: 16, 4: 8, 8: 4}[codec.get(name, dim).index_bits]
    units = dim // fields
    e = np.arange(dim)
    f = e // units
    return (e % units) * fields + 2 * (f % (fields // 2)) + f // (fields // 2)


def off(name, x, *, inverse=False, ordered=False, factor=1.0, dtype=mx.float32):
    made = codec.get(name, x.shape[-1])
    got = rotate_metal(
        made.kernel, x, inverse=inverse, order=made.kernel.quantizer if ordered else None, factor=factor, dtype=dtype
    )
    assert got.dtype == dtype
    want = np.array((made.unrotate if inverse else made.rotate)(x.astype(mx.float32))) * factor
    if ordered:
        placed = np.empty_like(want)
        placed[..., order_of(name, x.shape[-1])] = want
        want = placed
    return distance(got, mx.array(want))


def agree(*args, options=None, **how):
    with running(options) as simulator:
        assert off(*args, **how) <= TOLERANCE[how.get("dtype", mx.float32)]
    assert simulator.objections == []
    return [report for _, report in simulator.reports]


@needs_kernels
@grid(
    1,
    case=[
        ("turbo4", 64),
        ("trellis3", 80),
        ("turbo2", 112),
        ("turbo3", 128),
        ("trellis4", 192),
        ("turbo2", 256),
        ("planar2", 96),
        ("iso4", 128),
        ("isofull3", 80),
        ("fp8:0.25", 64),
        ("rotor3", 80),
    ],
    inverse=[False, True],
)
def test_every_rotation_in_every_order(case, inverse):
    name, dim = case
    agree(name, vectors(19, dim), inverse=inverse, ordered=not inverse, factor=0.3)


@needs_kernels
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision(dtype):
    agree("turbo4", vectors(19, 128, dtype=dtype))
    agree("turbo4", vectors(19, 128, dtype=dtype), dtype=dtype)


@needs_kernels
@pytest.mark.parametrize("n", thinned([1, 15, 16, 17, 40], 2))
def test_lengths_batches_and_layouts(n):
    agree("turbo3", vectors(n, 80, batch=2, heads=3))
    agree("turbo3", mx.contiguous(vectors(n, 80)))
    agree("turbo3", vectors(n + 7, 80)[:, 1:, 3 : 3 + n])
    agree("turbo3", vectors(n, 160)[..., ::2])


@needs_kernels
def test_nothing_to_rotate():
    made = codec.get("turbo4", 64)
    assert rotate_metal(made.kernel, mx.zeros((1, 2, 0, 64))).shape == (1, 2, 0, 64)


@needs_simulator
@grid(1, case=[("trellis3", 80), ("rotor2", 96), ("isofull2", 64)], options=SCHEDULES)
def test_no_schedule_matters(case, options):
    agree(case[0], vectors(37, case[1]), ordered=True, options=options)


@needs_simulator
def test_traffic():
    """Vectors are read and written once, in whole lines."""
    x = mx.contiguous(vectors(48, 128, heads=3))
    (report,) = agree("turbo4", x, ordered=True)
    assert (report.buffers["x"].loaded, report.buffers["out"].stored) == (x.nbytes, x.nbytes)
    assert report.line_use(["x", "out"]) == 1.0


def rotating():
    return off("turbo3", vectors(37, 80)[:, :, :19], ordered=True, factor=0.5)


@needs_simulator
def test_nothing_is_wrong_without_a_mistake():
    assert objections(rotating) == []


@needs_simulator
@pytest.mark.parametrize(("path", "call", "at"), barriers("attention/rotate.h"), ids=lambda x: str(x)[:24])
def test_a_missing_barrier_is_seen(path, call, at, monkeypatch, tmp_path):
    with mutated(monkeypatch, tmp_path, path, call, "", at):
        assert objections(rotating)


@needs_simulator
@pytest.mark.parametrize(
    ("old", "new", "at"),
    [
        ("first + own < count ?", "first + own <= count ?", 0),
        ("own < (slot & ~3u) + 4;", "own <= (slot & ~3u) + 4;", 0),
        ("own < (slot & ~3u) + 4;", "own + 1 < (slot & ~3u) + 4;", 0),
        ("e < DIM", "e + 1 < DIM", 0),
        ("e < DIM", "e <= DIM + 8", 0),
        ("e < DIM", "e + 1 < DIM", 1),
        ("e < DIM", "e <= DIM", 1),
        ("&& first + own < count", "", 0),
        ("&& first + own < count", "&& first + own + 1 < count", 0),
        ("strides[1]", "strides[2]", 0),
        ("* factor", "", 0),
        ("i < DIM / 8", "i + 1 < DIM / 8", 0),
    ],
)
def test_a_loose_bound_or_a_wrong_operation_is_seen(old, new, at, monkeypatch, tmp_path):
    with mutated(monkeypatch, tmp_path, "attention/rotate.h", old, new, at):
        assert objections(rotating)
