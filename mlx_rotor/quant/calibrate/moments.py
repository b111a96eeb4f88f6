"""Second moments of a matrix's inputs, summed as they pass by."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ...host.cpu_products import by_numpy

# Rows multiplied at a time: 8192 of 3072 inputs are 100 MB.
ROWS = 8192
# A product of 16384 inputs is 1 GiB; beyond, only squares are kept.
WIDEST = 16384


class Moments:
    """Mean squares, and mean outer products where asked for, of inputs x [.., K]; of a stack with one input a matrix
    (`stacked`), x [.., parts, n, K], part by part. All sums are float32."""

    def __init__(self, products: bool, stacked: bool = False) -> None:
        self.wanted, self._stacked = products, stacked  # wanted: products are
        self.rows = 0
        self.peak = 0.0  # largest magnitude
        self._squares: mx.array | None = None  # [parts, K]
        self._products: mx.array | None = None  # [parts, K, K]

    def add(self, x: mx.array) -> None:
        """Evaluates `x` and the sums."""
        inputs = x.shape[-1]
        x = x.astype(mx.float32)
        x = x.moveaxis(-3, 0).reshape(x.shape[-3], -1, inputs) if self._stacked else x.reshape(1, -1, inputs)
        for start in range(0, x.shape[1], ROWS):
            some = x[:, start : start + ROWS]
            squares = mx.sum(some * some, axis=1)
            largest = mx.max(mx.abs(some))
            self._squares = squares if self._squares is None else self._squares + squares
            if self.wanted and inputs <= WIDEST:
                products = _products(some)
                self._products = products if self._products is None else self._products + products
            mx.eval(largest, [s for s in (self._squares, self._products) if s is not None])
            self.peak = max(self.peak, float(np.array(largest)))
        self.rows += x.shape[1]

    def squares(self, part: int = 0) -> mx.array | None:
        """[K] mean squares; None before the first row. An input that all parts share answers for each."""
        if self._squares is None or not self.rows:
            return None
        return self._squares[part % len(self._squares)] / self.rows

    def products(self, part: int = 0) -> mx.array | None:
        """[K, K] mean outer products; None where they weren't asked for, before the first row, or too wide."""
        if self._products is None or not self.rows:
            return None
        return self._products[part % len(self._products)] / self.rows


def _products(x: mx.array) -> mx.array:
    """[parts, n, K] -> [parts, K, K]."""
    if not by_numpy():
        return x.swapaxes(-1, -2) @ x
    rows = np.asarray(x)
    return mx.array(np.stack([part.T @ part for part in rows]))
