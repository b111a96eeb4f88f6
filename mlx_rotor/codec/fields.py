"""Codes of 2, 3, 4 or 8 bits in words, every field at a fixed stride: exactly `bits` bits an element.

A vector of d elements is d / F units of F fields, F being 4 for bytes, 8 for nibbles and 16 for pairs of bits; element
e is field e // units of unit e % units. So the elements before e stand in the units before its own, at the same place:
a word of them is had without a shift. With 3 bits the low two are such pairs, and a third word behind two units has
their high bits, the even unit's at even places, the odd one's at odd places; where the number of units is odd, the last
one's high bits are 16 bits of their own. `kernels_metal/codec/fields.h` reads the same.
"""

from __future__ import annotations

import mlx.core as mx

from ..errors import RotorError

FIELDS = {2: 16, 3: 16, 4: 8, 8: 4}  # of a unit, by bits


def units(dim: int, bits: int) -> int:
    """Units of a vector. Raises RotorError for a dimension or a number of bits that can't be packed."""
    if bits not in FIELDS or dim < 64 or dim % 16:
        raise RotorError(
            f"head dimension {dim} can't be packed at {bits} bits: it must be a multiple of 16 from 64, bits 2, 3, 4, 8"
        )
    return dim // FIELDS[bits]


def _join(fields: mx.array, stride: int) -> mx.array:
    """[..., n] integers below 2^stride -> [...] words, field f at bit stride · f."""
    shift = mx.arange(0, stride * fields.shape[-1], stride, dtype=mx.uint32)
    return (fields.astype(mx.uint32) << shift).sum(-1)


def _split(words: mx.array, stride: int, n: int, mask: int) -> mx.array:
    """[...] words -> [..., n] uint8, the `mask` bits of the field at bit stride · f."""
    shift = mx.arange(0, stride * n, stride, dtype=mx.uint32)
    return ((words[..., None].astype(mx.uint32) >> shift) & mask).astype(mx.uint8)


def pack(code: mx.array, bits: int) -> mx.array:
    """code: integers below 2^bits, [..., d] -> words [..., d · bits / 32] uint32, or [..., d · bits / 16] uint16
    where that is no whole number."""
    n = units(code.shape[-1], bits)
    lead = code.shape[:-1]
    fields = code.astype(mx.uint32).reshape(*lead, -1, n).swapaxes(-1, -2)
    if bits != 3:
        return _join(fields, bits)
    low, high = _join(fields & 3, 2), fields >> 2
    pairs = n // 2
    both = high[..., : 2 * pairs, :].reshape(*lead, pairs, 2, 16).swapaxes(-1, -2).reshape(*lead, pairs, 32)
    grouped = mx.concatenate(
        [low[..., : 2 * pairs].reshape(*lead, pairs, 2), _join(both, 1)[..., None]], axis=-1
    ).reshape(*lead, 3 * pairs)
    if n % 2 == 0:
        return grouped
    last = mx.concatenate([grouped, low[..., -1:]], axis=-1)
    return mx.concatenate([mx.view(last, mx.uint16), _join(high[..., -1:, :], 1).astype(mx.uint16)], axis=-1)


def unpack(words: mx.array, bits: int, dim: int) -> mx.array:
    """The inverse of `pack`: uint8 codes [..., d]."""
    n = units(dim, bits)
    lead = words.shape[:-1]
    if bits != 3:
        fields = _split(words, bits, 32 // bits, (1 << bits) - 1)
        return fields.swapaxes(-1, -2).reshape(*lead, dim)
    pairs = n // 2
    whole = words if n % 2 == 0 else mx.view(mx.contiguous(words[..., :-1]), mx.uint32)
    grouped = whole[..., : 3 * pairs].reshape(*lead, pairs, 3)
    low = grouped[..., :2].reshape(*lead, 2 * pairs)
    both = _split(grouped[..., 2], 1, 32, 1)
    high = both.reshape(*lead, pairs, 16, 2).swapaxes(-1, -2).reshape(*lead, 2 * pairs, 16)
    if n % 2:
        low = mx.concatenate([low, whole[..., -1:]], axis=-1)
        high = mx.concatenate([high, _split(words[..., -1:], 1, 16, 1)], axis=-2)
    fields = _split(low, 2, 16, 3) | (high << 2)
    return fields.swapaxes(-1, -2).reshape(*lead, dim)
