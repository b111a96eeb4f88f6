"""The caches of a prompt cache one by one, those inside a CacheList too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_lm.models import cache as stock

# Layer number, then the place in each CacheList on the way.
Path = tuple[int, ...]


def slots(caches: Sequence[Any]) -> dict[Path, Any]:
    """Every cache that is no CacheList, by its path, in order."""
    out: dict[Path, Any] = {}
    for i, cache in enumerate(caches):
        inner = slots(cache.caches) if isinstance(cache, stock.CacheList) else {(): cache}
        out.update({(i, *path): c for path, c in inner.items()})
    return out


def replaced(caches: Sequence[Any], new: Mapping[Path, Any]) -> list[Any]:
    """The same prompt cache with other caches at some paths; `caches` stays as it is."""
    out = list(caches)
    for i, cache in enumerate(caches):
        inner = {path[1:]: c for path, c in new.items() if path[0] == i}
        if () in inner:
            out[i] = inner[()]
        elif inner:
            out[i] = stock.CacheList(*replaced(cache.caches, inner))
    return out
