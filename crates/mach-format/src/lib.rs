//! Bytes on disk: configuration, safetensors, GGUF, quantised blocks, the packed layout, the expert sidecar.

pub mod artifact;
mod bytes;
pub mod checkpoint;
mod direct;
mod disk;
mod element;
pub mod error;
pub mod fingerprint;
pub mod format;
pub mod gguf;
pub mod matrix;
pub mod outline;
pub mod pack;
pub mod packed;
pub mod quant;
mod safetensors_parts;
mod safetensors_writer;
pub mod sidecar;
mod source;
mod tile;

pub use artifact::{BuildProgress, BuildReport, ExpertSource, LayerPlan, PackPlan, write_sidecar};
pub use checkpoint::{Checkpoint, Dtype, ElementType, TensorInfo};
pub use direct::{DirectFile, READ_ALIGN, ReadMode};
pub use disk::{forget_pages, free_space};
pub use error::FormatError;
pub use fingerprint::{Fingerprint, checksum, fingerprint};
pub use format::{BlockFormat, Codes, E2M1, IQ4, ScaleType, WeightFormat};
pub use matrix::{Matrix, RowPick, pack_f32, pack_gate_up, pack_gate_up_into};
pub use outline::{ShardAt, data_start, shape_tensors};
pub use pack::{PackJob, PackWriter, Piece, write_pack};
pub use packed::{AlignedBytes, GateUpLayout, PackedLayout, PackedMatrix, TILE_ROWS, UNIT};
pub use safetensors_writer::{Planned, SafetensorsWriter};
pub use sidecar::{LayerExperts, RecordLayout, SIDECAR_DIR, Sidecar, SidecarWriter};
