"""Runs: consecutive tokens that attention reads, exact or packed. Knows codecs by what they do, not by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from .packed import Packed
from .spec import KernelCodec
from .tiles import from_tiles


@dataclass(frozen=True)
class ExactRun:
    """Tokens kept as they came: k, v [B, H, length, D]."""

    k: mx.array
    v: mx.array

    @property
    def length(self) -> int:
        return int(self.k.shape[2])

    def keys(self, start: int, stop: int) -> mx.array:
        return self.k[:, :, start:stop].astype(mx.float32)

    def values(self, start: int, stop: int) -> mx.array:
        return self.v[:, :, start:stop].astype(mx.float32)

    def rotate_query(self, q: mx.array) -> mx.array:
        return q

    def unrotate_output(self, o: mx.array) -> mx.array:
        return o


@dataclass(frozen=True)
class PackedSide:
    """K or V of packed tokens: a codec and whole buffers, whose room behind the tokens is never cut off.

    tiles: uint32 [B, H, room / 32, D · bits]; scale: float16 [B, H, room].
    """

    codec: KernelCodec
    tiles: mx.array
    scale: mx.array

    def packed(self, start: int, stop: int) -> Packed:
        """Tokens start .. stop as the codec reads them, [B, H, stop - start, ...]."""
        return Packed(from_tiles(self.tiles, start, stop), self.scale[:, :, start:stop])


@dataclass(frozen=True)
class PackedRun:
    """The first `length` tokens of two packed sides."""

    length: int
    k: PackedSide
    v: PackedSide

    def keys(self, start: int, stop: int) -> mx.array:
        return self.k.codec.decode_rotated(self.k.packed(start, stop))

    def values(self, start: int, stop: int) -> mx.array:
        return self.v.codec.decode_rotated(self.v.packed(start, stop))

    def rotate_query(self, q: mx.array) -> mx.array:
        return self.k.codec.rotate(q)

    def unrotate_output(self, o: mx.array) -> mx.array:
        return self.v.codec.unrotate(o)


StoredRun = ExactRun | PackedRun


def in_order(runs: Sequence[StoredRun]) -> tuple[ExactRun | None, PackedRun | None, ExactRun | None]:
    """Runs in token order as (sinks, body, recent); those that hold nothing are None, a single exact run is `recent`.

    Raises:
        ValueError: if they are not exact sinks, a packed body and exact recent tokens, each at most once.
    """
    sinks: ExactRun | None = None
    body: PackedRun | None = None
    recent: ExactRun | None = None
    held = [run for run in runs if run.length]
    for i, run in enumerate(held):
        if isinstance(run, PackedRun) and body is None and recent is None:
            body = run
        elif isinstance(run, ExactRun) and i == 0 and len(held) > 1:
            sinks = run
        elif isinstance(run, ExactRun) and recent is None:
            recent = run
        else:
            kinds = ", ".join(type(r).__name__ for r in held)
            raise ValueError(f"runs must be exact sinks, a packed body, exact recent tokens; these are {kinds}")
    return sinks, body, recent
