"""Keys and values as they go into a layer's attention, and which layers have a cache that a scheme replaces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from ..cache import RotorCache, parse
from ..errors import RotorError
from .attachment import stock_cache
from .layers import compress
from .probe import uses
from .slots import slots

# Called with K [B, h, S, D], positions applied, and V [B, h, S, V].
See = Callable[[mx.array, mx.array], None]


@contextmanager
def attended(see: See) -> Iterator[None]:
    """While it lasts, `see` gets K and V of every attention, before it is computed."""
    before = mx.fast.scaled_dot_product_attention

    def attend(q: mx.array, k: mx.array, v: mx.array, *args: Any, **named: Any) -> mx.array:
        see(k, v)
        return before(q, k, v, *args, **named)

    mx.fast.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        mx.fast.scaled_dot_product_attention = before


def compressed_layers(model: Any, kv: str) -> list[int]:
    """Numbers of the layers whose cache scheme `kv` replaces, for a model that may have no weights: computes nothing.

    Raises:
        RotorError: none, or layers that keep several caches each.
    """
    scheme = parse(kv)
    if scheme is None:
        raise RotorError(f"{kv} compresses nothing")
    found = slots(compress(stock_cache(model), scheme, uses(model, stock_cache(model), lazily=True)))
    ours = [path for path, cache in found.items() if isinstance(cache, RotorCache)]
    if any(len(path) > 1 for path in ours):
        raise RotorError("layers of this model keep several caches each: their KV scales can't be calibrated")
    return [path[0] for path in ours]
