"""What each expert of a layer saw: the rows routed to it, out of the layer's inputs on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from ...host.streamed_experts import StreamedExperts, by_expert
from .moments import ROWS, Moments

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
