"""Compressed KV caches and mixed-bit MoE quantization on top of stock mlx and mlx-lm.

    import mlx_rotor

    model, tokenizer = mlx_rotor.load()  # the bundled model; or a folder, or a repository
    mlx_rotor.attach(model, kv="trellis3")  # from here on mlx_lm generates through compressed caches

`mlx_rotor.quantize`, `plan` and `evaluate` do what the commands of these names do. Names are imported when first used.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .errors import RotorError
from .host import formats as _formats

if TYPE_CHECKING:
    from .api import evaluate, plan, quantize
    from .host import (
        IsoQuantCache,
        PlanarQuantCache,
        RotorQuantCache,
        TurboQuantCache,
        attach,
        attach_experts,
        detach,
        detach_experts,
        load,
        make_prompt_cache,
        verify,
    )
    from .server import patch_server

__version__ = "0.1.0"
SUBPACKAGES = (
    "bench",
    "bundled",
    "cache",
    "calibration",
    "codec",
    "diagnose",
    "experts",
    "host",
    "kernels",
    "memory",
    "models",
    "quality",
    "quant",
    "server",
)
__all__ = [
    "IsoQuantCache",
    "PlanarQuantCache",
    "RotorError",
    "RotorQuantCache",
    "TurboQuantCache",
    "attach",
    "attach_experts",
    "detach",
    "detach_experts",
    "evaluate",
    "load",
    "make_prompt_cache",
    "patch_server",
    "plan",
    "quantize",
    "verify",
]
_ELSEWHERE = {**dict.fromkeys(("evaluate", "plan", "quantize"), "api"), "patch_server": "server"}
_formats.install()  # mlx_lm loads checkpoints in our formats from here on


class _Package(ModuleType):
    """This package. A command's module never takes the place of the function that has its name."""

    def __setattr__(self, name: str, value: Any) -> None:
        # Python's import of mlx_rotor/quantize.py sets the module as an attribute of the package.
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    """Sub-packages, and names that need mlx_lm, are imported when first used: `--help` need not wait for them."""
    if name in SUBPACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in __all__:
        return getattr(importlib.import_module(f"{__name__}.{_ELSEWHERE.get(name, 'host')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *SUBPACKAGES})
