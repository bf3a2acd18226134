//! Qwen3-MoE: attention with per-head q/k norm in every layer, experts or a dense block.

use mach_backend::{Activation, AttentionSpec, RouterSpec};
use serde_json::{Map, Value, json};

use crate::ModelError;
use crate::config::{Fields, rope};
use crate::gguf::{GgufArch, GgufNames, Meta};
use crate::registry::MoeArchAdapter;
use crate::spec::{AttentionBlock, FfnSpec, LayerSpec, MixerSpec, ModelSpec, MoeSpec, RopeTable};
use crate::tensors::QWEN;

/// The family.
pub static ADAPTER: MoeArchAdapter = MoeArchAdapter {
    model_type: "qwen3_moe",
    aliases: &[],
    reference: "Qwen/Qwen3-Coder-30B-A3B-Instruct",
    activation: "swiglu",
    stacked: false,
    expert_bias: false,
    wrapped: false,
    bits: 4,
    group_size: 64,
    layouts: &["per-expert", "fused", "mlx-switch"],
    notes: "softmax router, norm_topk_prob as the config says (absent: false), dense layers by mlp_only_layers and decoder_sparse_step",
    one_plus_norm: false,
    streams_checkpoint: true,
    names: &QWEN,
    gguf: &GgufArch { name: "qwen3moe", names: &GGUF_NAMES, config: config_of },
    parse,
};

/// Names in GGUF files that both families have.
pub(super) static GGUF_MODEL: &[(&str, &str)] =
    &[("token_embd.weight", "model.embed_tokens.weight"), ("output_norm.weight", "model.norm.weight"), ("output.weight", "lm_head.weight")];
pub(super) static GGUF_LAYER: &[(&str, &str)] = &[
    ("attn_norm.weight", "input_layernorm.weight"),
    ("attn_q.weight", "self_attn.q_proj.weight"),
    ("attn_k.weight", "self_attn.k_proj.weight"),
    ("attn_v.weight", "self_attn.v_proj.weight"),
    ("attn_output.weight", "self_attn.o_proj.weight"),
    ("attn_q_norm.weight", "self_attn.q_norm.weight"),
    ("attn_k_norm.weight", "self_attn.k_norm.weight"),
    ("attn_qkv.weight", "linear_attn.in_proj_qkv.weight"),
    ("attn_gate.weight", "linear_attn.in_proj_z.weight"),
    ("ssm_beta.weight", "linear_attn.in_proj_b.weight"),
    ("ssm_alpha.weight", "linear_attn.in_proj_a.weight"),
    ("ssm_conv1d.weight", "linear_attn.conv1d.weight"),
    ("ssm_a", "linear_attn.neg_exp_A"),
    ("ssm_dt.bias", "linear_attn.dt_bias"),
    ("ssm_norm.weight", "linear_attn.norm.weight"),
    ("ssm_out.weight", "linear_attn.out_proj.weight"),
    ("ffn_gate_inp.weight", "mlp.gate.weight"),
    ("ffn_gate_up_exps.weight", "mlp.experts.gate_up_proj.weight"),
    ("ffn_gate_exps.weight", "mlp.switch_mlp.gate_proj.weight"),
    ("ffn_up_exps.weight", "mlp.switch_mlp.up_proj.weight"),
    ("ffn_down_exps.weight", "mlp.switch_mlp.down_proj.weight"),
    ("ffn_gate_inp_shexp.weight", "mlp.shared_expert_gate.weight"),
    ("ffn_gate_shexp.weight", "mlp.shared_expert.gate_proj.weight"),
    ("ffn_up_shexp.weight", "mlp.shared_expert.up_proj.weight"),
    ("ffn_down_shexp.weight", "mlp.shared_expert.down_proj.weight"),
    ("ffn_gate.weight", "mlp.gate_proj.weight"),
    ("ffn_up.weight", "mlp.up_proj.weight"),
    ("ffn_down.weight", "mlp.down_proj.weight"),
];

static GGUF_NAMES: GgufNames =
    GgufNames { model: GGUF_MODEL, layers: "model.layers.", layer: &[GGUF_LAYER, &[("ffn_norm.weight", "post_attention_layernorm.weight")]], draft: "mtp." };

fn config_of(m: &Meta<'_>) -> Result<Map<String, Value>, ModelError> {
    let mut config = qwen_config(m, "qwen3_moe")?;
    // ggml always divides by the sum of the chosen weights.
    config.insert("norm_topk_prob".to_owned(), json!(true));
    config.insert("intermediate_size".to_owned(), json!(m.size_or("feed_forward_length", 0)?));
    Ok(config)
}

/// What the metadata of both families have in common, in the words of a `config.json`.
pub(super) fn qwen_config(m: &Meta<'_>, model_type: &str) -> Result<Map<String, Value>, ModelError> {
    let (hidden, heads) = (m.size("embedding_length")?, m.size("attention.head_count")?);
    let head_dim = m.size_or("attention.key_length", hidden / heads)?;
    for (key, only) in [("attention.value_length", head_dim), ("expert_gating_func", 1), ("expert_weights_norm", 1), ("expert_weights_scale", 1)] {
        m.only(key, only)?;
    }
    // How many shared experts there are: their width counts.
    m.skip("expert_shared_count");
    m.skip("expert_group_count");
    m.skip("expert_group_used_count");
    let rotary = m.size_or("rope.dimension_count", head_dim)?;
    let mut rope = json!({ "rope_theta": m.number_or("rope.freq_base", 10_000.0)?, "partial_rotary_factor": rotary as f64 / head_dim as f64 });
    if let Some(kind) = m.text("rope.scaling.type")?.filter(|kind| *kind != "none") {
        rope["rope_type"] = json!(kind);
        rope["factor"] = json!(m.number_or("rope.scaling.factor", 1.0)?);
    }
    let config = json!({
        "model_type": model_type, "vocab_size": m.vocab(), "tie_word_embeddings": m.tied(), "hidden_size": hidden, "num_hidden_layers": m.layers()?,
        "num_attention_heads": heads, "num_key_value_heads": m.size_or("attention.head_count_kv", heads)?, "head_dim": head_dim,
        "rms_norm_eps": m.number_or("attention.layer_norm_rms_epsilon", 1e-6)?, "rope_parameters": rope,
        "max_position_embeddings": m.size_or("context_length", 32_768)?, "num_experts": m.size("expert_count")?,
        "num_experts_per_tok": m.size("expert_used_count")?, "moe_intermediate_size": m.size("expert_feed_forward_length")?,
    });
    let Value::Object(config) = config else { unreachable!("an object was written") };
    Ok(config)
}

fn parse(c: &Fields<'_>) -> Result<ModelSpec, ModelError> {
    let hidden = c.size("hidden_size")?;
    let heads = c.size("num_attention_heads")?;
    let head_dim = c.size_or("head_dim", hidden / heads)?;
    let attention =
        AttentionSpec { heads, kv_heads: c.size_or("num_key_value_heads", 4)?, head_dim, scale: (head_dim as f32).powf(-0.5), window: None, gate: false };
    check_heads(c, &attention)?;
    c.only("hidden_act", &json!("silu"))?;
    c.only("attention_bias", &json!(false))?;
    c.only("use_sliding_window", &json!(false))?;
    c.only("use_qk_norm", &json!(true))?;
    c.only("qkv_bias", &json!(false))?;
    c.only("shared_expert_intermediate_size", &json!(0))?;
    // Inactive while use_sliding_window is false.
    c.get("sliding_window");
    c.get("layer_types");
    let rope = rope(c, 10_000.0, 1.0)?;

    let experts = match (c.size_opt("num_experts")?, c.size_opt("num_local_experts")?) {
        (Some(a), Some(b)) if a != b => return Err(c.wrong("num_experts", format!("is {a}, but num_local_experts is {b}"))),
        (a, b) => a.or(b).unwrap_or(128),
    };
    let router = RouterSpec::softmax(experts, c.size_or("num_experts_per_tok", 8)?, c.flag_or("norm_topk_prob", false)?);
    let moe = MoeSpec::new(router, c.size_or("moe_intermediate_size", 768)?);
    check_router(c, &moe)?;
    let step = c.size_or("decoder_sparse_step", 1)?.max(1);
    let dense = FfnSpec::Dense { inner: c.size_or("intermediate_size", 6144)?, activation: Activation::SwiGlu };
    let mlp_only: Vec<u64> = c.list_opt("mlp_only_layers")?.into_iter().flatten().filter_map(Value::as_u64).collect();
    let layers = (0..c.layers(Some(24))?)
        .map(|i| LayerSpec {
            mixer: MixerSpec::Attention(AttentionBlock::new(attention)),
            ffn: if experts > 0 && !mlp_only.contains(&(i as u64)) && (i + 1) % step == 0 { FfnSpec::Moe(moe) } else { dense.clone() },
        })
        .collect();
    let spec = ModelSpec {
        hidden,
        vocab: c.size("vocab_size")?,
        eps: c.number_opt("rms_norm_eps")?.unwrap_or(1e-6) as f32,
        embed_scale: 1.0,
        logit_cap: None,
        post_norms: false,
        layer_scale: false,
        ropes: vec![RopeTable::plain(rope.theta, (head_dim as f64 * rope.partial) as usize / 2 * 2)],
        max_positions: c.size_or("max_position_embeddings", 32_768)?,
        tied: c.flag_or("tie_word_embeddings", false)?,
        hyper: None,
        layers,
    };
    c.finish()?;
    Ok(spec)
}

/// Heads that divide and dimensions that rotate.
pub(super) fn check_heads(c: &Fields<'_>, a: &AttentionSpec) -> Result<(), ModelError> {
    if a.kv_heads == 0 || !a.heads.is_multiple_of(a.kv_heads) {
        return Err(c.wrong("num_key_value_heads", format!("is {}, which does not divide {} heads", a.kv_heads, a.heads)));
    }
    if a.head_dim == 0 || !a.head_dim.is_multiple_of(2) {
        return Err(c.wrong("head_dim", format!("is {}, not a positive even number", a.head_dim)));
    }
    Ok(())
}

/// A top-k that the experts can serve.
pub(super) fn check_router(c: &Fields<'_>, m: &MoeSpec) -> Result<(), ModelError> {
    let RouterSpec { experts, top_k, .. } = m.router;
    if experts > 0 && (top_k == 0 || top_k > experts) {
        return Err(c.wrong("num_experts_per_tok", format!("is {top_k} of {experts} experts")));
    }
    Ok(())
}
