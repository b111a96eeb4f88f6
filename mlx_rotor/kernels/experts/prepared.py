"""Launches with packed weights, planned once for inputs of one shape and dtype: later calls hand over arrays only.

A layer makes the same launches for every token, and Python has to be done with all layers while a GPU does one token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from .. import metal
from ..weights import PackedWeight

Made = Callable[..., list[mx.array]]


class Launch:
    """A kernel, its weights and what MLX needs to know of a launch. Called with the arrays before the weights."""

    __slots__ = ("_era", "_how", "_made", "_short", "_weights")

    def __init__(
        self,
        made: Made,
        weights: Sequence[PackedWeight],
        shape: tuple[int, ...],
        dtype: mx.Dtype,
        grid: tuple[int, int, int],
        threads: int,
    ) -> None:
        """`shape` and `dtype`: of the result; `grid`: in threads, as MLX has it; `threads`: of a threadgroup."""
        self._era = _era()
        self._made = made
        self._weights = [array for w in weights for array in arrays_of(w)]
        self._short = any(array.size < 8 for array in self._weights)
        self._how = {
            "output_shapes": [shape],
            "output_dtypes": [dtype],
            "grid": grid,
            "threadgroup": (threads, 1, 1),
        }

    def __call__(self, *arrays: mx.array) -> mx.array:
        weights = [roomy(array) for array in self._weights] if self._short else self._weights
        (out,) = self._made(inputs=[*arrays, *weights], **self._how)
        return out

    def stale(self) -> bool:
        """Whether kernels are made otherwise than when this was planned."""
        return self._era is not _era()


class PairLaunch(Launch):
    """One with the weights of two: kept by the first, good as long as the second is `other`."""

    __slots__ = ("other",)
    other: PackedWeight


def arrays_of(w: PackedWeight) -> list[mx.array]:
    return [*w.parts] if w.bias is None else [*w.parts, w.bias]


def names_of(prefix: str, w: PackedWeight) -> list[str]:
    """The kernel's names of `arrays_of`."""
    names = [f"{prefix}{name}" for name in ("codes", "first", "second")[: len(w.parts)]]
    return names if w.bias is None else [*names, f"{prefix}bias"]


def roomy(array: mx.array) -> mx.array:
    """Longer where it has fewer than eight elements, which MLX would pass in constant memory."""
    return array if array.size >= 8 else mx.pad(array.flatten(), (0, 8 - array.size))


def pointer(names: Sequence[str], name: str, instead: str) -> str:
    """An argument of the call line: the input, or something to stand for it where there is none."""
    return name if name in names else instead


@metal.kept
def _era() -> object:
    """Another object after kernels came to be made otherwise."""
    return object()
