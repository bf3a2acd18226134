//! The same shapes as GGUF files, for comparisons with other engines on one file: one block type for linears and experts,
//! Q6_K for the output head, Q8_0 for the embedding, F32 for what is small. Rows that are not whole blocks of 256 take formats with
//! blocks of 32, as llama.cpp's quantiser does; experts published in MXFP4 keep it.

use std::fs;
use std::path::{Path, PathBuf};

use mach_format::gguf::{GgufTensor, GgufWriter, MetaList, MetaValue, Metadata};
use mach_format::{BlockFormat, FormatError, WeightFormat};
use mach_models::spec::{AttentionBlock, FfnSpec, MixerSpec, ModelSpec};
use mach_models::{MoeArchAdapter, spec_of};

use super::tensors::{Content, Draw, residents};
use super::{E2M1_STD, PIECE, Shape, exponent, fill_random, letter, unit_gain};
use crate::Error;
use crate::rates::Xorshift;

/// Block types that files are written in.
pub const QUANTS: [BlockFormat; 20] = [
    BlockFormat::Q4_0,
    BlockFormat::Q4_1,
    BlockFormat::Q5_0,
    BlockFormat::Q5_1,
    BlockFormat::Q8_0,
    BlockFormat::Q2K,
    BlockFormat::Q3K,
    BlockFormat::Q4K,
    BlockFormat::Q5K,
    BlockFormat::Q6K,
    BlockFormat::Iq1S,
    BlockFormat::Iq1M,
    BlockFormat::Iq2Xxs,
    BlockFormat::Iq2Xs,
    BlockFormat::Iq2S,
    BlockFormat::Iq3Xxs,
    BlockFormat::Iq3S,
    BlockFormat::Iq4Nl,
    BlockFormat::Iq4Xs,
    BlockFormat::Mxfp4,
];

/// The file of `shape` in blocks of `quant` under `cache`, written now unless it is there already. `progress` gets bytes done
/// and bytes of all.
///
/// # Errors
/// Shapes whose rows are not whole blocks of 32, no room, a folder that cannot be written.
pub fn gguf(shape: &Shape, quant: BlockFormat, cache: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<PathBuf, Error> {
    let (_, spec) = spec_of(&shape.config)?;
    let dir = cache.join("synthetic");
    let path = dir.join(format!("{}-{}layers-{}.gguf", shape.name, spec.layers.len(), quant.name().to_lowercase()));
    if !path.is_file() {
        fs::create_dir_all(&dir).map_err(Error::io(format!("create {}", dir.display())))?;
        write(shape, quant, &path, progress)?;
    }
    Ok(path)
}

/// A tensor and what its values are drawn from.
struct Filled {
    tensor: GgufTensor,
    fill: Fill,
}

enum Fill {
    /// Blocks of this standard deviation.
    Blocks {
        format: BlockFormat,
        std: f32,
    },
    Values {
        draw: Draw,
        map: fn(f32) -> f32,
    },
    Exact(Vec<f32>),
}

impl Fill {
    /// Bytes that are made together.
    fn unit(&self) -> usize {
        match self {
            Self::Blocks { format, .. } => format.source_bytes(),
            Self::Values { .. } => 4,
            Self::Exact(values) => 4 * values.len(),
        }
    }
}

fn write(shape: &Shape, quant: BlockFormat, path: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<(), Error> {
    let (arch, spec) = spec_of(&shape.config)?;
    let tensors = tensors(arch, &spec, quant, shape.experts)?;
    let plan: Vec<GgufTensor> = tensors.iter().map(|t| t.tensor.clone()).collect();
    let total = plan.iter().map(GgufTensor::bytes).sum::<Result<u64, _>>()?;
    let free = mach_format::free_space(path)?;
    if total > free {
        return Err(FormatError::DiskFull { path: path.to_owned(), needed: total, free }.into());
    }
    let mut writer = GgufWriter::create(path, &metadata(shape, arch, &spec), &plan)?;
    let mut done = 0;
    let mut piece = vec![0; PIECE];
    for (i, Filled { tensor, fill }) in tensors.iter().enumerate() {
        let random = &mut Xorshift::new(i as u64);
        let unit = fill.unit();
        let unit_std = if let Fill::Blocks { format, .. } = fill { unit_std(*format) } else { 1.0 };
        let mut left = tensor.bytes()? as usize;
        while left > 0 {
            let piece = &mut piece[..left.min(PIECE / unit * unit)];
            match fill {
                Fill::Blocks { format, std } => fill_blocks(*format, std / unit_std, piece, random),
                Fill::Values { draw, map } => piece.as_chunks_mut().0.iter_mut().for_each(|v| *v = map(draw.value(random)).to_le_bytes()),
                Fill::Exact(values) => piece.as_chunks_mut().0.iter_mut().zip(values).for_each(|(v, x)| *v = x.to_le_bytes()),
            }
            writer.write(&tensor.name, piece)?;
            left -= piece.len();
            done += piece.len() as u64;
            progress(done, total);
        }
    }
    Ok(writer.finish()?)
}

/// Every tensor, in the order of the layers.
fn tensors(arch: &MoeArchAdapter, spec: &ModelSpec, quant: BlockFormat, experts_as: Option<BlockFormat>) -> Result<Vec<Filled>, Error> {
    let names = arch.gguf.names;
    let named = |name: &str| names.original(name).ok_or_else(|| FormatError::Plan { reason: format!("{name} has no name in GGUF") });
    let blocks = |name: String, shape: Vec<usize>, format: BlockFormat, std: f32| Filled {
        tensor: GgufTensor { name, format: WeightFormat::Block(format), shape },
        fill: Fill::Blocks { format, std },
    };
    let mut all = Vec::new();
    for resident in residents(arch, spec, false) {
        let filled = match resident.content {
            Content::Matrix { rows, cols, std } => {
                let format = match resident.name.as_str() {
                    name if name == arch.names.heads[0] && cols.is_multiple_of(256) => BlockFormat::Q6K,
                    name if name == arch.names.heads[0] => BlockFormat::Q8_0,
                    name if name.ends_with(arch.names.embed) => BlockFormat::Q8_0,
                    _ if cols.is_multiple_of(quant.columns()) => quant,
                    _ => BlockFormat::Q8_0,
                };
                blocks(named(&format!("{}.weight", resident.name))?, vec![rows, cols], format, std)
            }
            Content::Plain { shape, draw, .. } => {
                // As ggml's converter stores them: norms with the one added, decays as −exp, no dimensions of one.
                let one_plus = arch.one_plus_norm && resident.name.ends_with("norm.weight") && !resident.name.contains(arch.names.gdn_small[3]);
                let (name, map): (String, fn(f32) -> f32) = match resident.name.strip_suffix(arch.names.gdn_small[1]) {
                    Some(layer) => (format!("{layer}{}", arch.names.gdn_neg_exp), |a| -a.exp()),
                    None if one_plus => (resident.name, |w| w + 1.0),
                    None => (resident.name, |w| w),
                };
                let squeezed: Vec<usize> = shape.into_iter().filter(|&n| n > 1).collect();
                let shape = if squeezed.is_empty() { vec![1] } else { squeezed };
                Filled { tensor: GgufTensor { name: named(&name)?, format: WeightFormat::F32, shape }, fill: Fill::Values { draw, map } }
            }
            Content::TokenExperts { .. } => {
                return Err(FormatError::Plan { reason: "models with experts by token are written as packs only".to_owned() }.into());
            }
        };
        all.push(filled);
    }
    for (layer, moe) in spec.moe_layers() {
        let (experts, inner, hidden) = (moe.router.experts, moe.inner, spec.hidden);
        for (module, rows, cols) in arch.names.switch.iter().zip([(inner, hidden), (inner, hidden), (hidden, inner)]).map(|(m, (r, c))| (m, r, c)) {
            let name = named(&format!("{}{layer}.{module}.weight", names.layers))?;
            let format = experts_as.unwrap_or(if cols.is_multiple_of(quant.columns()) { quant } else { BlockFormat::Q5_0 });
            all.push(blocks(name, vec![experts, rows, cols], format, unit_gain(cols)));
        }
    }
    // Divisors of frequencies, where only some pairs rotate.
    if let Some(rope) = spec.ropes.iter().find(|r| r.inv_freq.last() == Some(&0.0)) {
        let values: Vec<f32> = rope.inv_freq.iter().map(|&f| if f == 0.0 { 1e30 } else { 1.0 }).collect();
        let tensor = GgufTensor { name: "rope_freqs.weight".to_owned(), format: WeightFormat::F32, shape: vec![values.len()] };
        all.push(Filled { tensor, fill: Fill::Exact(values) });
    }
    Ok(all)
}

/// Random blocks with scales near `scale`, which differ by a factor of two.
fn fill_blocks(format: BlockFormat, scale: f32, out: &mut [u8], random: &mut Xorshift) {
    fill_random(out, random);
    // Few different scales: they are not what is measured.
    let scales: [f32; 16] = std::array::from_fn(|_| scale * (0.75 + 0.5 * random.unit()));
    for (i, block) in out.chunks_exact_mut(format.source_bytes()).enumerate() {
        match format {
            BlockFormat::Mxfp4 => block[0] = exponent(scale, random),
            _ => set_scale(format, scales[i % 16], block),
        }
    }
}

/// Standard deviation of random blocks of scale 1.
fn unit_std(format: BlockFormat) -> f32 {
    if format == BlockFormat::Mxfp4 {
        return E2M1_STD;
    }
    let random = &mut Xorshift::new(0);
    let mut blocks = vec![0; 512 * format.source_bytes()];
    fill_random(&mut blocks, random);
    blocks.chunks_exact_mut(format.source_bytes()).for_each(|block| set_scale(format, 1.0, block));
    let mut values = vec![0.0; 512 * format.columns()];
    format.dequantise(&blocks, &mut values);
    (values.iter().map(|x| x * x).sum::<f32>() / values.len() as f32).sqrt()
}

/// Writes the scale of a block, and the minimum that makes the mean zero where there is one.
fn set_scale(format: BlockFormat, d: f32, block: &mut [u8]) {
    let half = |x: f32| half::f16::from_f32(x).to_le_bytes();
    let (at, min) = match format {
        BlockFormat::Q2K => (80, Some(1.5)),
        BlockFormat::Q3K => (108, None),
        BlockFormat::Q6K => (208, None),
        BlockFormat::Q4_1 => (0, Some(-7.5)),
        BlockFormat::Q5_1 => (0, Some(-15.5)),
        BlockFormat::Q4K => (0, Some(7.5)),
        BlockFormat::Q5K => (0, Some(15.5)),
        BlockFormat::Iq1M => {
            // Its four digits lie in the upper halves of four bytes.
            let bits = u16::from_le_bytes(half(d));
            for (i, byte) in block[48..].iter_mut().skip(1).step_by(2).enumerate() {
                *byte = *byte & 15 | ((bits >> (4 * i)) as u8 & 15) << 4;
            }
            return;
        }
        _ => (0, None),
    };
    block[at..at + 2].copy_from_slice(&half(d));
    if let Some(min) = min {
        block[at + 2..at + 4].copy_from_slice(&half(d * min));
    }
}

fn metadata(shape: &Shape, arch: &MoeArchAdapter, spec: &ModelSpec) -> Metadata {
    let mut m = Metadata::default();
    let text = |t: &str| MetaValue::Text(t.to_owned());
    let size = |n: usize| MetaValue::U32(n as u32);
    m.set("general.architecture", text(arch.gguf.name));
    m.set("general.name", text(&format!("{}, random weights", shape.name)));
    m.set("general.quantization_version", size(2));
    // Mostly Q4_K, whatever the blocks: readers go by the tensors.
    m.set("general.file_type", size(15));
    let prefix = arch.gguf.name;
    let mut set = |key: &str, value: MetaValue| m.set(format!("{prefix}.{key}"), value);
    set("block_count", size(spec.layers.len()));
    set("context_length", size(spec.max_positions));
    set("embedding_length", size(spec.hidden));
    set("attention.layer_norm_rms_epsilon", MetaValue::F32(spec.eps));
    let recurrent: Vec<bool> = spec.layers.iter().map(|l| matches!(l.mixer, MixerSpec::Gdn(_))).collect();
    let attention: Vec<&AttentionBlock> = spec.layers.iter().filter_map(|l| if let MixerSpec::Attention(a) = &l.mixer { Some(a) } else { None }).collect();
    // Gemma gives its windowed layers sizes and angles of their own, under names of their own.
    let of_window = if spec.ropes.len() > 1 { "_swa" } else { "" };
    for block in &attention {
        let (a, rope) = (&block.attention, &spec.ropes[block.rope]);
        let suffix = if a.window.is_some() { of_window } else { "" };
        set("attention.head_count", size(a.heads));
        set("attention.head_count_kv", size(a.kv_heads));
        set(&format!("attention.key_length{suffix}"), size(a.head_dim));
        set(&format!("attention.value_length{suffix}"), size(a.head_dim));
        set(&format!("rope.freq_base{suffix}"), MetaValue::F32(rope.theta as f32));
        set(&format!("rope.dimension_count{suffix}"), size(rope.dims()));
        if let Some(window) = a.window {
            set("attention.sliding_window", size(window));
        }
    }
    if !of_window.is_empty() {
        set("attention.head_count_kv", MetaValue::List(MetaList::Int(attention.iter().map(|b| b.attention.kv_heads as i64).collect())));
        set("attention.sliding_window_pattern", MetaValue::List(MetaList::Bool(attention.iter().map(|b| b.attention.window.is_some()).collect())));
        set("attention.shared_kv_layers", size(0));
        set("embedding_length_per_layer_input", size(0));
    }
    if let Some(cap) = spec.logit_cap {
        set("final_logit_softcapping", MetaValue::F32(cap));
    }
    let yarn = &shape.config["rope_scaling"];
    if yarn["rope_type"] == "yarn" {
        let number = |key: &str| MetaValue::F32(yarn[key].as_f64().unwrap_or(1.0) as f32);
        set("rope.scaling.type", text("yarn"));
        set("rope.scaling.factor", number("factor"));
        set("rope.scaling.original_context_length", size(yarn["original_max_position_embeddings"].as_u64().unwrap_or(4096) as usize));
        set("rope.scaling.yarn_beta_fast", number("beta_fast"));
        set("rope.scaling.yarn_beta_slow", number("beta_slow"));
    }
    for layer in &spec.layers {
        if let MixerSpec::Gdn(g) = &layer.mixer {
            set("ssm.conv_kernel", size(g.kernel));
            set("ssm.state_size", size(g.k_dim));
            set("ssm.group_count", size(g.k_heads));
            set("ssm.time_step_rank", size(g.v_heads));
            set("ssm.inner_size", size(g.v_heads * g.v_dim));
        }
        if let FfnSpec::Moe(moe) = &layer.ffn {
            set("expert_count", size(moe.router.experts));
            set("expert_used_count", size(moe.router.top_k));
            set("expert_feed_forward_length", size(moe.inner));
            // The block beside the experts is Gemma's ordinary one.
            set("feed_forward_length", size(moe.shared.filter(|_| moe.apart).map_or(moe.inner, |s| s.inner)));
            if let Some(shared) = moe.shared.filter(|_| !moe.apart) {
                set("expert_shared_feed_forward_length", size(shared.inner));
            }
        }
    }
    if recurrent.contains(&true) {
        set("attention.recurrent_layers", MetaValue::List(MetaList::Bool(recurrent)));
        // Pairs of channels that turn with time, height and width.
        let (half, third) = (spec.ropes[0].dims() / 2, spec.ropes[0].dims().div_ceil(6));
        set("rope.dimension_sections", MetaValue::List(MetaList::Int([third, third, half - 2 * third, 0].map(|n| n as i64).to_vec())));
    }
    tokenizer(&mut m, if arch.one_plus_norm { "qwen35" } else { "qwen2" }, spec.vocab);
    m
}

/// A tokenizer of bytes with ChatML's tokens, filled up to the size of the vocabulary.
fn tokenizer(m: &mut Metadata, pre: &str, vocab: usize) {
    let mut tokens: Vec<String> = (0..=255u8).map(|byte| letter(byte).to_string()).collect();
    let special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
    tokens.extend(special.map(str::to_owned));
    // Readers of byte-level vocabularies want a merge.
    tokens.push("aa".to_owned());
    let named = tokens.len();
    tokens.extend((named..vocab).map(|id| format!("<|unused_{id}|>")));
    tokens.truncate(vocab);
    // 1 normal, 3 control, 5 unused.
    let kind = |id: usize| {
        if (256..259).contains(&id) {
            3
        } else if id >= named {
            5
        } else {
            1
        }
    };
    let kinds = (0..vocab).map(kind).collect();
    let text = |t: &str| MetaValue::Text(t.to_owned());
    m.set("tokenizer.ggml.model", text("gpt2"));
    m.set("tokenizer.ggml.pre", text(pre));
    m.set("tokenizer.ggml.tokens", MetaValue::List(MetaList::Text(tokens)));
    m.set("tokenizer.ggml.token_type", MetaValue::List(MetaList::Int(kinds)));
    m.set("tokenizer.ggml.merges", MetaValue::List(MetaList::Text(vec!["a a".to_owned()])));
    m.set("tokenizer.ggml.eos_token_id", MetaValue::U32(258));
    m.set("tokenizer.ggml.padding_token_id", MetaValue::U32(256));
    m.set("tokenizer.ggml.add_bos_token", MetaValue::Bool(false));
    m.set("tokenizer.chat_template", text(super::TEMPLATE));
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use mach_backend::{Backend, KvType, Reference};
    use mach_cpu::{Cpu, CpuOptions};
    use mach_format::gguf::Gguf;
    use mach_format::{Checkpoint, write_pack, write_sidecar};
    use mach_models::{Model, Resolved, Row, Want, open_checkpoint};
    use serde_json::json;

    use super::*;
    use crate::LoadOptions;
    use crate::load::prepare_at;
    use crate::locate::locate;
    use crate::synthetic::tests::small;
    use crate::text::open_text;

    fn logits<B: Backend>(backend: Arc<B>, path: &Path, streaming: bool) -> Vec<f32> {
        let bank = streaming.then_some(crate::BankSize::Share(0.5));
        let options = LoadOptions { streaming: Some(streaming), bank, kv: Some(KvType::F32), ..LoadOptions::default() };
        let prepared = prepare_at(locate(path.to_str()).unwrap(), &options, 1 << 30).unwrap();
        let mut model: Model<B> = prepared.load(backend, &mut |_, _, _| {}).unwrap();
        let mut seq = model.sequence();
        let rows = [5u32, 77, 301, 12, 99].into_iter().enumerate().map(|(pos, token)| Row { seq: 0, pos, token, want: Want::Logits }).collect();
        let mut out = Vec::new();
        model.forward(&mut [&mut seq], rows, None, &|| false, &mut |_, row| out.extend_from_slice(row)).unwrap();
        out
    }

    /// The same file with every block replaced by the values it stands for.
    fn widened(path: &Path, out: &Path) {
        let gguf = Gguf::open(path).unwrap();
        let metadata = gguf.metadata().clone();
        let ck = Checkpoint::from_gguf(gguf, json!({}), &|_| None).unwrap();
        let plan: Vec<_> = ck.tensors().map(|(name, t)| GgufTensor { name: name.to_owned(), format: WeightFormat::F32, shape: t.shape.clone() }).collect();
        let mut writer = GgufWriter::create(out, &metadata, &plan).unwrap();
        for t in &plan {
            let values = ck.matrix(&t.name).unwrap().to_f32().unwrap();
            writer.write(&t.name, &values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>()).unwrap();
        }
        writer.finish().unwrap();
    }

    /// Largest difference over the root of the mean square.
    fn error(a: &[f32], b: &[f32]) -> f32 {
        let size = (b.iter().map(|x| x * x).sum::<f32>() / b.len() as f32).sqrt();
        assert!((0.3..3.0).contains(&size), "{size}");
        a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / size
    }

    /// Protects synthetic files and the way of blocks to the kernels: sane logits that are those of the values that the
    /// blocks stand for, the same bytes resident, streamed from the file, from a sidecar and from a pack; a text side.
    #[test]
    fn files_run_from_everywhere_alike() {
        let cache = tempfile::tempdir().unwrap();
        for model_type in ["qwen3_5_moe", "qwen3_moe", "gpt_oss", "gemma4"] {
            let path = gguf(&small(model_type, 256), BlockFormat::Q4K, cache.path(), &mut |_, _| {}).unwrap();
            let plain = cache.path().join("plain.gguf");
            widened(&path, &plain);
            let want = logits(Arc::new(Reference), &plain, false);
            let off = error(&logits(Arc::new(Reference), &path, false), &want);
            assert!(off < 5e-4, "{model_type}: plain backend off by {off}");

            let cpu = || Arc::new(Cpu::new(CpuOptions::default()).unwrap());
            let resident = logits(cpu(), &path, false);
            let off = error(&resident, &want);
            assert!(off < 2e-2, "{model_type}: off by {off}");
            assert_eq!(logits(cpu(), &path, true), resident, "{model_type}: streamed");

            let files = Resolved::open(Arc::new(open_checkpoint(&path).unwrap())).unwrap();
            let (ck, plan) = (files.checkpoint(), files.pack_plan(None).unwrap());
            let pack = cache.path().join(format!("pack-{model_type}"));
            write_pack(ck, &pack, &plan, &mut |_| {}).unwrap();
            assert_eq!(logits(cpu(), &pack, true), resident, "{model_type}: pack");
            write_sidecar(ck, &ck.sidecar_dir(), &plan, &mut |_| {}).unwrap();
            assert_eq!(logits(cpu(), &path, true), resident, "{model_type}: sidecar");

            let text = open_text(&path).unwrap().unwrap();
            let ids = text.tokenizer().encode("<|im_start|>größe 1aa\n<|im_end|>", false).unwrap();
            assert_eq!((ids[0], ids.len(), text.tokenizer().decode(&ids).as_str()), (257, 13, "größe 1aa\n"));
            assert!(text.has_template() && text.defaults().eos == [258, 256]);
        }
    }

    /// Protects whole models in every block type, with rows of several blocks: the plain backend gives what the values of the
    /// blocks give, the CPU backend is near it, streamed or not.
    #[test]
    fn every_block_type_runs_in_a_whole_model() {
        let cache = tempfile::tempdir().unwrap();
        for quant in QUANTS {
            let path = gguf(&small("qwen3_moe", 256), quant, cache.path(), &mut |_, _| {}).unwrap();
            let plain = cache.path().join("plain.gguf");
            widened(&path, &plain);
            let want = logits(Arc::new(Reference), &plain, false);
            let off = error(&logits(Arc::new(Reference), &path, false), &want);
            assert!(off < 5e-4, "{}: plain backend off by {off}", quant.name());
            let cpu = || Arc::new(Cpu::new(CpuOptions::default()).unwrap());
            let resident = logits(cpu(), &path, false);
            let off = error(&resident, &want);
            assert!(off < 2e-2, "{}: off by {off}", quant.name());
            assert_eq!(logits(cpu(), &path, true), resident, "{}: streamed", quant.name());
            fs::remove_file(path).unwrap();
        }
    }

    /// Protects the time and disk of those who measure twice, and names what has no place in blocks.
    #[test]
    fn files_are_kept() {
        let cache = tempfile::tempdir().unwrap();
        let shape = small("qwen3_moe", 256);
        gguf(&shape, BlockFormat::Q4K, cache.path(), &mut |_, _| {}).unwrap();
        gguf(&shape, BlockFormat::Q4K, cache.path(), &mut |_, _| panic!("written again")).unwrap();
        let mut odd = small("qwen3_moe", 256);
        odd.name = "odd".to_owned();
        odd.config["hidden_size"] = json!(208);
        assert!(gguf(&odd, BlockFormat::Q4K, cache.path(), &mut |_, _| {}).unwrap_err().to_string().contains("blocks of 32"));
        let by_token = gguf(&small("deepseek_v4", 256), BlockFormat::Q4K, cache.path(), &mut |_, _| {}).unwrap_err();
        assert!(by_token.to_string().contains("packs only"), "{by_token}");
    }
}
