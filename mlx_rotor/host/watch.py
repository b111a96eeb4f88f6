"""Keys and values as they go into a layer's attention, their largest magnitudes, and the layers that a scheme
compresses: the measurements that calibration takes from a running model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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


class KvLargest:
    """The largest |K| and |V| of every layer. `layers`: numbers of those whose cache is to be compressed, in order."""

    def __init__(self, layers: Sequence[int]) -> None:
        self._layers = list(layers)
        self._found: dict[int, tuple[float, float]] = {}

    def of(self, layer: int) -> See | None:
        """The function that takes K and V of a layer's attention; None for a layer without such a cache."""
        if layer not in self._layers:
            return None

        def see(k: mx.array, v: mx.array) -> None:
            before = self._found.get(layer, (0.0, 0.0))
            now = [float(mx.abs(x.astype(mx.float32)).max().item()) for x in (k, v)]  # type: ignore[arg-type]
            if not all(map(math.isfinite, now)):
                raise RotorError(f"calibration: layer {layer} of the source has keys or values that are not finite")
            self._found[layer] = max(before[0], now[0]), max(before[1], now[1])

        return see

    def pairs(self) -> list[tuple[float, float]]:
        """Largest magnitude of K and of V, for every layer. RotorError where one was not run."""
        if missing := [layer for layer in self._layers if layer not in self._found]:
            raise RotorError(f"calibration: layers {', '.join(map(str, missing))} showed no keys and values")
        return [self._found[layer] for layer in self._layers]

    def state(self) -> dict[str, Any]:
        """The magnitudes so far, as JSON holds them, for `restore`."""
        return {str(layer): list(pair) for layer, pair in sorted(self._found.items())}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes up the `state` of an earlier run of the same job."""
        self._found = {int(layer): (float(k), float(v)) for layer, (k, v) in state.items()}
