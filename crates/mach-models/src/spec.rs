//! What a family says of a model: shapes and operation specs per layer, no weights.

use mach_backend::{Activation, AttentionSpec, GdnSpec, HyperSpec, LatentSpec, RouterSpec};

use crate::config::Rope;

/// A model as data.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Rows of the vocabulary.
    pub vocab: usize,
    /// Epsilon of all RMS norms.
    pub eps: f32,
    /// Rotary embedding of the attention layers.
    pub rope: Rope,
    /// Rotated channels of a head.
    pub rotary_dims: usize,
    /// Context that the model was made for.
    pub max_positions: usize,
    /// The head is the embedding.
    pub tied: bool,
    /// Streams of the residual, where it has several.
    pub hyper: Option<HyperSpec>,
    /// Layers, first to last.
    pub layers: Vec<LayerSpec>,
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
    /// Softmax attention with per-head q/k norm and rope.
    Attention(AttentionSpec),
    /// Gated delta net.
    Gdn(GdnSpec),
    /// Latent attention over a window and compressed entries.
    Latent(LatentBlock),
}

/// Latent attention with the projections around it.
#[derive(Clone, Debug, PartialEq)]
pub struct LatentBlock {
    /// The operation; its type is that of the KV cache, whatever stands here.
    pub attention: LatentSpec,
    /// Width of the queries between their two projections.
    pub q_rank: usize,
    /// Groups of heads that the output is projected in.
    pub groups: usize,
    /// Width of a group between its two projections.
    pub o_rank: usize,
    /// Frequencies of the rotating channels.
    pub inv_freq: Vec<f32>,
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
    /// Inner width of the shared expert.
    pub shared: Option<usize>,
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
