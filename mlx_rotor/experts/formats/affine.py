"""MLX's own format: scale · code + bias, a scale and a bias a group.

`mx.quantize` spans the range of the group on a grid with a zero on it. `search` and `best` minimise the squared error
after scale and bias are rounded, in the same format.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import ClassVar

import mlx.core as mx

from ...errors import RotorError
from ...fit import FITS
from ...fit.feedback import NO_CURVATURE, Grid, Stored, rounded
from ...fit.packing import pack_groups
from ...fit.rows import by_chunks, check_not_empty
from ...fit.search import Effort, Groups, by_groups, nearest, search
from .base import Errors, Format

Parts = tuple[mx.array, mx.array, mx.array]


def decode(parts: Sequence[mx.array], columns: int, bits: int, group_size: int) -> mx.array:
    words, scales, biases = parts
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(words, scales, biases, group_size, bits)


def _square(*steps: float) -> tuple[tuple[float, float], ...]:
    return tuple((a, b) for a, b in product(steps, repeat=2))


_ONE = ((1.0, 1.0),)
_EXACT = (1.0,)
_NEIGHBOURS = (1 - 2**-8, 1.0, 1 + 2**-8)
_NEAR = (1 - 2**-7, *_NEIGHBOURS, 1 + 2**-7)

# Chosen greedily from square grids of ends for the least mean error over normal, Student (5) and Laplace weights in
# groups of 32 to 128, and the heeded ones likewise with log-normal importance. From 6 bits on the scale's rounding
# decides.
SEARCH: dict[int, Effort] = {
    2: Effort(
        ((0.65, 0.65), (0.5, 0.7), (0.75, 0.55), (0.65, 0.8), (0.55, 0.5), (0.85, 0.7), (0.55, 0.9), (0.8, 0.45)),
        ((0.75, 0.75), (0.9, 0.6), (0.6, 0.9), (0.9, 0.85)),
        2,
        _EXACT,
        0,
    ),
    3: Effort(
        ((0.85, 0.85), (0.95, 0.8), (0.8, 0.95), (0.95, 0.95), (0.8, 0.75), (0.75, 0.85), (1.0, 0.9), (0.9, 1.0)),
        ((0.9, 0.9), (0.8, 1.0), (1.0, 0.85), (1.0, 1.0)),
        2,
        _EXACT,
        0,
    ),
    4: Effort(
        ((0.97, 0.97), (1.0, 0.91), (0.94, 1.0), (0.97, 0.94), (0.91, 1.0), (1.0, 0.94), (0.91, 0.94), (0.97, 1.0)),
        ((0.98, 0.98), (0.98, 0.9), (0.9, 0.98)),
        2,
        _EXACT,
        0,
    ),
    5: Effort(((1.0, 1.0), (0.96, 1.0), (1.0, 0.96), (0.98, 0.98)), _ONE, 2, _NEIGHBOURS, 0),
    6: Effort(((1.0, 1.0), (0.98, 0.98)), _ONE, 2, _NEIGHBOURS, 0),
    8: Effort(_ONE, (), 1, _NEIGHBOURS, 0),
}
BEST: dict[int, Effort] = {
    2: Effort(_square(0.35, 0.5, 0.65, 0.8, 0.95), _square(0.55, 0.7, 0.85, 1.0), 6, _NEAR, 2),
    3: Effort(_square(0.6, 0.7, 0.8, 0.9, 1.0), _square(0.7, 0.8, 0.9, 1.0), 6, _NEAR, 2),
    4: Effort(_square(0.8, 0.86, 0.91, 0.96, 1.0), _square(0.8, 0.9, 1.0), 6, _NEAR, 2),
    5: Effort(_square(0.88, 0.93, 0.97, 1.0), _square(0.9, 1.0), 6, _NEAR, 2),
    6: Effort(_square(0.94, 0.97, 1.0), _ONE, 4, _NEAR, 2),
    8: Effort(_square(0.98, 1.0), _ONE, 3, _NEAR, 2),
}
EFFORTS = {"search": SEARCH, "best": BEST}


class Affine(Format):
    """`fast` is mx.quantize of the weights in bf16; `search` and `best` never leave more error than that."""

    mode = "affine"
    all_bits, group_sizes = (1, 2, 3, 4, 5, 6, 8), (128, 64, 32)
    read_only = (1,)
    beside, beside_dtype = ("scales", "biases"), mx.bfloat16
    header = "affine.h"
    decoder = staticmethod(decode)
    errors: ClassVar[Errors] = {
        (2, 32): (0.1308, 0.0877, 0.0871),
        (2, 64): (0.1552, 0.1017, 0.1014),
        (2, 128): (0.1792, 0.1099, 0.1095),
        (3, 32): (0.0293, 0.02087, 0.02073),
        (3, 64): (0.03621, 0.02696, 0.0268),
        (3, 128): (0.04284, 0.03164, 0.03124),
        (4, 32): (0.006563, 0.004854, 0.004824),
        (4, 64): (0.008277, 0.006577, 0.006543),
        (4, 128): (0.01, 0.008266, 0.008162),
        (5, 32): (0.001554, 0.001168, 0.001161),
        (5, 64): (0.001966, 0.001604, 0.001597),
        (5, 128): (0.002387, 0.002048, 0.002037),
        (6, 32): (0.0003923, 0.0002982, 0.0002914),
        (6, 64): (0.0004954, 0.0004093, 0.0004006),
        (6, 128): (0.0005974, 0.0005204, 0.0005114),
        (8, 32): (4.403e-05, 2.038e-05, 1.969e-05),
        (8, 64): (5.527e-05, 2.683e-05, 2.626e-05),
        (8, 128): (6.358e-05, 3.325e-05, 3.279e-05),
    }

    def metal(self, element: str) -> str:
        return f"AffineWeights<{self.bits}, {self.group_size}, {element}>"

    def check_weights(self, w: mx.array) -> None:
        check_not_empty(w)
        if w.shape[-1] % self.group_size:
            raise RotorError(
                f"group_size {self.group_size} does not divide {w.shape[-1]}, the last dimension of {w.shape}"
            )

    def fitted(self, w: mx.array, method: str, importance: mx.array | None) -> tuple[mx.array, ...]:
        return _parts(w, self.bits, self.group_size, method, importance, mx.bfloat16)

    def grid(self, method: str) -> Grid:
        return AffineGrid(self.bits, method)


def fit_affine(
    w: mx.array,
    *,
    bits: int,
    group_size: int = 64,
    fit: str = "search",
    importance: mx.array | None = None,
    dtype: mx.Dtype = mx.bfloat16,
) -> Parts:
    """Quantizes weights to MLX's affine format with less error than `mx.quantize`.

    The fit `fast` is mx.quantize of the weights in `dtype`; `search` and `best` minimise
    sum(importance * (w - decoded)**2) in every group, and never leave more than mx.quantize. Works in float32, a chunk
    at a time, and evaluates what it returns.

    Args:
        w: [.., K] of any floating dtype, finite.
        bits: 2, 3, 4, 5, 6 or 8.
        group_size: 32, 64 or 128 weights that share a scale and a bias.
        fit: fast, search or best.
        importance: >= 0, broadcasts to w: [K], or [E, 1, K] for experts; `fast` ignores it.
        dtype: of scales and biases.

    Returns:
        (codes uint32 [.., K*bits/32], scales [.., K/group_size], biases [.., K/group_size]), as `mx.dequantize` takes.

    Raises:
        RotorError: bits, a group size or an importance that don't go with w; an unknown fit.

    Example:
        >>> codes, scales, biases = mlx_rotor.quant.fit_affine(w, bits=3, group_size=64)
        >>> stored = mx.dequantize(codes, scales, biases, group_size=64, bits=3)
    """
    if (bits, group_size) not in Affine.errors:
        found = sorted({b for b, _ in Affine.errors}), sorted({g for _, g in Affine.errors})
        known = "; ".join(f"{w}: {', '.join(map(str, v))}" for w, v in zip(("bits", "group sizes"), found, strict=True))
        raise RotorError(f"no affine format of {bits} bits in groups of {group_size}; {known}")
    if fit not in FITS:
        raise RotorError(f"unknown fit {fit!r}; fits: {', '.join(FITS)}")
    Affine(bits, group_size).check_weights(w)
    return _parts(w, bits, group_size, fit, importance, dtype)


def _parts(w: mx.array, bits: int, group_size: int, fit: str, importance: mx.array | None, dtype: mx.Dtype) -> Parts:
    def work(rows: mx.array, heeded: mx.array | None) -> tuple[mx.array, ...]:
        if fit == "fast":
            return tuple(mx.quantize(rows.astype(dtype), group_size, bits))
        return _fitted(rows, bits, group_size, EFFORTS[fit][bits], heeded, dtype)

    codes, scales, biases = by_chunks(w, importance, work)
    return codes, scales, biases


def _fitted(
    rows: mx.array, bits: int, group_size: int, effort: Effort, importance: mx.array | None, dtype: mx.Dtype
) -> Parts:
    """Of rows [R, K] with an importance [R or 1, K]."""
    _, scale, bias = mx.quantize(rows.astype(dtype), group_size, bits)
    groups = Groups.of(
        by_groups(rows.astype(mx.float32), group_size),
        None if importance is None else by_groups(importance, group_size),
        dtype,
    )
    scale, bias, codes = search(groups, (scale[None].astype(mx.float32), bias[None].astype(mx.float32)), bits, effort)
    return pack_groups(codes, bits), scale[0], bias[0]


class AffineGrid:
    """A group's grid for error feedback: scale * code + bias, both in bf16."""

    def __init__(self, bits: int, fit: str, dtype: mx.Dtype = mx.bfloat16) -> None:
        self.bits, self.top, self.dtype = bits, 2**bits - 1, dtype
        self.effort = EFFORTS[fit][bits]

    def fitted(self, wanted: mx.array, importance: mx.array) -> Stored:
        _, scale, bias = mx.quantize(wanted.T.astype(self.dtype), wanted.shape[0], self.bits)
        plain = scale.T.astype(mx.float32), bias.T.astype(mx.float32)
        scale, bias, _ = search(Groups.of(wanted, importance, self.dtype), plain, self.bits, self.effort)
        return scale.astype(mx.float32), bias.astype(mx.float32)

    def nearest(self, x: mx.array, stored: Stored) -> mx.array:
        scale, bias = stored
        return nearest(x - bias, scale, self.top)

    def values(self, codes: mx.array, stored: Stored) -> mx.array:
        scale, bias = stored
        return scale * codes + bias

    def refitted(self, codes: mx.array, slope: mx.array, inner: mx.array, stored: Stored) -> Stored:
        scale, bias = stored
        curved = inner @ codes
        cc = (codes * curved).sum(axis=0, keepdims=True)
        c1, c_slope = curved.sum(axis=0, keepdims=True), (codes * slope).sum(axis=0, keepdims=True)
        one = mx.maximum(inner.sum(), NO_CURVATURE)
        one_slope = slope.sum(axis=0, keepdims=True)
        step = (c_slope - c1 * one_slope / one) / mx.maximum(cc - c1 * c1 / one, NO_CURVATURE)
        new = rounded(scale + step, self.dtype)
        step = new - scale
        shifted = rounded(bias + (one_slope - step * c1) / one, self.dtype)
        shift = shifted - bias
        change = (
            step * step * cc + 2 * step * shift * c1 + shift * shift * one - 2 * (step * c_slope + shift * one_slope)
        )
        gains = mx.logical_and(change < 0, new * scale > 0)
        return mx.where(gains, new, scale), mx.where(gains, shifted, bias)

    def lengthened(self, stored: Stored, factor: mx.array) -> Stored:
        return stored

    def packed(self, codes: Sequence[mx.array], stored: Sequence[Stored]) -> tuple[mx.array, ...]:
        scales, biases = (mx.concatenate(list(part)).T.astype(self.dtype) for part in zip(*stored, strict=True))
        return pack_groups(mx.stack(list(codes), axis=2), self.bits), scales, biases
