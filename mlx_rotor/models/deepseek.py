"""DeepSeek's and GLM's mixtures of experts and those with their names: latent attention, routed and shared experts."""

from __future__ import annotations

from .architecture import Architecture, Fused, Tensor
from .tree import ATTENTION, LATENT, MLP, TRANSFORMER, UNUSED, experts, shared

INDEX = ATTENTION + "indexer."

ARCHITECTURE = Architecture(
    model_types=(
        *("deepseek", "deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "joyai_llm_flash"),
        *("glm4_moe", "glm4_moe_lite", "glm_moe_dsa"),
        *("dots1", "ernie4_5_moe", "exaone_moe", "mimo_v2_flash", "minicpm3", "solar_open", "youtu_llm"),
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
    drop=(
        *(*UNUSED, "model.layers.{beyond}.**"),
        *("model.mtp_*.**", MLP + "moe_statics.e_score_correction_bias"),  # of ernie4_5_moe
    ),
)
