"""KV codecs: `get(name, dim)` gives one, `names()` lists them. A codec is one file here that defines `CODECS`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from functools import cache

from ..errors import RotorError
from ..kernels.packed import Packed
from .base import Codec

__all__ = ["Codec", "Packed", "get", "names", "register"]

Factory = Callable[[int], Codec]


@cache
def _registry() -> dict[str, Factory]:
    """Every module's `CODECS`, {name: factory of a dimension}, found by looking: no list to keep in step."""
    found: dict[str, Factory] = {}
    for module in pkgutil.iter_modules(__path__):
        found |= getattr(importlib.import_module(f"{__name__}.{module.name}"), "CODECS", {})
    return found


def names() -> list[str]:
    """Names of all codecs, sorted."""
    return sorted(_registry())


def register(name: str, factory: Factory) -> None:
    """Adds a codec from outside the package. `factory(dim)` raises RotorError for a dimension it can't take."""
    _registry()[name] = factory
    get.cache_clear()


@cache
def get(name: str, dim: int) -> Codec:
    """The codec `name` for vectors of `dim` elements, the same object each time.

    Raises:
        RotorError: unknown name (the message lists the known ones), or a dimension the codec can't take.
    """
    if name not in _registry():
        raise RotorError(f"unknown codec {name!r}; codecs: {', '.join(names())}")
    return _registry()[name](dim)
