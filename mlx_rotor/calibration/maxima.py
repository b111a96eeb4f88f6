"""Calibrating fp8: the largest K and V of every layer over a text, and the scales that hold them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ..cache import RotorCache, scheme_file
from ..cache.scheme_file import Sidecar
from ..errors import RotorError
from ..host.slots import slots
from ..quality.model import EvaluatedModel, chunks


def compressed(caches: Sequence[Any]) -> list[int]:
    """Which of a model's caches a scheme replaces.

    Raises:
        RotorError: some are parts of a layer's cache: such layers aren't measured.
    """
    if any(len(path) > 1 and isinstance(c, RotorCache) for path, c in slots(caches).items()):
        raise RotorError(
            "layers of this model keep several caches each: its scheme can't be calibrated, name one by --kv"
        )
    return [i for i, c in enumerate(caches) if isinstance(c, RotorCache)]


def model_of(caches: Sequence[Any]) -> str:
    """The fingerprint of the model that compressed caches are for, "" if they carry none."""
    return next((c.fingerprint for c in caches if isinstance(c, RotorCache)), "")


def maxima(
    subject: EvaluatedModel, windows: np.ndarray, chunk: int, advance: Callable[[int], Any] = lambda n: None
) -> list[tuple[float, float]]:
    """Largest absolute K (after RoPE) and V of every layer that a scheme compresses, with exact caches.

    Args:
        windows: int [windows, tokens], each read from an empty cache.

    Raises:
        RotorError: K or V are not finite numbers somewhere.
    """
    layers = compressed(subject.new_cache("fp8"))
    largest = [(0.0, 0.0)] * len(layers)
    for window in windows:
        cache = subject.new_cache("exact")
        for logits in chunks(subject.model, cache, window.tolist(), chunk):
            for nth, i in enumerate(layers):
                # Room not used yet is 0, and a sliding window's buffer holds the whole chunk.
                k, v = (float(mx.abs(x.astype(mx.float32)).max()) for x in (cache[i].keys, cache[i].values))
                if not (np.isfinite(k) and np.isfinite(v)):
                    raise RotorError(f"layer {i}: K or V is no finite number on this text; the model itself is broken")
                largest[nth] = max(largest[nth][0], k), max(largest[nth][1], v)
            advance(len(logits))
    return largest


def fp8_scheme(subject: EvaluatedModel, largest: Sequence[tuple[float, float]], made: dict[str, Any]) -> Sidecar:
    return scheme_file.scheme(largest, made, model_of(subject.new_cache("fp8")))
