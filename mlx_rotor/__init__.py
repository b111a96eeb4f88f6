"""Compressed KV caches and mixed-bit MoE quantization on top of stock mlx and mlx-lm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import RotorError

if TYPE_CHECKING:
    from .host import attach, detach, load, make_prompt_cache, verify

__version__ = "0.1.0"
__all__ = ["RotorError", "attach", "detach", "load", "make_prompt_cache", "verify"]


def __getattr__(name: str) -> Any:
    """Public names that need mlx_lm are imported when first used: seconds that `--help` need not wait for."""
    if name in __all__:
        from . import host

        return getattr(host, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
