"""Klear: Qwen's names; a coefficient of each token mixes the routed experts with the shared ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx

from .architecture import Tensor
from .qwen_moe import ARCHITECTURE as QWEN_MOE
from .router import Block, Choice, Routing, gate
from .tree import MLP, experts, shared

ARCHITECTURE = replace(
    QWEN_MOE,
    model_types=("Klear",),
    tensors=(
        Tensor("router", MLP + "coefficient.weight"),
        Tensor("bias", MLP + "coefficient.bias"),
        Tensor("router.bias", MLP + "expert_bias", dtype="F32"),
        *shared(MLP + "shared_experts"),
        *experts(MLP + "experts", MLP + "experts.{expert}"),
        *QWEN_MOE.tensors,
    ),
)


def _choice(block: Any) -> Choice:
    return Choice(Routing("sigmoid", bool(block.norm_topk_prob), upcast=True), block.top_k, block.expert_bias)


def _mixed(block: Any, x: mx.array, y: mx.array) -> mx.array:
    coefficients = mx.softmax(block.coefficient(x), axis=-1, precise=True)
    return y * coefficients[..., :1] + block.shared_experts(x) * coefficients[..., 1:]


ROUTERS = (
    Block("Klear.KlearSparseMoeBlock", "45c919e67b75", _choice, gate, dtype="x", experts="experts", finish=_mixed),
)
