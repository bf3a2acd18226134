//! DeepSeek-V4: four residual streams joined by hyper-connections, latent attention over a window and compressed entries, experts
//! chosen by biased scores or, in the first layers, by token.

use mach_backend::{Activation, CompressSpec, HyperSpec, IndexSpec, KvType, LatentSpec, RouterBias, RouterScore, RouterSpec};
use serde_json::{Map, Value, json};

use super::qwen3_moe::check_router;
use crate::ModelError;
use crate::config::Fields;
use crate::gguf::{GgufArch, GgufNames, Meta};
use crate::registry::MoeArchAdapter;
use crate::rope::Yarn;
use crate::spec::{FfnSpec, LatentBlock, LayerSpec, MixerSpec, ModelSpec, MoeSpec, RopeTable, SharedSpec};
use crate::tensors::{QWEN, WeightNames};

/// The family.
pub static ADAPTER: MoeArchAdapter = MoeArchAdapter {
    model_type: "deepseek_v4",
    aliases: &[],
    reference: "deepseek-ai/DeepSeek-V4-Flash",
    activation: "clamped swiglu",
    stacked: false,
    expert_bias: false,
    wrapped: false,
    bits: 4,
    group_size: 32,
    layouts: &["per-expert", "mlx-switch"],
    notes: "hyper-connections, latent attention over a window and compressed entries, first layers routed by token id; mtp tensors are recognised and not used; streams from a sidecar or pack only",
    one_plus_norm: false,
    streams_checkpoint: false,
    names: &NAMES,
    gguf: &GgufArch { name: "deepseek4", names: &GGUF_NAMES, config: config_of },
    parse,
};

/// Tensor names as published.
static NAMES: WeightNames = WeightNames {
    roots: &[""],
    embed: "embed",
    heads: &["head"],
    norms: ["attn_norm", "ffn_norm"],
    router: "ffn.gate",
    each: ["ffn.experts.{}.w1", "ffn.experts.{}.w3", "ffn.experts.{}.w2"],
    switch: ["ffn.switch_mlp.w1", "ffn.switch_mlp.w3", "ffn.switch_mlp.w2"],
    shared: ["ffn.shared_experts.w1", "ffn.shared_experts.w3", "ffn.shared_experts.w2", ""],
    unused: &["mtp."],
    ..QWEN
};

/// Layers whose entries are sparse (chosen by an index, and overlapping) and dense ones, by the tokens of an entry.
const SPARSE: usize = 4;
const DENSE: usize = 128;

static GGUF_NAMES: GgufNames = GgufNames {
    model: &[
        ("token_embd.weight", "embed.weight"),
        ("output.weight", "head.weight"),
        ("output_norm.weight", "norm.weight"),
        ("output_hc_fn.weight", "hc_head_fn"),
        ("output_hc_base.weight", "hc_head_base"),
        ("output_hc_scale.weight", "hc_head_scale"),
    ],
    layers: "layers.",
    layer: &[&[
        ("attn_norm.weight", "attn_norm.weight"),
        ("ffn_norm.weight", "ffn_norm.weight"),
        ("hc_attn_fn.weight", "hc_attn_fn"),
        ("hc_attn_base.weight", "hc_attn_base"),
        ("hc_attn_scale.weight", "hc_attn_scale"),
        ("hc_ffn_fn.weight", "hc_ffn_fn"),
        ("hc_ffn_base.weight", "hc_ffn_base"),
        ("hc_ffn_scale.weight", "hc_ffn_scale"),
        ("attn_sinks.weight", "attn.attn_sink"),
        ("attn_q_a.weight", "attn.wq_a.weight"),
        ("attn_q_a_norm.weight", "attn.q_norm.weight"),
        ("attn_q_b.weight", "attn.wq_b.weight"),
        ("attn_kv.weight", "attn.wkv.weight"),
        ("attn_kv_a_norm.weight", "attn.kv_norm.weight"),
        ("attn_output_a.weight", "attn.wo_a.weight"),
        ("attn_output_b.weight", "attn.wo_b.weight"),
        ("attn_compressor_kv.weight", "attn.compressor.wkv.weight"),
        ("attn_compressor_gate.weight", "attn.compressor.wgate.weight"),
        ("attn_compressor_ape.weight", "attn.compressor.ape"),
        ("attn_compressor_norm.weight", "attn.compressor.norm.weight"),
        ("indexer.attn_q_b.weight", "attn.indexer.wq_b.weight"),
        ("indexer.proj.weight", "attn.indexer.weights_proj.weight"),
        ("indexer_compressor_kv.weight", "attn.indexer.compressor.wkv.weight"),
        ("indexer_compressor_gate.weight", "attn.indexer.compressor.wgate.weight"),
        ("indexer_compressor_ape.weight", "attn.indexer.compressor.ape"),
        ("indexer_compressor_norm.weight", "attn.indexer.compressor.norm.weight"),
        ("ffn_gate_inp.weight", "ffn.gate.weight"),
        ("exp_probs_b.bias", "ffn.gate.bias"),
        ("ffn_gate_tid2eid.weight", "ffn.gate.tid2eid"),
        ("ffn_gate_exps.weight", "ffn.switch_mlp.w1.weight"),
        ("ffn_up_exps.weight", "ffn.switch_mlp.w3.weight"),
        ("ffn_down_exps.weight", "ffn.switch_mlp.w2.weight"),
        ("ffn_gate_shexp.weight", "ffn.shared_experts.w1.weight"),
        ("ffn_up_shexp.weight", "ffn.shared_experts.w3.weight"),
        ("ffn_down_shexp.weight", "ffn.shared_experts.w2.weight"),
    ]],
    draft: "mtp.",
};

/// The configuration that the metadata of a GGUF file stands for.
fn config_of(m: &Meta<'_>) -> Result<Map<String, Value>, ModelError> {
    let layers = m.layers()?;
    // What else the converter writes: widths that follow from the others.
    for key in ["attention.value_length", "expert_shared_feed_forward_length", "expert_group_count", "expert_group_used_count", "embedding_length_out"] {
        m.skip(key);
    }
    m.only("expert_gating_func", SQRT_SOFTPLUS)?;
    m.only("expert_weights_norm", 1)?;
    let heads = m.size("attention.head_count")?;
    let mut rope = json!({ "rope_type": m.text("rope.scaling.type")?.unwrap_or("default") });
    if rope["rope_type"] == "yarn" {
        rope["factor"] = json!(m.number_or("rope.scaling.factor", 1.0)?);
        rope["original_max_position_embeddings"] = json!(m.size("rope.scaling.original_context_length")?);
        rope["beta_fast"] = json!(m.number_or("rope.scaling.yarn_beta_fast", 32.0)?);
        rope["beta_slow"] = json!(m.number_or("rope.scaling.yarn_beta_slow", 1.0)?);
    }
    let config = json!({
        "model_type": "deepseek_v4", "vocab_size": m.vocab(), "tie_word_embeddings": m.tied(), "hidden_size": m.size("embedding_length")?,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": m.size_or("attention.head_count_kv", 1)?,
        "head_dim": m.size("attention.key_length")?, "q_lora_rank": m.size("attention.q_lora_rank")?,
        "qk_rope_head_dim": m.size("rope.dimension_count")?, "o_groups": m.size("attention.output_group_count")?,
        "o_lora_rank": m.size("attention.output_lora_rank")?, "compress_ratios": m.sizes("attention.compress_ratios")?,
        "sliding_window": m.size("attention.sliding_window")?, "index_n_heads": m.size("attention.indexer.head_count")?,
        "index_head_dim": m.size("attention.indexer.key_length")?, "index_topk": m.size("attention.indexer.top_k")?,
        "rope_theta": m.number_or("rope.freq_base", 10_000.0)?,
        "compress_rope_theta": m.number_or("attention.compress_rope_freq_base", 160_000.0)?, "rope_scaling": rope,
        "hc_mult": m.size("hyper_connection.count")?, "hc_sinkhorn_iters": m.size("hyper_connection.sinkhorn_iterations")?,
        "hc_eps": m.number_or("hyper_connection.epsilon", 1e-6)?, "n_routed_experts": m.size("expert_count")?,
        "num_experts_per_tok": m.size("expert_used_count")?, "moe_intermediate_size": m.size("expert_feed_forward_length")?,
        "n_shared_experts": m.size_or("expert_shared_count", 1)?, "num_hash_layers": m.size_or("hash_layer_count", 0)?,
        "routed_scaling_factor": m.number_or("expert_weights_scale", 1.0)?, "swiglu_limit": m.number_or("swiglu_clamp_exp", 10.0)?,
        "rms_norm_eps": m.number_or("attention.layer_norm_rms_epsilon", 1e-6)?,
        "max_position_embeddings": m.size_or("context_length", 65_536)?,
    });
    m.skip("swiglu_clamp_shexp");
    let Value::Object(config) = config else { unreachable!("an object was written") };
    Ok(config)
}

/// llama.cpp's number for the square root of softplus.
const SQRT_SOFTPLUS: usize = 4;

/// Tokens of an entry of every layer, 0 where there are none, in either spelling.
fn ratios(c: &Fields<'_>, layers: usize) -> Result<Vec<usize>, ModelError> {
    let rates = c.object_opt("compress_rates")?;
    let rate = |key: &'static str, default: usize| rates.as_ref().map_or(Ok(default), |r| r.size_or(key, default));
    let (sparse, dense) = (rate("compressed_sparse_attention", SPARSE)?, rate("heavily_compressed_attention", DENSE)?);
    if (sparse, dense) != (SPARSE, DENSE) {
        return Err(c.unsupported("compress_rates", "only 4 tokens (sparse) and 128 tokens (dense) an entry are supported"));
    }
    if let Some(list) = c.list_opt("compress_ratios")? {
        let all: Option<Vec<usize>> = list.iter().map(|v| v.as_u64().map(|n| n as usize).filter(|n| [0, SPARSE, DENSE].contains(n))).collect();
        // One more for every head that drafts tokens.
        return all
            .filter(|a| a.len() >= layers)
            .map(|a| a[..layers].to_vec())
            .ok_or_else(|| c.wrong("compress_ratios", format!("is not {layers} of 0, 4 and 128")));
    }
    let Some(list) = c.list_opt("layer_types")? else { return Err(c.wrong("compress_ratios", "is missing, and so is layer_types")) };
    let of = |v: &Value| match v.as_str() {
        Some("sliding_attention") => Some(0),
        Some("compressed_sparse_attention") => Some(SPARSE),
        Some("heavily_compressed_attention") => Some(DENSE),
        _ => None,
    };
    let all: Option<Vec<usize>> = list.iter().map(of).collect();
    all.filter(|a| a.len() == layers).ok_or_else(|| c.wrong("layer_types", format!("is not {layers} kinds of attention that are known")))
}

/// Layers at the start whose experts are those of the token.
fn hash_layers(c: &Fields<'_>, layers: usize) -> Result<usize, ModelError> {
    let count = c.size_opt("num_hash_layers")?;
    let Some(types) = c.list_opt("mlp_layer_types")? else { return Ok(count.unwrap_or(3).min(layers)) };
    let hashed = types.iter().take_while(|t| *t == "hash_moe").count();
    if types.len() != layers || types[hashed..].iter().any(|t| t != "moe") {
        return Err(c.wrong("mlp_layer_types", "is not hash_moe for the first layers and moe for the others"));
    }
    Ok(hashed)
}

/// Rotary embeddings of layers without and with entries.
fn ropes(c: &Fields<'_>, rotary: usize) -> Result<Vec<RopeTable>, ModelError> {
    let (mut theta, mut compress_theta) = (c.number_opt("rope_theta")?.unwrap_or(10_000.0), c.number_opt("compress_rope_theta")?.unwrap_or(160_000.0));
    // Newer files have both kinds inside.
    let nested = c.object_opt("rope_parameters")?;
    let mut scaling = c.object_opt("rope_scaling")?;
    if let Some(outer) = &nested {
        if let Some(main) = outer.object_opt("main")? {
            main.only("rope_type", &json!("default"))?;
            main.get("partial_rotary_factor");
            theta = main.number_opt("rope_theta")?.unwrap_or(theta);
            main.finish()?;
        }
        scaling = outer.object_opt("compress")?.or(scaling);
        if let Some(compress) = &scaling {
            compress.get("partial_rotary_factor");
            compress_theta = compress.number_opt("rope_theta")?.unwrap_or(compress_theta);
            // The factor that YaRN puts on angles is left out in this family.
            compress.only("attention_factor", &json!(1.0))?;
        }
        outer.finish()?;
    }
    let yarn = scaling.as_ref().map(Yarn::read).transpose()?.flatten().map(|y| Yarn { attention_factor: Some(1.0), ..y });
    let compressed = yarn.map_or_else(|| RopeTable::plain(compress_theta, rotary), |y| RopeTable::yarn(compress_theta, rotary, &y));
    Ok(vec![RopeTable::plain(theta, rotary), compressed])
}

fn parse(c: &Fields<'_>) -> Result<ModelSpec, ModelError> {
    let hidden = c.size("hidden_size")?;
    let layers = c.layers(None)?;
    let (heads, dim) = (c.size("num_attention_heads")?, c.size_or("head_dim", 512)?);
    for (key, allowed) in [
        ("hidden_act", json!("silu")),
        ("attention_bias", json!(false)),
        ("mlp_bias", json!(false)),
        ("num_key_value_heads", json!(1)),
        ("n_shared_experts", json!(1)),
        ("scoring_func", json!("sqrtsoftplus")),
        ("topk_method", json!("noaux_tc")),
        ("norm_topk_prob", json!(true)),
    ] {
        c.only(key, &allowed)?;
    }
    // How experts are stored: their tensors say so.
    c.get("expert_dtype");
    let rotary = match (c.size_opt("qk_rope_head_dim")?, c.number_opt("partial_rotary_factor")?) {
        (Some(n), _) => n,
        (None, Some(share)) => (dim as f64 * share) as usize,
        (None, None) => dim / 8,
    };
    if rotary % 2 == 1 || rotary > dim {
        return Err(c.wrong("qk_rope_head_dim", format!("is {rotary} of {dim} channels, not an even part of them")));
    }
    let (groups, o_rank) = (c.size_or("o_groups", 8)?, c.size_or("o_lora_rank", 1024)?);
    if groups == 0 || !heads.is_multiple_of(groups) {
        return Err(c.wrong("o_groups", format!("is {groups}, which does not divide {heads} heads")));
    }
    let index = IndexSpec { heads: c.size_or("index_n_heads", 64)?, dim: c.size_or("index_head_dim", 128)?, top_k: c.size_or("index_topk", 512)? };
    if index.heads == 0 || index.top_k == 0 || index.dim < rotary {
        return Err(c.wrong(
            "index_n_heads",
            format!("gives an index of {} heads of {} channels, {rotary} of them rotating, and {} entries", index.heads, index.dim, index.top_k),
        ));
    }
    let (window, q_rank) = (c.size_or("sliding_window", 128)?, c.size_or("q_lora_rank", 1024)?);
    if window == 0 || q_rank == 0 || o_rank == 0 {
        return Err(c.wrong("sliding_window", "and q_lora_rank and o_lora_rank must be at least 1"));
    }
    let (experts, top_k) = (c.size("n_routed_experts")?, c.size_or("num_experts_per_tok", 6)?);
    let factor = c.number_opt("routed_scaling_factor")?.unwrap_or(1.5) as f32;
    let eps = c.number_opt("rms_norm_eps")?.unwrap_or(1e-6) as f32;
    let ropes = ropes(c, rotary)?;
    let block = |ratio: usize| LatentBlock {
        attention: LatentSpec {
            heads,
            dim,
            rotary,
            window,
            scale: (dim as f32).powf(-0.5),
            eps,
            ty: KvType::F32,
            compress: (ratio > 0).then_some(CompressSpec { ratio, overlap: ratio == SPARSE, index: (ratio == SPARSE).then_some(index) }),
        },
        q_rank,
        groups,
        o_rank,
        rope: usize::from(ratio > 0),
    };
    let hyper = HyperSpec {
        streams: c.size_or("hc_mult", 4)?,
        rounds: c.size_or("hc_sinkhorn_iters", 20)?,
        eps: c.number_opt("hc_eps")?.unwrap_or(1e-6) as f32,
        norm_eps: eps,
    };
    if !(1..=8).contains(&hyper.streams) || hyper.rounds == 0 {
        return Err(c.wrong("hc_mult", format!("gives {} streams mixed in {} rounds; 1 to 8 streams are supported", hyper.streams, hyper.rounds)));
    }
    let limit = c.number_opt("swiglu_limit")?.unwrap_or(10.0) as f32;
    let inner = c.size_or("moe_intermediate_size", 2048)?;
    let hashed = hash_layers(c, layers)?;
    let moe = |layer: usize| {
        let bias = if layer < hashed { RouterBias::None } else { RouterBias::Choice };
        MoeSpec {
            activation: Activation::SwiGluClamped { limit },
            shared: Some(SharedSpec { inner, gated: false }),
            by_token: layer < hashed,
            ..MoeSpec::new(RouterSpec { experts, top_k, score: RouterScore::SqrtSoftplus, bias, renormalise: true, factor }, inner)
        }
    };
    check_router(c, &moe(0))?;
    let ratios = ratios(c, layers)?;
    let spec = ModelSpec {
        hidden,
        vocab: c.size("vocab_size")?,
        eps,
        embed_scale: 1.0,
        logit_cap: None,
        post_norms: false,
        layer_scale: false,
        ropes,
        max_positions: c.size_or("max_position_embeddings", 1 << 20)?,
        tied: c.flag_or("tie_word_embeddings", false)?,
        hyper: Some(hyper),
        layers: ratios.iter().enumerate().map(|(i, &ratio)| LayerSpec { mixer: MixerSpec::Latent(block(ratio)), ffn: FfnSpec::Moe(moe(i)) }).collect(),
    };
    c.finish()?;
    Ok(spec)
}
