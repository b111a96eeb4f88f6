"""The choice of the caches in a prompt cache that become compressed, with a reason for each that does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_lm.models import cache as stock

from ..cache import RotorCache, Scheme
from ..errors import RotorError
from .probe import FUSED, INDEX
from .slots import Path, replaced, slots

# Packed tokens behind a window are dropped some hundred at a time, so that a short one saves little or nothing.
SHORTEST_WINDOW = 512
# First tokens that mlx_lm keeps when it limits a cache.
KEEP = 4
SHORT = "a sliding window too short to save memory"
SHARED = "shares its mask with layers that are left exact"


def left_exact(cache: Any) -> str:
    """The reason why a cache that is no RotorCache was left as it is, or else the kind of cache."""
    return getattr(cache, "left_exact", type(cache).__name__)


def limited(caches: list[Any], size: int) -> list[Any]:
    """`caches`, empty, with every KVCache limited to its first and last tokens, `size` in all, as mlx_lm limits them
    for models that make no caches of their own. Raises RotorError for a size that leaves no room for recent tokens."""
    if size <= KEEP:
        raise RotorError(f"--max-kv-size {size}: must be more than the {KEEP} first tokens, which are always kept")
    plain = [path for path, c in slots(caches).items() if type(c) is stock.KVCache]
    return replaced(caches, {path: stock.RotatingKVCache(size, KEEP) for path in plain})


def check_limit(size: int, uses: Mapping[Path, str]) -> None:
    """Raises RotorError where compressed caches can't be limited to `size` tokens: too few to save memory, or a model
    that needs them all."""
    if size < SHORTEST_WINDOW:
        raise RotorError(
            f"--max-kv-size {size} leaves little to compress: it takes {SHORTEST_WINDOW} or more, or --kv exact"
        )
    if INDEX in uses.values():
        raise RotorError("--max-kv-size: this model chooses by an index among all tokens it has seen; leave it out")


def compress(
    caches: list[Any], scheme: Scheme, uses: Mapping[Path, str] | None = None, fingerprint: str = ""
) -> list[Any]:
    """`caches` with every KVCache and RotatingKVCache that can be replaced by a compressed one of the same tokens.

    Those that can't be are marked with the reason, see `left_exact`. Other kinds of caches stay.

    Args:
        uses: of the caches' model, see `probe.uses`; None: every attention counts as fused.
        fingerprint: of that model, for prompt-cache files.

    Raises:
        RotorError: if none can be replaced.
    """
    every = slots(caches)
    reasons = {path: _objection(c, path, uses) for path, c in every.items() if _attention(c)}
    for path, reason in reasons.items():
        # Layers of one window share a mask, whose columns are the tokens held: all of them or none.
        others = [p for p in reasons if _window(every[p]) == _window(every[path])]
        if not reason and _window(every[path]) and any(reasons[p] for p in others):
            reasons[path] = SHARED
    taken = [path for path, reason in reasons.items() if not reason]
    for path, reason in reasons.items():
        if reason:
            every[path].left_exact = reason
    if not taken:
        kinds = sorted({left_exact(c) for c in every.values()}) or ["no caches"]
        raise RotorError(
            f"{scheme.name}: this model has nothing to compress: {'; '.join(kinds)}; run it with --kv exact"
        )
    new = {path: _compressed(every[path], scheme, scheme.codecs(nth, len(taken))) for nth, path in enumerate(taken)}
    for cache in new.values():
        cache.fingerprint = fingerprint
    return replaced(caches, new)


def _attention(cache: Any) -> bool:
    return type(cache) in (stock.KVCache, stock.RotatingKVCache)


def _window(cache: Any) -> tuple[int, int] | None:
    return (cache.max_size, cache.keep) if type(cache) is stock.RotatingKVCache else None


def _objection(cache: Any, path: Path, uses: Mapping[Path, str] | None) -> str:
    use = FUSED if uses is None else uses.get(path, FUSED)
    if use != FUSED:
        return use
    window = _window(cache)
    return SHORT if window and window[0] < SHORTEST_WINDOW else ""


def _compressed(cache: Any, scheme: Scheme, codecs: tuple[str, str]) -> RotorCache:
    window = _window(cache)
    if window is None:
        out = RotorCache(*codecs, scheme.sinks, scheme.ring, scheme.block, centre=scheme.centre)
        if not cache.empty():
            out.append(*cache.keys_and_values())
        return out
    size, keep = window
    # Half a window at most stays exact, and what mlx_lm keeps of the start is always seen.
    ring = min(scheme.ring, (size - keep) // 2)
    block = scheme.keeping(ring=ring).block
    out = RotorCache(*codecs, keep, ring, block, centre=scheme.centre, window=size - keep)
    if not cache.empty():
        # A rotating cache's buffer is a circle: these are its tokens in order.
        out.append(cache._temporal_order(cache.keys), cache._temporal_order(cache.values))
        out.dropped += cache.offset - out.offset
    return out
