"""A layer's experts in two launches, for as many tokens as are decoded at once; the weighted sum is part of the second.

A model's own code computes the weighted sum. `ExpertOutput` recognizes it: a real, lazy array of each expert's output
that becomes the second launch, with weights, when it is multiplied by one weight an expert and summed over the experts.
Any other use of it is an ordinary array operation, correct and slower.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx

from ..kernels import experts as kernels
from ..kernels.spec import PackedWeight
from . import formats

MAX_ROWS = kernels.MAX_ROWS


@dataclass
class Counts:
    """What became of the calls of one layer's experts.

    Attributes:
        fused: calls through the kernels, for MAX_ROWS tokens at most.
        summed: of these, those whose weighted sum was part of the launch; routed: those whose router was a kernel.
        tiled: calls for more tokens through the tiled kernels.
        stock: calls left to mlx_lm's own path, for more tokens or because the weights were changed to others.
    """

    fused: int = 0
    summed: int = 0
    routed: int = 0
    stock: int = 0
    tiled: int = 0


@dataclass(frozen=True)
class FusedExperts:
    """The three projections of a layer, each a stack [E, N, K], and what is between them."""

    gate: PackedWeight
    up: PackedWeight
    down: PackedWeight
    activation: str

    @cached_property
    def tiled(self) -> bool:
        """Whether all are in our formats, which tiled kernels read; MLX has its own for its own."""
        return all(w.format.mode in formats.ours() for w in (self.gate, self.up, self.down))

    def hidden(self, x: mx.array, indices: mx.array) -> mx.array:
        """x [.., K] of the experts `indices` [.., k]: [.., k, N], the input of the last projection, in x's dtype."""
        return kernels.gate_up(x, self.gate, self.up, indices, self.activation)

    def output(self, hidden: mx.array, indices: mx.array, weights: mx.array | None = None) -> mx.array:
        """[.., M], the sum over experts times `weights` [.., k] or [.., k, 1]; without, [.., k, M]."""
        return kernels.down(hidden, self.down, indices, weights)

    def weighted(self, x: mx.array, indices: mx.array, weights: mx.array) -> mx.array:
        """x [.., K] through its experts `indices` [.., k] and their sum times `weights` [.., k]: [.., M]."""
        return self.output(self.hidden(x, indices), indices, weights)

    def many(self, x: mx.array, indices: mx.array, activation: Callable[[mx.array, mx.array], mx.array]) -> mx.array:
        """x [.., K] of any number of tokens through their experts `indices` [.., k]: [.., k, M].

        Args:
            activation: of up's and gate's products, as mlx_lm's layers call theirs.
        """
        chosen = indices.flatten()
        order = mx.argsort(chosen)
        chosen, rows = chosen[order], order // indices.shape[-1]
        x = x.reshape(-1, x.shape[-1])
        gate = kernels.gather(x, self.gate, chosen, rows=rows)
        hidden = activation(kernels.gather(x, self.up, chosen, rows=rows), gate)
        return kernels.gather(hidden, self.down, chosen, places=order).reshape(*indices.shape, -1)


@dataclass(slots=True)  # made for every layer and token: quicker than a frozen one
class _Call:
    """Behind one `ExpertOutput`."""

    experts: FusedExperts
    hidden: mx.array
    indices: mx.array
    counts: Counts

    def sum(self, weights: mx.array) -> mx.array:
        """[.., M] of weights [.., k, 1]."""
        self.counts.summed += 1
        return self.experts.output(self.hidden, self.indices, weights)


class ExpertOutput(mx.array):
    """A lazy [.., k, M]: what each of a token's experts made of it."""

    call: _Call

    def __mul__(self, other: Any) -> mx.array:
        return self._times(other, mx.array.__mul__(self, other))

    def __rmul__(self, other: Any) -> mx.array:
        return self._times(other, mx.array.__rmul__(self, other))

    def _times(self, other: Any, product: mx.array) -> mx.array:
        if not isinstance(other, mx.array) or other.shape != (*self.shape[:-1], 1):
            return product
        weighted = _Weighted(product)
        weighted.call, weighted.weights = self.call, other
        return weighted


class _Weighted(mx.array):
    """A lazy [.., k, M]: `ExpertOutput` times a weight for each expert."""

    call: _Call
    weights: mx.array

    def sum(self, axis: Any = None, keepdims: bool = False, **kwargs: Any) -> mx.array:
        if axis not in (-2, self.ndim - 2) or keepdims or kwargs.get("stream") is not None:
            return mx.array.sum(self, axis, keepdims, **kwargs)
        out = self.call.sum(self.weights)
        if out.dtype == self.dtype:
            return out
        cast = _Cast(out.astype(self.dtype))
        cast.uncast = out
        return cast


class _Cast(mx.array):
    """A lazy sum in the dtype that its weights make it, which models cast back: that is the sum as it was."""

    uncast: mx.array

    def astype(self, dtype: mx.Dtype, stream: Any = None) -> mx.array:
        return self.uncast if dtype == self.uncast.dtype and stream is None else mx.array.astype(self, dtype, stream)


def run(experts: FusedExperts, x: mx.array, indices: mx.array, counts: Counts) -> ExpertOutput:
    """x [.., K] of MAX_ROWS tokens at most through the experts `indices` [.., k] of each: [.., k, M] in x's dtype."""
    counts.fused += 1
    hidden = experts.hidden(x, indices)
    made = ExpertOutput(experts.output(hidden, indices))
    made.call = _Call(experts, hidden, indices, counts)
    return made
