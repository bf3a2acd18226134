//! From a spec to the tensors on disk: names, layouts, shapes. Reads headers only.

use std::collections::HashSet;
use std::sync::Arc;

use mach_backend::GdnSpec;
use mach_format::{Checkpoint, ExpertSource, LayerPlan, Matrix, PackPlan, ScaleType, WeightFormat};

use crate::ModelError;
use crate::block_tensors::{AttentionTensors, FeedForwardTensors, MoeTensors};
use crate::gguf::has_gguf_weights;
use crate::latent_tensors::{HyperTensors, LatentTensors};
use crate::registry::MoeArchAdapter;
use crate::spec::{FfnSpec, MixerSpec, ModelSpec, MoeSpec};

/// Names of a family's tensors; modules without `.weight`, `{}` stands for an expert id.
pub struct WeightNames {
    /// What may stand before the embedding, `layers.N.`, `norm`.
    pub roots: &'static [&'static str],
    /// Embedding.
    pub embed: &'static str,
    /// Norms before the mixer and before the feed-forward part.
    pub norms: [&'static str; 2],
    /// Output head.
    pub heads: &'static [&'static str],
    /// q, k, v, o projections and the weights of the q and k norms.
    pub attention: [&'static str; 6],
    /// qkv, z, b, a and out projections of the delta net.
    pub gdn: [&'static str; 5],
    /// conv, A_log, dt_bias and norm of the delta net, as full names.
    pub gdn_small: [&'static str; 4],
    /// `−exp(A_log)` where a file has that.
    pub gdn_neg_exp: &'static str,
    /// Sinks of the heads, as a full name.
    pub sinks: &'static str,
    /// Norms after the mixer and after the feed-forward part.
    pub post_norms: [&'static str; 2],
    /// Factor at the end of a layer, as a full name.
    pub layer_scale: &'static str,
    /// Router.
    pub router: &'static str,
    /// Factors of experts, as a full name.
    pub expert_scale: &'static str,
    /// Norms of the router's and the experts' input, of what the experts give and of what the shared block gives, as full names.
    pub apart: [&'static str; 4],
    /// Fused gate|up and down of all experts.
    pub fused: [&'static str; 2],
    /// Rows of gate and up lie in turn in fused ones, and what is not quantised lies transposed, `[experts, in, out]`.
    pub interleaved: bool,
    /// Gate, up, down of one expert.
    pub each: [&'static str; 3],
    /// Gate, up, down of all experts, stacked.
    pub switch: [&'static str; 3],
    /// Gate, up, down and scalar gate of the shared expert.
    pub shared: [&'static str; 4],
    /// Gate, up, down of a dense block.
    pub dense: [&'static str; 3],
    /// Beginnings of tensors that are recognised and not used.
    pub unused: &'static [&'static str],
}

/// Names of Qwen3-MoE and Qwen3.5-MoE.
pub static QWEN: WeightNames = WeightNames {
    roots: &["model.language_model.", "language_model.model.", "model."],
    embed: "embed_tokens",
    norms: ["input_layernorm", "post_attention_layernorm"],
    heads: &["lm_head", "language_model.lm_head"],
    attention: ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "self_attn.q_norm", "self_attn.k_norm"],
    gdn: ["linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.in_proj_b", "linear_attn.in_proj_a", "linear_attn.out_proj"],
    gdn_small: ["linear_attn.conv1d.weight", "linear_attn.A_log", "linear_attn.dt_bias", "linear_attn.norm.weight"],
    gdn_neg_exp: "linear_attn.neg_exp_A",
    sinks: "",
    post_norms: ["", ""],
    layer_scale: "",
    router: "mlp.gate",
    expert_scale: "",
    apart: [""; 4],
    fused: ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    interleaved: false,
    each: ["mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj", "mlp.experts.{}.down_proj"],
    switch: ["mlp.switch_mlp.gate_proj", "mlp.switch_mlp.up_proj", "mlp.switch_mlp.down_proj"],
    shared: ["mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj", "mlp.shared_expert_gate"],
    dense: ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
    unused: &["model.visual.", "visual.", "vision_tower.", "model.vision_tower.", "mtp.", "model.mtp.", "language_model.mtp."],
};

/// How norm weights are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormForm {
    /// The factor itself.
    Plain,
    /// The factor minus one.
    OnePlus,
}

/// Delta net tensors.
pub struct GdnTensors {
    pub(crate) qkv: Matrix,
    pub(crate) z: Matrix,
    pub(crate) b: Matrix,
    pub(crate) a: Matrix,
    pub(crate) o: Matrix,
    pub(crate) conv: String,
    pub(crate) decay: Decay,
    pub(crate) dt_bias: String,
    pub(crate) norm: String,
}

/// How the decays of a delta net are stored.
pub(crate) enum Decay {
    /// `A_log`.
    Log(String),
    /// `−exp(A_log)`.
    NegExp(String),
}

pub(crate) enum MixerTensors {
    Attention(AttentionTensors),
    Gdn(GdnTensors),
    Latent(Box<LatentTensors>),
}

pub(crate) enum FfnTensors {
    Moe(Box<MoeTensors>),
    Dense(Box<FeedForwardTensors>),
}

pub(crate) struct LayerTensors {
    pub input_norm: String,
    pub post_norm: String,
    pub mixer: MixerTensors,
    pub ffn: FfnTensors,
    /// Around the mixer and the feed-forward part.
    pub hyper: Option<[HyperTensors; 2]>,
    /// Norms after both, where there are any.
    pub post_norms: Option<[String; 2]>,
    pub scale: Option<String>,
}

/// A checkpoint whose tensors were all found and have the shapes that the config says.
pub struct Resolved {
    pub(crate) ck: Arc<Checkpoint>,
    pub(crate) arch: &'static MoeArchAdapter,
    pub(crate) spec: ModelSpec,
    pub(crate) embed: Matrix,
    /// Equal to `embed` when tied.
    pub(crate) head: Matrix,
    pub(crate) final_norm: String,
    /// Before the head.
    pub(crate) head_hyper: Option<HyperTensors>,
    pub(crate) layers: Vec<LayerTensors>,
    /// Of the block norms.
    pub(crate) norm_form: NormForm,
    /// Tensors that are recognised and not used (vision, mtp).
    unused: Vec<String>,
}

impl Resolved {
    /// Finds every tensor of the model.
    ///
    /// # Errors
    /// Unknown families and config fields, missing tensors, wrong shapes, tensors that belong to nothing.
    pub fn open(ck: Arc<Checkpoint>) -> Result<Self, ModelError> {
        let (arch, spec) = crate::registry::read_spec(&ck)?;
        let names = arch.names;
        let root = names.roots.iter().copied().find(|r| ck.tensor(&format!("{r}norm.weight")).is_some()).ok_or_else(|| ModelError::MissingTensor {
            name: format!("{}norm.weight", names.roots[0]),
            hint: format!("no tensor of a {} model was found; is this its weight folder?", arch.model_type),
        })?;
        let mut r = Resolver { ck: &ck, used: HashSet::new() };
        let embed = r.matrix(&format!("{root}{}", names.embed), spec.vocab, spec.hidden)?;
        let head_name = names.heads.iter().find(|h| ck.tensor(&format!("{h}.weight")).is_some());
        let head = match head_name {
            Some(name) if !spec.tied => r.matrix(name, spec.vocab, spec.hidden)?,
            // Some exports write the tied head a second time.
            Some(name) => r.matrix(name, spec.vocab, spec.hidden).map(|_| embed.clone())?,
            None if spec.tied => embed.clone(),
            None => {
                return Err(ModelError::MissingTensor {
                    name: format!("{}.weight", names.heads[0]),
                    hint: "tie_word_embeddings is false, so there must be a head".to_owned(),
                });
            }
        };
        let final_norm = r.vector(format!("{root}norm.weight"), spec.hidden)?;
        let mut layers = Vec::with_capacity(spec.layers.len());
        for (i, layer) in spec.layers.iter().enumerate() {
            let at = |name: &str| format!("{root}layers.{i}.{name}");
            layers.push(LayerTensors {
                input_norm: r.vector(at(names.norms[0]) + ".weight", spec.hidden)?,
                post_norm: r.vector(at(names.norms[1]) + ".weight", spec.hidden)?,
                mixer: match &layer.mixer {
                    MixerSpec::Attention(a) => MixerTensors::Attention(r.attention(names, &at, spec.hidden, a)?),
                    MixerSpec::Gdn(g) => MixerTensors::Gdn(r.gdn(names, &at, spec.hidden, g)?),
                    MixerSpec::Latent(l) => MixerTensors::Latent(Box::new(r.latent(&at, spec.hidden, l)?)),
                },
                ffn: match &layer.ffn {
                    FfnSpec::Moe(m) => FfnTensors::Moe(Box::new(r.moe(names, &at, [spec.hidden, spec.vocab], m, i)?)),
                    FfnSpec::Dense { inner, .. } => FfnTensors::Dense(Box::new(r.feed_forward(names.dense, None, &at, spec.hidden, *inner)?)),
                },
                hyper: match &spec.hyper {
                    Some(h) => {
                        let mut of = |part: &str| r.hyper(&|what| at(&format!("hc_{part}_{what}")), spec.hidden, h, h.mixes(), 3);
                        Some([of("attn")?, of("ffn")?])
                    }
                    None => None,
                },
                post_norms: match spec.post_norms {
                    true => {
                        let mut of = |name: &str| r.vector(at(name) + ".weight", spec.hidden);
                        Some([of(names.post_norms[0])?, of(names.post_norms[1])?])
                    }
                    false => None,
                },
                scale: if spec.layer_scale { Some(r.vector(at(names.layer_scale), 1)?) } else { None },
            });
        }
        let head_hyper = spec.hyper.map(|h| r.hyper(&|what| format!("{root}hc_head_{what}"), spec.hidden, &h, h.streams, 1)).transpose()?;
        let used = r.used;
        let (unused, unknown): (Vec<_>, Vec<_>) = ck
            .tensors()
            .map(|(name, _)| name)
            .filter(|name| !used.contains(*name) && !name.ends_with("rotary_emb.inv_freq"))
            .partition(|name| names.unused.iter().any(|p| name.starts_with(p)));
        if let Some(name) = unknown.first() {
            return Err(ModelError::UnknownTensor { name: (*name).to_owned(), count: unknown.len(), arch: arch.model_type });
        }
        let unused = unused.into_iter().map(str::to_owned).collect();
        let norm_form = norm_form(&ck, arch, &layers);
        Ok(Self { arch, spec, embed, head, final_norm, head_hyper, layers, norm_form, unused, ck })
    }

    /// The checkpoint.
    pub fn checkpoint(&self) -> &Arc<Checkpoint> {
        &self.ck
    }

    /// Family.
    pub fn arch(&self) -> &'static MoeArchAdapter {
        self.arch
    }

    /// Shapes.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Names of tensors that are recognised and not used.
    pub fn unused(&self) -> &[String] {
        &self.unused
    }

    /// Format of the output head.
    pub fn head_format(&self) -> WeightFormat {
        self.head.format()
    }

    /// The embedding, read row by row on demand.
    pub fn embedding(&self) -> &Matrix {
        &self.embed
    }

    /// The experts' tensors, `None` in a pack.
    pub fn experts(&self) -> Option<Vec<LayerPlan>> {
        self.moe().map(|m| m.experts.clone()).collect()
    }

    /// Whether routed experts are stored unquantised in the checkpoint itself.
    pub fn plain_experts(&self) -> bool {
        self.moe().any(|m| m.experts.as_ref().is_some_and(|e| e.gate.expert(0).format().is_plain()))
    }

    fn moe(&self) -> impl Iterator<Item = &MoeTensors> {
        self.layers.iter().filter_map(|l| match &l.ffn {
            FfnTensors::Moe(m) => Some(&**m),
            FfnTensors::Dense(_) => None,
        })
    }

    /// The effective weight of an RMS norm.
    pub(crate) fn norm(&self, name: &str, form: NormForm) -> Result<Vec<f32>, ModelError> {
        let mut w = self.ck.read_f32(name)?;
        if form == NormForm::OnePlus {
            w.iter_mut().for_each(|w| *w += 1.0);
        }
        Ok(w)
    }

    /// Matrices that are kept in memory, with whether they are widened to f32 at load.
    fn resident(&self) -> Vec<(&Matrix, bool)> {
        let mut all = vec![(&self.head, false)];
        all.extend(self.head_hyper.iter().map(|h| (&h.project, true)));
        for layer in &self.layers {
            match &layer.mixer {
                MixerTensors::Attention(t) => all.extend(t.matrices().map(|m| (m, false))),
                MixerTensors::Gdn(t) => {
                    all.extend([&t.qkv, &t.z, &t.o].map(|m| (m, false)));
                    all.extend([&t.b, &t.a].map(|m| (m, true)));
                }
                MixerTensors::Latent(t) => all.extend(t.matrices()),
            }
            all.extend(layer.hyper.iter().flatten().map(|h| (&h.project, true)));
            let block = match &layer.ffn {
                FfnTensors::Moe(m) => {
                    all.push((&m.router, true));
                    m.shared.as_ref()
                }
                FfnTensors::Dense(d) => Some(&**d),
            };
            if let Some(b) = block {
                all.extend([&b.gate, &b.up, &b.down].map(|m| (m, false)));
                all.extend(b.scalar.iter().map(|m| (m, true)));
            }
        }
        all
    }

    /// Bytes of the always-active weights in memory.
    pub fn resident_bytes(&self) -> u64 {
        let packed = |(m, widened): (&Matrix, bool)| {
            let format = if widened && m.format().is_quantised() { WeightFormat::F32 } else { m.format() };
            mach_format::PackedLayout::new(m.rows(), m.cols(), format).bytes() as u64
        };
        let biases = |m: &MoeSpec| if m.expert_bias { 4 * m.router.experts * (2 * m.inner + self.spec.hidden) } else { 0 };
        let biases: usize = self.spec.moe_layers().map(|(_, m)| biases(m)).sum();
        self.resident().into_iter().map(packed).sum::<u64>() + biases as u64
    }

    /// Parameters of the language model, embedding included. Experts that are only in a sidecar are counted from the spec.
    pub fn parameters(&self) -> u64 {
        let size = |m: &Matrix| (m.rows() * m.cols()) as u64;
        let resident: u64 = self.resident().iter().map(|(m, _)| size(m)).sum();
        let experts: u64 = self.spec.moe_layers().map(|(_, m)| (m.router.experts * 3 * m.inner * self.spec.hidden) as u64).sum();
        resident + experts + if self.spec.tied { 0 } else { size(&self.embed) }
    }

    /// What `artifacts build` writes: experts and big linears at `bits` in groups (`None` keeps the source's), embedding
    /// and head at 8 bits (at 4 they cost a third of the whole loss for a few percent of the bytes), routers, gates,
    /// norms and the recurrence's small projections as they are.
    ///
    /// # Errors
    /// A pack, whose experts are already in a sidecar.
    pub fn pack_plan(&self, bits: Option<(u8, u16)>) -> Result<PackPlan, ModelError> {
        let format = bits.map(|(bits, group)| WeightFormat::Affine { bits, group, scales: ScaleType::F16 });
        let ends = bits.map(|(_, group)| WeightFormat::Affine { bits: 8, group, scales: ScaleType::F16 });
        let [embed, head] = [&self.embed, &self.head].map(|m| m.name().to_owned());
        let experts = self.experts().ok_or_else(|| ModelError::NoExperts {
            path: self.ck.path().display().to_string(),
            reason: "this is a pack; build from the checkpoint that it was made of".to_owned(),
        })?;
        let mut quantise = Vec::new();
        let mut covered: HashSet<String> = experts.iter().flat_map(|l| [&l.gate, &l.up, &l.down]).flat_map(ExpertSource::tensors).collect();
        let mut add = |m: &Matrix, widened: bool| {
            // What is widened at load stays as it is.
            if widened {
                return;
            }
            // Small inputs that the group does not divide stay as they are too.
            let format = if m.name() == embed || m.name() == head { ends } else { format };
            let fits = format.is_none_or(|f| m.quantised_layout(f).is_ok());
            let module = m.module().to_owned();
            quantise.push((module, format.filter(|_| fits && !m.format().is_quantised())));
            covered.extend(m.tensors().iter().cloned());
        };
        for (m, widened) in self.resident() {
            add(m, widened);
        }
        if !self.spec.tied {
            add(&self.embed, false);
        }
        let keep = self.ck.tensors().map(|(name, _)| name).filter(|name| !covered.contains(*name) && !self.unused.iter().any(|u| u == name));
        let keep = keep.map(str::to_owned).collect();
        Ok(PackPlan { model_type: self.arch.model_type.to_owned(), experts, expert_format: format, quantise, keep })
    }
}

/// MLX and GGUF files store `1 + w`; the shape of the conv (or the stacked experts, where there is none) tells MLX's apart.
fn norm_form(ck: &Checkpoint, arch: &MoeArchAdapter, layers: &[LayerTensors]) -> NormForm {
    let conv = layers.iter().find_map(|l| match &l.mixer {
        MixerTensors::Gdn(g) => ck.tensor(&g.conv),
        MixerTensors::Attention(_) | MixerTensors::Latent(_) => None,
    });
    let mlx = match conv {
        Some(info) => info.shape.len() == 3 && info.shape[1] != 1,
        None => ck.tensors().any(|(name, _)| name.contains(".switch_mlp.")),
    };
    if arch.one_plus_norm && !mlx && !has_gguf_weights(ck) { NormForm::OnePlus } else { NormForm::Plain }
}

pub(crate) struct Resolver<'a> {
    pub(crate) ck: &'a Checkpoint,
    pub(crate) used: HashSet<String>,
}

impl Resolver<'_> {
    pub(crate) fn raw(&mut self, module: &str) -> Result<Matrix, ModelError> {
        let m = self.ck.matrix(module)?;
        self.used.extend(m.tensors().iter().cloned());
        Ok(m)
    }

    pub(crate) fn matrix(&mut self, module: &str, rows: usize, cols: usize) -> Result<Matrix, ModelError> {
        let m = self.raw(module)?;
        check_shape(&m, None, rows, cols)?;
        Ok(m)
    }

    pub(crate) fn stack(&mut self, module: &str, experts: usize, rows: usize, cols: usize) -> Result<Matrix, ModelError> {
        let m = self.raw(module)?;
        check_shape(&m, Some(experts), rows, cols)?;
        Ok(m)
    }

    /// A tensor of `len` values, whatever its dimensions.
    pub(crate) fn vector(&mut self, name: String, len: usize) -> Result<String, ModelError> {
        let info = self.ck.require(&name)?;
        if info.shape.iter().product::<usize>() != len || !info.dtype.is_float() {
            return Err(ModelError::Shape { name, expected: format!("{len} floats"), got: format!("{:?} of {:?}", info.shape, info.dtype) });
        }
        self.used.insert(name.clone());
        Ok(name)
    }

    fn gdn(&mut self, names: &WeightNames, at: &dyn Fn(&str) -> String, hidden: usize, g: &GdnSpec) -> Result<GdnTensors, ModelError> {
        let [qkv, z, b, a, o] = names.gdn.map(at);
        let [conv, a_log, dt_bias, norm] = names.gdn_small.map(at);
        let values = g.v_heads * g.v_dim;
        let neg_exp = at(names.gdn_neg_exp);
        let decay =
            if self.ck.tensor(&neg_exp).is_some() { Decay::NegExp(self.vector(neg_exp, g.v_heads)?) } else { Decay::Log(self.vector(a_log, g.v_heads)?) };
        Ok(GdnTensors {
            qkv: self.matrix(&qkv, g.channels(), hidden)?,
            z: self.matrix(&z, values, hidden)?,
            b: self.matrix(&b, g.v_heads, hidden)?,
            a: self.matrix(&a, g.v_heads, hidden)?,
            o: self.matrix(&o, hidden, values)?,
            conv: self.vector(conv, g.channels() * g.kernel)?,
            decay,
            dt_bias: self.vector(dt_bias, g.v_heads)?,
            norm: self.vector(norm, g.v_dim)?,
        })
    }
}

pub(crate) fn check_shape(m: &Matrix, leading: Option<usize>, rows: usize, cols: usize) -> Result<(), ModelError> {
    if (m.leading(), m.rows(), m.cols()) == (leading, rows, cols) {
        return Ok(());
    }
    let show = |l: Option<usize>, r: usize, c: usize| l.map_or(format!("[{r}, {c}]"), |l| format!("[{l}, {r}, {c}]"));
    Err(ModelError::Shape { name: m.name().to_owned(), expected: show(leading, rows, cols), got: show(m.leading(), m.rows(), m.cols()) })
}
