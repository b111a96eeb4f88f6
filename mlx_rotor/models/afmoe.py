"""Afmoe (Trinity): Qwen's names with a router and an expert bias of its own, sigmoid or softmax scores in groups."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .architecture import Tensor
from .qwen_moe import ARCHITECTURE as QWEN_MOE
from .router import Block, Choice, Routing, add_shared, router
from .tree import MLP, experts, shared

ARCHITECTURE = replace(
    QWEN_MOE,
    model_types=("afmoe",),
    tensors=(
        Tensor("router", MLP + "router.gate.weight"),
        Tensor("router.bias", MLP + "expert_bias", dtype="F32"),
        *shared(MLP + "shared_experts"),
        *experts(MLP + "experts", MLP + "experts.{expert}"),
        *QWEN_MOE.tensors,
    ),
)


def _choice(block: Any) -> Choice:
    how = Routing(
        "sigmoid" if block.score_func == "sigmoid" else "softmax",
        bool(block.route_norm and block.num_experts_per_tok > 1),
        scaling=block.route_scale,
        upcast=True,
        precise=False,
        groups=block.n_group,
        kept=block.topk_group,
    )
    return Choice(how, block.num_experts_per_tok, block.expert_bias)


ROUTERS = (
    Block(
        "afmoe.AfmoeMoE",
        "9b30c636c1b5",
        _choice,
        router,
        ("MoERouter.__call__",),
        experts="experts",
        cast=True,
        finish=add_shared,
    ),
)
