"""Small configurations of every causal class, made for tests: by their own table, not by the library's clones."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

CONTEXT = 64
_SMALL: dict[str, Any] = {
    # widths
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "emb_dim": 32, "embedding_dim": 32, "embedding_size": 32,
    "embed_dim": 32, "input_embedding_size": 32, "output_embedding_size": 32, "word_embed_proj_dim": 32,
    "intermediate_size": 48, "ffn_dim": 48, "ffn_hidden_size": 48, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48,
    "n_inner": 48, "dff": 48, "dim_ff": 48, "d_inner": 48, "d_ff": 48, "feed_forward_size": 48, "mlp_dim": 48,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "shared_intermediate_size": 16,
    "shared_experts_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16, "dense_intermediate_size": 48,
    "expert_ffn_hidden_size": 16, "intermediate_size_mlp": 48, "hidden_size_per_layer_input": 8,
    "backbone_hidden_size": 32, "attention_hidden_size": 32, "router_hidden_size": 16, "lru_width": 32,
    "hidden_size_global": 32, "out_hidden_size": 32, "projector_input_dim": 32, "projector_output_dim": 32,
    # heads
    "num_attention_heads": 4, "decoder_attention_heads": 4, "encoder_attention_heads": 4, "attention_heads": 4,
    "n_head": 4, "n_heads": 4, "num_heads": 4, "swa_num_attention_heads": 4, "num_decoder_attention_heads": 4,
    "num_encoder_attention_heads": 4, "conf_num_attention_heads": 4,
    "num_key_value_heads": 2, "num_kv_heads": 2, "kv_n_heads": 2, "swa_num_key_value_heads": 2, "num_query_groups": 4,
    "head_dim": 8, "dim_head": 8, "swa_head_dim": 8, "kv_channels": 8, "attention_head_size": 8, "d_head": 8,
    "attention_head_dim": 8, "d_kv": 8, "rotary_dim": 4,
    "q_lora_rank": 12, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "qk_head_dim": 16,
    "v_head_dim": 8, "index_n_heads": 16, "index_head_dim": 16, "o_groups": 2, "o_lora_rank": 8, "d_rel": 4,
    # layers
    "num_layers": 2, "n_layer": 2, "n_layers": 2, "decoder_layers": 2, "encoder_layers": 1, "num_blocks": 2,
    "num_decoder_layers": 2, "num_encoder_layers": 1, "num_layers_per_stack": 1, "depth": 1, "num_global_layers": 1,
    "conf_num_hidden_layers": 1, "num_residual_layers": 1, "num_lstm_layers": 1,
    # experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "zero_expert_num": 2,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2, "moe_top_k": 2, "n_group": 2,
    "topk_group": 1, "num_expert_group": 2, "first_k_dense_replace": 1, "num_dense_layers": 1,
    # states
    "mamba_d_state": 4, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_chunk_size": 8, "mamba_d_ssm": 64,
    "state_size": 4, "time_step_rank": 4, "ssm_state_size": 4, "mamba_num_heads": 4, "mamba_head_dim": 16,
    "mamba_dt_rank": 4, "mamba_headdim": 16, "n_mamba_heads": 4, "n_groups": 2, "chunk_size": 8, "adapter_rank": 4,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_heads": 4, "linear_head_dim": 8, "laurel_rank": 8, "hc_lowrank": 8, "block_multiple_of": 8,
    # lengths: shorter than the rows that are compared, so that each is felt
    "sliding_window": 6, "sliding_window_size": 6, "attention_window_size": 6, "attention_chunk_size": 6,
    "window_size": 6, "local_attention": 12, "keep_window_size": 6, "index_topk": 6, "rel_extent": 6,
    "local_attention_window_len": 6, "block_size": 8, "index_block_size": 4, "index_topk_blocks": 2, "floor_scale": 4,
    "log_scaling_n_floor": 4, "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4,
    "max_position_embeddings": CONTEXT, "n_positions": CONTEXT, "n_ctx": CONTEXT, "max_seq_len": CONTEXT,
    "model_max_length": CONTEXT, "max_target_positions": CONTEXT, "max_source_positions": 16, "context_length": CONTEXT,
    "seq_length": CONTEXT,
    # towers
    "image_size": 16, "patch_size": 4, "num_mel_bins": 8, "adapter_in_dim": 32, "adapter_out_dim": 32,
    "adapter_input_size": 32, "downsample_hidden_size": 16, "num_position_embeddings": 16, "base_channels": 8,
    "vision_output_dim": 32, "codebook_size": 16, "codebook_dim": 16, "num_filters": 4, "upsample_groups": 8,
    "vector_quantization_hidden_dimension": 16, "vocab_size_per_layer_input": 0, "encoder_hash_byte_group_vocab": 50,
    "pronunciation_embed_dim": 16, "pronunciation_vocab_size": 20, "shape_embed_dim": 16, "shape_vocab_size": 20,
    "ple_embed_dim": 16, "ngram_vocab_size_base": 64, "split_ngram_parts": 4, "prompt_length": 4, "prompt_mid_dim": 16,
    "position_bias_num_buckets": 32, "position_bias_max_distance": 64, "num_centroids": 8,
}  # fmt: skip
_GEMMA_4 = {
    "head_dim": 8, "global_head_dim": 16, "num_hidden_layers": 4, "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
_GEMMA_3N = {
    "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
    "intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
}  # fmt: skip
_DOTS_3 = {
    "layer_types": ["indexed_attention", "sliding_attention"], "mlp_layer_types": ["dense", "sparse"],
    "num_hidden_layers": 2, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 12,
    "swa_kv_lora_rank": 8, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8,
}  # fmt: skip
_QWEN_4 = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}  # fmt: skip
OVERRIDES: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")
        },
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots3_note": {"text_config": _DOTS_3},
    "dots3_note_text": _DOTS_3,
    "minimax_m3_vl_text": {"index_n_heads": 2},  # one per group of keys
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "qwen4_exp": {"text_config": _QWEN_4},
    "qwen4_exp_text": _QWEN_4,
    "dots1": {"first_k_dense_replace": 1, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n": {"text_config": _GEMMA_3N},
    "gemma3n_text": _GEMMA_3N,
    "gemma4": {"text_config": _GEMMA_4},
    "gemma4_text": _GEMMA_4,
    "gemma4_assistant": {"text_config": _GEMMA_4 | {"hidden_size_per_layer_input": 0}},
    "gemma4_unified": {"text_config": _GEMMA_4},
    "gemma4_unified_text": _GEMMA_4,
    "gemma4_unified_assistant": {"text_config": _GEMMA_4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {
        "is_decoder": True, "attn_layers": ["local", "lsh"], "axial_pos_shape": (8, 8), "axial_pos_embds_dim": (16, 16),
        "num_buckets": 4,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_head_dim": 16,
        "attention_hidden_size": 64,
    },
    "zamba2": {
        "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "hybrid_layer_ids": [1, 3],
        "attention_head_dim": 16, "attention_hidden_size": 64, "mamba_ngroups": 1, "n_mamba_heads": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
for _kind in ("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
              "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl",
              "xmod"):  # fmt: skip
    OVERRIDES.setdefault(_kind, {})["is_decoder"] = True  # else they see both ways, and are refused for it
_VOCABULARIES = ("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size", "unpadded_vocab_size")
_LISTS = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types")


def small_config(kind: str, vocabulary: int) -> PreTrainedConfig:
    """A configuration of type `kind` whose model is tiny, with `vocabulary` rows. Raises whatever the class raises."""
    return _shrunk(_default(kind), vocabulary, OVERRIDES.get(kind, {}))


def _default(kind: str) -> PreTrainedConfig:
    config: PreTrainedConfig = CONFIG_MAPPING[kind](**DEFAULTS.get(kind, {}))
    return config


DEFAULTS: dict[str, dict[str, Any]] = {"gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}}}
"""What a class needs to have a default configuration at all."""


def _shrunk(config: PreTrainedConfig, vocabulary: int, own: dict[str, Any]) -> PreTrainedConfig:
    fields = {name: value for name, value in vars(config).items() if _is_number(value) and _settable(config, name)}
    small: dict[str, Any] = {name: _SMALL[name] for name in fields if name in _SMALL}
    small |= {name: vocabulary for name in _VOCABULARIES if name in fields}
    small |= {name: 3 for name in fields if name.endswith(("_token_id", "_token_index"))}
    small |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    if "kv_lora_rank" in fields:
        small["num_key_value_heads"] = 4  # a latent has keys for every head
    small |= _layers(config)
    for name in type(config).sub_configs:
        if isinstance(sub := getattr(config, name, None), PreTrainedConfig):
            small[name] = _shrunk(sub, vocabulary, own.get(name, {}))
    return type(config)(**small | {n: v for n, v in own.items() if n not in type(config).sub_configs})


def _layers(config: PreTrainedConfig) -> dict[str, Any]:
    """Two layers, or as many as have every kind that the configuration's lists name."""
    many = vars(config).get("num_hidden_layers")
    if not _is_number(many):
        return {}
    lists = {n: v for n in _LISTS if isinstance(v := vars(config).get(n), list) and len(v) == many}
    count = max(2, *(max(kinds.index(kind) + 1 for kind in kinds) for kinds in lists.values()), 2)
    lists = {name: value for name, value in lists.items() if name in vars(config)}
    return {"num_hidden_layers": count} | {name: value[:count] for name, value in lists.items()}


def _settable(config: PreTrainedConfig, name: str) -> bool:
    attribute = getattr(type(config), name, None)
    return not (isinstance(attribute, property) and attribute.fset is None)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
