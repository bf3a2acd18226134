//! Which sampling a request gets: what it says, else the checkpoint's generation_config, else plain sampling.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::path::Path;

use mach_engine::Sampling;
use mach_text::{TextError, read_json};
use serde_json::Value;

/// What a checkpoint wants when a request says nothing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Ids that end a turn: generation_config's first, then config's.
    pub eos: Vec<u32>,
    /// Sampling of generation_config; `do_sample: false` is temperature 0.
    pub sampling: SamplingOverrides,
}

impl GenerationDefaults {
    /// Reads `generation_config.json` and the end tokens of `config.json`; either may be absent.
    ///
    /// # Errors
    /// [`TextError::Read`], [`TextError::Invalid`].
    pub fn read(dir: &Path) -> Result<Self, TextError> {
        let generation = read_json(&dir.join("generation_config.json"))?.unwrap_or_default();
        let config = read_json(&dir.join("config.json"))?.unwrap_or_default();
        Ok(Self::from_json(&generation, &config))
    }

    /// The same from what these files would say.
    pub fn from_json(generation: &Value, config: &Value) -> Self {
        let mut eos = Vec::new();
        for source in [generation, config, &config["text_config"]] {
            let ids = match &source["eos_token_id"] {
                Value::Array(ids) => ids.as_slice(),
                id => std::slice::from_ref(id),
            };
            for id in ids.iter().filter_map(Value::as_u64).filter_map(|id| u32::try_from(id).ok()) {
                if !eos.contains(&id) {
                    eos.push(id);
                }
            }
        }
        let float = |key: &str| generation[key].as_f64().map(|x| x as f32);
        let temperature = if generation["do_sample"] == false { Some(0.0) } else { float("temperature") };
        let sampling = SamplingOverrides {
            temperature,
            // Negative means "all" in some files.
            top_k: generation["top_k"].as_i64().map(|k| usize::try_from(k).unwrap_or(0)),
            top_p: float("top_p"),
            min_p: float("min_p"),
            repetition_penalty: float("repetition_penalty"),
            frequency_penalty: float("frequency_penalty"),
            presence_penalty: float("presence_penalty"),
            ..SamplingOverrides::default()
        };
        Self { eos, sampling }
    }
}

/// Sampling as far as somebody said it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SamplingOverrides {
    /// 0 is arg-max.
    pub temperature: Option<f32>,
    /// 0 keeps all.
    pub top_k: Option<usize>,
    /// 1 keeps all.
    pub top_p: Option<f32>,
    /// 0 keeps all.
    pub min_p: Option<f32>,
    /// 1 is off.
    pub repetition_penalty: Option<f32>,
    /// 0 is off.
    pub frequency_penalty: Option<f32>,
    /// 0 is off.
    pub presence_penalty: Option<f32>,
    /// Added to logits, by id.
    pub logit_bias: Vec<(u32, f32)>,
    /// Key of the random draws; random when absent.
    pub seed: Option<u64>,
}

impl SamplingOverrides {
    /// What is said here, else in `defaults`, else plain sampling at temperature 1. Arg-max ignores the defaults' penalties.
    pub fn resolve(&self, defaults: &Self) -> Sampling {
        let plain = Sampling::default();
        let temperature = self.temperature.or(defaults.temperature).unwrap_or(plain.temperature);
        let nothing = Self::default();
        let penalties = if temperature <= 0.0 { &nothing } else { defaults };
        Sampling {
            temperature,
            top_k: self.top_k.or(defaults.top_k).unwrap_or(plain.top_k),
            top_p: self.top_p.or(defaults.top_p).unwrap_or(plain.top_p),
            min_p: self.min_p.or(defaults.min_p).unwrap_or(plain.min_p),
            repetition_penalty: self.repetition_penalty.or(penalties.repetition_penalty).unwrap_or(plain.repetition_penalty),
            frequency_penalty: self.frequency_penalty.or(penalties.frequency_penalty).unwrap_or(plain.frequency_penalty),
            presence_penalty: self.presence_penalty.or(penalties.presence_penalty).unwrap_or(plain.presence_penalty),
            logit_bias: self.logit_bias.clone(),
            seed: self.seed.unwrap_or_else(random_seed),
        }
    }
}

/// A seed that differs from run to run.
pub fn random_seed() -> u64 {
    RandomState::new().build_hasher().finish()
}

/// The key of choice `index` of a request: choice 0 has the request's own, the others are spread from it.
pub fn choice_seed(seed: u64, index: usize) -> u64 {
    if index == 0 {
        return seed;
    }
    // SplitMix64: one step per choice.
    let mut x = seed.wrapping_add((index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// The request wins over generation_config, which wins over plain sampling; arg-max drops only the config's penalties.
    #[test]
    fn precedence_of_sampling() {
        let config = json!({"temperature": 0.6, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1, "do_sample": true, "min_p": null});
        let defaults = GenerationDefaults::from_json(&config, &Value::Null).sampling;
        let plain = SamplingOverrides::default().resolve(&defaults);
        assert_eq!((plain.temperature, plain.top_k, plain.top_p, plain.min_p, plain.repetition_penalty), (0.6, 20, 0.9, 0.0, 1.1));

        let asked = SamplingOverrides { temperature: Some(0.0), presence_penalty: Some(0.5), seed: Some(7), ..Default::default() };
        let greedy = asked.resolve(&defaults);
        assert_eq!((greedy.temperature, greedy.repetition_penalty, greedy.presence_penalty, greedy.seed), (0.0, 1.0, 0.5, 7));
        assert_eq!(SamplingOverrides::default().resolve(&SamplingOverrides::default()).temperature, 1.0);
    }

    /// `do_sample: false` is arg-max unless the request gives a temperature.
    #[test]
    fn do_sample_false_is_arg_max() {
        let config = json!({"do_sample": false, "temperature": 0.6, "repetition_penalty": 1.3});
        let defaults = GenerationDefaults::from_json(&config, &Value::Null).sampling;
        let silent = SamplingOverrides::default().resolve(&defaults);
        assert_eq!((silent.temperature, silent.repetition_penalty), (0.0, 1.0));
        let warm = SamplingOverrides { temperature: Some(0.5), ..Default::default() }.resolve(&defaults);
        assert_eq!((warm.temperature, warm.repetition_penalty), (0.5, 1.3));
    }

    /// End tokens are the union of both files, generation_config first, nested configs included.
    #[test]
    fn end_tokens_are_a_union() {
        let eos = |generation, config| GenerationDefaults::from_json(&generation, &config).eos;
        assert_eq!(eos(json!({"eos_token_id": [5, 3]}), json!({"text_config": {"eos_token_id": 3}, "eos_token_id": 9})), [5, 3, 9]);
        assert_eq!(eos(json!({}), json!({"text_config": {"eos_token_id": 4}})), [4]);
        assert_eq!(eos(Value::Null, json!({"eos_token_id": null})), Vec::<u32>::new());
    }

    /// Choice 0 equals a single choice; the others differ.
    #[test]
    fn choices_have_their_own_seeds() {
        assert_eq!(choice_seed(42, 0), 42);
        let seeds: std::collections::HashSet<u64> = (0..100).map(|i| choice_seed(42, i)).collect();
        assert_eq!(seeds.len(), 100);
        assert_ne!(random_seed(), random_seed());
    }
}
