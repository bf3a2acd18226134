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
    /// 32 columns: `d·q`, `q` 4 bits from −8.
    #[serde(rename = "q4_0")]
    Q4_0,
    /// 32 columns: `d·q + m`, `q` 4 bits.
    #[serde(rename = "q4_1")]
    Q4_1,
    /// 32 columns: `d·q`, `q` 5 bits from −16.
    #[serde(rename = "q5_0")]
    Q5_0,
    /// 32 columns: `d·q + m`, `q` 5 bits.
    #[serde(rename = "q5_1")]
    Q5_1,
    /// 256 columns in 16 groups: `(d·scale)·q − dmin·min`, `q` 2 bits, scales and minima 4.
    #[serde(rename = "q2_k")]
    Q2K,
    /// 256 columns in 16 groups: `(d·scale)·q`, `q` 3 bits from −4, scales 6 from −32.
    #[serde(rename = "q3_k")]
    Q3K,
    /// As `Q4K`, `q` 5 bits.
    #[serde(rename = "q5_k")]
    Q5K,
    /// 256 columns in 8 groups: `d·(2·scale + 1)/8` times points of a grid of 256 in 8 dimensions, signs apart.
    #[serde(rename = "iq2_xxs")]
    Iq2Xxs,
    /// As `Iq2Xxs` in 16 groups, with a grid of 512.
    #[serde(rename = "iq2_xs")]
    Iq2Xs,
    /// As `Iq2Xs` with a grid of 1024 and signs of their own for each number.
    #[serde(rename = "iq2_s")]
    Iq2S,
    /// 256 columns in 8 groups: `d·(2·scale + 1)/4` times points of a grid of 256 in 4 dimensions, signs apart.
    #[serde(rename = "iq3_xxs")]
    Iq3Xxs,
    /// As `Iq3Xxs`, `d·(2·scale + 1)`, with a grid of 512 and signs of their own for each number.
    #[serde(rename = "iq3_s")]
    Iq3S,
    /// 256 columns in 8 groups: `d·(2·scale + 1)` times points of a grid of −1, 0 and 1, shifted by an eighth.
    #[serde(rename = "iq1_s")]
    Iq1S,
    /// As `Iq1S` in 16 groups, shifts by 8 columns.
    #[serde(rename = "iq1_m")]
    Iq1M,
    /// 32 columns: `d` times numbers of a table of 16.
    #[serde(rename = "iq4_nl")]
    Iq4Nl,
    /// 256 columns in 8 groups: `(d·scale)` times numbers of the same table, scales 6 bits from −32.
    #[serde(rename = "iq4_xs")]
    Iq4Xs,
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
    /// 4 bits, the index of a number in [`IQ4`].
    Iq4,
    /// Indices and signs of the type's grid as ggml has them, words and bytes of 16 rows together.
    Iq2Xxs,
    /// The same.
    Iq2Xs,
    /// The same.
    Iq2S,
    /// The same.
    Iq3Xxs,
    /// The same.
    Iq3S,
    /// The same.
    Iq1S,
    /// The same.
    Iq1M,
}

impl Codes {
    /// Whether the numbers, taken apart and counted from what stands for zero, are all below 64.
    #[inline]
    pub const fn fit_in_six_bits(self) -> bool {
        matches!(self, Self::Bits(2..=6) | Self::E2m1 | Self::Iq3S | Self::Iq1S | Self::Iq1M)
    }

    /// Bytes of 32 columns of 16 rows.
    pub const fn unit_bytes(self) -> usize {
        match self {
            Self::Bits(bits) => bits as usize * 64,
            Self::E2m1 | Self::Iq4 => 4 * 64,
            // Lines of words, then bytes of each row: upper bits of indices, scales.
            Self::Iq2Xxs => 2 * 64,
            Self::Iq2Xs => 2 * 64 + 16,
            Self::Iq2S => 2 * 64 + 2 * 16,
            Self::Iq3Xxs => 3 * 64,
            Self::Iq3S => 3 * 64 + 16,
            Self::Iq1S => 64 + 2 * 16,
            Self::Iq1M => 64 + 3 * 16,
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
            Self::Q4_0 => facts("q4_0", [32, 32, 18], Codes::Bits(4), 8, [0, 1]),
            Self::Q4_1 => facts("q4_1", [32, 32, 20], Codes::Bits(4), 0, [0, 2]),
            Self::Q5_0 => facts("q5_0", [32, 32, 22], Codes::Bits(5), 16, [0, 1]),
            Self::Q5_1 => facts("q5_1", [32, 32, 24], Codes::Bits(5), 0, [0, 2]),
            Self::Q2K => facts("q2_K", [256, 16, 84], Codes::Bits(2), 0, [16, 2]),
            Self::Q3K => facts("q3_K", [256, 16, 110], Codes::Bits(3), 4, [16, 1]),
            Self::Q5K => facts("q5_K", [256, 32, 176], Codes::Bits(5), 0, [16, 2]),
            Self::Iq2Xxs => facts("iq2_xxs", [256, 32, 66], Codes::Iq2Xxs, 64, [0, 1]),
            Self::Iq2Xs => facts("iq2_xs", [256, 16, 74], Codes::Iq2Xs, 64, [0, 1]),
            Self::Iq2S => facts("iq2_s", [256, 16, 82], Codes::Iq2S, 64, [0, 1]),
            Self::Iq3Xxs => facts("iq3_xxs", [256, 32, 98], Codes::Iq3Xxs, 64, [0, 1]),
            Self::Iq3S => facts("iq3_s", [256, 32, 110], Codes::Iq3S, 16, [4, 1]),
            Self::Iq1S => facts("iq1_s", [256, 32, 50], Codes::Iq1S, 16, [0, 1]),
            Self::Iq1M => facts("iq1_m", [256, 16, 56], Codes::Iq1M, 16, [0, 1]),
            Self::Iq4Nl => facts("iq4_nl", [32, 32, 18], Codes::Iq4, 128, [0, 1]),
            Self::Iq4Xs => facts("iq4_xs", [256, 32, 136], Codes::Iq4, 128, [8, 1]),
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

    /// The numbers of blocks as they lie in a GGUF file.
    ///
    /// # Panics
    /// NVFP4, whose scales are relative to one of the tensor, or an `out` that has not [`columns`](Self::columns) values for every
    /// [`source_bytes`](Self::source_bytes) bytes.
    pub fn dequantise(self, blocks: &[u8], out: &mut [f32]) {
        assert_ne!(self, Self::Nvfp4, "a scale of the tensor is missing");
        assert_eq!(blocks.len() / self.source_bytes() * self.columns(), out.len(), "{} blocks", self.name());
        crate::quant::dequantise_row(self, blocks, &[], out);
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

/// The numbers of IQ4 types, 128 standing for zero.
pub const IQ4: [u8; 16] = [1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241];

/// The numbers of a 4-bit float with two exponent bits and one of mantissa, doubled, 16 standing for zero.
pub const E2M1: [u8; 16] = [16, 17, 18, 19, 20, 22, 24, 28, 16, 15, 14, 13, 12, 10, 8, 4];
