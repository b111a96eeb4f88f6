"""Proof that scale folding changes nothing: the logits after a model's first layers, with and without it, in float32.

The factors of the proof differ from channel to channel, so that it does not depend on what is worth folding there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ...errors import RotorError
from ...host.layerwise import Layerwise
from ..guide import EntryParameters, Weights
from ..plan import Plan
from .scales import Factors, FoldedWeights, joined
from .search import ScaleFolding

TOLERANCE = 1e-5


def check(
    config: Mapping[str, Any],
    plan: Plan,
    weights: Weights,
    factors: Factors,
    tokens: np.ndarray,
    *,
    layers: Sequence[int],
) -> float:
    """Runs tokens (int [B, L]) through `layers`, one after the other, and the head, twice. Returns the largest
    difference of logits as a share of the largest logit.

    Raises:
        RotorError: it is more than TOLERANCE, or the model can't be run layer by layer.
    """
    before, after = (_logits(config, plan, w, tokens, layers) for w in (weights, FoldedWeights(weights, factors)))
    scale, difference = (float(np.abs(np.array(a)).max()) for a in (before, after - before))
    difference = difference / scale if scale else 0.0
    if not difference <= TOLERANCE:  # NaN, too
        modules = sorted({module for module, _ in factors})
        raise RotorError(
            f"scale folding changes the model: logits after layers {', '.join(map(str, layers))} differ by"
            f" {difference:.2g} of the largest, more than {TOLERANCE:g}. Some reader of the folded inputs is not known"
            f" ({', '.join(modules[:4])}, …): use --fold none, and report the architecture"
        )
    return difference


def prove(
    folding: ScaleFolding, config: Mapping[str, Any], plan: Plan, weights: Weights, tokens: np.ndarray
) -> tuple[int, ...]:
    """Checks every scale folding that `folding` may choose, by factors of the proof's own, before a job is given it.

    One layer of each kind is checked: the first dense one, say, and the first with experts. `weights` are as the source
    has them. Returns the layers.

    Raises:
        RotorError: as `check`.
    """
    kinds: dict[frozenset[tuple[str, str]], int] = {}
    for number in range(plan.layers):
        entries = [entry for entry in plan.entries if entry.layer == number]
        kinds.setdefault(frozenset((e.role, e.module.rpartition(".")[2]) for e in entries), number)
    layers = tuple(kinds.values())
    check(config, plan, weights, joined(*(folding.trial(number) for number in layers)), tokens, layers=layers)
    return layers


def _logits(
    config: Mapping[str, Any], plan: Plan, weights: Weights, tokens: np.ndarray, layers: Sequence[int]
) -> mx.array:
    walk = Layerwise(config, EntryParameters(plan, weights), tokens.shape[1])
    hidden = walk.embed(mx.array(tokens))
    for number in layers:
        with walk.layer(number) as run:
            hidden = run(hidden)
    with walk.end() as head:
        logits = head(hidden).astype(mx.float32)
        mx.eval(logits)
    return logits
