"""Mistral 4: DeepSeek's names, but the experts of a layer in one tensor, gate and up after one another."""

from __future__ import annotations

from dataclasses import replace

from .architecture import Fused
from .deepseek import ARCHITECTURE as DEEPSEEK
from .tree import MLP

EXPERTS, STACK = MLP + "experts.", MLP + "switch_mlp."

ARCHITECTURE = replace(
    DEEPSEEK,
    model_types=("mistral4",),
    fused=(
        *DEEPSEEK.fused,
        Fused(EXPERTS + "gate_up_proj", (STACK + "gate_proj.weight", STACK + "up_proj.weight")),
        Fused(EXPERTS + "down_proj", (STACK + "down_proj.weight",)),
    ),
)
