//! Tensors of latent attention and of hyper-connections, by the names that DeepSeek publishes.

use mach_backend::HyperSpec;
use mach_format::Matrix;

use crate::ModelError;
use crate::spec::LatentBlock;
use crate::tensors::Resolver;

/// What makes entries of one width.
pub struct PoolTensors {
    pub(crate) kv: Matrix,
    pub(crate) gate: Matrix,
    pub(crate) position_bias: String,
    pub(crate) norm: String,
}

/// What chooses among entries.
pub struct IndexTensors {
    pub(crate) q: Matrix,
    pub(crate) weights: Matrix,
    pub(crate) pool: PoolTensors,
}

/// Latent attention.
pub struct LatentTensors {
    pub(crate) q_a: Matrix,
    pub(crate) q_norm: String,
    pub(crate) q_b: Matrix,
    pub(crate) kv: Matrix,
    pub(crate) kv_norm: String,
    pub(crate) sinks: String,
    /// All groups, one below the other.
    pub(crate) o_a: Matrix,
    pub(crate) o_b: Matrix,
    pub(crate) pool: Option<PoolTensors>,
    pub(crate) index: Option<IndexTensors>,
}

impl LatentTensors {
    /// Matrices, with whether their products take f32 activations.
    pub(crate) fn matrices(&self) -> Vec<(&Matrix, bool)> {
        let mut all: Vec<(&Matrix, bool)> = [&self.q_a, &self.q_b, &self.kv, &self.o_a, &self.o_b].map(|m| (m, false)).into();
        all.extend(self.pool.iter().flat_map(|p| [(&p.kv, true), (&p.gate, true)]));
        all.extend(self.index.iter().flat_map(|i| [(&i.q, false), (&i.weights, true), (&i.pool.kv, true), (&i.pool.gate, true)]));
        all
    }
}

/// One mixture of a hyper-connection.
pub struct HyperTensors {
    pub(crate) project: Matrix,
    pub(crate) base: String,
    pub(crate) scale: String,
}

impl Resolver<'_> {
    pub(crate) fn latent(&mut self, at: &dyn Fn(&str) -> String, hidden: usize, block: &LatentBlock) -> Result<LatentTensors, ModelError> {
        let a = &block.attention;
        let heads = a.heads * a.dim;
        let pool = |r: &mut Self, prefix: &str, ratio: usize, width: usize, dim: usize| -> Result<PoolTensors, ModelError> {
            Ok(PoolTensors {
                kv: r.matrix(&at(&format!("{prefix}wkv")), width, hidden)?,
                gate: r.matrix(&at(&format!("{prefix}wgate")), width, hidden)?,
                position_bias: r.vector(at(&format!("{prefix}ape")), ratio * width)?,
                norm: r.vector(at(&format!("{prefix}norm.weight")), dim)?,
            })
        };
        let (mut entries, mut index) = (None, None);
        if let Some(c) = &a.compress {
            entries = Some(pool(self, "attn.compressor.", c.ratio, c.width(a.dim), a.dim)?);
            if let Some(i) = &c.index {
                index = Some(IndexTensors {
                    q: self.matrix(&at("attn.indexer.wq_b"), i.heads * i.dim, block.q_rank)?,
                    weights: self.matrix(&at("attn.indexer.weights_proj"), i.heads, hidden)?,
                    pool: pool(self, "attn.indexer.compressor.", c.ratio, c.width(i.dim), i.dim)?,
                });
            }
        }
        Ok(LatentTensors {
            q_a: self.matrix(&at("attn.wq_a"), block.q_rank, hidden)?,
            q_norm: self.vector(at("attn.q_norm.weight"), block.q_rank)?,
            q_b: self.matrix(&at("attn.wq_b"), heads, block.q_rank)?,
            kv: self.matrix(&at("attn.wkv"), a.dim, hidden)?,
            kv_norm: self.vector(at("attn.kv_norm.weight"), a.dim)?,
            sinks: self.vector(at("attn.attn_sink"), a.heads)?,
            o_a: self.matrix(&at("attn.wo_a"), block.groups * block.o_rank, heads / block.groups)?,
            o_b: self.matrix(&at("attn.wo_b"), hidden, block.groups * block.o_rank)?,
            pool: entries,
            index,
        })
    }

    /// The mixture of the block part or head `what`, which gives `mixes` numbers scaled by `scales` factors.
    pub(crate) fn hyper(
        &mut self,
        name: &dyn Fn(&str) -> String,
        hidden: usize,
        spec: &HyperSpec,
        mixes: usize,
        scales: usize,
    ) -> Result<HyperTensors, ModelError> {
        Ok(HyperTensors {
            project: self.matrix(&name("fn"), mixes, spec.streams * hidden)?,
            base: self.vector(name("base"), mixes)?,
            scale: self.vector(name("scale"), scales)?,
        })
    }
}
