"""Qwen's mixtures of experts and those with their names: routed experts, and sometimes a shared one with a score."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from .architecture import Architecture, Tensor
from .router import Block, Choice, Routing, gate
from .tree import MLP, TRANSFORMER, UNUSED, experts, shared

ARCHITECTURE = Architecture(
    model_types=("qwen2_moe", "qwen3_moe", "olmoe", "mellum", "laguna"),
    tensors=(
        *TRANSFORMER,
        Tensor("router", MLP + "gate.weight"),
        Tensor("router", MLP + "shared_expert_gate.weight"),
        *shared(MLP + "shared_expert"),
        *experts(MLP + "switch_mlp", MLP + "experts.{expert}"),
        # Laguna's
        Tensor("router", MLP + "gate.proj.weight", (MLP + "gate.weight",)),
        Tensor(
            "router.bias",
            MLP + "gate.e_score_correction_bias",
            (MLP + "experts.e_score_correction_bias",),
            dtype="F32",
        ),
    ),
    drop=UNUSED,
)


def softmax(block: Any) -> Choice:
    """Weights are a softmax over all experts."""
    return Choice(Routing("softmax", False), block.top_k)


def normalized(block: Any) -> Choice:
    """As `softmax`, divided by their sum where the model says so; equal scores are taken from the end of the order."""
    return Choice(Routing("softmax", bool(block.norm_topk_prob), ascending=True), block.top_k)


def _olmoe(block: Any) -> Choice:
    return Choice(Routing("softmax", bool(block.norm_topk_prob)), block.top_k)


def add_gated_shared(block: Any, x: mx.array, y: mx.array) -> mx.array:
    """The sum and the shared expert's output, times the sigmoid of its score."""
    return y + mx.sigmoid(block.shared_expert_gate(x)) * block.shared_expert(x)


ROUTERS = (
    Block("qwen2_moe.Qwen2MoeSparseMoeBlock", "3c11d4ef7d38", softmax, gate, finish=add_gated_shared),
    Block("qwen3_moe.Qwen3MoeSparseMoeBlock", "dcd0095a463d", normalized, gate, cast=True),
    Block("mellum.MellumSparseMoeBlock", "5077fe5907cb", normalized, gate),
    Block("olmoe.OlmoeSparseMoeBlock", "e5bf79187abd", _olmoe, gate),
)
