//! Softmax attention with per-head q/k norm, rope, and an output gate where the spec has one.

use mach_backend::{AttentionSpec, Backend, QkNormRope, Segment};

use super::vector;
use crate::ModelError;
use crate::tensors::{AttentionTensors, NormForm, Resolved};
use crate::workspace::Workspace;

/// Weights of one layer.
pub struct Attention<B: Backend> {
    spec: AttentionSpec,
    q: B::Weight,
    k: B::Weight,
    v: B::Weight,
    o: B::Weight,
    q_norm: B::Tensor,
    k_norm: B::Tensor,
    /// Which KV store of the model.
    kv: usize,
}

impl<B: Backend> Attention<B> {
    pub(crate) fn load(backend: &B, files: &Resolved, t: &AttentionTensors, spec: AttentionSpec, kv: usize, form: NormForm) -> Result<Self, ModelError> {
        Ok(Self {
            spec,
            q: backend.weight(t.q.pack()?),
            k: backend.weight(t.k.pack()?),
            v: backend.weight(t.v.pack()?),
            o: backend.weight(t.o.pack()?),
            q_norm: vector(backend, &files.norm(&t.q_norm, form)?),
            k_norm: vector(backend, &files.norm(&t.k_norm, form)?),
            kv,
        })
    }

    /// `ws.h` rows → `ws.out` rows. The rope table's rows are those of this call.
    pub(crate) fn forward(&self, backend: &B, ws: &mut Workspace<B>, rows: usize, eps: f32, segments: &[Segment<'_>], kv: &mut [B::Kv]) {
        let kv = &mut kv[self.kv];
        let a = &mut ws.attention;
        let (heads, kv_width) = (self.spec.heads * self.spec.head_dim, self.spec.kv_heads * self.spec.head_dim);
        for (t, cols) in [(&mut a.q, if self.spec.gate { 2 * heads } else { heads }), (&mut a.k, kv_width), (&mut a.v, kv_width), (&mut a.out, heads)] {
            backend.reshape(t, rows, cols);
        }
        backend.linear(&ws.h, rows, &mut [(&self.q, &mut a.q), (&self.k, &mut a.k), (&self.v, &mut a.v)]);
        let prep = QkNormRope { eps, q_norm: Some(&self.q_norm), k_norm: Some(&self.k_norm), v_norm: false, rope: &ws.rope, half: ws.rope_half };
        backend.qkv_store(&self.spec, &prep, &mut a.q, &mut a.k, Some(&a.v), segments, kv);
        backend.attention(&self.spec, &a.q, None, segments, kv, &mut a.out);
        backend.linear(&a.out, rows, &mut [(&self.o, &mut ws.out)]);
    }
}
