"""A side's bits against the codec's own, wherever appends start; its means, its room and its copies."""

from itertools import accumulate

import mlx.core as mx
import pytest

from mlx_rotor import codec
from mlx_rotor.cache.body import Side
from mlx_rotor.kernels.packed import from_tiles


def vectors(n, d):
    return mx.random.normal((2, 3, n, d), key=mx.random.key(n + d))


def packed_bits(side, length):
    return from_tiles(side.tiles, 0, length), side.scale[:, :, :length]


@pytest.mark.parametrize(("name", "d"), [("raw32", 64), ("turbo4", 128), ("turbo3", 80), ("trellis3", 112)])
def test_a_side_has_the_codecs_bits_wherever_appends_start(name, d):
    x = vectors(300, d)
    side, length = Side.like(name, x), 0
    sizes = [5, 40, 1, 18, 32, 64, 3, 29, 108]
    for stop, n in zip(accumulate(sizes), sizes, strict=True):
        side.append(length, x[:, :, stop - n : stop], x[:, :, stop - n :])
        length = stop
    for forget, more in ((0, 0), (37, 20), (64, 5), (1, 70), (31, 12)):
        length -= forget
        side.cut(length)
        if more:
            side.append(length, x[:, :, length : length + more], x[:, :, length:])
        length += more
        # Rounding may differ with the shape that is encoded, and flip a code that lies between two levels.
        expected = codec.get(name, d).encode(x[:, :, :length])
        for got, bits in zip(packed_bits(side, length), (expected.words, expected.scale), strict=True):
            assert got.shape == bits.shape and got.dtype == bits.dtype
            assert mx.mean(got == bits) > 0.999
    assert side.room == 512


def test_what_is_appended_leaves_every_earlier_bit_alone():
    x = vectors(200, 80)
    side = Side.like("turbo3", x)
    side.append(0, x[:, :, :90], x)
    side.cut(77)
    before = packed_bits(side, 77)
    mx.eval(before)
    length = 77
    for n in (1, 2, 30, 60):
        side.append(length, -x[:, :, :n], -x[:, :, :n])
        length += n
        for was, now in zip(before, packed_bits(side, length), strict=True):
            assert mx.array_equal(was, now[:, :, :77])


@pytest.mark.parametrize("start", [4000, 4001])
@pytest.mark.parametrize("span", [None, 0, 256])
def test_an_append_copies_no_buffer(start, span):
    x = mx.random.normal((1, 4, start, 128))
    side = Side.like("turbo4", x, span)
    side.append(0, x, x)
    held = [a for a in side.arrays if a is not None]
    mx.eval(held, x)
    size = sum(a.nbytes for a in held)
    del held
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    side.append(start, x[:, :, :1], x[:, :, :1])
    mx.eval([a for a in side.arrays if a is not None])
    assert mx.get_peak_memory() - before < size / 8


def test_capacity_grows_by_an_eighth():
    side, rooms = Side.like("raw32", mx.ones((1, 1, 32, 64))), set()
    for i in range(40):
        side.append(32 * i, mx.ones((1, 1, 32, 64)), mx.ones((1, 1, 32, 64)))
        rooms.add(side.room)
        assert sum(a.nbytes for a in side.arrays if a is not None) == side.room * (64 * 4 + 2)
    assert rooms == {256, 512, 768, 1024, 1280}
    side = Side.like("raw32", mx.ones((1, 1, 1, 64)))
    side.append(0, mx.ones((1, 1, 4000, 64)), mx.ones((1, 1, 4000, 64)))
    assert side.room == 4608  # 4000 + 500, in whole steps of 256


@pytest.mark.parametrize(("span", "groups"), [(0, 1), (64, 4)])
def test_means_are_those_of_the_tokens_known_when_a_span_begins(span, groups):
    x = vectors(200, 64) + 5
    side = Side.like("turbo4", x, span)
    side.append(0, x[:, :, :64], x[:, :, :90])
    side.append(64, x[:, :, 64:70], x[:, :, 64:90])
    side.append(70, x[:, :, 70:200], x[:, :, 70:200])
    turn = codec.get("turbo4", 64).rotate
    known = [x[:, :, :90]] if span == 0 else [x[:, :, :64], x[:, :, 64:90], x[:, :, 128:192], x[:, :, 192:200]]
    want = mx.concatenate([turn(k.mean(2, keepdims=True)) for k in known], axis=2)
    assert side.mean.shape == (2, 3, groups, 64) and side.mean.dtype == mx.float16
    assert mx.allclose(side.mean.astype(mx.float32), want, atol=0.02)
    back = side.rotated(0, 200)
    assert mx.mean((back - turn(x)) ** 2) < 0.011  # of unit variance: what turbo4 leaves of vectors less their mean


def test_parts_and_joins_have_the_same_bits():
    x = vectors(500, 80)
    side = Side.like("turbo3", x, 256)
    side.append(0, x, x)
    first, rest = side.part(0, 256), side.part(256, 500)
    again = first.joined(256, rest, 244)
    for got, want in zip(packed_bits(again, 500), packed_bits(side, 500), strict=True):
        assert mx.array_equal(got, want)
    assert mx.array_equal(again.mean, side.mean)
    assert mx.array_equal(again.rotated(0, 500), side.rotated(0, 500))
