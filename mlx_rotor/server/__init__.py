"""An OpenAI-compatible server over compressed KV caches, on top of mlx_lm.server.

`running` starts `provider` (models) and `generator` (the thread that generates), and answers HTTP with `choices` and
`handler`. Each request passes `reader`, which checks `fields`, looks models up in `catalog` and raises a `refusal`.
"""

from __future__ import annotations

from ..cache import DEFAULT, Scheme, parse
from ..host.experts import AUTO
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

    For programs that start mlx_lm's server themselves; `python -m mlx_rotor.server` does the same for its own.

    Args:
        kv: a scheme or its text, such as "turbo4v2"; `exact` (or None) keeps mlx_lm's own cache.
        sinks, ring: first and most recent tokens that stay exact; None keeps the scheme's numbers.
        protect_layers: layers at either end that are compressed a step less; None keeps the scheme's number.
        experts: `auto`, `fused` or `stock`, as in `attach_experts`.

    Returns:
        A patch whose `undo()`, or the end of a `with` block, gives mlx_lm.server its own parts back.

    Raises:
        RotorError: an unknown scheme, or an unknown mode of experts.

    Example:
        >>> import mlx_lm.server
        >>> with mlx_rotor.patch_server("turbo4v2"):
        ...     mlx_lm.server.main()
    """
    scheme = parse(kv) if isinstance(kv, str) else kv
    scheme = scheme and scheme.keeping(sinks=sinks, ring=ring, protect_layers=protect_layers)
    return patch(scheme, experts)
