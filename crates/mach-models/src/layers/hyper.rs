//! Hyper-connections around the two parts of a block, and before the head.

use mach_backend::{Backend, HyperSpec, HyperWeights};

use super::{vector, weight_f32};
use crate::ModelError;
use crate::latent_tensors::HyperTensors;
use crate::tensors::Resolved;

/// Weights of one mixture.
pub struct Hyper<B: Backend> {
    project: B::Weight,
    base: B::Tensor,
    scale: B::Tensor,
}

impl<B: Backend> Hyper<B> {
    pub(crate) fn load(backend: &B, files: &Resolved, t: &HyperTensors) -> Result<Self, ModelError> {
        Ok(Self {
            project: weight_f32(backend, &t.project)?,
            base: vector(backend, &files.ck.read_f32(&t.base)?),
            scale: vector(backend, &files.ck.read_f32(&t.scale)?),
        })
    }

    fn weights(&self) -> HyperWeights<'_, B::Tensor, B::Weight> {
        HyperWeights { project: &self.project, base: &self.base, scale: &self.scale }
    }

    /// What the block reads of `x`, to `h`, and how its output will be written, to `mix`.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn mix(&self, backend: &B, spec: &HyperSpec, x: &B::Tensor, x_row: usize, rows: usize, h: &mut B::Tensor, mix: &mut B::Tensor) {
        backend.reshape(mix, rows, spec.streams * (1 + spec.streams));
        backend.hyper_mix(spec, &self.weights(), x, x_row, rows, h, mix);
    }

    /// What the head reads of `x`.
    pub(crate) fn head(&self, backend: &B, spec: &HyperSpec, x: &B::Tensor, x_row: usize, rows: usize, out: &mut B::Tensor) {
        backend.hyper_head(spec, &self.weights(), x, x_row, rows, out);
    }
}
