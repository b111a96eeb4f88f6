"""KV codecs: `get(name, dim)` gives one, `names()` lists them.

A codec is one file here that defines `CODECS`, {name: factory of a dimension}, or `WITH_PARAMETER`, for codecs whose
name may carry a number, as `fp8:0.03125`; and, where it runs on Metal, one header in `kernels_metal/codec/`.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable
from functools import cache
from typing import Any

from ..errors import RotorError
from ..kernels.packed import Packed
from .base import Codec

__all__ = ["Codec", "Packed", "get", "names", "register", "with_parameter"]

Factory = Callable[[int], Codec]
# Takes the whole name, a dimension and the parameter, 1.0 where the name has none.
ParameterFactory = Callable[[str, int, float], Codec]


@cache
def _registry() -> dict[str, Factory]:
    """Every module's `CODECS`, {name: factory of a dimension}, found by looking: no list to keep in step."""
    return _found("CODECS")


@cache
def _with_parameter() -> dict[str, ParameterFactory]:
    """Every module's `WITH_PARAMETER`, the same for codecs that take a parameter."""
    return _found("WITH_PARAMETER")


def _found(attribute: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for module in pkgutil.iter_modules(__path__):
        found |= getattr(importlib.import_module(f"{__name__}.{module.name}"), attribute, {})
    return found


def names() -> list[str]:
    """Names of all codecs, without parameters, sorted."""
    return sorted([*_registry(), *_with_parameter()])


def register(name: str, factory: Factory) -> None:
    """Adds a codec from outside the package.

        register("mine4", lambda dim: MyCodec(dim))  # an object with the methods of `Codec`

    `factory(dim)` raises RotorError for a dimension that the codec can't take.
    """
    _registry()[name] = factory
    get.cache_clear()


@cache
def get(name: str, dim: int) -> Codec:
    """The codec `name` for vectors of `dim` elements, the same object at each call.

        get("trellis3", 128).bits  # 3.125

    A name may end in a colon and a parameter.

    Raises:
        RotorError: unknown name (the message lists the known ones), a parameter that is wrong, of a codec that takes
            none, or not in the form `with_parameter` gives it, or a dimension the codec can't take.
    """
    base, colon, text = name.partition(":")
    if base in _with_parameter():
        parameter = _parameter(name, text) if colon else 1.0
        if (known := with_parameter(base, parameter)) != name:
            raise RotorError(f"codec {name!r} is written {known!r}")
        return _with_parameter()[base](name, dim, parameter)
    if base not in _registry():
        raise RotorError(f"unknown codec {name!r}; codecs: {', '.join(names())}")
    if colon:
        takers = ", ".join(sorted(_with_parameter()))
        raise RotorError(f"codec {base} takes no parameter ({name!r}); those that do: {takers}")
    return _registry()[base](dim)


def with_parameter(base: str, parameter: float) -> str:
    """The name of codec `base` with a parameter: equal ones give equal names, `base` itself has parameter 1."""
    return base if parameter == 1 else f"{base}:{float(parameter)!r}"


def _parameter(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise RotorError(f"codec {name!r}: its parameter must be a finite number above 0, not {text!r}")
    return value
