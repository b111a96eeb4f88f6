"""Means that are subtracted before encoding and added in dequantizing: the kernels against their references."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from grids import thinned
from kernel_cases import (
    NAMES,
    SCHEDULES,
    TOLERANCE,
    distance,
    mutated,
    needs_kernels,
    needs_simulator,
    objections,
    running,
    vectors,
)
from metal_sim import Options
from mlx_rotor import RotorError, codec, kernels
from mlx_rotor.kernels import reference
from mlx_rotor.kernels.packing import dequantize_metal, encode_metal, encode_reference

HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256)
SCALED = [name for name in NAMES if codec.get(name, 128).scaled]


def offset(n, dim, groups, *, batch=1, heads=2):
    """Vectors [B, H, n, D] far from 0, and means [B, H, groups, D] that lie apart in a larger buffer."""
    rng = np.random.default_rng([n, dim, groups])
    mean = mx.array(3 * rng.standard_normal((batch, 2 * heads, groups, dim)).astype(np.float32)).astype(mx.float16)
    return vectors(n, dim, batch=batch, heads=heads) + 3, mean[:, ::2]


def encoded_alike(c, x, mean, first, span):
    got = encode_metal(c, x, mean, first=first, span=span)
    with mx.stream(mx.cpu):
        want = encode_reference(c, x, mean, first=first, span=span)
    return all(np.array_equal(np.array(a), np.array(b)) for a, b in zip(got, want, strict=True))


def side_with(c, x, mean, span):
    return kernels.PackedSide(c, *encode_reference(c, x, mean, span=span), mean, span)


def off(side, start, stop):
    return distance(
        dequantize_metal(side, start, stop, mx.float32), reference.dequantize(side, start, stop, mx.float32)
    )


@needs_kernels
@pytest.mark.parametrize("at", thinned(range(len(SCALED)), 4), ids=lambda i: SCALED[i])
def test_every_codec(at):
    c = codec.get(SCALED[at], HEAD_DIMS[at % len(HEAD_DIMS)])
    x, mean = offset(70, c.dim, 3)
    with running() as simulator:
        assert encoded_alike(c, x, mean, 0, 32)
        assert off(side_with(c, x, mean, 32), 5, 70) <= TOLERANCE[mx.float32]
    assert simulator.objections == []


@needs_kernels
@pytest.mark.parametrize(("first", "span", "groups"), [(0, 0, 1), (64, 0, 1), (32, 64, 3), (96, 32, 7), (256, 256, 2)])
def test_spans(first, span, groups):
    c = codec.get("turbo3", 80)
    x, mean = offset(100, 80, groups, batch=2, heads=3)
    with running() as simulator:
        assert encoded_alike(c, x, mean, first, span)
        if first == 0:
            assert off(side_with(c, x, mean, span), 33, 90) <= TOLERANCE[mx.float32]
    assert simulator.objections == []


@needs_kernels
def test_the_largest_vectors_fit_with_means():
    """What a threadgroup needs most memory for."""
    c = codec.get("trellis4", 256)
    x, mean = offset(33, 256, 1, heads=1)
    with running() as simulator:
        assert encoded_alike(c, x, mean, 0, 0)
    assert simulator.objections == []


@needs_kernels
def test_each_span_is_decoded_with_its_own_mean():
    """As reference and kernel might share a mistake: what comes out is what went in, but for the codec's error."""
    c, rng = codec.get("trellis4", 80), np.random.default_rng(0)
    centres = np.repeat(50 * rng.standard_normal((1, 2, 4, 80)), 64, axis=2)[:, :, :200]
    noise = rng.standard_normal((1, 2, 200, 80))
    mean = c.rotate(mx.array(centres[:, :, ::64].astype(np.float32))).astype(mx.float16)
    with running():
        side = kernels.PackedSide(c, *encode_metal(c, mx.array((centres + noise).astype(np.float32)), mean, span=64))
        got = dequantize_metal(replace(side, mean=mean, span=64), 0, 200, mx.float32)
    assert ((np.array(got) - centres - noise) ** 2).sum() < 0.008 * (noise**2).sum()


@needs_simulator
@pytest.mark.parametrize("options", SCHEDULES, ids=lambda o: o.order)
def test_no_schedule_matters(options):
    c = codec.get("trellis3", 80)
    x, mean = offset(70, 80, 3)
    with running(options) as simulator:
        assert encoded_alike(c, x, mean, 0, 32)
        assert off(side_with(c, x, mean, 32), 5, 70) <= TOLERANCE[mx.float32]
    assert simulator.objections == []


@needs_simulator
def test_traffic():
    """A tile's mean is read once."""
    c = codec.get("turbo4", 128)
    x, mean = offset(128, 128, 1, heads=1)
    with running(Options(mode="count")) as simulator:
        encode_metal(c, x, mean)
        dequantize_metal(side_with(c, x, mean, 0), 0, 128, mx.float32)
    assert [report.buffers["mean"].loaded for _, report in simulator.reports] == [4 * 128 * 2] * 2


@pytest.mark.parametrize(
    ("shape", "first", "span", "said"),
    [
        ((1, 2, 1, 64), 0, 32, "at least 2"),
        ((1, 2, 2, 64), 32, 32, "at least 3"),
        ((1, 2, 2, 64), 0, 0, r"need float16 \[1, 2, 1, 64\]"),
        ((1, 1, 2, 64), 0, 32, "at least 2"),
        ((1, 2, 2, 80), 0, 32, "at least 2"),
        ((2, 64), 0, 32, "at least 2"),
        ((1, 2, 2, 64), 5, 32, "multiples of 32"),
        ((1, 2, 2, 64), 0, 48, "multiples of 32"),
        ((1, 2, 2, 64), -32, 32, "multiples of 32"),
    ],
)
def test_means_that_do_not_fit_are_named(shape, first, span, said):
    c, x = codec.get("turbo4", 64), vectors(40, 64)
    for encode in (encode_metal, encode_reference):
        with pytest.raises(RotorError, match=said):
            encode(c, x, mx.zeros(shape, mx.float16), first=first, span=span)
        with pytest.raises(RotorError, match="float32"):
            encode(c, x, mx.zeros((1, 2, 1, 64)))


@pytest.mark.parametrize("name", ["fp8", "affine4"])
def test_codecs_without_a_scale_take_none(name):
    with pytest.raises(RotorError, match=f"{name} takes no means"):
        encode_reference(codec.get(name, 64), vectors(40, 64), mx.zeros((1, 2, 1, 64), mx.float16))


def encoding():
    return float(not encoded_alike(codec.get("turbo3", 80), *offset(100, 80, 3, batch=2), 32, 64))


def dequantizing():
    return off(side_with(codec.get("turbo3", 80), *offset(100, 80, 2, batch=2), 64), 5, 100)


@needs_simulator
def test_nothing_is_wrong_without_a_mistake():
    assert objections(encoding) == objections(dequantizing) == []


@needs_simulator
@pytest.mark.parametrize("run", [encoding, dequantizing])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("strides[0]", "strides[1]"),
        ("strides[1]", "strides[2]"),
        ("long(row) * strides[2]", "0"),
        ("span > 0 ?", "span > 64 ?"),
        ("tile * MLX_ROTOR_TILE) /", "tile) /"),
        ("e < DIM", "e <= DIM"),
        ("e < DIM", "e + 1 < DIM"),
    ],
)
def test_a_wrong_mean_is_seen(run, old, new, monkeypatch, tmp_path):
    with mutated(monkeypatch, tmp_path, "codec/mean.h", old, new):
        assert objections(run)


@needs_simulator
@pytest.mark.parametrize(
    ("path", "run", "old", "new"),
    [
        ("codec/mean.h", encoding, "uint(spans[0]) +", ""),
        ("attention/encode.h", encoding, "y[i] - centre[lane8 + 8 * i]", "y[i]"),
        ("attention/encode.h", encoding, "stage<DIM>(centre, tile,", "stage<DIM>(centre, first,"),
        ("attention/dequantize.h", dequantizing, "x + centre[e]", "x + centre[other]"),
        ("attention/dequantize.h", dequantizing, "y + centre[other]", "y"),
        ("attention/dequantize.h", dequantizing, "stage<DIM>(centre, at,", "stage<DIM>(centre, group.x + 1,"),
    ],
)
def test_a_mean_in_the_wrong_place_is_seen(path, run, old, new, monkeypatch, tmp_path):
    with mutated(monkeypatch, tmp_path, path, old, new):
        assert objections(run)
