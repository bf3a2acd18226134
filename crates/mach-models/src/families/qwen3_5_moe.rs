//! Qwen3.5-MoE and Qwen3.6-MoE: gated delta nets with a gated attention layer every fourth, experts and a gated
//! shared expert in every layer.

use mach_backend::{AttentionSpec, GdnSpec, RouterSpec};
use serde_json::{Map, Value, json};

use super::qwen3_moe::{GGUF_LAYER, GGUF_MODEL, check_heads, check_router, qwen_config};
use crate::ModelError;
use crate::config::{Fields, rope};
use crate::gguf::{GgufArch, GgufNames, Meta, gguf_weights};
use crate::registry::MoeArchAdapter;
use crate::spec::{AttentionBlock, FfnSpec, LayerSpec, MixerSpec, ModelSpec, MoeSpec, RopeTable, SharedSpec};
use crate::tensors::QWEN;

/// The family.
pub static ADAPTER: MoeArchAdapter = MoeArchAdapter {
    model_type: "qwen3_5_moe",
    aliases: &["qwen3_5_moe_text"],
    reference: "Qwen/Qwen3.6-35B-A3B",
    activation: "swiglu",
    stacked: true,
    expert_bias: false,
    wrapped: true,
    bits: 4,
    group_size: 64,
    layouts: &["fused", "per-expert", "mlx-switch"],
    notes: "gated delta net and gated attention layers, gated shared expert; vision and mtp tensors are recognised and not used",
    one_plus_norm: true,
    streams_checkpoint: true,
    names: &QWEN,
    gguf: &GgufArch { name: "qwen35moe", names: &GGUF_NAMES, config: config_of },
    parse,
};

static GGUF_NAMES: GgufNames = GgufNames {
    model: GGUF_MODEL,
    layers: "model.layers.",
    layer: &[GGUF_LAYER, &[("post_attention_norm.weight", "post_attention_layernorm.weight")]],
    draft: "mtp.",
};

/// The configuration that the metadata of a GGUF file stands for.
fn config_of(m: &Meta<'_>) -> Result<Map<String, Value>, ModelError> {
    let layers = m.layers()?;
    let value_heads = m.size("ssm.time_step_rank")?;
    let interval = m.size_or("full_attention_interval", 4)?.max(1);
    let types: Vec<&str> = match m.flags("attention.recurrent_layers")? {
        Some(recurrent) => recurrent.iter().take(layers).map(|&r| if r { "linear_attention" } else { "full_attention" }).collect(),
        None => (1..=layers).map(|i| if i % interval == 0 { "full_attention" } else { "linear_attention" }).collect(),
    };
    // Sections of image positions; text has equal ones.
    m.skip("rope.dimension_sections");
    let mut config = qwen_config(m, "qwen3_5_moe")?;
    config.extend([
        ("layer_types".to_owned(), json!(types)),
        ("linear_num_key_heads".to_owned(), json!(m.size("ssm.group_count")?)),
        ("linear_num_value_heads".to_owned(), json!(value_heads)),
        ("linear_key_head_dim".to_owned(), json!(m.size("ssm.state_size")?)),
        ("linear_value_head_dim".to_owned(), json!(m.size("ssm.inner_size")? / value_heads)),
        ("linear_conv_kernel_dim".to_owned(), json!(m.size("ssm.conv_kernel")?)),
        ("shared_expert_intermediate_size".to_owned(), json!(m.size("expert_shared_feed_forward_length")?)),
    ]);
    Ok(config)
}

fn parse(c: &Fields<'_>) -> Result<ModelSpec, ModelError> {
    let head_dim = c.size_or("head_dim", 256)?;
    let attention = AttentionSpec {
        heads: c.size("num_attention_heads")?,
        kv_heads: c.size_or("num_key_value_heads", 2)?,
        head_dim,
        scale: (head_dim as f32).powf(-0.5),
        window: None,
        gate: true,
    };
    check_heads(c, &attention)?;
    let eps = c.number_opt("rms_norm_eps")?.unwrap_or(1e-6) as f32;
    let gdn = GdnSpec {
        k_heads: c.size_or("linear_num_key_heads", 16)?,
        v_heads: c.size_or("linear_num_value_heads", 32)?,
        k_dim: c.size_or("linear_key_head_dim", 128)?,
        v_dim: c.size_or("linear_value_head_dim", 128)?,
        kernel: c.size_or("linear_conv_kernel_dim", 4)?,
        eps,
        // What a GGUF file is turned into says so: see `gguf.rs`.
        tiled: gguf_weights(c)?,
    };
    if gdn.k_heads == 0 || !gdn.v_heads.is_multiple_of(gdn.k_heads) {
        return Err(c.wrong("linear_num_value_heads", format!("is {}, not a multiple of {} key heads", gdn.v_heads, gdn.k_heads)));
    }
    if gdn.k_dim == 0 || gdn.v_dim == 0 || gdn.v_heads == 0 || gdn.kernel == 0 {
        return Err(c.wrong("linear_conv_kernel_dim", "and the linear_* sizes must be at least 1"));
    }
    for (key, allowed) in [
        ("hidden_act", json!("silu")),
        ("attention_bias", json!(false)),
        ("attn_output_gate", json!(true)),
        ("output_gate_type", json!("swish")),
        ("mlp_only_layers", json!([])),
        ("decoder_sparse_step", json!(1)),
        ("norm_topk_prob", json!(true)),
        ("mamba_ssm_dtype", json!("float32")),
    ] {
        c.only(key, &allowed)?;
    }
    let rope = rope(c, 10_000.0, 0.25)?;
    let router = RouterSpec::softmax(c.size("num_experts")?, c.size_or("num_experts_per_tok", 8)?, true);
    let shared = SharedSpec { inner: c.size_or("shared_expert_intermediate_size", 512)?, gated: true };
    let moe = MoeSpec { shared: Some(shared), ..MoeSpec::new(router, c.size_or("moe_intermediate_size", 512)?) };
    check_router(c, &moe)?;

    let n = c.layers(Some(40))?;
    let interval = c.size_or("full_attention_interval", 4)?.max(1);
    let mixers: Vec<MixerSpec> = match c.list_opt("layer_types")? {
        Some(types) if types.len() != n => return Err(c.wrong("layer_types", format!("names {} layers of {n}", types.len()))),
        Some(types) => types
            .iter()
            .map(|t| match t.as_str() {
                Some("full_attention") => Ok(MixerSpec::Attention(AttentionBlock::new(attention))),
                Some("linear_attention") => Ok(MixerSpec::Gdn(gdn)),
                _ => Err(c.wrong("layer_types", format!("has {t}, not linear_attention or full_attention"))),
            })
            .collect::<Result<_, _>>()?,
        None => (0..n).map(|i| if (i + 1) % interval == 0 { MixerSpec::Attention(AttentionBlock::new(attention)) } else { MixerSpec::Gdn(gdn) }).collect(),
    };
    let spec = ModelSpec {
        hidden: c.size("hidden_size")?,
        vocab: c.size("vocab_size")?,
        eps,
        embed_scale: 1.0,
        logit_cap: None,
        post_norms: false,
        layer_scale: false,
        ropes: vec![RopeTable::plain(rope.theta, (head_dim as f64 * rope.partial) as usize / 2 * 2)],
        max_positions: c.size_or("max_position_embeddings", 32_768)?,
        tied: c.get("tie_word_embeddings").and_then(Value::as_bool).unwrap_or(false),
        hyper: None,
        layers: mixers.into_iter().map(|mixer| LayerSpec { mixer, ffn: FfnSpec::Moe(moe) }).collect(),
    };
    c.finish()?;
    Ok(spec)
}
