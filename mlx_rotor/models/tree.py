"""Names that most of mlx_lm's language models share, as parameters of the tree; family files are made of these."""

from __future__ import annotations

from .architecture import Tensor

LAYER = "model.layers.{layer}."
ATTENTION, MLP = LAYER + "self_attn.", LAYER + "mlp."

ENDS = (
    Tensor("embed", "model.embed_tokens.weight"),
    Tensor("norm", "model.norm.weight"),
    Tensor("head", "lm_head.weight"),
    Tensor("bias", "model.norm.bias"),
    Tensor("bias", "lm_head.bias"),
)
NORMS = (
    Tensor("norm", LAYER + "*norm.weight"),
    Tensor("norm", ATTENTION + "*norm.weight"),
    Tensor("bias", LAYER + "*norm.bias"),
    Tensor("bias", ATTENTION + "*norm.bias"),
)
HEADS = (
    Tensor("attn.q", ATTENTION + "q_proj.weight"),
    Tensor("attn.k", ATTENTION + "k_proj.weight"),
    Tensor("attn.v", ATTENTION + "v_proj.weight"),
    Tensor("attn.qkv", ATTENTION + "qkv_proj.weight"),
    Tensor("attn.gate", ATTENTION + "g_proj.weight"),
    Tensor("attn.gate", ATTENTION + "gate_proj.weight"),
    Tensor("attn.o", ATTENTION + "o_proj.weight"),
    Tensor("bias", ATTENTION + "*_proj.bias"),
)
# Multi-head latent attention: queries and key-values through a low rank.
LATENT = (
    Tensor("attn.q_a", ATTENTION + "q_a_proj.weight"),
    Tensor("attn.q_b", ATTENTION + "q_b_proj.weight"),
    Tensor("attn.kv_a", ATTENTION + "kv_a_proj_with_mqa.weight"),
    Tensor("attn.kv_b", ATTENTION + "kv_b_proj.weight"),
    Tensor("attn.kv_b", ATTENTION + "embed_q.weight"),
    Tensor("attn.kv_b", ATTENTION + "unembed_out.weight"),
    Tensor("bias", ATTENTION + "kv_a_proj_with_mqa.bias"),
)
DENSE = (
    Tensor("mlp.gate", MLP + "gate_proj.weight"),
    Tensor("mlp.up", MLP + "up_proj.weight"),
    Tensor("mlp.gate_up", MLP + "gate_up_proj.weight"),
    Tensor("mlp.down", MLP + "down_proj.weight"),
    Tensor("bias", MLP + "*_proj.bias"),
)
TRANSFORMER = ENDS + NORMS + HEADS + DENSE

# What checkpoints hold and mlx_lm makes no use of: rotation frequencies, a head where the embeddings serve as one,
# and what predicts several tokens ahead.
UNUSED = ("**.rotary_emb.inv_freq", "lm_head.weight", "mtp.**", "model.mtp.**", "model.mtp_layers.**")


def shared(at: str) -> tuple[Tensor, ...]:
    """The projections of shared experts under the path `at`."""
    return tuple(Tensor(f"shared.{what}", f"{at}.{what}_proj.weight") for what in ("gate", "up", "down"))


def experts(
    at: str, source: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> tuple[Tensor, ...]:
    """The stacks of routed experts under the path `at`; `source` is an expert's path, `names` its projections there."""
    return tuple(
        Tensor(f"expert.{what}", f"{at}.{what}_proj.weight", (f"{source}.{name}.weight",))
        for what, name in zip(("gate", "up", "down"), names, strict=True)
    )
