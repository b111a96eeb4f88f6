"""Codecs and packed weights as kernels and their references see them: Metal types, arrays, decoding in plain `mx`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx

from ..errors import RotorError
from .packed import Packed

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


class Codec(Protocol):
    """Encodes vectors of one dimension and decodes them. Stateless: constants only, evaluated when they are made.

    Attributes:
        name: with its parameter where it has one, as in "fp8:0.03125".
        dim: elements of a vector, d.
        index_bits: bits of an element's code.
        tile_words: 32-bit words of a tile, the words of 32 vectors without their scales.
        scaled: whether a vector has a float16 scale beside its words.
        bits: stored bits an element, the scale included.
        kernel: the codec in Metal; None: it runs as MLX operations on every backend.
    """

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
    def bits(self) -> float: ...

    @property
    def kernel(self) -> KernelSpec | None: ...

    def encode(self, x: mx.array, mean: mx.array | None = None) -> Packed:
        """x [..., d] of any float dtype -> words and scales of its vectors.

        `mean`: float32 in the codec's basis, broadcastable to x, subtracted before encoding. RotorError where the codec
        is not `scaled` and there is one.
        """

    def decode(self, packed: Packed) -> mx.array:
        """float32 [..., d] in the basis of x, less the mean."""

    def decode_rotated(self, packed: Packed) -> mx.array:
        """float32 [..., d] in the codec's own basis: `unrotate` of it is `decode`."""

    def rotate(self, x: mx.array) -> mx.array:
        """float32 [..., d] into the codec's basis, so that ⟨rotate(q), decode_rotated(p)⟩ = ⟨q, decode(p)⟩."""

    def unrotate(self, y: mx.array) -> mx.array:
        """float32 [..., d] back from the codec's basis."""


def spec_of(codec: Codec) -> KernelSpec:
    """The codec in Metal. Raises RotorError where it has none."""
    if codec.kernel is None:
        raise RotorError(
            f"codec {codec.name} has no Metal kernel; set MLX_ROTOR_BACKEND=reference, or choose another codec"
        )
    return codec.kernel


class WeightFormat(Protocol):
    """A way to store weights [.., N, K]: codes, and arrays beside them. `mlx_rotor.experts.formats` has the formats."""

    @property
    def mode(self) -> str: ...

    @property
    def bits(self) -> int: ...

    @property
    def group_size(self) -> int: ...

    @property
    def beside(self) -> tuple[str, ...]:
        """Names of the arrays beside the codes."""

    def struct(self, dtype: mx.Dtype) -> Struct:
        """The Metal type where the arrays beside the codes are of `dtype`."""

    def decode(self, parts: Sequence[mx.array], columns: int) -> mx.array:
        """float32 [.., N, columns] of the codes and the arrays beside them; lazy."""


class Launches(dict[Any, Any]):
    """Launches planned for one packed weight, by the launcher's own keys. A copy of the weight starts with none."""

    def drop(self, of: Callable[[Any], bool]) -> None:
        """Forgets the launches for which `of` is true."""
        for key in [key for key, launch in list(self.items()) if of(launch)]:
            self.pop(key, None)

    def __reduce__(self) -> tuple[type[Launches], tuple[()]]:
        return Launches, ()


@dataclass(frozen=True)
class PackedWeight:
    """A matrix [N, K], or a stack of them [E, N, K].

    Attributes:
        parts: codes uint32 [.., N, K·bits/32], then the format's arrays beside them, each [.., N, n].
        columns: K.
        bias: [.., N], added to a product with the matrix, or None.
        launches: the launchers' own notes.
    """

    format: WeightFormat
    parts: tuple[mx.array, ...]
    columns: int
    bias: mx.array | None = None
    launches: Launches = field(default_factory=Launches, init=False, repr=False, compare=False)

    @property
    def rows(self) -> int:
        return int(self.parts[0].shape[-2])

    @property
    def nbytes(self) -> int:
        return sum(int(part.nbytes) for part in self.parts)

    @property
    def struct(self) -> Struct:
        """Its format's Metal type."""
        return self.format.struct(self.parts[1].dtype)

    def decoded(self) -> mx.array:
        """The weights, float32 [.., N, K]; lazy."""
        return self.format.decode(self.parts, self.columns)
