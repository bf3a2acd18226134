//! gpt-oss: attention with sinks, a window in every other layer, YaRN in all, few large experts with biases.

use mach_backend::{Activation, AttentionSpec, RouterBias, RouterScore, RouterSpec};
use serde_json::{Map, Value, json};

use super::qwen3_moe::{GGUF_LAYER, GGUF_MODEL, check_heads, check_router};
use crate::ModelError;
use crate::config::Fields;
use crate::gguf::{GgufArch, GgufNames, Meta};
use crate::registry::MoeArchAdapter;
use crate::rope::Yarn;
use crate::spec::{AttentionBlock, FfnSpec, LayerSpec, MixerSpec, ModelSpec, MoeSpec, RopeTable};
use crate::tensors::{QWEN, WeightNames};

/// The family.
pub static ADAPTER: MoeArchAdapter = MoeArchAdapter {
    model_type: "gpt_oss",
    aliases: &[],
    reference: "openai/gpt-oss-20b",
    activation: "clamped swiglu (up + 1)",
    stacked: true,
    expert_bias: true,
    wrapped: false,
    bits: 4,
    group_size: 32,
    layouts: &["mxfp4-blocks", "fused", "mlx-switch"],
    notes: "sliding window in every other layer, attention sinks, YaRN, biases everywhere, gate and up rows in turn",
    one_plus_norm: false,
    streams_checkpoint: true,
    names: &NAMES,
    gguf: &GgufArch { name: "gpt-oss", names: &GGUF_NAMES, config: config_of },
    parse,
};

static NAMES: WeightNames = WeightNames {
    roots: &["model."],
    heads: &["lm_head"],
    sinks: "self_attn.sinks",
    router: "mlp.router",
    interleaved: true,
    switch: ["mlp.experts.gate_proj", "mlp.experts.up_proj", "mlp.experts.down_proj"],
    unused: &[],
    ..QWEN
};

static GGUF_NAMES: GgufNames = GgufNames {
    model: GGUF_MODEL,
    layers: "model.layers.",
    layer: &[
        // Before those of other families with the same name.
        &[
            ("post_attention_norm.weight", "post_attention_layernorm.weight"),
            ("attn_q.bias", "self_attn.q_proj.bias"),
            ("attn_k.bias", "self_attn.k_proj.bias"),
            ("attn_v.bias", "self_attn.v_proj.bias"),
            ("attn_output.bias", "self_attn.o_proj.bias"),
            ("attn_sinks.weight", "self_attn.sinks"),
            ("ffn_gate_inp.weight", "mlp.router.weight"),
            ("ffn_gate_inp.bias", "mlp.router.bias"),
            ("ffn_gate_exps.weight", "mlp.experts.gate_proj.weight"),
            ("ffn_up_exps.weight", "mlp.experts.up_proj.weight"),
            ("ffn_down_exps.weight", "mlp.experts.down_proj.weight"),
            ("ffn_gate_exps.bias", "mlp.experts.gate_proj.bias"),
            ("ffn_up_exps.bias", "mlp.experts.up_proj.bias"),
            ("ffn_down_exps.bias", "mlp.experts.down_proj.bias"),
        ],
        GGUF_LAYER,
    ],
    draft: "mtp.",
};

/// The configuration that the metadata of a GGUF file stands for. The pattern of the layers, the ends of the blend of
/// frequencies and the clamp are not in it: the architecture implies them.
fn config_of(m: &Meta<'_>) -> Result<Map<String, Value>, ModelError> {
    let head_dim = m.size_or("attention.key_length", 64)?;
    m.only("attention.value_length", head_dim)?;
    m.only("rope.dimension_count", head_dim)?;
    m.skip("feed_forward_length");
    let rope = json!({
        "rope_type": m.text("rope.scaling.type")?.unwrap_or("default"), "factor": m.number_or("rope.scaling.factor", 32.0)?,
        "original_max_position_embeddings": m.size_or("rope.scaling.original_context_length", 4096)?, "truncate": false,
        "beta_fast": m.number_or("rope.scaling.yarn_beta_fast", 32.0)?, "beta_slow": m.number_or("rope.scaling.yarn_beta_slow", 1.0)?,
    });
    let config = json!({
        "model_type": "gpt_oss", "vocab_size": m.vocab(), "tie_word_embeddings": m.tied(), "hidden_size": m.size("embedding_length")?,
        "num_hidden_layers": m.layers()?, "num_attention_heads": m.size("attention.head_count")?,
        "num_key_value_heads": m.size("attention.head_count_kv")?, "head_dim": head_dim, "sliding_window": m.size_or("attention.sliding_window", 128)?,
        "rms_norm_eps": m.number_or("attention.layer_norm_rms_epsilon", 1e-5)?, "rope_theta": m.number_or("rope.freq_base", 150_000.0)?,
        "rope_scaling": rope, "max_position_embeddings": m.size_or("context_length", 131_072)?, "num_local_experts": m.size("expert_count")?,
        "num_experts_per_tok": m.size("expert_used_count")?, "intermediate_size": m.size("expert_feed_forward_length")?,
    });
    let Value::Object(config) = config else { unreachable!("an object was written") };
    Ok(config)
}

/// Two spellings of one size, which must agree.
fn either(c: &Fields<'_>, keys: [&'static str; 2], default: usize) -> Result<usize, ModelError> {
    match (c.size_opt(keys[0])?, c.size_opt(keys[1])?) {
        (Some(a), Some(b)) if a != b => Err(c.wrong(keys[0], format!("is {a}, but {} is {b}", keys[1]))),
        (a, b) => Ok(a.or(b).unwrap_or(default)),
    }
}

/// Theta inside or outside of `rope_parameters` or `rope_scaling`, and the stretch.
fn rope(c: &Fields<'_>, head_dim: usize) -> Result<RopeTable, ModelError> {
    let mut theta = c.number_opt("rope_theta")?;
    let mut yarn = None;
    for key in ["rope_parameters", "rope_scaling"] {
        let Some(r) = c.object_opt(key)? else { continue };
        if let Some(inner) = r.number_opt("rope_theta")? {
            if theta.is_some_and(|outer| outer != inner) {
                return Err(r.wrong("rope_theta", format!("is {inner}, but rope_theta outside says otherwise")));
            }
            theta = Some(inner);
        }
        let read = Yarn::read(&r)?;
        r.finish()?;
        yarn = yarn.or(read);
    }
    let theta = theta.unwrap_or(150_000.0);
    if !(theta.is_finite() && theta > 1.0) {
        return Err(c.wrong("rope_theta", format!("is {theta}")));
    }
    Ok(yarn.map_or_else(|| RopeTable::plain(theta, head_dim), |yarn| RopeTable::yarn(theta, head_dim, &yarn)))
}

fn parse(c: &Fields<'_>) -> Result<ModelSpec, ModelError> {
    let head_dim = c.size_or("head_dim", 64)?;
    let full = AttentionSpec {
        heads: c.size_or("num_attention_heads", 64)?,
        kv_heads: c.size_or("num_key_value_heads", 8)?,
        head_dim,
        scale: (head_dim as f32).powf(-0.5),
        window: None,
        gate: false,
    };
    check_heads(c, &full)?;
    for (key, allowed) in [("hidden_act", json!("silu")), ("attention_bias", json!(true))] {
        c.only(key, &allowed)?;
    }
    // The limit of the original training.
    c.get("initial_context_length");
    let experts = either(c, ["num_local_experts", "num_experts"], 128)?;
    let number = |key: &'static str, default: f64| Ok::<_, ModelError>(c.number_opt(key)?.unwrap_or(default) as f32);
    let router = RouterSpec {
        experts,
        top_k: either(c, ["num_experts_per_tok", "experts_per_token"], 4)?,
        score: RouterScore::SoftmaxOfChosen,
        bias: RouterBias::Logits,
        renormalise: false,
        factor: 1.0,
    };
    let moe = MoeSpec {
        activation: Activation::SwiGluOai { alpha: number("swiglu_alpha", 1.702)?, limit: number("swiglu_limit", 7.0)? },
        expert_bias: true,
        ..MoeSpec::new(router, c.size_or("intermediate_size", 2880)?)
    };
    check_router(c, &moe)?;
    let window = c.size_or("sliding_window", 128)?;
    if window == 0 {
        return Err(c.wrong("sliding_window", "is 0"));
    }
    let n = c.layers(Some(36))?;
    let windows = match c.list_opt("layer_types")? {
        Some(types) if types.len() != n => return Err(c.wrong("layer_types", format!("names {} layers of {n}", types.len()))),
        Some(types) => types
            .iter()
            .map(|t| match t.as_str() {
                Some("full_attention") => Ok(None),
                Some("sliding_attention") => Ok(Some(window)),
                _ => Err(c.wrong("layer_types", format!("has {t}, not sliding_attention or full_attention"))),
            })
            .collect::<Result<Vec<_>, _>>()?,
        None => (0..n).map(|i| (i % 2 == 0).then_some(window)).collect(),
    };
    let layer = |window: Option<usize>| LayerSpec {
        mixer: MixerSpec::Attention(AttentionBlock { bias: true, sinks: true, qk_norm: false, ..AttentionBlock::new(AttentionSpec { window, ..full }) }),
        ffn: FfnSpec::Moe(moe),
    };
    let spec = ModelSpec {
        hidden: c.size_or("hidden_size", 2880)?,
        vocab: c.size("vocab_size")?,
        eps: c.number_opt("rms_norm_eps")?.unwrap_or(1e-5) as f32,
        embed_scale: 1.0,
        logit_cap: None,
        post_norms: false,
        layer_scale: false,
        ropes: vec![rope(c, head_dim)?],
        max_positions: c.size_or("max_position_embeddings", 131_072)?,
        tied: c.flag_or("tie_word_embeddings", false)?,
        hyper: None,
        layers: windows.into_iter().map(layer).collect(),
    };
    c.finish()?;
    Ok(spec)
}
