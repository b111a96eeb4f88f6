"""Scale folding: factors moved from one weight of a model into another, which leave what the model computes unchanged.

Large inputs become smaller and the columns they meet larger, so that quantizing those columns costs less: AWQ (arXiv
2306.00978). A normalization gives its factors to every module that reads its output, the router too; a channel of an
expert's intermediate values, in which SwiGLU is linear, gives its own to that expert's down projection. This file says
which modules those are; `search` chooses the factors, and `proof` shows on the model that they are exact.

Scale folding also brings experts back whose intermediate values exceed float16's range on the calibration text. Some of
MiniMax-M2's do, and turn to NaN in readers that compute in float16.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import mlx.core as mx

from ...errors import RotorError
from ..guide import Statistics, Weights
from ..plan import Entry


@dataclass(frozen=True)
class Reading:
    """A normalization of a layer, by the last part of its path, and the roles of all that may read its output."""

    norm: str
    readers: tuple[str, ...]


# Of the roles named here each layer has some. A role missing from the list would be fed scaled inputs: the check on the
# model's own logits finds that.
READINGS = (
    Reading(
        "input_layernorm",
        ("attn.q", "attn.k", "attn.v", "attn.qkv", "attn.gate", "attn.q_a", "attn.kv_a", "linear.in"),
    ),
    Reading(
        "post_attention_layernorm",
        ("router", "expert.gate", "expert.up", "shared.gate", "shared.up", "mlp.gate", "mlp.up", "mlp.gate_up"),
    ),
)
# An index reads the normalized inputs through projections that share a role with ones that don't.
UNCLEAR = {"input_layernorm": ("attn.index",)}
# Whose experts clamp what their down projection takes: not linear in up.
CLAMPED = ("gpt_oss",)


@dataclass(frozen=True)
class Scales:
    """Factors for one part of an entry, float32: its rows [n] and its columns [K] are multiplied. None: by 1."""

    rows: mx.array | None = None
    columns: mx.array | None = None

    def times(self, other: Scales) -> Scales:
        return Scales(_product(self.rows, other.rows), _product(self.columns, other.columns))


# (module, part) -> factors
Factors = dict[tuple[str, int], Scales]


def _product(a: mx.array | None, b: mx.array | None) -> mx.array | None:
    return b if a is None else a if b is None else a * b


def joined(*every: Factors) -> Factors:
    """The factors of several scale foldings, applied one after the other."""
    out: Factors = {}
    for factors in every:
        for key, scales in factors.items():
            out[key] = out[key].times(scales) if key in out else scales
    return out


class FoldedWeights:
    """Weights with factors applied as they are read; implements `guide.Weights`."""

    def __init__(self, weights: Weights, scales: Mapping[tuple[str, int], Scales]) -> None:
        self._weights, self._scales = weights, dict(scales)

    def read(self, entry: Entry, part: int = 0, start: int = 0, stop: int | None = None) -> mx.array:
        """See `guide.Weights`."""
        w = self._weights.read(entry, part, start, stop)
        scales = self._scales.get((entry.module, part))
        if scales is None:
            return w
        if scales.rows is not None:
            rows = scales.rows[start:stop]
            w = w * (rows if w.ndim == 1 else rows[:, None])
        return w if scales.columns is None else w * scales.columns


@dataclass(frozen=True)
class NormFolding:
    """A normalization whose scales may be folded into the modules that read it."""

    norm: Entry
    readers: tuple[Entry, ...]

    def scales(self, s: mx.array) -> Factors:
        """s: float32 [hidden], positive. The normalization's output is divided by it, readers' columns multiplied."""
        out: Factors = {(self.norm.module, 0): Scales(rows=1 / s)}
        for entry in self.readers:
            out |= {(entry.module, part): Scales(columns=s) for part in range(entry.parts)}
        return out

    def inputs(self, s: mx.array) -> dict[str, mx.array]:
        """Module -> what its inputs are divided by."""
        return {entry.module: s for entry in self.readers}


def feeds_experts(folding: NormFolding) -> bool:
    """Whether experts that are quantized read what the normalization gives."""
    return any(entry.role in ("expert.gate", "expert.up") and entry.spec is not None for entry in folding.readers)


@dataclass(frozen=True)
class DownFolding:
    """An expert's up and down projection: its intermediate channels may be scaled, each expert's by its own factors."""

    up: Entry
    down: Entry

    def scales(self, factors: Mapping[int, mx.array]) -> Factors:
        """Expert -> float32 [inter], positive: what its down projection takes is divided by it."""
        out: Factors = {}
        for part, d in factors.items():
            out[self.up.module, part] = Scales(rows=1 / d)
            out[self.down.module, part] = Scales(columns=d)
        return out

    def inputs(self, factors: Mapping[int, mx.array]) -> dict[str, mx.array]:
        """Module -> [experts, inter], what its inputs are divided by."""
        ones = mx.ones((self.down.shape[-1],))
        return {self.down.module: mx.stack([factors.get(part, ones) for part in range(self.down.parts)])}


def norm_foldings(entries: Sequence[Entry]) -> list[NormFolding]:
    """The possible scale foldings of normalizations among one layer's entries."""
    found = []
    roles = {entry.role for entry in entries}
    for reading in READINGS:
        norms = [e for e in entries if e.role == "norm" and e.module.rpartition(".")[2] == reading.norm]
        readers = tuple(e for e in entries if e.role in reading.readers)
        if len(norms) != 1 or not readers or roles & set(UNCLEAR.get(reading.norm, ())):
            continue
        width = norms[0].shape[0]
        wrong = [e.module for e in readers if e.shape[-1] != width]
        if wrong:
            raise RotorError(f"{wrong[0]} takes other inputs than {norms[0].module} gives: its scales can't be folded")
        if any(e.module.startswith(f"{norms[0].module}.bias") for e in entries):
            continue  # a bias would have to be divided too
        found.append(NormFolding(norms[0], readers))
    return found


def feeding(entries: Sequence[Entry]) -> list[NormFolding]:
    """The scale foldings of normalizations that quantized experts read, in a whole model's entries."""
    layers: dict[int | None, list[Entry]] = {}
    for entry in entries:
        layers.setdefault(entry.layer, []).append(entry)
    return [found for group in layers.values() for found in norm_foldings(group) if feeds_experts(found)]


def down_foldings(entries: Sequence[Entry], model_type: str) -> list[DownFolding]:
    """The possible scale foldings of experts among one layer's entries: their intermediate values are linear in up's.

    Raises:
        RotorError: a model whose experts clamp them.
    """
    ups = [e for e in entries if e.role == "expert.up"]
    if ups and model_type in CLAMPED:
        raise RotorError(
            f"{model_type}: its experts clamp their intermediate values, so those can't be rescaled exactly; fold"
            " the scales of normalizations alone"
        )
    found = []
    for up in ups:
        path = up.module.rpartition(".")[0]
        downs = [e for e in entries if e.role == "expert.down" and e.module.rpartition(".")[0] == path]
        biased = any(e.role == "bias" and e.module.startswith(f"{up.module}.") for e in entries)
        if len(downs) == 1 and not biased and up.shape[-2] == downs[0].shape[-1]:
            found.append(DownFolding(up, downs[0]))
    return found


FLOAT16 = 65504.0
# A rescaled expert has this much room beyond what the calibration text showed.
HEADROOM = 4.0


@runtime_checkable
class Peaks(Protocol):
    """Statistics that know the largest input, too."""

    def peak(self, entry: Entry, part: int) -> float | None:
        """Largest magnitude among the inputs of an entry's part; None if it saw none."""


@dataclass(frozen=True)
class Oversized:
    """An expert whose down projection takes values of `peak`, and the power of two that brings them back."""

    module: str
    expert: int
    peak: float

    @property
    def factor(self) -> float:
        return 2.0 ** math.ceil(math.log2(self.peak * HEADROOM / FLOAT16))


def oversized(folding: DownFolding, statistics: Statistics) -> list[Oversized]:
    """The experts whose down projection met values above float16's range.

    Raises:
        RotorError: statistics that don't know the largest values, such as an imatrix.
    """
    if not isinstance(statistics, Peaks):
        raise RotorError(
            "these statistics don't have the largest inputs, which finding overflows takes: use --calibration"
        )
    found = []
    for part in range(folding.down.parts):
        peak = statistics.peak(folding.down, part)
        if peak is not None and peak > FLOAT16:
            found.append(Oversized(folding.down.module, part, peak))
    return found


def rescaling(folding: DownFolding, found: Sequence[Oversized]) -> dict[int, mx.array]:
    """Expert -> factors for `DownFolding.scales` that bring it back into float16's range, exactly."""
    return {o.expert: mx.full((folding.down.shape[-1],), o.factor) for o in found}
