"""Second moments of the inputs of a layer's weights, by entry and by expert.

The moments of plain matrices are summed as the inputs pass by. Experts' are taken from the layer's inputs on disk, of
the rows routed to each, and blended where an expert saw few: gate's and up's inputs resemble the layer's, which stand
in with a weight of 512 rows. The intermediate values that down takes have a basis of their own in each expert: their
products are blended with their diagonal alone, their squares with their mean.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from ...host.streamed import StreamedExperts, by_expert, by_numpy
from ..guide import Statistics
from ..plan import Entry

# Rows multiplied at a time: 8192 of 3072 inputs are 100 MB.
ROWS = 8192
# A product of 16384 inputs is 1 GiB; beyond, only squares are kept.
WIDEST = 16384


class Moments:
    """Mean squares, and mean outer products where asked for, of inputs x [.., K]; of a stack with one input a matrix
    (`stacked`), x [.., parts, n, K], part by part. All sums are float32."""

    def __init__(self, products: bool, stacked: bool = False) -> None:
        self.wanted, self._stacked = products, stacked  # wanted: products are
        self.rows = 0
        self.peak = 0.0  # largest magnitude
        self._squares: mx.array | None = None  # [parts, K]
        self._products: mx.array | None = None  # [parts, K, K]

    def add(self, x: mx.array) -> None:
        """Evaluates `x` and the sums."""
        inputs = x.shape[-1]
        x = x.astype(mx.float32)
        x = x.moveaxis(-3, 0).reshape(x.shape[-3], -1, inputs) if self._stacked else x.reshape(1, -1, inputs)
        for start in range(0, x.shape[1], ROWS):
            some = x[:, start : start + ROWS]
            squares = mx.sum(some * some, axis=1)
            largest = mx.max(mx.abs(some))
            self._squares = squares if self._squares is None else self._squares + squares
            if self.wanted and inputs <= WIDEST:
                products = _products(some)
                self._products = products if self._products is None else self._products + products
            mx.eval(largest, [s for s in (self._squares, self._products) if s is not None])
            self.peak = max(self.peak, float(np.array(largest)))
        self.rows += x.shape[1]

    def squares(self, part: int = 0) -> mx.array | None:
        """[K] mean squares; None before the first row. An input that all parts share answers for each."""
        if self._squares is None or not self.rows:
            return None
        return self._squares[part % len(self._squares)] / self.rows

    def products(self, part: int = 0) -> mx.array | None:
        """[K, K] mean outer products; None where they weren't asked for, before the first row, or too wide."""
        if self._products is None or not self.rows:
            return None
        return self._products[part % len(self._products)] / self.rows


def _products(x: mx.array) -> mx.array:
    """[parts, n, K] -> [parts, K, K]."""
    if not by_numpy():
        return x.swapaxes(-1, -2) @ x
    rows = np.asarray(x)
    return mx.array(np.stack([part.T @ part for part in rows]))


# Rows at which an expert's own second moments count as much as what stands in for too little of them.
EVEN_PRODUCTS = 512
EVEN_SQUARES = 4
# Below, the blend of an expert's intermediate products is next to its diagonal.
FEWEST = 16


@dataclass(frozen=True)
class Coverage:
    """Rows an expert of a layer was given: the least and the median over all experts, and how many had none."""

    experts: int
    least: int
    median: float
    unseen: int


class Mixture:
    """The inputs of one mixture of experts, gathered in a file, and which experts each row went to.

    Memory: a row of squares for every expert, and while it is asked for products, one expert's rows and those.
    """

    def __init__(self, path: Path, products: bool) -> None:
        """`products`: whether those of what comes into the mixture are wanted, of all rows together."""
        self._path = path
        self._total = 0  # rows in the file
        self._chosen: list[np.ndarray] = []
        self._placed: dict[int, np.ndarray] = {}
        self._squares: dict[tuple[str, int], mx.array | None] = {}
        self._peaks: dict[int, float] = {}  # of what experts' down projections take
        self._model: StreamedExperts | None = None
        self.all = Moments(products)
        self.counts = np.zeros(0, np.int64)

    def add(self, x: mx.array, chosen: np.ndarray) -> None:
        """x: [n, K]; chosen: int [n, k]. OSError where it can't be written, which a file mapped into memory would not
        raise."""
        with open(self._path, "ab" if self._chosen else "wb") as file:
            file.write(np.array(x.astype(mx.float32)).data)
        self._chosen.append(chosen)
        self.all.add(x)

    def finish(self, model: StreamedExperts) -> None:
        """After the last row. `model` computes what goes into the down projections."""
        self._model = model
        self.counts = np.zeros(model.experts, np.int64)
        if self._chosen:
            chosen = np.concatenate(self._chosen)
            self._total = len(chosen)
            self._chosen = []
            self._placed = {e: (slots // chosen.shape[1]).astype(np.int32) for e, slots in by_expert(chosen)}
            for expert, rows in self._placed.items():
                self.counts[expert] = len(rows)

    @property
    def coverage(self) -> Coverage:
        counts = self.counts
        return Coverage(len(counts), int(counts.min()), float(np.median(counts)), int((counts == 0).sum()))

    def squares(self, kind: str, expert: int) -> mx.array | None:
        """[K] mean squares of what one expert saw, kept for all; None where it saw nothing. `kind`: "in", what gate
        and up take, or "down"."""
        if (kind, expert) not in self._squares:
            self._summed(kind, expert, False)
        return self._squares[kind, expert]

    def products(self, kind: str, expert: int) -> mx.array | None:
        """[K, K] mean products of the same, made anew each time; None where it saw nothing, or they are too wide."""
        return self._summed(kind, expert, True).products()

    def peak(self, expert: int) -> float | None:
        """Largest magnitude of what an expert's down projection takes; None where it saw nothing."""
        self.squares("down", expert)
        return self._peaks.get(expert)

    def _summed(self, kind: str, expert: int, products: bool) -> Moments:
        moments = Moments(products)
        placed = self._placed.get(expert, np.zeros(0, np.int32))
        weights = self._weights(expert) if kind == "down" and len(placed) else {}
        for start in range(0, len(placed), ROWS):
            assert self._model is not None
            x = mx.array(self._inputs()[placed[start : start + ROWS]])
            moments.add(self._model.intermediate(expert, x, **weights) if kind == "down" else x)
        if (kind, expert) not in self._squares:
            squares = moments.squares()
            if squares is not None:
                mx.eval(squares)  # what is kept is asked for in several threads, and lazy arrays belong to one
            self._squares[kind, expert] = squares
            if kind == "down" and moments.rows:
                self._peaks[expert] = moments.peak
        return moments

    def _inputs(self) -> np.ndarray:
        """[rows, K], mapped anew each time: what stays mapped counts as the process's memory once it was read."""
        return np.memmap(self._path, np.float32, "r").reshape(self._total, -1)

    def _weights(self, expert: int) -> dict[str, mx.array]:
        """Read once, however many pieces the rows come in."""
        assert self._model is not None
        return {name: self._model.weight(name, expert) for name in ("gate_proj", "up_proj")}


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
