//! What can go wrong between disk and slot.

use std::path::PathBuf;

/// Errors of expert streaming.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExpertError {
    /// The drive or the file refused.
    #[error("cannot read expert {expert} of layer {layer} from {path}: {source}; check the drive and the file, then try again")]
    Read {
        /// Model layer.
        layer: usize,
        /// Expert id.
        expert: usize,
        /// File.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// The bytes are not those that were written.
    #[error("expert {expert} of layer {layer} ({part}) in {path} has a wrong checksum: the file is damaged; run `mach artifacts verify`, then build it again")]
    Checksum {
        /// Model layer.
        layer: usize,
        /// Expert id.
        expert: usize,
        /// `gate|up` or `down`.
        part: &'static str,
        /// File.
        path: PathBuf,
    },
    /// A checkpoint tensor could not be packed.
    #[error(transparent)]
    Format(#[from] mach_format::FormatError),
    /// The bank could not be had.
    #[error("cannot reserve a bank of {slots} experts ({bytes} bytes): {source}; give a smaller --bank or --memory-budget")]
    Memory {
        /// Slots asked for.
        slots: usize,
        /// Bytes asked for.
        bytes: u64,
        /// Cause.
        source: std::io::Error,
    },
    /// Too few slots.
    #[error("a bank of {slots} experts is below the floor of {floor} (top-{top_k} of two layers): give a larger --bank or --memory-budget")]
    BelowFloor {
        /// Slots asked for.
        slots: usize,
        /// Least possible.
        floor: usize,
        /// Experts per token.
        top_k: usize,
    },
    /// The caller lost interest.
    #[error("cancelled")]
    Cancelled,
    /// A reader thread died.
    #[error("the reader threads are gone; restart mach")]
    ReadersGone,
}

impl ExpertError {
    /// Stable kebab-case code.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Read { .. } => "expert-read",
            Self::Checksum { .. } => "expert-checksum",
            Self::Format(e) => e.code(),
            Self::Memory { .. } => "bank-memory",
            Self::BelowFloor { .. } => "bank-below-floor",
            Self::Cancelled => "cancelled",
            Self::ReadersGone => "readers-gone",
        }
    }
}
