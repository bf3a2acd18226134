//! What a family says of a model: shapes and operation specs per layer, no weights.

use mach_backend::{Activation, AttentionSpec, GdnSpec, HyperSpec, LatentSpec, RouterSpec};

use crate::rope::{Yarn, frequencies};

/// A model as data.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Rows of the vocabulary.
    pub vocab: usize,
    /// Epsilon of all RMS norms.
    pub eps: f32,
    /// Factor on the embedding.
    pub embed_scale: f32,
    /// Logits are `cap · tanh(logit / cap)`.
    pub logit_cap: Option<f32>,
    /// The outputs of mixer and feed-forward part are normed before they are added.
    pub post_norms: bool,
    /// Every layer ends with a factor on the residual.
    pub layer_scale: bool,
    /// Rotary embeddings that attention layers choose from.
    pub ropes: Vec<RopeTable>,
    /// Context that the model was made for.
    pub max_positions: usize,
    /// The head is the embedding.
    pub tied: bool,
    /// Streams of the residual, where it has several.
    pub hyper: Option<HyperSpec>,
    /// Layers, first to last.
    pub layers: Vec<LayerSpec>,
}

/// Rotary embedding of a kind of layer: pairs `(j, j + pairs)` of a head rotate.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeTable {
    /// Base of the frequencies.
    pub theta: f64,
    /// One frequency a pair.
    pub inv_freq: Vec<f32>,
    /// Factor on cos and sin.
    pub factor: f32,
}

impl RopeTable {
    /// The first `dims` channels of a head rotate.
    pub fn plain(theta: f64, dims: usize) -> Self {
        Self { theta, inv_freq: single(&frequencies(theta, dims)), factor: 1.0 }
    }

    /// All `dims` channels, stretched.
    pub fn yarn(theta: f64, dims: usize, yarn: &Yarn) -> Self {
        Self { theta, inv_freq: single(&yarn.frequencies(theta, dims)), factor: yarn.angle_factor() as f32 }
    }

    /// The frequencies of all `dims` channels, but only the first `pairs` pairs rotate.
    pub fn proportional(theta: f64, dims: usize, pairs: usize) -> Self {
        let mut table = Self::plain(theta, dims);
        table.inv_freq.iter_mut().skip(pairs).for_each(|f| *f = 0.0);
        table
    }

    /// Rotating channels: columns of cos and sin.
    pub fn dims(&self) -> usize {
        2 * self.inv_freq.len()
    }
}

fn single(values: &[f64]) -> Vec<f32> {
    values.iter().map(|&x| x as f32).collect()
}

/// One block: a token mixer, then a feed-forward part.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerSpec {
    /// How tokens see each other.
    pub mixer: MixerSpec,
    /// What follows.
    pub ffn: FfnSpec,
}

/// Token mixers.
#[derive(Clone, Debug, PartialEq)]
pub enum MixerSpec {
    /// Softmax attention with rope.
    Attention(AttentionBlock),
    /// Gated delta net.
    Gdn(GdnSpec),
    /// Latent attention over a window and compressed entries.
    Latent(LatentBlock),
}

/// Softmax attention with what stands around it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionBlock {
    /// The operation.
    pub attention: AttentionSpec,
    /// Which of the model's [`RopeTable`]s.
    pub rope: usize,
    /// Projections have biases.
    pub bias: bool,
    /// Heads have sinks.
    pub sinks: bool,
    /// Queries and keys are normed per head.
    pub qk_norm: bool,
    /// Values are normed per head, without a weight.
    pub v_norm: bool,
    /// Values are the projected keys before their norm.
    pub v_from_k: bool,
}

impl AttentionBlock {
    /// Attention with q/k norms and nothing else.
    pub const fn new(attention: AttentionSpec) -> Self {
        Self { attention, rope: 0, bias: false, sinks: false, qk_norm: true, v_norm: false, v_from_k: false }
    }
}

/// Latent attention with the projections around it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LatentBlock {
    /// The operation; its type is that of the KV cache, whatever stands here.
    pub attention: LatentSpec,
    /// Width of the queries between their two projections.
    pub q_rank: usize,
    /// Groups of heads that the output is projected in.
    pub groups: usize,
    /// Width of a group between its two projections.
    pub o_rank: usize,
    /// Which of the model's [`RopeTable`]s; pairs are neighbours here.
    pub rope: usize,
}

/// Feed-forward parts.
#[derive(Clone, Debug, PartialEq)]
pub enum FfnSpec {
    /// Routed experts, with a gated shared expert or without.
    Moe(MoeSpec),
    /// A plain block of this inner width.
    Dense {
        /// Inner width.
        inner: usize,
        /// Between gate|up and down.
        activation: Activation,
    },
}

/// Routed experts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MoeSpec {
    /// Choice of experts.
    pub router: RouterSpec,
    /// Inner width of an expert.
    pub inner: usize,
    /// Between gate|up and down.
    pub activation: Activation,
    /// Experts have biases.
    pub expert_bias: bool,
    /// Every expert has a factor of its own on its weight.
    pub expert_scale: bool,
    /// A block beside the experts that is always active.
    pub shared: Option<SharedSpec>,
    /// Router, experts and shared block each have a norm of the residual; what the experts and the shared block give is
    /// normed apart before it is added.
    pub apart: bool,
    /// The experts are those of the token, from a table; the router only weighs them.
    pub by_token: bool,
}

impl MoeSpec {
    /// SwiGLU experts without a shared one.
    pub const fn new(router: RouterSpec, inner: usize) -> Self {
        Self { router, inner, activation: Activation::SwiGlu, expert_bias: false, expert_scale: false, shared: None, apart: false, by_token: false }
    }
}

/// A feed-forward block beside the experts, with their activation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedSpec {
    /// Inner width.
    pub inner: usize,
    /// Its output is multiplied by the sigmoid of a projection of its input.
    pub gated: bool,
}

impl ModelSpec {
    /// The MoE layers with their index in the model.
    pub fn moe_layers(&self) -> impl Iterator<Item = (usize, &MoeSpec)> {
        self.layers.iter().enumerate().filter_map(|(i, l)| match &l.ffn {
            FfnSpec::Moe(m) => Some((i, m)),
            FfnSpec::Dense { .. } => None,
        })
    }

    /// Experts per token (0 for a model without MoE layers).
    pub fn top_k(&self) -> usize {
        self.moe_layers().map(|(_, m)| m.router.top_k).max().unwrap_or(0)
    }

    /// Width of a residual row.
    pub fn residual(&self) -> usize {
        self.hidden * self.hyper.map_or(1, |h| h.streams)
    }

    /// Routed experts of all layers.
    pub fn routed_experts(&self) -> usize {
        self.moe_layers().map(|(_, m)| m.router.experts).sum()
    }
}
