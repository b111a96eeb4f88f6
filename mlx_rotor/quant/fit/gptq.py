"""Codes that make up for one another's errors on a layer's inputs: error feedback, then descent.

Feedback is GPTQ's (Frantar et al. 2022), in the left-looking form of its LDL decomposition (QuIP, Chee et al. 2023),
with each group's scale and bias fitted when the sweep reaches it. Descent moves codes, then scales and biases, one
group at a time, to where the rest as it is leaves the least error. Weights are held transposed, [K, R].
"""

from __future__ import annotations

import mlx.core as mx

from ...errors import RotorError
from .affine import EFFORTS, Parts, check
from .groups import Groups, nearest
from .hessian import Hessian
from .packing import pack_groups
from .search import Effort, Grid, search

SWEEPS = {"search": 0, "best": 3}  # of descent
NO_CURVATURE = 1e-30


def fit_hessian(
    w: mx.array, hessian: Hessian, *, bits: int, group_size: int, fit: str, dtype: mx.Dtype = mx.bfloat16
) -> Parts:
    """Weights [R, K], finite, as `fit_affine` returns them, for the least error e H e^T of each row. Deterministic.

    `search` is one sweep of feedback; `best` descends from there.

    Raises:
        RotorError: shapes that don't go together; a Hessian that isn't positive definite.
    """
    check(w, bits, group_size)
    if w.ndim != 2 or w.shape[1] != hessian.size:
        raise RotorError(f"a Hessian of {hessian.size} inputs fits weights [rows, {hessian.size}], not {w.shape}")
    state = _Sweep(w.astype(mx.float32).T, hessian, bits, group_size, dtype)
    state.feed_back(fit)
    state.descend(SWEEPS[fit])
    codes = pack_groups(mx.stack(state.codes, axis=2), bits)
    scales, biases = (mx.concatenate(part).T.astype(dtype) for part in (state.scales, state.biases))
    mx.eval(codes, scales, biases)
    return codes, scales, biases


class _Sweep:
    """A fit in progress, all float32; of each group `codes` [g, R], `scales` and `biases` [1, R] as they are stored.

    `errors`: [K, R], w less what is stored.
    """

    def __init__(self, w: mx.array, hessian: Hessian, bits: int, group_size: int, dtype: mx.Dtype) -> None:
        self.w, self.hessian, self.bits, self.dtype = mx.contiguous(w), hessian, bits, dtype
        self.top = 2**bits - 1
        self.blocks = [slice(start, start + group_size) for start in range(0, w.shape[0], group_size)]
        self.codes: list[mx.array] = []
        self.scales: list[mx.array] = []
        self.biases: list[mx.array] = []
        self.errors = self.w

    def feed_back(self, fit: str) -> None:
        feedback, effort = self.hessian.feedback, EFFORTS[fit][self.bits]
        importance = mx.diagonal(self.hessian.damped)[:, None]
        errors: list[mx.array] = []
        for block in self.blocks:
            wanted = self.w[block]
            if errors:
                wanted = wanted + feedback[: block.start, block].T @ mx.concatenate(errors)
            scale, bias = self._grid(wanted, importance[block], effort)
            codes, error = self._code(self.w[block], wanted, feedback[block, block], scale, bias)
            mx.eval(codes, error, scale, bias)
            self.codes.append(codes)
            self.scales.append(scale)
            self.biases.append(bias)
            errors.append(error)
        self.errors = mx.concatenate(errors)

    def _grid(self, wanted: mx.array, importance: mx.array, effort: Effort) -> Grid:
        _, scale, bias = mx.quantize(wanted.T.astype(self.dtype), wanted.shape[0], self.bits)
        groups = Groups.of(wanted, importance, self.dtype)
        plain = scale.T.astype(mx.float32), bias.T.astype(mx.float32)
        scale, bias, _ = search(groups, plain, self.bits, effort)
        return scale.astype(mx.float32), bias.astype(mx.float32)

    def _code(
        self, w: mx.array, wanted: mx.array, feedback: mx.array, scale: mx.array, bias: mx.array
    ) -> tuple[mx.array, mx.array]:
        """(codes, errors) [g, R] of a group, each row of it after feedback from those before."""
        codes, errors = [], []
        for i in range(w.shape[0]):
            code = nearest(wanted[:1] - bias, scale, self.top)
            error = w[i : i + 1] - (scale * code + bias)
            wanted = wanted[1:] + feedback[i, i + 1 :, None] * error
            codes.append(code)
            errors.append(error)
        return mx.concatenate(codes), mx.concatenate(errors)

    def descend(self, sweeps: int) -> None:
        h = self.hessian.damped
        errors = mx.split(self.errors, len(self.blocks))
        slopes = h @ self.errors if sweeps else self.errors  # half the gradient of the error, [K, R]
        for _ in range(sweeps):
            for number, block in enumerate(self.blocks):
                inner, slope, error = h[block, block], slopes[block], errors[number]
                scale, bias = self.scales[number], self.biases[number]
                codes = self._recode(self.w[block], error, slope, inner, scale, bias)
                moved = self.w[block] - (scale * codes + bias)
                scale, bias = self._refit(codes, slope + inner @ (moved - error), inner, scale, bias)
                errors[number] = self.w[block] - (scale * codes + bias)
                slopes = slopes + h[:, block] @ (errors[number] - error)
                mx.eval(slopes, codes, scale, bias, errors[number])
                self.codes[number], self.scales[number], self.biases[number] = codes, scale, bias

    def _recode(
        self, w: mx.array, error: mx.array, slope: mx.array, inner: mx.array, scale: mx.array, bias: mx.array
    ) -> mx.array:
        """Codes [g, R] of a group, each in turn where it leaves the least."""
        codes = []
        for i in range(w.shape[0]):
            now, here = error[i : i + 1], w[i : i + 1]
            wanted = here - now + slope[:1] / inner[i, i]
            code = nearest(wanted - bias, scale, self.top)
            moved = here - (scale * code + bias)
            slope = slope[1:] + inner[i, i + 1 :, None] * (moved - now)
            codes.append(code)
        return mx.concatenate(codes)

    def _refit(
        self, codes: mx.array, slope: mx.array, inner: mx.array, scale: mx.array, bias: mx.array
    ) -> tuple[mx.array, mx.array]:
        """(scale, bias) that fit the codes best under H, as stored; the old ones where rounding eats the gain."""
        curved = inner @ codes
        cc = (codes * curved).sum(axis=0, keepdims=True)
        c1, c_slope = curved.sum(axis=0, keepdims=True), (codes * slope).sum(axis=0, keepdims=True)
        one = mx.maximum(inner.sum(), NO_CURVATURE)
        one_slope = slope.sum(axis=0, keepdims=True)
        step = (c_slope - c1 * one_slope / one) / mx.maximum(cc - c1 * c1 / one, NO_CURVATURE)
        new = self._stored(scale + step)
        step = new - scale
        shifted = self._stored(bias + (one_slope - step * c1) / one)
        shift = shifted - bias
        change = (
            step * step * cc + 2 * step * shift * c1 + shift * shift * one - 2 * (step * c_slope + shift * one_slope)
        )
        gains = mx.logical_and(change < 0, new * scale > 0)
        return mx.where(gains, new, scale), mx.where(gains, shifted, bias)

    def _stored(self, x: mx.array) -> mx.array:
        return x.astype(self.dtype).astype(mx.float32)
