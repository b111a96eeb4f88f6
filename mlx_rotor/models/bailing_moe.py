"""Bailing (Ling, Ring): their routers. Names in checkpoints are not known here, so such a model is not quantized."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx

from .router import SELECT, Block, Choice, Routing, add_shared


def _logits(gate: Any, x: mx.array) -> mx.array:
    return gate.gate_proj(x)


def _linear(gate: Any) -> Choice:
    how = Routing(
        "sigmoid" if gate.score_function == "sigmoid" else "softmax",
        bool(gate.top_k > 1 and gate.norm_topk_prob),
        scaling=gate.routed_scaling_factor,
        upcast=True,
        precise=False,
        groups=gate.n_group,
        kept=gate.topk_group,
    )
    return Choice(how, gate.top_k, gate.expert_bias)


def _bailing(gate: Any) -> Choice:
    found = _linear(gate)
    return replace(found, how=replace(found.how, epsilon=1e-20, ascending=True))


ROUTERS = (
    Block(
        "bailing_moe.BailingMoeSparseMoeBlock",
        "455a774afeef",
        _bailing,
        _logits,
        ("BailingMoeGate.__call__", SELECT, "aggregate_expert_outputs"),
        gate="gate",
        dtype="logits",
        cast=True,
        finish=add_shared,
    ),
    Block(
        "bailing_moe_linear.SparseMoeBlock",
        "72d67cb4cdb4",
        _linear,
        _logits,
        ("Gate.__call__", SELECT),
        gate="gate",
        dtype="logits",
        finish=add_shared,
    ),
)
