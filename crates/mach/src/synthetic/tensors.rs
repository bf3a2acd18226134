//! What stands beside the experts: every tensor of a model, by name, with what its values are drawn from.

use mach_backend::{GdnSpec, HyperSpec, RouterBias};
use mach_format::{Dtype, FormatError, Planned, SafetensorsWriter};
use mach_models::MoeArchAdapter;
use mach_models::spec::{AttentionBlock, FfnSpec, LatentBlock, MixerSpec, ModelSpec, MoeSpec};

use super::{GROUP, PIECE, affine, fill_random, unit_gain};
use crate::rates::Xorshift;

/// A tensor beside the experts.
pub(super) struct Tensor {
    /// Module of a quantised matrix, full name of others.
    pub(super) name: String,
    pub(super) content: Content,
}

pub(super) enum Content {
    /// A quantised matrix of this standard deviation.
    Matrix { rows: usize, cols: usize, std: f32 },
    /// Plain values.
    Plain { dtype: Dtype, shape: Vec<usize>, draw: Draw },
    /// Experts of every token, `[vocab, top_k]`, different ones in a row.
    TokenExperts { vocab: usize, top_k: usize, experts: usize },
}

/// What plain values are drawn from.
#[derive(Clone, Copy)]
pub(super) enum Draw {
    Normal {
        mean: f32,
        std: f32,
    },
    /// ln of 1 to 16, as recurrent layers are initialised.
    LogDecay,
    /// Inverse softplus of 0.001 to 0.1, evenly in logarithms.
    TimeStep,
}

impl Draw {
    pub(super) fn value(self, random: &mut Xorshift) -> f32 {
        match self {
            Self::Normal { mean, std } => mean + std * random.normal(),
            Self::LogDecay => (1.0 + 15.0 * random.unit()).ln(),
            Self::TimeStep => (0.001 * 100f32.powf(random.unit())).exp_m1().ln(),
        }
    }
}

/// The experts of the next token.
pub(super) fn token_experts(top_k: usize, experts: usize, random: &mut Xorshift) -> impl Iterator<Item = i32> {
    let first = random.below(experts);
    (0..top_k).map(move |i| ((first + i * (experts / top_k)) % experts) as i32)
}

impl Tensor {
    pub(super) fn matrix(&self) -> Option<(usize, usize)> {
        match self.content {
            Content::Matrix { rows, cols, .. } => Some((rows, cols)),
            Content::Plain { .. } | Content::TokenExperts { .. } => None,
        }
    }

    pub(super) fn planned(&self, bits: u8) -> Vec<Planned> {
        let whole = |dtype, shape: &[usize]| vec![Planned { name: self.name.clone(), dtype, shape: shape.to_vec() }];
        match &self.content {
            Content::Plain { dtype, shape, .. } => whole(*dtype, shape),
            Content::TokenExperts { vocab, top_k, .. } => whole(Dtype::I32, &[*vocab, *top_k]),
            Content::Matrix { rows, cols, .. } => {
                let part = |suffix: &str, dtype, width| Planned { name: format!("{}.{suffix}", self.name), dtype, shape: vec![*rows, width] };
                let groups = cols / usize::from(GROUP);
                vec![part("weight", Dtype::U32, cols * usize::from(bits) / 32), part("scales", Dtype::F16, groups), part("biases", Dtype::F16, groups)]
            }
        }
    }

    pub(super) fn write(&self, file: &mut SafetensorsWriter, bits: u8, random: &mut Xorshift, advance: &mut dyn FnMut(usize)) -> Result<(), FormatError> {
        for (i, tensor) in self.planned(bits).iter().enumerate() {
            let mut left = tensor.bytes();
            // Whole rows of a table of experts.
            let size = if let Content::TokenExperts { top_k, .. } = self.content { PIECE / (4 * top_k) * (4 * top_k) } else { PIECE };
            while left > 0 {
                let mut piece = vec![0; left.min(size)];
                match &self.content {
                    Content::Matrix { .. } if i == 0 => fill_random(&mut piece, random),
                    Content::Matrix { std, .. } => piece.as_chunks_mut().0.fill(affine(bits, *std)[i - 1]),
                    Content::Plain { dtype: Dtype::F32, draw, .. } => {
                        piece.as_chunks_mut().0.iter_mut().for_each(|v| *v = draw.value(random).to_le_bytes());
                    }
                    Content::Plain { draw, .. } => {
                        piece.as_chunks_mut().0.iter_mut().for_each(|v| *v = half::bf16::from_f32(draw.value(random)).to_le_bytes());
                    }
                    Content::TokenExperts { top_k, experts, .. } => piece.chunks_exact_mut(4 * top_k).for_each(|row| {
                        row.as_chunks_mut().0.iter_mut().zip(token_experts(*top_k, *experts, random)).for_each(|(id, e)| *id = e.to_le_bytes());
                    }),
                }
                file.write(&tensor.name, &piece)?;
                advance(piece.len());
                left -= piece.len();
            }
        }
        Ok(())
    }
}

/// Every tensor beside the experts, in the order of the layers.
pub(super) fn residents(arch: &MoeArchAdapter, spec: &ModelSpec, wrapped: bool) -> Vec<Tensor> {
    let names = arch.names;
    let root = if wrapped { names.roots[0] } else { names.roots[names.roots.len() - 1] };
    let mut list = List { all: Vec::new(), arch, hidden: spec.hidden };
    // Rows of size 1, so that what tells one token from another is not lost behind what the layers add.
    list.all
        .push(Tensor { name: format!("{root}{}", names.embed), content: Content::Matrix { rows: spec.vocab, cols: spec.hidden, std: 1.0 / spec.embed_scale } });
    for (i, layer) in spec.layers.iter().enumerate() {
        let at = |name: &str| format!("{root}layers.{i}.{name}");
        names.norms.iter().for_each(|name| list.norm(at(name) + ".weight", spec.hidden));
        if spec.post_norms {
            names.post_norms.iter().for_each(|name| list.norm(at(name) + ".weight", spec.hidden));
        }
        if spec.layer_scale {
            list.plain(at(names.layer_scale), vec![1], 1.0, 0.02);
        }
        if let Some(hyper) = &spec.hyper {
            ["attn", "ffn"].iter().for_each(|part| list.hyper(&|what| at(&format!("hc_{part}_{what}")), hyper, hyper.mixes(), 3));
        }
        match &layer.mixer {
            MixerSpec::Attention(block) => list.attention(&at, block),
            MixerSpec::Latent(block) => list.latent(&at, block),
            MixerSpec::Gdn(gdn) => list.gdn(&at, gdn),
        }
        match &layer.ffn {
            FfnSpec::Moe(moe) => list.moe(&at, moe, spec.vocab),
            FfnSpec::Dense { inner, .. } => list.feed_forward(names.dense.map(at), *inner),
        }
    }
    list.norm(format!("{root}norm.weight"), spec.hidden);
    if let Some(hyper) = &spec.hyper {
        list.hyper(&|what| format!("{root}hc_head_{what}"), hyper, hyper.streams, 1);
    }
    if !spec.tied {
        list.matrix(names.heads[0].to_owned(), spec.vocab, spec.hidden);
    }
    list.all
}

/// Tensors of one model so far.
struct List<'a> {
    all: Vec<Tensor>,
    arch: &'a MoeArchAdapter,
    hidden: usize,
}

type At<'a> = &'a dyn Fn(&str) -> String;

impl List<'_> {
    fn matrix(&mut self, name: String, rows: usize, cols: usize) {
        self.all.push(Tensor { name, content: Content::Matrix { rows, cols, std: unit_gain(cols) } });
    }

    fn drawn(&mut self, name: String, dtype: Dtype, shape: Vec<usize>, draw: Draw) {
        self.all.push(Tensor { name, content: Content::Plain { dtype, shape, draw } });
    }

    fn plain(&mut self, name: String, shape: Vec<usize>, mean: f32, std: f32) {
        self.drawn(name, Dtype::BF16, shape, Draw::Normal { mean, std });
    }

    /// Small projections stay in bf16, as quantised releases keep them in 8 bits or more.
    fn small(&mut self, module: String, rows: usize) {
        self.plain(module + ".weight", vec![rows, self.hidden], 0.0, unit_gain(self.hidden));
    }

    /// A norm weight near 1, stored less one where the family has it so.
    fn norm(&mut self, name: String, len: usize) {
        self.plain(name, vec![len], if self.arch.one_plus_norm { 0.0 } else { 1.0 }, 0.02);
    }

    fn feed_forward(&mut self, [gate, up, down]: [String; 3], inner: usize) {
        self.matrix(gate, inner, self.hidden);
        self.matrix(up, inner, self.hidden);
        self.matrix(down, self.hidden, inner);
    }

    /// f32 throughout, as published.
    fn hyper(&mut self, name: At<'_>, spec: &HyperSpec, mixes: usize, scales: usize) {
        let cols = spec.streams * self.hidden;
        for (what, shape, mean, std) in [("fn", vec![mixes, cols], 0.0, unit_gain(cols)), ("base", vec![mixes], 0.0, 0.02), ("scale", vec![scales], 1.0, 0.02)]
        {
            self.drawn(name(what), Dtype::F32, shape, Draw::Normal { mean, std });
        }
    }

    fn attention(&mut self, at: At<'_>, block: &AttentionBlock) {
        let (a, hidden) = (&block.attention, self.hidden);
        let [q, k, v, o, q_norm, k_norm] = self.arch.names.attention.map(at);
        let (heads, kv) = (a.heads * a.head_dim, a.kv_heads * a.head_dim);
        let q_rows = if a.gate { 2 * heads } else { heads };
        if block.bias {
            for (module, len) in [(&q, q_rows), (&k, kv), (&v, kv), (&o, hidden)] {
                self.plain(format!("{module}.bias"), vec![len], 0.0, 0.02);
            }
        }
        if block.sinks {
            self.plain(at(self.arch.names.sinks), vec![a.heads], 0.0, 1.0);
        }
        if block.qk_norm {
            self.norm(q_norm + ".weight", a.head_dim);
            self.norm(k_norm + ".weight", a.head_dim);
        }
        self.matrix(q, q_rows, hidden);
        self.matrix(k, kv, hidden);
        self.matrix(o, hidden, heads);
        if !block.v_from_k {
            self.matrix(v, kv, hidden);
        }
    }

    fn latent(&mut self, at: At<'_>, block: &LatentBlock) {
        let (a, hidden) = (&block.attention, self.hidden);
        let heads = a.heads * a.dim;
        self.matrix(at("attn.wq_a"), block.q_rank, hidden);
        self.norm(at("attn.q_norm.weight"), block.q_rank);
        self.matrix(at("attn.wq_b"), heads, block.q_rank);
        self.matrix(at("attn.wkv"), a.dim, hidden);
        self.norm(at("attn.kv_norm.weight"), a.dim);
        self.plain(at("attn.attn_sink"), vec![a.heads], 0.0, 1.0);
        self.matrix(at("attn.wo_a"), block.groups * block.o_rank, heads / block.groups);
        self.matrix(at("attn.wo_b"), hidden, block.groups * block.o_rank);
        let Some(compress) = &a.compress else { return };
        let mut pool = |prefix: &str, dim: usize| {
            let width = compress.width(dim);
            self.small(at(&format!("{prefix}wkv")), width);
            self.small(at(&format!("{prefix}wgate")), width);
            self.plain(at(&format!("{prefix}ape")), vec![compress.ratio, width], 0.0, 0.02);
            self.norm(at(&format!("{prefix}norm.weight")), dim);
        };
        pool("attn.compressor.", a.dim);
        if let Some(index) = &compress.index {
            pool("attn.indexer.compressor.", index.dim);
            self.matrix(at("attn.indexer.wq_b"), index.heads * index.dim, block.q_rank);
            self.small(at("attn.indexer.weights_proj"), index.heads);
        }
    }

    fn gdn(&mut self, at: At<'_>, g: &GdnSpec) {
        let [qkv, z, b, a, o] = self.arch.names.gdn.map(at);
        let [conv, a_log, dt_bias, gated_norm] = self.arch.names.gdn_small.map(at);
        let values = g.v_heads * g.v_dim;
        self.matrix(qkv, g.channels(), self.hidden);
        self.matrix(z, values, self.hidden);
        self.small(b, g.v_heads);
        self.small(a, g.v_heads);
        self.matrix(o, self.hidden, values);
        self.plain(conv, vec![g.channels(), 1, g.kernel], 0.0, unit_gain(g.kernel));
        self.drawn(a_log, Dtype::F32, vec![g.v_heads], Draw::LogDecay);
        self.drawn(dt_bias, Dtype::BF16, vec![g.v_heads], Draw::TimeStep);
        self.plain(gated_norm, vec![g.v_dim], 1.0, 0.02);
    }

    fn moe(&mut self, at: At<'_>, m: &MoeSpec, vocab: usize) {
        let (names, experts, hidden) = (self.arch.names, m.router.experts, self.hidden);
        self.small(at(names.router), experts);
        if m.router.bias != RouterBias::None {
            self.plain(at(names.router) + ".bias", vec![experts], 0.0, 0.02);
        }
        if m.by_token {
            self.all.push(Tensor { name: at(names.router) + ".tid2eid", content: Content::TokenExperts { vocab, top_k: m.router.top_k, experts } });
        }
        if m.expert_scale {
            self.plain(at(names.expert_scale), vec![experts], 1.0, 0.02);
        }
        if m.expert_bias {
            for (name, len) in names.switch.iter().zip([m.inner, m.inner, hidden]) {
                self.plain(at(name) + ".bias", vec![experts, len], 0.0, 0.02);
            }
        }
        if m.apart {
            names.apart.iter().for_each(|name| self.norm(at(name), hidden));
        }
        if let Some(shared) = m.shared {
            let [gate, up, down, scalar] = names.shared.map(at);
            self.feed_forward([gate, up, down], shared.inner);
            if shared.gated {
                self.small(scalar, 1);
            }
        }
    }
}
