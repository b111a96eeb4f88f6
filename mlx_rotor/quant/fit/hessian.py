"""Second moments of a layer's inputs, factorised for error feedback."""

from __future__ import annotations

from functools import cached_property

import mlx.core as mx

from ...errors import RotorError

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
