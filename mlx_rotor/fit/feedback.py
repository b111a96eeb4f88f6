"""Codes that make up for one another's errors on a layer's inputs: error feedback, then descent.

Feedback is that of GPTQ (Frantar et al. 2022), in the left-looking form of its LDL decomposition (QuIP, Chee et al.
2023); each group's grid is fitted when the sweep reaches it. Descent then moves the codes and the grid of one group at
a time to where, all other groups as they are, the least error remains. Weights are held transposed, [K, R].
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import mlx.core as mx

from ..errors import RotorError

# Added to the diagonal, as shares. Of an entry itself: moments of few inputs make too much of correlations. Of the mean
# entry, tried in turn until the matrix is positive definite.
OWN = 0.05
DAMPINGS = (0.005, 0.02, 0.1, 0.5, 2.0)


class Hessian:
    """H [K, K], the mean of x x^T over inputs x, float32: weights that differ by e from what is stored cost e H e^T.

    Factorised once, when first needed. An input that is always zero has a zero row and column: it decouples from the
    others, and damping alone counts it.
    """

    def __init__(self, matrix: mx.array) -> None:
        """RotorError where it is not square, not finite, or has a negative or only a zero diagonal."""
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise RotorError(f"a Hessian is square, [K, K]; got {matrix.shape}")
        self.matrix = matrix.astype(mx.float32)
        diagonal = mx.diagonal(self.matrix)
        if not mx.isfinite(self.matrix).all().item():
            raise RotorError(
                "the Hessian has values that are not finite: the activations it was measured on overflowed"
            )
        if not mx.logical_and(diagonal >= 0, diagonal.max() > 0).all().item():
            raise RotorError("the Hessian's diagonal is negative or all zero: it was not measured on any inputs")
        self.size = self.matrix.shape[0]

    @cached_property
    def damped(self) -> mx.array:
        """H with the damping that made it positive definite."""
        return self._factorised[0]

    @cached_property
    def feedback(self) -> mx.array:
        """U [K, K] of damped = U D U^T, upper triangular with ones on its diagonal.

        e damped e^T is then the sum over columns i of D[i] ((e U)[i])^2, and (e U)[i] depends on e[:i+1] alone:
        column i makes up for the errors of those before it.
        """
        return self._factorised[1]

    @cached_property
    def _factorised(self) -> tuple[mx.array, mx.array]:
        """(damped, feedback)."""
        diagonal = mx.diagonal(self.matrix)
        for damping in DAMPINGS:
            damped = self.matrix + mx.diag(OWN * diagonal + damping * diagonal.mean())
            # The Cholesky factor of the matrix read backwards is the upper triangular one read backwards.
            factor = mx.linalg.cholesky(damped[::-1, ::-1], stream=mx.cpu)[::-1, ::-1]
            mx.eval(damped, factor)
            pivots = mx.diagonal(factor)
            # Where it isn't positive definite LAPACK stops at a pivot that is not above zero, and MLX doesn't say.
            if mx.logical_and(pivots > 0, mx.isfinite(factor).all(axis=0)).all().item():
                return damped, factor / pivots
        raise RotorError(
            f"the Hessian [{self.size}, {self.size}] is not positive definite even with {DAMPINGS[-1]:g} times "
            "the mean of its diagonal added: it isn't a matrix of second moments; calibrate again"
        )


NO_CURVATURE = 1e-30
Stored = tuple[mx.array, ...]  # float32 [m, R] each, of values that the stored dtype has


class Grid(Protocol):
    """How a format stores one group of weights of every row, for error feedback. Weights are held transposed, [g, R].

    Codes are float32 or uint32 [.., R], whatever `nearest` makes of weights; only `packed` looks into them.
    """

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
        """The grid with values a factor [1, R] as large, where the format lengthens its levels; else the same grid."""

    def packed(self, codes: Sequence[mx.array], stored: Sequence[Stored]) -> tuple[mx.array, ...]:
        """What a reader takes, [R, ..] each, of all groups in their order."""


def rounded(x: mx.array, dtype: mx.Dtype) -> mx.array:
    """The float32 values nearest x that `dtype` has."""
    return x.astype(dtype).astype(mx.float32)


LONGEST = 2.0  # of factors on levels; groups of a few far weights and many small ones lack the most
SWEEPS = {"search": 0, "best": 3}  # of descent
NOTHING = 1e-30


def fit_hessian(w: mx.array, hessian: Hessian, group_size: int, grid: Grid, fit: str) -> tuple[mx.array, ...]:
    """Weights [R, K], finite, as what is stored of them, for the least error e H e^T of each row. Deterministic.

    `search` is one sweep of feedback; `best` descends from there. Formats that lengthen their levels do so row by row:
    outputs along the exact ones then keep their length. Evaluates what it returns.

    Raises:
        RotorError: shapes that don't go together; a Hessian that isn't positive definite.
    """
    if w.ndim != 2 or w.shape[1] != hessian.size:
        raise RotorError(f"a Hessian of {hessian.size} inputs fits weights [rows, {hessian.size}], not {w.shape}")
    sweep = Sweep(w.astype(mx.float32).T, hessian, group_size, grid)
    sweep.feed_back()
    sweep.descend(SWEEPS[fit])
    factor = sweep.lacking()
    parts = sweep.grid.packed(sweep.codes, [sweep.grid.lengthened(stored, factor) for stored in sweep.stored])
    mx.eval(parts)
    return parts


class Sweep:
    """A fit in progress, all float32; of each group `codes` [g, R] and what is `stored` beside them.

    `errors`: [K, R], w less what is stored.
    """

    def __init__(self, w: mx.array, hessian: Hessian, group_size: int, grid: Grid) -> None:
        self.w, self.hessian, self.grid = mx.contiguous(w), hessian, grid
        self.blocks = [slice(start, start + group_size) for start in range(0, w.shape[0], group_size)]
        self.codes: list[mx.array] = []
        self.stored: list[Stored] = []
        self.errors = self.w

    def feed_back(self) -> None:
        feedback = self.hessian.feedback
        importance = mx.diagonal(self.hessian.damped)[:, None]
        errors: list[mx.array] = []
        for block in self.blocks:
            wanted = self.w[block]
            if errors:
                wanted = wanted + feedback[: block.start, block].T @ mx.concatenate(errors)
            stored = self.grid.fitted(wanted, importance[block])
            codes, error = self._code(self.w[block], wanted, feedback[block, block], stored)
            mx.eval(codes, error, stored)
            self.codes.append(codes)
            self.stored.append(stored)
            errors.append(error)
        self.errors = mx.concatenate(errors)

    def _code(self, w: mx.array, wanted: mx.array, feedback: mx.array, stored: Stored) -> tuple[mx.array, mx.array]:
        """(codes, errors) [g, R] of a group, each row of it after feedback from those before."""
        codes, errors = [], []
        for i in range(w.shape[0]):
            code = self.grid.nearest(wanted[:1], stored)
            error = w[i : i + 1] - self.grid.values(code, stored)
            wanted = wanted[1:] + feedback[i, i + 1 :, None] * error
            codes.append(code)
            errors.append(error)
        return mx.concatenate(codes), mx.concatenate(errors)

    def descend(self, sweeps: int) -> None:
        h = self.hessian.damped
        errors = list(mx.split(self.errors, len(self.blocks)))
        slopes = h @ self.errors if sweeps else self.errors  # half the gradient of the error, [K, R]
        for _ in range(sweeps):
            for number, block in enumerate(self.blocks):
                inner, slope, error = h[block, block], slopes[block], errors[number]
                stored = self.stored[number]
                codes = self._recode(self.w[block], error, slope, inner, stored)
                moved = self.w[block] - self.grid.values(codes, stored)
                stored = self.grid.refitted(codes, slope + inner @ (moved - error), inner, stored)
                errors[number] = self.w[block] - self.grid.values(codes, stored)
                slopes = slopes + h[:, block] @ (errors[number] - error)
                mx.eval(slopes, codes, stored, errors[number])
                self.codes[number], self.stored[number] = codes, stored
        self.errors = mx.concatenate(errors)

    def lacking(self) -> mx.array:
        """The factor [1, R] on a row that leaves its outputs all of their length along the exact ones."""
        seen = self.hessian.damped @ self.w
        whole, short = ((x * seen).sum(axis=0, keepdims=True) for x in (self.w, self.errors))
        return mx.where(whole > 0, mx.clip(whole / mx.maximum(whole - short, NOTHING), 1 / LONGEST, LONGEST), 1)

    def _recode(self, w: mx.array, error: mx.array, slope: mx.array, inner: mx.array, stored: Stored) -> mx.array:
        """Codes [g, R] of a group, each in turn where it leaves the least."""
        codes = []
        for i in range(w.shape[0]):
            now, here = error[i : i + 1], w[i : i + 1]
            code = self.grid.nearest(here - now + slope[:1] / inner[i, i], stored)
            moved = here - self.grid.values(code, stored)
            slope = slope[1:] + inner[i, i + 1 :, None] * (moved - now)
            codes.append(code)
        return mx.concatenate(codes)
