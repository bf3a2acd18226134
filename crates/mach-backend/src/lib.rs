//! The [`Backend`] trait that models are written against, its operation specs, and the plain reference backend.
//!
//! Tensors are opaque handles: model code never sees a host pointer, and what must come back to the host
//! (router ids, logits, hidden rows) is an explicit read. Operations are fused; a *row* is one token.
//!
//! Operations do not return errors: shapes are checked when a model is loaded, so a wrong shape here is a bug and
//! an assertion. **A row's result never depends on the other rows of the call** (batch invariance).

mod hyper;
mod latent;
pub mod reference;
mod spec;

pub use hyper::{HyperSpec, HyperWeights};
pub use latent::{CompressSpec, EntrySpec, IndexRows, IndexSpec, LatentRows, LatentSegment, LatentSpec, LatentStores, LatentWeights, PoolRows, PoolWeights};
pub use reference::Reference;
pub use spec::{
    Activation, AttentionSpec, ExpertBias, ExpertJob, ExpertLayout, Experts, GdnSegment, GdnSpec, GdnWeights, KV_BLOCK, KvSpec, KvType, MERGE_SEGMENT,
    NO_BLOCK, Part, QkNormRope, RouterBias, RouterScore, RouterSpec, RouterWeights, Segment, StateSpec,
};

use mach_format::{AlignedBytes, PackedLayout, PackedMatrix};

/// Memory of the expert bank: equal slots of two parts (gate|up, down), filled by reader threads while
/// operations read other slots. Parts are locked apart, so that gate|up of a slot can be computed while its
/// down is still being read.
pub trait ExpertMemory: Send + Sync + 'static {
    /// Number of slots.
    fn slots(&self) -> usize;
    /// Capacity of the two parts of a slot in bytes, multiples of 4096.
    fn part_bytes(&self) -> [usize; 2];
    /// Calls `f` with exclusive access to the named parts of `slot` (gate|up, down; the one not asked for is
    /// empty). Parts start at 4096-byte boundaries, as direct I/O wants. Blocks while an operation reads them.
    fn fill(&self, slot: usize, parts: Part, f: &mut dyn FnMut([&mut [u8]; 2]));
    /// Gives the slot's physical memory back to the system; its content becomes undefined.
    fn release(&self, slot: usize);
}

/// A device that runs the operations of the models.
pub trait Backend: Send + Sync + 'static {
    /// An f32 matrix `[rows, cols]`.
    type Tensor: Send + Sync + 'static;
    /// A linear weight `[out, in]` in any format.
    type Weight: Send + Sync + 'static;
    /// A gate|up pair of linear weights.
    type GateUp: Send + Sync + 'static;
    /// Memory of the expert bank.
    type Memory: ExpertMemory;
    /// Paged keys and values of one attention layer, for all sequences.
    type Kv: Send + 'static;
    /// What one layer of one sequence carries from token to token, see [`StateSpec`].
    type State: Send + 'static;
    /// Paged entries of one layer with latent attention, for all sequences.
    type Entries: Send + 'static;
    /// Router choices of a batch of rows.
    type Routes: Send + 'static;

    /// `cpu`, `reference`.
    fn name(&self) -> &'static str;
    /// The kernel set in use, for the signal line: `avx2`, `scalar`, …
    fn kernels(&self) -> &'static str;

    // --- memory -------------------------------------------------------------------------------------------

    /// A zeroed `[rows, cols]` tensor.
    fn tensor(&self, rows: usize, cols: usize) -> Self::Tensor;
    /// Gives a scratch tensor another shape within the allocation it was made with; its content becomes undefined.
    fn reshape(&self, t: &mut Self::Tensor, rows: usize, cols: usize);
    /// Writes whole rows from `row` on. `data.len()` is a multiple of the tensor's columns.
    fn upload(&self, t: &mut Self::Tensor, row: usize, data: &[f32]);
    /// Reads whole rows from `row` on into `out`.
    fn read(&self, t: &Self::Tensor, row: usize, out: &mut [f32]);
    /// Sets the first `rows` rows to zero.
    fn zero(&self, t: &mut Self::Tensor, rows: usize);
    /// Takes a packed weight.
    fn weight(&self, m: PackedMatrix) -> Self::Weight;
    /// Takes a gate|up pair: `half` is the layout of either, `data` has tiles of gate and up in turn.
    fn gate_up(&self, half: PackedLayout, data: AlignedBytes) -> Self::GateUp;
    /// Memory for `slots` experts with the given part capacities (multiples of 4096).
    fn alloc_bank(&self, slots: usize, part_bytes: [usize; 2]) -> std::io::Result<Self::Memory>;
    /// An empty KV store.
    fn kv(&self, spec: KvSpec) -> Self::Kv;
    /// Makes block ids `0..blocks` usable. Never shrinks; content of existing blocks is kept.
    fn kv_grow(&self, kv: &mut Self::Kv, blocks: usize);
    /// An empty store of entries.
    fn entries(&self, spec: EntrySpec) -> Self::Entries;
    /// Makes block ids `0..blocks` usable. Never shrinks; content of existing blocks is kept.
    fn entries_grow(&self, entries: &mut Self::Entries, blocks: usize);
    /// The state before the first token.
    fn state(&self, spec: &StateSpec) -> Self::State;
    /// Copies `src` over `dst` (same spec).
    fn copy_state(&self, src: &Self::State, dst: &mut Self::State);
    /// An empty set of routes.
    fn routes(&self) -> Self::Routes;

    // --- operations ---------------------------------------------------------------------------------------

    /// `out[r] = x[x_row + r] / sqrt(mean(x²) + eps) ⊙ w` for `rows` rows. `w` is `[1, cols]`, the effective weight.
    fn rms_norm(&self, x: &Self::Tensor, x_row: usize, rows: usize, w: &Self::Tensor, eps: f32, out: &mut Self::Tensor);
    /// `x[x_row + r] += y[r]`.
    fn add(&self, x: &mut Self::Tensor, x_row: usize, rows: usize, y: &Self::Tensor);
    /// Several products of the same rows: `out[r] = W x[r]`. Plain weights compute in f32; quantised ones may
    /// quantise the activation rows (once, for all of them).
    fn linear(&self, x: &Self::Tensor, rows: usize, outs: &mut [(&Self::Weight, &mut Self::Tensor)]);
    /// Adds the row `bias` `[1, cols]` to the first `rows` rows.
    fn add_bias(&self, x: &mut Self::Tensor, rows: usize, bias: &Self::Tensor);
    /// Multiplies `rows` rows from `x_row` on.
    fn scale(&self, x: &mut Self::Tensor, x_row: usize, rows: usize, by: f32);
    /// `cap · tanh(x / cap)` of the first `rows` rows.
    fn soft_cap(&self, x: &mut Self::Tensor, rows: usize, cap: f32);
    /// Per head norms, rotary embedding, rounding to the KV type and storing of K and V. `q` and `k` are
    /// changed in place; `q` may interleave a gate per head (see [`AttentionSpec::gate`]). Without `v` the values are those of
    /// `k` before its norm.
    #[allow(clippy::too_many_arguments)]
    fn qkv_store(
        &self,
        spec: &AttentionSpec,
        prep: &QkNormRope<'_, Self::Tensor>,
        q: &mut Self::Tensor,
        k: &mut Self::Tensor,
        v: Option<&Self::Tensor>,
        segments: &[Segment<'_>],
        kv: &mut Self::Kv,
    );
    /// Causal attention of query rows over their sequence's blocks; `out` is `[rows, heads·head_dim]`, multiplied
    /// by `sigmoid(gate)` where the spec has one. Partial results cover [`MERGE_SEGMENT`] keys at absolute
    /// positions and are merged in index order. `sinks` `[1, heads]` are logits that take part in the softmax and have no value:
    /// merging begins with them.
    fn attention(&self, spec: &AttentionSpec, q: &Self::Tensor, sinks: Option<&Self::Tensor>, segments: &[Segment<'_>], kv: &Self::Kv, out: &mut Self::Tensor);
    /// Gated delta rule with causal depthwise conv, then gated RMS norm; always sequential over tokens.
    /// `qkv` `[rows, 2·k_heads·k_dim + v_heads·v_dim]`, `z` `[rows, v_heads·v_dim]`, `b` and `a` `[rows, v_heads]`.
    #[allow(clippy::too_many_arguments)]
    fn gdn(
        &self,
        spec: &GdnSpec,
        w: &GdnWeights<'_, Self::Tensor>,
        qkv: &Self::Tensor,
        z: &Self::Tensor,
        b: &Self::Tensor,
        a: &Self::Tensor,
        segments: &mut [GdnSegment<'_, Self::State>],
        out: &mut Self::Tensor,
    );
    /// Scores `rows` rows and keeps the top k, ties to the lowest id. Activations stay f32. With `given` `[rows·k]` the ids are
    /// these, and only the weights come from the scores.
    fn route(
        &self,
        spec: &RouterSpec,
        w: &RouterWeights<'_, Self::Tensor, Self::Weight>,
        x: &Self::Tensor,
        rows: usize,
        given: Option<&[u32]>,
        routes: &mut Self::Routes,
    );
    /// Reads the choices back: `[rows·k]` ids and weights, within a row in the order of choice or as given.
    fn read_routes(&self, routes: &Self::Routes, ids: &mut Vec<u32>, weights: &mut Vec<f32>);
    /// For every job and row: `act[outs[i]] = activation(gate x[rows[i]], up x[rows[i]])`, biases added before.
    fn experts_gate_up(&self, experts: &Experts<'_, Self::Memory, Self::Tensor>, jobs: &[ExpertJob<'_>], x: &Self::Tensor, act: &mut Self::Tensor);
    /// For every job and row: `y[outs[i]] = down act[outs[i]]`, plus the bias.
    fn experts_down(&self, experts: &Experts<'_, Self::Memory, Self::Tensor>, jobs: &[ExpertJob<'_>], act: &Self::Tensor, y: &mut Self::Tensor);
    /// One expert of a prefill: `out[rows[i]] = fma(weights[i], down act[outs[i]] + bias, out[rows[i]])`.
    fn expert_down_add(
        &self,
        experts: &Experts<'_, Self::Memory, Self::Tensor>,
        job: &ExpertJob<'_>,
        weights: &[f32],
        act: &Self::Tensor,
        out: &mut Self::Tensor,
    );
    /// `out[r] = Σ_j fma(weights[r·k+j], y[order[r·k+j]], ·)` from zero, in the order given (ascending expert id):
    /// the same arithmetic as [`Backend::expert_down_add`].
    fn experts_reduce(&self, y: &Self::Tensor, rows: usize, order: &[u32], weights: &[f32], out: &mut Self::Tensor);
    /// A feed-forward block that is always active: `out[r] += g · down(activation(gate x[r]) ⊙ (up x[r]))`, `g` =
    /// `sigmoid(gate · x[r])` where a `[1, hidden]` gate is given, else 1. `act` is scratch `[rows, inner]`.
    #[allow(clippy::too_many_arguments)]
    fn ffn_add(
        &self,
        activation: Activation,
        x: &Self::Tensor,
        rows: usize,
        gate_up: &Self::GateUp,
        down: &Self::Weight,
        gate: Option<&Self::Weight>,
        act: &mut Self::Tensor,
        out: &mut Self::Tensor,
    );
    /// Several products of disjoint parts of the same rows: with `n` weights of `cols` columns each, `out[r]` is `W_g x[r][g·cols..]`
    /// one after another.
    fn linear_grouped(&self, x: &Self::Tensor, rows: usize, weights: &[Self::Weight], out: &mut Self::Tensor);
    /// Latent attention: norms and rotates queries and tokens, makes entries of complete runs, chooses among them where there is an
    /// index, attends with sinks, and rotates the output `[rows, heads·dim]` back. A row's keys are its window in order of position,
    /// then its entries in order.
    fn latent_attention(
        &self,
        spec: &LatentSpec,
        w: &LatentWeights<'_, Self::Tensor>,
        rows: LatentRows<'_, Self::Tensor>,
        segments: &mut [LatentSegment<'_, Self::State>],
        stores: LatentStores<'_, Self::Entries>,
        out: &mut Self::Tensor,
    );
    /// What a block reads of the streams `x` `[.., streams·hidden]`, to `h` `[rows, hidden]`, and how it writes back, to `mix`
    /// `[rows, streams·(1 + streams)]`: a factor for each stream, then the mixing matrix, old stream by old stream.
    #[allow(clippy::too_many_arguments)]
    fn hyper_mix(
        &self,
        spec: &HyperSpec,
        w: &HyperWeights<'_, Self::Tensor, Self::Weight>,
        x: &Self::Tensor,
        x_row: usize,
        rows: usize,
        h: &mut Self::Tensor,
        mix: &mut Self::Tensor,
    );
    /// Writes a block's output `y` to the streams: stream `i` becomes `factor_i · y + Σ_j matrix[j, i] · stream_j`.
    fn hyper_add(&self, spec: &HyperSpec, x: &mut Self::Tensor, x_row: usize, rows: usize, y: &Self::Tensor, mix: &Self::Tensor);
    /// What the head reads of the streams.
    fn hyper_head(
        &self,
        spec: &HyperSpec,
        w: &HyperWeights<'_, Self::Tensor, Self::Weight>,
        x: &Self::Tensor,
        x_row: usize,
        rows: usize,
        out: &mut Self::Tensor,
    );
}
