"""The codecs' benchmark against published distortions, and the measure itself against codes whose error is known."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_rotor import codec
from mlx_rotor.bench import codecs
from mlx_rotor.bench.codecs import Distortion, measure_all, measure_distortion
from mlx_rotor.errors import RotorError

# TurboQuant's published distortions at 2, 3 and 4 bits, and what the trellis must reach.
TURBO = {2: 0.1155, 3: 0.0337, 4: 0.0092}
TRELLIS = {2: 0.0860, 3: 0.0236, 4: 0.0063}
RAW = "raw32"


@pytest.fixture(scope="module")
def measured():
    return {r.codec: r for r in measure_all(codec.names()) if isinstance(r, Distortion)}


def test_every_codec_is_measured(measured):
    assert set(measured) == set(codec.names())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_published_distortions_hold(measured, bits):
    assert measured[f"turbo{bits}"].error <= 1.01 * TURBO[bits]
    assert measured[f"trellis{bits}"].error <= TRELLIS[bits]
    for family in ("planar", "iso", "rotor"):
        assert measured[f"{family}{bits}"].error <= 1.02 * TURBO[bits]


def test_bits_are_those_stored(measured):
    for name, found in measured.items():
        assert found.bits == codec.get(name, 128).bits, name
    for name in (f"{family}{bits}" for family in ("turbo", "trellis", "planar", "iso", "rotor") for bits in (2, 3, 4)):
        assert measured[name].bits == int(name[-1]) + 16 / 128


def test_nothing_beats_the_bound(measured):
    for name, found in measured.items():
        if name != RAW:
            assert found.error > found.bound == 4**-found.bits and found.decibels > 1.5, name
    assert measured["turbo3"].decibels - measured["trellis3"].decibels == pytest.approx(1.6, abs=0.2)


def test_strong_channels_tell_rotations_apart(measured):
    for bits in (2, 3, 4):
        full, blocks = measured[f"turbo{bits}"], measured[f"planar{bits}"]
        assert full.scores < 1.1 * full.error and blocks.scores > 2 * blocks.error
    assert measured["iso4"].scores < measured["planar4"].scores


class Halved:
    """Every vector times a half, in 16 bits an element: a quarter of the squared length is lost."""

    name, index_bits, kernel, scaled = "halved", 16, None, False

    def __init__(self, dim):
        self.dim, self.bits = dim, 16.0

    def encode(self, x, mean=None):
        return codec.Packed(mx.view((x / 2).astype(mx.float16), mx.uint16), None)

    def decode(self, packed):
        return mx.view(packed.words, mx.float16).astype(mx.float32)


def test_a_known_error(monkeypatch):
    monkeypatch.setattr(codecs.codec, "get", lambda name, dim: Halved(dim))
    found = measure_distortion("halved", 64, 100)
    assert (
        found.bits == 16 and found.error == pytest.approx(0.25, rel=1e-3) and found.scores == pytest.approx(0.25, 1e-3)
    )
    assert found.decibels == pytest.approx(10 * np.log10(0.25 * 4**16), rel=1e-3)


def test_a_codec_that_takes_no_such_dimension():
    (name, why), turbo = measure_all(["affine4", "turbo2"], dim=80, count=64)
    assert name == "affine4" and "80" in why
    assert turbo.bits == 2 + 16 / 80
    with pytest.raises(RotorError, match="turbo9"):
        measure_distortion("turbo9")
