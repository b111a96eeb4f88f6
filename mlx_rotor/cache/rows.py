"""Growable storage of a layer's tokens, exact or packed."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from .. import codec, kernels
from ..kernels import TILE, PackedSide
from ..kernels.tiles import kept_bits

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


@dataclass
class Body:
    """One side's packed tokens, the first `length` valid: tiles uint32 [B, H, room / 32, dim · bits], scale float16
    [B, H, room]. Behind `length` the words of its own tile are 0, those of later tiles anything."""

    codec_name: str
    dim: int = 0
    length: int = 0
    tiles: mx.array | None = None
    scale: mx.array | None = None

    @property
    def codec(self) -> codec.Codec:
        return codec.get(self.codec_name, self.dim)

    @property
    def room(self) -> int:
        """Tokens there is memory for."""
        return 0 if self.tiles is None else TILE * int(self.tiles.shape[2])

    @property
    def nbytes(self) -> int:
        return sum(int(a.nbytes) for a in (self.tiles, self.scale) if a is not None)

    def append(self, x: mx.array) -> None:
        """Encodes x [B, H, n, dim] behind the tokens held; in place where nothing else refers to the buffers."""
        n = x.shape[2]
        if not n:
            return
        self.dim = x.shape[3]
        first, over = divmod(self.length, TILE)
        if over:
            # Encoded from the start of the tile that is part full: zeros where its own tokens are.
            x = mx.concatenate([mx.zeros((*x.shape[:2], over, self.dim), x.dtype), x], axis=2)
        tiles, scale = kernels.encode(self.codec, x)
        self._reserve(self.length + n, tiles, scale)
        assert self.tiles is not None and self.scale is not None
        last = first + tiles.shape[2]
        if over:
            # Added, as the places are 0: reading the tile to write it would have MLX copy the whole buffer.
            new = tiles[:, :, :1] & ~kept_bits(tiles.shape[3], over)
            self.tiles = self.tiles.at[:, :, first : first + 1].add(new)
            first, tiles = first + 1, tiles[:, :, 1:]
        if tiles.shape[2]:
            self.tiles[:, :, first:last] = tiles
        self.scale[:, :, self.length : last * TILE] = scale[:, :, over:]
        self.length += n

    def _reserve(self, length: int, tiles: mx.array, scale: mx.array) -> None:
        """Room for `length` tokens in buffers like `tiles` and `scale`."""
        if length > self.room:
            used, capacity = -(-self.length // TILE), capacity_for(length)
            self.tiles = grown(self.tiles, tiles, used, capacity // TILE)
            self.scale = grown(self.scale, scale, self.length, capacity)

    def trim(self, n: int) -> None:
        """Forgets the last n tokens."""
        self.length -= n
        first, kept = divmod(self.length, TILE)
        if n and kept:
            assert self.tiles is not None
            tile = self.tiles[:, :, first : first + 1]
            self.tiles[:, :, first : first + 1] = tile & kept_bits(tile.shape[3], kept)

    def side(self) -> PackedSide:
        """The buffers as attention reads them; only where something has been appended."""
        assert self.tiles is not None and self.scale is not None
        return PackedSide(self.codec, self.tiles, self.scale)
