"""Segments: consecutive tokens that attention reads, exact or packed, with the means that were subtracted from them.

Token order is sink tokens (exact), packed segments, recent tokens (exact); each part may be absent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx

from ..errors import RotorError
from .packed import TILE, Packed, from_tiles
from .spec import Codec, KernelSpec, spec_of

ONE_MEAN = 1 << 24  # tiles that share a mean where all do


@dataclass(frozen=True)
class ExactSegment:
    """Tokens kept as they came: k [B, H, length, D], v [B, H, length, Dv], float16, bfloat16 or float32."""

    k: mx.array
    v: mx.array

    @property
    def length(self) -> int:
        return int(self.k.shape[2])

    def keys(self, start: int, stop: int) -> mx.array:
        """Tokens start .. stop, float32 [B, H, stop - start, D]."""
        return self.k[:, :, start:stop].astype(mx.float32)

    def values(self, start: int, stop: int) -> mx.array:
        """Tokens start .. stop, float32 [B, H, stop - start, Dv]."""
        return self.v[:, :, start:stop].astype(mx.float32)

    def rotate_query(self, q: mx.array) -> mx.array:
        return q

    def unrotate_output(self, o: mx.array) -> mx.array:
        return o


@dataclass
class PackedSide:
    """K or V of packed tokens, as whole buffers: kernels read them in place, with the room behind the tokens.

    Attributes:
        codec: what the vectors are encoded with.
        tiles: uint32 [B, H, room / 32, words a tile].
        scale: float16 [B, H, room], one a vector; None where the codec keeps none.
        mean: float16 [B, H, groups, D] in the codec's basis, subtracted from vectors before they were encoded; None
            where nothing was. Token t has mean t // span.
        span: tokens that share a mean, a multiple of 32; 0: one mean for all.
    """

    codec: Codec
    tiles: mx.array
    scale: mx.array | None = None
    mean: mx.array | None = None
    span: int = 0

    def packed(self, start: int, stop: int) -> Packed:
        """Tokens start .. stop as the codec reads them, [B, H, stop - start, ...]."""
        scale = None if self.scale is None else self.scale[:, :, start:stop]
        return Packed(from_tiles(self.tiles, start, stop), scale)

    def rotated(self, start: int, stop: int) -> mx.array:
        """Tokens start .. stop in the codec's basis, float32 [B, H, stop - start, D]."""
        x = self.codec.decode_rotated(self.packed(start, stop))
        if self.mean is None:
            return x
        return x + spread(self.mean, start, stop, self.span)


@dataclass(frozen=True)
class Ready:
    """A packed segment as launches take it: its codecs in Metal, dimensions, and arrays by the kernels' names for them.

    `span`: tiles that share a mean of K, 0 for no mean.
    """

    k: KernelSpec
    v: KernelSpec
    k_dim: int
    v_dim: int
    kv_heads: int
    span: int
    inputs: dict[str, mx.array]


@dataclass(frozen=True)
class PackedSegment:
    """The first `length` tokens of two packed sides."""

    length: int
    k: PackedSide
    v: PackedSide

    def keys(self, start: int, stop: int) -> mx.array:
        """Tokens start .. stop in the basis of `rotate_query`, float32 [B, H, stop - start, D]."""
        return self.k.rotated(start, stop)

    def values(self, start: int, stop: int) -> mx.array:
        """Tokens start .. stop in the basis that `unrotate_output` undoes, float32 [B, H, stop - start, Dv]."""
        return self.v.rotated(start, stop)

    def rotate_query(self, q: mx.array) -> mx.array:
        return self.k.codec.rotate(q)

    def unrotate_output(self, o: mx.array) -> mx.array:
        return self.v.codec.unrotate(o)

    @cached_property
    def ready(self) -> Ready:
        """The arguments of every launch over these tokens, checked once: a segment serves many steps.

        Raises:
            RotorError: a codec without a kernel, or means that don't fit.
        """
        k, v = self.k, self.v
        for side in (k, v):
            b, h = side.tiles.shape[:2]
            check_means(side.codec, (b, h, self.length, side.codec.dim), side.mean, 0, side.span)
        if v.mean is not None and v.span:
            raise RotorError(f"packed values have one mean for all tokens, not one for every {v.span}")
        inputs = {
            "k_tiles": k.tiles,
            "k_scale": k.scale,
            "k_mean": None if k.mean is None else mx.contiguous(k.mean),
            "v_tiles": v.tiles,
            "v_scale": v.scale,
        }
        span = 0 if k.mean is None else k.span // TILE or ONE_MEAN
        present = {name: given for name, given in inputs.items() if given is not None}
        return Ready(spec_of(k.codec), spec_of(v.codec), k.codec.dim, v.codec.dim, k.tiles.shape[1], span, present)


Segment = ExactSegment | PackedSegment


def in_order(segments: Sequence[Segment]) -> tuple[ExactSegment | None, list[PackedSegment], ExactSegment | None]:
    """Segments as (sink tokens, packed segments, recent tokens), without empty ones. A single exact segment counts as
    recent tokens.

    Raises:
        RotorError: the segments are not sink tokens, packed segments and recent tokens, in this order.
    """
    sinks: ExactSegment | None = None
    bodies: list[PackedSegment] = []
    recent: ExactSegment | None = None
    held = [segment for segment in segments if segment.length]
    for i, segment in enumerate(held):
        if isinstance(segment, PackedSegment) and recent is None:
            bodies.append(segment)
        elif isinstance(segment, ExactSegment) and i == 0 and len(held) > 1:
            sinks = segment
        elif isinstance(segment, ExactSegment) and recent is None:
            recent = segment
        else:
            kinds = ", ".join(type(s).__name__ for s in held)
            raise RotorError(f"segments must be exact sink tokens, packed ones, exact recent ones; these are {kinds}")
    return sinks, bodies, recent


def spread(mean: mx.array, start: int, stop: int, span: int) -> mx.array:
    """The means of tokens start .. stop: mean [B, H, groups, D] -> float32 [B, H, stop - start, D], or [B, H, 1, D]
    where span is 0."""
    if span == 0:
        return mean.astype(mx.float32)
    return mx.take(mean.astype(mx.float32), mx.arange(start, stop) // span, axis=2)


def check_means(codec: Codec, shape: tuple[int, ...], mean: mx.array | None, first: int, span: int) -> None:
    """Raises RotorError for means that don't fit n tokens of `shape` [B, H, n, D], the first of which is token `first`
    of the first mean's span."""
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


def mean_names(mean: mx.array | None) -> tuple[str, ...]:
    """Names of the inputs of a kernel that hold the means."""
    return () if mean is None else ("mean", "spans")


def mean_inputs(mean: mx.array | None, first: int, span: int) -> list[mx.array]:
    """The arrays of `mean_names`."""
    return [] if mean is None else [mean, mx.array([first, span], mx.int32)]


def mean_argument(mean: mx.array | None) -> str:
    """The argument of the call line that stands for the means."""
    return "NoMean()" if mean is None else "mean_of(mean, mean_strides, spans)"
