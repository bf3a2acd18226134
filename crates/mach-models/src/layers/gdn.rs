//! Gated delta net: projections, causal conv and delta rule, gated norm, output projection.

use mach_backend::{Backend, GdnSegment, GdnSpec, GdnWeights};

use super::{vector, weight_f32};
use crate::ModelError;
use crate::tensors::{Decay, GdnTensors, Resolved};
use crate::workspace::Workspace;

/// Weights of one layer.
pub struct Gdn<B: Backend> {
    spec: GdnSpec,
    qkv: B::Weight,
    z: B::Weight,
    b: B::Weight,
    a: B::Weight,
    o: B::Weight,
    conv: B::Tensor,
    neg_exp_a: B::Tensor,
    dt_bias: B::Tensor,
    norm: B::Tensor,
}

impl<B: Backend> Gdn<B> {
    pub(crate) fn load(backend: &B, files: &Resolved, t: &GdnTensors, spec: GdnSpec) -> Result<Self, ModelError> {
        // On disk `[channels, kernel]` (with a 1 on either side of the kernel); kernels want one row per tap.
        let channel_major = files.ck.read_f32(&t.conv)?;
        let (channels, kernel) = (spec.channels(), spec.kernel);
        let mut conv = backend.tensor(kernel, channels);
        for tap in 0..kernel {
            let row: Vec<f32> = (0..channels).map(|c| channel_major[c * kernel + tap]).collect();
            backend.upload(&mut conv, tap, &row);
        }
        let neg_exp_a = match &t.decay {
            Decay::Log(name) => files.ck.read_f32(name)?.iter().map(|a| -a.exp()).collect(),
            Decay::NegExp(name) => files.ck.read_f32(name)?,
        };
        Ok(Self {
            spec,
            qkv: backend.weight(t.qkv.pack()?),
            z: backend.weight(t.z.pack()?),
            b: weight_f32(backend, &t.b)?,
            a: weight_f32(backend, &t.a)?,
            o: backend.weight(t.o.pack()?),
            conv,
            neg_exp_a: vector(backend, &neg_exp_a),
            dt_bias: vector(backend, &files.ck.read_f32(&t.dt_bias)?),
            norm: vector(backend, &files.ck.read_f32(&t.norm)?),
        })
    }

    /// `ws.h` rows → `ws.out` rows; advances the states.
    pub(crate) fn forward(&self, backend: &B, ws: &mut Workspace<B>, rows: usize, segments: &mut [GdnSegment<'_, B::State>]) {
        let g = &mut ws.gdn;
        let (channels, values, heads) = (self.spec.channels(), self.spec.v_heads * self.spec.v_dim, self.spec.v_heads);
        for (t, cols) in [(&mut g.qkv, channels), (&mut g.z, values), (&mut g.b, heads), (&mut g.a, heads), (&mut g.out, values)] {
            backend.reshape(t, rows, cols);
        }
        backend.linear(&ws.h, rows, &mut [(&self.qkv, &mut g.qkv), (&self.z, &mut g.z), (&self.b, &mut g.b), (&self.a, &mut g.a)]);
        let w = GdnWeights { conv: &self.conv, neg_exp_a: &self.neg_exp_a, dt_bias: &self.dt_bias, norm: &self.norm };
        backend.gdn(&self.spec, &w, &g.qkv, &g.z, &g.b, &g.a, segments, &mut g.out);
        backend.linear(&g.out, rows, &mut [(&self.o, &mut ws.out)]);
    }
}
