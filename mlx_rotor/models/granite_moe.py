"""Granite's mixtures of experts: Mixtral's names, but the experts of a layer in one tensor, gate before up."""

from __future__ import annotations

from dataclasses import replace

from .architecture import Fused, Tensor
from .minimax_m2 import ARCHITECTURE as MIXTRAL
from .minimax_m2 import MOE

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
