//! Expert choices that look like those of trained models, for models of random weights: some experts are popular, and a
//! token shares experts with the one before.
//!
//! Measured on trained models with 8 of 256 experts: a layer's experts of the next token overlap by 35 %, the most used
//! tenth takes half of the routes, eight tokens in a row use 38 different experts. A fixed seed makes the same choices
//! every time, so this is a trace that needs no file.

use std::sync::{Arc, Mutex};

use mach_models::ForcedRoutes;

use crate::rates::Xorshift;

/// Chance that an expert is used again by the next token.
const KEEP: f32 = 0.30;
/// Popularity of the expert of rank r: (r + SHIFT)^-SKEW, ranks scaled to 256 experts.
const SHIFT: f64 = 7.0;
const SKEW: f64 = 1.2;

/// The choices of one layer.
struct Layer {
    random: Xorshift,
    /// Experts by rank of popularity.
    order: Vec<u32>,
    last: Vec<u32>,
}

/// Choices for layers of `experts`, `top_k` at a time, the same for every instance.
pub(crate) struct Realistic {
    layers: Vec<Layer>,
    /// Cumulated popularity by rank.
    popular: Vec<f64>,
    top_k: usize,
}

impl Realistic {
    pub fn new(layers: usize, experts: usize, top_k: usize) -> Self {
        let scale = 256.0 / experts.max(1) as f64;
        let mut popular: Vec<f64> = (0..experts).map(|rank| (rank as f64 * scale + SHIFT).powf(-SKEW)).collect();
        (1..experts).for_each(|rank| popular[rank] += popular[rank - 1]);
        let layer = |layer: usize| {
            let mut random = Xorshift::new(0x7261_6e6b ^ layer as u64);
            let mut order: Vec<u32> = (0..experts as u32).collect();
            (1..experts).rev().for_each(|i| order.swap(i, random.below(i + 1)));
            Layer { random, order, last: Vec::new() }
        };
        Self { layers: (0..layers).map(layer).collect(), popular, top_k }
    }

    /// The next tokens of a layer: fills `ids` `[rows, k]`, distinct within a row.
    pub fn choose(&mut self, layer: usize, ids: &mut [u32]) {
        let Layer { random, order, last } = &mut self.layers[layer];
        let all = self.popular.last().copied().unwrap_or(0.0);
        for row in ids.chunks_exact_mut(self.top_k) {
            let mut used: Vec<u32> = last.iter().copied().filter(|_| random.unit() < KEEP).collect();
            while used.len() < row.len() {
                let at = f64::from(random.unit()) * all;
                let rank = self.popular.partition_point(|&p| p <= at).min(order.len() - 1);
                if !used.contains(&order[rank]) {
                    used.push(order[rank]);
                }
            }
            row.copy_from_slice(&used);
            *last = used;
        }
    }

    /// For [`mach_models::Model::force_routes`].
    pub fn forced(mut self) -> ForcedRoutes {
        Arc::new(Mutex::new(move |layer: usize, ids: &mut [u32]| self.choose(layer, ids)))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use super::*;

    /// Protects what `--routing realistic` stands for: the statistics of trained models with 8 of 256 experts.
    #[test]
    fn statistics_of_trained_models() {
        let (layers, tokens) = (8, 1000);
        let mut routing = Realistic::new(layers, 256, 8);
        let mut pairs = (0, 0);
        let (mut unions, mut tops) = (Vec::new(), Vec::new());
        for layer in 0..layers {
            let mut ids = vec![0u32; tokens * 8];
            // Passes of several widths, as prompts and decoding come.
            let (a, b) = ids.split_at_mut(8 * 300);
            routing.choose(layer, a);
            b.chunks_exact_mut(8).for_each(|row| routing.choose(layer, row));
            let rows: Vec<HashSet<u32>> = ids.chunks_exact(8).map(|r| r.iter().copied().collect()).collect();
            assert!(rows.iter().all(|r| r.len() == 8 && r.iter().all(|&e| e < 256)));
            pairs.0 += rows.windows(2).map(|w| w[0].intersection(&w[1]).count()).sum::<usize>();
            pairs.1 += 8 * (tokens - 1);
            unions.extend(ids.chunks_exact(64).map(|r| r.iter().collect::<HashSet<_>>().len()));
            let mut counts: Vec<usize> = ids
                .iter()
                .fold(HashMap::<u32, usize>::new(), |mut c, &e| {
                    *c.entry(e).or_default() += 1;
                    c
                })
                .into_values()
                .collect();
            counts.sort_unstable_by(|a, b| b.cmp(a));
            tops.push(counts.iter().take(26).sum::<usize>() as f64 / ids.len() as f64);
        }
        let overlap = pairs.0 as f64 / pairs.1 as f64;
        let union = unions.iter().sum::<usize>() as f64 / unions.len() as f64;
        let top = tops.iter().sum::<f64>() / layers as f64;
        assert!((overlap - 0.35).abs() < 0.04 && (top - 0.50).abs() < 0.04 && (union - 38.0).abs() < 4.0, "{overlap} {top} {union}");
    }

    /// Protects comparisons between runs: the same choices every time, different ones in every layer, and small shapes work.
    #[test]
    fn the_same_every_time() {
        let choose = |layer: usize| {
            let mut ids = [0; 64];
            Realistic::new(3, 256, 8).choose(layer, &mut ids);
            ids
        };
        assert_eq!(choose(1), choose(1));
        assert_ne!(choose(1), choose(2));
        let mut all = [9; 4];
        Realistic::new(1, 4, 4).choose(0, &mut all);
        all.sort_unstable();
        assert_eq!(all, [0, 1, 2, 3]);
    }
}
