"""The only code that knows mlx_lm's insides. Its names load mlx_lm when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attachment import (
        IsoQuantCache,
        PlanarQuantCache,
        RotorQuantCache,
        TurboQuantCache,
        attach,
        detach,
        make_prompt_cache,
        verify,
    )
    from .experts import attach_experts, detach_experts
    from .loading import load

_WHERE = {
    **dict.fromkeys(("attach", "detach", "make_prompt_cache", "verify"), "attachment"),
    **dict.fromkeys(("attach_experts", "detach_experts"), "experts"),
    "load": "loading",
    **dict.fromkeys(("IsoQuantCache", "PlanarQuantCache", "RotorQuantCache", "TurboQuantCache"), "attachment"),
}
__all__ = [
    "IsoQuantCache",
    "PlanarQuantCache",
    "RotorQuantCache",
    "TurboQuantCache",
    "attach",
    "attach_experts",
    "detach",
    "detach_experts",
    "load",
    "make_prompt_cache",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
