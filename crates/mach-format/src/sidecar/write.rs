//! Building a sidecar, layer by layer.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::read::{check_records, read_layer};
use super::{LayerEntry, LayerExperts, MANIFEST, Manifest, RecordLayout, SIDECAR_VERSION, Trailer, file_bytes, layer_file, layer_key};
use crate::disk::{AtomicFile, write_atomic};
use crate::error::FormatError;
use crate::fingerprint::{Fingerprint, checksum};

/// Records that are made at once, in bytes.
const BATCH_BYTES: usize = 64 << 20;
const LOCK: &str = ".build.lock";

/// One layer to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerShape {
    /// Layer of the model.
    pub layer: usize,
    /// Record of its experts.
    pub layout: RecordLayout,
}

/// What a sidecar will hold.
#[derive(Clone, Debug)]
pub struct SidecarPlan {
    /// Family.
    pub model_type: String,
    /// Experts per layer.
    pub experts: usize,
    /// MoE layers, ascending.
    pub layers: Vec<LayerShape>,
}

impl SidecarPlan {
    /// Bytes of all layer files.
    pub fn bytes(&self) -> u64 {
        self.layers.iter().map(|l| file_bytes(&l.layout, self.experts)).sum()
    }

    /// Bytes that a build in `dir` has still to write: layers without a complete file of this source.
    pub fn missing_bytes(&self, dir: &Path, source: &Fingerprint) -> u64 {
        let missing = self.layers.iter().filter(|l| self.existing(dir, source, l).is_none());
        missing.map(|l| file_bytes(&l.layout, self.experts)).sum()
    }

    fn file_of(&self, dir: &Path, source: &Fingerprint, shape: &LayerShape) -> ([u8; 32], PathBuf) {
        let key = layer_key(source, shape.layer, self.experts, &shape.layout);
        (key, dir.join(layer_file(shape.layer, &key)))
    }

    /// The index hash of a complete file of this layer.
    fn existing(&self, dir: &Path, source: &Fingerprint, shape: &LayerShape) -> Option<u64> {
        let (key, path) = self.file_of(dir, source, shape);
        let (trailer, _) = read_layer(&path, &shape.layout, self.experts).ok()?;
        (trailer.key == key && trailer.layer == shape.layer as u32).then_some(trailer.index_hash)
    }
}

/// What happened to a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerOutcome {
    /// It was written.
    Written,
    /// A complete file of the same source and layout was there already.
    Kept,
}

/// Writes a sidecar. Every layer file gets its name when it is complete; the manifest comes last. A sidecar that
/// is in use stays whole until then, and an interrupted build goes on where it stopped.
pub struct SidecarWriter {
    dir: PathBuf,
    source: Fingerprint,
    plan: SidecarPlan,
    entries: Vec<LayerEntry>,
    /// Held open: the lock ends with the process.
    _lock: File,
}

impl SidecarWriter {
    /// Starts or resumes a build in `dir` from the checkpoint with the given fingerprint.
    ///
    /// # Errors
    /// A directory that cannot be written, another process that builds there.
    pub fn create(dir: &Path, source: &Fingerprint, plan: SidecarPlan) -> Result<Self, FormatError> {
        fs::create_dir_all(dir).map_err(FormatError::io("create", dir))?;
        let lock_path = dir.join(LOCK);
        let lock = File::create(&lock_path).map_err(FormatError::write(&lock_path, 0))?;
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).map_err(|e| match e {
            rustix::io::Errno::WOULDBLOCK => FormatError::Busy { dir: dir.to_owned() },
            _ => FormatError::io("lock", &lock_path)(e.into()),
        })?;
        let writer = Self { dir: dir.to_owned(), source: *source, plan, entries: Vec::new(), _lock: lock };
        // What a killed build left half done.
        writer.remove_files(|name| name.ends_with(".tmp"))?;
        Ok(writer)
    }

    /// Takes over the layers that an earlier build of the same source completed, when all their records have their checksums;
    /// damaged files are removed. Returns those layers; `progress` gets the bytes of their records.
    ///
    /// # Errors
    /// Files that cannot be read or removed.
    pub fn resume(&mut self, progress: &mut dyn FnMut(u64)) -> Result<Vec<usize>, FormatError> {
        let mut kept = Vec::new();
        for shape in self.plan.layers.clone() {
            if self.plan.existing(&self.dir, &self.source, &shape).is_none() {
                continue;
            }
            let (key, path) = self.plan.file_of(&self.dir, &self.source, &shape);
            let (trailer, checksums) = read_layer(&path, &shape.layout, self.plan.experts)?;
            let layer = LayerExperts { layer: shape.layer, layout: shape.layout, checksums, path };
            match check_records(&layer, &mut |_| {}) {
                Ok(()) => {
                    progress((self.plan.experts * shape.layout.stride()) as u64);
                    self.enter(&shape, &key, trailer.index_hash);
                    kept.push(shape.layer);
                }
                Err(FormatError::Checksum { .. }) => fs::remove_file(&layer.path).map_err(FormatError::io("remove", &layer.path))?,
                Err(e) => return Err(e),
            }
        }
        Ok(kept)
    }

    /// Puts a layer into the manifest.
    fn enter(&mut self, shape: &LayerShape, key: &[u8; 32], index_hash: u64) {
        self.entries.retain(|e| e.layer != shape.layer);
        self.entries.push(LayerEntry {
            layer: shape.layer,
            file: layer_file(shape.layer, key),
            bytes: file_bytes(&shape.layout, self.plan.experts),
            index_xxh3: format!("{index_hash:016x}"),
            gate_up: shape.layout.gate_up.half,
            down: shape.layout.down,
            part_bytes: shape.layout.part_bytes,
        });
    }

    /// Writes one layer of the plan. `fill(expert, gate_up, down)` is called from the threads of the rayon pool
    /// with zeroed parts; `progress` gets the number of experts done.
    ///
    /// # Errors
    /// Those of `fill`, a layer outside the plan, a full disk. The temporary file is removed then.
    pub fn write_layer<F>(&mut self, layer: usize, fill: F, progress: &mut dyn FnMut(usize)) -> Result<LayerOutcome, FormatError>
    where
        F: Fn(usize, &mut [u8], &mut [u8]) -> Result<(), FormatError> + Sync,
    {
        let shape =
            self.plan.layers.iter().find(|l| l.layer == layer).copied().ok_or_else(|| FormatError::Plan { reason: format!("layer {layer} is not in it") })?;
        let (existing, (key, path)) = (self.plan.existing(&self.dir, &self.source, &shape), self.plan.file_of(&self.dir, &self.source, &shape));
        let (outcome, index_hash) = match existing {
            Some(hash) => {
                progress(self.plan.experts);
                (LayerOutcome::Kept, hash)
            }
            None => (LayerOutcome::Written, self.write_file(&shape, key, &path, fill, progress)?),
        };
        self.enter(&shape, &key, index_hash);
        Ok(outcome)
    }

    fn write_file<F>(&self, shape: &LayerShape, key: [u8; 32], path: &Path, fill: F, progress: &mut dyn FnMut(usize)) -> Result<u64, FormatError>
    where
        F: Fn(usize, &mut [u8], &mut [u8]) -> Result<(), FormatError> + Sync,
    {
        let (experts, stride) = (self.plan.experts, shape.layout.stride());
        let mut file = AtomicFile::create(path, file_bytes(&shape.layout, experts))?.forget_when_done();
        let per_batch = (BATCH_BYTES / stride).clamp(1, experts.max(1));
        let mut batch = vec![0; per_batch * stride];
        let mut index = Vec::with_capacity(experts * 16);
        for first in (0..experts).step_by(per_batch) {
            let batch = &mut batch[..per_batch.min(experts - first) * stride];
            let sums: Vec<[u64; 2]> = batch
                .par_chunks_mut(stride)
                .enumerate()
                .map(|(i, record)| {
                    record.fill(0);
                    let (gate_up, down) = record.split_at_mut(shape.layout.part_bytes[0]);
                    fill(first + i, gate_up, down)?;
                    Ok([checksum(gate_up), checksum(down)])
                })
                .collect::<Result<_, FormatError>>()?;
            index.extend(sums.iter().flatten().flat_map(|sum| sum.to_le_bytes()));
            file.write(batch)?;
            progress(first + batch.len() / stride);
        }
        let index_hash = checksum(&index);
        let trailer = Trailer { layer: shape.layer as u32, experts: experts as u32, part_bytes: shape.layout.part_bytes.map(|b| b as u64), index_hash, key };
        file.write(&index)?;
        file.write(&trailer.to_bytes())?;
        file.commit()?;
        Ok(index_hash)
    }

    /// Writes the manifest for the checkpoint with the fingerprint `serves` (the source itself, or the pack made
    /// from it) and removes layer files of earlier builds.
    ///
    /// # Errors
    /// Layers of the plan that were not written, a full disk.
    pub fn finish(mut self, serves: &Fingerprint) -> Result<Manifest, FormatError> {
        self.entries.sort_unstable_by_key(|e| e.layer);
        let written: Vec<usize> = self.entries.iter().map(|e| e.layer).collect();
        if let Some(missing) = self.plan.layers.iter().find(|l| !written.contains(&l.layer)) {
            return Err(FormatError::Plan { reason: format!("layer {} was not written", missing.layer) });
        }
        let manifest = Manifest {
            format: "mach-expert-sidecar".to_owned(),
            version: SIDECAR_VERSION,
            fingerprint: *serves,
            source: self.source,
            model_type: self.plan.model_type.clone(),
            experts: self.plan.experts,
            layers: std::mem::take(&mut self.entries),
        };
        let path = self.dir.join(MANIFEST);
        let mut text = serde_json::to_vec_pretty(&manifest).map_err(|e| FormatError::Json { path: path.clone(), reason: e.to_string() })?;
        text.push(b'\n');
        write_atomic(&path, &text)?;
        self.remove_files(|name| name.ends_with(".experts") && manifest.layers.iter().all(|l| l.file != name))?;
        Ok(manifest)
    }

    fn remove_files(&self, unwanted: impl Fn(&str) -> bool) -> Result<(), FormatError> {
        for entry in fs::read_dir(&self.dir).map_err(FormatError::io("list", &self.dir))? {
            let entry = entry.map_err(FormatError::io("list", &self.dir))?;
            if entry.file_name().to_str().is_some_and(&unwanted) {
                fs::remove_file(entry.path()).map_err(FormatError::io("remove", &entry.path()))?;
            }
        }
        Ok(())
    }
}

impl Drop for SidecarWriter {
    fn drop(&mut self) {
        // The lock goes with the process anyway; a directory in which nothing was finished is not left behind.
        let _ = fs::remove_file(self.dir.join(LOCK));
        let _ = fs::remove_dir(&self.dir);
    }
}
