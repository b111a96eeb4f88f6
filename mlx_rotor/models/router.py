"""The parts that a family file describes its routers with: how an expert block of mlx_lm chooses a token's experts.

A description holds for one text of the block's code, whose digest it names; `host/routers.py` compares the two before
the routing kernel takes the block's place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..kernels.experts.routing import Routing

__all__ = ["SELECT", "Block", "Choice", "Routing", "add_shared", "gate", "gate_weight", "router"]

SELECT = "group_expert_select"  # what mlx_lm calls the function of DeepSeek's models that chooses, and of their likes


@dataclass(frozen=True)
class Choice:
    """How a block chooses `k` experts for each token. `bias` [experts]: added to the scores where they are compared."""

    how: Routing
    k: int
    bias: mx.array | None = None


@dataclass(frozen=True)
class Block:
    """A class of mlx_lm's that chooses experts, calls them and adds their weighted outputs.

    Attributes:
        name: "module.Class" below `mlx_lm.models`.
        digest: of the code of its `__call__` and of `uses`, as `host.versions.digest` gives it.
        choice: of the module that chooses, how it does.
        logits: of the module that chooses and x [tokens, hidden], the router's logits [tokens, experts].
        uses: functions of its module, or methods as "Class.method", that choosing is made of.
        gate: the attribute with the module that chooses; "" is the block itself.
        dtype: of the weights: "x", "logits", or "" for whatever the operations give.
        experts: the attribute with its experts.
        cast: the weighted sum is cast back to the dtype of the experts' outputs.
        finish: of the block, x and the weighted sum: the block's result, before any sum over machines. None: the sum.
    """

    name: str
    digest: str
    choice: Callable[[Any], Choice]
    logits: Callable[[Any, mx.array], mx.array]
    uses: tuple[str, ...] = ()
    gate: str = ""
    dtype: str = ""
    experts: str = "switch_mlp"
    cast: bool = False
    finish: Callable[[Any, mx.array, mx.array], mx.array] | None = None


def gate(block: Any, x: mx.array) -> mx.array:
    """The logits of a block whose router is its layer `gate`."""
    return block.gate(x)


def router(block: Any, x: mx.array) -> mx.array:
    """The logits of a block whose router is its layer `router`."""
    return block.router(x)


def gate_weight(gate: Any, x: mx.array) -> mx.array:
    """The logits of a gate that has a weight [experts, hidden] of its own."""
    return x @ gate.weight.T


def add_shared(block: Any, x: mx.array, y: mx.array) -> mx.array:
    """The sum and the shared experts' output; the attribute is missing or None in models without shared experts."""
    return y if getattr(block, "shared_experts", None) is None else y + block.shared_experts(x)
