"""Finds out what a model's attention does with each of its caches, by running the model on caches that watch.

Attention either hands both arrays of a cache untouched to `mx.fast.scaled_dot_product_attention`, where packed tokens
can be read in their place, or computes with the arrays itself, where they would have to be expanded on every step.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as stock

from ..cache.view import KVView, Mask, views
from ..errors import RotorError
from . import attention
from .notes import note, noted
from .slots import Path, replaced, slots

FUSED = "fused"
EXPANDED = "attention reads expanded keys and values"
LATENT = "latent attention, which reads expanded latents"
INDEX = "keys of an index, no attention"
IDLE = "not used by this model"

_lock = threading.Lock()


@dataclass
class _Pair:
    """The handle of one pair of views; attention over it is MLX's own."""

    k: mx.array
    v: mx.array
    attended: bool = False

    def attend(self, q: mx.array, scale: float, mask: Mask = None, sink_logits: mx.array | None = None) -> mx.array:
        self.attended = True
        return attention.stock(q, self.k, self.v, scale=scale, mask=mask, sinks=sink_logits)


class _Watch:
    """Over a stock cache: hands out views, and keeps each pair."""

    pairs: list[_Pair]

    def _watched(self, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        if isinstance(k, KVView):
            return k, v
        self.__dict__.setdefault("pairs", []).append(pair := _Pair(k, v))
        return views(k, v, pair)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return self._watched(*super().update_and_fetch(keys, values))  # type: ignore[misc]

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        return self._watched(*super().keys_and_values())  # type: ignore[misc]

    def use(self) -> str:
        pairs = self.__dict__.get("pairs")
        if not pairs:
            return IDLE
        if all(p.attended for p in pairs):
            return FUSED
        k, v = pairs[0].k, pairs[0].v
        if v.shape[-1] == 0:
            return INDEX
        return LATENT if k.shape[1] == 1 and k.shape[-1] != v.shape[-1] else EXPANDED


class _WatchedKV(_Watch, stock.KVCache):
    pass


class _WatchedRotating(_Watch, stock.RotatingKVCache):
    pass


def _watched(cache: Any) -> _Watch | None:
    if type(cache) is stock.KVCache:
        return _WatchedKV()
    if type(cache) is stock.RotatingKVCache:
        return _WatchedRotating(cache.max_size, cache.keep)
    return None


def uses(model: Any, caches: Sequence[Any], *, lazily: bool = False) -> dict[Path, str]:
    """FUSED, or why not, for every KVCache and RotatingKVCache of `model`; remembered on the model.

    Args:
        caches: what mlx_lm would make for it, empty. The others among them are used up.
        lazily: compute nothing, for a model without weights; what can only go wrong in computing does not show.

    Raises:
        RotorError: the model can't run.
    """
    watched = {path: w for path, c in slots(caches).items() if (w := _watched(c)) is not None}
    kinds = tuple((path, type(w).__name__) for path, w in watched.items())
    with _lock:
        known: dict[Any, dict[Path, str]] = noted(model, "_rotor_uses") or {}
        if kinds not in known:
            known = {**known, kinds: _run(model, caches, watched, lazily)}
            note(model, "_rotor_uses", known)
        return dict(known[kinds])


def _run(model: Any, caches: Sequence[Any], watched: dict[Path, Any], lazily: bool) -> dict[Path, str]:
    """A prompt of two tokens and a step of one."""
    full = replaced(caches, watched)
    attention.install()
    try:
        for tokens in ([0, 1], [0]):
            out = model(mx.array([tokens]), cache=full)
            if not lazily:
                mx.eval(out)
    except (ValueError, TypeError, AttributeError, RuntimeError) as e:
        raise RotorError(f"{type(model).__module__} does not run on two tokens and its own caches: {e}") from e
    found = {path: w.use() for path, w in watched.items()}
    for path, use in found.items():
        # Arrays that a layer computes with beside another cache of its own, which attention reads.
        if use == EXPANDED and any(p[:-1] == path[:-1] and found[p] != use for p in found if len(p) > 1):
            found[path] = INDEX
    return found
