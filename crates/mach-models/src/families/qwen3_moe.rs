//! Qwen3-MoE: attention with per-head q/k norm in every layer, experts or a dense block.

use mach_backend::{Activation, AttentionSpec, RouterSpec};
use serde_json::json;

use crate::ModelError;
use crate::config::{Fields, rope};
use crate::registry::MoeArchAdapter;
use crate::spec::{FfnSpec, LayerSpec, MixerSpec, ModelSpec, MoeSpec};
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
    names: &QWEN,
    parse,
};

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
    let moe = MoeSpec {
        router: RouterSpec { experts, top_k: c.size_or("num_experts_per_tok", 8)?, renormalise: c.flag_or("norm_topk_prob", false)? },
        inner: c.size_or("moe_intermediate_size", 768)?,
        activation: Activation::SwiGlu,
        shared: None,
    };
    check_router(c, &moe)?;
    let step = c.size_or("decoder_sparse_step", 1)?.max(1);
    let dense = FfnSpec::Dense { inner: c.size_or("intermediate_size", 6144)?, activation: Activation::SwiGlu };
    let mlp_only: Vec<u64> = c.list_opt("mlp_only_layers")?.into_iter().flatten().filter_map(serde_json::Value::as_u64).collect();
    let layers = (0..c.size_or("num_hidden_layers", 24)?)
        .map(|i| LayerSpec {
            mixer: MixerSpec::Attention(attention),
            ffn: if experts > 0 && !mlp_only.contains(&(i as u64)) && (i + 1) % step == 0 { FfnSpec::Moe(moe) } else { dense.clone() },
        })
        .collect();
    let spec = ModelSpec {
        hidden,
        vocab: c.size("vocab_size")?,
        eps: c.number_opt("rms_norm_eps")?.unwrap_or(1e-6) as f32,
        rope,
        rotary_dims: (head_dim as f64 * rope.partial) as usize / 2 * 2,
        max_positions: c.size_or("max_position_embeddings", 32_768)?,
        tied: c.flag_or("tie_word_embeddings", false)?,
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
