//! GGUF, the container of ggml: metadata, a table of tensors, and their data, in one file or in numbered parts.

mod read;
mod types;
mod value;
mod write;

pub use read::Gguf;
pub use types::GgmlType;
pub use value::{MetaList, MetaValue, Metadata};
pub use write::{GgufTensor, GgufWriter};

const MAGIC: &[u8; 4] = b"GGUF";
/// Alignment of tensors where the file does not say.
const ALIGNMENT: u64 = 32;
const ALIGNMENT_KEY: &str = "general.alignment";

/// Numbers of the value types.
mod tag {
    pub(super) const U8: u32 = 0;
    pub(super) const I8: u32 = 1;
    pub(super) const U16: u32 = 2;
    pub(super) const I16: u32 = 3;
    pub(super) const U32: u32 = 4;
    pub(super) const I32: u32 = 5;
    pub(super) const F32: u32 = 6;
    pub(super) const BOOL: u32 = 7;
    pub(super) const TEXT: u32 = 8;
    pub(super) const LIST: u32 = 9;
    pub(super) const U64: u32 = 10;
    pub(super) const I64: u32 = 11;
    pub(super) const F64: u32 = 12;
}
