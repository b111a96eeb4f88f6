"""An OpenAI-compatible server: which requests are understood, which models are served, and what is refused.

Compressed caches for people who start mlx_lm.server themselves.
"""

from __future__ import annotations

from ..cache import DEFAULT, Scheme, parse
from ..host.experts import AUTO
from .reader import OpenAI
from .running import Patch, patch

__all__ = ["patch_server"]


def patch_server(
    kv: str | Scheme | None = DEFAULT,
    *,
    sinks: int | None = None,
    ring: int | None = None,
    protect_layers: int | None = None,
    experts: str = AUTO,
) -> Patch:
    """Makes `mlx_lm.server.main()` serve every model through a compressed KV cache, batches and prompt cache included.

    Args:
        kv: a scheme or its text, `exact` (or None) for mlx_lm's own cache.
        sinks, ring, protect_layers: what stays exact or a step wider; None keeps the scheme's.
        experts: `auto`, `fused` or `stock`, as `attach_experts` takes it.

    Returns:
        What takes it away again: `undo()`, or the end of a `with` block.

    Raises:
        RotorError: unknown scheme, or mode of experts.
    """
    scheme = parse(kv) if isinstance(kv, str) else kv
    scheme = scheme and scheme.keeping(sinks=sinks, ring=ring, protect_layers=protect_layers)
    return patch(scheme, OpenAI, experts)
