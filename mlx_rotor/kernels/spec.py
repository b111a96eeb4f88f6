"""What a kernel needs to know of a codec: its Metal types and the numbers of its rotation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx

from ..errors import RotorError

DTYPES = {mx.float16: "half", mx.bfloat16: "bfloat16_t", mx.float32: "float"}  # and their Metal types


@dataclass(frozen=True)
class Struct:
    """A Metal type: the file below `kernels_metal` that defines it, and its name with template arguments."""

    header: str
    name: str


# Compared by identity: a codec has one, and kernels are found by it.
@dataclass(frozen=True, eq=False)
class KernelSpec:
    """A codec in Metal.

    Attributes:
        quantizer: the type that turns rotated vectors into codes and back.
        rotation: the type that rotates.
        table: uint32, the rotation's signs or the bits of its floats; `inverse`: those of its inverse.
        root: the factor the rotation ends with in encoding, where it has one.
        back: the same for queries, outputs and dequantizing; another one where vectors are encoded times a number.
    """

    quantizer: Struct
    rotation: Struct
    table: mx.array
    inverse: mx.array
    root: float = 1.0
    back: float = 1.0


class KernelCodec(Protocol):
    """A codec as kernels and their twins see it; `mlx_rotor.codec.base.Codec` says what the methods do."""

    @property
    def name(self) -> str: ...

    @property
    def dim(self) -> int: ...

    @property
    def index_bits(self) -> int: ...

    @property
    def tile_words(self) -> int: ...

    @property
    def scaled(self) -> bool: ...

    @property
    def kernel(self) -> KernelSpec | None: ...

    def encode(self, x: mx.array, mean: mx.array | None = None) -> Any: ...

    def decode(self, packed: Any) -> mx.array: ...

    def decode_rotated(self, packed: Any) -> mx.array: ...

    def rotate(self, x: mx.array) -> mx.array: ...

    def unrotate(self, y: mx.array) -> mx.array: ...


def spec_of(codec: KernelCodec) -> KernelSpec:
    """The codec in Metal. Raises RotorError where it has none."""
    if codec.kernel is None:
        raise RotorError(
            f"codec {codec.name} has no Metal kernel; set MLX_ROTOR_BACKEND=reference, or choose another codec"
        )
    return codec.kernel
