"""Dimensions of a tiny model of every architecture in mlx_lm: `BASE` for all, `CONFIGS` what one needs beyond it."""

WINDOW = 8
LAYERS = 3


def _each(names, value):
    return dict.fromkeys(names.split(), value)


BASE = {
    **_each("hidden_size hidden_dim n_embd d_model model_dim dim_model_base", 64),
    **_each("intermediate_size moe_intermediate_size shared_expert_intermediate_size n_inner mlp_hidden_size", 32),
    **_each("ffn_hidden_size expert_ffn_hidden_size kv_lora_rank moe_hidden_size intermediate_size_mlp", 32),
    **_each("num_hidden_layers num_layers n_layers n_layer num_transformer_layers", LAYERS),
    **_each("num_attention_heads num_heads n_heads n_head", 4),
    **_each("num_key_value_heads num_kv_heads n_kv_heads num_attention_groups", 2),
    **_each("head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim kv_channels q_lora_rank", 16),
    **_each("rms_norm_eps layer_norm_eps norm_eps layer_norm_epsilon layernorm_epsilon post_norm_eps", 1e-5),
    **_each("max_position_embeddings n_positions n_ctx block_size model_max_length", 256),
    **_each("attention_bias mlp_bias use_bias use_qkv_bias conv_bias tie_word_embeddings", False),
    **_each("num_experts num_local_experts n_routed_experts moe_num_experts", 4),
    **_each("num_experts_per_tok moe_topk moe_top_k num_experts_per_token moe_k", 2),
    **_each("n_shared_experts num_shared_experts num_shared_expert n_group topk_group moe_layer_freq", 1),
    **_each("first_k_dense_replace decoder_sparse_step routed_scaling_factor", 1),
    **_each("norm_topk_prob use_qk_norm qk_norm mla_scale_q_lora mla_scale_kv_lora", True),
    **_each("sliding_window sliding_window_size window_size attention_window_size", WINDOW),
    **_each("conv_L_cache conv1d_width linear_conv_kernel_dim mamba_d_conv conv_kernel short_conv_kernel_size", 3),
    **_each("linear_num_value_heads linear_num_key_heads", 2),
    **_each("linear_key_head_dim linear_value_head_dim index_head_dim", 32),
    **_each("logits_scaling embedding_multiplier residual_multiplier scale_depth scale_emb", 1.0),
    **_each("vocab_size vocab_size_per_layer_input embedding_size num_vocab", 64),
    **_each("rope_theta rope_local_base_freq swa_rope_theta", 10000.0),
    "rope_scaling": None,
    "partial_rotary_factor": 0.5,
    "index_n_heads": 4,
    "index_topk": 64,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "mlp_only_layers": [],
    "attention_multiplier": 0.25,
    "layer_group_size": 2,
    "group_norm_size": 1,
    "sliding_window_pattern": 3,
}
SLIDING = ["sliding_attention", "sliding_attention", "full_attention"]
ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
TEMPERATURE = {**ROPE, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 16}
YARN = {
    "type": "yarn",
    "factor": 4,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_position_embeddings": 64,
}
KDA = {"num_heads": 2, "head_dim": 32, "short_conv_kernel_size": 3, "kda_layers": [1, 2], "full_attn_layers": [3]}
MAMBA = {
    **_each("mamba_n_heads mamba_num_heads mamba_d_head mamba_head_dim", 8),
    **_each("mamba_d_state ssm_state_size state_size time_step_rank", 8),
    **_each("mamba_n_groups n_groups", 1),
    **_each("mamba_conv_bias use_conv_bias", True),
    "mamba_d_ssm": 64,
    "mamba_proj_bias": False,
    "mamba_expand": 2,
    "time_step_limit": [0.001, 100.0],
}
MLA_HEADS = {"num_key_value_heads": 4}

CONFIGS = {
    "afm7": {"num_kv_reuse_layers": 1},
    "afmoe": {"layer_types": SLIDING},
    "apertus": {"post_norm": False},
    "baichuan_m1": {"sliding_window_layers": [0, 1], "conv_window": 2},
    "bailing_hybrid": MLA_HEADS,
    "bailing_moe_v3": {**MLA_HEADS, "head_dim": 32},
    "cohere2": {"head_dim": 16},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {**MLA_HEADS, "rope_scaling": YARN},
    "exaone4": {"sliding_window_pattern": "LLG"},
    "exaone_moe": {"layer_types": SLIDING, "is_moe_layer": [False, True, True]},
    "falcon_h1": MAMBA,
    "gear": {"layer_types": SLIDING},
    "gemma3n": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.5] * 4,
        "final_logit_softcapping": 30.0,
        "hidden_size_per_layer_input": 8,
        "altup_num_inputs": 2,
        "altup_coef_clip": 1.0,
        "altup_correct_scale": True,
        "altup_active_idx": 0,
        "laurel_rank": 8,
    },
    "gemma4_text": {
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 3,
        "global_head_dim": 32,
        "hidden_size_per_layer_input": 8,
    },
    "glm_moe_dsa": {**MLA_HEADS, "rope_parameters": ROPE},
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.5},
    "gpt_oss": {"layer_types": SLIDING},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {**MAMBA, "layer_types": ["mamba", "mamba", "attention"], "shared_intermediate_size": 32},
    "hunyuan": {
        "rope_scaling": {"alpha": 1000.0, "type": "dynamic", "factor": 1.0},
        "use_mixed_mlp_moe": True,
        "use_cla": True,
        "cla_share_factor": 2,
    },
    "jamba": {
        **MAMBA,
        **_each("attn_layer_offset expert_layer_offset", 1),
        **_each("attn_layer_period expert_layer_period", 2),
    },
    "kimi_k3": {
        "linear_attn_config": {**KDA, "use_full_rank_gate": True},
        "hidden_act": "situ",
        "activation_situ_beta": 2.0,
        "attn_res_block_size": 2,
    },
    "kimi_linear": {"linear_attn_config": KDA},
    "laguna": {"layer_types": SLIDING},
    "lfm2": {
        "block_dim": 64,
        "block_multiple_of": 16,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "block_ff_dim": 32,
        "full_attn_idxs": [1, 2],
    },
    "lfm2_moe": {"use_expert_bias": True, "num_dense_layers": 1, "full_attn_idxs": [1, 2]},
    "llama": {"layer_types": SLIDING},
    "llama4": {
        "attention_chunk_size": 8,
        "interleave_moe_layer_step": 2,
        "num_hidden_layers": 4,
        "num_experts_per_tok": 1,
    },
    "llama4_text": {"no_rope_layers": [1, 1, 0]},
    "longcat_flash": {"attention_method": "MLA", "zero_expert_type": "identity", "zero_expert_num": 1},
    "longcat_flash_ngram": {
        "zero_expert_num": 1,
        "ngram_vocab_size_ratio": 2,
        "emb_neighbor_num": 2,
        "emb_split_num": 2,
    },
    "mamba": MAMBA,
    "mamba2": {**MAMBA, "num_heads": 8},
    "mellum": {"layer_types": SLIDING, "rope_parameters": dict.fromkeys(SLIDING, ROPE)},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [1, 1, 0],
        "moe_layer_freq": [0, 1, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "swa_v_head_dim": 8,
        "v_head_dim": 8,
    },
    "minicpm3": {**MLA_HEADS, "rope_scaling": {"original_max_position_embeddings": 64}},
    "minimax": {"shared_intermediate_size": 0, "rotary_dim": 8},
    "minimax_m3_vl": {
        "layer_types": ["full_attention", "sparse", "sparse"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "index_block_size": 4,
        "index_topk_blocks": 2,
        "index_n_heads": 2,
        "index_head_dim": 8,
        **_each("dense_intermediate_size shared_intermediate_size", 32),
        "rotary_dim": 8,
    },
    "ministral3": {"layer_types": SLIDING, "rope_parameters": TEMPERATURE},
    "mistral4": {**MLA_HEADS, "rope_parameters": TEMPERATURE},
    "muse_glimmer": {"layer_types": SLIDING},
    "muse_spark": {
        "layer_types": SLIDING,
        "layer_rope_theta": [10000.0, 10000.0, 0],
        "rope_parameters": ROPE,
        "final_logit_softcapping": 20.0,
        "output_multiplier": 0.2,
        "num_shared_experts": 0,
    },
    "nanochat": {"num_key_value_heads": 4},
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 0.5}},
            {"attention": {"no_op": True}, "ffn": {"ffn_mult": 0.5}},
            {"attention": {"n_heads_in_group": 4}, "ffn": {"no_op": True}},
        ]
    },
    "nemotron_h": {**MAMBA, "hybrid_override_pattern": ["M", "*", "-", "*"], "num_hidden_layers": 4},
    "olmo": {"mlp_hidden_size": 64},
    "olmo3": {"layer_types": SLIDING},
    "olmo_hybrid": {
        "linear_allow_neg_eigval": True,
        "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    },
    "openelm": {
        "ffn_dim_divisor": 16,
        "num_query_heads": [4, 4, 4],
        "num_kv_heads": [2, 2, 4],
        "ffn_multipliers": [1.0, 1.0, 1.0],
    },
    "phi": {"num_key_value_heads": 4},
    "phi3small": {
        "dense_attention_every_n_layers": 2,
        "ff_intermediate_size": 32,
        "gegelu_limit": 20.0,
        "blocksparse_num_local_blocks": 1,
        "blocksparse_vert_stride": 2,
    },
    "phixtral": {"rotary_dim": 8},
    "plamo": {"n_shared_head": 2},
    "plamo2": MAMBA,
    "plamo3": {"sliding_window_pattern": 3},
    "prism_hadamard_qwen35": {
        "schema_version": 1,
        "tensor_namespace": "mlx-lm-text",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [{"path": "lm_head", "embedding": False, "dtype": "float16", "block": 0}],
    },
    "qwen3_5": {"full_attention_interval": 3, "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}},
    "qwen3_next": {"full_attention_interval": 3},
    "recurrent_gemma": {"logits_soft_cap": 30.0, "block_types": ["recurrent", "recurrent", "attention"]},
    "rwkv7": _each("a_low_rank_dim v_low_rank_dim gate_low_rank_dim decay_low_rank_dim", 8),
    "spark2_5": {"layer_types": SLIDING, "rope_parameters": dict.fromkeys(SLIDING, ROPE)},
    "stablelm": {},
    "step3p5": {"layer_types": SLIDING, "share_expert_dim": 32, "moe_layers_enum": "1,2"},
    "youtu_llm": MLA_HEADS,
}
# Configs that wrap a language model's, with that model's type.
WRAPPED = {
    "gemma3": "gemma3_text",
    "gemma3n": "gemma3n",
    "gemma4": "gemma4_text",
    "kimi_k25": "deepseek_v3",
    "kimi_k3": "kimi_k3",
    "kimi_vl": "deepseek_v3",
    "lfm2-vl": "lfm2",
    "llama4": "llama4",
    "minimax_m3_vl": "minimax_m3_vl",
    "mistral3": "ministral3",
    "muse_spark": "muse_spark",
    "pixtral": "llama",
    "prism_hadamard_qwen35": "qwen3_5",
    "qwen2_vl": "qwen2",
    "qwen3_5": "qwen3_5",
    "qwen3_5_moe": "qwen3_5",
    "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
}


def config(model_type):
    """The config.json of a tiny `model_type`."""
    inner = WRAPPED.get(model_type, model_type)
    out = {**BASE, "model_type": inner, **CONFIGS.get(inner, {})}
    if model_type == "prism_hadamard_qwen35":  # packs 128 columns at a time
        out["hidden_size"] = 128
    if model_type not in WRAPPED:
        return out
    return {**BASE, "text_config": out, "model_type": model_type, **CONFIGS.get(model_type, {})}
