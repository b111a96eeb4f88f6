"""The best codecs for K and V of every layer at a number of bits, by what each alone does to a model's predictions.

Every (layer, side, codec) is measured with all else exact, the layer's other side included, and nothing protected. The
costs are summed as if they were independent, which holds while they are small; the chosen scheme is then measured as a
whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..cache import RotorCache
from ..cache.scheme_file import Sidecar, whole_bits
from ..errors import RotorError
from ..host.attachment import layer_cache
from ..quality.footprint import packed_side
from ..quality.metrics import token_kl
from ..quality.model import Cache, EvaluatedModel, chunks, log_probabilities
from ..quant.budget.knapsack import Option, choose
from .maxima import compressed, model_of

BLOCK = 32
UNITS = 8 * 256  # sizes are whole numbers of bits / 256: a mean is shared by 256 tokens
SIDES = ("k", "v")

Advance = Callable[[int], Any]


class OneSide:
    """A layer's cache whose K or V is packed and expanded again and whose other side is exact.

    Attention gets a view and a plain array, which is no pair of views: it computes with the expanded tokens. Both
    caches hold every token; where the layer has a sliding window, the mask does.
    """

    def __init__(self, k: str, v: str, side: str, centre: bool, window: int | None) -> None:
        self.exact, self.packed = layer_cache(None), RotorCache(k, v, 0, 0, BLOCK, centre=centre)
        self.side, self.window = side, window

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        k, v = self.exact.update_and_fetch(keys, values)
        views = self.packed.update_and_fetch(keys, values)
        return (views[0], v) if self.side == "k" else (k, views[1])

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> Any:
        return self.exact.make_mask(n, return_array=return_array, window_size=window_size or self.window)

    @property
    def state(self) -> list[Any]:
        return [self.exact.state, self.packed.state]

    def __getattr__(self, name: str) -> Any:
        """Everything else (offset, size, …) is the exact cache's."""
        return getattr(self.__dict__["exact"], name)


@dataclass(frozen=True)
class Found:
    """A calibrated scheme.

    Attributes:
        scheme: as it is written to a file.
        bits: stored bits an element, K and V of all layers together.
        predicted: its KL, nats a token, as the sum of what its codecs cost alone.
        measured: the KL of all of them together.
        alone: (layer, side, codec) -> KL with all else exact.
    """

    scheme: Sidecar
    bits: float
    predicted: float
    measured: float
    alone: dict[tuple[int, str, str], float]


@dataclass(frozen=True)
class _Side:
    """One layer's K or V under one codec: KL, and bytes and elements of a token."""

    kl: float
    stored: float
    elements: int


class Search:
    """Measures `windows` (int [windows, tokens]) with nothing protected, `chunk` tokens at a time."""

    def __init__(
        self, subject: EvaluatedModel, windows: np.ndarray, chunk: int, candidates: Sequence[str], advance: Advance
    ) -> None:
        if not candidates:
            raise RotorError("--candidates: name at least one codec")
        self.bits_of = {name: whole_bits(name) for name in candidates}
        self.subject, self.windows, self.chunk, self.advance = subject, windows, chunk, advance
        caches = subject.new_cache(f"k={candidates[0]},v={candidates[0]}")
        self.layers, self.model = compressed(caches), model_of(caches)
        self.centre = {i: caches[i].body.centre for i in self.layers}
        self.window = {i: caches[i].window for i in self.layers}
        self.reference: list[np.ndarray] = []

    @property
    def runs(self) -> int:
        """Passes over the windows."""
        return 2 + len(SIDES) * len(self.layers) * len(self.bits_of)

    def packed(self, layer: int, k: str, v: str) -> RotorCache:
        return RotorCache(k, v, 0, 0, BLOCK, centre=self.centre[layer], window=self.window[layer])

    def kl(self, new_cache: Callable[[], Cache]) -> tuple[float, Cache]:
        """Mean KL from the reference over all tokens but each window's first chunk, which reads nothing packed; and the
        last cache. The first call is the reference."""
        first, total, count, at = not self.reference, 0.0, 0, 0
        cache: Cache = []
        for window in self.windows:
            cache = new_cache()
            for nth, logits in enumerate(chunks(self.subject.model, cache, window.tolist(), self.chunk)):
                logp = log_probabilities(logits)
                if first:
                    self.reference.append(logp)
                elif nth:
                    total += float(token_kl(self.reference[at], logp).sum())
                    count += len(logp)
                at += 1
                self.advance(len(logp))
        return (total / count if count else 0.0), cache

    def alone(self, layer: int, side: str, name: str) -> _Side:
        def new() -> Cache:
            cache = self.subject.new_cache("exact")
            cache[layer] = OneSide(name, name, side, self.centre[layer], self.window[layer])
            return cache

        kl, cache = self.kl(new)
        newest = cache[layer].packed.body.segments[-1]
        return _Side(kl, *packed_side(newest.k if side == "k" else newest.v))

    def together(self, chosen: Sequence[tuple[str, str]]) -> float:
        def new() -> Cache:
            cache = self.subject.new_cache("exact")
            for layer, pair in zip(self.layers, chosen, strict=True):
                cache[layer] = self.packed(layer, *pair)
            return cache

        return self.kl(new)[0]

    def narrowest(self) -> float:
        """The least bits an element that the candidates take, from one window: known before minutes of measuring.

        Raises:
            RotorError: nothing of a window is packed.
        """
        found = []
        for name in self.bits_of:
            cache = self.subject.new_cache("exact")
            for layer in self.layers:
                cache[layer] = self.packed(layer, name, name)
            for _ in chunks(self.subject.model, cache, self.windows[0].tolist(), self.chunk):
                pass
            if not all(cache[layer].body.segments for layer in self.layers):
                raise RotorError(f"--window {self.windows.shape[1]}: nothing of so few tokens is packed; give more")
            newest = [cache[layer].body.segments[-1] for layer in self.layers]
            sides = [[packed_side(getattr(segment, side)) for segment in newest] for side in SIDES]
            found.append([sum(stored for stored, _ in side) for side in sides])
            elements = sum(n for side in sides for _, n in side)
        return 8 * sum(map(min, zip(*found, strict=True))) / elements

    def solve(self, target: float, name: str, made: dict[str, Any]) -> Found:
        """The scheme of the least summed KL at `target` bits an element or fewer, K never below V.

        Raises:
            RotorError: windows that are one chunk or less; a target that not even the narrowest candidates meet.
        """
        if self.windows.shape[1] <= self.chunk:
            raise RotorError(f"windows of {self.windows.shape[1]} tokens in chunks of {self.chunk} read nothing packed")
        if (least := self.narrowest()) > target + 1e-6:
            raise RotorError(
                f"--target-bits {target:g}: the narrowest candidates take {least:.3f} bits an element; give narrower "
                "--candidates or a higher target"
            )
        self.kl(lambda: self.subject.new_cache("exact"))
        costs = {(i, s, c): self.alone(i, s, c) for i in self.layers for s in SIDES for c in self.bits_of}
        pairs = [(k, v) for k in self.bits_of for v in self.bits_of if self.bits_of[k] >= self.bits_of[v]]
        groups = [[_option(costs[i, "k", k], costs[i, "v", v]) for k, v in pairs] for i in self.layers]
        elements = sum(costs[i, s, next(iter(self.bits_of))].elements for i in self.layers for s in SIDES)
        taken = choose(groups, int(target / 8 * elements * UNITS + 1e-6))
        options, chosen = [group[n] for group, n in zip(groups, taken, strict=True)], tuple(pairs[n] for n in taken)
        measured = self.together(chosen)
        bits = 8 * sum(o.size for o in options) / UNITS / elements
        predicted = sum(o.cost for o in options)
        made = made | {"target_bits": target, "bits": bits, "predicted_kl": predicted, "measured_kl": measured}
        scheme = Sidecar(name, chosen, model=self.model, made=made)
        return Found(scheme, bits, predicted, measured, {key: side.kl for key, side in costs.items()})


def _option(k: _Side, v: _Side) -> Option:
    return Option(round((k.stored + v.stored) * UNITS), k.kl + v.kl)
