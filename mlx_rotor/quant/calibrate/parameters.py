"""A plan's entries as the parameters of mlx_lm's model, read when they are needed."""

from __future__ import annotations

from collections.abc import Collection

import mlx.core as mx

from ...errors import RotorError
from ..guide import Weights
from ..plan import Entry, Plan


class EntryParameters:
    """See `host.layerwise.Parameters`."""

    def __init__(self, plan: Plan, weights: Weights) -> None:
        self._weights = weights
        self._entries = {entry.name or entry.outputs[0].name: entry for entry in plan.entries}

    def names(self) -> Collection[str]:
        return self._entries.keys()

    def whole(self, name: str) -> mx.array:
        entry = self._entry(name)
        if entry.parts == 1 and entry.shape == entry.source_shape:
            return self._weights.read(entry)
        return mx.stack([self._weights.read(entry, part) for part in range(entry.parts)]).reshape(entry.shape)

    def part(self, name: str, expert: int) -> mx.array:
        return self._weights.read(self._entry(name), expert)

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise RotorError(f"{name} is a parameter of mlx_lm's model and in no entry of the plan")
        return self._entries[name]
