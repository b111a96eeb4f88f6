"""Bit planes: indices of b bits stored as b planes of words, so that no field ever straddles a word.

Plane p holds bit p of every element; element t is bit t % w of word t // w, w being 32 bits where the dimension is
a multiple of 32 and 16 where it is not (head dimensions 80 and 112). Storage is exactly b bits an element.
"""

from __future__ import annotations

import mlx.core as mx

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
    """planes [..., bits, words] -> uint32 indices [..., d]; the inverse of `pack`."""
    *lead, bits, words = planes.shape
    w = 8 * planes.dtype.size
    bit = (planes[..., None].astype(mx.uint32) >> mx.arange(w, dtype=mx.uint32)) & 1
    bit = bit.reshape(*lead, bits, words * w)
    return (bit << mx.arange(bits, dtype=mx.uint32)[:, None]).sum(-2).astype(mx.uint32)
