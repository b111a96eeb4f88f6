"""Step 3.5: its router. Names in checkpoints are not known here, so such a model is not quantized."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from .router import Block, Choice, Routing, gate


def _choice(gate: Any) -> Choice:
    how = Routing("sigmoid", bool(gate.norm_topk_prob), scaling=gate.routed_scaling_factor, epsilon=1e-20, upcast=True)
    return Choice(how, gate.top_k, gate.router_bias)


def _add_shared(block: Any, x: mx.array, y: mx.array) -> mx.array:
    return y + block.share_expert(x)


ROUTERS = (
    Block(
        "step3p5.Step3p5MoE",
        "e71f0ac5e43f",
        _choice,
        gate,
        ("Step3p5MoEGate.__call__", "moe_gate_select"),
        gate="gate",
        cast=True,
        finish=_add_shared,
    ),
)
