"""Packed weights as kernels and their twins see them: a format, its arrays, and the twin's way of reading them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx

from .spec import Struct


class WeightFormat(Protocol):
    """How weights [.., N, K] are stored: codes, and arrays beside them. `mlx_rotor.experts.formats` has them."""

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
    """What was planned for one packed weight, by what the launcher asks for; a copy of the weight starts anew."""

    def drop(self, of: Callable[[Any], bool]) -> None:
        """Forgets those that `of` is true of."""
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
        bias: [.., N] added to what it is multiplied with, or None.
        launches: the launchers' own.
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
