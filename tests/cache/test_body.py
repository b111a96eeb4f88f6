"""A body's bits against the codec's own, wherever appends start; its room and its copies."""

from itertools import accumulate

import mlx.core as mx
import pytest

from mlx_rotor import codec
from mlx_rotor.cache.rows import Body
from mlx_rotor.kernels.tiles import from_tiles


def vectors(n, d):
    return mx.random.normal((2, 3, n, d), key=mx.random.key(n + d))


def packed_bits(body):
    return from_tiles(body.tiles, 0, body.length), body.scale[:, :, : body.length]


@pytest.mark.parametrize(("name", "d"), [("raw32", 64), ("turbo4", 128), ("turbo3", 80), ("trellis3", 112)])
def test_a_body_has_the_codecs_bits_wherever_appends_start(name, d):
    x = vectors(300, d)
    body, sizes = Body(name), [5, 40, 1, 18, 32, 64, 3, 29, 108]
    for stop, n in zip(accumulate(sizes), sizes, strict=True):
        body.append(x[:, :, stop - n : stop])
    for forget, more in ((0, 0), (37, 20), (64, 5), (1, 70), (31, 12)):
        body.trim(forget)
        kept = body.length
        body.append(x[:, :, kept : kept + more])
        assert body.length == kept + more
        # Rounding may differ with the shape that is encoded, and flip a code that lies between two levels.
        expected = codec.get(name, d).encode(x[:, :, : body.length])
        for got, bits in zip(packed_bits(body), (expected.words, expected.scale), strict=True):
            assert got.shape == bits.shape and got.dtype == bits.dtype
            assert mx.mean(got == bits) > 0.999
    body.trim(body.length)
    assert body.length == 0 and body.room == 512


def test_what_is_appended_leaves_every_earlier_bit_alone():
    x = vectors(200, 80)
    body = Body("turbo3")
    body.append(x[:, :, :90])
    body.trim(13)
    before = packed_bits(body)
    mx.eval(before)
    for n in (1, 2, 30, 60):
        body.append(-x[:, :, :n])
        for was, now in zip(before, packed_bits(body), strict=True):
            assert mx.array_equal(was, now[:, :, :77])


@pytest.mark.parametrize("start", [4000, 4001])
def test_an_append_copies_no_buffer(start):
    x = mx.random.normal((1, 4, start, 128))
    body = Body("turbo4")
    body.append(x)
    mx.eval(body.tiles, body.scale, x)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    body.append(x[:, :, :1])
    mx.eval(body.tiles, body.scale)
    assert mx.get_peak_memory() - before < body.nbytes / 8


def test_capacity_grows_by_an_eighth():
    body, rooms = Body("raw32"), set()
    for _ in range(40):
        body.append(mx.ones((1, 1, 32, 64)))
        rooms.add(body.room)
        assert body.nbytes == body.room * (64 * 4 + 2)
    assert rooms == {256, 512, 768, 1024, 1280}
    body = Body("raw32")
    body.append(mx.ones((1, 1, 4000, 64)))
    assert body.room == 4608  # 4000 + 500, in whole steps of 256
