//! The expert sidecar: one file per layer with the experts in the packed layout.
//!
//! A layer file is a sequence of records at equal stride, one per expert, each `gate|up` then `down`, both padded
//! to 4096 bytes so that either can be read by direct I/O and computed on as it lies. After the records come two
//! XXH3-64 checksums per record, one over each padded part, and a trailer of fixed size. `manifest.json` names the
//! files; it is written last, so a directory with a manifest is complete. All numbers are little-endian.

mod read;
mod write;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::FormatError;
use crate::fingerprint::{Fingerprint, checksum};
use crate::packed::{GateUpLayout, PackedLayout};

pub use read::{Sidecar, VerifyReport, info, verify};
pub use write::{LayerOutcome, LayerShape, SidecarPlan, SidecarWriter};

/// Version of manifest and layer files.
pub const SIDECAR_VERSION: u32 = 1;
/// Directory of the sidecar inside a checkpoint.
pub const SIDECAR_DIR: &str = "expert_sidecar";
/// Alignment of the parts of a record.
pub const PART_ALIGN: usize = crate::direct::READ_ALIGN;

const MANIFEST: &str = "manifest.json";
const MAGIC: &[u8; 8] = b"MACHEXP\0";
const TRAILER: usize = 96;
/// Names of the two parts in messages.
pub(crate) const PART_NAMES: [&str; 2] = ["gate|up", "down"];

/// How one expert lies in its record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordLayout {
    /// Part 0: tiles of gate and up in turn.
    pub gate_up: GateUpLayout,
    /// Part 1.
    pub down: PackedLayout,
    /// Bytes of the parts, multiples of [`PART_ALIGN`].
    pub part_bytes: [usize; 2],
}

impl RecordLayout {
    /// The record of an expert with these matrices; `half` is gate or up.
    pub const fn new(half: PackedLayout, down: PackedLayout) -> Self {
        let gate_up = GateUpLayout { half };
        let part_bytes = [gate_up.bytes().next_multiple_of(PART_ALIGN), down.bytes().next_multiple_of(PART_ALIGN)];
        Self { gate_up, down, part_bytes }
    }

    /// Distance between records.
    pub const fn stride(&self) -> usize {
        self.part_bytes[0] + self.part_bytes[1]
    }
}

/// The experts of one layer: everything a reader needs.
#[derive(Clone, Debug)]
pub struct LayerExperts {
    /// Layer of the model.
    pub layer: usize,
    /// Record of every expert.
    pub layout: RecordLayout,
    /// Checksums of the two parts of every expert.
    pub checksums: Vec<[u64; 2]>,
    /// The layer file.
    pub path: PathBuf,
}

impl LayerExperts {
    /// Number of experts.
    pub fn experts(&self) -> usize {
        self.checksums.len()
    }

    /// Position of a part (0 gate|up, 1 down) of an expert in the file. Both parts of a record are adjacent.
    pub fn offset(&self, expert: usize, part: usize) -> u64 {
        expert as u64 * self.layout.stride() as u64 + if part == 0 { 0 } else { self.layout.part_bytes[0] as u64 }
    }

    /// Compares a part as read with its checksum.
    ///
    /// # Errors
    /// [`FormatError::Checksum`], naming layer, expert and part.
    pub fn check(&self, expert: usize, part: usize, bytes: &[u8]) -> Result<(), FormatError> {
        let (expected, got) = (self.checksums[expert][part], checksum(bytes));
        if expected == got {
            return Ok(());
        }
        Err(FormatError::Checksum { path: self.path.clone(), layer: self.layer, expert, part: PART_NAMES[part], expected, got })
    }
}

/// `manifest.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Always `mach-expert-sidecar`.
    pub format: String,
    /// [`SIDECAR_VERSION`].
    pub version: u32,
    /// Fingerprint of the checkpoint that the sidecar serves.
    pub fingerprint: Fingerprint,
    /// Fingerprint of the checkpoint that the experts were taken from: another one in a pack.
    pub source: Fingerprint,
    /// Family.
    pub model_type: String,
    /// Experts per layer.
    pub experts: usize,
    /// MoE layers, ascending.
    pub layers: Vec<LayerEntry>,
}

/// One layer of the manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerEntry {
    /// Layer of the model.
    pub layer: usize,
    /// File name inside the sidecar.
    pub file: String,
    /// Length of the file.
    pub bytes: u64,
    /// XXH3-64 of its index of checksums, in hex.
    pub index_xxh3: String,
    /// Layout of gate (and of up).
    pub gate_up: PackedLayout,
    /// Layout of down.
    pub down: PackedLayout,
    /// Bytes of the padded parts.
    pub part_bytes: [usize; 2],
}

impl Manifest {
    fn path(dir: &Path) -> PathBuf {
        dir.join(MANIFEST)
    }

    /// Bytes of all layer files.
    pub fn bytes(&self) -> u64 {
        self.layers.iter().map(|l| l.bytes).sum()
    }
}

/// Length of a layer file.
fn file_bytes(layout: &RecordLayout, experts: usize) -> u64 {
    experts as u64 * (layout.stride() as u64 + 16) + TRAILER as u64
}

/// The end of a layer file. `key` binds it to its source, layer and layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Trailer {
    layer: u32,
    experts: u32,
    part_bytes: [u64; 2],
    index_hash: u64,
    key: [u8; 32],
}

impl Trailer {
    fn to_bytes(self) -> [u8; TRAILER] {
        let mut out = [0; TRAILER];
        let mut at = 0;
        let mut put = |bytes: &[u8]| {
            out[at..at + bytes.len()].copy_from_slice(bytes);
            at += bytes.len();
        };
        put(MAGIC);
        put(&SIDECAR_VERSION.to_le_bytes());
        put(&self.layer.to_le_bytes());
        put(&self.experts.to_le_bytes());
        put(&[0; 4]);
        put(&self.part_bytes[0].to_le_bytes());
        put(&self.part_bytes[1].to_le_bytes());
        put(&self.index_hash.to_le_bytes());
        put(&self.key);
        let hash = checksum(&out[..TRAILER - 8]);
        out[TRAILER - 8..].copy_from_slice(&hash.to_le_bytes());
        out
    }

    /// `None` when magic or hash are wrong; the version comes apart, because other versions may differ elsewhere.
    fn parse(bytes: &[u8; TRAILER]) -> Option<(u32, Self)> {
        let hash = u64::from_le_bytes(*bytes.last_chunk()?);
        if bytes.first_chunk() != Some(MAGIC) || checksum(&bytes[..TRAILER - 8]) != hash {
            return None;
        }
        let u32_at = |at: usize| bytes[at..].first_chunk().copied().map(u32::from_le_bytes);
        let u64_at = |at: usize| bytes[at..].first_chunk().copied().map(u64::from_le_bytes);
        let trailer = Self {
            layer: u32_at(12)?,
            experts: u32_at(16)?,
            part_bytes: [u64_at(24)?, u64_at(32)?],
            index_hash: u64_at(40)?,
            key: *bytes[48..].first_chunk()?,
        };
        Some((u32_at(8)?, trailer))
    }
}

/// What a layer file was made of: a file with this key need not be written again.
fn layer_key(source: &Fingerprint, layer: usize, experts: usize, layout: &RecordLayout) -> [u8; 32] {
    let text = format!("{SIDECAR_VERSION} {source} {layer} {experts} {:?} {:?}", layout.gate_up.half, layout.down);
    *blake3::hash(text.as_bytes()).as_bytes()
}

/// File name of a layer. It carries part of the key, so that building anew never touches the files in use.
fn layer_file(layer: usize, key: &[u8; 32]) -> String {
    format!("layer-{layer:03}-{:02x}{:02x}{:02x}{:02x}.experts", key[0], key[1], key[2], key[3])
}
