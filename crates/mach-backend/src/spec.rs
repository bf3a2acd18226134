//! Operation specs: what families state as data and backends compute.

use mach_format::{GateUpLayout, PackedLayout};

use crate::latent::LatentSpec;

/// Positions per KV block.
pub const KV_BLOCK: usize = 32;
/// Entry of a block table where a sequence keeps nothing: no row of a call may see a position of it.
pub const NO_BLOCK: u32 = u32::MAX;
/// Keys per partial attention result, counted from absolute position 0.
pub const MERGE_SEGMENT: usize = 256;

/// Element type of stored keys and values. Rows are rounded to it before any use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvType {
    /// IEEE half.
    F16,
    /// Single.
    F32,
}

impl KvType {
    /// Bytes of one value.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F16 => 2,
            Self::F32 => 4,
        }
    }
}

/// Shape of one layer's KV store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvSpec {
    /// Key/value heads.
    pub kv_heads: usize,
    /// Values per head.
    pub head_dim: usize,
    /// Element type.
    pub ty: KvType,
}

impl KvSpec {
    /// Bytes of one block of [`KV_BLOCK`] positions, K and V.
    pub const fn block_bytes(&self) -> usize {
        2 * KV_BLOCK * self.kv_heads * self.head_dim * self.ty.bytes()
    }
}

/// Softmax attention of one layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionSpec {
    /// Query heads; head `h` reads kv head `h / (heads / kv_heads)`.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Values per head.
    pub head_dim: usize,
    /// Factor on q·k.
    pub scale: f32,
    /// Keys visible to a query, itself included; `None` sees all earlier ones.
    pub window: Option<usize>,
    /// Query rows are `heads × (head_dim query, head_dim gate)` and the output is multiplied by `sigmoid(gate)`.
    pub gate: bool,
}

/// What happens to q and k between projection and cache.
pub struct QkNormRope<'a, T> {
    /// Epsilon of the norms.
    pub eps: f32,
    /// Per-head RMS weight of q, `[1, head_dim]`.
    pub q_norm: Option<&'a T>,
    /// Per-head RMS weight of k.
    pub k_norm: Option<&'a T>,
    /// Values are normed per head too, without a weight.
    pub v_norm: bool,
    /// `[rows, 2·half]`: cos of `half` frequencies, then sin, one row per batch row. Pairs are `(j, j + half)`;
    /// channels from `2·half` on pass.
    pub rope: &'a T,
    /// Rotated pairs.
    pub half: usize,
}

/// Consecutive rows of one sequence in a batch.
#[derive(Clone, Copy, Debug)]
pub struct Segment<'a> {
    /// First row in the batch.
    pub row: usize,
    /// Number of rows.
    pub rows: usize,
    /// Absolute position of the first row.
    pub pos: usize,
    /// The sequence's block table: block of position `p` is `blocks[p / KV_BLOCK]`, [`NO_BLOCK`] where all of its positions lie before
    /// the windows of the rows.
    pub blocks: &'a [u32],
}

/// Gated delta net of one layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GdnSpec {
    /// Query/key heads.
    pub k_heads: usize,
    /// Value heads.
    pub v_heads: usize,
    /// Values per key head.
    pub k_dim: usize,
    /// Values per value head.
    pub v_dim: usize,
    /// Taps of the causal conv.
    pub kernel: usize,
    /// Epsilon of the gated norm.
    pub eps: f32,
    /// Value heads of a key head lie `k_heads` apart (ggml's order) instead of side by side.
    pub tiled: bool,
}

impl GdnSpec {
    /// The key head that a value head uses.
    pub const fn key_head(&self, value_head: usize) -> usize {
        if self.tiled { value_head % self.k_heads } else { value_head / (self.v_heads / self.k_heads) }
    }

    /// Channels of the conv: q, k and v heads.
    pub const fn channels(&self) -> usize {
        2 * self.k_heads * self.k_dim + self.v_heads * self.v_dim
    }
    /// Bytes of one layer's state in f32.
    pub const fn state_bytes(&self) -> usize {
        4 * (self.v_heads * self.k_dim * self.v_dim + (self.kernel - 1) * self.channels())
    }
}

/// What a layer carries from token to token besides paged keys.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum StateSpec {
    /// Conv tail and matrix of a gated delta net.
    Gdn(GdnSpec),
    /// Window and open runs of latent attention.
    Latent(LatentSpec),
}

impl StateSpec {
    /// Bytes of one sequence's state in one layer.
    pub const fn bytes(&self) -> usize {
        match self {
            Self::Gdn(g) => g.state_bytes(),
            Self::Latent(l) => l.state_bytes(),
        }
    }
}

/// Small weights of a gated delta net.
pub struct GdnWeights<'a, T> {
    /// `[kernel, channels]`, tap-major; the last tap is the current token.
    pub conv: &'a T,
    /// `−exp(A_log)`, `[1, v_heads]`.
    pub neg_exp_a: &'a T,
    /// `[1, v_heads]`.
    pub dt_bias: &'a T,
    /// Plain weight of the gated norm, `[1, v_dim]`.
    pub norm: &'a T,
}

/// Consecutive rows of one sequence with its recurrent state.
pub struct GdnSegment<'a, S> {
    /// First row in the batch.
    pub row: usize,
    /// Number of rows.
    pub rows: usize,
    /// Advanced by `rows` tokens.
    pub state: &'a mut S,
}

/// What a router makes of its logits. All arithmetic is f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouterScore {
    /// Softmax over all experts.
    Softmax,
    /// The largest logits are chosen; softmax over the chosen.
    SoftmaxOfChosen,
    /// `sqrt(ln(1 + eˣ))`. Where such scores are renormalised, their sum has 1e-20 added.
    SqrtSoftplus,
}

/// What a router's bias is added to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouterBias {
    /// There is none.
    None,
    /// The logits: it changes choices and weights.
    Logits,
    /// The scores, for choosing alone.
    Choice,
}

/// Choice of experts and their weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RouterSpec {
    /// Routed experts.
    pub experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// Of the logits.
    pub score: RouterScore,
    /// Bias.
    pub bias: RouterBias,
    /// Divide the kept weights by their sum.
    pub renormalise: bool,
    /// Factor on the weights, after everything else but an expert's own.
    pub factor: f32,
}

impl RouterSpec {
    /// Softmax over all experts, without a bias or factors.
    pub const fn softmax(experts: usize, top_k: usize, renormalise: bool) -> Self {
        Self { experts, top_k, score: RouterScore::Softmax, bias: RouterBias::None, renormalise, factor: 1.0 }
    }
}

/// Weights of a router.
pub struct RouterWeights<'a, T, W> {
    /// `[experts, hidden]`.
    pub project: &'a W,
    /// `[1, experts]`, where the spec has a bias and ids are not given.
    pub bias: Option<&'a T>,
    /// `[1, experts]`: the last factor on an expert's weight.
    pub expert_scale: Option<&'a T>,
}

/// What a feed-forward block does between gate|up and down.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// `silu(gate) · up`.
    SwiGlu,
    /// `silu(min(gate, limit)) · clip(up, ±limit)`.
    SwiGluClamped {
        /// Bound.
        limit: f32,
    },
    /// `g · sigmoid(alpha · g) · (u + 1)` of `g = min(gate, limit)` and `u = clip(up, ±limit)`.
    SwiGluOai {
        /// Factor inside the sigmoid.
        alpha: f32,
        /// Bound.
        limit: f32,
    },
    /// `gelu(gate) · up`, with the form of gelu that has a tanh.
    GeGlu,
}

/// How one layer's expert lies in the two parts of a slot.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ExpertLayout {
    /// Part 0: gate|up, `[inner, hidden]` each.
    pub gate_up: GateUpLayout,
    /// Part 1: down, `[hidden, inner]`.
    pub down: PackedLayout,
    /// Between the two.
    pub activation: Activation,
}

/// Parts of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Gate|up.
    GateUp,
    /// Down.
    Down,
    /// The whole record.
    Both,
}

/// The routed experts of one layer.
pub struct Experts<'a, M, T> {
    /// How they lie in a slot.
    pub layout: &'a ExpertLayout,
    /// The bank.
    pub memory: &'a M,
    /// Where they have biases.
    pub bias: Option<ExpertBias<'a, T>>,
}

/// Biases of all experts of a layer, a row each. They are kept apart from the records.
pub struct ExpertBias<'a, T> {
    /// `[experts, inner]`.
    pub gate: &'a T,
    /// `[experts, inner]`.
    pub up: &'a T,
    /// `[experts, hidden]`.
    pub down: &'a T,
}

/// Rows that go through the expert in one slot.
#[derive(Clone, Copy, Debug)]
pub struct ExpertJob<'a> {
    /// Slot of the bank.
    pub slot: usize,
    /// The expert in it: its row of the biases.
    pub expert: usize,
    /// Rows of the input.
    pub rows: &'a [u32],
    /// Row of the activation (and output) buffer for each of `rows`.
    pub outs: &'a [u32],
}
