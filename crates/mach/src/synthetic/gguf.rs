//! The same shapes as GGUF files, for comparisons with other engines on one file: Q4_K for linears and experts, Q6_K for
//! the output head, Q8_0 for the embedding, F32 for what is small.

use std::fs;
use std::path::{Path, PathBuf};

use mach_format::gguf::{GgufTensor, GgufWriter, MetaList, MetaValue, Metadata};
use mach_format::{BlockFormat, FormatError, WeightFormat};
use mach_models::spec::{AttentionBlock, FfnSpec, MixerSpec, ModelSpec};
use mach_models::{MoeArchAdapter, spec_of};

use super::{Content, Draw, PIECE, Shape, fill_random, letter, residents, unit_gain};
use crate::Error;
use crate::rates::Xorshift;

/// The file of `shape` under `cache`, written now unless it is there already. `progress` gets bytes done and bytes of all.
///
/// # Errors
/// Shapes whose rows are not whole blocks of 256, no room, a folder that cannot be written.
pub fn gguf(shape: &Shape, cache: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<PathBuf, Error> {
    let (_, spec) = spec_of(&shape.config)?;
    let dir = cache.join("synthetic");
    let path = dir.join(format!("{}-{}layers-q4_k.gguf", shape.name, spec.layers.len()));
    if !path.is_file() {
        fs::create_dir_all(&dir).map_err(Error::io(format!("create {}", dir.display())))?;
        write(shape, &path, progress)?;
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
}

fn write(shape: &Shape, path: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<(), Error> {
    let (arch, spec) = spec_of(&shape.config)?;
    super::check_mixers(&spec)?;
    let tensors = tensors(arch, &spec)?;
    let plan: Vec<GgufTensor> = tensors.iter().map(|t| t.tensor.clone()).collect();
    let total = plan.iter().map(GgufTensor::bytes).sum::<Result<u64, _>>()?;
    let free = mach_format::free_space(path)?;
    if total > free {
        return Err(FormatError::DiskFull { path: path.to_owned(), needed: total, free }.into());
    }
    let mut writer = GgufWriter::create(path, &metadata(&shape.name, arch, &spec), &plan)?;
    let mut done = 0;
    let mut piece = vec![0; PIECE];
    for (i, Filled { tensor, fill }) in tensors.iter().enumerate() {
        let random = &mut Xorshift::new(i as u64);
        let block = match fill {
            Fill::Blocks { format, .. } => format.source_bytes(),
            Fill::Values { .. } => 4,
        };
        let headers = match fill {
            Fill::Blocks { format, std } => headers(*format, *std, random),
            Fill::Values { .. } => Vec::new(),
        };
        let mut left = tensor.bytes()? as usize;
        while left > 0 {
            let piece = &mut piece[..left.min(PIECE / block * block)];
            match fill {
                Fill::Blocks { format, .. } => fill_blocks(*format, &headers, piece, random),
                Fill::Values { draw, map } => piece.as_chunks_mut().0.iter_mut().for_each(|v| *v = map(draw.value(random)).to_le_bytes()),
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
fn tensors(arch: &MoeArchAdapter, spec: &ModelSpec) -> Result<Vec<Filled>, Error> {
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
                    name if name == arch.names.heads[0] => BlockFormat::Q6K,
                    name if name.ends_with("embed_tokens") => BlockFormat::Q8_0,
                    _ => BlockFormat::Q4K,
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
                let shape = shape.into_iter().filter(|&n| n > 1).collect();
                Filled { tensor: GgufTensor { name: named(&name)?, format: WeightFormat::F32, shape }, fill: Fill::Values { draw, map } }
            }
        };
        all.push(filled);
    }
    for (layer, moe) in spec.moe_layers() {
        let (experts, inner, hidden) = (moe.router.experts, moe.inner, spec.hidden);
        for (module, rows, cols) in arch.names.switch.iter().zip([(inner, hidden), (inner, hidden), (hidden, inner)]).map(|(m, (r, c))| (m, r, c)) {
            let name = named(&format!("{}{layer}.{module}.weight", names.layers))?;
            all.push(blocks(name, vec![experts, rows, cols], BlockFormat::Q4K, unit_gain(cols)));
        }
    }
    Ok(all)
}

/// Different beginnings (or ends) of blocks: scales.
const HEADERS: usize = 64;

/// What stands in a block beside its random numbers: scales that differ by a factor of two, values of mean 0.
fn headers(format: BlockFormat, std: f32, random: &mut Xorshift) -> Vec<Vec<u8>> {
    let half = |x: f32| half::f16::from_f32(x).to_le_bytes();
    let mut one = || match format {
        // Standard deviations of the stored numbers: 73.9 of 8 bits, 18.5 of 6, 4.61 of 4.
        BlockFormat::Q8_0 => half(std / 73.9 * (0.75 + 0.5 * random.unit())).to_vec(),
        BlockFormat::Q6K => {
            let mut scales: Vec<u8> =
                (0..16).map(|_| (8 + (random.next() & 7) as i8).wrapping_mul(if random.next() & 256 == 0 { 1 } else { -1 }) as u8).collect();
            scales.extend(half(std / (18.5 * 11.7)));
            scales
        }
        BlockFormat::Q4K => {
            // Scales and minima are equal, and `dmin` is the mean of the numbers times `d`.
            let sc: [u8; 8] = std::array::from_fn(|_| 16 + (random.next() & 15) as u8);
            let d = std / (4.61 * 24.0);
            let mut out = [half(d), half(d * 7.5)].concat();
            out.extend((0..8).map(|j| sc[j % 4] & 63 | sc[j % 4 + 4] >> 4 << 6));
            out.extend((4..8).map(|j| sc[j] & 15 | (sc[j] & 15) << 4));
            out
        }
        other => unreachable!("no random {} blocks are written", other.name()),
    };
    (0..HEADERS).map(|_| one()).collect()
}

fn fill_blocks(format: BlockFormat, headers: &[Vec<u8>], out: &mut [u8], random: &mut Xorshift) {
    fill_random(out, random);
    let at_end = format == BlockFormat::Q6K;
    for block in out.chunks_exact_mut(format.source_bytes()) {
        let header = &headers[random.next() as usize % HEADERS];
        let at = if at_end { block.len() - header.len() } else { 0 };
        block[at..at + header.len()].copy_from_slice(header);
    }
}

fn metadata(name: &str, arch: &MoeArchAdapter, spec: &ModelSpec) -> Metadata {
    let mut m = Metadata::default();
    let text = |t: &str| MetaValue::Text(t.to_owned());
    let size = |n: usize| MetaValue::U32(n as u32);
    m.set("general.architecture", text(arch.gguf.name));
    m.set("general.name", text(&format!("{name}, random weights")));
    m.set("general.quantization_version", size(2));
    // Mostly Q4_K.
    m.set("general.file_type", size(15));
    let prefix = arch.gguf.name;
    let mut set = |key: &str, value: MetaValue| m.set(format!("{prefix}.{key}"), value);
    set("block_count", size(spec.layers.len()));
    set("context_length", size(spec.max_positions));
    set("embedding_length", size(spec.hidden));
    set("attention.layer_norm_rms_epsilon", MetaValue::F32(spec.eps));
    set("rope.freq_base", MetaValue::F32(spec.ropes[0].theta as f32));
    set("rope.dimension_count", size(spec.ropes[0].dims()));
    let recurrent: Vec<bool> = spec.layers.iter().map(|l| matches!(l.mixer, MixerSpec::Gdn(_))).collect();
    for layer in &spec.layers {
        match &layer.mixer {
            MixerSpec::Attention(AttentionBlock { attention: a, .. }) => {
                set("attention.head_count", size(a.heads));
                set("attention.head_count_kv", size(a.kv_heads));
                set("attention.key_length", size(a.head_dim));
                set("attention.value_length", size(a.head_dim));
            }
            // Refused before.
            MixerSpec::Latent(_) => {}
            MixerSpec::Gdn(g) => {
                set("ssm.conv_kernel", size(g.kernel));
                set("ssm.state_size", size(g.k_dim));
                set("ssm.group_count", size(g.k_heads));
                set("ssm.time_step_rank", size(g.v_heads));
                set("ssm.inner_size", size(g.v_heads * g.v_dim));
            }
        }
        if let FfnSpec::Moe(moe) = &layer.ffn {
            set("expert_count", size(moe.router.experts));
            set("expert_used_count", size(moe.router.top_k));
            set("expert_feed_forward_length", size(moe.inner));
            set("feed_forward_length", size(moe.inner));
            if let Some(shared) = moe.shared {
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
    use crate::text::open_text;

    fn small(model_type: &str) -> Shape {
        let mut config = json!({
            "model_type": model_type, "hidden_size": 256, "num_hidden_layers": 4, "vocab_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 64, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "max_position_embeddings": 256,
        });
        if model_type == "qwen3_5_moe" {
            let more = json!({"shared_expert_intermediate_size": 256, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 64,
                "linear_value_head_dim": 64, "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
                "rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 0.25}});
            config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        } else {
            config["norm_topk_prob"] = json!(true);
        }
        Shape::new(format!("small-{model_type}"), config)
    }

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
        for model_type in ["qwen3_5_moe", "qwen3_moe"] {
            let path = gguf(&small(model_type), cache.path(), &mut |_, _| {}).unwrap();
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

    /// Protects the time and disk of those who measure twice, and names what has no place in blocks.
    #[test]
    fn files_are_kept() {
        let cache = tempfile::tempdir().unwrap();
        let shape = small("qwen3_moe");
        gguf(&shape, cache.path(), &mut |_, _| {}).unwrap();
        gguf(&shape, cache.path(), &mut |_, _| panic!("written again")).unwrap();
        let mut odd = small("qwen3_moe");
        odd.name = "odd".to_owned();
        odd.config["hidden_size"] = json!(192);
        assert!(gguf(&odd, cache.path(), &mut |_, _| {}).unwrap_err().to_string().contains("blocks of 256"));
    }
}
