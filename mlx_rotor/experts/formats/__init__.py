"""Weight formats: `get(mode, bits, group_size)` gives one, `modes()` lists them.

A format is one file here that defines MODE, BITS, GROUP_SIZES (the usual one first) and MAKE, and one header in
kernels_metal/weight that defines its Metal type.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from types import ModuleType

from ...errors import RotorError
from .base import Format, Tensor

__all__ = ["Format", "Tensor", "get", "known", "modes", "ours"]

MLX = "affine"  # the mode among them that is MLX's own


@cache
def _found() -> dict[str, ModuleType]:
    modules = (importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__))
    return {module.MODE: module for module in modules if hasattr(module, "MODE")}


def modes() -> list[str]:
    """Of all formats that kernels read, sorted."""
    return sorted(_found())


def ours() -> list[str]:
    """Of the formats that MLX does not have."""
    return [mode for mode in modes() if mode != MLX]


def known(mode: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(bits, group sizes) of a mode, the usual first. RotorError for an unknown one."""
    if mode not in _found():
        raise RotorError(f"unknown weight format {mode!r}; known: {', '.join(modes())}")
    return _found()[mode].BITS, _found()[mode].GROUP_SIZES


def get(mode: str, bits: int, group_size: int) -> Format:
    """The format. RotorError for what the mode does not have."""
    for what, value, possible in zip(("bits", "group_size"), (bits, group_size), known(mode), strict=True):
        if value not in possible:
            raise RotorError(
                f"{mode}: {what} = {value} is not supported; {what} can be {', '.join(map(str, possible))}"
            )
    return _made(mode, bits, group_size)


@cache
def _made(mode: str, bits: int, group_size: int) -> Format:
    made: Format = _found()[mode].MAKE(bits, group_size)
    return made
