"""The only code that knows mlx_lm's insides."""

from .attachment import attach, detach, make_prompt_cache, verify
from .loading import load

__all__ = ["attach", "detach", "load", "make_prompt_cache", "verify"]
