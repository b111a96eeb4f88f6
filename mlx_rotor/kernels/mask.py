"""The tokens that each query sees, as boolean or additive arrays: causality, windows, batch rows of unequal lengths.

The references and attention over exact tokens use these arrays. The Metal kernels compute the same from the lengths and
the window (`kernels_metal/attention/rows.h`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..errors import RotorError
from .arguments import AttentionArgs
from .segments import PackedSegment, Segment

SINKS, BODY, RECENT = range(3)  # the columns of `AttentionArgs.lengths`


@dataclass(frozen=True)
class TokenMask:
    """The tokens of consecutive segments that the last `rows` queries see.

    Attributes:
        rows: queries.
        sizes: places of each segment.
        args: mask and window.
        held: int32 [B] a segment, the places that each batch row really holds, from the segment's first; None: all.
        kept: places in front that are seen whatever the window.
    """

    rows: int
    sizes: Sequence[int]
    args: AttentionArgs
    held: Sequence[mx.array] | None = None
    kept: int = 0

    @classmethod
    def over(cls, segments: Sequence[Segment], rows: int, args: AttentionArgs) -> TokenMask:
        """The mask of `rows` queries over `segments`, in token order.

        Raises:
            RotorError: lengths for segments that are not sink tokens, body and recent tokens.
        """
        sizes = [segment.length for segment in segments]
        held = None
        if args.lengths is not None:
            held = held_by([isinstance(segment, PackedSegment) for segment in segments], args.lengths)
        return cls(rows, sizes, args, held, _kept_in_front(segments) if args.keep_first else 0)

    def first(self, segment: int) -> int:
        """The segment's first place that any query's window reaches; 0 where batch rows differ."""
        window = self.args.window
        if window is None or self.held is not None or self._is_kept(segment):
            return 0
        reached = sum(self.sizes) - self.rows + 1 - window - sum(self.sizes[:segment])
        return min(max(0, reached), self.sizes[segment])

    def part(self, segment: int, start: int, stop: int) -> mx.array | None:
        """The mask of places start .. stop of a segment: boolean (True is seen) or additive, broadcastable to
        [B, Hq, rows, stop - start]; None where all are seen."""
        seen, mask = self._seen(segment, start, stop), self.args.mask
        if not isinstance(mask, mx.array):
            return seen
        before = sum(self.sizes[:segment])
        mask = mask if mask.shape[-1] == 1 else mask[..., before + start : before + stop]
        if seen is None:
            return mask
        return mask & seen if mask.dtype == mx.bool_ else mx.where(seen, mask, -mx.inf)

    def whole(self) -> mx.array | None:
        """The mask over all segments as one array; None where every place is seen."""
        parts = [self.part(segment, 0, size) for segment, size in enumerate(self.sizes)]
        given = [part for part in parts if part is not None]
        if not given:
            return None
        # Parts where all is seen, or that a mask of one column gave, become as wide as their segments.
        seen = mx.array(True) if given[0].dtype == mx.bool_ else mx.array(0, given[0].dtype)
        lead = mx.broadcast_shapes(*[part.shape[:-1] for part in given])
        return mx.concatenate(
            [
                mx.broadcast_to(seen if part is None else part, (*lead, size))
                for part, size in zip(parts, self.sizes, strict=True)
            ],
            axis=-1,
        )

    def empty(self, segment: int, start: int, stop: int) -> mx.array | None:
        """Places start .. stop of a segment that hold no token of a batch row, bool [B, 1, stop - start, 1]; None where
        all hold one."""
        if self.held is None:
            return None
        return (mx.arange(start, stop) >= self.held[segment][:, None])[:, None, :, None]

    def _is_kept(self, segment: int) -> bool:
        return sum(self.sizes[:segment]) < self.kept

    def _seen(self, segment: int, start: int, stop: int) -> mx.array | None:
        """The mask by positions alone, causality, window, held places: bool [rows, n], or [B, 1, rows, n] where batch
        rows differ; None where all are seen."""
        causal, window = self.args.causal, self.args.window
        if self.held is None:
            before, total = sum(self.sizes[:segment]), sum(self.sizes)
            lo, hi, oldest = before + start, before + stop, total - self.rows
            causal = causal and hi > oldest + 1
            windowed = window is not None and lo <= total - 1 - window
            queries, places = mx.arange(oldest, total)[:, None], mx.arange(lo, hi)[None]
            seen = None
        else:
            windowed = window is not None
            ragged = mx.stack(list(self.held))
            queries = (ragged.sum(0)[:, None] + mx.arange(-self.rows, 0))[:, None, :, None]
            own = mx.arange(start, stop)
            places = (ragged[:segment].sum(0)[:, None] + own)[:, None, None, :]
            seen = (own < ragged[segment][:, None])[:, None, None, :] & (queries >= 0)
        if causal:
            seen = queries >= places if seen is None else seen & (queries >= places)
        if windowed and not self._is_kept(segment):
            assert window is not None
            near = places > queries - window
            seen = near if seen is None else seen & near
        return seen


def held_by(packed: Sequence[bool], lengths: mx.array) -> list[mx.array]:
    """The columns of lengths [B, 3] that belong to segments in token order; `packed` says which segments are packed.

    A single exact segment has the sink tokens and the recent tokens together: one of the two is there.

    Raises:
        RotorError: the segments are not sink tokens, body and recent tokens.
    """
    n = len(packed)
    if sum(packed) > 1:
        raise RotorError(f"lengths go with one packed segment, not with {sum(packed)}")
    if n == 3:
        columns = [SINKS, BODY, RECENT]
    elif n == 2:
        columns = [BODY, RECENT] if packed[0] else [SINKS, BODY if packed[1] else RECENT]
    elif n == 1:
        return [lengths[:, BODY] if packed[0] else lengths[:, SINKS] + lengths[:, RECENT]]
    else:
        raise RotorError(f"lengths are those of sink, body and recent tokens; these are {n} segments")
    return [lengths[:, column] for column in columns]


def _kept_in_front(segments: Sequence[Segment]) -> int:
    """Tokens of the exact segment in front; 0 where no other tokens follow it."""
    held = [segment for segment in segments if segment.length]
    return held[0].length if len(held) > 1 and not isinstance(held[0], PackedSegment) else 0
