"""Compressed KV caches and mixed-bit MoE quantization on top of stock mlx and mlx-lm."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import RotorError
from .host import formats as _formats

if TYPE_CHECKING:
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
    "bundled",
    "cache",
    "calibration",
    "codec",
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
    "load",
    "make_prompt_cache",
    "patch_server",
    "verify",
]
_formats.install()  # mlx_lm loads checkpoints in our formats from here on


def __getattr__(name: str) -> Any:
    """Sub-packages, and names that need mlx_lm, are imported when first used: `--help` need not wait for them."""
    if name in SUBPACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name == "patch_server":
        from .server import patch_server

        return patch_server
    if name in __all__:
        from . import host

        return getattr(host, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
