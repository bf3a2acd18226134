//! Layers that families share, parameterised by data.

pub mod attention;
pub mod gdn;
pub mod hyper;
pub mod latent;
pub mod moe;

use mach_backend::{Activation, Backend};
use mach_format::{Matrix, pack_f32, pack_gate_up};

use crate::ModelError;

/// A feed-forward block that is always active.
pub struct FeedForward<B: Backend> {
    pub(crate) gate_up: B::GateUp,
    pub(crate) down: B::Weight,
    /// Sigmoid gate of a shared expert.
    pub(crate) gate: Option<B::Weight>,
    pub(crate) activation: Activation,
    inner: usize,
}

impl<B: Backend> FeedForward<B> {
    pub(crate) fn load(backend: &B, gate: &Matrix, up: &Matrix, down: &Matrix, scalar: Option<&Matrix>, activation: Activation) -> Result<Self, ModelError> {
        Ok(Self {
            gate_up: backend.gate_up(gate.layout(), pack_gate_up(gate, up)?),
            down: backend.weight(down.pack()?),
            gate: scalar.map(|g| weight_f32(backend, g)).transpose()?,
            activation,
            inner: gate.rows(),
        })
    }

    pub(crate) fn add(&self, backend: &B, x: &B::Tensor, rows: usize, act: &mut B::Tensor, out: &mut B::Tensor) {
        backend.reshape(act, rows, self.inner);
        backend.ffn_add(self.activation, x, rows, &self.gate_up, &self.down, self.gate.as_ref(), act, out);
    }
}

/// A weight whose product must use f32 activations (routers, gates, small projections): widened when quantised.
pub(crate) fn weight_f32<B: Backend>(backend: &B, m: &Matrix) -> Result<B::Weight, ModelError> {
    let packed = if m.format().is_quantised() { pack_f32(m.rows(), m.cols(), &m.to_f32()?) } else { m.pack()? };
    Ok(backend.weight(packed))
}

/// A one-row tensor.
pub(crate) fn vector<B: Backend>(backend: &B, values: &[f32]) -> B::Tensor {
    let mut t = backend.tensor(1, values.len());
    backend.upload(&mut t, 0, values);
    t
}

/// cos, then sin, of `inv_freq` at a position.
pub(crate) fn angles(inv_freq: &[f32], pos: usize, out: &mut [f32]) {
    let (cos, sin) = out.split_at_mut(inv_freq.len());
    for ((inv, c), s) in inv_freq.iter().zip(cos).zip(sin) {
        // The angle in f32, as transformers has it; its cosine as exact as f64 gives.
        let angle = f64::from(pos as f32 * inv);
        *c = angle.cos() as f32;
        *s = angle.sin() as f32;
    }
}
