"""Measures how storing each weight at few bits changes the model's predictions, in one pass over its layers.

For every weight, a copy of the hidden states runs from its layer to the end with that weight alone quantized, by plain
mx.quantize to the one reference spec, and the KL divergence of its predictions from the source's is taken. The effect
of later layers on an error is thus counted. Other specs and fits follow by the ratio of their weight errors, each input
counted by its mean square, as the divergence of a small error grows with its square.

All copies are run through a layer together, so that its weights are read a few times, however many copies there are.
The state is written to disk every few minutes: a measurement that was killed goes on from there, to the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ...errors import RotorError
from ...host.layerwise import Layerwise, Run
from .. import fit as fits
from ..budget.sensitivity import Sensitivities, fingerprint
from ..guide import EntryParameters, Statistics, Weights
from ..plan import Entry, Plan
from ..policy import GROUP_SIZES, Spec
from ..selectors import ROLES
from .calibration import Calibration, Progress
from .kept import Keeper, Ratios

REFERENCE_BITS = 3
# Tokens a copy has, in pieces of LENGTH: with 7 weights a layer and 62 layers, 110,000 tokens reach the last layer.
TOKENS, LENGTH = 256, 128
CHUNK = 16384
# Weight errors are taken on slices of rows, shorter ones where there are several parts to take them from.
PARTS, SLICES, ROWS, FEWER_ROWS = 8, 4, 64, 16
ALIGN = 128  # rows at which FP8 blocks begin


@dataclass
class _Copy:
    """Hidden states [B, L, ..] behind the layer of an entry that alone is quantized."""

    entry: Entry
    hidden: np.ndarray


class _Altered(EntryParameters):
    """The source's parameters, but one entry as its reference spec stores it."""

    altered: Entry | None = None

    def whole(self, name: str) -> mx.array:
        found = super().whole(name)
        return _stored(found, self.altered) if self._is(name) else found

    def part(self, name: str, expert: int) -> mx.array:
        found = super().part(name, expert)
        return _stored(found, self.altered) if self._is(name) else found

    def _is(self, name: str) -> bool:
        return self.altered is not None and self._entry(name) is self.altered

    @contextmanager
    def altering(self, entry: Entry) -> Iterator[None]:
        self.altered = entry
        try:
            yield
        finally:
            self.altered = None


def specs(entry: Entry) -> list[Spec]:
    """What is measured: 2 to 4 bits in all groups that divide the entry's inputs, and 6; the rest follows from it."""
    sizes = [size for size in GROUP_SIZES if entry.shape[-1] % size == 0]
    return [*(Spec(bits, size) for bits in (2, 3, 4) for size in sizes), *(Spec(6, size) for size in sizes[:1])]


def measurable(plan: Plan) -> list[Entry]:
    """Entries that a policy may give bits without naming them, and that have a spec."""
    return [
        entry
        for entry in plan.entries
        if len(entry.shape) > 1 and ROLES[entry.role].quantizable and not ROLES[entry.role].asked and specs(entry)
    ]


def measure(
    config: Mapping[str, Any],
    weights: Weights,
    plan: Plan,
    tokens: np.ndarray,
    folder: str | Path,
    *,
    source: str = "bundled text",
    fit: str = "search",
    chunk: int = CHUNK,
    identity: str = "",
    progress: Progress | None = None,
) -> Sensitivities:
    """Mean KL divergence, in nats a token, of storing each entry alone at each spec.

    Args:
        tokens: int [sequences, length]; TOKENS of them in pieces of LENGTH, see `text.sequences`, tell much at little
            cost.
        folder: for work files, made if it isn't there; the same measurement goes on with what it finds in it, and
            anything else in it is deleted. Left where it is in the end.
        source: what the text was, for the result.
        fit: for which the costs are meant. `best` is taken for `search`: its gain is in what this doesn't see.
        chunk: tokens run at once.
        identity: of the weights, to know work files of others by.

    Raises:
        RotorError: as `Calibration`; or divergences that are not finite.
    """
    method = "search" if fit == "best" else fit
    text = hashlib.sha256(np.ascontiguousarray(tokens, "<i4").tobytes()).hexdigest()
    job = {"model": fingerprint(plan), "weights": identity, "text": text, "fit": fit, "chunk": chunk}
    keeper = Keeper(Path(folder), job)
    kept = keeper.found()
    calibration = Calibration(config, weights, plan, tokens, folder, products=False)
    altered = _Altered(plan, weights)
    walk = Layerwise(config, altered, tokens.shape[1])
    wanted, copies, ratios = measurable(plan), list[_Copy](), Ratios()
    if kept is not None:
        named = {entry.module: entry for entry in wanted}
        copies = [_Copy(named[module], hidden) for module, hidden in zip(kept.modules, kept.hidden, strict=True)]
        ratios = kept.ratios

    def note(entry: Entry, statistics: Statistics | None) -> None:
        ratios[entry.module] = _ratios(entry, weights, statistics, method)

    for entry in wanted:
        if entry.layer is None and entry.role != "head" and kept is None:
            with altered.altering(entry), walk.start() as run:
                copies.append(_Copy(entry, np.array(run(mx.array(tokens)))))
            note(entry, None)
    for number in range(kept.layer if kept else 0, plan.layers):
        here = [entry for entry in wanted if entry.layer == number]
        _, statistics = calibration.layer(number, here)
        base = calibration.hidden(number)
        with walk.layer(number) as layer:
            _advance(layer, copies, max(1, chunk // tokens.shape[1]))
        for nth, entry in enumerate(here):
            with altered.altering(entry), walk.layer(number) as layer:
                copies.append(_Copy(entry, np.array(layer(mx.array(base)))))
            note(entry, statistics)
            if progress is not None:
                progress(f"layer {number}", nth + 1, len(here))
        modules = [copy.entry.module for copy in copies]
        keeper.keep(number + 1, calibration.hidden(number + 1), modules, (copy.hidden for copy in copies), ratios)
    heads = [entry for entry in wanted if entry.layer is None and entry.role == "head"]
    _, statistics = calibration.layer(None, heads)
    last = np.array(calibration.hidden(plan.layers))
    for entry in heads:
        copies.append(_Copy(entry, last))
        note(entry, statistics)
    found = _divergences(walk, altered, copies, last, tied=not heads)
    costs = {module: {spec: found[module] * ratio for spec, ratio in ratios[module].items()} for module in ratios}
    return Sensitivities(source, fingerprint(plan), fit, costs)


def _advance(layer: Any, copies: Sequence[_Copy], count: int) -> None:
    """Every copy through a layer, `count` sequences at a time."""
    rows = [(copy, row) for copy in copies for row in range(len(copy.hidden))]
    for start in range(0, len(rows), count):
        some = rows[start : start + count]
        out = np.array(layer(mx.array(np.stack([copy.hidden[row] for copy, row in some]))))
        for (copy, row), hidden in zip(some, out, strict=True):
            copy.hidden[row] = hidden
        mx.clear_cache()


def _divergences(
    walk: Layerwise, altered: _Altered, copies: Iterable[_Copy], last: np.ndarray, tied: bool
) -> dict[str, float]:
    """Module -> mean KL divergence of its copy from the source, whose last hidden states are `last`.

    Holds the source's predictions: 205 MB for 256 tokens of a vocabulary of 200,000.
    """
    found: dict[str, float] = {}
    changed: list[_Copy] = []

    def compare(copy: _Copy, run: Run) -> None:
        total = 0.0
        for row, p in enumerate(source):
            # As both sum to one, the same as sum(p log(p/q)), in terms that are not negative: float32 is enough.
            gap = p - _log_probabilities(run, copy.hidden, row)
            total += float(mx.mean(mx.sum(mx.exp(p) * (gap + mx.expm1(-gap)), axis=-1)).item())  # type: ignore[arg-type]
        if not np.isfinite(total):
            raise RotorError(f"{copy.entry.module}: quantized alone, it makes predictions that are not finite")
        found[copy.entry.module] = total / len(source)

    with walk.end() as run:
        source = [_log_probabilities(run, last, row) for row in range(len(last))]
        mx.eval(source)
        for copy in copies:
            if copy.entry.layer is None and (copy.entry.role == "head" or tied):
                changed.append(copy)
            else:
                compare(copy, run)
    for copy in changed:
        with altered.altering(copy.entry), walk.end() as run:
            compare(copy, run)
    return found


def _log_probabilities(run: Run, hidden: np.ndarray, row: int) -> mx.array:
    x = run(mx.array(hidden[row : row + 1])).astype(mx.float32)
    return x - mx.logsumexp(x, axis=-1, keepdims=True)


def _reference(entry: Entry) -> Spec:
    sizes = [size for size in GROUP_SIZES if entry.shape[-1] % size == 0]
    return Spec(REFERENCE_BITS, 64 if 64 in sizes else sizes[0])


def _stored(w: mx.array, entry: Entry | None) -> mx.array:
    assert entry is not None
    spec = _reference(entry)
    return fits.decode(fits.fit(w, spec, "fast"), spec)


def _ratios(entry: Entry, weights: Weights, statistics: Statistics | None, method: str) -> dict[Spec, float]:
    """Spec -> squared error of the outputs under a fit, by that of the reference under the fast one."""
    reference, every = 0.0, dict.fromkeys(specs(entry), 0.0)
    for part in sorted({int(p) for p in np.linspace(0, entry.parts - 1, PARTS)}):
        importance = None if statistics is None else statistics.importance(entry, part)
        w = _sample(entry, weights, part)
        known = importance if importance is not None else mx.ones(w.shape[-1])
        reference += _error(w, _reference(entry), "fast", None, known)
        for spec in every:
            every[spec] += _error(w, spec, entry.fit or method, importance, known)
    # Of a weight that is zero, as in a layer that was put into a model to do nothing, no spec costs anything.
    return {spec: error / reference if reference else 0.0 for spec, error in every.items()}


def _error(w: mx.array, spec: Spec, method: str, importance: mx.array | None, known: mx.array) -> float:
    stored = fits.decode(fits.fit(w, spec, method, importance=importance), spec)
    return float(mx.sum(mx.square(w - stored) * known).item())  # type: ignore[arg-type]


def _sample(entry: Entry, weights: Weights, part: int) -> mx.array:
    """Some rows of a part, in slices spread over it."""
    rows, count = entry.shape[-2], FEWER_ROWS if entry.parts > 1 else ROWS
    if rows <= SLICES * ALIGN:
        return weights.read(entry, part)[:: max(1, rows // (SLICES * count))]
    starts = (int(s) // ALIGN * ALIGN for s in np.linspace(0, rows - count, SLICES))
    return mx.concatenate([weights.read(entry, part, start, start + count) for start in starts])
