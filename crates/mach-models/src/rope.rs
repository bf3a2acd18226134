//! Frequencies of rotary embeddings, plain and stretched by YaRN (arXiv 2309.00071).

use crate::ModelError;
use crate::config::Fields;

/// `theta^(−2j/dims)` for every rotating pair.
pub fn frequencies(theta: f64, dims: usize) -> Vec<f64> {
    (0..dims / 2).map(|j| theta.powf(-((2 * j) as f64) / dims as f64)).collect()
}

/// A stretch of the positions: high frequencies stay, low ones are divided, those between are blended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Yarn {
    /// By how much low frequencies are divided.
    pub factor: f64,
    /// Positions that the model was made for before.
    pub original: f64,
    /// Turns over those positions from which on a frequency stays, and up to which it is divided.
    pub turns: [f64; 2],
    /// Whether the ends of the blend are rounded to whole pairs.
    pub truncate: bool,
    /// Factor on cos and sin; `None`: `0.1 ln factor + 1`.
    pub attention_factor: Option<f64>,
}

impl Yarn {
    /// Reads the fields of a `rope_scaling` or `rope_parameters` object; `None` where its type is `default`.
    ///
    /// # Errors
    /// Other types, missing or unusable numbers.
    pub fn read(r: &Fields<'_>) -> Result<Option<Self>, ModelError> {
        let kind = match (r.text_opt("rope_type")?, r.text_opt("type")?) {
            (Some(a), Some(b)) if a != b => return Err(r.wrong("type", format!("is {b}, but rope_type is {a}"))),
            (a, b) => a.or(b).unwrap_or("default"),
        };
        match kind {
            "default" => return Ok(None),
            "yarn" => {}
            _ => return Err(r.unsupported("rope_type", "only `default` and `yarn` are supported for this family")),
        }
        let number = |key: &'static str, default: f64| Ok::<_, ModelError>(r.number_opt(key)?.unwrap_or(default));
        let yarn = Self {
            factor: r.number_opt("factor")?.ok_or_else(|| r.wrong("factor", "is missing"))?,
            original: r.size("original_max_position_embeddings")? as f64,
            turns: [number("beta_fast", 32.0)?, number("beta_slow", 1.0)?],
            truncate: r.flag_or("truncate", true)?,
            attention_factor: r.number_opt("attention_factor")?,
        };
        if yarn.factor < 1.0 || yarn.turns.iter().any(|t| !t.is_finite() || *t <= 0.0) {
            return Err(r.wrong("factor", format!("is {} with beta {:?}; a stretch is at least 1", yarn.factor, yarn.turns)));
        }
        Ok(Some(yarn))
    }

    /// Frequencies of `dims` rotating channels.
    pub fn frequencies(&self, theta: f64, dims: usize) -> Vec<f64> {
        let pair = |turns: f64| dims as f64 * (self.original / (turns * std::f64::consts::TAU)).ln() / (2.0 * theta.ln());
        let [mut low, mut high] = self.turns.map(pair);
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(dims as f64 - 1.0));
        if low == high {
            high += 0.001;
        }
        let blend = |(j, inv): (usize, f64)| {
            let divided = ((j as f64 - low) / (high - low)).clamp(0.0, 1.0);
            inv / self.factor * divided + inv * (1.0 - divided)
        };
        frequencies(theta, dims).into_iter().enumerate().map(blend).collect()
    }

    /// Factor on cos and sin.
    pub fn angle_factor(&self) -> f64 {
        self.attention_factor.unwrap_or_else(|| 0.1 * self.factor.ln() + 1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Protects long contexts: gpt-oss's blend lies between pairs 8.09 and 17.40 of 32, its factor on angles is 1.3466.
    #[test]
    fn the_blend_of_gpt_oss() {
        let yarn = Yarn { factor: 32.0, original: 4096.0, turns: [32.0, 1.0], truncate: false, attention_factor: None };
        let (plain, stretched) = (frequencies(150_000.0, 64), yarn.frequencies(150_000.0, 64));
        let share = |j: usize| stretched[j] / plain[j];
        assert!((0..=8).all(|j| share(j) == 1.0) && share(9) < 1.0, "{:?}", share(9));
        assert!(share(17) > 1.0 / 32.0 && (18..32).all(|j| (share(j) - 1.0 / 32.0).abs() < 1e-12));
        assert!((yarn.angle_factor() - 1.346_574).abs() < 1e-6);
        // Rounded ends: pair 8 is where it begins, 18 where it ends.
        let rounded = Yarn { truncate: true, ..yarn }.frequencies(150_000.0, 64);
        assert!(rounded[8] == plain[8] && rounded[9] < plain[9] && rounded[17] / plain[17] > 1.0 / 32.0);
    }
}
