"""The ring: a layer's most recent tokens, exact."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import mlx.core as mx

from ..kernels import ExactRun
from .side import grown


@dataclass
class Ring:
    """Buffers [B, H, …, D] that grow to `room` tokens in steps of `step`, of which the first `length` are held."""

    room: int
    step: int
    k: mx.array | None = None
    v: mx.array | None = None
    length: int = 0

    def write(self, keys: mx.array, values: mx.array) -> None:
        """Stores tokens behind those held; there must be room."""
        n = keys.shape[2]
        needed = self.length + n
        if self.k is None or self.v is None or needed > self.k.shape[2]:
            capacity = min(self.room, -(-needed // self.step) * self.step)
            self.k = grown(self.k, keys, self.length, capacity)
            self.v = grown(self.v, values, self.length, capacity)
        self.k[:, :, self.length : needed] = keys
        self.v[:, :, self.length : needed] = values
        self.length = needed

    def run(self) -> ExactRun:
        """The tokens held; something must have been written once."""
        assert self.k is not None and self.v is not None
        return ExactRun(self.k[:, :, : self.length], self.v[:, :, : self.length])

    def copy(self) -> Ring:
        """The same tokens, whose memory is copied when either is written to."""
        return copy.deepcopy(self)
