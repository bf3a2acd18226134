//! The families, as data. Listings, docs, checks and the memory plan are loops over [`REGISTRY`].

use mach_format::Checkpoint;
use serde_json::Value;

use crate::ModelError;
use crate::config::Fields;
use crate::families;
use crate::gguf::GgufArch;
use crate::spec::ModelSpec;
use crate::tensors::WeightNames;

/// What mach knows of a family.
pub struct MoeArchAdapter {
    /// `model_type` of the checkpoints.
    pub model_type: &'static str,
    /// Other spellings of it (inner text configs, text-only exports).
    pub aliases: &'static [&'static str],
    /// A checkpoint to think of.
    pub reference: &'static str,
    /// Activation of the experts.
    pub activation: &'static str,
    /// Experts lie stacked in one tensor in the published checkpoints.
    pub stacked: bool,
    /// Experts have biases.
    pub expert_bias: bool,
    /// The text model sits inside a multimodal wrapper.
    pub wrapped: bool,
    /// Bits of the usual quantised release.
    pub bits: u8,
    /// Group of it.
    pub group_size: u16,
    /// Expert layouts that are read.
    pub layouts: &'static [&'static str],
    /// One line for people.
    pub notes: &'static str,
    /// Norm weights are stored as `w` of `1 + w`.
    pub one_plus_norm: bool,
    /// Experts may be streamed from the checkpoint itself; else a sidecar or pack must be built first.
    pub streams_checkpoint: bool,
    /// Tensor names.
    pub names: &'static WeightNames,
    /// The family in GGUF files.
    pub gguf: &'static GgufArch,
    /// Reads the config of the text model.
    pub parse: fn(&Fields<'_>) -> Result<ModelSpec, ModelError>,
}

impl MoeArchAdapter {
    /// The facts as JSON, for `mach archs --json`.
    pub fn to_json(&self) -> Value {
        serde_json::json!({
            "model_type": self.model_type, "reference": self.reference, "activation": self.activation, "stacked": self.stacked,
            "expert_bias": self.expert_bias, "wrapped": self.wrapped, "bits": self.bits, "group_size": self.group_size,
            "layouts": self.layouts, "gguf": self.gguf.name, "notes": self.notes,
        })
    }
}

/// Every family that runs.
pub static REGISTRY: &[&MoeArchAdapter] =
    &[&families::qwen3_5_moe::ADAPTER, &families::qwen3_moe::ADAPTER, &families::gpt_oss::ADAPTER, &families::gemma4::ADAPTER, &families::deepseek_v4::ADAPTER];

/// The family of a config (its own `model_type`, or that of its `text_config`).
///
/// # Errors
/// [`ModelError::UnknownArch`], or a missing `model_type`.
pub fn detect_arch(config: &Value) -> Result<&'static MoeArchAdapter, ModelError> {
    let own = config.get("model_type").and_then(Value::as_str);
    let inner = config.get("text_config").and_then(|t| t.get("model_type")).and_then(Value::as_str);
    let find = |name: &str| REGISTRY.iter().copied().find(|a| a.model_type == name || a.aliases.contains(&name));
    match own.or(inner) {
        Some(name) => find(name).or_else(|| inner.and_then(find)).ok_or_else(|| ModelError::UnknownArch {
            model_type: name.to_owned(),
            known: REGISTRY.iter().map(|a| a.model_type).collect::<Vec<_>>().join(", "),
        }),
        None => Err(ModelError::ConfigField { field: "model_type".to_owned(), problem: "is missing".to_owned() }),
    }
}

/// Detects the family of a checkpoint and reads its spec.
///
/// # Errors
/// Unknown families, fields that are missing, wrong or not understood.
pub fn read_spec(ck: &Checkpoint) -> Result<(&'static MoeArchAdapter, ModelSpec), ModelError> {
    spec_of(ck.config())
}

/// [`read_spec`] on a bare config.
///
/// # Errors
/// As [`read_spec`].
pub fn spec_of(config: &Value) -> Result<(&'static MoeArchAdapter, ModelSpec), ModelError> {
    let arch = detect_arch(config)?;
    let spec = match config.get("text_config") {
        Some(inner) => {
            let outer = Fields::new(config, "")?;
            let inner = Fields::new(inner, "text_config")?;
            let mut spec = (arch.parse)(&inner)?;
            // Either level may say that the head is tied.
            spec.tied |= outer.flag_or("tie_word_embeddings", false)? && inner.get("tie_word_embeddings").is_none();
            outer.finish()?;
            spec
        }
        None => (arch.parse)(&Fields::new(config, "")?)?,
    };
    Ok((arch, spec))
}
