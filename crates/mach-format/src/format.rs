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
}

impl WeightFormat {
    /// Whether products use int8 activations on backends that quantise them.
    pub const fn is_quantised(self) -> bool {
        matches!(self, Self::Affine { .. })
    }
}

impl std::fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::F32 => f.write_str("f32"),
            Self::F16 => f.write_str("f16"),
            Self::BF16 => f.write_str("bf16"),
            Self::Affine { bits, group, .. } => write!(f, "affine {bits}-bit g{group}"),
        }
    }
}
