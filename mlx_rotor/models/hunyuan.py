"""Hunyuan's mixtures of experts: Qwen's names with the router's weight one level down and a shared MLP."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx

from .architecture import Tensor
from .qwen_moe import ARCHITECTURE as QWEN_MOE
from .qwen_moe import softmax
from .router import Block, gate
from .tree import MLP, shared

ARCHITECTURE = replace(
    QWEN_MOE,
    model_types=("hunyuan",),
    tensors=(Tensor("router", MLP + "gate.wg.weight"), *shared(MLP + "shared_mlp"), *QWEN_MOE.tensors),
)


def _add_shared_mlp(block: Any, x: mx.array, y: mx.array) -> mx.array:
    return y + block.shared_mlp(x) if block.use_shared_mlp else y


ROUTERS = (
    Block("hunyuan.MoeBlock", "f4a560a88b11", softmax, gate, ("Gate.__call__",), cast=True, finish=_add_shared_mlp),
)
