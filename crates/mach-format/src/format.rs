//! Element formats of weights.

use serde::{Deserialize, Serialize};

/// Type of the per-group scales (and biases) of a format.
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

/// Block formats: those of ggml under its names, and the microscaling ones, which checkpoints of several kinds hold.
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
    /// 32 columns: `2^(e − 127)` times E2M1 numbers. GGUF's MXFP4, gpt-oss's blocks and scales, DeepSeek's FP4, MLX's mxfp4.
    #[serde(rename = "mxfp4")]
    Mxfp4,
    /// 32 columns in 2 groups: E4M3 scales times an f32 of the tensor, times E2M1 numbers.
    #[serde(rename = "nvfp4")]
    Nvfp4,
}

/// How the lines of a packed tile hold the numbers of 32 columns; see [`packed`](crate::packed).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codes {
    /// Unsigned integers of so many bits: 2, 3, 4, 5, 6 or 8.
    Bits(u8),
    /// 4 bits, the index of a number in [`E2M1`].
    E2m1,
}

impl Codes {
    /// Bytes of 32 columns of 16 rows.
    pub const fn unit_bytes(self) -> usize {
        match self {
            Self::Bits(bits) => bits as usize * 64,
            Self::E2m1 => 4 * 64,
        }
    }
}

/// What is fixed about a block format.
struct Facts {
    name: &'static str,
    columns: usize,
    group: usize,
    source_bytes: usize,
    codes: Codes,
    offset: u8,
    small: usize,
    halves: usize,
}

impl BlockFormat {
    const fn facts(self) -> Facts {
        // Name, columns of a block and of a group, bytes in a file; numbers, what stands for zero, bytes and halves of parameters.
        const fn facts(name: &'static str, [columns, group, source_bytes]: [usize; 3], codes: Codes, offset: u8, [small, halves]: [usize; 2]) -> Facts {
            Facts { name, columns, group, source_bytes, codes, offset, small, halves }
        }
        match self {
            Self::Q8_0 => facts("q8_0", [32, 32, 34], Codes::Bits(8), 128, [0, 1]),
            Self::Q4K => facts("q4_K", [256, 32, 144], Codes::Bits(4), 0, [16, 2]),
            Self::Q6K => facts("q6_K", [256, 16, 210], Codes::Bits(6), 32, [16, 1]),
            Self::Mxfp4 => facts("mxfp4", [32, 32, 17], Codes::E2m1, 16, [1, 0]),
            Self::Nvfp4 => facts("nvfp4", [32, 16, 18], Codes::E2m1, 16, [2, 0]),
        }
    }

    /// Columns of one block of one row.
    pub const fn columns(self) -> usize {
        self.facts().columns
    }

    /// Columns that share a scale.
    pub const fn group(self) -> usize {
        self.facts().group
    }

    /// Bytes of one block of one row where blocks lie one after another, as in a GGUF file.
    pub const fn source_bytes(self) -> usize {
        self.facts().source_bytes
    }

    /// How a packed tile holds the numbers.
    pub const fn codes(self) -> Codes {
        self.facts().codes
    }

    /// The number that stands for zero, where a group has no minimum.
    pub const fn offset(self) -> u8 {
        self.facts().offset
    }

    /// Bytes and halves of each row that follow the lines of a packed block.
    pub const fn params(self) -> [usize; 2] {
        let facts = self.facts();
        [facts.small, facts.halves]
    }

    /// ggml's name.
    pub const fn name(self) -> &'static str {
        self.facts().name
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
        /// 2, 3, 4, 5, 6 or 8.
        bits: u8,
        /// 32, 64 or 128 columns.
        group: u16,
        /// Type of scales and biases.
        scales: ScaleType,
    },
    /// Blocks.
    Block(BlockFormat),
    /// 8-bit floats (E4M3), each group of columns of a row with a scale. Products take f32 activations.
    Fp8 {
        /// 32, 64 or 128 columns.
        group: u16,
        /// Type of the scales.
        scales: ScaleType,
    },
}

impl WeightFormat {
    /// Whether every element is a number of its own, without a scale.
    pub const fn is_plain(self) -> bool {
        matches!(self, Self::F32 | Self::F16 | Self::BF16)
    }

    /// Whether products use integer activations on backends that quantise them.
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
            Self::Fp8 { group, .. } => write!(f, "fp8 g{group}"),
        }
    }
}

/// The numbers of a 4-bit float with two exponent bits and one of mantissa, doubled, 16 standing for zero.
pub const E2M1: [u8; 16] = [16, 17, 18, 19, 20, 22, 24, 28, 16, 15, 14, 13, 12, 10, 8, 4];
