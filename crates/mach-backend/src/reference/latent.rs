//! Latent attention, token by token.

use super::{State, Tensor, dot, rms, round};
use crate::latent::{CompressSpec, EntrySpec, LatentRows, LatentSegment, LatentSpec, LatentStores, LatentWeights, PoolRows, PoolWeights};

/// Entries per block, one after another.
pub struct Entries {
    spec: EntrySpec,
    blocks: Vec<Vec<f32>>,
}

impl Entries {
    pub(super) fn new(spec: EntrySpec) -> Self {
        Self { spec, blocks: Vec::new() }
    }

    pub(super) fn grow(&mut self, blocks: usize) {
        while self.blocks.len() < blocks {
            self.blocks.push(vec![0.0; self.spec.per_block() * self.spec.width]);
        }
    }

    fn place(&self, table: &[u32], n: usize) -> (usize, std::ops::Range<usize>) {
        let (block, slot) = self.spec.place(n);
        (table[block] as usize, slot * self.spec.width..(slot + 1) * self.spec.width)
    }

    fn entry(&self, table: &[u32], n: usize) -> &[f32] {
        let (block, at) = self.place(table, n);
        &self.blocks[block][at]
    }

    fn put(&mut self, table: &[u32], n: usize, values: &[f32]) {
        let (block, at) = self.place(table, n);
        let ty = self.spec.ty;
        self.blocks[block][at].iter_mut().zip(values).for_each(|(o, &x)| *o = round(ty, x));
    }
}

/// Keys and gates of a run that is not complete, and what the run before left for it.
#[derive(Clone, Default)]
struct Open {
    rows: Vec<(Vec<f32>, Vec<f32>)>,
    before: Vec<(Vec<f32>, Vec<f32>)>,
}

impl Open {
    /// Takes one token; the entry, not yet rotated, where the token completes one.
    fn push(&mut self, spec: &CompressSpec, w: &PoolWeights<'_, Tensor>, rows: &PoolRows<'_, Tensor>, row: usize, eps: f32) -> Option<Vec<f32>> {
        let dim = w.norm.cols;
        let gate = rows.gate.row(row).iter().zip(w.position_bias.row(self.rows.len())).map(|(g, b)| g + b).collect();
        self.rows.push((rows.kv.row(row).to_vec(), gate));
        if self.rows.len() < spec.ratio {
            return None;
        }
        let own = spec.width(dim) - dim;
        let part = |rows: &[(Vec<f32>, Vec<f32>)], at: usize| -> Vec<(Vec<f32>, Vec<f32>)> {
            rows.iter().map(|(k, g)| (k[at..at + dim].to_vec(), g[at..at + dim].to_vec())).collect()
        };
        let slots = [std::mem::take(&mut self.before), part(&self.rows, own)].concat();
        if spec.overlap {
            self.before = part(&self.rows, 0);
        }
        self.rows.clear();
        let mut entry: Vec<f32> = (0..dim)
            .map(|c| {
                let max = slots.iter().map(|(_, g)| g[c]).fold(f32::NEG_INFINITY, f32::max);
                let exp: Vec<f32> = slots.iter().map(|(_, g)| (g[c] - max).exp()).collect();
                let sum: f32 = exp.iter().sum();
                slots.iter().zip(exp).map(|((k, _), e)| k[c] * e / sum).sum()
            })
            .collect();
        let inv = rms(&entry, eps);
        entry.iter_mut().zip(w.norm.row(0)).for_each(|(x, w)| *x = *x * inv * w);
        Some(entry)
    }
}

/// What a sequence keeps of one layer.
#[derive(Clone, Default)]
pub struct LatentState {
    /// The last tokens' vectors, oldest first.
    window: Vec<Vec<f32>>,
    entries: Open,
    index: Open,
}

/// Pairs `(2j, 2j + 1)` of the last channels; backwards with `sign` −1.
fn rotate_tail(x: &mut [f32], cos_sin: &[f32], sign: f32) {
    let half = cos_sin.len() / 2;
    let first = x.len() - 2 * half;
    for j in 0..half {
        let (c, s, a, b) = (cos_sin[j], sign * cos_sin[half + j], x[first + 2 * j], x[first + 2 * j + 1]);
        x[first + 2 * j] = a * c - b * s;
        x[first + 2 * j + 1] = a * s + b * c;
    }
}

pub(super) fn attention(
    spec: &LatentSpec,
    w: &LatentWeights<'_, Tensor>,
    rows: &mut LatentRows<'_, Tensor>,
    segments: &mut [LatentSegment<'_, State>],
    stores: &mut LatentStores<'_, Entries>,
    out: &mut Tensor,
) {
    for s in segments {
        let State::Latent(state) = &mut *s.state else { panic!("the state of another layer") };
        let mut entry_row = s.entry_row;
        for r in s.row..s.row + s.rows {
            let (pos, cos_sin) = (s.pos + r - s.row, rows.rope.row(r));
            for head in rows.q.row_mut(r).chunks_exact_mut(spec.dim) {
                let inv = rms(head, spec.eps);
                head.iter_mut().for_each(|x| *x *= inv);
                rotate_tail(head, cos_sin, 1.0);
            }
            let kv = rows.kv.row_mut(r);
            let inv = rms(kv, spec.eps);
            kv.iter_mut().zip(w.kv_norm.row(0)).for_each(|(x, w)| *x = *x * inv * w);
            rotate_tail(kv, cos_sin, 1.0);
            if state.window.len() == spec.window {
                state.window.remove(0);
            }
            state.window.push(kv.iter().map(|&x| round(spec.ty, x)).collect());

            let mut visible: Vec<usize> = Vec::new();
            if let (Some(c), Some(pool), Some(weights), Some(store)) = (&spec.compress, &rows.entries, &w.entries, &mut stores.entries) {
                let complete = c.complete(pos + 1);
                let closed = state.entries.push(c, weights, pool, r, spec.eps);
                if let Some(mut entry) = closed {
                    rotate_tail(&mut entry, rows.entry_rope.row(entry_row), 1.0);
                    store.put(s.blocks, complete - 1, &entry);
                }
                visible.extend(0..complete);
                if let (Some(i), Some(x), Some(weights), Some(store)) = (&c.index, &mut rows.index, &w.index, &mut stores.index) {
                    if let Some(mut key) = state.index.push(c, weights, &x.pool, r, spec.eps) {
                        rotate_tail(&mut key, rows.entry_rope.row(entry_row), 1.0);
                        store.put(s.blocks, complete - 1, &key);
                    }
                    x.q.row_mut(r).chunks_exact_mut(i.dim).for_each(|q| rotate_tail(q, cos_sin, 1.0));
                    let score = |n: usize| -> f32 {
                        let key = store.entry(s.blocks, n);
                        x.q.row(r).chunks_exact(i.dim).zip(x.weights.row(r)).map(|(q, w)| w * dot(q, key).max(0.0)).sum()
                    };
                    let mut scored: Vec<(f32, usize)> = visible.iter().map(|&n| (score(n), n)).collect();
                    scored.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
                    visible = scored.into_iter().take(i.top_k).map(|(_, n)| n).collect();
                    visible.sort_unstable();
                }
                entry_row += usize::from((pos + 1).is_multiple_of(c.ratio));
            }
            let keys: Vec<&[f32]> = {
                let store = stores.entries.as_deref();
                let chosen = visible.iter().filter_map(|&n| store.map(|e| e.entry(s.blocks, n)));
                state.window.iter().map(Vec::as_slice).chain(chosen).collect()
            };
            for h in 0..spec.heads {
                let q = &rows.q.row(r)[h * spec.dim..(h + 1) * spec.dim];
                let scores: Vec<f32> = keys.iter().map(|k| dot(q, k) * spec.scale).collect();
                let sink = w.sinks.row(0)[h];
                let max = scores.iter().copied().fold(sink, f32::max);
                let exp: Vec<f32> = scores.iter().map(|s| (s - max).exp()).collect();
                let sum: f32 = (sink - max).exp() + exp.iter().sum::<f32>();
                let o = &mut out.row_mut(r)[h * spec.dim..(h + 1) * spec.dim];
                o.fill(0.0);
                for (k, e) in keys.iter().zip(exp) {
                    o.iter_mut().zip(*k).for_each(|(o, k)| *o += e / sum * k);
                }
                rotate_tail(o, cos_sin, -1.0);
            }
        }
    }
}
