"""Qwen3-Next: most layers have linear attention; norms are stored as their distance from one."""

from __future__ import annotations

from dataclasses import replace

from .architecture import Tensor
from .qwen_moe import ARCHITECTURE as QWEN_MOE
from .qwen_moe import add_gated_shared, normalized
from .router import Block, gate
from .tree import ATTENTION, LAYER

LINEAR = LAYER + "linear_attn."

ARCHITECTURE = replace(
    QWEN_MOE,
    model_types=("qwen3_next",),
    tensors=(
        Tensor("linear.in", LINEAR + "in_proj_qkvz.weight"),
        Tensor("linear.in", LINEAR + "in_proj_ba.weight"),
        Tensor("linear.out", LINEAR + "out_proj.weight"),
        Tensor("linear.state", LINEAR + "conv1d.weight"),
        Tensor("linear.state", LINEAR + "A_log", dtype="source"),
        Tensor("linear.state", LINEAR + "dt_bias"),
        Tensor("norm", LINEAR + "norm.weight"),
        Tensor("norm", "model.norm.weight", plus=1.0),
        Tensor("norm", LAYER + "*norm.weight", plus=1.0),
        Tensor("norm", ATTENTION + "*norm.weight", plus=1.0),
        *QWEN_MOE.tensors,
    ),
)

ROUTERS = (Block("qwen3_next.Qwen3NextSparseMoeBlock", "6e8e166f2bd8", normalized, gate, finish=add_gated_shared),)
