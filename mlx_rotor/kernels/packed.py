"""Encoded vectors one by one: what codecs make and read. Tiles are how many of them lie in memory."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class Packed:
    """Encoded vectors. words: [..., n] of uint32, or of uint16 where a vector is no whole number of 32-bit words;
    scale: [...] of float16, one a vector, None where the codec keeps none."""

    words: mx.array
    scale: mx.array | None

    @property
    def nbytes(self) -> int:
        return sum(int(a.nbytes) for a in (self.words, self.scale) if a is not None)
