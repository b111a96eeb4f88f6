"""Puts the routing kernel into a model's expert blocks, where `models` knows the block's code to the letter.

Such a block computes logits, choice, experts and sum through kernels for as many tokens as its experts are fused for,
and leaves every other call to mlx_lm's own code.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from operator import is_
from typing import Any

import mlx.core as mx

from ..kernels.experts.routing import route
from ..models import Block, Choice, routers
from .expert_layers import State, state_of
from .notes import note, noted
from .versions import digest

_NAME = "_rotor_router"


class _Kept:
    """The state of such a block: its own class, that class's description, and the choice that was read last."""

    def __init__(self, stock: type, block: Block) -> None:
        self.stock, self.block = stock, block
        self._chosen: tuple[list[Any], Choice] | None = None

    def run(self, module: Any, x: mx.array) -> mx.array | None:
        """The block's result for x [.., K]; None where the call is left to mlx_lm."""
        block = self.block
        state: State | None = state_of(module[block.experts])
        width = x.shape[-1]
        if state is None or not x.size or not state.covers(x.size // width):
            return None
        gate = module[block.gate] if block.gate else module
        rows = x.reshape(-1, width)
        logits, choice = block.logits(gate, rows), self.choice(gate)
        dtype = x.dtype if block.dtype == "x" else logits.dtype if block.dtype else None
        indices, weights = route(logits, choice.k, choice.how, choice.bias, dtype)
        taken = state.taking(module[block.experts], rows, indices)
        if taken is None:
            return None
        experts, rows = taken
        counts = state.counts
        counts.fused, counts.summed, counts.routed = counts.fused + 1, counts.summed + 1, counts.routed + 1
        y = experts.weighted(rows, indices, weights).reshape(x.shape)
        y = y if block.cast or y.dtype == weights.dtype else y.astype(mx.result_type(y, weights))
        y = y if block.finish is None else block.finish(module, x, y)
        group = getattr(module, "sharding_group", None)
        return y if group is None else mx.distributed.all_sum(y, group=group)

    def choice(self, gate: Any) -> Choice:
        """The gate's choice, read again where an attribute or an array of the gate has been replaced."""
        found = [*gate.values(), *vars(gate).values()]
        known = self._chosen
        if known is None or len(known[0]) != len(found) or not all(map(is_, known[0], found)):
            known = self._chosen = found, self.block.choice(gate)
        return known[1]


def _call(self: Any, x: mx.array) -> mx.array:
    kept: _Kept = noted(self, _NAME)
    out = kept.run(self, x)
    return kept.stock.__call__(self, x) if out is None else out  # type: ignore[no-any-return]


@cache
def _routed(kind: Any) -> type:
    return type(kind.__name__, (kind,), {"__call__": _call, "__module__": kind.__module__})


def attach(model: Any, layers: Mapping[str, Any]) -> dict[str, str]:
    """Puts the kernel into the blocks that hold `layers`, expert layers by path.

    Returns:
        By the layer's path, the reason why a block is left as it is, "" for the others.
    """
    modules = dict(model.named_modules())
    return {path: _attach(modules[path.rpartition(".")[0]], layer) for path, layer in layers.items()}


def _attach(module: Any, layer: Any) -> str:
    block, why = known(module)
    if block is None:
        return why
    if module.get(block.experts) is not layer:
        return f"its experts are not {type(module).__name__}.{block.experts}"
    choice = block.choice(module[block.gate] if block.gate else module)
    if not (why := choice.how.why_not(layer.gate_proj.num_experts, choice.k)):
        kind: Any = type(module)
        note(module, _NAME, _Kept(kind, block))
        module.__class__ = _routed(kind)
    return why


def known(module: Any) -> tuple[Block | None, str]:
    """The description of an expert block of a model, or None and why there is none that holds for its code."""
    kind: Any = type(module)
    block = routers().get(f"{kind.__module__.rpartition('.')[2]}.{kind.__qualname__}")
    if block is None:
        return None, f"{kind.__name__} is none that is known"
    if digest(kind, block.uses) != block.digest:
        return None, f"{kind.__name__} is other code in this mlx_lm"
    gate = type(module[block.gate]) if block.gate else kind
    if block.gate and (gate.__module__, f"{gate.__qualname__}.__call__") != (kind.__module__, block.uses[0]):
        return None, f"its gate is a {gate.__name__}"
    return block, ""


def detach(model: Any) -> None:
    """Gives every block its own class back."""
    for _, module in model.named_modules():
        kept: _Kept | None = noted(module, _NAME)
        if kept is not None:
            module.__class__ = kept.stock
            object.__delattr__(module, _NAME)
