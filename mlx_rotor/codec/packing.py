"""Bit planes: indices of b bits stored as b planes of words, so that no field ever straddles a word.

Plane p holds bit p of every element; element t is bit t % w of word t // w, w being 32 bits where the dimension is
a multiple of 32 and 16 where it is not (head dimensions 80 and 112). Storage is exactly b bits an element.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ..errors import RotorError


def word_bits(dim: int) -> int:
    """Width of a plane's words for vectors of `dim` elements.

    Raises:
        RotorError: if `dim` is not a multiple of 16.
    """
    for bits in (32, 16):
        if dim % bits == 0:
            return bits
    raise RotorError(f"head dimension {dim} can't be packed: it must be a multiple of 16")


def pack(index: mx.array, bits: int) -> mx.array:
    """index: integers below 2^bits, [..., d] -> planes [..., bits, d / w], uint32 or uint16."""
    dim = index.shape[-1]
    w = word_bits(dim)
    index = index.astype(mx.uint32).reshape(*index.shape[:-1], 1, dim // w, w)
    plane = mx.arange(bits, dtype=mx.uint32).reshape(bits, 1, 1)
    bit = ((index >> plane) & 1) << mx.arange(w, dtype=mx.uint32)
    return bit.sum(-1).astype(mx.uint32 if w == 32 else mx.uint16)


def unpack(planes: mx.array) -> mx.array:
    """planes [..., bits, words], up to 8 bits -> uint8 indices [..., d]; the inverse of `pack`."""
    spread = _SPREAD[mx.view(planes, mx.uint8)]
    index = spread[..., 0, :]
    for plane in range(1, planes.shape[-2]):
        index = index | (spread[..., plane, :] << plane)
    return mx.view(index, mx.uint8)


def _spread_table() -> mx.array:
    """[256] uint64 whose byte i is bit i of the index: eight elements of a plane in one look-up."""
    bit = (np.arange(256)[:, None] >> np.arange(8)) & 1
    table = mx.array(bit.astype("<u1").view("<u8")[:, 0])
    mx.eval(table)
    return table


_SPREAD = _spread_table()
