//! Packs: a folder with configuration, tokenizer, resident weights (`model.safetensors`, quantised as MLX does) and sidecar. A pack
//! is written in pieces, which may come in any order and over several runs, as the tensors that they are made of are there.

use std::fs;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use safetensors::Dtype;
use serde_json::{Map, Value, json};

use crate::artifact::{BuildProgress, BuildReport, PackPlan, check_space};
use crate::checkpoint::{Checkpoint, ElementType};
use crate::disk::{sync_dir, write_atomic};
use crate::error::FormatError;
use crate::fingerprint::{Fingerprint, fingerprint};
use crate::format::{ScaleType, WeightFormat};
use crate::matrix::Matrix;
use crate::packed::PackedLayout;
use crate::safetensors_parts::SafetensorsParts;
use crate::safetensors_writer::Planned;
use crate::sidecar::{LayerOutcome, SIDECAR_DIR, SidecarPlan, SidecarWriter};
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
const WEIGHTS: &str = "model.safetensors";

/// What is written at once: a resident weight, or the experts of a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Its layer, where it is the experts of one.
    pub layer: Option<usize>,
    /// The tensors of the checkpoint that it is made of.
    pub tensors: Vec<String>,
    /// Bytes in the pack.
    pub bytes: u64,
}

/// A resident weight of a pack.
#[derive(PartialEq, Eq)]
struct Resident {
    how: How,
    /// Its tensors in the pack.
    planned: Vec<Planned>,
}

#[derive(PartialEq, Eq)]
enum How {
    Copy(String),
    Quantise { module: String, layout: PackedLayout },
}

/// What a pack will consist of.
pub struct PackJob {
    source: Fingerprint,
    residents: Vec<Resident>,
    sidecar: SidecarPlan,
    /// The resident weights, then the layers.
    pieces: Vec<Piece>,
}

impl PackJob {
    /// From a plan, of a checkpoint of which the headers are enough. `source` is what the checkpoint's content is told by when a build
    /// is taken up again.
    ///
    /// # Errors
    /// A plan that does not fit.
    pub fn new(ck: &Checkpoint, plan: &PackPlan, source: Fingerprint) -> Result<Self, FormatError> {
        let sidecar = plan.sidecar()?;
        let mut residents = Vec::with_capacity(plan.quantise.len() + plan.keep.len());
        let mut pieces = Vec::with_capacity(residents.capacity() + plan.experts.len());
        let mut add = |resident: Resident, tensors: Vec<String>| {
            pieces.push(Piece { layer: None, tensors, bytes: resident.planned.iter().map(|t| t.bytes() as u64).sum() });
            residents.push(resident);
        };
        for (module, format) in &plan.quantise {
            let matrix = ck.matrix(module)?;
            match format {
                Some(_) if matrix.leading().is_some() => {
                    return Err(FormatError::Plan { reason: format!("{module} is a stack, only single matrices are quantised as resident weights") });
                }
                Some(format) if *format != matrix.format() => {
                    let layout = matrix.quantised_layout(*format)?;
                    add(
                        Resident { planned: planned_quantised(module, &matrix, &layout)?, how: How::Quantise { module: module.clone(), layout } },
                        matrix.tensors().to_vec(),
                    );
                }
                _ => {
                    for name in matrix.tensors() {
                        add(copy(ck, name)?, vec![name.clone()]);
                    }
                }
            }
        }
        for name in &plan.keep {
            add(copy(ck, name)?, vec![name.clone()]);
        }
        for (layer, shape) in plan.experts.iter().zip(&sidecar.layers) {
            let tensors = [&layer.gate, &layer.up, &layer.down].into_iter().flat_map(|source| source.tensors()).collect();
            pieces.push(Piece { layer: Some(layer.layer), tensors, bytes: (sidecar.experts * shape.layout.stride()) as u64 });
        }
        Ok(Self { source, residents, sidecar, pieces })
    }

    /// Its pieces.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// Bytes of all pieces.
    pub fn bytes(&self) -> u64 {
        self.pieces.iter().map(|p| p.bytes).sum()
    }

    fn planned(&self) -> Vec<Planned> {
        self.residents.iter().flat_map(|r| r.planned.iter().cloned()).collect()
    }

    /// Bytes that an earlier run in `out` has not written yet.
    ///
    /// # Errors
    /// Two resident tensors of one name.
    pub fn missing_bytes(&self, out: &Path) -> Result<u64, FormatError> {
        let planned = self.planned();
        let written = SafetensorsParts::written(&out.join(STAGING).join(WEIGHTS), &planned, &self.source.to_string())?;
        let residents: u64 = planned.iter().filter(|t| !written.contains(&t.name)).map(|t| t.bytes() as u64).sum();
        Ok(residents + self.sidecar.missing_bytes(&out.join(SIDECAR_DIR), &self.source))
    }

    /// Starts to write into `out`, or goes on where an earlier run stopped: what that wrote is read and kept where its checksums
    /// are right. `progress` gets the bytes that are kept.
    ///
    /// # Errors
    /// An `out` that holds a model, another build there.
    pub fn start(self, out: &Path, progress: &mut dyn FnMut(u64)) -> Result<PackWriter, FormatError> {
        if out.join("config.json").exists() {
            return Err(FormatError::OutputExists { path: out.to_owned() });
        }
        let (staging, sidecar_dir) = (out.join(STAGING), out.join(SIDECAR_DIR));
        fs::create_dir_all(&staging).map_err(FormatError::io("create", &staging))?;
        let mut sidecar = SidecarWriter::create(&sidecar_dir, &self.source, self.sidecar.clone())?;
        let path = staging.join(WEIGHTS);
        for from in [&path, &out.join(WEIGHTS)] {
            SafetensorsParts::take_back(&path, from)?;
        }
        let weights = SafetensorsParts::open(&path, &self.planned(), &self.source.to_string())?;
        let mut done: Vec<bool> = self.residents.iter().map(|r| r.planned.iter().all(|t| weights.has(&t.name))).collect();
        progress(self.pieces.iter().zip(&done).filter(|(_, done)| **done).map(|(piece, _)| piece.bytes).sum());
        let kept = sidecar.resume(progress)?;
        done.extend(self.sidecar.layers.iter().map(|l| kept.contains(&l.layer)));
        Ok(PackWriter { job: self, out: out.to_owned(), staging, sidecar, weights, done, written: 0, kept: kept.len() })
    }
}

/// A pack being written. `config.json` comes last, so an unfinished one is not taken for a model.
pub struct PackWriter {
    job: PackJob,
    out: PathBuf,
    staging: PathBuf,
    sidecar: SidecarWriter,
    weights: SafetensorsParts,
    done: Vec<bool>,
    written: usize,
    kept: usize,
}

impl PackWriter {
    /// Its pieces.
    pub fn pieces(&self) -> &[Piece] {
        &self.job.pieces
    }

    /// Whether a piece is written.
    ///
    /// # Panics
    /// When there is no such piece.
    pub fn is_done(&self, piece: usize) -> bool {
        self.done[piece]
    }

    /// Writes pieces (by number) that are not written yet, resident weights first. `ck` and `plan` are those that the job was made of, opened
    /// anew or not, and have the tensors of these pieces; `progress` gets bytes.
    ///
    /// # Errors
    /// Tensors that are not there or have other shapes now, values that cannot be quantised, a full disk.
    pub fn write(&mut self, ck: &Checkpoint, plan: &PackPlan, pieces: &[usize], progress: &mut dyn FnMut(u64)) -> Result<(), FormatError> {
        let mut missing: Vec<usize> = pieces.iter().copied().filter(|&piece| !self.done[piece]).collect();
        missing.sort_unstable();
        if let Some(tensor) = missing.iter().flat_map(|&piece| &self.job.pieces[piece].tensors).find(|tensor| !ck.has_data(tensor)) {
            return Err(FormatError::Plan { reason: format!("{tensor} is to be packed before it is there") });
        }
        let (residents, layers) = missing.split_at(missing.partition_point(|&piece| piece < self.job.residents.len()));
        for &piece in residents {
            self.write_resident(ck, piece)?;
            self.done[piece] = true;
            progress(self.job.pieces[piece].bytes);
        }
        self.weights.sync()?;
        for &piece in layers {
            let number = piece - self.job.residents.len();
            let outcome = plan.write_layer(number, &self.job.sidecar, &mut self.sidecar, progress)?;
            self.written += usize::from(outcome == LayerOutcome::Written);
            self.done[piece] = true;
        }
        Ok(())
    }

    fn write_resident(&mut self, ck: &Checkpoint, piece: usize) -> Result<(), FormatError> {
        let resident = &self.job.residents[piece];
        let changed = |what: &str| FormatError::Plan { reason: format!("{what} is not what it was when the build began") };
        match &resident.how {
            How::Copy(name) => {
                if copy(ck, name)? != *resident {
                    return Err(changed(name));
                }
                self.weights.write(name, &ck.read_bytes(name)?)
            }
            How::Quantise { module, layout } => {
                let matrix = ck.matrix(module)?;
                if matrix.quantised_layout(layout.format)? != *layout {
                    return Err(changed(module));
                }
                for (suffix, data) in ["weight", "scales", "biases"].iter().zip(quantise(&matrix, layout)?) {
                    self.weights.write(&format!("{module}.{suffix}"), &data)?;
                }
                Ok(())
            }
        }
    }

    /// Writes what is left and shows the pack. The files that are taken along stand in the directory of `ck`.
    ///
    /// # Errors
    /// Pieces that were not written, a full disk.
    pub fn finish(self, ck: &Checkpoint) -> Result<BuildReport, FormatError> {
        let Self { job, out, staging, sidecar, weights, written, kept, .. } = self;
        weights.finish()?;
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
            serde_json::to_vec_pretty(&pack_config(ck, &job.residents)).map_err(|e| FormatError::Json { path: config_path.clone(), reason: e.to_string() })?;
        config.push(b'\n');
        write_atomic(&config_path, &config)?;
        let serves = fingerprint(&Checkpoint::open(&staging)?)?;
        let manifest = sidecar.finish(&serves)?;
        publish(&staging, &out)?;
        let resident_bytes = job.pieces[..job.residents.len()].iter().map(|p| p.bytes).sum();
        Ok(BuildReport { manifest, written, kept, resident_bytes })
    }
}

/// Builds a pack in `out`, which must not hold a model yet. An interrupted build goes on where it stopped.
///
/// # Errors
/// As [`write_sidecar`](crate::write_sidecar); also an `out` that holds a model.
pub fn write_pack(ck: &Checkpoint, out: &Path, plan: &PackPlan, progress: &mut dyn FnMut(BuildProgress)) -> Result<BuildReport, FormatError> {
    let job = PackJob::new(ck, plan, fingerprint(ck)?)?;
    check_space(out, job.missing_bytes(out)?)?;
    let (total, mut done) = (job.bytes(), 0);
    let mut advance = |bytes: u64| {
        done += bytes;
        progress(BuildProgress { done, total });
    };
    let mut writer = job.start(out, &mut advance)?;
    let all: Vec<usize> = (0..writer.pieces().len()).collect();
    writer.write(ck, plan, &all, &mut advance)?;
    writer.finish(ck)
}

/// Moves the staged files to their place, `config.json` last.
fn publish(staging: &Path, out: &Path) -> Result<(), FormatError> {
    let mut files: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(staging).map_err(FormatError::io("list", staging))? {
        files.push(entry.map_err(FormatError::io("list", staging))?.path());
    }
    // The journal goes when nothing can be lost any more.
    files.retain(|file| file.extension().is_none_or(|ending| ending != "done"));
    files.sort_by_key(|f| f.ends_with("config.json"));
    for file in &files {
        if let Some(name) = file.file_name() {
            fs::rename(file, out.join(name)).map_err(FormatError::io("rename", file))?;
        }
    }
    SafetensorsParts::forget(&staging.join(WEIGHTS))?;
    fs::remove_dir(staging).map_err(FormatError::io("remove", staging))?;
    sync_dir(out)
}

/// A tensor that is copied.
fn copy(ck: &Checkpoint, name: &str) -> Result<Resident, FormatError> {
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
    Ok(Resident { how: How::Copy(name.to_owned()), planned: vec![Planned { name: name.to_owned(), dtype, shape }] })
}

/// The tensors of a matrix that is quantised.
fn planned_quantised(module: &str, matrix: &Matrix, layout: &PackedLayout) -> Result<Vec<Planned>, FormatError> {
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
    Ok(vec![tensor("weight", Dtype::U32, layout.cols * usize::from(bits) / 32), tensor("scales", scale_type, groups), tensor("biases", scale_type, groups)])
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
    let quantised = residents.iter().filter_map(|r| match &r.how {
        How::Quantise { module, layout } => match layout.format {
            WeightFormat::Affine { bits, group, .. } => Some((module, (bits, group))),
            _ => None,
        },
        How::Copy(_) => None,
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
        let affine = quantization.get("mode").is_none_or(|mode| mode == "affine");
        if affine && (general("bits"), general("group_size")) == (Some(bits.into()), Some(group.into())) {
            quantization.remove(module);
        } else {
            quantization.insert(module.clone(), json!({ "group_size": group, "bits": bits }));
        }
    }
    for resident in residents {
        if let How::Copy(name) = &resident.how
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
