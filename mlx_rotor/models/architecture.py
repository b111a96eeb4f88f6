"""How a model file describes its tensors: names with `{layer}` and `{expert}` in them, dimensions by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import RotorError


@dataclass(frozen=True)
class Tensor:
    """One tensor as mlx_lm's module tree holds it, and where a source checkpoint keeps it.

    `name`: path in the module tree, `{layer}` filled in per layer. `shape`: dimension names, the input dimension last.
    `source`: the checkpoint's name where it differs; with `{expert}` in it, the first dimension is a stack over
    experts that the checkpoint stores one by one. `dtype`: fixed safetensors dtype, else the source's.
    `when`: name of a dimension that must be non-zero for the tensor to exist.
    """

    role: str
    name: str
    shape: tuple[str, ...]
    source: str = ""
    dtype: str = ""
    when: str = ""

    @property
    def layered(self) -> bool:
        return "{layer}" in self.name

    @property
    def stacked(self) -> bool:
        return "{expert}" in self.source


@dataclass(frozen=True)
class Architecture:
    """`dims(config)`: dimension name -> size, with at least `layers` and `experts`; `tensors` in file order:
    those before the first layered one come before the layers, the other unlayered ones after."""

    model_types: tuple[str, ...]
    dims: Callable[[Mapping[str, Any]], dict[str, int]]
    tensors: tuple[Tensor, ...]


def size(config: Mapping[str, Any], key: str) -> int:
    """A positive integer of config.json; RotorError names the key where it is missing or something else."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RotorError(f"config.json: {key!r} must be a positive integer, found {value!r}")
    return value
