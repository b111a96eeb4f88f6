"""MLX's packing: codes as a little-endian bit stream along the last axis, in 32-bit words."""

from __future__ import annotations

import mlx.core as mx

BLOCK = 32  # codes: they fill exactly `bits` words


def pack(codes: mx.array, bits: int) -> mx.array:
    """Codes [.., K] (any dtype, whole numbers < 2**bits, K a multiple of 32) to uint32 [.., K*bits/32].

    Code i takes bits [i*bits, (i+1)*bits) of the stream, so codes of 3, 5 and 6 bits cross words.
    """
    lead, k = codes.shape[:-1], codes.shape[-1]
    return mx.stack(_words(codes.reshape(-1, BLOCK).T, bits), axis=-1).reshape(*lead, k * bits // 32)


def pack_groups(codes: mx.array, bits: int) -> mx.array:
    """Codes [g, R, n] of the n groups of R rows, g codes each, to uint32 [R, n*g*bits/32]: `pack` of [R, n*g]."""
    size, rows, count = codes.shape
    words = mx.stack(_words(codes.reshape(size // BLOCK, BLOCK, rows, count).swapaxes(0, 1), bits), axis=1)
    return words.transpose(2, 3, 0, 1).reshape(rows, count * size * bits // 32)


def _words(codes: mx.array, bits: int) -> list[mx.array]:
    """The `bits` words [..] of blocks [32, ..]. Bits don't overlap, so sums put words together."""
    codes = codes.astype(mx.uint32)
    tail = [1] * (codes.ndim - 1)
    words = []
    for word in range(bits):
        low = word * 32
        first, last = low // bits, (low + 31) // bits
        shifts = [code * bits - low for code in range(first, last + 1)]
        if shifts[0] < 0:  # its lower bits are in the word before
            head, first, shifts = codes[first] >> -shifts[0], first + 1, shifts[1:]
        else:
            head = None
        rest = (codes[first : last + 1] << mx.array(shifts, mx.uint32).reshape(-1, *tail)).sum(axis=0)
        words.append(rest if head is None else head + rest)
    return words
