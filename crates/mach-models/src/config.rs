//! Strict reading of `config.json`: every field is read, known to be without effect, or reported.

use std::cell::RefCell;
use std::collections::HashSet;

use serde_json::{Map, Value};

use crate::ModelError;

/// More layers than any model has.
pub(crate) const MAX_LAYERS: usize = 4096;

/// Fields that Hugging Face writes everywhere and that do not change the forward pass of a text model.
const INERT: &[&str] = &[
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "image_token_id",
    "initializer_range",
    "is_encoder_decoder",
    "label2id",
    "language_model_only",
    "max_window_layers",
    "model_type",
    "mtp_num_hidden_layers",
    "mtp_use_dedicated_embeddings",
    "num_nextn_predict_layers",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "problem_type",
    "quantization",
    "quantization_config",
    "return_dict",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "text_config",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "use_return_dict",
    "video_token_id",
    "vision_config",
    "vision_end_token_id",
    "vision_start_token_id",
    "vocab_size_in_config",
    "weight_convention",
];

/// Parts of a name that make an unknown field suspicious: it probably changes the maths.
const SUSPICIOUS: &[&str] = &[
    "activation",
    "act_",
    "_act",
    "alpha",
    "attention",
    "attn",
    "bias",
    "cap",
    "clip",
    "conv",
    "decay",
    "dense",
    "dim",
    "expert",
    "factor",
    "ffn",
    "gate",
    "group",
    "head",
    "hidden",
    "interval",
    "kernel",
    "kv",
    "layer",
    "limit",
    "linear",
    "logit",
    "lora",
    "mamba",
    "mlp",
    "moe",
    "multiplier",
    "norm",
    "position",
    "rank",
    "residual",
    "rope",
    "rotary",
    "router",
    "scal",
    "shared",
    "sink",
    "size",
    "sliding",
    "softcap",
    "sparse",
    "state",
    "step",
    "swiglu",
    "temperature",
    "theta",
    "tie",
    "topk",
    "top_k",
    "window",
    "yarn",
];

/// Reads fields of one JSON object and remembers which were asked for.
pub struct Fields<'a> {
    object: &'a Map<String, Value>,
    path: String,
    seen: RefCell<HashSet<&'static str>>,
}

impl<'a> Fields<'a> {
    /// Fields of `value`, which stands at `path` (empty for the top).
    ///
    /// # Errors
    /// When it is not an object.
    pub fn new(value: &'a Value, path: &str) -> Result<Self, ModelError> {
        let object = value.as_object().ok_or_else(|| ModelError::ConfigField { field: path.to_owned(), problem: "is not an object".to_owned() })?;
        Ok(Self { object, path: path.to_owned(), seen: RefCell::default() })
    }

    fn name(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    /// An error about `key`.
    pub fn wrong(&self, key: &str, problem: impl Into<String>) -> ModelError {
        ModelError::ConfigField { field: self.name(key), problem: problem.into() }
    }

    /// An error that says that the value of `key` is not supported.
    pub fn unsupported(&self, key: &str, hint: impl Into<String>) -> ModelError {
        let value = self.object.get(key).map_or_else(|| "absent".to_owned(), Value::to_string);
        ModelError::ConfigUnsupported { field: self.name(key), value, hint: hint.into() }
    }

    /// The raw value; `null` counts as absent.
    pub fn get(&self, key: &'static str) -> Option<&'a Value> {
        self.seen.borrow_mut().insert(key);
        self.object.get(key).filter(|v| !v.is_null())
    }

    /// Whether the key stands there, `null` or not.
    pub fn has(&self, key: &str) -> bool {
        self.object.contains_key(key)
    }

    fn typed<T>(&self, key: &'static str, what: &str, read: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>, ModelError> {
        self.get(key).map(|v| read(v).ok_or_else(|| self.wrong(key, format!("is {v}, not {what}")))).transpose()
    }

    /// A size, if present.
    pub fn size_opt(&self, key: &'static str) -> Result<Option<usize>, ModelError> {
        // 2^31 bounds products of two sizes well inside 64 bits.
        self.typed(key, "a size", |v| v.as_u64().filter(|&n| n <= 1 << 31).map(|n| n as usize))
    }

    /// A size of at least 1 that must be there.
    pub fn size(&self, key: &'static str) -> Result<usize, ModelError> {
        match self.size_opt(key)? {
            Some(0) => Err(self.wrong(key, "is 0")),
            Some(n) => Ok(n),
            None => Err(self.wrong(key, "is missing")),
        }
    }

    /// A size with a default.
    pub fn size_or(&self, key: &'static str, default: usize) -> Result<usize, ModelError> {
        Ok(self.size_opt(key)?.unwrap_or(default))
    }

    /// `num_hidden_layers`, bounded, since memory is taken for each of them before a tensor is looked for.
    pub fn layers(&self, default: Option<usize>) -> Result<usize, ModelError> {
        let key = "num_hidden_layers";
        match default.map_or_else(|| self.size(key), |n| self.size_or(key, n))? {
            n @ 1..=MAX_LAYERS => Ok(n),
            n => Err(self.wrong(key, format!("is {n}, not 1 to {MAX_LAYERS}"))),
        }
    }

    /// A number, if present.
    pub fn number_opt(&self, key: &'static str) -> Result<Option<f64>, ModelError> {
        self.typed(key, "a number", Value::as_f64)
    }

    /// A flag with a default.
    pub fn flag_or(&self, key: &'static str, default: bool) -> Result<bool, ModelError> {
        Ok(self.typed(key, "true or false", Value::as_bool)?.unwrap_or(default))
    }

    /// A string, if present.
    pub fn text_opt(&self, key: &'static str) -> Result<Option<&'a str>, ModelError> {
        self.typed(key, "a string", Value::as_str)
    }

    /// A list, if present.
    pub fn list_opt(&self, key: &'static str) -> Result<Option<&'a Vec<Value>>, ModelError> {
        self.typed(key, "a list", Value::as_array)
    }

    /// A nested object, if present.
    pub fn object_opt(&self, key: &'static str) -> Result<Option<Fields<'a>>, ModelError> {
        self.get(key).map(|v| Fields::new(v, &self.name(key))).transpose()
    }

    /// Fields that must be absent or have one value: anything else would change the maths.
    pub fn only(&self, key: &'static str, allowed: &Value) -> Result<(), ModelError> {
        match self.get(key) {
            Some(v) if v != allowed => Err(self.unsupported(key, format!("only {allowed} is supported"))),
            _ => Ok(()),
        }
    }

    /// Reports a field that was not asked for and smells of maths. Neutral values (false, 0, empty) pass.
    ///
    /// # Errors
    /// [`ModelError::ConfigUnsupported`] naming it.
    pub fn finish(&self) -> Result<(), ModelError> {
        let seen = self.seen.borrow();
        for (key, value) in self.object {
            let neutral = match value {
                Value::Null | Value::Bool(false) => true,
                Value::Number(n) => n.as_f64() == Some(0.0),
                Value::String(s) => s.is_empty(),
                Value::Array(a) => a.is_empty(),
                Value::Object(o) => o.is_empty(),
                Value::Bool(true) => false,
            };
            let known = seen.contains(key.as_str()) || INERT.contains(&key.as_str());
            if !known && !neutral && SUSPICIOUS.iter().any(|s| key.contains(s)) {
                return Err(self.unsupported(key, "a newer mach may know it; remove the field if it has no effect on this model"));
            }
        }
        Ok(())
    }
}

/// Plain rotary embedding: base and share of the head that rotates.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// Rotated share of the head.
    pub partial: f64,
}

/// Reads both spellings: `rope_parameters` (theta inside) and `rope_theta` + `rope_scaling`.
///
/// # Errors
/// Contradictions, unknown rope types and unknown fields.
pub fn rope(c: &Fields<'_>, default_theta: f64, default_partial: f64) -> Result<Rope, ModelError> {
    let mut theta = c.number_opt("rope_theta")?;
    let mut partial = c.number_opt("partial_rotary_factor")?;
    for key in ["rope_parameters", "rope_scaling"] {
        let Some(r) = c.object_opt(key)? else { continue };
        for key in ["rope_type", "type"] {
            if !matches!(r.text_opt(key)?, None | Some("default")) {
                return Err(r.unsupported(key, "rope types other than `default` are not supported for this family"));
            }
        }
        // Sections of the multimodal embedding: equal streams for text.
        r.get("mrope_section");
        r.get("mrope_interleaved");
        for (key, into) in [("rope_theta", &mut theta), ("partial_rotary_factor", &mut partial)] {
            if let Some(inner) = r.number_opt(key)? {
                if into.is_some_and(|outer| outer != inner) {
                    return Err(r.wrong(key, format!("is {inner}, but {} outside says otherwise", into.unwrap_or_default())));
                }
                *into = Some(inner);
            }
        }
        r.finish()?;
    }
    let rope = Rope { theta: theta.unwrap_or(default_theta), partial: partial.unwrap_or(default_partial) };
    if !(rope.theta.is_finite() && rope.theta > 0.0 && rope.partial > 0.0 && rope.partial <= 1.0) {
        return Err(c.wrong("rope_parameters", format!("gives theta {} and partial factor {}", rope.theta, rope.partial)));
    }
    Ok(rope)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Protects the memory of those who open a damaged file: a count of layers is believed up to a bound.
    #[test]
    fn layers_are_bounded() {
        let layers = |config: Value, default| Fields::new(&config, "").unwrap().layers(default).map_err(|e| e.to_string());
        assert_eq!(layers(serde_json::json!({"num_hidden_layers": 61}), None), Ok(61));
        assert_eq!(layers(serde_json::json!({}), Some(24)), Ok(24));
        assert!(layers(serde_json::json!({}), None).unwrap_err().contains("is missing"));
        for n in [0_u64, 4097, 1 << 30] {
            assert!(layers(serde_json::json!({ "num_hidden_layers": n }), Some(24)).unwrap_err().contains("not 1 to 4096"));
        }
    }

    /// Protects users from silent nonsense: what changes the maths and is not known must be named.
    #[test]
    fn unknown_maths_is_named_and_the_rest_passes() {
        let check = |v: Value| Fields::new(&v, "").unwrap().finish().map_err(|e| e.to_string());
        assert!(check(json!({"final_logit_softcapping": 30.0})).unwrap_err().contains("final_logit_softcapping"));
        assert!(check(json!({"sliding_window": 4096})).unwrap_err().contains("sliding_window"));
        check(json!({"unsloth_fixed": true, "sliding_window": null, "attention_bias": false, "vision_config": {"a": 1}})).unwrap();
    }

    /// Protects both spellings of rope and the refusal of scaling types.
    #[test]
    fn rope_spellings() {
        let read = |v: Value| rope(&Fields::new(&v, "").unwrap(), 1e4, 1.0).map_err(|e| e.to_string());
        assert_eq!(read(json!({"rope_theta": 1e6})).unwrap(), Rope { theta: 1e6, partial: 1.0 });
        assert_eq!(
            read(json!({"rope_parameters": {"rope_type": "default", "rope_theta": 5, "partial_rotary_factor": 0.25}})).unwrap(),
            Rope { theta: 5.0, partial: 0.25 }
        );
        assert!(read(json!({"rope_scaling": {"type": "yarn", "factor": 4}})).unwrap_err().contains("rope_scaling.type"));
        assert!(read(json!({"rope_theta": 1, "rope_parameters": {"rope_theta": 2}})).is_err());
        assert!(read(json!({"rope_scaling": {"rope_type": "default", "factor": 4.0}})).unwrap_err().contains("factor"));
    }
}
