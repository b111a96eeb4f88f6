"""The largest keys and values of every layer with a cache that calibration runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from ...errors import RotorError
from ...host.kv_watch import See


class KvLargest:
    """`layers`: numbers of those with a cache that is to be compressed, in order."""

    def __init__(self, layers: Sequence[int]) -> None:
        self._layers = list(layers)
        self._found: dict[int, tuple[float, float]] = {}

    def of(self, layer: int) -> See | None:
        """What a layer's attention is to be shown to; None for a layer without such a cache."""
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
        """For `restore`, as JSON holds it."""
        return {str(layer): list(pair) for layer, pair in sorted(self._found.items())}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes up what an earlier run of the same job found."""
        self._found = {int(layer): (float(k), float(v)) for layer, (k, v) in state.items()}
