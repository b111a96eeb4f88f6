"""Tiny random models of mlx_lm's own architectures, float32."""

import importlib

import mlx.core as mx

BASE = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "vocab_size": 256,
    "rope_theta": 10000.0,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
CONFIGS = {
    "llama": {},
    "qwen3": {},
    "minimax": {
        "num_experts_per_tok": 2,
        "num_local_experts": 4,
        "shared_intermediate_size": 0,
        "rotary_dim": 32,
    },
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "rope_scaling": None,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "gemma3_text": {"sliding_window": 8, "sliding_window_pattern": 3, "query_pre_attn_scalar": 64},
    "mamba": {
        "hidden_size": 32,
        "intermediate_size": 32,
        "state_size": 8,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 4,
    },
    "deepseek_v3": {
        "moe_intermediate_size": 32,
        "kv_lora_rank": 64,
        "q_lora_rank": 32,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
        "n_routed_experts": None,
        "num_key_value_heads": 4,
        "rope_scaling": None,
    },
}


def tiny(model_type, **changes):
    """A model with seeded random weights; `changes` go over its config."""
    module = importlib.import_module(f"mlx_lm.models.{model_type}")
    mx.random.seed(3)
    model = module.Model(
        module.ModelArgs.from_dict({**BASE, "model_type": model_type, **CONFIGS[model_type], **changes})
    )
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return model
