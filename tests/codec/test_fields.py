"""The layout of codes in words, bit by bit from its definition."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_rotor import RotorError
from mlx_rotor.codec.fields import pack, units, unpack


def by_hand(code, bits):
    """The words of one vector of d codes, as Python integers: (32-bit words, 16 bits over or None)."""
    d = len(code)
    stride = 2 if bits == 3 else bits
    n = d * stride // 32
    low = [0] * n
    for e, c in enumerate(code):
        low[e % n] |= (int(c) & (2**stride - 1)) << stride * (e // n)
    if bits != 3:
        return low, None
    # The high bits of two neighbouring units interleave; a last unit without a neighbour has 16 of its own.
    high = [0] * (n // 2)
    over = 0
    for e, c in enumerate(code):
        unit, field, bit = e % n, e // n, int(c) >> 2
        if unit // 2 < len(high):
            high[unit // 2] |= bit << (2 * field + unit % 2)
        else:
            over |= bit << field
    words = [w for i, h in enumerate(high) for w in (low[2 * i], low[2 * i + 1], h)]
    return (words, None) if n % 2 == 0 else ([*words, low[-1]], over)


@pytest.mark.parametrize("dim", (64, 80, 96, 112, 128, 192, 256))
@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_words_are_as_documented_and_read_back(bits, dim):
    code = np.random.default_rng(dim + bits).integers(0, 2**bits, (2, 3, dim))
    packed = pack(mx.array(code), bits)
    assert packed.nbytes * 8 == code.size * bits
    wide = dim * bits % 32 == 0
    assert packed.dtype == (mx.uint32 if wide else mx.uint16) and packed.shape[:-1] == (2, 3)
    for row, vector in zip(np.array(packed).reshape(6, -1), code.reshape(6, -1), strict=True):
        words, over = by_hand(vector, bits)
        if wide:
            assert over is None and row.tolist() == words
        else:
            halves = [half for w in words for half in (w & 0xFFFF, w >> 16)]
            assert row.tolist() == [*halves, over]
    assert np.array_equal(np.array(unpack(packed, bits, dim)), code)


@pytest.mark.parametrize("dim", (80, 128))
def test_strided_words_and_codes_are_taken(dim):
    code = np.random.default_rng(0).integers(0, 8, (4, 6, dim))
    across = pack(mx.array(code).swapaxes(0, 1), 3)
    assert np.array_equal(np.array(unpack(across.swapaxes(0, 1), 3, dim)), code)
    assert np.array_equal(np.array(unpack(across[1::2], 3, dim)), code.swapaxes(0, 1)[1::2])


@pytest.mark.parametrize(("dim", "bits"), [(40, 4), (72, 4), (100, 2), (130, 3), (48, 4), (72, 8), (128, 1), (128, 5)])
def test_what_cant_be_packed_is_named(dim, bits):
    with pytest.raises(RotorError, match=rf"head dimension {dim} .* {bits} bits"):
        units(dim, bits)
