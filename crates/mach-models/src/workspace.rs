//! Scratch tensors of the forward pass, allocated once.

use mach_backend::Backend;

use crate::spec::{FfnSpec, MixerSpec, ModelSpec};

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

/// Scratch of one forward pass at a time.
pub(crate) struct Workspace<B: Backend> {
    /// Normed rows.
    pub h: B::Tensor,
    /// Output of a mixer or feed-forward part.
    pub out: B::Tensor,
    /// cos and sin of the rows of a mixer call.
    pub rope: B::Tensor,
    pub rope_half: usize,
    pub attention: AttentionScratch<B::Tensor>,
    pub gdn: GdnScratch<B::Tensor>,
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
}

impl Widths {
    fn of(spec: &ModelSpec) -> Self {
        let mut w = Self::default();
        let max = |a: &mut usize, b: usize| *a = (*a).max(b);
        for layer in &spec.layers {
            match &layer.mixer {
                MixerSpec::Attention(a) => {
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
            }
            match &layer.ffn {
                FfnSpec::Moe(m) => {
                    max(&mut w.inner, m.inner.max(m.shared.unwrap_or(0)));
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
        let c = chunks.mixer;
        let rows = chunks.moe.max(c);
        let decode = DECODE_ROWS.min(rows) * w.top_k;
        let t = |rows, cols| backend.tensor(rows, cols);
        Self {
            h: t(rows, spec.hidden),
            out: t(rows, spec.hidden),
            rope: t(c, spec.rotary_dims),
            rope_half: spec.rotary_dims / 2,
            attention: AttentionScratch { q: t(c, w.q), k: t(c, w.kv), v: t(c, w.kv), out: t(c, w.heads) },
            gdn: GdnScratch { qkv: t(c, w.channels), z: t(c, w.values), b: t(c, w.v_heads), a: t(c, w.v_heads), out: t(c, w.values) },
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
    let per_chunk = spec.rotary_dims + w.q + 2 * w.kv + w.heads + w.channels + 2 * w.values + 2 * w.v_heads;
    // h, out and the residual; 16 bytes a route for ids, weights and groups.
    let floats = rows * spec.hidden * 3 + c * per_chunk + rows.max(decode) * w.inner + decode * spec.hidden + HEAD_ROWS * (spec.hidden + spec.vocab);
    4 * floats as u64 + (rows * w.top_k * 16) as u64
}
