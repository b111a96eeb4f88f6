"""Blocks of mlx_lm's models whose code is known to the letter: how each chooses experts, what it adds to their sum.

An entry holds for code whose digest it names; the same class with other code is another block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..kernels.experts.routing import Routing
from .versions import digest


@dataclass(frozen=True)
class Choice:
    """How experts are chosen. `k`: for a token. `bias`: added where scores are compared."""

    how: Routing
    k: int
    bias: mx.array | None = None


@dataclass(frozen=True)
class Block:
    """A class of mlx_lm's that chooses experts, calls them and adds their outputs up.

    Attributes:
        digest: of its `__call__` and of `uses`.
        choice: of its gate; logits: of its gate and x.
        uses: functions of its module, or methods as "Class.method", that choosing is made of.
        gate: the attribute with the module that chooses; "": the block itself.
        dtype: of the weights: "x", "logits", or "" for whatever the operations give.
        experts: the attribute with its experts.
        cast: the weighted sum is cast back to their dtype.
        finish: of the block, x and that sum: the result, before any sum over machines. None: that sum.
    """

    digest: str
    choice: Callable[[Any], Choice]
    logits: Callable[[Any, mx.array], mx.array]
    uses: tuple[str, ...] = ()
    gate: str = ""
    dtype: str = ""
    experts: str = "switch_mlp"
    cast: bool = False
    finish: Callable[[Any, mx.array, mx.array], mx.array] | None = None


# ------------------------------------------------------------ logits of a gate


def _gate(block: Any, x: mx.array) -> mx.array:
    return block.gate(x)  # type: ignore[no-any-return]


def _router(block: Any, x: mx.array) -> mx.array:
    return block.router(x)  # type: ignore[no-any-return]


def _in_float32(block: Any, x: mx.array) -> mx.array:
    return block.gate(x.astype(mx.float32))  # type: ignore[no-any-return]


def _weight(gate: Any, x: mx.array) -> mx.array:
    return x @ gate.weight.T  # type: ignore[no-any-return]


def _proj(gate: Any, x: mx.array) -> mx.array:
    return gate.gate_proj(x)  # type: ignore[no-any-return]


# ------------------------------------------------------------ how they choose


def _minimax(block: Any) -> Choice:
    return Choice(Routing("sigmoid", True, epsilon=1e-20), block.num_experts_per_tok, block.e_score_correction_bias)


def _minimax_m3(block: Any) -> Choice:
    found = _minimax(block)
    return replace(found, how=replace(found.how, scaling=block.routed_scaling_factor, upcast=True))


def _mixtral(block: Any) -> Choice:
    return Choice(Routing("softmax_of_chosen", False), block.num_experts_per_tok)


def _gpt_oss(block: Any) -> Choice:
    return Choice(Routing("softmax_of_chosen", False, ascending=True), block.num_experts_per_tok)


def _granite(gate: Any) -> Choice:
    return Choice(Routing("softmax_of_chosen", False, ascending=True, upcast=True), gate.top_k)


def _softmax(block: Any) -> Choice:
    return Choice(Routing("softmax", False), block.top_k)


def _qwen3(block: Any) -> Choice:
    return Choice(Routing("softmax", bool(block.norm_topk_prob), ascending=True), block.top_k)


def _olmoe(block: Any) -> Choice:
    return Choice(Routing("softmax", bool(block.norm_topk_prob)), block.top_k)


def _klear(block: Any) -> Choice:
    return Choice(Routing("sigmoid", bool(block.norm_topk_prob), upcast=True), block.top_k, block.expert_bias)


def _ernie(block: Any) -> Choice:
    scores: Any = "softmax" if isinstance(block.gate_act, nn.Softmax) else "sigmoid"
    return Choice(Routing(scores, True, floor=1e-12, upcast=True, precise=False), block.k)


def _grouped(gate: Any) -> Choice:
    how = Routing(
        "sigmoid",
        bool(gate.top_k > 1 and gate.norm_topk_prob),
        scaling=gate.routed_scaling_factor,
        upcast=True,
        groups=gate.n_group,
        kept=gate.topk_group,
    )
    return Choice(how, gate.top_k, gate.e_score_correction_bias)


def _grouped_safely(gate: Any) -> Choice:
    found = _grouped(gate)
    return replace(found, how=replace(found.how, epsilon=1e-20))


def _dots1(gate: Any) -> Choice:
    found = _grouped(gate)
    return found if gate.n_group != gate.topk_group else replace(found, how=replace(found.how, groups=1))


def _bailing_linear(gate: Any) -> Choice:
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
    found = _bailing_linear(gate)
    return replace(found, how=replace(found.how, epsilon=1e-20, ascending=True))


def _afmoe(block: Any) -> Choice:
    how = Routing(
        "sigmoid" if block.score_func == "sigmoid" else "softmax",
        bool(block.route_norm and block.num_experts_per_tok > 1),
        scaling=block.route_scale,
        upcast=True,
        precise=False,
        groups=block.n_group,
        kept=block.topk_group,
    )
    return Choice(how, block.num_experts_per_tok, block.expert_bias)


def _mistral4(block: Any) -> Choice:
    args = block.args
    how = Routing(
        "softmax",
        bool(args.norm_topk_prob),
        scaling=args.routed_scaling_factor,
        epsilon=1e-20,
        upcast=True,
        precise=False,
        groups=args.n_group,
        kept=args.topk_group,
    )
    return Choice(how, block.num_experts_per_tok)


def _step(gate: Any) -> Choice:
    how = Routing("sigmoid", bool(gate.norm_topk_prob), scaling=gate.routed_scaling_factor, epsilon=1e-20, upcast=True)
    return Choice(how, gate.top_k, gate.router_bias)


# ------------------------------------------------------------ what is added to the sum


def _gated_shared(block: Any, x: mx.array, y: mx.array) -> mx.array:
    return y + mx.sigmoid(block.shared_expert_gate(x)) * block.shared_expert(x)


def _shared(block: Any, x: mx.array, y: mx.array) -> mx.array:
    """Models without shared experts have none, or None."""
    return y if getattr(block, "shared_experts", None) is None else y + block.shared_experts(x)


def _shared_mlp(block: Any, x: mx.array, y: mx.array) -> mx.array:
    return y + block.shared_mlp(x) if block.use_shared_mlp else y


def _mixed(block: Any, x: mx.array, y: mx.array) -> mx.array:
    coefficients = mx.softmax(block.coefficient(x), axis=-1, precise=True)
    return y * coefficients[..., :1] + block.shared_experts(x) * coefficients[..., 1:]


_SELECT = "group_expert_select"
_MOE_GATE: dict[str, Any] = {"uses": ("MoEGate.__call__", _SELECT), "gate": "gate", "cast": True, "finish": _shared}

# Module and class -> what it does.
BLOCKS: dict[tuple[str, str], Block] = {
    ("minimax", "MiniMaxSparseMoeBlock"): Block("2e314ee77467", _minimax, _in_float32, dtype="x"),
    ("minimax_m3_vl", "SparseMoeBlock"): Block("b11d44dc1fbb", _minimax_m3, _gate, dtype="x", finish=_shared),
    ("mixtral", "MixtralSparseMoeBlock"): Block("f1761c3bced7", _mixtral, _gate),
    ("jamba", "JambaSparseMoeBlock"): Block("b0e4da2bc9e2", _mixtral, _router),
    ("gpt_oss", "MLPBlock"): Block("25d463fe9bbb", _gpt_oss, _router, ("mlx_topk",), experts="experts"),
    ("granitemoe", "GraniteMoeMoE"): Block(
        "2e7ba1524b9f",
        _granite,
        lambda gate, x: gate.layer(x),
        ("GraniteMoeTopKGating.__call__",),
        gate="router",
        cast=True,
    ),
    ("granitemoehybrid", "GraniteMoeHybridMoE"): Block(
        "7e9247699763", _granite, lambda gate, x: gate.layer(x), ("GraniteMoeHybridTopKGating.__call__",), gate="router"
    ),
    ("qwen2_moe", "Qwen2MoeSparseMoeBlock"): Block("3c11d4ef7d38", _softmax, _gate, finish=_gated_shared),
    ("qwen3_moe", "Qwen3MoeSparseMoeBlock"): Block("dcd0095a463d", _qwen3, _gate, cast=True),
    ("qwen3_next", "Qwen3NextSparseMoeBlock"): Block("6e8e166f2bd8", _qwen3, _gate, finish=_gated_shared),
    ("mellum", "MellumSparseMoeBlock"): Block("5077fe5907cb", _qwen3, _gate),
    ("olmoe", "OlmoeSparseMoeBlock"): Block("e5bf79187abd", _olmoe, _gate),
    ("hunyuan", "MoeBlock"): Block("f4a560a88b11", _softmax, _gate, ("Gate.__call__",), cast=True, finish=_shared_mlp),
    ("Klear", "KlearSparseMoeBlock"): Block("45c919e67b75", _klear, _gate, dtype="x", experts="experts", finish=_mixed),
    ("ernie4_5_moe", "Ernie4_5_MoeMLP"): Block("05cbd2b7f59c", _ernie, _gate, cast=True, finish=_shared),
    ("afmoe", "AfmoeMoE"): Block(
        "9b30c636c1b5", _afmoe, _router, ("MoERouter.__call__",), experts="experts", cast=True, finish=_shared
    ),
    ("mistral4", "Mistral4MoE"): Block(
        "f92f8f36e511", _mistral4, _gate, ("mistral4_expert_select",), cast=True, finish=_shared
    ),
    ("glm4_moe", "MoE"): Block("dc58138f27e9", _grouped, _weight, **_MOE_GATE),
    ("glm4_moe_lite", "Glm4MoeLiteMoE"): Block("2c6c00d32f26", _grouped_safely, _weight, **_MOE_GATE),
    ("deepseek_v3", "DeepseekV3MoE"): Block("dc58138f27e9", _grouped, _weight, **_MOE_GATE),
    ("deepseek_v32", "DeepseekV32MoE"): Block("dc58138f27e9", _grouped, _weight, **_MOE_GATE),
    ("exaone_moe", "MoE"): Block("da33a7bd9004", _grouped_safely, _weight, **_MOE_GATE),
    ("mimo_v2_flash", "MoE"): Block("b1c4adc04b6e", _grouped_safely, _weight, **_MOE_GATE),
    ("dots1", "Dots1MoE"): Block(
        "45eb9b2348d2", _dots1, _weight, ("Dots1TopkRouter.__call__", _SELECT), "gate", "", "experts", True, _shared
    ),
    ("deepseek", "DeepseekMoE"): Block(
        "6b314f4172f0", _softmax, _weight, ("MoEGate.__call__",), gate="gate", finish=_shared
    ),
    ("bailing_moe", "BailingMoeSparseMoeBlock"): Block(
        "455a774afeef",
        _bailing,
        _proj,
        ("BailingMoeGate.__call__", _SELECT, "aggregate_expert_outputs"),
        gate="gate",
        dtype="logits",
        cast=True,
        finish=_shared,
    ),
    ("bailing_moe_linear", "SparseMoeBlock"): Block(
        "72d67cb4cdb4", _bailing_linear, _proj, ("Gate.__call__", _SELECT), gate="gate", dtype="logits", finish=_shared
    ),
    ("step3p5", "Step3p5MoE"): Block(
        "e71f0ac5e43f",
        _step,
        _gate,
        ("Step3p5MoEGate.__call__", "moe_gate_select"),
        gate="gate",
        cast=True,
        finish=lambda block, x, y: y + block.share_expert(x),
    ),
}


def known(module: Any) -> tuple[Block | None, str]:
    """The entry for this block of a model, or why there is none."""
    kind: Any = type(module)
    block = BLOCKS.get((kind.__module__.rpartition(".")[2], kind.__qualname__))
    if block is None:
        return None, f"{kind.__name__} is none that is known"
    if digest(kind, block.uses) != block.digest:
        return None, f"{kind.__name__} is other code in this mlx_lm"
    gate = type(module[block.gate]) if block.gate else kind
    if block.gate and (gate.__module__, f"{gate.__qualname__}.__call__") != (kind.__module__, block.uses[0]):
        return None, f"its gate is a {gate.__name__}"
    return block, ""
