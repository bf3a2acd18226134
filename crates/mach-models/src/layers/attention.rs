//! Softmax attention with rope; norms, biases, sinks and an output gate where the block has them.

use mach_backend::{Backend, QkNormRope, Segment};

use super::vector;
use crate::ModelError;
use crate::block_tensors::AttentionTensors;
use crate::spec::AttentionBlock;
use crate::tensors::{NormForm, Resolved};
use crate::workspace::Workspace;

/// Weights of one layer.
pub struct Attention<B: Backend> {
    pub(crate) block: AttentionBlock,
    q: B::Weight,
    k: B::Weight,
    v: Option<B::Weight>,
    o: B::Weight,
    bias: Option<[B::Tensor; 4]>,
    sinks: Option<B::Tensor>,
    norms: Option<[B::Tensor; 2]>,
    /// Which KV store of the model.
    kv: usize,
}

impl<B: Backend> Attention<B> {
    pub(crate) fn load(backend: &B, files: &Resolved, t: &AttentionTensors, block: AttentionBlock, kv: usize, form: NormForm) -> Result<Self, ModelError> {
        let norm = |name: &String| files.norm(name, form).map(|w| vector(backend, &w));
        let plain = |name: &String| files.norm(name, NormForm::Plain).map(|w| vector(backend, &w));
        Ok(Self {
            block,
            q: backend.weight(t.q.pack()?),
            k: backend.weight(t.k.pack()?),
            v: t.v.as_ref().map(|v| v.pack().map(|v| backend.weight(v))).transpose()?,
            o: backend.weight(t.o.pack()?),
            bias: match &t.bias {
                Some([q, k, v, o]) => Some([plain(q)?, plain(k)?, plain(v)?, plain(o)?]),
                None => None,
            },
            sinks: t.sinks.as_ref().map(plain).transpose()?,
            norms: match &t.norms {
                Some([q, k]) => Some([norm(q)?, norm(k)?]),
                None => None,
            },
            kv,
        })
    }

    /// `ws.h` rows → `ws.out` rows. The rope table's rows are those of this call.
    pub(crate) fn forward(&self, backend: &B, ws: &mut Workspace<B>, rows: usize, eps: f32, segments: &[Segment<'_>], kv: &mut [B::Kv]) {
        let (kv, spec) = (&mut kv[self.kv], &self.block.attention);
        let a = &mut ws.attention;
        let (heads, kv_width) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        for (t, cols) in [(&mut a.q, if spec.gate { 2 * heads } else { heads }), (&mut a.k, kv_width), (&mut a.v, kv_width), (&mut a.out, heads)] {
            backend.reshape(t, rows, cols);
        }
        let mut outs = vec![(&self.q, &mut a.q), (&self.k, &mut a.k)];
        outs.extend(self.v.as_ref().map(|v| (v, &mut a.v)));
        backend.linear(&ws.h, rows, &mut outs);
        if let Some([q, k, v, _]) = &self.bias {
            for (x, bias) in [(&mut a.q, q), (&mut a.k, k), (&mut a.v, v)] {
                backend.add_bias(x, rows, bias);
            }
        }
        let [q_norm, k_norm] = self.norms.as_ref().map_or([None; 2], |n| n.each_ref().map(Some));
        let prep = QkNormRope { eps, q_norm, k_norm, v_norm: self.block.v_norm, rope: &ws.rope, half: ws.rope_half };
        backend.qkv_store(spec, &prep, &mut a.q, &mut a.k, self.v.is_some().then_some(&a.v), segments, kv);
        backend.attention(spec, &a.q, self.sinks.as_ref(), segments, kv, &mut a.out);
        backend.linear(&a.out, rows, &mut [(&self.o, &mut ws.out)]);
        if let Some([.., o]) = &self.bias {
            backend.add_bias(&mut ws.out, rows, o);
        }
    }
}
