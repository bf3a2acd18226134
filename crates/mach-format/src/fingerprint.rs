//! Identity of a checkpoint: what a sidecar was built from.

use std::fmt;
use std::fs;
use std::str::FromStr;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::checkpoint::Checkpoint;
use crate::error::FormatError;

/// Bytes of one tensor that are looked at, and the least of them in checkpoints of many tensors.
const SAMPLE: u64 = 64 << 10;
const MIN_SAMPLE: u64 = 4 << 10;
/// Bytes of all samples together.
const BUDGET: u64 = 64 << 20;

/// BLAKE3 of a checkpoint's configuration, tensor table and samples of its tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Fingerprint(pub [u8; 32]);

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl From<Fingerprint> for String {
    fn from(f: Fingerprint) -> Self {
        f.to_string()
    }
}

impl FromStr for Fingerprint {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let hash = blake3::Hash::from_hex(s).map_err(|e| format!("not a fingerprint: {e}"))?;
        Ok(Self(*hash.as_bytes()))
    }
}

impl TryFrom<String> for Fingerprint {
    type Error = String;
    fn try_from(s: String) -> Result<Self, Self::Error> {
        s.parse()
    }
}

impl Fingerprint {
    /// Of a checkpoint that is known by its configuration and by names and hashes of its weight files, which stand for all that
    /// [`fingerprint`] looks at.
    pub fn of_hashes<'a>(config: &[u8], files: impl Iterator<Item = (&'a str, &'a str)>) -> Self {
        let mut hasher = blake3::Hasher::new();
        let mut field = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        field(config);
        for (name, hash) in files {
            field(name.as_bytes());
            field(hash.as_bytes());
        }
        Self(*hasher.finalize().as_bytes())
    }
}

/// The fingerprint of a checkpoint: equal for copies in other places, different when the configuration, a name, a
/// type, a shape or a sampled byte differs. Reads at most about 64 MiB.
///
/// # Errors
/// A read error.
pub fn fingerprint(ck: &Checkpoint) -> Result<Fingerprint, FormatError> {
    let path = ck.dir().join("config.json");
    let config = if ck.is_gguf() { ck.config().to_string().into_bytes() } else { fs::read(&path).map_err(FormatError::io("read", &path))? };
    let mut hasher = blake3::Hasher::new();
    let mut field = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    field(&config);
    let mut tensors: Vec<_> = ck.tensors().collect();
    tensors.sort_unstable_by_key(|(name, _)| *name);
    let sample = (BUDGET / tensors.len().max(1) as u64).clamp(MIN_SAMPLE, SAMPLE) / MIN_SAMPLE * MIN_SAMPLE;
    let samples: Vec<Vec<u8>> = tensors
        .par_iter()
        .map(|(_, info)| {
            let mut bytes = vec![0; info.bytes.min(sample) as usize];
            // Pieces spread over the tensor, so that every part of a stack of experts is represented.
            let piece = if info.bytes <= sample { bytes.len() } else { (sample / 4).max(MIN_SAMPLE) as usize };
            let pieces = bytes.len().div_ceil(piece.max(1)) as u64;
            for (i, out) in bytes.chunks_mut(piece.max(1)).enumerate() {
                let last = info.bytes - out.len() as u64;
                let at = if pieces > 1 { last / (pieces - 1) * i as u64 } else { last / 2 };
                ck.files.read(info.file, info.offset + at, out)?;
            }
            Ok(bytes)
        })
        .collect::<Result<_, FormatError>>()?;
    for ((name, info), sample) in tensors.iter().zip(&samples) {
        field(name.as_bytes());
        field(format!("{:?} {:?}", info.dtype, info.shape).as_bytes());
        field(sample);
    }
    Ok(Fingerprint(*hasher.finalize().as_bytes()))
}

/// XXH3-64, the checksum of records.
pub fn checksum(bytes: &[u8]) -> u64 {
    xxhash_rust::xxh3::xxh3_64(bytes)
}
