"""Qwen's mixtures of experts and those with their names: routed experts, and sometimes a shared one with a score."""

from __future__ import annotations

from .architecture import Architecture, Tensor
from .tree import MLP, TRANSFORMER, UNUSED, experts, shared

ARCHITECTURE = Architecture(
    model_types=("qwen2_moe", "qwen3_moe", "olmoe", "mellum", "Klear", "afmoe", "hunyuan", "laguna"),
    tensors=(
        *TRANSFORMER,
        Tensor("router", MLP + "gate.weight"),
        Tensor("router", MLP + "shared_expert_gate.weight"),
        *shared(MLP + "shared_expert"),
        *experts(MLP + "switch_mlp", MLP + "experts.{expert}"),
        # Klear's, whose coefficient weighs the shared experts, and Afmoe's
        Tensor("router", MLP + "coefficient.weight"),
        Tensor("bias", MLP + "coefficient.bias"),
        Tensor("router", MLP + "router.gate.weight"),
        Tensor("router.bias", MLP + "expert_bias", dtype="F32"),
        *shared(MLP + "shared_experts"),
        *experts(MLP + "experts", MLP + "experts.{expert}"),
        # Hunyuan's
        Tensor("router", MLP + "gate.wg.weight"),
        *shared(MLP + "shared_mlp"),
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
