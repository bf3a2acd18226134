//! Latent attention with compressed entries: the projections around the fused operation.

use mach_backend::{Backend, IndexRows, LatentRows, LatentSegment, LatentSpec, LatentStores, LatentWeights, PoolRows, PoolWeights};

use super::{angles, vector, weight_f32};
use crate::ModelError;
use crate::latent_tensors::{LatentTensors, PoolTensors};
use crate::spec::LatentBlock;
use crate::tensors::Resolved;
use crate::workspace::Workspace;

/// What makes entries of one width.
struct Pool<B: Backend> {
    kv: B::Weight,
    gate: B::Weight,
    position_bias: B::Tensor,
    norm: B::Tensor,
}

impl<B: Backend> Pool<B> {
    fn load(backend: &B, files: &Resolved, t: &PoolTensors, ratio: usize) -> Result<Self, ModelError> {
        let bias = files.ck.read_f32(&t.position_bias)?;
        let mut position_bias = backend.tensor(ratio, bias.len() / ratio);
        backend.upload(&mut position_bias, 0, &bias);
        Ok(Self { kv: weight_f32(backend, &t.kv)?, gate: weight_f32(backend, &t.gate)?, position_bias, norm: vector(backend, &files.ck.read_f32(&t.norm)?) })
    }

    fn weights(&self) -> PoolWeights<'_, B::Tensor> {
        PoolWeights { position_bias: &self.position_bias, norm: &self.norm }
    }
}

/// What chooses among the entries.
struct Index<B: Backend> {
    q: B::Weight,
    /// Head weights, with the factors of heads and width in them.
    weights: B::Weight,
    pool: Pool<B>,
}

/// Weights of one layer.
pub struct Latent<B: Backend> {
    pub(crate) block: LatentBlock,
    spec: LatentSpec,
    q_a: B::Weight,
    q_norm: B::Tensor,
    q_b: B::Weight,
    kv: B::Weight,
    kv_norm: B::Tensor,
    sinks: B::Tensor,
    o_a: Vec<B::Weight>,
    o_b: B::Weight,
    pool: Option<Pool<B>>,
    index: Option<Index<B>>,
    /// Frequencies of the rotating channels.
    inv_freq: Vec<f32>,
    /// The first store of this layer among those of the model; index keys have the next one.
    store: usize,
}

impl<B: Backend> Latent<B> {
    pub(crate) fn load(backend: &B, files: &Resolved, t: &LatentTensors, block: &LatentBlock, spec: LatentSpec, store: usize) -> Result<Self, ModelError> {
        let small = |name: &str| Ok::<_, ModelError>(vector(backend, &files.ck.read_f32(name)?));
        let (pool, index) = match &spec.compress {
            Some(c) => {
                let pool = t.pool.as_ref().map(|p| Pool::load(backend, files, p, c.ratio)).transpose()?;
                let index = c.index.zip(t.index.as_ref()).map(|(spec, i)| {
                    let factor = ((spec.heads * spec.dim) as f32).powf(-0.5);
                    let scaled: Vec<f32> = i.weights.to_f32()?.iter().map(|w| w * factor).collect();
                    Ok::<_, ModelError>(Index {
                        q: backend.weight(i.q.pack()?),
                        weights: backend.weight(mach_format::pack_f32(i.weights.rows(), i.weights.cols(), &scaled)),
                        pool: Pool::load(backend, files, &i.pool, c.ratio)?,
                    })
                });
                (pool, index.transpose()?)
            }
            None => (None, None),
        };
        Ok(Self {
            spec,
            q_a: backend.weight(t.q_a.pack()?),
            q_norm: small(&t.q_norm)?,
            q_b: backend.weight(t.q_b.pack()?),
            kv: backend.weight(t.kv.pack()?),
            kv_norm: small(&t.kv_norm)?,
            sinks: small(&t.sinks)?,
            o_a: (0..block.groups)
                .map(|g| Ok(backend.weight(t.o_a.rows_range(g * block.o_rank..(g + 1) * block.o_rank).pack()?)))
                .collect::<Result<_, ModelError>>()?,
            o_b: backend.weight(t.o_b.pack()?),
            pool,
            index,
            block: *block,
            inv_freq: files.spec.ropes[block.rope].inv_freq.clone(),
            store,
        })
    }

    /// `ws.h` rows → `ws.out` rows; advances the states. The rope table's rows are those of this call. `entry_row` of the segments is filled in here.
    pub(crate) fn forward(&self, backend: &B, ws: &mut Workspace<B>, rows: usize, segments: &mut [LatentSegment<'_, B::State>], entries: &mut [B::Entries]) {
        let (spec, l) = (&self.spec, &mut ws.latent);
        let heads = spec.heads * spec.dim;
        let index = spec.compress.and_then(|c| c.index);
        let width = |dim: usize| spec.compress.map_or(0, |c| c.width(dim));
        let (own, keys) = (width(spec.dim), index.map_or(0, |i| width(i.dim)));
        let (index_q, index_heads) = index.map_or((0, 0), |i| (i.heads * i.dim, i.heads));
        let shapes = [
            (&mut l.q_a, self.block.q_rank),
            (&mut l.q_normed, self.block.q_rank),
            (&mut l.q, heads),
            (&mut l.kv, spec.dim),
            (&mut l.pool_kv, own),
            (&mut l.pool_gate, own),
            (&mut l.index_q, index_q),
            (&mut l.index_kv, keys),
            (&mut l.index_gate, keys),
            (&mut l.index_weights, index_heads),
            (&mut l.out, heads),
            (&mut l.grouped, self.block.groups * self.block.o_rank),
        ];
        shapes.into_iter().for_each(|(t, cols)| backend.reshape(t, rows, cols));

        let mut of_h = vec![(&self.q_a, &mut l.q_a), (&self.kv, &mut l.kv)];
        if let Some(p) = &self.pool {
            of_h.extend([(&p.kv, &mut l.pool_kv), (&p.gate, &mut l.pool_gate)]);
        }
        if let Some(i) = &self.index {
            of_h.extend([(&i.pool.kv, &mut l.index_kv), (&i.pool.gate, &mut l.index_gate), (&i.weights, &mut l.index_weights)]);
        }
        backend.linear(&ws.h, rows, &mut of_h);
        backend.rms_norm(&l.q_a, 0, rows, &self.q_norm, spec.eps, &mut l.q_normed);
        let mut of_q = vec![(&self.q_b, &mut l.q)];
        of_q.extend(self.index.as_ref().map(|i| (&i.q, &mut l.index_q)));
        backend.linear(&l.q_normed, rows, &mut of_q);

        self.entry_angles(backend, &mut l.entry_rope, segments, rows);
        let w = LatentWeights {
            kv_norm: &self.kv_norm,
            sinks: &self.sinks,
            entries: self.pool.as_ref().map(Pool::weights),
            index: self.index.as_ref().map(|i| i.pool.weights()),
        };
        let call = LatentRows {
            q: &mut l.q,
            kv: &mut l.kv,
            entries: self.pool.as_ref().map(|_| PoolRows { kv: &l.pool_kv, gate: &l.pool_gate }),
            index: self.index.as_ref().map(|_| IndexRows {
                q: &mut l.index_q,
                pool: PoolRows { kv: &l.index_kv, gate: &l.index_gate },
                weights: &l.index_weights,
            }),
            rope: &ws.rope,
            entry_rope: &l.entry_rope,
        };
        let (mut first, mut second) = (None, None);
        if self.pool.is_some() {
            let mut own = entries[self.store..].iter_mut();
            first = own.next();
            second = if self.index.is_some() { own.next() } else { None };
        }
        backend.latent_attention(spec, &w, call, segments, LatentStores { entries: first, index: second }, &mut l.out);
        backend.linear_grouped(&l.out, rows, &self.o_a, &mut l.grouped);
        backend.linear(&l.grouped, rows, &mut [(&self.o_b, &mut ws.out)]);
    }

    /// Angles of the entries that the rows complete, at the positions of their first tokens.
    fn entry_angles(&self, backend: &B, table: &mut B::Tensor, segments: &mut [LatentSegment<'_, B::State>], rows: usize) {
        let cols = 2 * self.inv_freq.len();
        let mut entries = Vec::new();
        if let Some(c) = &self.spec.compress {
            for s in segments {
                s.entry_row = entries.len() / cols.max(1);
                for n in c.complete(s.pos)..c.complete(s.pos + s.rows) {
                    let at = entries.len();
                    entries.resize(at + cols, 0.0);
                    angles(&self.inv_freq, n * c.ratio, &mut entries[at..]);
                }
            }
        }
        backend.reshape(table, rows, cols);
        backend.upload(table, 0, &entries);
    }
}
