"""Growable storage of a layer's tokens, exact or packed, and the runs of it that attention reads."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from .. import codec
from ..codec import Packed

STEP = 256


def capacity_for(length: int) -> int:
    """Room for `length` tokens: an eighth more, rounded up to 256. Copies stay amortised, and little is held unused."""
    return -(-(length + length // 8) // STEP) * STEP


def grown(buffer: mx.array | None, like: mx.array, used: int, capacity: int) -> mx.array:
    """`buffer` with room for `capacity` tokens on axis 2, its first `used` kept."""
    shape = (*like.shape[:2], capacity, *like.shape[3:])
    if buffer is None:
        return mx.zeros(shape, like.dtype)
    extra = mx.zeros((*shape[:2], capacity - used, *shape[3:]), like.dtype)
    return mx.concatenate([buffer[:, :, :used], extra], axis=2)


@dataclass
class Body:
    """One side's packed tokens: planes [B, H, room, bits, words], scale [B, H, room], the first `length` valid."""

    codec_name: str
    dim: int = 0
    length: int = 0
    planes: mx.array | None = None
    scale: mx.array | None = None

    def append(self, x: mx.array) -> None:
        """Encodes x [B, H, n, D] behind the tokens held."""
        n = x.shape[2]
        self.dim = x.shape[3]
        packed = codec.get(self.codec_name, self.dim).encode(x)
        if self.planes is None or self.scale is None or self.length + n > self.planes.shape[2]:
            capacity = capacity_for(self.length + n)
            self.planes = grown(self.planes, packed.planes, self.length, capacity)
            self.scale = grown(self.scale, packed.scale, self.length, capacity)
        self.planes[:, :, self.length : self.length + n] = packed.planes
        self.scale[:, :, self.length : self.length + n] = packed.scale
        self.length += n

    @property
    def nbytes(self) -> int:
        return sum(int(a.nbytes) for a in (self.planes, self.scale) if a is not None)


@dataclass(frozen=True)
class PackedSide:
    """K or V of packed tokens as attention reads them: whole buffers and a codec; no copy is made."""

    codec_name: str
    dim: int
    planes: mx.array
    scale: mx.array

    @property
    def codec(self) -> codec.Codec:
        return codec.get(self.codec_name, self.dim)

    def packed(self, start: int, stop: int) -> Packed:
        return Packed(self.planes[:, :, start:stop], self.scale[:, :, start:stop])


@dataclass(frozen=True)
class PackedRun:
    """The first `length` tokens of two bodies."""

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

    def dequantized(self) -> tuple[mx.array, mx.array]:
        """float32 (K, V), [B, H, length, D], in the model's basis."""
        return (
            self.k.codec.decode(self.k.packed(0, self.length)),
            self.v.codec.decode(self.v.packed(0, self.length)),
        )


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

    def dequantized(self) -> tuple[mx.array, mx.array]:
        return self.k, self.v


StoredRun = PackedRun | ExactRun
