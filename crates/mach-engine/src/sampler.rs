//! From a logits row to a token: bias, penalties, temperature, truncation, keyed Gumbel arg-max.

use std::collections::HashMap;

use crate::api::Sampling;
use crate::rng::gumbel;

/// Counts tokens for the penalties and draws.
pub struct Sampler {
    params: Sampling,
    /// Occurrences in the prompt (for the repetition penalty only).
    prompt: HashMap<u32, u32>,
    generated: HashMap<u32, u32>,
}

impl Sampler {
    /// A sampler for one request.
    pub fn new(params: Sampling, prompt: &[u32]) -> Self {
        let mut seen = HashMap::new();
        if params.repetition_penalty != 1.0 {
            prompt.iter().for_each(|&id| *seen.entry(id).or_default() += 1);
        }
        Self { params, prompt: seen, generated: HashMap::new() }
    }

    /// Counts a generated token.
    pub fn accept(&mut self, id: u32) {
        *self.generated.entry(id).or_default() += 1;
    }

    /// Adds `logit_bias`, before a policy masks.
    pub fn bias(&self, logits: &mut [f32]) {
        for &(id, bias) in &self.params.logit_bias {
            if let Some(l) = logits.get_mut(id as usize) {
                *l += bias;
            }
        }
    }

    /// Chooses the token at absolute `position` from biased and masked logits, which are changed. NaN counts as −∞.
    pub fn choose(&self, logits: &mut [f32], position: u64) -> u32 {
        self.penalise(logits);
        let p = &self.params;
        if p.temperature <= 1e-5 {
            return arg_max(logits.iter().copied().map(f64::from));
        }
        let scale = 1.0 / f64::from(p.temperature);
        if p.top_k == 0 && p.top_p >= 1.0 && p.min_p <= 0.0 {
            return arg_max(logits.iter().enumerate().map(|(id, &l)| f64::from(l) * scale + gumbel(p.seed, position, id as u32)));
        }
        let kept = self.truncate(logits, scale);
        let best = arg_max(kept.iter().map(|&(id, l)| f64::from(l) * scale + gumbel(p.seed, position, id)));
        kept[best as usize].0
    }

    fn penalise(&self, logits: &mut [f32]) {
        let p = &self.params;
        if p.repetition_penalty != 1.0 {
            for id in self.prompt.keys().chain(self.generated.keys().filter(|id| !self.prompt.contains_key(id))) {
                let l = &mut logits[*id as usize];
                *l = if *l > 0.0 { *l / p.repetition_penalty } else { *l * p.repetition_penalty };
            }
        }
        if p.frequency_penalty != 0.0 || p.presence_penalty != 0.0 {
            for (&id, &count) in &self.generated {
                logits[id as usize] -= p.frequency_penalty * count as f32 + p.presence_penalty;
            }
        }
    }

    /// Candidates after top-k, top-p and min-p on the tempered distribution, most likely first, at least one.
    fn truncate(&self, logits: &[f32], scale: f64) -> Vec<(u32, f32)> {
        let p = &self.params;
        let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        let mut all: Vec<(u32, f32)> = logits.iter().enumerate().filter(|(_, l)| !l.is_nan() && **l > f32::NEG_INFINITY).map(|(i, &l)| (i as u32, l)).collect();
        if all.is_empty() {
            return vec![(0, 0.0)];
        }
        if p.top_k > 0 && p.top_k < all.len() {
            all.select_nth_unstable_by(p.top_k - 1, order);
            all.truncate(p.top_k);
        }
        let max = all.iter().map(|c| c.1).fold(f32::NEG_INFINITY, f32::max);
        let weight = |l: f32| (f64::from(l - max) * scale).exp();
        if p.min_p > 0.0 {
            all.retain(|c| weight(c.1) >= f64::from(p.min_p));
        }
        all.sort_unstable_by(order);
        if p.top_p < 1.0 {
            let total: f64 = all.iter().map(|c| weight(c.1)).sum();
            let mut mass = 0.0;
            let keep = all.iter().position(|c| {
                mass += weight(c.1);
                mass >= f64::from(p.top_p) * total
            });
            all.truncate(keep.map_or(all.len(), |i| i + 1));
        }
        all
    }
}

/// Index of the largest value; the lowest wins ties, NaN loses.
fn arg_max(values: impl Iterator<Item = f64>) -> u32 {
    let mut best = (0, f64::NEG_INFINITY);
    for (i, v) in values.enumerate() {
        if v > best.1 {
            best = (i as u32, v);
        }
    }
    best.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(params: Sampling, logits: &[f32], position: u64) -> u32 {
        Sampler::new(params, &[]).choose(&mut logits.to_vec(), position)
    }

    /// Protects greedy decoding: arg-max, lowest id on ties.
    #[test]
    fn temperature_zero_is_arg_max() {
        let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
        assert_eq!(choose(greedy.clone(), &[1.0, 3.0, 3.0, f32::NAN], 0), 1);
        assert_eq!(choose(greedy, &[f32::NEG_INFINITY, -5.0], 0), 1);
    }

    /// Protects the distribution: keyed draws follow softmax(logits / T) within three standard errors.
    #[test]
    fn draws_follow_the_tempered_distribution() {
        let logits = [0.0f32, 1.0, 2.0, -1.0];
        let n = 20_000u64;
        for temperature in [1.0f32, 0.5] {
            let weights: Vec<f64> = logits.iter().map(|l| f64::from(l / temperature).exp()).collect();
            let total: f64 = weights.iter().sum();
            let mut counts = [0u64; 4];
            (0..n).for_each(|i| counts[choose(Sampling { temperature, seed: 11, ..Sampling::default() }, &logits, i) as usize] += 1);
            for (count, weight) in counts.iter().zip(&weights) {
                let p = weight / total;
                let error = (*count as f64 / n as f64 - p).abs();
                assert!(error < 3.5 * (p * (1.0 - p) / n as f64).sqrt() + 1e-4, "{counts:?} {weights:?}");
            }
        }
    }

    /// Protects truncation: top-k, top-p and min-p keep the sets they are defined to keep, never none.
    #[test]
    fn truncation_keeps_the_right_sets() {
        let logits = [0.4f32.ln(), 0.3f32.ln(), 0.2f32.ln(), 0.1f32.ln()];
        let kept = |params: Sampling| -> Vec<u32> { Sampler::new(params, &[]).truncate(&logits, 1.0).iter().map(|c| c.0).collect() };
        assert_eq!(kept(Sampling { top_k: 2, ..Sampling::default() }), [0, 1]);
        assert_eq!(kept(Sampling { top_p: 0.69, ..Sampling::default() }), [0, 1]);
        assert_eq!(kept(Sampling { top_p: 0.71, ..Sampling::default() }), [0, 1, 2]);
        assert_eq!(kept(Sampling { min_p: 0.6, ..Sampling::default() }), [0, 1]);
        assert_eq!(kept(Sampling { top_p: 0.0, ..Sampling::default() }), [0]);
    }

    /// Protects truncated draws from depending on how they were truncated: the same noise decides.
    #[test]
    fn a_truncated_draw_equals_the_plain_one_when_it_is_kept() {
        let logits = [1.0f32, 0.9, 0.8, -9.0];
        for position in 0..200 {
            let plain = choose(Sampling { seed: 3, ..Sampling::default() }, &logits, position);
            if plain < 3 {
                assert_eq!(choose(Sampling { seed: 3, top_k: 3, ..Sampling::default() }, &logits, position), plain);
            }
        }
    }

    /// Protects penalties: repetition counts the prompt, frequency and presence only what was generated.
    #[test]
    fn penalties() {
        let params = Sampling { temperature: 0.0, repetition_penalty: 2.0, frequency_penalty: 0.5, presence_penalty: 1.0, ..Sampling::default() };
        let mut s = Sampler::new(params, &[0]);
        s.accept(1);
        s.accept(1);
        let mut logits = [4.0, 8.0, -1.0];
        s.penalise(&mut logits);
        assert_eq!(logits, [2.0, 8.0 / 2.0 - 2.0 * 0.5 - 1.0, -1.0]);
    }
}
