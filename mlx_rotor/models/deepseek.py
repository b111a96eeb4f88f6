"""DeepSeek's and GLM's mixtures of experts and those with their names: latent attention, routed and shared experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .architecture import Architecture, Fused, Tensor
from .qwen_moe import softmax
from .router import SELECT, Block, Choice, Routing, add_shared, gate_weight
from .tree import ATTENTION, LATENT, MLP, TRANSFORMER, UNUSED, experts, shared

INDEX = ATTENTION + "indexer."

ARCHITECTURE = Architecture(
    model_types=(
        *("deepseek", "deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "joyai_llm_flash"),
        *("glm4_moe", "glm4_moe_lite", "glm_moe_dsa"),
        *("dots1", "exaone_moe", "mimo_v2_flash", "minicpm3", "solar_open", "youtu_llm"),
    ),
    tensors=(
        *LATENT,
        *TRANSFORMER,
        Tensor("attn.index", INDEX + "wq_b.weight"),
        Tensor("attn.index", INDEX + "wk.weight"),
        Tensor("attn.index", INDEX + "weights_proj.weight"),
        Tensor("norm", INDEX + "k_norm.weight"),
        Tensor("bias", INDEX + "k_norm.bias"),
        Tensor("router", MLP + "gate.weight"),
        Tensor(
            "router.bias",
            MLP + "gate.e_score_correction_bias",
            (MLP + "gate.e_score_correction_bias", MLP + "e_score_correction_bias"),
            dtype="F32",
        ),
        Tensor("attn.sinks", ATTENTION + "attention_sink_bias"),
        *shared(MLP + "shared_experts"),
        *experts(MLP + "switch_mlp", MLP + "experts.{expert}"),
        *experts(MLP + "experts", MLP + "experts.{expert}"),
    ),
    fused=(
        Fused(
            ATTENTION + "kv_b_proj.weight",
            (ATTENTION + "embed_q.weight", ATTENTION + "unembed_out.weight"),
            turned=(ATTENTION + "embed_q.weight",),
            flat=True,
        ),
    ),
    # Layers after the last predict several tokens ahead; mlx_lm has no use for them.
    drop=(*UNUSED, "model.layers.{beyond}.**"),
)


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
    """As `_grouped`; the sum that weights are divided by can't be 0."""
    found = _grouped(gate)
    return replace(found, how=replace(found.how, epsilon=1e-20))


def _dots1(gate: Any) -> Choice:
    found = _grouped(gate)
    return found if gate.n_group != gate.topk_group else replace(found, how=replace(found.how, groups=1))


_GATE: dict[str, Any] = {"uses": ("MoEGate.__call__", SELECT), "gate": "gate", "cast": True, "finish": add_shared}

ROUTERS = (
    Block("deepseek_v3.DeepseekV3MoE", "dc58138f27e9", _grouped, gate_weight, **_GATE),
    Block("deepseek_v32.DeepseekV32MoE", "dc58138f27e9", _grouped, gate_weight, **_GATE),
    Block("glm4_moe.MoE", "dc58138f27e9", _grouped, gate_weight, **_GATE),
    Block("glm4_moe_lite.Glm4MoeLiteMoE", "2c6c00d32f26", _grouped_safely, gate_weight, **_GATE),
    Block("exaone_moe.MoE", "da33a7bd9004", _grouped_safely, gate_weight, **_GATE),
    Block("mimo_v2_flash.MoE", "b1c4adc04b6e", _grouped_safely, gate_weight, **_GATE),
    Block(
        "dots1.Dots1MoE",
        "45eb9b2348d2",
        _dots1,
        gate_weight,
        ("Dots1TopkRouter.__call__", SELECT),
        gate="gate",
        experts="experts",
        cast=True,
        finish=add_shared,
    ),
    Block(
        "deepseek.DeepseekMoE",
        "6b314f4172f0",
        softmax,
        gate_weight,
        ("MoEGate.__call__",),
        gate="gate",
        finish=add_shared,
    ),
)
