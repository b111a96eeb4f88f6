"""Second moments of a layer's inputs as a job asks for them: per entry and expert, blended where an expert saw little.

An expert's inputs of gate and up resemble the layer's, so the layer's stand in for what is missing, with a weight of
512 rows. Each expert's intermediate values, which down takes, have a basis of their own: their products are blended
with their diagonal alone, their squares with their mean.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import mlx.core as mx

from ..guide import Statistics
from ..plan import Entry
from .mixture import EVEN_PRODUCTS, EVEN_SQUARES, FEWEST, Mixture
from .moments import Moments

DOWN = "down_proj"


class LayerStatistics:
    """Of one layer. `linear`: module -> moments of its inputs; `mixtures`: module of the experts -> their inputs;
    `products`: modules whose Hessians may be asked for."""

    def __init__(
        self, linear: Mapping[str, Moments], mixtures: Mapping[str, Mixture], products: Collection[str]
    ) -> None:
        self._linear, self._mixtures, self._products = linear, mixtures, products

    def importance(self, entry: Entry, part: int = 0) -> mx.array | None:
        """[K] mean square of each input; None for a down projection whose expert saw nothing, and where the inputs
        were not watched."""
        if (found := self._mixture(entry)) is None:
            moments = self._linear.get(entry.module)
            return None if moments is None else moments.squares(part)
        mixture, projection = found
        own = mixture.squares(_kind(projection), part)
        count = int(mixture.counts[part])
        if projection == DOWN:
            if own is None:
                return None
            share = count / (count + EVEN_SQUARES)
            return share * own + (1 - share) * mx.mean(own)
        return _blend(own, mixture.all.squares(), count)

    def hessian(self, entry: Entry, part: int = 0) -> mx.array | None:
        """[K, K] mean outer product of the inputs.

        None where there are fewer rows than K in all, or fewer than FEWEST for a down projection's expert; and where
        all inputs were zero.
        """
        if entry.module not in self._products:
            return None
        found = self._blended(entry, part)
        # A layer that was put into a model as one that does nothing has such inputs: nothing can be learnt from them.
        return found if found is not None and mx.any(mx.diagonal(found) > 0).item() else None

    def _blended(self, entry: Entry, part: int) -> mx.array | None:
        if (found := self._mixture(entry)) is None:
            moments = self._linear.get(entry.module)
            enough = moments is not None and moments.rows >= entry.source_shape[-1]
            return moments.products(part) if moments is not None and enough else None
        mixture, projection = found
        count = int(mixture.counts[part])
        if projection == DOWN:
            own = mixture.products("down", part) if count >= FEWEST else None
            if own is None:
                return None
            share = count / (count + EVEN_PRODUCTS)
            return own * (share + (1 - share) * mx.eye(own.shape[0]))
        enough = mixture.all.rows >= entry.source_shape[-1]
        return _blend(mixture.products("in", part), mixture.all.products(), count) if enough else None

    def inputs(self, entry: Entry) -> str:
        """An expert's gate and up take the same; so do linears that were given the same array."""
        if (found := self._mixture(entry)) is not None:
            return entry.module if found[1] == DOWN else entry.module.rpartition(".")[0]
        own = self._linear.get(entry.module)
        return next((module for module, moments in self._linear.items() if moments is own), entry.module)

    def peak(self, entry: Entry, part: int) -> float | None:
        """Largest magnitude among the inputs of an expert's down projection; None for other entries, and where the
        expert saw nothing."""
        found = self._mixture(entry)
        return found[0].peak(part) if found is not None and found[1] == DOWN else None

    def _mixture(self, entry: Entry) -> tuple[Mixture, str] | None:
        path, _, projection = entry.module.rpartition(".")
        return (self._mixtures[path], projection) if path in self._mixtures else None


class Scaled:
    """Statistics of inputs that were divided by factors: module -> [K], or [parts, K]."""

    def __init__(self, statistics: Statistics, factors: Mapping[str, mx.array]) -> None:
        self._statistics, self._factors = statistics, factors

    def importance(self, entry: Entry, part: int = 0) -> mx.array | None:
        found, factor = self._statistics.importance(entry, part), self._factor(entry, part)
        return found if found is None or factor is None else found / (factor * factor)

    def hessian(self, entry: Entry, part: int = 0) -> mx.array | None:
        found, factor = self._statistics.hessian(entry, part), self._factor(entry, part)
        return found if found is None or factor is None else found / (factor[:, None] * factor[None, :])

    def inputs(self, entry: Entry) -> str:
        """As it was: what reads an input that is divided reads all of it divided."""
        return self._statistics.inputs(entry)

    def _factor(self, entry: Entry, part: int) -> mx.array | None:
        factor = self._factors.get(entry.module)
        return factor if factor is None or factor.ndim == 1 else factor[part]


def _kind(projection: str) -> str:
    return "down" if projection == DOWN else "in"


def _blend(own: mx.array | None, every: mx.array | None, count: int) -> mx.array | None:
    if own is None or every is None:
        return every
    share = count / (count + EVEN_PRODUCTS)
    return share * own + (1 - share) * every
