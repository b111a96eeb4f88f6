"""Packed tokens in memory: words and a scale a vector, and tiles of 32 tokens of one head, word w of token t at place
32 w + t.

A simdgroup whose lanes are tokens reads one whole line at a time. A vector that is no whole number of words has 16 bits
over; those of two tokens share a word at the end of the tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class Packed:
    """Encoded vectors. words: [..., n] of uint32, or of uint16 where a vector is no whole number of 32-bit words;
    scale: [...] of float16, one a vector, None where the codec keeps none."""

    words: mx.array
    scale: mx.array | None

    @property
    def nbytes(self) -> int:
        return sum(int(a.nbytes) for a in (self.words, self.scale) if a is not None)


TILE = 32


def to_tiles(words: mx.array) -> mx.array:
    """words [..., n, w], uint32, or uint16 with w odd -> uint32 [..., ceil(n / 32), words of 32], zeros behind n."""
    *lead, n, w = words.shape
    if pad := -n % TILE:
        words = mx.concatenate([words, mx.zeros((*lead, pad, w), words.dtype)], axis=-2)
    words = words.reshape(*lead, -1, TILE, w)
    if words.dtype == mx.uint32:
        return words.swapaxes(-1, -2).reshape(*lead, -1, TILE * w)
    whole = mx.view(mx.contiguous(words[..., : w - 1]), mx.uint32).swapaxes(-1, -2)
    over = mx.view(mx.contiguous(words[..., w - 1]), mx.uint32)
    return mx.concatenate([whole.reshape(*over.shape[:-1], -1), over], axis=-1)


def from_tiles(tiles: mx.array, start: int, stop: int) -> mx.array:
    """Words of tokens start .. stop, [..., stop - start, w]: the inverse of `to_tiles`."""
    first = start // TILE
    tiles = tiles[..., first : -(-stop // TILE), :]
    *lead, n, size = tiles.shape
    whole, over = size // TILE * TILE, size % TILE
    words = mx.contiguous(tiles[..., :whole].reshape(*lead, n, -1, TILE).swapaxes(-1, -2))
    if over:
        last = mx.view(mx.contiguous(tiles[..., whole:]), mx.uint16)[..., None]
        words = mx.concatenate([mx.view(words, mx.uint16), last], axis=-1)
    words = words.reshape(*lead, n * TILE, -1)
    return words[..., start - first * TILE : stop - first * TILE, :]


def kept_bits(tile_words: int, tokens: int) -> mx.array:
    """uint32 [tile_words]: ones where the first `tokens` tokens of a tile lie, zeros where the others do."""
    ones = mx.full((TILE, 2 * tile_words // TILE), 0xFFFF, mx.uint16)
    if tile_words % TILE == 0:
        ones = mx.view(ones, mx.uint32)
    return to_tiles(mx.where(mx.arange(TILE)[:, None] < tokens, ones, mx.zeros_like(ones)))[0]
