"""The ring: a layer's most recent tokens, exact.

The body: a layer's packed tokens in few, large segments. Copies of a cache share what is closed.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from ..kernels import ExactSegment, PackedSegment
from .side import Side, grown


@dataclass
class Ring:
    """Buffers [B, H, …, D] that grow to `room` tokens in steps of `step`, of which the first `length` are held."""

    room: int
    step: int
    k: mx.array | None = None
    v: mx.array | None = None
    length: int = 0

    def write(self, keys: mx.array, values: mx.array) -> None:
        """Stores tokens behind those held; there must be room."""
        n = keys.shape[2]
        needed = self.length + n
        if self.k is None or self.v is None or needed > self.k.shape[2]:
            capacity = min(self.room, -(-needed // self.step) * self.step)
            self.k = grown(self.k, keys, self.length, capacity)
            self.v = grown(self.v, values, self.length, capacity)
        self.k[:, :, self.length : needed] = keys
        self.v[:, :, self.length : needed] = values
        self.length = needed

    def segment(self) -> ExactSegment:
        """The tokens held; something must have been written once."""
        assert self.k is not None and self.v is not None
        return ExactSegment(self.k[:, :, : self.length], self.v[:, :, : self.length])

    def copy(self) -> Ring:
        """The same tokens, whose memory is copied when either is written to."""
        return copy.deepcopy(self)


# Tokens that share a mean of K. Closed segments hold a whole number of it, so that they can be cut and joined.
SPAN = 256
# Closed segments at most: attention takes a launch for each. Two are enough for a long past and what came since.
MANY = 2


@dataclass
class BodySegment:
    """`length` tokens of both sides. Only an open one is ever written to; a closed one may be shared by caches."""

    k: Side
    v: Side
    length: int = 0
    open: bool = True

    def append(self, k: mx.array, v: mx.array, near_k: mx.array, near_v: mx.array) -> None:
        self.k.append(self.length, k, near_k)
        self.v.append(self.length, v, near_v)
        self.length += k.shape[2]

    def copy(self) -> BodySegment:
        """Itself where closed, else one that can be written to without changing this one."""
        return replace(self, k=self.k.copy(), v=self.v.copy()) if self.open else self

    def part(self, start: int) -> BodySegment:
        """An open copy of the tokens from `start` on, a whole number of spans."""
        rest = BodySegment(self.k.part(start, self.length), self.v.part(start, self.length), self.length - start)
        if not self.open:
            rest.cut(rest.length)
        return rest

    def cut(self, length: int) -> None:
        """Forgets what is behind `length`."""
        self.k.cut(length)
        self.v.cut(length)
        self.length = length

    def joined(self, other: BodySegment) -> BodySegment:
        """These tokens and the other's, closed; a whole number of spans here."""
        k = self.k.joined(self.length, other.k, other.length)
        v = self.v.joined(self.length, other.v, other.length)
        return BodySegment(k, v, self.length + other.length, open=False)

    def first(self, length: int) -> PackedSegment:
        return PackedSegment(length, self.k.packed(), self.v.packed())


@dataclass
class Body:
    """Packed tokens in order.

    Attributes:
        k, v: codec names.
        centre: whether means are subtracted: of K for SPAN tokens at a time, as rotary positions turn it; of V once.
        segments: all but the last are closed and hold a whole number of SPAN tokens.
        length: tokens held.
    """

    k: str
    v: str
    centre: bool
    segments: list[BodySegment]
    length: int = 0

    def append(self, k: mx.array, v: mx.array, near_k: mx.array, near_v: mx.array) -> None:
        """Packs k, v [B, H, n, D] behind the tokens held. near_k, near_v: they and what is known to follow."""
        if not k.shape[2]:
            return
        last = self.segments[-1] if self.segments else None
        if last is None or (not last.open and last.length % SPAN == 0):
            mean = None if last is None else last.v.mean
            self.segments.append(BodySegment(Side(self.k, self._span(SPAN)), Side(self.v, self._span(0), mean=mean)))
        elif not last.open:
            self._close(last)
        self.segments[-1].append(k, v, near_k, near_v)
        self.length += k.shape[2]

    def _span(self, span: int) -> int | None:
        return span if self.centre else None

    def _close(self, last: BodySegment) -> None:
        """Closes the last segment but for an open copy of what is left over a whole number of spans."""
        whole = last.length // SPAN * SPAN
        self.segments[-1:] = [replace(last, length=whole, open=False)] if whole else []
        if last.length > whole:
            self.segments.append(last.part(whole))
        self._join()

    def _join(self) -> None:
        """Joins the smallest neighbours among more than MANY closed segments."""
        while sum(not s.open for s in self.segments) > MANY:
            closed = len(self.segments) - self.segments[-1].open
            sizes = [self.segments[i].length + self.segments[i + 1].length for i in range(closed - 1)]
            i = sizes.index(min(sizes))
            self.segments[i : i + 2] = [self.segments[i].joined(self.segments[i + 1])]

    def copy(self) -> Body:
        """Another body of the same tokens. Whole spans are closed here and shared: only what is left over, fewer than
        SPAN tokens, is copied once it is written to."""
        if self.segments and self.segments[-1].open and self.segments[-1].length >= SPAN:
            self._close(self.segments[-1])
        return replace(self, segments=[s.copy() for s in self.segments])

    def trim(self, n: int) -> None:
        """Forgets the last n tokens."""
        self.length -= n
        while n:
            last = self.segments.pop()
            gone = min(n, last.length)
            n -= gone
            if gone == last.length:
                continue
            if last.open:
                last.cut(last.length - gone)
            else:
                last = replace(last, length=last.length - gone)
            self.segments.append(last)

    def drop(self, n: int) -> None:
        """Forgets the first n tokens, a whole number of SPAN."""
        self.length -= n
        while n:
            first = self.segments.pop(0)
            gone = min(n, first.length)
            n -= gone
            if gone < first.length:
                self.segments.insert(0, replace(first.part(gone), open=first.open))

    def first(self, length: int) -> list[PackedSegment]:
        """The first `length` tokens as attention reads them."""
        out = []
        for segment in self.segments:
            if length <= 0:
                break
            out.append(segment.first(min(length, segment.length)))
            length -= segment.length
        return out

    @property
    def arrays(self) -> list[mx.array]:
        return [a for s in self.segments for side in (s.k, s.v) for a in side.arrays if a is not None]

    @property
    def state(self) -> list[list[Any]]:
        return [[s.length, s.open, *s.k.arrays, *s.v.arrays] for s in self.segments]
