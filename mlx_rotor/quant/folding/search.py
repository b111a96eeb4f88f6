"""The factors of scale folding: the power of the inputs' size with the least error of the fit on a sample."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ...files import write_json
from ..calibrate.moments import Scaled
from ..fit import decode, fit
from ..guide import Guide, Statistics, Weights
from ..plan import Entry, Plan
from .scales import (
    CLAMPED,
    DownFolding,
    Factors,
    FoldedWeights,
    NormFolding,
    Oversized,
    Peaks,
    down_foldings,
    feeds_experts,
    joined,
    norm_foldings,
    oversized,
    rescaling,
)

# Exponents tried: a factor is the root of an input's mean square to this power; 0 is no scale folding.
ALPHAS = (0.0, 0.1, 0.2, 0.35, 0.5, 0.75)
CLAMP = 6  # factors lie within 2**-6 and 2**6
WORTH = 0.99  # scale folding must lower the error by a hundredth
# What the sample reads of an entry.
PARTS, ROWS = 2, 64
VERSION = 1


def factors(square: mx.array, alpha: float, *, whole: bool) -> mx.array:
    """(mean square)^(alpha / 2), geometric mean 1, clamped; float32 [K]. `whole`: rounded to powers of two, which no
    float loses anything to: for weights that are kept in 16 bits, as norms and routers are."""
    square = mx.maximum(square.astype(mx.float32), mx.max(square) * 1e-12 + 1e-30)
    log = mx.log2(square) * (alpha / 2)
    log = mx.clip(log - mx.mean(log), -CLAMP, CLAMP)
    return mx.power(mx.array(2.0), mx.round(log) if whole else log)


@dataclass(frozen=True)
class Chosen:
    """One scale folding of a layer.

    Attributes:
        what: the module whose scales are folded.
        alpha: the exponent.
        ratio: the sample's error with it as a share of that without.
    """

    what: str
    alpha: float
    ratio: float


@dataclass(frozen=True)
class LayerFolding:
    """`inputs`: module -> what its inputs are divided by, see `Scaled`. `large`: experts above float16's range,
    rescaled if that was asked for."""

    scales: Factors
    inputs: dict[str, mx.array]
    chosen: tuple[Chosen, ...]
    large: tuple[Oversized, ...]


class ScaleFolding:
    """A guide over another, with scale folding: its weights times the factors, its inputs' statistics divided by them.

    Attributes:
        found: layer -> the scale folding there, of the layer last asked for.
    """

    def __init__(
        self,
        guide: Guide,
        plan: Plan,
        model_type: str,
        method: str,
        folder: str | Path,
        *,
        norms: bool = True,
        downs: bool = True,
        rescale: bool = False,
        awq: float = 0.0,
    ) -> None:
        """
        Args:
            method: the job's fit, for entries that have none of their own.
            folder: where what was chosen is noted, so that a job that goes on can tell all of it.
            norms, downs: fold the scales of normalizations into their readers, of up rows into down columns.
            awq: the one exponent tried for normalizations that quantized experts read; 0: as for the others.
            rescale: bring experts whose intermediate values overflow float16 back into its range.

        Raises:
            RotorError: a scale folding that the model's experts don't allow.
        """
        self._guide, self._plan, self._method = guide, plan, method
        self._norms, self._downs, self._rescale, self._type = norms, downs, rescale, model_type
        self._awq = awq
        if downs or rescale:
            down_foldings(plan.entries, model_type)
        self.found: dict[int, LayerFolding] = {}
        self._path = Path(folder) / "folds.json"
        self._told = self._known()

    @property
    def digest(self) -> str:
        """Of all that the factors depend on."""
        head = [VERSION, self._guide.digest, self._method, self._norms, self._downs, self._rescale, ALPHAS, PARTS, ROWS]
        head += [self._awq] if self._awq else []
        return hashlib.sha256(json.dumps(head).encode()).hexdigest()

    @property
    def disk(self) -> int:
        return self._guide.disk

    def layer(self, number: int | None, entries: Sequence[Entry]) -> tuple[Weights, Statistics | None]:
        """See `guide.Guide`. Entries outside the layers are handed on as they are, and those of layers nothing is
        known of.

        Raises:
            RotorError: experts are to be rescaled, and the statistics don't know their largest values.
        """
        weights, statistics = self._guide.layer(number, entries)
        if number is None or statistics is None:
            return weights, statistics
        chosen = self._search(number, weights, statistics)
        self.found = {number: chosen}
        rescaled = [o.factor if self._rescale else 1 for o in chosen.large]
        self._told[str(number)] = [
            {"layer": number, "fold": c.what, "alpha": c.alpha, "error_ratio": round(c.ratio, 4)} for c in chosen.chosen
        ] + [
            {"layer": number, "expert": o.expert, "down_input": o.peak, "rescaled_by": by}
            for o, by in zip(chosen.large, rescaled, strict=True)
        ]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._path, {"digest": self.digest, "layers": self._told})
        return FoldedWeights(weights, chosen.scales), Scaled(statistics, chosen.inputs)

    def trial(self, number: int) -> Factors:
        """The factors of every scale folding that may be chosen in a layer, from 1/4 to 4: for the proof."""

        def some(count: int, turn: int = 0) -> mx.array:
            return mx.power(mx.array(2.0), ((mx.arange(count) + turn) % 5 - 2).astype(mx.float32))

        entries = [entry for entry in self._plan.entries if entry.layer == number]
        found = [norm.scales(some(norm.norm.shape[0])) for norm in norm_foldings(entries) if self._wanted(norm)]
        if self._downs or self._rescale:
            for down in down_foldings(entries, self._type):
                found.append(down.scales({p: some(down.down.shape[-1], p) for p in range(down.down.parts)}))
        return joined(*found)

    def describe(self) -> dict[str, Any]:
        """For the output's metadata: the statistics, and the scale folding of every layer."""
        rows = [row for _, told in sorted(self._told.items(), key=lambda item: int(item[0])) for row in told]
        return {**self._guide.describe(), "folds": rows}

    def files(self) -> dict[str, str]:
        return self._guide.files()

    def _known(self) -> dict[str, list[dict[str, Any]]]:
        """What an earlier run of the same job noted."""
        try:
            state = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return dict(state["layers"]) if state.get("digest") == self.digest else {}

    def _search(self, number: int, weights: Weights, statistics: Statistics) -> LayerFolding:
        entries = [entry for entry in self._plan.entries if entry.layer == number]
        scales: Factors = {}
        inputs: dict[str, mx.array] = {}
        chosen: list[Chosen] = []
        every: list[Oversized] = []
        downs = down_foldings(entries, self._type) if self._type not in CLAMPED else []
        for norm in [norm for norm in norm_foldings(entries) if self._wanted(norm)]:
            if (found := self._norm(norm, weights, statistics)) is not None:
                s, choice = found
                scales, inputs = joined(scales, norm.scales(s)), inputs | norm.inputs(s)
                chosen.append(choice)
        for down in downs:
            large = oversized(down, statistics) if self._rescale or isinstance(statistics, Peaks) else []
            each = rescaling(down, large) if self._rescale else {}
            every += large
            if self._downs and (picked := self._down(down, weights, statistics)) is not None:
                d, choice = picked
                each = each | {p: factor * each[p] if p in each else factor for p, factor in d.items()}
                chosen.append(choice)
            if each:
                scales, inputs = joined(scales, down.scales(each)), inputs | down.inputs(each)
        mx.eval([a for s in scales.values() for a in (s.rows, s.columns) if a is not None], list(inputs.values()))
        return LayerFolding(scales, inputs, tuple(chosen), tuple(every))

    def _norm(self, folding: NormFolding, weights: Weights, statistics: Statistics) -> tuple[mx.array, Chosen] | None:
        square = common_square(folding.readers, statistics)
        readers = [entry for entry in folding.readers if entry.spec is not None]
        if square is None or not readers:
            return None
        known = square

        def factor(entry: Entry, part: int, alpha: float) -> mx.array:
            return factors(known, alpha, whole=True)

        tried = (0.0, self._awq) if self._awq and feeds_experts(folding) else ALPHAS
        alpha, ratio = self._best(readers, weights, statistics, factor, tried)
        if not alpha:
            return None
        return factors(square, alpha, whole=True), Chosen(folding.norm.module, alpha, ratio)

    def _wanted(self, folding: NormFolding) -> bool:
        return self._norms or (self._awq > 0 and feeds_experts(folding))

    def _down(
        self, folding: DownFolding, weights: Weights, statistics: Statistics
    ) -> tuple[dict[int, mx.array], Chosen] | None:
        if folding.down.spec is None:
            return None
        squares = {part: statistics.importance(folding.down, part) for part in range(folding.down.parts)}
        known = {part: square for part, square in squares.items() if square is not None}
        if not known:
            return None
        kept = folding.up.spec is None

        def factor(entry: Entry, part: int, alpha: float) -> mx.array | None:
            return factors(known[part], alpha, whole=kept) if part in known else None

        alpha, ratio = self._best([folding.down], weights, statistics, factor)
        if not alpha:
            return None
        return {p: factors(square, alpha, whole=kept) for p, square in known.items()}, Chosen(
            folding.down.module, alpha, ratio
        )

    def _best(
        self,
        entries: Sequence[Entry],
        weights: Weights,
        statistics: Statistics,
        factor: Callable[[Entry, int, float], mx.array | None],
        alphas: Sequence[float] = ALPHAS,
    ) -> tuple[float, float]:
        """(exponent, error with it as a share of that without) of the least summed relative output error."""
        errors = dict.fromkeys(alphas, 0.0)
        for entry in entries:
            for part in _spread(entry.parts, PARTS):
                w = weights.read(entry, part, 0, min(ROWS, entry.source_shape[0]))
                square = statistics.importance(entry, part)
                if square is None or factor(entry, part, 0.0) is None:
                    continue
                for alpha in alphas:
                    s = factor(entry, part, alpha)
                    assert s is not None
                    errors[alpha] += output_error(w, entry, self._method, square, s)
        if not errors[0.0]:
            return 0.0, 1.0
        best = min(alphas, key=lambda alpha: errors[alpha])
        ratio = errors[best] / errors[0.0]
        return (best, ratio) if ratio < WORTH else (0.0, 1.0)


def common_square(readers: Sequence[Entry], statistics: Statistics) -> mx.array | None:
    """[K] mean square of what a normalization gives: as a reader that every token reaches has seen it, else the mean
    over the experts'."""
    for entry in sorted(readers, key=lambda entry: entry.parts):
        found = [statistics.importance(entry, part) for part in range(entry.parts)]
        known = [square for square in found if square is not None]
        if known:
            return mx.mean(mx.stack(known), axis=0)
    return None


def output_error(w: mx.array, entry: Entry, method: str, square: mx.array, s: mx.array) -> float:
    """Error of w [rows, K], stored as the entry is with its columns multiplied by s, in outputs of inputs with these
    mean squares [K], as a share of the outputs' power (inputs taken to be uncorrelated)."""
    assert entry.spec is not None
    scaled, seen = w * s, square / (s * s)
    stored = decode(fit(scaled, entry.spec, entry.fit or method, importance=seen), entry.spec)
    error, power = mx.sum(mx.square(stored - scaled) * seen), mx.sum(mx.square(scaled) * seen)
    return float(np.array(error / mx.maximum(power, 1e-30)))


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` numbers, evenly."""
    return sorted({(2 * i + 1) * count // (2 * min(count, most)) for i in range(min(count, most))})
