"""Bytes of a model's KV caches at a context, from the caches themselves, before there are weights or tokens.

MLX arrays are lazy: a model without weights is run on two tokens to learn what its caches hold, and caches are filled
with zeros that are never computed. Their sizes are then those of real ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from ..cache import RotorCache, Scheme
from ..cache.body import SPAN, capacity_for
from ..errors import RotorError
from ..host.attachment import stock_cache
from ..host.layers import compress
from ..host.probe import uses
from ..host.skeleton import skeleton
from ..host.slots import Path, slots

# Tokens that mlx_lm feeds at a time: how far a cache of limited size overshoots.
PREFILL = 2048


def kv_bytes(config: Mapping[str, Any], context: int, scheme: Scheme | None) -> int:
    """Bytes that the KV caches of a model with this config.json own once one sequence of `context` tokens, in 16-bit
    floats, is in them, spare room included; `scheme` None for mlx_lm's own caches.

    Raises:
        RotorError: an architecture mlx_lm doesn't have, or a scheme that compresses nothing of it.
    """
    if context < 1:
        raise RotorError(f"a context of {context} tokens holds nothing")
    model = skeleton(config)
    model.set_dtype(mx.bfloat16)
    used = stock_cache(model)
    try:
        model(mx.array([[0, 1]]), cache=used)
    except (ValueError, TypeError, AttributeError, RuntimeError) as e:
        raise RotorError(f"{type(model).__module__} does not run on two tokens and its own caches: {e}") from e
    caches = stock_cache(model)
    if scheme is not None:
        caches = compress(caches, scheme, uses(model, stock_cache(model), lazily=True))
    before = slots(used)
    known: dict[Any, int] = {}
    total = 0
    for path, cache in slots(caches).items():
        shapes = _shapes(before, path)
        if shapes is None:
            total += _stored(before[path])
            continue
        key = (type(cache), getattr(cache, "codecs", None), _bound(cache), shapes)
        if key not in known:
            known[key] = _filled(cache, shapes, context)
        total += known[key]
    return total


def _shapes(used: Mapping[Path, Any], path: Path) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """([B, H, D] of keys, of values) of a cache that tokens add to; None for states of one size."""
    keys, values = getattr(used[path], "keys", None), getattr(used[path], "values", None)
    if not isinstance(keys, mx.array) or not isinstance(values, mx.array):
        return None
    return tuple(tuple(n for i, n in enumerate(a.shape) if i != 2) for a in (keys, values))  # type: ignore[return-value]


def _stored(cache: Any) -> int:
    return 0 if cache.empty() else int(cache.nbytes)


def _bound(cache: Any) -> int | None:
    """Tokens a cache holds at most, between two chunks of a prompt; None: all."""
    window = getattr(cache, "window", None)
    if window is not None:
        return int(window + window // 4 + PREFILL)  # tokens behind the window are dropped a quarter at a time
    size = getattr(cache, "max_size", None)
    return None if size is None else int(size + PREFILL)


def _filled(cache: Any, shapes: tuple[tuple[int, ...], tuple[int, ...]], context: int) -> int:
    bound = _bound(cache)
    n = context if bound is None else min(context, bound)
    packed, few = isinstance(cache, RotorCache), n
    if packed:
        few = cache.sinks + cache.ring + cache.block + SPAN
        few += max(0, n - few) % cache.block  # the same tokens are then left in the ring
    k, v = (mx.zeros((b, h, min(n, few), d), mx.bfloat16) for b, h, d in shapes)
    cache.update_and_fetch(k, v)
    # Packing is described a few thousand vectors at a time, which takes seconds for a long context: what packed tokens
    # weigh is known from a few of them.
    return int(cache.nbytes) if n <= few or not packed else _grown(cache, n)


def _grown(cache: RotorCache, n: int) -> int:
    """Bytes of a cache, some of whose tokens are packed, once it has taken in `n` tokens."""
    recent = n - cache.sinks - cache.ring
    body = recent - recent % cache.block
    room, total = capacity_for(body), cache.nbytes
    segment = cache.body.segments[-1]
    for side in (segment.k, segment.v):
        for buffer in (side.tiles, side.scale):
            if buffer is not None:
                total += buffer.nbytes // side.room * room - buffer.nbytes
        if side.mean is not None and side.span:
            spans = -(-body // side.span)
            total += side.mean.nbytes // side.mean.shape[2] * spans - side.mean.nbytes
    return int(total)
