"""Which tokens a query sees: masks, sliding windows and ragged batches as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .segments import PackedSegment

SINKS, BODY, RECENT = range(3)  # the columns of `lengths`


@dataclass(frozen=True)
class TokenMask:
    """What the last `rows` queries see of the tokens of consecutive segments.

    Attributes:
        rows: queries.
        sizes: slots of each segment.
        mask: None, "causal", or an array broadcastable to [B, Hq, rows, slots], boolean (True is seen) or additive.
        window: a query at position p sees positions above p - window only; None: all.
        held: int32 [B] a segment, the slots each batch row really holds, from the segment's first; None: all of them.
        kept: slots of the segments in front that are seen whatever the window.
    """

    rows: int
    sizes: Sequence[int]
    mask: mx.array | str | None = None
    window: int | None = None
    held: Sequence[mx.array] | None = None
    kept: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.mask, str) and self.mask != "causal":
            raise ValueError(f"unknown mask {self.mask!r}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"a window must hold at least 1 token, not {self.window}")

    def first(self, segment: int) -> int:
        """The segment's first slot that any query's window reaches; 0 where batch rows differ."""
        if self.window is None or self.held is not None or self._is_kept(segment):
            return 0
        reached = sum(self.sizes) - self.rows + 1 - self.window - sum(self.sizes[:segment])
        return min(max(0, reached), self.sizes[segment])

    def _is_kept(self, segment: int) -> bool:
        return sum(self.sizes[:segment]) < self.kept

    def part(self, segment: int, start: int, stop: int) -> mx.array | None:
        """For slots start .. stop of a segment: what is seen, boolean or additive and broadcastable to
        [B, Hq, rows, stop - start], or None where all are."""
        seen = self._seen(segment, start, stop)
        if self.mask is None or isinstance(self.mask, str):
            return seen
        before = sum(self.sizes[:segment])
        mask = self.mask if self.mask.shape[-1] == 1 else self.mask[..., before + start : before + stop]
        if seen is None:
            return mask
        return mask & seen if mask.dtype == mx.bool_ else mx.where(seen, mask, -mx.inf)

    def empty(self, segment: int, start: int, stop: int) -> mx.array | None:
        """Slots start .. stop of a segment that a batch row lacks, bool [B, 1, stop - start, 1]; None: all do."""
        if self.held is None:
            return None
        return (mx.arange(start, stop) >= self.held[segment][:, None])[:, None, :, None]

    def _seen(self, segment: int, start: int, stop: int) -> mx.array | None:
        """The part of positions: causality, window and held slots; [rows, n], or [B, 1, rows, n] where ragged."""
        causal = isinstance(self.mask, str)
        if self.held is None:
            before, total = sum(self.sizes[:segment]), sum(self.sizes)
            lo, hi, oldest = before + start, before + stop, total - self.rows
            causal = causal and hi > oldest + 1
            windowed = self.window is not None and lo <= total - 1 - self.window
            queries, slots = mx.arange(oldest, total)[:, None], mx.arange(lo, hi)[None]
            seen = None
        else:
            windowed = self.window is not None
            ragged = mx.stack(list(self.held))
            queries = (ragged.sum(0)[:, None] + mx.arange(-self.rows, 0))[:, None, :, None]
            own = mx.arange(start, stop)
            slots = (ragged[:segment].sum(0)[:, None] + own)[:, None, None, :]
            seen = (own < ragged[segment][:, None])[:, None, None, :] & (queries >= 0)
        if causal:
            seen = queries >= slots if seen is None else seen & (queries >= slots)
        if windowed and not self._is_kept(segment):
            assert self.window is not None
            near = slots > queries - self.window
            seen = near if seen is None else seen & near
        return seen


def held_by(packed: Sequence[bool], lengths: mx.array) -> list[mx.array]:
    """The columns of lengths [B, 3] (sinks, body, recent) that belong to segments in token order, packed or not.

    A single exact segment has the sinks' and the recent tokens' together: one of the two is there.

    Raises:
        ValueError: if the segments are not sinks, body and recent tokens.
    """
    n = len(packed)
    if sum(packed) > 1:
        raise ValueError(f"lengths go with one packed segment, not with {sum(packed)}")
    if n == 3:
        columns = [SINKS, BODY, RECENT]
    elif n == 2:
        columns = [BODY, RECENT] if packed[0] else [SINKS, BODY if packed[1] else RECENT]
    elif n == 1:
        return [lengths[:, BODY] if packed[0] else lengths[:, SINKS] + lengths[:, RECENT]]
    else:
        raise ValueError(f"lengths are those of sinks, body and recent tokens; these are {n} segments")
    return [lengths[:, column] for column in columns]


def kept_in_front(segments: Sequence[Any]) -> int:
    """Tokens of the exact segment in front, 0 where no others follow it."""
    held = [segment for segment in segments if segment.length]
    return int(held[0].length) if len(held) > 1 and not isinstance(held[0], PackedSegment) else 0
