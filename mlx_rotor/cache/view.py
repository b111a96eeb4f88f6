"""Views: what `update_and_fetch` hands the model instead of expanded keys and values.

A view is a real, lazy array of the dequantized tokens. Attention that recognises an untouched pair of views reads the
packed runs behind it and the lazy array is never evaluated; any other use of it is an ordinary array operation, whose
result is a plain array: correct, only slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .. import kernels
from ..kernels import ExactRun, StoredRun


@dataclass
class Counts:
    """What became of one layer's views: `made` by updates, `fused` by our attention. The rest fell back."""

    made: int = 0
    fused: int = 0

    @property
    def fallback(self) -> int:
        return self.made - self.fused


@dataclass(frozen=True)
class Handle:
    """The tokens behind a pair of views, in order, and the layer's counts."""

    runs: Sequence[StoredRun]
    counts: Counts

    def attend(
        self, q: mx.array, scale: float, mask: mx.array | str | None = None, sinks: mx.array | None = None
    ) -> mx.array:
        """Attention of q [B, Hq, L, D] over all tokens; see `kernels.attend`."""
        self.counts.fused += 1
        return kernels.attend(q, self.runs, scale=scale, mask=mask, sinks=sinks)


class KVView(mx.array):
    """A lazy [B, H, S, D] array that knows the tokens it came from. `kind` is "k" or "v"."""

    rotor: Handle
    kind: str


def views(runs: Sequence[StoredRun], dtype: mx.Dtype, counts: Counts) -> tuple[KVView, KVView]:
    """The pair (K, V) of views over runs in token order."""
    handle = Handle(runs, counts)
    counts.made += 1
    pair = []
    for kind in ("k", "v"):
        view = KVView(mx.concatenate([_side(run, kind, dtype) for run in runs], axis=2))
        view.rotor, view.kind = handle, kind
        pair.append(view)
    return pair[0], pair[1]


def _side(run: StoredRun, kind: str, dtype: mx.Dtype) -> mx.array:
    """[B, H, length, D] of a run, dequantized where it is packed."""
    if isinstance(run, ExactRun):
        return (run.k if kind == "k" else run.v).astype(dtype)
    return kernels.dequantize(run.k if kind == "k" else run.v, 0, run.length, dtype)


def paired(k: Any, v: Any) -> Handle | None:
    """The handle of two untouched views of the same tokens, K first; else None.

    The check on `kind` matters: some models pass one array as both keys and values.
    """
    if type(k) is KVView and type(v) is KVView and k.rotor is v.rotor and (k.kind, v.kind) == ("k", "v"):
        return k.rotor
    return None
