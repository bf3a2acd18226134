//! Latent attention: one token after another, each spread over threads by entries and by heads.

use mach_backend::{
    CompressSpec, KV_BLOCK, KvSpec, KvType, LatentRows, LatentSegment, LatentSpec, LatentStores, LatentWeights, MERGE_SEGMENT, PoolRows, PoolWeights,
};

use super::linear::Scratch;
use super::{Context, Shared, State, grown, with_scratch};
use crate::entries::Entries;
use crate::kernels::{LANES, MAX_HEADS, PARTIAL_HEADER, SegmentArgs};
use crate::kv::Kv;
use crate::tensor::Tensor;

/// Blocks of one merge segment.
const BLOCKS: usize = MERGE_SEGMENT / KV_BLOCK;

/// What a sequence keeps of one layer.
pub struct LatentState {
    /// A ring of blocks with the last tokens.
    window: Kv,
    entries: Option<Open>,
    index: Option<Open>,
}

impl LatentState {
    pub(crate) fn new(spec: &LatentSpec) -> Self {
        let mut window = Kv::new(KvSpec { kv_heads: 1, head_dim: spec.dim, ty: spec.ty });
        window.grow(ring_blocks(spec));
        let open = |dim: usize| spec.compress.as_ref().map(|c| Open::new(c, dim));
        let index = spec.compress.and_then(|c| c.index);
        Self { window, entries: open(spec.dim), index: index.and_then(|i| open(i.dim)) }
    }

    pub(crate) fn copy_from(&mut self, src: &Self) {
        self.window.copy_from(&src.window);
        for (to, from) in [(&mut self.entries, &src.entries), (&mut self.index, &src.index)] {
            if let (Some(to), Some(from)) = (to, from) {
                to.clone_from(from);
            }
        }
    }
}

/// A window that starts anywhere touches one block more than it fills.
fn ring_blocks(spec: &LatentSpec) -> usize {
    spec.window.div_ceil(KV_BLOCK) + 1
}

/// Keys and gates of a run that is not complete, and what the run before left for it.
#[derive(Clone)]
struct Open {
    dim: usize,
    width: usize,
    /// Tokens of the run so far.
    len: usize,
    /// Whether there was a run before.
    follows: bool,
    /// `[ratio][width]` each.
    keys: Vec<f32>,
    gates: Vec<f32>,
    /// `[ratio][dim]` each, of the run before.
    keys_before: Vec<f32>,
    gates_before: Vec<f32>,
}

impl Open {
    fn new(spec: &CompressSpec, dim: usize) -> Self {
        let (width, before) = (spec.width(dim), if spec.overlap { spec.ratio * dim } else { 0 });
        let zeros = |n: usize| vec![0.0; n];
        Self {
            dim,
            width,
            len: 0,
            follows: false,
            keys: zeros(spec.ratio * width),
            gates: zeros(spec.ratio * width),
            keys_before: zeros(before),
            gates_before: zeros(before),
        }
    }

    /// Takes one token. Where it completes a run, the entry, normed and rotated, is left in `out`.
    #[allow(clippy::too_many_arguments)]
    fn push(
        &mut self,
        cx: Context<'_>,
        spec: &CompressSpec,
        w: &PoolWeights<'_, Tensor>,
        rows: &PoolRows<'_, Tensor>,
        row: usize,
        eps: f32,
        cos_sin: &[f32],
        out: &mut [f32],
    ) {
        let at = self.len * self.width;
        self.keys[at..at + self.width].copy_from_slice(rows.kv.part(row, 1));
        let gates = &mut self.gates[at..at + self.width];
        gates.copy_from_slice(rows.gate.part(row, 1));
        // SAFETY: a row of the bias is as wide as the gates.
        unsafe { (cx.k.add)(gates.as_mut_ptr(), w.position_bias.part(self.len, 1).as_ptr(), self.width) };
        self.len += 1;
        if self.len < spec.ratio {
            return;
        }
        let (dim, own) = (self.dim, self.width - self.dim);
        let slots = |before: &[f32], rows: &[f32]| -> Vec<*const f32> {
            let earlier = before.chunks_exact(dim).map(<[f32]>::as_ptr).filter(|_| self.follows);
            earlier.chain(rows.chunks_exact(self.width).map(|r| r[own..].as_ptr())).collect()
        };
        let (keys, gates) = (slots(&self.keys_before, &self.keys), slots(&self.gates_before, &self.gates));
        // SAFETY: every slot and the entry have `dim` values.
        unsafe {
            (cx.k.pool)(&keys, &gates, dim, out.as_mut_ptr());
            (cx.k.rms_norm)(out.as_ptr(), w.norm.values().as_ptr(), dim, eps, out.as_mut_ptr());
        }
        rotate_tail(out, cos_sin, 1.0);
        if spec.overlap {
            for (before, rows) in [(&mut self.keys_before, &self.keys), (&mut self.gates_before, &self.gates)] {
                before.chunks_exact_mut(dim).zip(rows.chunks_exact(self.width)).for_each(|(b, r)| b.copy_from_slice(&r[..dim]));
            }
            self.follows = true;
        }
        self.len = 0;
    }
}

/// Rotates pairs `(2j, 2j + 1)` of the last channels, backwards with `sign` −1. The same bytes on every processor: plain products
/// and sums.
fn rotate_tail(x: &mut [f32], cos_sin: &[f32], sign: f32) {
    let (cos, sin) = cos_sin.split_at(cos_sin.len() / 2);
    let first = x.len() - cos_sin.len();
    for ((pair, c), s) in x[first..].chunks_exact_mut(2).zip(cos).zip(sin) {
        let (a, b, s) = (pair[0], pair[1], sign * s);
        pair[0] = a * c - b * s;
        pair[1] = a * s + b * c;
    }
}

/// Norms and rotations of all rows, in parallel.
fn prepare(cx: Context<'_>, spec: &LatentSpec, w: &LatentWeights<'_, Tensor>, rows: &mut LatentRows<'_, Tensor>, n: usize) {
    let ones = vec![1.0; spec.dim];
    let (q_cols, rope) = (rows.q.cols(), rows.rope);
    let (q, kv) = (Shared::new(rows.q.values_mut()), Shared::new(rows.kv.values_mut()));
    let index = rows.index.as_mut().zip(spec.compress.and_then(|c| c.index)).map(|(x, i)| (x.q.cols(), i.dim, Shared::new(x.q.values_mut())));
    cx.rows(n, q_cols + spec.dim, &|r| {
        let cos_sin = rope.part(r, 1);
        // SAFETY: shapes were checked; each row is prepared once.
        unsafe {
            let normed = |at: *mut f32, weight: &[f32]| {
                (cx.k.rms_norm)(at, weight.as_ptr(), spec.dim, spec.eps, at);
                rotate_tail(std::slice::from_raw_parts_mut(at, spec.dim), cos_sin, 1.0);
            };
            (0..spec.heads).for_each(|h| normed(q.at(r * q_cols + h * spec.dim), &ones));
            normed(kv.at(r * spec.dim), w.kv_norm.values());
            if let Some((cols, dim, q)) = index {
                (0..cols / dim).for_each(|h| rotate_tail(std::slice::from_raw_parts_mut(q.at(r * cols + h * dim), dim), cos_sin, 1.0));
            }
        }
    });
}

/// The `top_k` entries of `0..complete` with the largest scores, ties to the lowest, in order.
fn choose(scores: &[f32], top_k: usize, chosen: &mut Vec<u32>) {
    chosen.clear();
    chosen.extend(0..scores.len() as u32);
    if scores.len() > top_k {
        let score = |n: &u32| scores[*n as usize];
        chosen.select_nth_unstable_by(top_k, |a, b| score(b).total_cmp(&score(a)).then(a.cmp(b)));
        chosen.truncate(top_k);
        chosen.sort_unstable();
    }
}

/// Scores of the first `n` index keys of a sequence.
fn score(cx: Context<'_>, keys: &Entries, blocks: &[u32], n: usize, q: &[f32], weights: &[f32], scores: &mut Vec<f32>) {
    let dim = keys.spec.width;
    scores.clear();
    scores.resize(n.next_multiple_of(LANES), 0.0);
    let to = Shared::new(scores);
    let group = |group: usize| {
        with_scratch(dim * (LANES + 1), |values| {
            let (key, lanes) = values.split_at_mut(dim);
            lanes.fill(0.0);
            for lane in 0..LANES.min(n - group * LANES) {
                keys.get(blocks, group * LANES + lane, key);
                key.iter().enumerate().for_each(|(d, &x)| lanes[d * LANES + lane] = x);
            }
            // SAFETY: shapes as the kernel wants them; a group has its own scores.
            unsafe { (cx.k.index_scores)(q.as_ptr(), weights.as_ptr(), weights.len(), dim, lanes.as_ptr(), to.at(group * LANES)) };
        });
    };
    let groups = n.div_ceil(LANES);
    cx.rows(groups, q.len() * LANES, &|g| group(g));
    scores.truncate(n);
}

/// Entries laid out as blocks of keys and values, in f32: `[dim][32]` keys, then `[chunk][32][16]` values.
fn gather(cx: Context<'_>, store: &Entries, blocks: &[u32], chosen: &[u32], out: &mut [f32]) {
    let dim = store.spec.width;
    let size = block_values(dim);
    let to = Shared::new(out);
    cx.rows(chosen.len().div_ceil(KV_BLOCK), size, &|b| {
        // SAFETY: a block is written by one task.
        let block = unsafe { std::slice::from_raw_parts_mut(to.at(b * size), size) };
        let (keys, values) = block.split_at_mut(dim * KV_BLOCK);
        with_scratch(KV_BLOCK * dim, |rows| {
            let some = &chosen[b * KV_BLOCK..chosen.len().min((b + 1) * KV_BLOCK)];
            for (row, &n) in rows.chunks_exact_mut(dim).zip(some) {
                store.get(blocks, n as usize, row);
            }
            // Chunk after chunk, so that what is written stays in the nearest cache.
            for (chunk, values) in values.chunks_exact_mut(KV_BLOCK * LANES).enumerate() {
                let (first, n) = (chunk * LANES, LANES.min(dim - chunk * LANES));
                for (slot, row) in rows.chunks_exact(dim).take(some.len()).enumerate() {
                    let row = &row[first..first + n];
                    values[slot * LANES..][..n].copy_from_slice(row);
                    row.iter().enumerate().for_each(|(d, &x)| keys[(first + d) * KV_BLOCK + slot] = x);
                }
            }
        });
    });
}

/// Values of one gathered block.
fn block_values(dim: usize) -> usize {
    (dim + dim.next_multiple_of(LANES)) * KV_BLOCK
}

/// Keys of one row.
struct Keys<'a> {
    window: &'a Kv,
    /// First visible token, and one past the last.
    from: usize,
    to: usize,
    /// Blocks of gathered entries.
    entries: &'a [f32],
    chosen: usize,
}

impl Keys<'_> {
    /// Calls `f` with type, blocks and visible range of every merge segment, window first.
    fn segments(&self, ring: usize, mut f: impl FnMut(KvType, [*const u8; BLOCKS], usize, usize)) {
        let base = self.from / KV_BLOCK;
        for start in (base * KV_BLOCK..self.to).step_by(MERGE_SEGMENT) {
            let mut blocks = [std::ptr::null(); BLOCKS];
            let to = (self.to - start).min(MERGE_SEGMENT);
            for (b, at) in blocks.iter_mut().enumerate().take(to.div_ceil(KV_BLOCK)) {
                *at = self.window.head(((start / KV_BLOCK + b) % ring) as u32, 0).cast_const();
            }
            f(self.window.spec.ty, blocks, self.from.saturating_sub(start), to);
        }
        let size = block_values(self.window.spec.head_dim);
        for start in (0..self.chosen).step_by(MERGE_SEGMENT) {
            let mut blocks = [std::ptr::null(); BLOCKS];
            let to = (self.chosen - start).min(MERGE_SEGMENT);
            for (b, at) in blocks.iter_mut().enumerate().take(to.div_ceil(KV_BLOCK)) {
                *at = self.entries[(start / KV_BLOCK + b) * size..].as_ptr().cast();
            }
            f(KvType::F32, blocks, 0, to);
        }
    }
}

/// All heads of one row; `out` has `heads·dim` values.
fn attend(cx: Context<'_>, spec: &LatentSpec, q: &[f32], sinks: &[f32], keys: &Keys<'_>, cos_sin: &[f32], out: &mut [f32]) {
    let (dim, partial) = (spec.dim, PARTIAL_HEADER + spec.dim.next_multiple_of(LANES));
    let to = Shared::new(out);
    cx.pool.run(spec.heads.div_ceil(MAX_HEADS), &|task| {
        let first = task * MAX_HEADS;
        let heads = (spec.heads - first).min(MAX_HEADS);
        with_scratch(2 * heads * partial, |values| {
            let (running, one) = values.split_at_mut(heads * partial);
            running.fill(0.0);
            for (head, running) in running.chunks_exact_mut(partial).enumerate() {
                (running[0], running[1]) = (sinks[first + head], 1.0);
            }
            keys.segments(ring_blocks(spec), |ty, blocks, from, to| {
                let mut queries = [std::ptr::null(); MAX_HEADS];
                let mut partials = [std::ptr::null_mut(); MAX_HEADS];
                for h in 0..heads {
                    queries[h] = q[(first + h) * dim..].as_ptr();
                    partials[h] = one[h * partial..].as_mut_ptr();
                }
                let args = SegmentArgs { ty, blocks, v_offset: dim * KV_BLOCK, head_dim: dim, from, to, scale: spec.scale, heads, q: queries, out: partials };
                // SAFETY: blocks `from..to`, query heads and partial results are valid for this shape.
                unsafe {
                    (cx.k.segment)(&args);
                    for (into, from) in running.chunks_exact_mut(partial).zip(one.chunks_exact(partial)) {
                        (cx.k.merge)(into.as_mut_ptr(), from.as_ptr(), dim);
                    }
                }
            });
            for (head, running) in running.chunks_exact(partial).enumerate() {
                // SAFETY: these heads of the output belong to this task alone.
                unsafe {
                    let at = to.at((first + head) * dim);
                    (cx.k.finish)(running.as_ptr(), std::ptr::null(), dim, at);
                    rotate_tail(std::slice::from_raw_parts_mut(at, dim), cos_sin, -1.0);
                }
            }
        });
    });
}

fn check(
    spec: &LatentSpec,
    w: &LatentWeights<'_, Tensor>,
    rows: &LatentRows<'_, Tensor>,
    segments: &[LatentSegment<'_, State>],
    stores: &LatentStores<'_, Entries>,
    out: &Tensor,
) {
    let width = spec.heads * spec.dim;
    assert!(rows.q.cols() == width && out.cols() == width && rows.kv.cols() == spec.dim, "shapes of latent attention");
    assert!(spec.rotary <= spec.dim && rows.rope.cols() == spec.rotary && rows.entry_rope.cols() == spec.rotary, "shape of a rotary table");
    assert!(w.kv_norm.cols() == spec.dim && w.sinks.cols() == spec.heads, "weights of latent attention");
    let n = segments.iter().map(|s| s.row + s.rows).max().unwrap_or(0);
    assert!([&*rows.q, &*rows.kv, rows.rope, out].iter().all(|t| t.rows() >= n), "{n} rows of latent attention");
    let pool = |c: &CompressSpec, dim: usize, x: &PoolRows<'_, Tensor>, w: &PoolWeights<'_, Tensor>, store: &Entries| {
        let width = c.width(dim);
        assert!(x.kv.cols() == width && x.gate.cols() == width && x.kv.rows().min(x.gate.rows()) >= n, "rows of entries");
        assert!(w.position_bias.cols() == width && w.position_bias.rows() == c.ratio && w.norm.cols() == dim, "weights of entries");
        assert!(store.spec.ratio == c.ratio && store.spec.width == dim, "a store of other entries");
    };
    let Some(c) = &spec.compress else { return };
    match (&rows.entries, &w.entries, &stores.entries) {
        (Some(x), Some(w), Some(store)) => pool(c, spec.dim, x, w, store),
        _ => panic!("entries without their rows, weights or store"),
    }
    let Some(i) = &c.index else { return };
    match (&rows.index, &w.index, &stores.index) {
        (Some(x), Some(w), Some(store)) => {
            assert!(x.q.cols() == i.heads * i.dim && x.weights.cols() == i.heads && x.q.rows().min(x.weights.rows()) >= n, "rows of an index");
            assert!(spec.rotary <= i.dim, "an index key of {} values, {} of them rotated", i.dim, spec.rotary);
            pool(c, i.dim, &x.pool, w, store);
        }
        _ => panic!("an index without its rows, weights or store"),
    }
}

#[allow(clippy::too_many_arguments)]
pub(crate) fn latent_attention(
    cx: Context<'_>,
    scratch: &mut Scratch,
    spec: &LatentSpec,
    w: &LatentWeights<'_, Tensor>,
    mut rows: LatentRows<'_, Tensor>,
    segments: &mut [LatentSegment<'_, State>],
    mut stores: LatentStores<'_, Entries>,
    out: &mut Tensor,
) {
    check(spec, w, &rows, segments, &stores, out);
    prepare(cx, spec, w, &mut rows, segments.iter().map(|s| s.row + s.rows).max().unwrap_or(0));
    let index_dim = spec.compress.and_then(|c| c.index).map_or(0, |i| i.dim);
    let (mut scores, mut chosen) = (Vec::new(), Vec::new());
    let (mut entry, mut key) = (vec![0.0; spec.dim], vec![0.0; index_dim]);
    let ring = ring_blocks(spec);
    for s in segments {
        let State::Latent(state) = &mut *s.state else { panic!("the state of another layer") };
        let mut entry_row = s.entry_row;
        for r in s.row..s.row + s.rows {
            let (pos, cos_sin) = (s.pos + r - s.row, rows.rope.part(r, 1));
            let kv = rows.kv.part(r, 1);
            // SAFETY: the state is borrowed exclusively.
            unsafe { state.window.store((pos / KV_BLOCK % ring) as u32, pos % KV_BLOCK, 0, kv, kv) };
            chosen.clear();
            if let (Some(c), Some(x), Some(weights), Some(store), Some(open)) =
                (&spec.compress, &rows.entries, &w.entries, &mut stores.entries, &mut state.entries)
            {
                let complete = c.complete(pos + 1);
                let closes = (pos + 1).is_multiple_of(c.ratio);
                let entry_cos_sin = if closes { rows.entry_rope.part(entry_row, 1) } else { &[] };
                open.push(cx, c, weights, x, r, spec.eps, entry_cos_sin, &mut entry);
                if closes {
                    store.put(s.blocks, complete - 1, &entry);
                }
                chosen.extend(0..complete as u32);
                if let (Some(i), Some(x), Some(weights), Some(store), Some(open)) = (&c.index, &rows.index, &w.index, &mut stores.index, &mut state.index) {
                    open.push(cx, c, weights, &x.pool, r, spec.eps, entry_cos_sin, &mut key);
                    if closes {
                        store.put(s.blocks, complete - 1, &key);
                    }
                    // With few entries there is nothing to choose.
                    if complete > i.top_k {
                        score(cx, store, s.blocks, complete, x.q.part(r, 1), x.weights.part(r, 1), &mut scores);
                        choose(&scores, i.top_k, &mut chosen);
                    }
                }
                entry_row += usize::from(closes);
            }
            let gathered = grown(&mut scratch.values, chosen.len().div_ceil(KV_BLOCK) * block_values(spec.dim));
            if let Some(store) = &stores.entries {
                gather(cx, store, s.blocks, &chosen, gathered);
            }
            let keys = Keys { window: &state.window, from: (pos + 1).saturating_sub(spec.window), to: pos + 1, entries: gathered, chosen: chosen.len() };
            attend(cx, spec, rows.q.part(r, 1), w.sinks.values(), &keys, cos_sin, out.part_mut(r, 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::choose;

    /// Protects the choice of entries: the best, ties to the lowest, in order; all where there are few.
    #[test]
    fn ties_go_to_the_oldest_entry() {
        let mut chosen = Vec::new();
        choose(&[0.5, 2.0, 0.5, -1.0, 0.5], 3, &mut chosen);
        assert_eq!(chosen, [0, 1, 2]);
        choose(&[-1.0, -2.0], 3, &mut chosen);
        assert_eq!(chosen, [0, 1]);
    }
}
