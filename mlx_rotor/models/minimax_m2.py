"""MiniMax-M2 (M2, M2.1, M2.5, M2.7): grouped-query attention, flat QK norms, sigmoid-routed experts, none shared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import RotorError
from .architecture import Architecture, Tensor, size


def dims(config: Mapping[str, Any]) -> dict[str, int]:
    """Dimension name -> size, from config.json of a MiniMaxM2ForCausalLM; RotorError on a variant this is not."""
    if config.get("shared_intermediate_size"):
        raise RotorError("config.json: shared experts (shared_intermediate_size > 0) are not part of MiniMax-M2")
    hidden, heads = size(config, "hidden_size"), size(config, "num_attention_heads")
    head_dim = size(config, "head_dim") if config.get("head_dim") is not None else hidden // heads
    return {
        "layers": size(config, "num_hidden_layers"),
        "experts": size(config, "num_local_experts"),
        "hidden": hidden,
        "inter": size(config, "intermediate_size"),
        "q": heads * head_dim,
        "kv": size(config, "num_key_value_heads") * head_dim,
        "vocab": size(config, "vocab_size"),
        "qk_norm": int(config.get("use_qk_norm", True)),
        "untied": int(not config.get("tie_word_embeddings", False)),
    }


_LAYER = "model.layers.{layer}."
_ATTN, _MOE = _LAYER + "self_attn.", _LAYER + "block_sparse_moe."
_EXPERT = _MOE + "experts.{expert}."

ARCHITECTURE = Architecture(
    model_types=("minimax_m2", "minimax"),
    dims=dims,
    tensors=(
        Tensor("embed", "model.embed_tokens.weight", ("vocab", "hidden")),
        Tensor("norm", _LAYER + "input_layernorm.weight", ("hidden",)),
        Tensor("attn.q", _ATTN + "q_proj.weight", ("q", "hidden")),
        Tensor("attn.k", _ATTN + "k_proj.weight", ("kv", "hidden")),
        Tensor("attn.v", _ATTN + "v_proj.weight", ("kv", "hidden")),
        Tensor("attn.o", _ATTN + "o_proj.weight", ("hidden", "q")),
        Tensor("norm", _ATTN + "q_norm.weight", ("q",), when="qk_norm"),
        Tensor("norm", _ATTN + "k_norm.weight", ("kv",), when="qk_norm"),
        Tensor("norm", _LAYER + "post_attention_layernorm.weight", ("hidden",)),
        Tensor("router", _MOE + "gate.weight", ("experts", "hidden")),
        Tensor("router.bias", _MOE + "e_score_correction_bias", ("experts",), dtype="F32"),
        Tensor(
            "expert.gate",
            _MOE + "switch_mlp.gate_proj.weight",
            ("experts", "inter", "hidden"),
            source=_EXPERT + "w1.weight",
        ),
        Tensor(
            "expert.up",
            _MOE + "switch_mlp.up_proj.weight",
            ("experts", "inter", "hidden"),
            source=_EXPERT + "w3.weight",
        ),
        Tensor(
            "expert.down",
            _MOE + "switch_mlp.down_proj.weight",
            ("experts", "hidden", "inter"),
            source=_EXPERT + "w2.weight",
        ),
        Tensor("norm", "model.norm.weight", ("hidden",)),
        Tensor("head", "lm_head.weight", ("vocab", "hidden"), when="untied"),
    ),
)
