//! Gemma 4 with experts (26B-A4B): windowed layers and full ones whose values are their keys, a dense block beside the
//! experts, norms before and after everything.

use mach_backend::{Activation, AttentionSpec, RouterSpec};
use serde_json::{Map, Value, json};

use super::qwen3_moe::{GGUF_MODEL, check_heads, check_router};
use crate::ModelError;
use crate::config::Fields;
use crate::gguf::{GgufArch, GgufNames, Meta};
use crate::registry::MoeArchAdapter;
use crate::spec::{AttentionBlock, FfnSpec, LayerSpec, MixerSpec, ModelSpec, MoeSpec, RopeTable, SharedSpec};
use crate::tensors::{QWEN, WeightNames};

/// The family.
pub static ADAPTER: MoeArchAdapter = MoeArchAdapter {
    model_type: "gemma4",
    aliases: &["gemma4_text"],
    reference: "google/gemma-4-26B-A4B-it",
    activation: "geglu",
    stacked: true,
    expert_bias: false,
    wrapped: true,
    bits: 4,
    group_size: 32,
    layouts: &["fused", "mlx-switch"],
    notes: "windowed layers and full ones whose values are their keys, dense block beside the experts, tied head with a soft cap; vision and audio tensors are recognised and not used",
    one_plus_norm: false,
    streams_checkpoint: true,
    names: &NAMES,
    gguf: &GgufArch { name: "gemma4", names: &GGUF_NAMES, config: config_of },
    parse,
};

static NAMES: WeightNames = WeightNames {
    norms: ["input_layernorm", "pre_feedforward_layernorm"],
    post_norms: ["post_attention_layernorm", "post_feedforward_layernorm"],
    layer_scale: "layer_scalar",
    router: "router.proj",
    expert_scale: "router.per_expert_scale",
    apart: ["router.scale", "pre_feedforward_layernorm_2.weight", "post_feedforward_layernorm_2.weight", "post_feedforward_layernorm_1.weight"],
    fused: ["experts.gate_up_proj", "experts.down_proj"],
    each: ["experts.{}.gate_proj", "experts.{}.up_proj", "experts.{}.down_proj"],
    switch: ["experts.switch_glu.gate_proj", "experts.switch_glu.up_proj", "experts.switch_glu.down_proj"],
    shared: ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", ""],
    unused: &[
        "model.vision_tower.",
        "vision_tower.",
        "model.embed_vision.",
        "embed_vision.",
        "model.audio_tower.",
        "audio_tower.",
        "model.embed_audio.",
        "embed_audio.",
        // Divisors that say which pairs of full layers rotate.
        "rope_freqs.",
    ],
    ..QWEN
};

static GGUF_NAMES: GgufNames = GgufNames {
    model: GGUF_MODEL,
    layers: "model.layers.",
    layer: &[&[
        ("attn_norm.weight", "input_layernorm.weight"),
        ("post_attention_norm.weight", "post_attention_layernorm.weight"),
        ("attn_q.weight", "self_attn.q_proj.weight"),
        ("attn_k.weight", "self_attn.k_proj.weight"),
        ("attn_v.weight", "self_attn.v_proj.weight"),
        ("attn_output.weight", "self_attn.o_proj.weight"),
        ("attn_q_norm.weight", "self_attn.q_norm.weight"),
        ("attn_k_norm.weight", "self_attn.k_norm.weight"),
        ("ffn_norm.weight", "pre_feedforward_layernorm.weight"),
        ("post_ffw_norm.weight", "post_feedforward_layernorm.weight"),
        ("post_ffw_norm_1.weight", "post_feedforward_layernorm_1.weight"),
        ("pre_ffw_norm_2.weight", "pre_feedforward_layernorm_2.weight"),
        ("post_ffw_norm_2.weight", "post_feedforward_layernorm_2.weight"),
        ("ffn_gate.weight", "mlp.gate_proj.weight"),
        ("ffn_up.weight", "mlp.up_proj.weight"),
        ("ffn_down.weight", "mlp.down_proj.weight"),
        ("ffn_gate_inp.weight", "router.proj.weight"),
        ("ffn_gate_inp.scale", "router.scale"),
        ("ffn_down_exps.scale", "router.per_expert_scale"),
        ("ffn_gate_up_exps.weight", "experts.gate_up_proj.weight"),
        ("ffn_gate_exps.weight", "experts.switch_glu.gate_proj.weight"),
        ("ffn_up_exps.weight", "experts.switch_glu.up_proj.weight"),
        ("ffn_down_exps.weight", "experts.switch_glu.down_proj.weight"),
        ("layer_output_scale.weight", "layer_scalar"),
    ]],
    draft: "mtp.",
};

/// The configuration that the metadata of a GGUF file stands for.
fn config_of(m: &Meta<'_>) -> Result<Map<String, Value>, ModelError> {
    let layers = m.layers()?;
    let sliding: Vec<bool> = match m.flags("attention.sliding_window_pattern")? {
        Some(flags) => flags.iter().copied().take(layers).collect(),
        None => (0..layers).map(is_sliding).collect(),
    };
    let kv_heads = m.sizes("attention.head_count_kv")?;
    let kv_of = |kind: bool| sliding.iter().zip(&kv_heads).find(|(s, _)| **s == kind).map(|(_, n)| *n);
    let (wide, narrow) = (m.size("attention.key_length")?, m.size("attention.key_length_swa")?);
    for (key, only) in [
        ("attention.value_length", wide),
        ("attention.value_length_swa", narrow),
        ("rope.dimension_count", wide),
        ("rope.dimension_count_swa", narrow),
        ("attention.shared_kv_layers", 0),
        ("embedding_length_per_layer_input", 0),
    ] {
        m.only(key, only)?;
    }
    let types: Vec<&str> = sliding.iter().map(|&s| if s { "sliding_attention" } else { "full_attention" }).collect();
    let config = json!({
        "model_type": "gemma4_text", "vocab_size": m.vocab(), "tie_word_embeddings": m.tied(), "hidden_size": m.size("embedding_length")?,
        "num_hidden_layers": layers, "layer_types": types, "num_attention_heads": m.size("attention.head_count")?,
        "num_key_value_heads": kv_of(true).unwrap_or(1), "num_global_key_value_heads": kv_of(false), "head_dim": narrow, "global_head_dim": wide,
        "attention_k_eq_v": true, "sliding_window": m.size("attention.sliding_window")?,
        "rms_norm_eps": m.number_or("attention.layer_norm_rms_epsilon", 1e-6)?, "hidden_size_per_layer_input": 0,
        "rope_parameters": {
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": m.number_or("rope.freq_base", 1e6)?},
            "sliding_attention": {"rope_type": "default", "rope_theta": m.number_or("rope.freq_base_swa", 1e4)?},
        },
        "final_logit_softcapping": m.number_or("final_logit_softcapping", 30.0)?, "max_position_embeddings": m.size_or("context_length", 131_072)?,
        "enable_moe_block": true, "num_experts": m.size("expert_count")?, "top_k_experts": m.size("expert_used_count")?,
        "moe_intermediate_size": m.size("expert_feed_forward_length")?, "intermediate_size": m.size("feed_forward_length")?,
    });
    let Value::Object(config) = config else { unreachable!("an object was written") };
    Ok(config)
}

/// Five windowed layers, one full.
fn is_sliding(layer: usize) -> bool {
    !(layer + 1).is_multiple_of(6)
}

/// The table of a kind of layer.
fn rope(c: Option<&Fields<'_>>, kind: &'static str, head_dim: usize) -> Result<RopeTable, ModelError> {
    let full = kind == "full_attention";
    let (mut theta, mut share, mut proportional) = if full { (1e6, 0.25, true) } else { (1e4, 1.0, false) };
    if let Some(r) = c.map(|c| c.object_opt(kind)).transpose()?.flatten() {
        proportional = match r.text_opt("rope_type")? {
            None | Some("default") => false,
            Some("proportional") => true,
            Some(_) => return Err(r.unsupported("rope_type", "only `default` and `proportional` are supported for this family")),
        };
        theta = r.number_opt("rope_theta")?.unwrap_or(theta);
        share = r.number_opt("partial_rotary_factor")?.unwrap_or(1.0);
        if !(theta.is_finite() && theta > 0.0 && share > 0.0 && share <= 1.0) {
            return Err(r.wrong("rope_theta", format!("is {theta} with partial_rotary_factor {share}")));
        }
        r.finish()?;
    }
    let rotating = head_dim as f64 * share;
    Ok(if proportional { RopeTable::proportional(theta, head_dim, (rotating / 2.0) as usize) } else { RopeTable::plain(theta, rotating as usize / 2 * 2) })
}

/// A size of the full layers as transformers saves it since 5.23, `{"05": {"head_dim": 512}}`: the same for all of them.
fn of_full_layers(c: &Fields<'_>, key: &str) -> Option<usize> {
    let layers = c.get("per_layer_config")?.as_object()?;
    layers.values().find_map(|l| l.get(key)?.as_u64()).map(|n| n as usize)
}

fn parse(c: &Fields<'_>) -> Result<ModelSpec, ModelError> {
    if !c.flag_or("enable_moe_block", false)? {
        return Err(c.unsupported("enable_moe_block", "only the members of the family with experts are supported"));
    }
    for (key, allowed) in [
        ("hidden_activation", json!("gelu_pytorch_tanh")),
        ("attention_bias", json!(false)),
        ("num_kv_shared_layers", json!(0)),
        ("use_double_wide_mlp", json!(false)),
        ("use_bidirectional_attention", json!("vision")),
    ] {
        c.only(key, &allowed)?;
    }
    // Embeddings of every layer, which only small members of the family have; absent means 256.
    if c.size_opt("hidden_size_per_layer_input")?.unwrap_or(if c.has("hidden_size_per_layer_input") { 0 } else { 256 }) != 0 {
        return Err(c.unsupported("hidden_size_per_layer_input", "embeddings per layer are not supported; 0 is"));
    }
    c.get("vocab_size_per_layer_input");
    let n = c.layers(Some(30))?;
    let sliding: Vec<bool> = match c.list_opt("layer_types")? {
        Some(types) if types.len() != n => return Err(c.wrong("layer_types", format!("names {} layers of {n}", types.len()))),
        Some(types) => types
            .iter()
            .map(|t| match t.as_str() {
                Some("full_attention") => Ok(false),
                Some("sliding_attention") => Ok(true),
                _ => Err(c.wrong("layer_types", format!("has {t}, not sliding_attention or full_attention"))),
            })
            .collect::<Result<_, _>>()?,
        None => (0..n).map(|i| i + 1 < n && is_sliding(i)).collect(),
    };
    let window = c.size_or("sliding_window", 512)?.max(1);
    let v_from_k = c.flag_or("attention_k_eq_v", false)?;
    let windowed = AttentionSpec {
        heads: c.size_or("num_attention_heads", 8)?,
        kv_heads: c.size_or("num_key_value_heads", 4)?,
        head_dim: c.size_or("head_dim", 256)?,
        scale: 1.0,
        window: Some(window),
        gate: false,
    };
    let global_kv = c.size_opt("num_global_key_value_heads")?.or(of_full_layers(c, "num_key_value_heads"));
    let full = AttentionSpec {
        kv_heads: global_kv.filter(|_| v_from_k).unwrap_or(windowed.kv_heads),
        head_dim: c.size_opt("global_head_dim")?.or(of_full_layers(c, "head_dim")).unwrap_or(512),
        window: None,
        ..windowed
    };
    check_heads(c, &windowed)?;
    check_heads(c, &full)?;
    let router = RouterSpec::softmax(c.size("num_experts")?, c.size("top_k_experts")?, true);
    let moe = MoeSpec {
        activation: Activation::GeGlu,
        expert_scale: true,
        shared: Some(SharedSpec { inner: c.size_or("intermediate_size", 9216)?, gated: false }),
        apart: true,
        ..MoeSpec::new(router, c.size("moe_intermediate_size")?)
    };
    check_router(c, &moe)?;
    let hidden = c.size_or("hidden_size", 2304)?;
    let ropes = c.object_opt("rope_parameters")?;
    let layer = |&sliding: &bool| {
        let (attention, rope) = if sliding { (windowed, 0) } else { (full, 1) };
        let block = AttentionBlock { rope, v_norm: true, v_from_k: v_from_k && !sliding, ..AttentionBlock::new(attention) };
        LayerSpec { mixer: MixerSpec::Attention(block), ffn: FfnSpec::Moe(moe) }
    };
    let spec = ModelSpec {
        hidden,
        vocab: c.size_or("vocab_size", 262_144)?,
        eps: c.number_opt("rms_norm_eps")?.unwrap_or(1e-6) as f32,
        embed_scale: (hidden as f32).sqrt(),
        logit_cap: c.number_opt("final_logit_softcapping")?.map(|cap| cap as f32),
        post_norms: true,
        layer_scale: true,
        ropes: vec![rope(ropes.as_ref(), "sliding_attention", windowed.head_dim)?, rope(ropes.as_ref(), "full_attention", full.head_dim)?],
        max_positions: c.size_or("max_position_embeddings", 131_072)?,
        tied: c.flag_or("tie_word_embeddings", true)?,
        hyper: None,
        layers: sliding.iter().map(layer).collect(),
    };
    c.finish()?;
    Ok(spec)
}
