//! Packs of random weights in the shape of published models: speed, memory and drive behave as they do at the size that
//! people run, and nothing has to be downloaded. What such a model says is noise.

mod gguf;
mod shapes;
mod tensors;

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use mach_format::sidecar::{LayerShape, SidecarPlan};
use mach_format::{
    BlockFormat, Checkpoint, FormatError, PackedLayout, Planned, RecordLayout, SIDECAR_DIR, SafetensorsWriter, ScaleType, SidecarWriter, TILE_ROWS,
    WeightFormat,
};
use mach_models::MoeArchAdapter;
use mach_models::spec::ModelSpec;
use serde_json::{Map, Value, json};

use crate::Error;
use crate::rates::Xorshift;

pub use gguf::{QUANTS, gguf};
pub use shapes::SHAPES;
use tensors::{Tensor, residents};

/// Columns that share a scale.
const GROUP: u16 = 64;
/// Bytes that are made and written at once.
const PIECE: usize = 8 << 20;
/// ChatML.
const TEMPLATE: &str = "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}\
    {%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}";

/// The configuration of a model and what to call it.
#[derive(Clone, Debug)]
pub struct Shape {
    name: String,
    config: Value,
    /// Format of the experts, where it is not affine of as many bits as the rest.
    experts: Option<BlockFormat>,
}

impl Shape {
    /// A published shape, one of [`SHAPES`].
    pub fn named(name: &str) -> Option<Self> {
        let (config, experts) = shapes::named(name)?;
        Some(Self { name: name.to_owned(), config, experts })
    }

    /// A shape of one's own.
    pub fn new(name: impl Into<String>, config: Value) -> Self {
        Self { name: name.into(), config, experts: None }
    }

    /// The configuration, without quantisation.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// The first `layers` layers only.
    ///
    /// # Errors
    /// No layers, or more than there are.
    pub fn cut(mut self, layers: usize) -> Result<Self, Error> {
        let all = mach_models::spec_of(&self.config)?.1.layers.len();
        if layers == 0 || layers > all {
            return Err(Error::Usage(format!("--layers {layers}: {} has 1 to {all} layers", self.name)));
        }
        let text = if self.config.get("text_config").is_some() { &mut self.config["text_config"] } else { &mut self.config };
        text["num_hidden_layers"] = json!(layers);
        if let Some(types) = text.get_mut("layer_types").and_then(Value::as_array_mut) {
            types.truncate(layers);
        }
        if let Some(ratios) = text.get_mut("compress_ratios").and_then(Value::as_array_mut) {
            ratios.truncate(layers);
        }
        Ok(self)
    }
}

/// Where packs are kept when nothing else is said: `mach` in `$XDG_CACHE_HOME` or `~/.cache`.
pub fn default_cache() -> PathBuf {
    let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    var("XDG_CACHE_HOME").or_else(|| var("HOME").map(|h| h.join(".cache"))).unwrap_or_else(std::env::temp_dir).join("mach")
}

/// The folder of the pack of `shape` at `bits` per weight under `cache`, written now unless it is there already.
/// `progress` gets bytes done and bytes of all.
///
/// # Errors
/// Shapes that cannot be quantised in groups of 64, no room, a folder that cannot be written.
pub fn pack(shape: &Shape, bits: u8, cache: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<PathBuf, Error> {
    let (_, spec) = mach_models::spec_of(&shape.config)?;
    let dir = cache.join("synthetic").join(format!("{}-{}layers-{bits}bit", shape.name, spec.layers.len()));
    if !dir.join("config.json").is_file() {
        write(shape, bits, &dir, progress)?;
    }
    Ok(dir)
}

/// Writes a pack to `dir`, which must not exist: complete under another name first, then renamed. An interrupted build
/// goes on where it stopped.
///
/// # Errors
/// As [`pack`].
pub fn write(shape: &Shape, bits: u8, dir: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<(), Error> {
    let (arch, spec) = mach_models::spec_of(&shape.config)?;
    let format = shape.experts.map_or(WeightFormat::Affine { bits, group: GROUP, scales: ScaleType::F16 }, WeightFormat::Block);
    let tensors = residents(arch, &spec, shape.config.get("text_config").is_some());
    let planned: Vec<Planned> = tensors.iter().flat_map(|t| t.planned(bits)).collect();
    let sidecar = sidecar_plan(arch, &spec, format);
    let sizes =
        tensors.iter().filter_map(Tensor::matrix).chain(sidecar.layers.iter().flat_map(|l| [l.layout.gate_up.half, l.layout.down].map(|m| (m.rows, m.cols))));
    if let Some((rows, cols)) = sizes.into_iter().find(|(_, cols)| !cols.is_multiple_of(GROUP.into())) {
        return Err(FormatError::Plan { reason: format!("a weight of [{rows}, {cols}] does not divide into groups of {GROUP}") }.into());
    }
    if let Some(layer) = sidecar.layers.iter().find(|l| !l.layout.gate_up.half.rows.is_multiple_of(TILE_ROWS)) {
        return Err(FormatError::Plan { reason: format!("experts of layer {} are not whole tiles of {TILE_ROWS} rows", layer.layer) }.into());
    }

    let mut staging = dir.as_os_str().to_owned();
    staging.push(".partial");
    let staging = PathBuf::from(staging);
    let sidecar_dir = staging.join(SIDECAR_DIR);
    let resident: u64 = planned.iter().map(|t| t.bytes() as u64).sum();
    let total = resident + sidecar.layers.iter().map(|l| (sidecar.experts * l.layout.stride()) as u64).sum::<u64>();
    let needed = (resident + sidecar.bytes()).saturating_sub(bytes_in(&sidecar_dir));
    let free = mach_format::free_space(dir)?;
    if needed > free {
        return Err(FormatError::DiskFull { path: dir.to_owned(), needed, free }.into());
    }
    fs::create_dir_all(&staging).map_err(Error::io(format!("create {}", staging.display())))?;

    let mut done = 0;
    let mut advance = |bytes: usize| {
        done += bytes as u64;
        progress(done, total);
    };
    let mut file = SafetensorsWriter::create(&staging.join("model.safetensors"), planned)?;
    for (i, tensor) in tensors.iter().enumerate() {
        tensor.write(&mut file, bits, &mut Xorshift::new(i as u64), &mut advance)?;
    }
    file.finish()?;
    for (name, text) in companions(shape, bits) {
        let path = staging.join(name);
        fs::write(&path, text).and_then(|()| File::open(&path)?.sync_all()).map_err(Error::io(format!("write {}", path.display())))?;
    }

    let fingerprint = mach_format::fingerprint(&Checkpoint::open(&staging)?)?;
    let shapes = sidecar.layers.clone();
    let mut writer = SidecarWriter::create(&sidecar_dir, &fingerprint, sidecar)?;
    for LayerShape { layer, layout } in shapes {
        let fill = |expert: usize, gate_up: &mut [u8], down: &mut [u8]| {
            let mut random = Xorshift::new((layer as u64 + 1) << 32 | expert as u64);
            fill_tiles(&layout.gate_up.half, &mut gate_up[..layout.gate_up.bytes()], &mut random);
            fill_tiles(&layout.down, &mut down[..layout.down.bytes()], &mut random);
            Ok(())
        };
        let mut before = 0;
        writer.write_layer(layer, fill, &mut |experts| {
            advance((experts - before) * layout.stride());
            before = experts;
        })?;
    }
    writer.finish(&fingerprint)?;
    fs::rename(&staging, dir).map_err(Error::io(format!("rename {}", staging.display())))
}

/// Bytes of the files in a folder that may not exist.
fn bytes_in(dir: &Path) -> u64 {
    fs::read_dir(dir).into_iter().flatten().flatten().filter_map(|e| e.metadata().ok()).map(|m| m.len()).sum()
}

fn sidecar_plan(arch: &MoeArchAdapter, spec: &ModelSpec, format: WeightFormat) -> SidecarPlan {
    let layout = |inner: usize| RecordLayout::new(PackedLayout::new(inner, spec.hidden, format), PackedLayout::new(spec.hidden, inner, format));
    SidecarPlan {
        model_type: arch.model_type.to_owned(),
        experts: spec.moe_layers().map(|(_, m)| m.router.experts).next().unwrap_or(0),
        layers: spec.moe_layers().map(|(layer, m)| LayerShape { layer, layout: layout(m.inner) }).collect(),
    }
}

/// Scale and bias that give uniform levels of `bits` a mean of 0 and a standard deviation of `std`.
fn affine(bits: u8, std: f32) -> [[u8; 2]; 2] {
    let levels = f32::from(1u16 << (bits - 1)) * 2.0;
    let scale = std / ((levels * levels - 1.0) / 12.0).sqrt();
    [scale, -scale * (levels - 1.0) / 2.0].map(|x| half::f16::from_f32(x).to_le_bytes())
}

/// Standard deviation that keeps the size of activations: 1 / sqrt(K).
fn unit_gain(cols: usize) -> f32 {
    (cols as f32).powf(-0.5)
}

fn fill_random(out: &mut [u8], random: &mut Xorshift) {
    let (words, rest) = out.as_chunks_mut::<8>();
    words.iter_mut().for_each(|word| *word = random.next().to_le_bytes());
    rest.iter_mut().for_each(|byte| *byte = random.next() as u8);
}

/// Random weights in the packed layout: whole tiles, which are sequences of blocks.
fn fill_tiles(layout: &PackedLayout, tiles: &mut [u8], random: &mut Xorshift) {
    let std = unit_gain(layout.cols);
    let lines = layout.line_bytes();
    for block in tiles.chunks_exact_mut(layout.block_bytes()) {
        let (data, rest) = block.split_at_mut(lines);
        fill_random(data, random);
        match layout.format {
            WeightFormat::Affine { bits, .. } => {
                for (values, param) in rest.chunks_exact_mut(TILE_ROWS * 2).zip(affine(bits, std)) {
                    values.as_chunks_mut().0.fill(param);
                }
            }
            // MXFP4: an exponent for each row.
            _ => rest.iter_mut().for_each(|e| *e = exponent(std / E2M1_STD, random)),
        }
    }
}

/// Standard deviation of random E2M1 numbers.
const E2M1_STD: f32 = 2.926;

/// The stored exponent of a scale: one of the two neighbours, so often that the mean of squares is right.
fn exponent(scale: f32, random: &mut Xorshift) -> u8 {
    let lower = scale.log2().floor();
    let upper = random.unit() < ((scale / lower.exp2()).powi(2) - 1.0) / 3.0;
    (lower + 127.0) as u8 + u8::from(upper)
}

/// Configuration, and a tokenizer of 256 bytes with a ChatML template, so that every command runs.
fn companions(shape: &Shape, bits: u8) -> Vec<(&'static str, String)> {
    let mut config = shape.config.clone();
    config["quantization"] = json!({"group_size": GROUP, "bits": bits, "mode": "affine"});
    let special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
    let added: Vec<Value> = (256..)
        .zip(special)
        .map(|(id, token)| json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}))
        .collect();
    let vocab: Map<String, Value> = (0..=255u8).map(|byte| (letter(byte).to_string(), json!(byte))).collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null, "pre_tokenizer": byte_level,
        "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
            "byte_fallback": false, "vocab": vocab, "merges": []},
    });
    vec![
        ("tokenizer.json", tokenizer.to_string()),
        ("tokenizer_config.json", json!({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}).to_string()),
        ("chat_template.jinja", TEMPLATE.to_owned()),
        ("generation_config.json", json!({"eos_token_id": [258, 256], "pad_token_id": 256}).to_string()),
        ("README.md", format!("Random weights in the shape of {}, for measuring speed; written by `mach bench`, safe to delete.\n", shape.name)),
        ("config.json", format!("{config:#}\n")),
    ]
}

/// The letter that byte-level tokenizers write for a byte: printable ones stand for themselves, others for letters from
/// 256 on, in order.
fn letter(byte: u8) -> char {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let code = if printable(byte) { u32::from(byte) } else { 256 + (0..byte).filter(|&b| !printable(b)).count() as u32 };
    char::from_u32(code).unwrap_or('?')
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use mach_backend::Reference;
    use mach_format::sidecar;
    use mach_models::spec::MixerSpec;
    use mach_models::{Model, Row, Want};
    use mach_session::TextModel;

    use super::*;
    use crate::LoadOptions;
    use crate::load::prepare_at;
    use crate::locate::ModelPath;

    /// Four layers of a family with everything that it has; blocks of `columns` columns divide its rows.
    pub(super) fn small(model_type: &str, columns: usize) -> Shape {
        let sliding = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"];
        let own = match model_type {
            "qwen3_moe" => json!({"num_experts": 8, "moe_intermediate_size": columns, "norm_topk_prob": true}),
            "qwen3_5_moe" => json!({
                "num_experts": 8, "moe_intermediate_size": columns, "shared_expert_intermediate_size": columns, "linear_num_key_heads": columns / 64,
                "linear_num_value_heads": columns / 32, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
                "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
                "rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 0.25},
            }),
            "gpt_oss" => json!({
                "num_local_experts": 8, "intermediate_size": columns, "layer_types": sliding, "sliding_window": 3,
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "truncate": false},
            }),
            "gemma4" => json!({
                "num_experts": 8, "moe_intermediate_size": columns, "intermediate_size": columns, "top_k_experts": 2, "enable_moe_block": true,
                "layer_types": sliding, "sliding_window": 3, "global_head_dim": 128, "num_global_key_value_heads": 1, "attention_k_eq_v": true,
                "hidden_size_per_layer_input": 0, "final_logit_softcapping": 30.0,
            }),
            _ => json!({
                "n_routed_experts": 8, "moe_intermediate_size": columns, "num_key_value_heads": 1, "q_lora_rank": columns, "qk_rope_head_dim": 16,
                "o_groups": 2, "o_lora_rank": columns, "compress_ratios": [0, 4, 128, 4], "sliding_window": 3, "index_n_heads": 2, "index_head_dim": 32,
                "index_topk": 2, "hc_mult": 2, "num_hash_layers": 1,
            }),
        };
        let mut config = json!({
            "model_type": model_type, "hidden_size": 2 * columns, "num_hidden_layers": 4, "vocab_size": 320, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 64, "num_experts_per_tok": 2, "max_position_embeddings": 256,
        });
        if model_type == "gemma4" {
            config.as_object_mut().unwrap().remove("num_experts_per_tok");
        }
        config.as_object_mut().unwrap().extend(own.as_object().unwrap().clone());
        let experts = matches!(model_type, "gpt_oss" | "deepseek_v4").then_some(BlockFormat::Mxfp4);
        Shape { experts, ..Shape::new(format!("small-{model_type}"), config) }
    }

    /// Protects packs of all families and widths: complete, verified, loadable, with logits that are numbers of a sane
    /// size and differ from token to token, and a tokenizer that gives bytes back.
    #[test]
    fn packs_are_valid_checkpoints() {
        let cache = tempfile::tempdir().unwrap();
        for (model_type, bits) in [("qwen3_5_moe", 4), ("qwen3_moe", 4), ("qwen3_moe", 8), ("gpt_oss", 4), ("gemma4", 4), ("deepseek_v4", 4)] {
            let mut last = (0, 0);
            let dir = pack(&small(model_type, 64), bits, cache.path(), &mut |done, all| last = (done, all)).unwrap();
            assert!(last.0 == last.1 && last.0 > 0, "{last:?}");
            assert_eq!(sidecar::verify(&dir.join(SIDECAR_DIR), &mut |_, _| {}).unwrap().records, 4 * 8);

            let path = ModelPath { dir: dir.clone(), name: "small".to_owned(), builtin: false };
            let prepared = prepare_at(path, &LoadOptions::default(), 1 << 30).unwrap();
            let mut model: Model<Reference> = prepared.load(Arc::new(Reference), &mut |_, _, _| {}).unwrap();
            let mut seq = model.sequence();
            let rows = [5u32, 77, 301].into_iter().enumerate().map(|(pos, token)| Row { seq: 0, pos, token, want: Want::Logits }).collect();
            let mut logits = Vec::new();
            model.forward(&mut [&mut seq], rows, None, &|| false, &mut |_, row| logits.push(row.to_vec())).unwrap();
            for row in &logits {
                let size = (row.iter().map(|x| x * x).sum::<f32>() / row.len() as f32).sqrt();
                assert!((0.3..3.0).contains(&size), "{model_type} {bits}: {size}");
            }
            assert_ne!(logits[0], logits[1]);

            let text = TextModel::open(&dir).unwrap();
            let ids = text.tokenizer().encode("<|im_start|>größe 1\n<|im_end|>", false).unwrap();
            assert_eq!((ids[0], ids.len()), (257, 12));
            assert_eq!(text.tokenizer().decode(&ids), "größe 1\n");
            // Random weights also choose ids that the tokenizer does not have.
            assert_eq!(text.tokenizer().decode(&[65, 301, 319, 66]), "AB");
            assert!(text.has_template() && text.defaults().eos == [258, 256]);
        }
    }

    /// Protects the time and disk of those who measure twice: a finished pack is used again, an unfinished one goes on.
    #[test]
    fn packs_are_kept_and_builds_resume() {
        let cache = tempfile::tempdir().unwrap();
        let shape = small("qwen3_moe", 64);
        let dir = pack(&shape, 4, cache.path(), &mut |_, _| {}).unwrap();
        pack(&shape, 4, cache.path(), &mut |_, _| panic!("written again")).unwrap();
        let partial = cache.path().join("synthetic/small-qwen3_moe-4layers-4bit.partial");
        fs::rename(&dir, &partial).unwrap();
        let layer = fs::read_dir(partial.join(SIDECAR_DIR)).unwrap().flatten().find(|e| e.file_name().to_string_lossy().ends_with(".experts")).unwrap();
        let written = layer.metadata().unwrap().modified().unwrap();
        pack(&shape, 4, cache.path(), &mut |_, _| {}).unwrap();
        assert!(!partial.exists());
        assert_eq!(fs::metadata(dir.join(SIDECAR_DIR).join(layer.file_name())).unwrap().modified().unwrap(), written);
    }

    /// Protects cuts: the pattern of layers stays, what cannot be cut is named.
    #[test]
    fn cuts() {
        let shape = Shape::named("qwen3.6-35b-a3b").unwrap().cut(6).unwrap();
        let (_, spec) = mach_models::spec_of(shape.config()).unwrap();
        let attention: Vec<bool> = spec.layers.iter().map(|l| matches!(l.mixer, MixerSpec::Attention(_))).collect();
        assert_eq!(attention, [false, false, false, true, false, false]);
        assert!(SHAPES.iter().all(|name| mach_models::spec_of(Shape::named(name).unwrap().cut(3).unwrap().config()).unwrap().1.layers.len() == 3));
        for layers in [0, 49] {
            let error = Shape::named("qwen3-30b-a3b").unwrap().cut(layers).unwrap_err();
            assert!(error.to_string().contains("1 to 48"), "{error}");
        }
        let mut odd = small("qwen3_moe", 64);
        odd.config["hidden_size"] = json!(96);
        assert!(write(&odd, 4, Path::new("/nonexistent/odd"), &mut |_, _| {}).unwrap_err().to_string().contains("groups of 64"));
    }
}
