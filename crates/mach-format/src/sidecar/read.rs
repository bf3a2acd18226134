//! Opening and verifying a sidecar.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::{LayerEntry, LayerExperts, MANIFEST, Manifest, RecordLayout, SIDECAR_VERSION, TRAILER, Trailer, file_bytes, layer_key};
use crate::disk::forget_pages;
use crate::error::FormatError;
use crate::fingerprint::{Fingerprint, checksum};

/// A validated sidecar. Records themselves are checked when they are read.
#[derive(Clone, Debug)]
pub struct Sidecar {
    manifest: Manifest,
    layers: Vec<LayerExperts>,
}

impl Sidecar {
    /// Opens the sidecar in `dir` for the checkpoint with the given fingerprint. Reads the manifest, and index and
    /// trailer of every layer file, no records.
    ///
    /// # Errors
    /// No sidecar, another version, another checkpoint, files that are missing, short or do not fit the manifest.
    pub fn open(dir: &Path, source_fingerprint: &Fingerprint) -> Result<Self, FormatError> {
        let sidecar = Self::open_any(dir)?;
        if sidecar.manifest.fingerprint != *source_fingerprint {
            return Err(FormatError::SidecarFingerprint {
                dir: dir.to_owned(),
                expected: source_fingerprint.to_string(),
                got: sidecar.manifest.fingerprint.to_string(),
            });
        }
        Ok(sidecar)
    }

    fn open_any(dir: &Path) -> Result<Self, FormatError> {
        let manifest = info(dir)?;
        let layers = manifest.layers.iter().map(|entry| open_layer(dir, &manifest, entry)).collect::<Result<_, _>>()?;
        Ok(Self { manifest, layers })
    }

    /// The MoE layers, ascending.
    pub fn layers(&self) -> &[LayerExperts] {
        &self.layers
    }

    /// The manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }
}

/// The manifest of a sidecar, without looking at its files.
///
/// # Errors
/// No sidecar, a malformed manifest, another version.
pub fn info(dir: &Path) -> Result<Manifest, FormatError> {
    let path = Manifest::path(dir);
    let text = fs::read(&path).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => FormatError::SidecarMissing { dir: dir.to_owned() },
        _ => FormatError::io("read", &path)(e),
    })?;
    let invalid = |e: serde_json::Error| FormatError::Json { path: path.clone(), reason: e.to_string() };
    let value: serde_json::Value = serde_json::from_slice(&text).map_err(invalid)?;
    let version = value.get("version").and_then(serde_json::Value::as_u64).unwrap_or(0);
    if version != u64::from(SIDECAR_VERSION) {
        return Err(FormatError::SidecarVersion { path, expected: SIDECAR_VERSION, got: version.try_into().unwrap_or(u32::MAX) });
    }
    serde_json::from_value(value).map_err(invalid)
}

fn open_layer(dir: &Path, manifest: &Manifest, entry: &LayerEntry) -> Result<LayerExperts, FormatError> {
    let path = dir.join(&entry.file);
    let corrupt = |reason: &str| FormatError::SidecarCorrupt { path: path.clone(), reason: reason.to_owned() };
    if Path::new(&entry.file).file_name().is_none_or(|name| name != entry.file.as_str()) {
        return Err(FormatError::SidecarCorrupt { path: dir.join(MANIFEST), reason: format!("{} is not a plain file name", entry.file) });
    }
    let (gate_up, down) = (entry.gate_up, entry.down);
    let sane = |n: usize| (1..1 << 24).contains(&n);
    if ![gate_up.rows, gate_up.cols, down.rows, down.cols, manifest.experts].into_iter().all(sane) || !gate_up.is_well_formed() || !down.is_well_formed() {
        return Err(corrupt("the manifest gives an impossible layout"));
    }
    let layout = RecordLayout::new(gate_up, down);
    let key = layer_key(&manifest.source, entry.layer, manifest.experts, &layout);
    let (trailer, checksums) = read_layer(&path, &layout, manifest.experts)?;
    let expected = Trailer {
        layer: entry.layer as u32,
        experts: manifest.experts as u32,
        part_bytes: layout.part_bytes.map(|b| b as u64),
        index_hash: trailer.index_hash,
        key,
    };
    if layout.part_bytes != entry.part_bytes || trailer != expected || format!("{:016x}", trailer.index_hash) != entry.index_xxh3 {
        return Err(corrupt("it does not fit the manifest"));
    }
    Ok(LayerExperts { layer: entry.layer, layout, checksums, path })
}

/// Length, trailer and index of a layer file, checked against each other.
pub(super) fn read_layer(path: &Path, layout: &RecordLayout, experts: usize) -> Result<(Trailer, Vec<[u64; 2]>), FormatError> {
    let corrupt = |reason: String| FormatError::SidecarCorrupt { path: path.to_owned(), reason };
    let file = File::open(path).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => corrupt("it is missing".to_owned()),
        _ => FormatError::io("open", path)(e),
    })?;
    let length = file.metadata().map_err(FormatError::io("examine", path))?.len();
    let expected = file_bytes(layout, experts);
    if length != expected {
        return Err(FormatError::Truncated { path: path.to_owned(), expected, got: length });
    }
    let mut tail = vec![0; experts * 16 + TRAILER];
    let at = length - tail.len() as u64;
    file.read_exact_at(&mut tail, at).map_err(FormatError::io("read", path))?;
    let (index, trailer) = tail.split_at(experts * 16);
    let trailer = trailer.first_chunk().and_then(Trailer::parse);
    let (version, trailer) = trailer.ok_or_else(|| corrupt("its trailer is invalid".to_owned()))?;
    if version != SIDECAR_VERSION {
        return Err(FormatError::SidecarVersion { path: path.to_owned(), expected: SIDECAR_VERSION, got: version });
    }
    if checksum(index) != trailer.index_hash {
        return Err(corrupt("its index has the wrong checksum".to_owned()));
    }
    let word = |bytes: &[u8; 8]| u64::from_le_bytes(*bytes);
    let checksums = index.as_chunks::<8>().0.as_chunks::<2>().0.iter().map(|[a, b]| [word(a), word(b)]).collect();
    Ok((trailer, checksums))
}

/// What [`verify`] looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VerifyReport {
    /// MoE layers.
    pub layers: usize,
    /// Records of all layers.
    pub records: usize,
    /// Bytes that were hashed.
    pub bytes: u64,
}

/// Reads every record and compares its checksums. `progress` gets bytes done and bytes of all.
///
/// # Errors
/// As [`Sidecar::open`], and the first bad record by layer, expert and part.
pub fn verify(dir: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<VerifyReport, FormatError> {
    let sidecar = Sidecar::open_any(dir)?;
    let total = sidecar.layers.iter().map(|l| (l.experts() * l.layout.stride()) as u64).sum();
    let mut report = VerifyReport { layers: sidecar.layers.len(), records: 0, bytes: 0 };
    for layer in &sidecar.layers {
        check_records(layer, &mut |bytes| {
            report.records += 1;
            report.bytes += bytes;
            progress(report.bytes, total);
        })?;
    }
    Ok(report)
}

/// Reads the records of a layer and compares their checksums; `progress` gets the bytes of each.
pub(super) fn check_records(layer: &LayerExperts, progress: &mut dyn FnMut(u64)) -> Result<(), FormatError> {
    let file = File::open(&layer.path).map_err(FormatError::io("open", &layer.path))?;
    let mut record = vec![0; layer.layout.stride()];
    for expert in 0..layer.experts() {
        file.read_exact_at(&mut record, layer.offset(expert, 0)).map_err(FormatError::io("read", &layer.path))?;
        let (gate_up, down) = record.split_at(layer.layout.part_bytes[0]);
        layer.check(expert, 0, gate_up)?;
        layer.check(expert, 1, down)?;
        progress(record.len() as u64);
    }
    forget_pages(&file, 0, None);
    Ok(())
}
