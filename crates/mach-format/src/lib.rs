//! Bytes on disk: configuration, safetensors, quantised blocks, the packed layout, the expert sidecar.

pub mod format;
pub mod packed;

pub use format::{ScaleType, WeightFormat};
pub use packed::{AlignedBytes, GateUpLayout, PackedLayout, PackedMatrix, TILE_ROWS};
