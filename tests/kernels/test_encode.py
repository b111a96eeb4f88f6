"""The encode kernel against its reference, bit for bit, in the simulator."""

import mlx.core as mx
import numpy as np
import pytest

from grids import grid, thinned
from kernel_cases import DIMS, NAMES, SCHEDULES, needs_kernels, needs_simulator, normal, running, vectors
from metal_sim import SUPPORTED, Options
from mlx_rotor import RotorError, codec, kernels
from mlx_rotor.kernels.packing import encode_metal, encode_reference


def same(c, x) -> bool:
    got = encode_metal(c, x)
    with mx.stream(mx.cpu):
        want = encode_reference(c, x)
    if not c.scaled:
        assert got[1] is want[1] is None
    pairs = zip(got if c.scaled else got[:1], want if c.scaled else want[:1], strict=True)
    return all(a.dtype == b.dtype and np.array_equal(np.array(a), np.array(b)) for a, b in pairs)


@needs_kernels
@grid(1, name=NAMES, dim=DIMS)
def test_bits_are_the_references(name, dim):
    with running() as simulator:
        assert same(codec.get(name, dim), vectors(37, dim))
    assert simulator.objections == []


@needs_kernels
@pytest.mark.parametrize("options", SCHEDULES, ids=lambda o: o.order)
def test_every_float8_and_every_tie(options):
    """All values, half-way points and their neighbours, what is too large, and numbers that may be flushed to 0."""
    values = np.unique(np.abs(np.array(mx.from_fp8(mx.arange(255, dtype=mx.uint8), mx.float32))))
    values = values[np.isfinite(values)]
    ties = (values[1:] + values[:-1]) / 2
    sizes = [values, ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(1e9))]
    x = np.concatenate([*sizes, [449, 465, 481, 1e30, 1e-39, 1e-44]]).astype(np.float32)
    x = np.resize(np.concatenate([x, -x]), (1, 1, 17, 64))
    for scale in (1.0, 0.03125, 0.3):
        c = codec.get(codec.with_parameter("fp8", scale), 64)
        with running(options) as simulator:
            assert same(c, mx.array(x * np.float32(scale)))
        assert simulator.objections == []


@needs_kernels
@grid(1, name=["turbo4", "trellis3", "rotor2", "fp8:0.5"], dtype=[mx.float16, mx.bfloat16])
def test_half_precision(name, dtype):
    with running() as simulator:
        assert same(codec.get(name, 128), vectors(33, 128, dtype=dtype))
    assert simulator.objections == []


@needs_kernels
@pytest.mark.parametrize("n", thinned([1, 31, 32, 33, 100], 2))
def test_lengths_batches_and_layouts(n):
    c = codec.get("trellis3", 80)
    with running() as simulator:
        assert same(c, vectors(n, 80, batch=2, heads=3))
        assert same(c, mx.contiguous(vectors(n, 80)))
        assert same(c, vectors(n + 7, 80)[:, 1:, 3 : 3 + n])
        assert same(c, vectors(n, 160)[..., ::2])
    assert simulator.objections == []


@needs_simulator
@grid(
    1,
    case=[("turbo3", 80), ("trellis4", 96), ("rotor3", 128), ("isofull2", 80), ("fp8", 80)],
    options=SCHEDULES,
)
def test_no_schedule_matters(case, options):
    with running(options) as simulator:
        assert same(codec.get(*case), vectors(50, case[1]))
    assert simulator.objections == []


@needs_simulator
@pytest.mark.parametrize(
    "name", thinned(["turbo2", "turbo4", "trellis3", "planar2", "iso2", "isofull2", "rotor2", "fp8"], 2)
)
def test_traffic(name):
    """No more than 1.15 times input and packed bytes, whole lines."""
    c, x = codec.get(name, 128), mx.contiguous(vectors(256, 128, heads=1, dtype=mx.float16))
    with running(Options(mode="count")) as simulator:
        tiles, scale = encode_metal(c, x)
    moved = sum(
        t.loaded + t.stored
        for buffer, t in simulator.reports[-1][1].buffers.items()
        if buffer in ("x", "table", "tiles", "scale")
    )
    made = {"x": x, "tiles": tiles} | ({"scale": scale} if c.scaled else {})
    assert moved <= 1.15 * sum(a.nbytes for a in made.values())
    assert simulator.reports[-1][1].line_use(made) >= 0.9


@needs_kernels
def test_the_packages_encode_uses_it(monkeypatch):
    monkeypatch.setenv("MLX_ROTOR_BACKEND", "metal")
    c, x = codec.get("turbo4", 64), normal(np.random.default_rng(0), 1, 2, 40, 64)
    with running() as simulator:
        got = kernels.encode(c, x)
        assert len(simulator.reports) == (1 if SUPPORTED else 0)
        bare = kernels.encode(codec.get("affine4", 64), x)  # as MLX operations: it has no kernel
        assert len(simulator.reports) == (1 if SUPPORTED else 0)
        with pytest.raises(RotorError, match="affine4 has no Metal kernel"):
            encode_metal(codec.get("affine4", 64), x)
    assert np.array_equal(np.array(got[0]), np.array(encode_reference(c, x)[0])) and bare[1] is None
    assert np.array_equal(np.array(bare[0]), np.array(encode_reference(codec.get("affine4", 64), x)[0]))
