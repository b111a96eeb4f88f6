"""Products with packed weights, and a layer's experts: each operation runs its kernel or its reference."""

from __future__ import annotations

import mlx.core as mx

from .. import check_results
from ..launch import backend
from ..spec import PackedWeight
from . import reference, tiles
from .few_rows import down_metal, gate_up_metal, matvec
from .reference import ACTIVATIONS

__all__ = ["ACTIVATIONS", "MAX_ROWS", "down", "gate_up", "gather", "gather_unsorted", "matmul"]

MAX_ROWS = 8  # rows that kernels for few rows take; more rows are sorted and tiled


def matmul(x: mx.array, w: PackedWeight) -> mx.array:
    """x [.., K] times the transpose of w [N, K], plus its bias: [.., N] in x's dtype.

    Raises:
        RotorError: for shapes or a dtype that the kernels do not take, or if they failed their check on this machine.
    """
    if backend() == "reference":
        return reference.matmul(x, w)
    check_results.refuse_weights("matmul", x.dtype, w.format)
    if 0 < x.size <= MAX_ROWS * w.columns:
        return matvec(x, w)
    return tiles.matmul_tiled(x.reshape(-1, x.shape[-1]), w).reshape(*x.shape[:-1], w.rows)


def gather(
    x: mx.array,
    w: PackedWeight,
    indices: mx.array,
    *,
    rows: mx.array | None = None,
    places: mx.array | None = None,
) -> mx.array:
    """Rows of x [T, K], each times its own expert of w [E, N, K], plus its bias: [R, N] in x's dtype.

    Args:
        indices: [R], ascending and below E; the values are not checked.
        rows: [R]: the row of x that each product takes; None: x has R rows, in the order of `indices`.
        places: [R], a permutation: the row of the result of each product; None: in the order of `indices`.

    Raises:
        RotorError: for shapes or a dtype that the kernels do not take, or if they failed their check on this machine.
    """
    if backend() == "reference":
        out = reference.gather(x if rows is None else x[rows], w, indices).astype(x.dtype)
        return out if places is None else out[mx.argsort(places)]
    check_results.refuse_weights("gather", x.dtype, w.format)
    if rows is None and places is None and 0 < x.shape[0] <= MAX_ROWS:
        return down_metal(x[:, None], w, indices[:, None])[:, 0]
    return tiles.gather_tiled(x, w, indices, rows=rows, places=places)


def gather_unsorted(x: mx.array, w: PackedWeight, indices: mx.array) -> mx.array:
    """Tokens x [T, K], each times its experts `indices` [T, k] of w [E, N, K], in any order, plus their biases:
    [T, k, N] in x's dtype. Raises as `gather`."""
    if backend() == "reference":
        return reference.gather(mx.broadcast_to(x[:, None], (*indices.shape, x.shape[-1])), w, indices).astype(x.dtype)
    check_results.refuse_weights("gather", x.dtype, w.format)
    return tiles.gather_unsorted(x, w, indices)


def gate_up(x: mx.array, gate: PackedWeight, up: PackedWeight, indices: mx.array, activation: str) -> mx.array:
    """Tokens x [.., K], MAX_ROWS at most, through both projections of their experts [E, N, K], `indices` [.., k], and
    the activation: [.., k, N] in x's dtype.

    Raises:
        RotorError: for shapes, a dtype or an activation that the kernels do not take, or if they failed their check on
            this machine.
    """
    if backend() == "reference":
        return reference.gate_up(x, gate, up, indices, activation)
    check_results.refuse_weights("gate_up", x.dtype, gate.format, up.format)
    return gate_up_metal(x, gate, up, indices, activation)


def down(h: mx.array, w: PackedWeight, indices: mx.array, weights: mx.array | None = None) -> mx.array:
    """h [.., k, K] of MAX_ROWS tokens at most through its experts' w [E, N, K]: [.., N], the sum over k times `weights`
    [.., k] or [.., k, 1], in h's dtype; without weights [.., k, N].

    Raises:
        RotorError: for shapes or a dtype that the kernels do not take, or if they failed their check on this machine.
    """
    if backend() == "reference":
        return reference.down(h, w, indices, weights)
    check_results.refuse_weights("down", h.dtype, w.format)
    return down_metal(h, w, indices, weights)
