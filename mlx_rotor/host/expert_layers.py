"""mlx_lm's SwitchGLU with the expert kernels in it: the class that a layer gets, and the state that it keeps.

`kernel_name` recognises a layer's activation by what it computes, as models have many names for the same one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import is_
from typing import Any

import mlx.core as mx
from mlx_lm.models.switch_layers import SwitchGLU

from ..errors import RotorError
from ..experts.fused import MAX_ROWS, Counts, FusedExperts, run
from ..experts.layers import packed_of
from ..kernels import backend
from ..kernels.experts.reference import ACTIVATIONS, activate
from .notes import note, noted

# Where known forms differ: around 0 and 2.7 (forms of GELU), around 7 (gpt-oss's limit) and far out (other limits).
_POSITIVE = (1e-3, 0.3, 1.0, 1.9, 2.7, 4.0, 6.9, 7.1, 11.0, 40.0, 200.0, 2e3, 2e4)
_POINTS = (0.0, *_POSITIVE, *(-x for x in _POSITIVE))
_TOLERANCE = 3e-5


def kernel_name(activation: Any) -> str | None:
    """The name in `ACTIVATIONS` of an activation that is called with (up, gate), None if it computes none of them."""
    up, gate = (a.flatten() for a in mx.meshgrid(mx.array(_POINTS), mx.array(_POINTS)))
    try:
        out = activation(up, gate)
    except (ValueError, TypeError):  # it wants another shape
        return None
    if not isinstance(out, mx.array) or out.shape != up.shape:
        return None
    size = mx.maximum(mx.abs(up), 1) * mx.maximum(mx.abs(gate), 1)
    for name in ACTIVATIONS:
        if mx.all(mx.abs(out - activate(name, gate, up)) <= _TOLERANCE * size).item():
            return name
    return None


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_NAME = "_rotor_experts"


@dataclass
class State:
    """The state of a fused layer, kept beside its parameters.

    Attributes:
        activation: the kernels' name of the layer's activation.
        rows: numbers of tokens that the kernels are used for.
        counts: calls, by the way that was taken.
        trying: the current step is only built, to find out whether the kernels take it.
        refused: why they didn't.
        chosen: experts of a token, known once it was tried.
    """

    activation: str
    rows: frozenset[int]
    counts: Counts = field(default_factory=Counts)
    trying: bool = False
    refused: str = ""
    chosen: int = 0
    # The weights' arrays when they were read last, the experts made of them, and the dtype to compute in by x's.
    _read: tuple[list[Any], FusedExperts | None, dict[mx.Dtype, mx.Dtype]] | None = None

    def __deepcopy__(self, _: Any) -> State:
        """The state of a copied layer, with its own counts."""
        return State(self.activation, self.rows, refused=self.refused, chosen=self.chosen)

    def covers(self, tokens: int) -> bool:
        """Whether the kernels are to be used for so many tokens."""
        return self.trying or tokens in self.rows

    def read(self, layer: Any) -> tuple[FusedExperts | None, dict[mx.Dtype, mx.Dtype]]:
        """The layer's experts as they are now (None: no longer packed) and the dtypes known with them."""
        gate, up, down = layer["gate_proj"], layer["up_proj"], layer["down_proj"]
        arrays = [*gate.values(), *up.values(), *down.values()]
        known = self._read
        if known is None or len(known[0]) != len(arrays) or not all(map(is_, known[0], arrays)):
            known = self._read = arrays, self._packed(gate, up, down), {}
        return known[1], known[2]

    def _packed(self, *projections: Any) -> FusedExperts | None:
        gate, up, down = map(packed_of, projections)
        return None if gate is None or up is None or down is None else FusedExperts(gate, up, down, self.activation)

    def taking(self, layer: Any, x: mx.array, indices: mx.array) -> tuple[FusedExperts, mx.array] | None:
        """The experts, and x in the dtype to compute in, if the kernels are to take x [.., K] and indices [.., k]."""
        k = indices.shape[-1]
        if not k or self.refused or not self.covers(indices.size // k):
            return None
        experts, dtypes = self.read(layer)
        if experts is None:
            return None
        dtype = dtypes.get(x.dtype)
        if dtype is None:  # the dtype of mlx_lm's own result, which is built and never computed
            dtype = dtypes[x.dtype] = SwitchGLU.__call__(layer, x, indices).dtype
        x = x if dtype == x.dtype else x.astype(dtype)
        if self.trying:
            self.chosen = k
            try:
                experts.weighted(x, indices, mx.zeros(indices.shape, x.dtype))
            except RotorError as e:
                self.refused = str(e)
                return None
        return experts, x

    def tiling(self, layer: Any, indices: mx.array) -> FusedExperts | None:
        """The experts, if the tokens go to the tiled kernels: more than MAX_ROWS, and weights in our formats."""
        k = indices.shape[-1]
        if self.refused or not k or indices.size // k <= MAX_ROWS or backend() == "reference":
            return None
        experts, _ = self.read(layer)
        return experts if experts is not None and experts.tiled else None


class FusedSwitchGLU(SwitchGLU):
    """Computes what the SwitchGLU did that it was.

    Few tokens take two launches. More tokens, with weights in our formats, take three around the layer's activation,
    without rows copied or sorted. Every other call is left to mlx_lm.
    """

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        kept: State = noted(self, _NAME)
        taken = kept.taking(self, x, indices)
        if taken is not None:
            return run(*taken, indices, kept.counts)
        many = kept.tiling(self, indices)
        if many is not None:
            kept.counts.tiled += 1
            return many.many(x, indices, self.activation)
        kept.counts.stock += 1
        out: mx.array = super().__call__(x, indices)
        return out


def put(layer: Any, state: State) -> None:
    """Makes a SwitchGLU a fused one."""
    note(layer, _NAME, state)
    object.__setattr__(layer, "__class__", FusedSwitchGLU)


def take(layer: Any) -> None:
    """Makes it a SwitchGLU again; one that is not fused stays as it is."""
    if type(layer) is FusedSwitchGLU:
        object.__setattr__(layer, "__class__", SwitchGLU)
        object.__delattr__(layer, _NAME)


def state_of(layer: Any) -> State | None:
    """The state of a fused layer; None for any other."""
    state: State | None = noted(layer, _NAME)
    return state
