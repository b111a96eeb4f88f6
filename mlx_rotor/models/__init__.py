"""Facts about architectures, one file a naming family: what each parameter is for, and where checkpoints keep it.

A new family is one new file here that defines `ARCHITECTURE`; nothing else needs to know it exists.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Any

from ..errors import RotorError
from .architecture import Architecture, Fused, Tensor, pattern

__all__ = ["Architecture", "Fused", "Tensor", "lookup", "pattern", "supported"]


@cache
def _registry() -> dict[str, Architecture]:
    found: dict[str, Architecture] = {}
    for info in pkgutil.iter_modules(__path__):
        arch = getattr(importlib.import_module(f"{__name__}.{info.name}"), "ARCHITECTURE", None)
        if arch is not None:
            found.update(dict.fromkeys(arch.model_types, arch))
    return found


def supported() -> list[str]:
    """Every `model_type` that has a family here, sorted."""
    return sorted(_registry())


def lookup(config: Mapping[str, Any]) -> Architecture:
    """The family that a checkpoint's config.json names in `model_type`; RotorError lists the supported ones."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in _registry():
        raise RotorError(f"unsupported model_type {model_type!r} in config.json; supported: {', '.join(supported())}")
    return _registry()[model_type]
