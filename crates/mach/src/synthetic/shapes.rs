//! Published shapes: the configurations that decide sizes and speed.

use mach_format::BlockFormat;
use serde_json::{Value, json};

/// Names of the shapes that [`Shape::named`](super::Shape::named) knows.
pub const SHAPES: [&str; 5] = ["qwen3.6-35b-a3b", "qwen3-30b-a3b", "gpt-oss-20b", "gemma-4-26b-a4b", "deepseek-v4-flash"];

/// The configuration of a published shape, and the format that its experts are published in where that is not affine.
pub(super) fn named(name: &str) -> Option<(Value, Option<BlockFormat>)> {
    Some(match name {
        "qwen3.6-35b-a3b" => (qwen3_6_35b_a3b(), None),
        "qwen3-30b-a3b" => (qwen3_30b_a3b(), None),
        "gpt-oss-20b" => (gpt_oss_20b(), Some(BlockFormat::Mxfp4)),
        "gemma-4-26b-a4b" => (gemma_4_26b_a4b(), None),
        "deepseek-v4-flash" => (deepseek_v4_flash(), Some(BlockFormat::Mxfp4)),
        _ => return None,
    })
}

fn qwen3_6_35b_a3b() -> Value {
    json!({
        "architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe", "tie_word_embeddings": false,
        "text_config": {
            "model_type": "qwen3_5_moe_text", "hidden_size": 2048, "num_hidden_layers": 40, "vocab_size": 248_320,
            "layer_types": (1..=40).map(|i| if i % 4 == 0 { "full_attention" } else { "linear_attention" }).collect::<Vec<_>>(),
            "full_attention_interval": 4, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256, "attn_output_gate": true,
            "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
            "linear_conv_kernel_dim": 4, "num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512, "rms_norm_eps": 1e-6, "hidden_act": "silu", "max_position_embeddings": 262_144,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_section": [11, 11, 10],
                "mrope_interleaved": true},
            "mamba_ssm_dtype": "float32", "attention_bias": false, "tie_word_embeddings": false,
        },
    })
}

fn qwen3_30b_a3b() -> Value {
    json!({
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "vocab_size": 151_936,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768, "norm_topk_prob": true, "decoder_sparse_step": 1, "mlp_only_layers": [], "intermediate_size": 5472,
        "rope_theta": 1e7, "rope_scaling": null, "max_position_embeddings": 262_144, "use_sliding_window": false, "sliding_window": null,
        "attention_bias": false, "tie_word_embeddings": false, "rms_norm_eps": 1e-6, "hidden_act": "silu",
    })
}

fn gpt_oss_20b() -> Value {
    json!({
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24,
        "vocab_size": 201_088, "num_local_experts": 32, "num_experts_per_tok": 4, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
        "layer_types": (0..24).map(|i| if i % 2 == 0 { "sliding_attention" } else { "full_attention" }).collect::<Vec<_>>(),
        "sliding_window": 128, "rope_theta": 150_000.0, "swiglu_limit": 7.0, "attention_bias": true, "hidden_act": "silu",
        "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 4096, "truncate": false},
        "initial_context_length": 4096, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "tie_word_embeddings": false,
    })
}

fn gemma_4_26b_a4b() -> Value {
    json!({
        "architectures": ["Gemma4ForConditionalGeneration"], "model_type": "gemma4", "tie_word_embeddings": true,
        "text_config": {
            "model_type": "gemma4_text", "hidden_size": 2816, "num_hidden_layers": 30, "vocab_size": 262_144, "intermediate_size": 2112,
            "layer_types": (1..=30).map(|i| if i % 6 == 0 { "full_attention" } else { "sliding_attention" }).collect::<Vec<_>>(),
            "enable_moe_block": true, "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704, "num_attention_heads": 16,
            "num_key_value_heads": 8, "head_dim": 256, "global_head_dim": 512, "num_global_key_value_heads": 2, "attention_k_eq_v": true,
            "sliding_window": 1024, "final_logit_softcapping": 30.0, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
            "rope_parameters": {
                "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            "hidden_activation": "gelu_pytorch_tanh", "attention_bias": false, "rms_norm_eps": 1e-6, "max_position_embeddings": 262_144,
            "tie_word_embeddings": true,
        },
    })
}

fn deepseek_v4_flash() -> Value {
    json!({
        "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", "hidden_size": 4096, "num_hidden_layers": 43, "vocab_size": 129_280,
        "num_attention_heads": 64, "num_key_value_heads": 1, "head_dim": 512, "q_lora_rank": 1024, "qk_rope_head_dim": 64, "o_groups": 8, "o_lora_rank": 1024,
        "compress_ratios": (0..43).map(|i| if i < 2 { 0 } else if i % 2 == 0 { 4 } else { 128 }).collect::<Vec<_>>(),
        "sliding_window": 128, "index_n_heads": 64, "index_head_dim": 128, "index_topk": 512, "rope_theta": 10_000.0, "compress_rope_theta": 160_000.0,
        "rope_scaling": {"rope_type": "yarn", "factor": 16.0, "beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 65_536},
        "hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "n_routed_experts": 256, "num_experts_per_tok": 6, "moe_intermediate_size": 2048,
        "n_shared_experts": 1, "num_hash_layers": 3, "scoring_func": "sqrtsoftplus", "topk_method": "noaux_tc", "norm_topk_prob": true,
        "routed_scaling_factor": 1.5, "swiglu_limit": 10.0, "rms_norm_eps": 1e-6, "max_position_embeddings": 1_048_576, "tie_word_embeddings": false,
        "hidden_act": "silu",
    })
}
