"""Where a token's words lie in a tile, by hand, and the way back."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_rotor.kernels.packed import TILE, from_tiles, kept_bits, to_tiles


def words(n, w, dtype, seed=0):
    top = np.iinfo(dtype).max
    return np.random.default_rng(seed).integers(1, top, (2, 3, n, w), dtype=dtype, endpoint=True)


def by_hand(x):
    """The tiles of words [..., n, w], token by token and word by word."""
    *lead, n, w = x.shape
    out = np.zeros((*lead, -(-n // TILE), TILE * w * x.itemsize // 4), np.uint32)
    for t in range(n):
        tile = out[..., t // TILE, :]
        if x.itemsize == 4:
            for i in range(w):
                tile[..., TILE * i + t % TILE] = x[..., t, i]
            continue
        wide = x[..., t, :].astype(np.uint32)
        for i in range(w // 2):
            tile[..., TILE * i + t % TILE] = wide[..., 2 * i] | wide[..., 2 * i + 1] << 16
        # The last 16 bits of two neighbours share a word behind all whole ones.
        tile[..., TILE * (w // 2) + t % TILE // 2] |= wide[..., -1] << 16 * (t % 2)
    return out


@pytest.mark.parametrize(("w", "dtype"), [(8, np.uint32), (1, np.uint32), (15, np.uint16), (21, np.uint16)])
@pytest.mark.parametrize("n", [1, 31, 32, 33, 96])
def test_a_tile_is_as_documented_and_read_back(n, w, dtype):
    x = words(n, w, dtype)
    tiles = to_tiles(mx.array(x))
    assert tiles.dtype == mx.uint32 and np.array_equal(np.array(tiles), by_hand(x))
    for start, stop in {(0, n), (n // 2, n), (0, (n + 1) // 2), (n - 1, n), (n // 3, -(-2 * n // 3))}:
        assert np.array_equal(np.array(from_tiles(tiles, start, stop)), x[..., start:stop, :])


def test_words_are_read_out_of_buffers_with_room_and_strides():
    x = words(70, 6, np.uint32)
    tiles = to_tiles(mx.array(x))
    roomy = mx.concatenate([tiles, mx.ones_like(tiles)], axis=2).swapaxes(0, 1)
    assert np.array_equal(np.array(from_tiles(roomy, 30, 70)), x.swapaxes(0, 1)[..., 30:, :])


@pytest.mark.parametrize(("w", "dtype"), [(3, np.uint32), (15, np.uint16)])
@pytest.mark.parametrize("tokens", [0, 1, 2, 17, 31, 32])
def test_kept_bits_are_the_first_tokens_and_no_others(tokens, w, dtype):
    x = words(TILE, w, dtype)
    tiles = to_tiles(mx.array(x))
    keep = kept_bits(tiles.shape[-1], tokens)
    assert keep.shape == tiles.shape[-1:] and keep.dtype == mx.uint32
    first, others = (np.array(from_tiles(tiles & bits, 0, TILE)) for bits in (keep, ~keep))
    assert np.array_equal(first[..., :tokens, :], x[..., :tokens, :]) and not first[..., tokens:, :].any()
    assert np.array_equal(others[..., tokens:, :], x[..., tokens:, :]) and not others[..., :tokens, :].any()
