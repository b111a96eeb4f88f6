"""What a job asks for beside the plan when it fits an entry: weights, and what is known of the inputs they meet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx

from .plan import Entry


class Weights(Protocol):
    """Weights by entry, as a checkpoint holds them or folded."""

    def read(self, entry: Entry, part: int = 0, start: int = 0, stop: int | None = None) -> mx.array:
        """Rows [start, stop) of one part (expert) of an entry, float32; see `Checkpoint.read`."""


class Statistics(Protocol):
    """Inputs of an entry's part (`part`: the expert), seen in calibration. All float32, K the input dimension."""

    def importance(self, entry: Entry, part: int) -> mx.array | None:
        """[K]: mean square of each input, blended with the layer's where the part saw little; None if unknown."""

    def hessian(self, entry: Entry, part: int) -> mx.array | None:
        """[K, K]: mean outer product of the inputs, blended likewise; None where there is too little to go by."""


class Guide(Protocol):
    """Hands a job what it fits each layer with. `digest` changes with everything that changes the result."""

    @property
    def digest(self) -> str: ...

    def layer(self, number: int | None, entries: Sequence[Entry]) -> tuple[Weights, Statistics | None]:
        """For the entries of a layer (None: the unlayered ones of one end of the model), in file order of the plan.

        A resumed job asks only for layers with something left to do. Valid until the next call.
        """


class Unguided:
    """No calibration: the weights as they are."""

    digest = ""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights

    def layer(self, number: int | None, entries: Sequence[Entry]) -> tuple[Weights, Statistics | None]:
        return self.weights, None
