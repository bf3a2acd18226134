//! Scratch tensors of the forward pass, allocated once.

use mach_backend::Backend;

use crate::spec::{AttentionBlock, FfnSpec, LatentBlock, MixerSpec, ModelSpec, RopeTable};

/// Rows up to which the MoE step buffers expert outputs (decode) instead of adding in place (prefill).
pub const DECODE_ROWS: usize = 16;
/// Rows that go through the head at once.
pub const HEAD_ROWS: usize = 32;

/// Row counts that the scratch is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunks {
    /// Rows of a mixer call.
    pub mixer: usize,
    /// Rows of a MoE step: several mixer chunks go through a layer before its experts are read once.
    pub moe: usize,
}

pub(crate) struct AttentionScratch<T> {
    pub q: T,
    pub k: T,
    pub v: T,
    pub out: T,
}

pub(crate) struct GdnScratch<T> {
    pub qkv: T,
    pub z: T,
    pub b: T,
    pub a: T,
    pub out: T,
}

pub(crate) struct LatentScratch<T> {
    pub q_a: T,
    pub q_normed: T,
    pub q: T,
    pub kv: T,
    pub pool_kv: T,
    pub pool_gate: T,
    pub index_q: T,
    pub index_kv: T,
    pub index_gate: T,
    pub index_weights: T,
    pub entry_rope: T,
    pub out: T,
    pub grouped: T,
}

/// Scratch of one forward pass at a time.
pub(crate) struct Workspace<B: Backend> {
    /// Normed rows.
    pub h: B::Tensor,
    /// Output of a mixer or feed-forward part.
    pub out: B::Tensor,
    /// cos and sin of the rows of a mixer call.
    pub rope: B::Tensor,
    /// Pairs that rotate in that call.
    pub rope_half: usize,
    pub attention: AttentionScratch<B::Tensor>,
    pub gdn: GdnScratch<B::Tensor>,
    pub latent: LatentScratch<B::Tensor>,
    /// How blocks write to the streams of the residual.
    pub mix: B::Tensor,
    /// Sum of experts and shared block, where they are normed apart.
    pub apart: B::Tensor,
    pub act: B::Tensor,
    /// Expert outputs of a decode step.
    pub y: B::Tensor,
    pub routes: B::Routes,
    pub ids: Vec<u32>,
    pub weights: Vec<f32>,
    /// What the next layer may choose.
    pub guess: Vec<u32>,
    pub guess_weights: Vec<f32>,
    /// Final norm and logits of up to [`HEAD_ROWS`] rows.
    pub head_in: B::Tensor,
    pub logits: B::Tensor,
}

/// Columns of the scratch tensors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Widths {
    q: usize,
    kv: usize,
    heads: usize,
    channels: usize,
    values: usize,
    v_heads: usize,
    inner: usize,
    top_k: usize,
    mix: usize,
    latent: LatentWidths,
    rope: usize,
    /// Of the sum of experts and shared block, where they are normed apart.
    apart: usize,
}

/// Columns of [`LatentScratch`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct LatentWidths {
    q_rank: usize,
    heads: usize,
    kv: usize,
    pool: usize,
    index_q: usize,
    index_heads: usize,
    index_pool: usize,
    rotary: usize,
    grouped: usize,
}

impl LatentWidths {
    fn take(&mut self, l: &LatentBlock) {
        let max = |a: &mut usize, b: usize| *a = (*a).max(b);
        let a = &l.attention;
        max(&mut self.q_rank, l.q_rank);
        max(&mut self.heads, a.heads * a.dim);
        max(&mut self.kv, a.dim);
        max(&mut self.rotary, a.rotary);
        max(&mut self.grouped, l.groups * l.o_rank);
        if let Some(c) = &a.compress {
            max(&mut self.pool, c.width(a.dim));
            if let Some(i) = &c.index {
                max(&mut self.index_q, i.heads * i.dim);
                max(&mut self.index_heads, i.heads);
                max(&mut self.index_pool, c.width(i.dim));
            }
        }
    }

    /// Of one row.
    const fn values(&self) -> usize {
        2 * self.q_rank + 2 * self.heads + self.kv + 2 * self.pool + self.index_q + self.index_heads + 2 * self.index_pool + self.rotary + self.grouped
    }
}

impl Widths {
    fn of(spec: &ModelSpec) -> Self {
        let mut w = Self { mix: spec.hyper.map_or(0, |h| h.streams * (1 + h.streams)), ..Self::default() };
        w.rope = spec.ropes.iter().map(RopeTable::dims).max().unwrap_or(0);
        let max = |a: &mut usize, b: usize| *a = (*a).max(b);
        for layer in &spec.layers {
            match &layer.mixer {
                MixerSpec::Attention(AttentionBlock { attention: a, .. }) => {
                    let heads = a.heads * a.head_dim;
                    max(&mut w.q, if a.gate { 2 * heads } else { heads });
                    max(&mut w.kv, a.kv_heads * a.head_dim);
                    max(&mut w.heads, heads);
                }
                MixerSpec::Gdn(g) => {
                    max(&mut w.channels, g.channels());
                    max(&mut w.values, g.v_heads * g.v_dim);
                    max(&mut w.v_heads, g.v_heads);
                }
                MixerSpec::Latent(l) => w.latent.take(l),
            }
            match &layer.ffn {
                FfnSpec::Moe(m) => {
                    max(&mut w.inner, m.inner.max(m.shared.map_or(0, |s| s.inner)));
                    max(&mut w.apart, if m.apart { spec.hidden } else { 0 });
                    max(&mut w.top_k, m.router.top_k);
                }
                FfnSpec::Dense { inner, .. } => max(&mut w.inner, *inner),
            }
        }
        w
    }
}

impl<B: Backend> Workspace<B> {
    pub fn new(backend: &B, spec: &ModelSpec, chunks: Chunks) -> Self {
        let w = Widths::of(spec);
        let l = w.latent;
        let c = chunks.mixer;
        let rows = chunks.moe.max(c);
        let decode = DECODE_ROWS.min(rows) * w.top_k;
        let t = |rows, cols| backend.tensor(rows, cols);
        Self {
            h: t(rows, spec.hidden),
            out: t(rows, spec.hidden),
            rope: t(c, w.rope),
            rope_half: 0,
            attention: AttentionScratch { q: t(c, w.q), k: t(c, w.kv), v: t(c, w.kv), out: t(c, w.heads) },
            gdn: GdnScratch { qkv: t(c, w.channels), z: t(c, w.values), b: t(c, w.v_heads), a: t(c, w.v_heads), out: t(c, w.values) },
            latent: LatentScratch {
                q_a: t(c, l.q_rank),
                q_normed: t(c, l.q_rank),
                q: t(c, l.heads),
                kv: t(c, l.kv),
                pool_kv: t(c, l.pool),
                pool_gate: t(c, l.pool),
                index_q: t(c, l.index_q),
                index_kv: t(c, l.index_pool),
                index_gate: t(c, l.index_pool),
                index_weights: t(c, l.index_heads),
                entry_rope: t(c, l.rotary),
                out: t(c, l.heads),
                grouped: t(c, l.grouped),
            },
            mix: t(rows, w.mix),
            apart: t(rows, w.apart),
            act: t(rows.max(decode), w.inner),
            y: t(decode, spec.hidden),
            routes: backend.routes(),
            ids: Vec::new(),
            weights: Vec::new(),
            guess: Vec::new(),
            guess_weights: Vec::new(),
            head_in: t(HEAD_ROWS, spec.hidden),
            logits: t(HEAD_ROWS, spec.vocab),
        }
    }
}

/// Bytes that [`Workspace::new`] allocates, with the residual rows of one forward pass.
pub fn scratch_bytes(spec: &ModelSpec, chunks: Chunks) -> u64 {
    let w = Widths::of(spec);
    let c = chunks.mixer;
    let rows = chunks.moe.max(c);
    let decode = DECODE_ROWS.min(rows) * w.top_k;
    let per_chunk = w.rope + w.q + 2 * w.kv + w.heads + w.channels + 2 * w.values + 2 * w.v_heads + w.latent.values();
    // h, out and the residual; 16 bytes a route for ids, weights and groups.
    let floats = rows * (spec.hidden * 2 + spec.residual() + w.mix + w.apart)
        + c * per_chunk
        + rows.max(decode) * w.inner
        + decode * spec.hidden
        + HEAD_ROWS * (spec.hidden + spec.vocab);
    4 * floats as u64 + (rows * w.top_k * 16) as u64
}
