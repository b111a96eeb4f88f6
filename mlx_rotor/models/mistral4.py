"""Mistral 4: DeepSeek's names, but the experts of a layer in one tensor, gate and up after one another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .architecture import Fused
from .deepseek import ARCHITECTURE as DEEPSEEK
from .router import Block, Choice, Routing, add_shared, gate
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


def _choice(block: Any) -> Choice:
    args = block.args
    how = Routing(
        "softmax",
        bool(args.norm_topk_prob),
        scaling=args.routed_scaling_factor,
        epsilon=1e-20,
        upcast=True,
        precise=False,
        groups=args.n_group,
        kept=args.topk_group,
    )
    return Choice(how, block.num_experts_per_tok)


ROUTERS = (
    Block(
        "mistral4.Mistral4MoE",
        "f92f8f36e511",
        _choice,
        gate,
        ("mistral4_expert_select",),
        cast=True,
        finish=add_shared,
    ),
)
