"""How a group of weights is stored, for error feedback: its grid of values, one group of every row at a time.

Weights are held transposed, [g, R]. Knows nothing of feedback and its order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx

from ..spec import Spec
from . import affine, lloyd
from .iq4_nl import EFFORTS as IQ4_NL_EFFORTS
from .iq4_nl import Iq4NlLevels
from .packing import pack, pack_groups
from .q8 import EFFORTS as Q8_EFFORTS
from .q8 import Q8Levels
from .rows import HALF_MAX, check
from .scaled import Effort, Levels, on_grid, scale_of
from .search import Groups, nearest, search

SCALED: dict[str, tuple[Levels, dict[str, Effort | None]]] = {
    "iq4_nl": (Iq4NlLevels(), IQ4_NL_EFFORTS),
    "q8": (Q8Levels(), Q8_EFFORTS),
}
NO_CURVATURE = 1e-30
Stored = tuple[mx.array, ...]  # float32 [m, R] each, of values that the stored dtype has


class Grid(Protocol):
    """Codes are float32 or uint32 [.., R], whatever `nearest` makes of weights; only `packed` looks into them."""

    def fitted(self, wanted: mx.array, importance: mx.array) -> Stored:
        """The grid for weights [g, R] of least squared error, each counted as importance [g, 1] says."""

    def nearest(self, x: mx.array, stored: Stored) -> mx.array:
        """Codes [m, R] whose values are closest to x [m, R]."""

    def values(self, codes: mx.array, stored: Stored) -> mx.array:
        """Of codes [m, R], float32."""

    def refitted(self, codes: mx.array, slope: mx.array, inner: mx.array, stored: Stored) -> Stored:
        """The grid that suits codes [g, R] under a Hessian `inner` [g, g], by `slope` [g, R], H times what weights
        differ from their values by; the old one where rounding eats the gain."""

    def lengthened(self, stored: Stored, factor: mx.array) -> Stored:
        """The grid whose values are a factor [1, R] as large, where that is what the mode is for; else the same."""

    def packed(self, codes: Sequence[mx.array], stored: Sequence[Stored]) -> tuple[mx.array, ...]:
        """What a reader takes, [R, ..] each, of all groups in their order."""


class AffineGrid:
    """scale * code + bias, in bf16."""

    def __init__(self, spec: Spec, fit: str, dtype: mx.Dtype = mx.bfloat16) -> None:
        self.bits, self.top, self.dtype = spec.bits, 2**spec.bits - 1, dtype
        self.effort = affine.EFFORTS[fit][spec.bits]

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
        new = _rounded(scale + step, self.dtype)
        step = new - scale
        shifted = _rounded(bias + (one_slope - step * c1) / one, self.dtype)
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


class LloydGrid:
    """2**bits levels, float16, ascending; a code is a level's number."""

    def __init__(self, spec: Spec, fit: str) -> None:
        self.bits, self.fit = spec.bits, fit

    def fitted(self, wanted: mx.array, importance: mx.array) -> Stored:
        groups = Groups.of(wanted, importance, mx.float16)
        return (lloyd.levels_of(groups, self.bits, self.fit, whole=False) * groups.unit,)

    def nearest(self, x: mx.array, stored: Stored) -> mx.array:
        return lloyd.nearest(x, stored[0])

    def values(self, codes: mx.array, stored: Stored) -> mx.array:
        return mx.take_along_axis(stored[0], codes, axis=0)

    def refitted(self, codes: mx.array, slope: mx.array, inner: mx.array, stored: Stored) -> Stored:
        """Level by level, each between its neighbours."""
        levels = list(mx.split(stored[0], stored[0].shape[0]))
        for number, level in enumerate(levels):
            here = (codes == number).astype(mx.float32)
            curved = inner @ here
            curvature, pull = ((here * x).sum(axis=0, keepdims=True) for x in (curved, slope))
            new = level + pull / mx.maximum(curvature, NO_CURVATURE)
            if number:
                new = mx.maximum(new, levels[number - 1])
            if number + 1 < len(levels):
                new = mx.minimum(new, levels[number + 1])
            step = _rounded(new, mx.float16) - level
            step = mx.where(step * (step * curvature - 2 * pull) < 0, step, 0)
            levels[number], slope = level + step, slope - step * curved
        return (mx.concatenate(levels),)

    def lengthened(self, stored: Stored, factor: mx.array) -> Stored:
        return (_rounded(mx.clip(stored[0] * factor, -HALF_MAX, HALF_MAX), mx.float16),)

    def packed(self, codes: Sequence[mx.array], stored: Sequence[Stored]) -> tuple[mx.array, ...]:
        books = mx.stack([levels for (levels,) in stored], axis=0).astype(mx.float16)  # [groups, k, R]
        return pack_groups(mx.stack(list(codes), axis=2), self.bits), books.reshape(-1, books.shape[-1]).T


class ScaledGrid:
    """scale * level, a float16 scale and fixed levels; a code is the level itself."""

    def __init__(self, levels: Levels, effort: Effort | None) -> None:
        self.levels, self.effort = levels, effort

    def fitted(self, wanted: mx.array, importance: mx.array) -> Stored:
        groups = Groups.of(wanted, importance, mx.float16)
        return (scale_of(groups, self.levels, self.effort) * groups.unit,)

    def nearest(self, x: mx.array, stored: Stored) -> mx.array:
        return on_grid(x, stored[0], self.levels)

    def values(self, codes: mx.array, stored: Stored) -> mx.array:
        return stored[0] * codes

    def refitted(self, codes: mx.array, slope: mx.array, inner: mx.array, stored: Stored) -> Stored:
        curvature, pull = ((codes * x).sum(axis=0, keepdims=True) for x in (inner @ codes, slope))
        step = _rounded(stored[0] + pull / mx.maximum(curvature, NO_CURVATURE), mx.float16) - stored[0]
        return (mx.where(step * (step * curvature - 2 * pull) < 0, stored[0] + step, stored[0]),)

    def lengthened(self, stored: Stored, factor: mx.array) -> Stored:
        return stored

    def packed(self, codes: Sequence[mx.array], stored: Sequence[Stored]) -> tuple[mx.array, ...]:
        words = pack(self.levels.codes(mx.concatenate(list(codes))).T, self.levels.bits)
        return words, mx.concatenate([scale for (scale,) in stored]).astype(mx.float16).T


def grid_of(w: mx.array, spec: Spec, fit: str) -> Grid:
    """For weights [.., K] and a spec whose mode leaves something to choose, with the effort of a fit.

    RotorError where the weights have no such form.
    """
    if spec.mode == "affine":
        affine.check(w, spec.bits, spec.group_size)
        return AffineGrid(spec, fit)
    if spec.mode == "lloyd":
        check(w, spec.mode, spec.bits, spec.group_size, HALF_MAX)
        return LloydGrid(spec, fit)
    levels, efforts = SCALED[spec.mode]
    check(w, spec.mode, spec.bits, spec.group_size, HALF_MAX * levels.most)
    return ScaledGrid(levels, efforts[fit])


def _rounded(x: mx.array, dtype: mx.Dtype) -> mx.array:
    return x.astype(dtype).astype(mx.float32)
