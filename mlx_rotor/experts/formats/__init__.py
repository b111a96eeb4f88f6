"""Weight formats: `get(mode, bits, group_size)` gives one, `modes()` lists them.

A format is one file here with one subclass of `Format` (layout, levels, decoder, fit, errors of its fits), and one
header in kernels_metal/weight that defines its Metal type.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Sequence
from functools import cache
from types import ModuleType

from ...errors import RotorError
from ...kernels.metal import root
from .base import Format, Tensor, constants

__all__ = ["Format", "Tensor", "beside", "get", "kind", "known", "modes", "ours"]

MLX = "affine"  # the mode among them that is MLX's own
STATED = ("mode", "all_bits", "group_sizes", "beside", "beside_dtype", "header", "decoder", "errors")


@cache
def _found() -> dict[str, type[Format]]:
    names = [m.name for m in pkgutil.iter_modules(__path__) if m.name != "base"]
    kinds = [_kind(importlib.import_module(f"{__name__}.{name}")) for name in names]
    return {kind.mode: kind for kind in kinds}


def _kind(module: ModuleType) -> type[Format]:
    """The format of a file; RotorError for one that lacks a part, so that no later step can miss it."""
    where = module.__name__.rpartition(".")[2] + ".py"
    own = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    kinds = [c for c in own if issubclass(c, Format)]
    if len(kinds) != 1:
        raise RotorError(f"experts/formats/{where}: a format's file has one subclass of Format, this has {len(kinds)}")
    kind = kinds[0]
    lacking = [name for name in STATED if not hasattr(kind, name)] + sorted(kind.__abstractmethods__)
    if lacking:
        raise RotorError(f"experts/formats/{where}: {kind.__name__} lacks {', '.join(lacking)}")
    wanted = {(b, g) for b in kind.all_bits if b not in kind.read_only for g in kind.group_sizes}
    if wrong := sorted(wanted ^ kind.errors.keys()):
        listed = ", ".join(f"({b}, {g})" for b, g in wrong)
        raise RotorError(f"experts/formats/{where}: errors and (bits, group sizes) differ in {listed}")
    if not root().joinpath("weight", kind.header).is_file():
        raise RotorError(f"experts/formats/{where}: there is no kernels_metal/weight/{kind.header}")
    constants(kind.decoder)
    return kind


def modes() -> list[str]:
    """Modes of all formats that kernels read, sorted."""
    return sorted(_found())


def ours() -> list[str]:
    """Modes of the formats that MLX does not have, sorted."""
    return [mode for mode in modes() if mode != MLX]


def kind(mode: str) -> type[Format]:
    """The class of a mode. RotorError for an unknown one."""
    if mode not in _found():
        raise RotorError(f"unknown weight format {mode!r}; known: {', '.join(modes())}")
    return _found()[mode]


def beside(of: Sequence[str]) -> tuple[str, ...]:
    """Names that some of these modes have arrays beside the codes under."""
    return tuple(dict.fromkeys(name for mode in of for name in kind(mode).beside))


def known(mode: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(bits, group sizes) of a mode, the usual first. RotorError for an unknown one."""
    found = kind(mode)
    return found.all_bits, found.group_sizes


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
    return kind(mode)(bits, group_size)
