"""The guide of a job: the weights it fits, and what is known of the inputs that they meet."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

import mlx.core as mx

from ..errors import RotorError
from .plan import Entry, Plan


class Weights(Protocol):
    """Weights by entry, as a checkpoint holds them or after scale folding."""

    def read(self, entry: Entry, part: int = 0, start: int = 0, stop: int | None = None) -> mx.array:
        """Rows [start, stop) of one part (expert) of an entry, float32; see `Checkpoint.read`."""


class Statistics(Protocol):
    """Inputs of an entry's part (`part`: the expert), seen in calibration. All float32, K the input dimension."""

    def importance(self, entry: Entry, part: int) -> mx.array | None:
        """[K]: mean square of each input, blended with the layer's where the part saw little; None if unknown."""

    def hessian(self, entry: Entry, part: int) -> mx.array | None:
        """[K, K]: mean outer product of the inputs, blended likewise; None where there is too little to go by."""

    def inputs(self, entry: Entry) -> str:
        """A name for what the parts of an entry take: all that is known of entries with the same name is the same."""


class Guide(Protocol):
    """Hands a job what it fits each layer with. `digest` changes with everything that changes the result."""

    @property
    def digest(self) -> str: ...

    @property
    def disk(self) -> int:
        """Bytes that its work files may still take, at most."""

    def layer(self, number: int | None, entries: Sequence[Entry]) -> tuple[Weights, Statistics | None]:
        """For the entries of a layer (None: the unlayered ones of one end of the model), in file order of the plan.

        A resumed job asks only for layers with something left to do. Valid until the next call.
        """

    def describe(self) -> dict[str, Any]:
        """For the output's metadata: where the statistics are from. The same for a job that was resumed."""

    def files(self) -> dict[str, str]:
        """Name -> text of files to put beside the weights, when all layers are done."""


class Unguided:
    """No calibration: the weights as they are."""

    digest = ""
    disk = 0

    def __init__(self, weights: Weights) -> None:
        self.weights = weights

    def layer(self, number: int | None, entries: Sequence[Entry]) -> tuple[Weights, Statistics | None]:
        return self.weights, None

    def describe(self) -> dict[str, Any]:
        return {}

    def files(self) -> dict[str, str]:
        return {}


class EntryParameters:
    """A plan's entries as the parameters of mlx_lm's model, read when they are needed; see `layerwise.Parameters`."""

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
