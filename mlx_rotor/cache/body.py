"""The body: a layer's packed tokens, as few large segments of two growing sides. Cache copies share closed ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from .. import codec, kernels
from ..kernels import TILE, PackedSegment, PackedSide
from ..kernels.packed import kept_bits

# Tokens that share a mean of K. Closed segments hold a whole number of it, so that they can be cut and joined.
SPAN = 256
# Closed segments at most: attention takes a launch for each. Two are enough for a long past and what came since.
MANY = 2
STEP = 256  # tokens that buffers grow by, at least


def capacity_for(length: int) -> int:
    """Room for `length` tokens: an eighth more, rounded up to STEP. Copies stay amortised, and little is unused."""
    return -(-(length + length // 8) // STEP) * STEP


def grown(buffer: mx.array | None, like: mx.array, used: int, capacity: int) -> mx.array:
    """A buffer like `like` [B, H, n, …] with `capacity` rows on axis 2, the first `used` of them `buffer`'s."""
    shape = (*like.shape[:2], capacity, *like.shape[3:])
    if buffer is None or not used:
        return mx.zeros(shape, like.dtype)
    extra = mx.zeros((*shape[:2], capacity - used, *shape[3:]), like.dtype)
    return mx.concatenate([buffer[:, :, :used], extra], axis=2)


def _copied(a: mx.array) -> mx.array:
    """Another handle on the same memory, which is copied when either is written to."""
    copy: mx.array = a.__deepcopy__({})
    return copy


@dataclass
class Side(PackedSide):
    """K or V of packed tokens, in buffers that grow. Whoever owns a side counts its tokens.

    The words behind the tokens held are 0 in their own tile, and anything in later tiles.

    Attributes:
        subtract: whether means are subtracted from the vectors.
    """

    subtract: bool = False

    @classmethod
    def like(cls, name: str, x: mx.array, span: int | None = None, mean: mx.array | None = None) -> Side:
        """An empty side of codec `name` for vectors like x [B, H, n, d].

        Args:
            span: tokens that share a mean; 0: all of them; None: no mean is subtracted.
            mean: the one of all tokens, where it is known already.
        """
        made, lead = codec.get(name, x.shape[3]), x.shape[:2]
        tiles = mx.zeros((*lead, 0, made.tile_words), mx.uint32)
        scale = mx.zeros((*lead, 0), mx.float16) if made.scaled else None
        return cls(made, tiles, scale, mean, span or 0, subtract=span is not None and made.scaled)

    @property
    def arrays(self) -> list[mx.array | None]:
        return [self.tiles, self.scale, self.mean]

    @property
    def room(self) -> int:
        """Tokens there is memory for."""
        return TILE * int(self.tiles.shape[2])

    def append(self, held: int, x: mx.array, near: mx.array) -> None:
        """Encodes x [B, H, n, d] behind the `held` tokens; in place where nothing else refers to the buffers.

        Args:
            near: x and the tokens that follow it, as far as they are known: the means are theirs.
        """
        n = x.shape[2]
        first, over = divmod(held, TILE)
        if over:
            # Encoded from the start of the tile that is part full: zeros where its own tokens are.
            x = mx.concatenate([mx.zeros((*x.shape[:2], over, x.shape[3]), x.dtype), x], axis=2)
        mean, start = self._means(held, n, near)
        tiles, scale = kernels.encode(self.codec, x, mean, first=start, span=self.span)
        if held + n > self.room:
            capacity = capacity_for(held + n)
            self.tiles = grown(self.tiles, tiles, -(-held // TILE), capacity // TILE)
            self.scale = None if scale is None else grown(self.scale, scale, held, capacity)
        last = first + tiles.shape[2]
        if self.scale is not None and scale is not None:
            self.scale[:, :, held : last * TILE] = scale[:, :, over:]
        if over:
            # Added, as the places are 0: reading the tile to write it would have MLX copy the whole buffer.
            new = tiles[:, :, :1] & ~kept_bits(tiles.shape[3], over)
            self.tiles = self.tiles.at[:, :, first : first + 1].add(new)
            first, tiles = first + 1, tiles[:, :, 1:]
        if tiles.shape[2]:
            self.tiles[:, :, first:last] = tiles

    def _means(self, held: int, n: int, near: mx.array) -> tuple[mx.array | None, int]:
        """Means of the tiles that tokens held .. held + n lie in, and the first tile's place in the first of them."""
        if not self.subtract:
            return None, 0
        if self.span == 0:
            if self.mean is None:
                self.mean = self._mean(near)
            return self.mean, 0
        known, first = -(-held // self.span), held // TILE * TILE
        groups = [] if not known or self.mean is None else [self.mean[:, :, :known]]
        for at in range(known * self.span, held + n, self.span):
            groups.append(self._mean(near[:, :, at - held : at - held + self.span]))
        self.mean = groups[0] if len(groups) == 1 else mx.concatenate(groups, axis=2)
        return self.mean[:, :, first // self.span :], first % self.span

    def _mean(self, x: mx.array) -> mx.array:
        return self.codec.rotate(x.astype(mx.float32).mean(2, keepdims=True)).astype(mx.float16)

    def cut(self, held: int) -> None:
        """Makes the words behind `held` tokens, in their own tile, 0."""
        first, kept = divmod(held, TILE)
        if kept:
            tile = self.tiles[:, :, first : first + 1]
            self.tiles[:, :, first : first + 1] = tile & kept_bits(tile.shape[3], kept)

    def copy(self) -> Side:
        """The same tokens, to be written to without changing these."""
        scale = None if self.scale is None else _copied(self.scale)
        return replace(self, tiles=_copied(self.tiles), scale=scale)  # means are never written to

    def part(self, start: int, stop: int) -> Side:
        """A copy of tokens start .. stop in buffers of their own; start is a whole number of tiles and of spans."""
        tiles, *others = self._slices(start, stop)
        assert tiles is not None
        scale, mean = (None if a is None else mx.contiguous(a) for a in others)
        return replace(self, tiles=mx.contiguous(tiles), scale=scale, mean=mean if self.span else self.mean)

    def joined(self, held: int, other: Side, other_held: int) -> Side:
        """These tokens and the other's in one side; `held` is a whole number of tiles and of spans."""
        tiles, scale, mean = (
            None if a is None or b is None else mx.concatenate([a, b], axis=2)
            for a, b in zip(self._slices(0, held), other._slices(0, other_held), strict=True)
        )
        assert tiles is not None
        return replace(self, tiles=tiles, scale=scale, mean=mean if self.span else self.mean)

    def _slices(self, start: int, stop: int) -> list[mx.array | None]:
        """The parts of `arrays` that tokens start .. stop need: whole tiles, and means of spans."""
        end = -(-stop // TILE)
        scale, mean = self.scale, self.mean
        if scale is not None:
            scale = scale[:, :, start : TILE * end]
        if mean is not None and self.span:
            mean = mean[:, :, start // self.span : -(-stop // self.span)]
        return [self.tiles[:, :, start // TILE : end], scale, mean]


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
        """Forgets the tokens behind the first `length`."""
        self.k.cut(length)
        self.v.cut(length)
        self.length = length

    def joined(self, other: BodySegment) -> BodySegment:
        """These tokens and the other's, closed; a whole number of spans here."""
        k = self.k.joined(self.length, other.k, other.length)
        v = self.v.joined(self.length, other.v, other.length)
        return BodySegment(k, v, self.length + other.length, open=False)


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
        """Packs k, v [B, H, n, D] behind the tokens held. near_k, near_v: they and the tokens known to follow."""
        if not k.shape[2]:
            return
        last = self.segments[-1] if self.segments else None
        if last is None or (not last.open and last.length % SPAN == 0):
            k_span, v_span = (SPAN, 0) if self.centre else (None, None)
            v_mean = None if last is None else last.v.mean
            self.segments.append(BodySegment(Side.like(self.k, k, k_span), Side.like(self.v, v, v_span, v_mean)))
        elif not last.open:
            self._close(last)
        self.segments[-1].append(k, v, near_k, near_v)
        self.length += k.shape[2]

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
            out.append(PackedSegment(min(length, segment.length), segment.k, segment.v))
            length -= segment.length
        return out

    @property
    def arrays(self) -> list[mx.array]:
        return [a for s in self.segments for side in (s.k, s.v) for a in side.arrays if a is not None]

    @property
    def state(self) -> list[list[Any]]:
        return [[s.length, s.open, *s.k.arrays, *s.v.arrays] for s in self.segments]
