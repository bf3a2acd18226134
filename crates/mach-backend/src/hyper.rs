//! Hyper-connections (arXiv 2409.19606, in the manifold-constrained form of DeepSeek-V4): the residual is several streams, and
//! every block reads a mixture of them and writes back through another.

/// Shapes and constants.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HyperSpec {
    /// Streams of the residual: a row is `[streams, hidden]`.
    pub streams: usize,
    /// Sinkhorn rounds that make the mixing matrix doubly stochastic.
    pub rounds: usize,
    /// Added to weights and sums.
    pub eps: f32,
    /// Epsilon of the norm over all streams.
    pub norm_eps: f32,
}

impl HyperSpec {
    /// Numbers that a block's mixture is made of: reading, writing, and streams to streams.
    pub const fn mixes(&self) -> usize {
        self.streams * (2 + self.streams)
    }
}

/// Weights of one mixture.
pub struct HyperWeights<'a, T, W> {
    /// `[mixes, streams·hidden]`, or `[streams, streams·hidden]` before the head.
    pub project: &'a W,
    /// `[1, mixes]`: added.
    pub base: &'a T,
    /// `[1, 3]` factors of reading, writing and mixing; `[1, 1]` before the head.
    pub scale: &'a T,
}
