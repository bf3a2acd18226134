//! Building artifacts from a checkpoint: the sidecar beside it, or a *pack*, a self-contained folder with
//! configuration, tokenizer, resident weights (`model.safetensors`, quantised as MLX does) and sidecar.

use std::fs;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use safetensors::Dtype;
use serde_json::{Map, Value, json};

use crate::checkpoint::{Checkpoint, ElementType};
use crate::disk::{sync_dir, write_atomic};
use crate::error::FormatError;
use crate::fingerprint::fingerprint;
use crate::format::{ScaleType, WeightFormat};
use crate::matrix::{Matrix, RowPick};
use crate::packed::PackedLayout;
use crate::safetensors_writer::{Planned, SafetensorsWriter};
use crate::sidecar::{LayerOutcome, LayerShape, Manifest, RecordLayout, SIDECAR_DIR, SidecarPlan, SidecarWriter};
use crate::tile::row_bytes;

/// Files beside the weights that a pack takes along when they exist.
const COMPANIONS: [&str; 11] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.txt",
];
/// Where a pack keeps what is not yet complete.
const STAGING: &str = ".partial";

/// Where one projection of a layer's experts lies.
#[derive(Clone)]
pub enum ExpertSource {
    /// A stack `[experts, rows, cols]`.
    Stacked(Matrix),
    /// A part of the rows of every matrix of a stack: the gate or up half of a fused pair.
    StackedRows(Matrix, RowPick),
    /// One matrix per expert.
    Each(Vec<Matrix>),
}

impl ExpertSource {
    /// Number of experts.
    pub fn experts(&self) -> usize {
        match self {
            Self::Stacked(m) | Self::StackedRows(m, _) => m.leading().unwrap_or(0),
            Self::Each(all) => all.len(),
        }
    }

    /// The matrix of expert `e`.
    ///
    /// # Panics
    /// When `e` is outside.
    pub fn expert(&self, e: usize) -> Matrix {
        match self {
            Self::Stacked(m) => m.expert(e),
            Self::StackedRows(m, rows) => m.expert(e).pick(*rows),
            Self::Each(all) => all[e].clone(),
        }
    }
}

/// The experts of one layer.
#[derive(Clone)]
pub struct LayerPlan {
    /// Layer of the model.
    pub layer: usize,
    /// Gate projections `[inner, hidden]`.
    pub gate: ExpertSource,
    /// Up projections `[inner, hidden]`.
    pub up: ExpertSource,
    /// Down projections `[hidden, inner]`.
    pub down: ExpertSource,
}

/// What a checkpoint consists of, as its family knows.
#[derive(Clone)]
pub struct PackPlan {
    /// Family.
    pub model_type: String,
    /// MoE layers, ascending.
    pub experts: Vec<LayerPlan>,
    /// Format of the experts; `None` keeps that of the source.
    pub expert_format: Option<WeightFormat>,
    /// Modules (tensor names without `.weight`) of resident linears and embeddings, with the affine format they
    /// are quantised to; `None` keeps that of the source. Ignored by [`write_sidecar`].
    pub quantise: Vec<(String, Option<WeightFormat>)>,
    /// Full names of resident tensors that are copied as they are. Ignored by [`write_sidecar`].
    pub keep: Vec<String>,
}

/// Progress of a build.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BuildProgress {
    /// Bytes of the output that are done.
    pub done: u64,
    /// Bytes of the output.
    pub total: u64,
}

/// What a build did.
#[derive(Clone, Debug)]
pub struct BuildReport {
    /// Manifest of the sidecar.
    pub manifest: Manifest,
    /// Layers that were written now.
    pub written: usize,
    /// Layers that an earlier build had finished.
    pub kept: usize,
    /// Bytes of the resident weights (0 when only the sidecar was built).
    pub resident_bytes: u64,
}

impl PackPlan {
    /// Layouts of the sidecar, with every expert's shape checked.
    ///
    /// # Errors
    /// Experts of different shapes or numbers, formats that do not fit.
    pub fn sidecar(&self) -> Result<SidecarPlan, FormatError> {
        let wrong = |layer: usize, reason: &str| FormatError::Plan { reason: format!("layer {layer}: {reason}") };
        let experts = self.experts.first().map_or(0, |l| l.gate.experts());
        let mut layers: Vec<LayerShape> = Vec::with_capacity(self.experts.len());
        for plan in &self.experts {
            if [&plan.gate, &plan.up, &plan.down].iter().any(|s| s.experts() != experts) || experts == 0 {
                return Err(wrong(plan.layer, &format!("not every projection has {experts} experts")));
            }
            let target = |m: Matrix| self.expert_format.map_or(Ok(m.layout()), |format| m.quantised_layout(format));
            let layout = RecordLayout::new(target(plan.gate.expert(0))?, target(plan.down.expert(0))?);
            let (half, down) = (layout.gate_up.half, layout.down);
            for e in 0..experts {
                if target(plan.gate.expert(e))? != half || target(plan.up.expert(e))? != half || target(plan.down.expert(e))? != down {
                    return Err(wrong(plan.layer, &format!("expert {e} has another shape or format than expert 0")));
                }
            }
            if (down.rows, down.cols) != (half.cols, half.rows) {
                return Err(wrong(plan.layer, "down does not fit gate and up"));
            }
            if layers.last().is_some_and(|l| l.layer >= plan.layer) {
                return Err(wrong(plan.layer, "layers are not ascending"));
            }
            layers.push(LayerShape { layer: plan.layer, layout });
        }
        Ok(SidecarPlan { model_type: self.model_type.clone(), experts, layers })
    }

    fn write_layers(&self, writer: &mut SidecarWriter, shapes: &[LayerShape], progress: &mut dyn FnMut(u64)) -> Result<[usize; 2], FormatError> {
        let mut counts = [0, 0];
        for (plan, shape) in self.experts.iter().zip(shapes) {
            let layout = shape.layout;
            let pack = |m: Matrix, dst: &mut [u8], stride: usize| match self.expert_format {
                Some(format) if format != m.format() => m.pack_quantised_into(dst, stride, format),
                _ => m.pack_into(dst, stride),
            };
            let fill = |e: usize, gate_up: &mut [u8], down: &mut [u8]| {
                let tile = layout.gate_up.half.tile_bytes();
                pack(plan.gate.expert(e), gate_up, 2 * tile)?;
                pack(plan.up.expert(e), &mut gate_up[tile..], 2 * tile)?;
                pack(plan.down.expert(e), down, layout.down.tile_bytes())
            };
            let mut before = 0;
            let outcome = writer.write_layer(plan.layer, fill, &mut |experts| {
                progress(((experts - before) * layout.stride()) as u64);
                before = experts;
            })?;
            counts[usize::from(outcome == LayerOutcome::Kept)] += 1;
        }
        Ok(counts)
    }
}

/// Free space is examined before anything is written.
fn check_space(path: &Path, needed: u64) -> Result<(), FormatError> {
    let free = crate::disk::free_space(path)?;
    if needed > free {
        return Err(FormatError::DiskFull { path: path.to_owned(), needed, free });
    }
    Ok(())
}

/// Builds or completes the sidecar of `ck` in `dir` (usually `MODEL/expert_sidecar`).
///
/// # Errors
/// A plan that does not fit, values that cannot be quantised, no room, another build in the same place.
pub fn write_sidecar(ck: &Checkpoint, dir: &Path, plan: &PackPlan, progress: &mut dyn FnMut(BuildProgress)) -> Result<BuildReport, FormatError> {
    let sidecar = plan.sidecar()?;
    let source = fingerprint(ck)?;
    let (total, shapes) = (sidecar.bytes(), sidecar.layers.clone());
    check_space(dir, sidecar.missing_bytes(dir, &source))?;
    let mut writer = SidecarWriter::create(dir, &source, sidecar)?;
    let mut done = 0;
    let [written, kept] = plan.write_layers(&mut writer, &shapes, &mut |bytes| {
        done += bytes;
        progress(BuildProgress { done, total });
    })?;
    Ok(BuildReport { manifest: writer.finish(&source)?, written, kept, resident_bytes: 0 })
}

/// A resident tensor of a pack.
enum Resident {
    Copy(String),
    Quantise { module: String, matrix: Matrix, layout: PackedLayout },
}

/// Builds a pack in `out`, which must not hold a model yet. An interrupted build goes on where it stopped;
/// `config.json` comes last, so an unfinished pack is not taken for a model.
///
/// # Errors
/// As [`write_sidecar`]; also an `out` that holds a model.
pub fn write_pack(ck: &Checkpoint, out: &Path, plan: &PackPlan, progress: &mut dyn FnMut(BuildProgress)) -> Result<BuildReport, FormatError> {
    if out.join("config.json").exists() {
        return Err(FormatError::OutputExists { path: out.to_owned() });
    }
    let sidecar = plan.sidecar()?;
    let residents = residents(ck, plan)?;
    let tensors: Vec<Planned> = residents.iter().map(|r| planned(ck, r)).collect::<Result<Vec<_>, _>>()?.concat();
    let resident_bytes: u64 = tensors.iter().map(|t| t.bytes() as u64).sum();
    let total = resident_bytes + sidecar.bytes();
    let source = fingerprint(ck)?;

    let (staging, sidecar_dir) = (out.join(STAGING), out.join(SIDECAR_DIR));
    check_space(out, resident_bytes + sidecar.missing_bytes(&sidecar_dir, &source))?;
    fs::create_dir_all(&staging).map_err(FormatError::io("create", &staging))?;
    let shapes = sidecar.layers.clone();
    let mut writer = SidecarWriter::create(&sidecar_dir, &source, sidecar)?;
    let mut done = 0;
    let mut advance = |bytes: u64| {
        done += bytes;
        progress(BuildProgress { done, total });
    };

    // Resident weights are written anew by a resumed build: they are few, and equal bytes come out.
    let mut file = SafetensorsWriter::create(&staging.join("model.safetensors"), tensors)?;
    for resident in &residents {
        match resident {
            Resident::Copy(name) => {
                let data = ck.read_bytes(name)?;
                file.write(name, &data)?;
                advance(data.len() as u64);
            }
            Resident::Quantise { module, matrix, layout } => {
                for (suffix, data) in ["weight", "scales", "biases"].iter().zip(quantise(matrix, layout)?) {
                    file.write(&format!("{module}.{suffix}"), &data)?;
                    advance(data.len() as u64);
                }
            }
        }
    }
    file.finish()?;
    for name in COMPANIONS {
        let from = ck.dir().join(name);
        // What lies beside a GGUF file may belong to another model.
        if from.is_file() && !ck.is_gguf() {
            let data = fs::read(&from).map_err(FormatError::io("read", &from))?;
            write_atomic(&staging.join(name), &data)?;
        }
    }
    let config_path = staging.join("config.json");
    let mut config =
        serde_json::to_vec_pretty(&pack_config(ck, &residents)).map_err(|e| FormatError::Json { path: config_path.clone(), reason: e.to_string() })?;
    config.push(b'\n');
    write_atomic(&config_path, &config)?;
    let serves = fingerprint(&Checkpoint::open(&staging)?)?;

    let [written, kept] = plan.write_layers(&mut writer, &shapes, &mut advance)?;
    let manifest = writer.finish(&serves)?;
    publish(&staging, out)?;
    Ok(BuildReport { manifest, written, kept, resident_bytes })
}

/// Moves the staged files to their place, `config.json` last.
fn publish(staging: &Path, out: &Path) -> Result<(), FormatError> {
    let mut files: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(staging).map_err(FormatError::io("list", staging))? {
        files.push(entry.map_err(FormatError::io("list", staging))?.path());
    }
    files.sort_by_key(|f| f.ends_with("config.json"));
    for file in &files {
        if let Some(name) = file.file_name() {
            fs::rename(file, out.join(name)).map_err(FormatError::io("rename", file))?;
        }
    }
    fs::remove_dir(staging).map_err(FormatError::io("remove", staging))?;
    sync_dir(out)
}

fn residents(ck: &Checkpoint, plan: &PackPlan) -> Result<Vec<Resident>, FormatError> {
    let mut all = Vec::with_capacity(plan.quantise.len() + plan.keep.len());
    for (module, format) in &plan.quantise {
        let matrix = ck.matrix(module)?;
        match format {
            Some(_) if matrix.leading().is_some() => {
                return Err(FormatError::Plan { reason: format!("{module} is a stack, only single matrices are quantised as resident weights") });
            }
            Some(format) if *format != matrix.format() => {
                let layout = matrix.quantised_layout(*format)?;
                all.push(Resident::Quantise { module: module.clone(), matrix, layout });
            }
            _ => {
                all.extend(matrix.tensors().iter().cloned().map(Resident::Copy));
            }
        }
    }
    for name in &plan.keep {
        ck.require(name)?;
        all.push(Resident::Copy(name.clone()));
    }
    Ok(all)
}

fn planned(ck: &Checkpoint, resident: &Resident) -> Result<Vec<Planned>, FormatError> {
    match resident {
        Resident::Copy(name) => {
            let info = ck.require(name)?;
            let (dtype, shape) = match info.dtype {
                ElementType::Plain(dtype) => (dtype, info.shape.clone()),
                // Blocks as they lie, a row a row of bytes; the configuration says what they are.
                ElementType::Block(_) => {
                    let rows: usize = info.shape.iter().rev().skip(1).product();
                    let outer = info.shape.iter().rev().skip(1).rev().copied();
                    (Dtype::U8, outer.chain([info.bytes as usize / rows]).collect())
                }
            };
            Ok(vec![Planned { name: name.clone(), dtype, shape }])
        }
        Resident::Quantise { module, matrix, layout } => {
            let WeightFormat::Affine { bits, group, scales } = layout.format else {
                return Err(FormatError::Plan { reason: format!("{module} is to be quantised to {}", layout.format) });
            };
            let scale_type = match scales {
                ScaleType::F16 => Dtype::F16,
                ScaleType::BF16 => Dtype::BF16,
                ScaleType::F32 => Dtype::F32,
            };
            let outer = matrix.leading().into_iter().chain([layout.rows]);
            let tensor =
                |suffix: &str, dtype: Dtype, width: usize| Planned { name: format!("{module}.{suffix}"), dtype, shape: outer.clone().chain([width]).collect() };
            let groups = layout.cols / usize::from(group);
            Ok(vec![
                tensor("weight", Dtype::U32, layout.cols * usize::from(bits) / 32),
                tensor("scales", scale_type, groups),
                tensor("biases", scale_type, groups),
            ])
        }
    }
}

/// Quantises a whole matrix on all threads: words, scales, biases.
fn quantise(matrix: &Matrix, layout: &PackedLayout) -> Result<[Vec<u8>; 3], FormatError> {
    let [data_row, scale_row, bias_row] = row_bytes(layout);
    let rows = layout.rows;
    let mut out = [data_row, scale_row, bias_row].map(|row| vec![0; rows * row]);
    let [data, scales, biases] = &mut out;
    let step = (1 << 18) / layout.cols.max(1) + 1;
    let params = scales.par_chunks_mut(step * scale_row).zip(biases.par_chunks_mut(step * bias_row));
    data.par_chunks_mut(step * data_row).zip(params).enumerate().try_for_each(|(i, (data, (scales, biases)))| {
        let [d, s, b] = matrix.quantise_rows(layout.format, i * step..(i * step + step).min(rows))?;
        data.copy_from_slice(&d);
        scales.copy_from_slice(&s);
        biases.copy_from_slice(&b);
        Ok(())
    })?;
    Ok(out)
}

/// The source's configuration with an MLX `quantization` that describes the pack. The commonest format is the
/// general entry, others are named; modules of ggml's blocks are named with their type.
fn pack_config(ck: &Checkpoint, residents: &[Resident]) -> Value {
    let source = ck.config();
    let mut config = source.clone();
    let old = source.get("quantization").or_else(|| source.get("quantization_config")).and_then(Value::as_object);
    let mut quantization: Map<String, Value> = old.cloned().unwrap_or_default();
    let quantised = residents.iter().filter_map(|r| match r {
        Resident::Quantise { module, layout, .. } => match layout.format {
            WeightFormat::Affine { bits, group, .. } => Some((module, (bits, group))),
            _ => None,
        },
        Resident::Copy(_) => None,
    });
    let quantised: Vec<_> = quantised.collect();
    let count = |format| quantised.iter().filter(|(_, f)| *f == format).count();
    if old.is_none()
        && let Some(&(_, (bits, group))) = quantised.iter().rev().max_by_key(|(_, format)| count(*format))
    {
        quantization.insert("group_size".to_owned(), json!(group));
        quantization.insert("bits".to_owned(), json!(bits));
        quantization.insert("mode".to_owned(), json!("affine"));
    }
    for (module, (bits, group)) in quantised {
        let general = |key: &str| quantization.get(key).and_then(Value::as_u64);
        if (general("bits"), general("group_size")) == (Some(bits.into()), Some(group.into())) {
            quantization.remove(module);
        } else {
            quantization.insert(module.clone(), json!({ "group_size": group, "bits": bits }));
        }
    }
    for resident in residents {
        if let Resident::Copy(name) = resident
            && let Some(ElementType::Block(ty)) = ck.tensor(name).map(|t| t.dtype)
            && let Some(block) = ty.block()
        {
            quantization.insert(name.trim_end_matches(".weight").to_owned(), json!({ "mode": block }));
        }
    }
    if let Some(config) = config.as_object_mut() {
        config.remove("quantization_config");
        if !quantization.is_empty() {
            config.insert("quantization".to_owned(), Value::Object(quantization));
        }
    }
    config
}
