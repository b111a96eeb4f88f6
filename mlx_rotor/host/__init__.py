"""The only code that knows mlx_lm's insides."""

from .attachment import attach, detach, make_prompt_cache, verify
from .loading import load
from .names import IsoQuantCache, PlanarQuantCache, RotorQuantCache, TurboQuantCache

__all__ = [
    "IsoQuantCache",
    "PlanarQuantCache",
    "RotorQuantCache",
    "TurboQuantCache",
    "attach",
    "detach",
    "load",
    "make_prompt_cache",
    "verify",
]
