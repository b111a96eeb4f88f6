"""MiniMax-M2 (M2, M2.1, M2.5, M2.7) and Mixtral: routed experts w1, w2, w3 in a block_sparse_moe, none shared."""

from __future__ import annotations

from .architecture import Architecture, Tensor
from .tree import LAYER, TRANSFORMER, UNUSED, experts

MOE = LAYER + "block_sparse_moe."

ARCHITECTURE = Architecture(
    model_types=("minimax_m2", "minimax", "mixtral", "phimoe"),
    tensors=(
        *TRANSFORMER,
        Tensor("router", MOE + "gate.weight"),
        Tensor("router.bias", MOE + "e_score_correction_bias", dtype="F32"),
        *experts(MOE + "switch_mlp", MOE + "experts.{expert}", ("w1", "w3", "w2")),
    ),
    drop=UNUSED,
)
