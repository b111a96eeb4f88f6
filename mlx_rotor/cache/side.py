"""One side of packed tokens, K or V, in growable buffers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import mlx.core as mx

from .. import codec, kernels
from ..kernels import TILE, PackedSide
from ..kernels.packed import kept_bits

STEP = 256


def capacity_for(length: int) -> int:
    """Room for `length` tokens: an eighth more, rounded up to 256. Copies stay amortised, and little is held unused."""
    return -(-(length + length // 8) // STEP) * STEP


def grown(buffer: mx.array | None, like: mx.array, used: int, capacity: int) -> mx.array:
    """`buffer` with room for `capacity` rows on axis 2, its first `used` kept."""
    shape = (*like.shape[:2], capacity, *like.shape[3:])
    if buffer is None:
        return mx.zeros(shape, like.dtype)
    extra = mx.zeros((*shape[:2], capacity - used, *shape[3:]), like.dtype)
    return mx.concatenate([buffer[:, :, :used], extra], axis=2)


def _copied(a: mx.array | None) -> mx.array | None:
    """Another handle on the same memory, which is copied when either is written to."""
    return None if a is None else a.__deepcopy__({})


@dataclass
class Side:
    """Packed tokens of one side; whoever owns it counts them.

    Attributes:
        tiles: uint32 [B, H, room / 32, words a tile]. Behind the tokens held the words of their own tile are 0, those
            of later tiles anything.
        scale: float16 [B, H, room], or None where the codec keeps none.
        mean: float16 [B, H, groups, dim] in the codec's basis: what is subtracted from `span` tokens at a time before
            they are encoded; with a span of 0 from all of them.
        span: None where nothing is subtracted.
    """

    codec_name: str
    span: int | None = None
    dim: int = 0
    tiles: mx.array | None = None
    scale: mx.array | None = None
    mean: mx.array | None = None

    @property
    def codec(self) -> codec.Codec:
        return codec.get(self.codec_name, self.dim)

    @property
    def arrays(self) -> list[mx.array | None]:
        return [self.tiles, self.scale, self.mean]

    @property
    def room(self) -> int:
        """Tokens there is memory for."""
        return 0 if self.tiles is None else TILE * int(self.tiles.shape[2])

    def append(self, held: int, x: mx.array, near: mx.array) -> None:
        """Encodes x [B, H, n, dim] behind the `held` tokens; in place where nothing else refers to the buffers.

        Args:
            near: x and the tokens that follow it, as far as they are known: what means are taken from.
        """
        n = x.shape[2]
        self.dim = x.shape[3]
        first, over = divmod(held, TILE)
        if over:
            # Encoded from the start of the tile that is part full: zeros where its own tokens are.
            x = mx.concatenate([mx.zeros((*x.shape[:2], over, self.dim), x.dtype), x], axis=2)
        mean, start = self._means(held, n, near)
        tiles, scale = kernels.encode(self.codec, x, mean, first=start, span=self.span or 0)
        self._reserve(held, n, tiles, scale)
        assert self.tiles is not None
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
        if self.span is None or not self.codec.scaled:
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

    def _reserve(self, held: int, n: int, tiles: mx.array, scale: mx.array | None) -> None:
        """Room for n tokens behind `held` ones, in buffers like `tiles` and `scale`."""
        if held + n > self.room:
            capacity = capacity_for(held + n)
            self.tiles = grown(self.tiles, tiles, -(-held // TILE), capacity // TILE)
            self.scale = None if scale is None else grown(self.scale, scale, held, capacity)

    def cut(self, held: int) -> None:
        """Makes the words behind `held` tokens, in their own tile, 0."""
        first, kept = divmod(held, TILE)
        if kept:
            assert self.tiles is not None
            tile = self.tiles[:, :, first : first + 1]
            self.tiles[:, :, first : first + 1] = tile & kept_bits(tile.shape[3], kept)

    def copy(self) -> Side:
        """The same tokens, to be written to without changing these."""
        return replace(self, tiles=_copied(self.tiles), scale=_copied(self.scale))  # means are never written to

    def part(self, start: int, stop: int) -> Side:
        """A copy of tokens start .. stop in buffers of their own; start is a whole number of tiles and of spans."""
        tiles, scale, mean = (None if a is None else mx.contiguous(a) for a in self._slices(start, stop))
        return replace(self, tiles=tiles, scale=scale, mean=mean if self.span else self.mean)

    def joined(self, held: int, other: Side, other_held: int) -> Side:
        """These tokens and the other's in one side; `held` is a whole number of tiles and of spans."""
        tiles, scale, mean = (
            None if a is None or b is None else mx.concatenate([a, b], axis=2)
            for a, b in zip(self._slices(0, held), other._slices(0, other_held), strict=True)
        )
        return replace(self, tiles=tiles, scale=scale, mean=mean if self.span else self.mean)

    def _slices(self, start: int, stop: int) -> list[mx.array | None]:
        """What `arrays` have of tokens start .. stop: whole tiles, and means of spans."""
        assert self.tiles is not None
        end = -(-stop // TILE)
        scale, mean = self.scale, self.mean
        if scale is not None:
            scale = scale[:, :, start : TILE * end]
        if mean is not None and self.span:
            mean = mean[:, :, start // self.span : -(-stop // self.span)]
        return [self.tiles[:, :, start // TILE : end], scale, mean]

    def packed(self) -> PackedSide:
        """The buffers as attention reads them; only where something has been appended."""
        assert self.tiles is not None
        return PackedSide(self.codec, self.tiles, self.scale, self.mean, self.span or 0)
