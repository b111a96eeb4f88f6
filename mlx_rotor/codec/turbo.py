"""turbo2, turbo3, turbo4: a two-sign Hadamard rotation and Lloyd–Max levels. b + 16/d bits an element."""

from __future__ import annotations

from .base import Codec, RotatedCodec
from .quantizer import Scalar
from .rotation import hadamard

SEED = 42


def _make(bits: int, dim: int) -> Codec:
    return RotatedCodec(f"turbo{bits}", dim, hadamard(dim, SEED), Scalar(bits, dim))


CODECS = {f"turbo{bits}": (lambda dim, bits=bits: _make(bits, dim)) for bits in (2, 3, 4)}
