"""Means that were taken off vectors: which mean a token has, and how a kernel is told. Knows no cache."""

from __future__ import annotations

import mlx.core as mx

from ..errors import RotorError
from .spec import KernelCodec
from .tiles import TILE


def check_means(codec: KernelCodec, shape: tuple[int, ...], mean: mx.array | None, first: int, span: int) -> None:
    """Raises RotorError for means [B, H, groups, D] that don't fit n tokens of `shape` [B, H, n, D] from `first` on."""
    if mean is None:
        return
    b, h, n, d = shape
    if not codec.scaled:
        raise RotorError(f"codec {codec.name} takes no means: its vectors have no scale of their own")
    if first % TILE or span % TILE or first < 0 or span < 0:
        raise RotorError(f"means start at token {first} and span {span}; both must be multiples of {TILE} from 0")
    groups = (first + max(n, 1) - 1) // span + 1 if span else 1
    fits = mean.ndim == 4 and (*mean.shape[:2], mean.shape[3]) == (b, h, d)
    if not fits or mean.shape[2] < groups or (span == 0 and mean.shape[2] > 1) or mean.dtype != mx.float16:
        raise RotorError(
            f"means are {mean.dtype} {list(mean.shape)}; tokens {first} to {first + n} of {[b, h, n, d]} with a span "
            f"of {span} need float16 [{b}, {h}, {'at least ' if span else ''}{groups}, {d}]"
        )


def names(mean: mx.array | None) -> tuple[str, ...]:
    """Names of a kernel's inputs that hold the means."""
    return () if mean is None else ("mean", "spans")


def inputs(mean: mx.array | None, first: int, span: int) -> list[mx.array]:
    return [] if mean is None else [mean, mx.array([first, span], mx.int32)]


def argument(mean: mx.array | None) -> str:
    """What the call line passes."""
    return "NoMean()" if mean is None else "mean_of(mean, mean_strides, spans)"
