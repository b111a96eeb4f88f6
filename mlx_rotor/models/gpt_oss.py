"""gpt-oss, from a bfloat16 checkpoint: experts of a layer in one tensor, gate and up in turn, inputs before outputs."""

from __future__ import annotations

from typing import Any

from .architecture import Architecture, Fused, Tensor
from .router import Block, Choice, Routing, router
from .tree import ATTENTION, MLP, TRANSFORMER, UNUSED, experts

EXPERTS = MLP + "experts."

ARCHITECTURE = Architecture(
    model_types=("gpt_oss",),
    tensors=(
        Tensor("attn.sinks", ATTENTION + "sinks"),
        Tensor("router", MLP + "router.weight"),
        Tensor("bias", MLP + "router.bias"),
        *(Tensor(t.role, t.name) for t in experts(MLP + "experts", "")),
        Tensor("bias", EXPERTS + "*_proj.bias"),
        *TRANSFORMER,
    ),
    fused=(
        Fused(
            EXPERTS + "gate_up_proj",
            (EXPERTS + "gate_proj.weight", EXPERTS + "up_proj.weight"),
            alternate=True,
            columns=True,
        ),
        Fused(
            EXPERTS + "gate_up_proj_bias",
            (EXPERTS + "gate_proj.bias", EXPERTS + "up_proj.bias"),
            alternate=True,
            columns=True,
        ),
        Fused(EXPERTS + "down_proj", (EXPERTS + "down_proj.weight",), columns=True),
        Fused(EXPERTS + "down_proj_bias", (EXPERTS + "down_proj.bias",), columns=True),
    ),
    drop=UNUSED,
)


def _choice(block: Any) -> Choice:
    return Choice(Routing("softmax_of_chosen", False, ascending=True), block.num_experts_per_tok)


ROUTERS = (Block("gpt_oss.MLPBlock", "25d463fe9bbb", _choice, router, ("mlx_topk",), experts="experts"),)
