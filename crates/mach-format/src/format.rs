//! Element formats of weights.

use serde::{Deserialize, Serialize};

/// Type of the per-group scales and biases of an affine format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScaleType {
    /// IEEE half.
    F16,
    /// bfloat16.
    BF16,
    /// Single.
    F32,
}

impl ScaleType {
    /// Bytes of one scale.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F16 | Self::BF16 => 2,
            Self::F32 => 4,
        }
    }
}

/// Block formats of GGUF files that have a packed form of their own. Names and values are those of ggml.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BlockFormat {
    /// 32 columns: `d·q`, `q` signed 8 bits.
    #[serde(rename = "q8_0")]
    Q8_0,
    /// 256 columns in 8 groups: `(d·scale)·q − dmin·min`, `q` 4 bits, scales and minima 6 bits.
    #[serde(rename = "q4_k")]
    Q4K,
    /// 256 columns in 16 groups: `(d·scale)·q`, `q` 6 bits from −32, scales signed 8 bits.
    #[serde(rename = "q6_k")]
    Q6K,
}

impl BlockFormat {
    /// Columns of one block of one row.
    pub const fn columns(self) -> usize {
        match self {
            Self::Q8_0 => 32,
            Self::Q4K | Self::Q6K => 256,
        }
    }

    /// Columns that share a scale.
    pub const fn group(self) -> usize {
        match self {
            Self::Q8_0 | Self::Q4K => 32,
            Self::Q6K => 16,
        }
    }

    /// Bytes of one block of one row in a GGUF file.
    pub const fn source_bytes(self) -> usize {
        match self {
            Self::Q8_0 => 34,
            Self::Q4K => 144,
            Self::Q6K => 210,
        }
    }

    /// Bits of a stored number.
    pub const fn bits(self) -> u8 {
        match self {
            Self::Q8_0 => 8,
            Self::Q4K => 4,
            Self::Q6K => 6,
        }
    }

    /// ggml's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Q8_0 => "q8_0",
            Self::Q4K => "q4_K",
            Self::Q6K => "q6_K",
        }
    }
}

/// How the elements of a weight matrix are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WeightFormat {
    /// Single.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    BF16,
    /// MLX's affine groups along the input: `x = scale·q + bias`, `q` unsigned.
    Affine {
        /// 4 or 8.
        bits: u8,
        /// 32, 64 or 128 columns.
        group: u16,
        /// Type of scales and biases.
        scales: ScaleType,
    },
    /// Blocks of a GGUF file.
    Block(BlockFormat),
}

impl WeightFormat {
    /// Whether products use int8 activations on backends that quantise them.
    pub const fn is_quantised(self) -> bool {
        matches!(self, Self::Affine { .. } | Self::Block(_))
    }
}

impl std::fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::F32 => f.write_str("f32"),
            Self::F16 => f.write_str("f16"),
            Self::BF16 => f.write_str("bf16"),
            Self::Block(block) => f.write_str(block.name()),
            Self::Affine { bits, group, .. } => write!(f, "affine {bits}-bit g{group}"),
        }
    }
}
