//! Element types of GGUF files.

use safetensors::Dtype;

use crate::format::{BlockFormat, WeightFormat};
use crate::quant;

/// An element type of ggml: how many values a block has and how many bytes it takes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct GgmlType {
    /// Number in files.
    pub id: u32,
    /// ggml's name.
    pub name: &'static str,
    /// Values of a block; 1 for plain types.
    pub values: u64,
    /// Bytes of a block.
    pub bytes: u64,
}

impl std::fmt::Debug for GgmlType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

const fn ty(id: u32, name: &'static str, values: u64, bytes: u64) -> GgmlType {
    GgmlType { id, name, values, bytes }
}

/// Every type that ggml writes, also those that cannot be computed with yet: their tensors are named in errors.
static TYPES: [GgmlType; 33] = [
    ty(0, "F32", 1, 4),
    ty(1, "F16", 1, 2),
    ty(2, "Q4_0", 32, 18),
    ty(3, "Q4_1", 32, 20),
    ty(6, "Q5_0", 32, 22),
    ty(7, "Q5_1", 32, 24),
    ty(8, "Q8_0", 32, 34),
    ty(9, "Q8_1", 32, 36),
    ty(10, "Q2_K", 256, 84),
    ty(11, "Q3_K", 256, 110),
    ty(12, "Q4_K", 256, 144),
    ty(13, "Q5_K", 256, 176),
    ty(14, "Q6_K", 256, 210),
    ty(15, "Q8_K", 256, 292),
    ty(16, "IQ2_XXS", 256, 66),
    ty(17, "IQ2_XS", 256, 74),
    ty(18, "IQ3_XXS", 256, 98),
    ty(19, "IQ1_S", 256, 50),
    ty(20, "IQ4_NL", 32, 18),
    ty(21, "IQ3_S", 256, 110),
    ty(22, "IQ2_S", 256, 82),
    ty(23, "IQ4_XS", 256, 136),
    ty(24, "I8", 1, 1),
    ty(25, "I16", 1, 2),
    ty(26, "I32", 1, 4),
    ty(27, "I64", 1, 8),
    ty(28, "F64", 1, 8),
    ty(29, "IQ1_M", 256, 56),
    ty(30, "BF16", 1, 2),
    ty(34, "TQ1_0", 256, 54),
    ty(35, "TQ2_0", 256, 66),
    ty(39, "MXFP4", 32, 17),
    ty(40, "NVFP4", 64, 36),
];

impl GgmlType {
    /// The type with this number.
    pub fn of(id: u32) -> Option<Self> {
        TYPES.iter().copied().find(|t| t.id == id)
    }

    /// The type that stores a weight format; `None` for those that ggml has not.
    pub fn of_format(format: WeightFormat) -> Option<Self> {
        Self::of(match format {
            WeightFormat::F32 => 0,
            WeightFormat::F16 => 1,
            WeightFormat::BF16 => 30,
            WeightFormat::Block(block) => quant::ggml_type(block)?,
            WeightFormat::Affine { .. } | WeightFormat::Fp8 { .. } => return None,
        })
    }

    /// Its blocks, if they can be computed with.
    pub fn block(self) -> Option<BlockFormat> {
        quant::block_format(self.id)
    }

    /// The same type in safetensors, for plain types.
    pub fn plain(self) -> Option<Dtype> {
        Some(match self.id {
            0 => Dtype::F32,
            1 => Dtype::F16,
            24 => Dtype::I8,
            25 => Dtype::I16,
            26 => Dtype::I32,
            27 => Dtype::I64,
            28 => Dtype::F64,
            30 => Dtype::BF16,
            _ => return None,
        })
    }
}
