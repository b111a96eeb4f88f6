"""Granite's mixtures of experts: Mixtral's names, but the experts of a layer in one tensor, gate before up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx

from .architecture import Fused, Tensor
from .minimax_m2 import ARCHITECTURE as MIXTRAL
from .minimax_m2 import MOE
from .router import Block, Choice, Routing

STACK = MOE + "switch_mlp."

ARCHITECTURE = replace(
    MIXTRAL,
    model_types=("granitemoe",),
    tensors=(Tensor("router", MOE + "router.layer.weight"), *MIXTRAL.tensors),
    fused=(
        Fused(MOE + "input_linear.weight", (STACK + "gate_proj.weight", STACK + "up_proj.weight")),
        Fused(MOE + "output_linear.weight", (STACK + "down_proj.weight",)),
    ),
)


def _choice(gate: Any) -> Choice:
    return Choice(Routing("softmax_of_chosen", False, ascending=True, upcast=True), gate.top_k)


def _logits(gate: Any, x: mx.array) -> mx.array:
    return gate.layer(x)


ROUTERS = (
    Block(
        "granitemoe.GraniteMoeMoE",
        "2e7ba1524b9f",
        _choice,
        _logits,
        ("GraniteMoeTopKGating.__call__",),
        gate="router",
        cast=True,
    ),
    # Of models whose state-space layers have names that are not known here.
    Block(
        "granitemoehybrid.GraniteMoeHybridMoE",
        "7e9247699763",
        _choice,
        _logits,
        ("GraniteMoeHybridTopKGating.__call__",),
        gate="router",
    ),
)
