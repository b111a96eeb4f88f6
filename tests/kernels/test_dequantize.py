"""The dequantize kernel in the simulator against its reference: every codec, any range of tokens."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from grids import grid, thinned
from kernel_cases import (
    DIMS,
    NAMES,
    SCHEDULES,
    TOLERANCE,
    barriers,
    distance,
    mutated,
    needs_kernels,
    needs_simulator,
    objections,
    packed_side,
    running,
)
from metal_sim import SUPPORTED
from mlx_rotor import RotorError, codec, kernels
from mlx_rotor.kernels import reference
from mlx_rotor.kernels.packed import to_tiles
from mlx_rotor.kernels.packing import dequantize_metal

HEAD_DIMS = sorted({*DIMS, 112})


def side_of(name, dim, length=70, *, batch=1, heads=2):
    return packed_side(np.random.default_rng([dim, length]), name, dim, batch, heads, length, 1)


def off(side, start, stop, dtype=mx.float32):
    got = dequantize_metal(side, start, stop, dtype)
    assert got.dtype == dtype
    return distance(got, reference.dequantize(side, start, stop, mx.float32))


def agree(side, start, stop, dtype=mx.float32, options=None):
    with running(options) as simulator:
        assert off(side, start, stop, dtype) <= TOLERANCE[dtype]
    assert simulator.objections == []
    return [report for _, report in simulator.reports]


@needs_kernels
@grid(1, name=NAMES, dim=HEAD_DIMS)
def test_every_codec(name, dim):
    agree(side_of(name, dim), 3, 70)


@needs_kernels
@pytest.mark.parametrize("options", SCHEDULES, ids=lambda o: o.order)
def test_every_float8(options):
    """All 256 codes, exactly; those of NaN, which are never made, as numbers."""
    words = mx.view(mx.arange(256, dtype=mx.uint8), mx.uint32).reshape(1, 1, 4, 16)
    side = kernels.PackedSide(codec.get("fp8:0.3", 64), to_tiles(words), None)
    with running(options) as simulator:
        got = dequantize_metal(side, 0, 4, mx.float32)
        assert np.array_equal(np.array(got), np.array(reference.dequantize(side, 0, 4, mx.float32)))
    assert simulator.objections == []


@needs_kernels
@pytest.mark.parametrize("dim", thinned(HEAD_DIMS, 2))
def test_three_bits_of_every_head_dimension(dim):
    """Vectors of an odd number of units share words at the end of a tile."""
    agree(side_of("trellis3", dim, 33), 0, 33)


@needs_kernels
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision(dtype):
    agree(side_of("turbo4", 128), 0, 70, dtype)


@needs_kernels
@pytest.mark.parametrize(
    ("start", "stop"),
    [(0, 1), (0, 31), (0, 32), (0, 33), (31, 32), (31, 33), (15, 17), (40, 130), (64, 96), (129, 130)],
)
def test_ranges(start, stop):
    agree(side_of("trellis3", 80, 130, batch=2, heads=3), start, stop)


@needs_kernels
def test_ranges_that_hold_nothing_or_are_not_there():
    side = side_of("turbo4", 64)
    assert dequantize_metal(side, 5, 5, mx.float16).shape == (1, 2, 0, 64)
    for start, stop in [(-1, 5), (5, 4), (0, 129)]:
        with pytest.raises(RotorError, match=f"tokens {start} to {stop} .* room for 128"):
            dequantize_metal(side, start, stop, mx.float32)


@needs_kernels
def test_the_packages_dequantize_uses_it(monkeypatch):
    monkeypatch.setenv("MLX_ROTOR_BACKEND", "metal")
    side = side_of("turbo4", 64)
    with running() as simulator:
        got = kernels.dequantize(side, 2, 50, mx.float32)
        assert len(simulator.reports) == (1 if SUPPORTED else 0)
    assert distance(got, reference.dequantize(side, 2, 50, mx.float32)) <= TOLERANCE[mx.float32]


@needs_simulator
@grid(1, case=[("trellis3", 80), ("rotor4", 96), ("fp8:0.5", 80)], options=SCHEDULES)
def test_no_schedule_matters(case, options):
    agree(side_of(*case), 5, 69, options=options)


@needs_simulator
@pytest.mark.parametrize("dtype", [mx.float16, mx.float32])
def test_traffic(dtype):
    """Words are read once, the output is written once in whole lines."""
    side = side_of("turbo4", 128, 64)
    (report,) = agree(side, 0, 64, dtype)
    assert report.buffers["tiles"].loaded == side.tiles[:, :, :2].nbytes
    assert report.buffers["out"].stored == 2 * 64 * 128 * dtype.size
    assert report.line_use(["out"]) == 1.0


def dequantizing():
    side = side_of("trellis3", 80, 75)
    mean = mx.array(np.random.default_rng(0).standard_normal((1, 2, 4, 80)).astype(np.float16))
    return off(replace(side, mean=mean, span=32), 39, 75)


@needs_simulator
def test_nothing_is_wrong_without_a_mistake():
    assert objections(dequantizing) == []


@needs_simulator
@pytest.mark.parametrize(("path", "call", "at"), barriers("attention/dequantize.h"), ids=lambda x: str(x)[:24])
def test_a_missing_barrier_is_seen(path, call, at, monkeypatch, tmp_path):
    with mutated(monkeypatch, tmp_path, path, call, "", at):
        assert objections(dequantizing)


@needs_simulator
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("u < end", "u <= end"),
        ("u < end", "u + 1 < end"),
        ("token >= start &&", ""),
        ("token >= start", "token > start"),
        ("&& token < stop", ""),
        ("token < stop", "token <= stop"),
        ("token < stop", "token + 1 < stop"),
        ("e < DIM", "e <= DIM"),
        ("e < DIM", "e + 1 < DIM"),
        ("own < (slot & ~3u) + 4", "own <= (slot & ~3u) + 4"),
        ("half_tile < MLX_ROTOR_TILE", "half_tile <= MLX_ROTOR_TILE"),
        ("i < Quantizer::FIELDS / 2", "i + 1 < Quantizer::FIELDS / 2"),
        ("i < DIM / 8", "i + 1 < DIM / 8"),
        ("scales[half_tile + mine]", "scales[mine]"),
        ("start / MLX_ROTOR_TILE +", ""),
    ],
)
def test_a_loose_bound_or_a_wrong_operation_is_seen(old, new, monkeypatch, tmp_path):
    with mutated(monkeypatch, tmp_path, "attention/dequantize.h", old, new):
        assert objections(dequantizing)
