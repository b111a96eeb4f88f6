"""MiniMax-M2 (M2, M2.1, M2.5, M2.7) and Mixtral: routed experts w1, w2, w3 in a block_sparse_moe, none shared.

MiniMax-M3 and Jamba have their routers with other names, which are not known here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx

from .architecture import Architecture, Tensor
from .router import Block, Choice, Routing, add_shared, gate, router
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


def _in_float32(block: Any, x: mx.array) -> mx.array:
    return block.gate(x.astype(mx.float32))


def _minimax(block: Any) -> Choice:
    return Choice(Routing("sigmoid", True, epsilon=1e-20), block.num_experts_per_tok, block.e_score_correction_bias)


def _minimax_m3(block: Any) -> Choice:
    found = _minimax(block)
    return replace(found, how=replace(found.how, scaling=block.routed_scaling_factor, upcast=True))


def _mixtral(block: Any) -> Choice:
    return Choice(Routing("softmax_of_chosen", False), block.num_experts_per_tok)


ROUTERS = (
    Block("minimax.MiniMaxSparseMoeBlock", "2e314ee77467", _minimax, _in_float32, dtype="x"),
    Block("minimax_m3_vl.SparseMoeBlock", "b11d44dc1fbb", _minimax_m3, gate, dtype="x", finish=add_shared),
    Block("mixtral.MixtralSparseMoeBlock", "f1761c3bced7", _mixtral, gate),
    Block("jamba.JambaSparseMoeBlock", "b0e4da2bc9e2", _mixtral, router),
)
