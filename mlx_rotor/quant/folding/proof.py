"""Proof on the model itself that folds change nothing: its first layers' logits, with and without, in float32.

Factors are taken for it that no layer is alike to, so that it does not hang on what is worth folding there.
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
from .folds import Folded, Folds, joined
from .search import Folding

TOLERANCE = 1e-5


def check(
    config: Mapping[str, Any],
    plan: Plan,
    weights: Weights,
    folds: Folds,
    tokens: np.ndarray,
    *,
    layers: Sequence[int],
) -> float:
    """Runs tokens (int [B, L]) through `layers`, one after the other, and the head, twice. Returns the largest
    difference of logits as a share of the largest logit.

    Raises:
        RotorError: it is more than TOLERANCE, or the model can't be run layer by layer.
    """
    before, after = (_logits(config, plan, w, tokens, layers) for w in (weights, Folded(weights, folds)))
    scale, difference = (float(np.abs(np.array(a)).max()) for a in (before, after - before))
    difference = difference / scale if scale else 0.0
    if not difference <= TOLERANCE:  # NaN, too
        modules = sorted({module for module, _ in folds})
        raise RotorError(
            f"folding changes the model: logits after layers {', '.join(map(str, layers))} differ by {difference:.2g}"
            f" of the largest, more than {TOLERANCE:g}. Some reader of the folded inputs is not known"
            f" ({', '.join(modules[:4])}, …): use --fold none, and report the architecture"
        )
    return difference


def prove(
    folding: Folding, config: Mapping[str, Any], plan: Plan, weights: Weights, tokens: np.ndarray
) -> tuple[int, ...]:
    """`check` of every fold that `folding` may choose, by factors of its own, before a job is given it: in the first
    layer of each kind, dense or with experts, say. Returns those layers. `weights`: not folded.

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
