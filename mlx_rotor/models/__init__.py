"""Facts about architectures, one file a family: names of parameters, what each is for, and how its routers choose.

A family is one file here that defines `ARCHITECTURE`, `ROUTERS` or both; the registry finds it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from types import ModuleType
from typing import Any

from ..errors import RotorError
from .architecture import Architecture, Fused, Tensor, pattern
from .router import Block, Choice

__all__ = ["Architecture", "Block", "Choice", "Fused", "Tensor", "lookup", "pattern", "routers", "supported"]


def _families() -> list[ModuleType]:
    return [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]


@cache
def _registry() -> dict[str, Architecture]:
    found: dict[str, Architecture] = {}
    for family in _families():
        if (architecture := getattr(family, "ARCHITECTURE", None)) is not None:
            found.update(dict.fromkeys(architecture.model_types, architecture))
    return found


@cache
def routers() -> dict[str, Block]:
    """Every block of mlx_lm whose way of choosing experts is known, by "module.Class"."""
    return {block.name: block for family in _families() for block in getattr(family, "ROUTERS", ())}


def supported() -> list[str]:
    """Every `model_type` whose names are known, sorted."""
    return sorted(_registry())


def lookup(config: Mapping[str, Any]) -> Architecture:
    """The names of the family that a checkpoint's config.json gives in `model_type`.

    Raises:
        RotorError: an unknown one; lists those that are known.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in _registry():
        raise RotorError(f"unsupported model_type {model_type!r} in config.json; supported: {', '.join(supported())}")
    return _registry()[model_type]
