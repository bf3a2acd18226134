//! The one packed weight layout that every kernel set reads.
//!
//! A matrix `[rows, cols]` is stored as tiles of [`TILE_ROWS`] output rows. Inside a tile the rows are
//! interleaved in 4-byte groups along `cols` (the input dimension K), so that one 64-byte line holds the same
//! K positions of all 16 rows:
//!
//! | format | a 64-byte line | then |
//! |---|---|---|
//! | `F32` | 16 rows × 1 value | – |
//! | `F16`, `BF16` | 16 rows × 2 values `k, k+1` | – |
//! | affine 8 bit | 16 rows × 4 bytes `k..k+4` | per group: 16 scales, 16 biases |
//! | affine 4 bit | 16 rows × 4 bytes; byte `j` has `k+j` in its low, `k+4+j` in its high nibble | per group: 16 scales, 16 biases |
//! | `Q8_0` | as affine 8 bit, of `q + 128` | per 32 columns: 16 × `d` |
//! | `Q4_K` | as affine 4 bit | per 256 columns: 8 × 16 scales, 8 × 16 minima (bytes), 16 × `d`, 16 × `dmin` |
//! | `Q6_K` | per 16 columns two lines of low nibbles, then one of the bits above: byte `j` has those of `k+j`, `k+4+j`, `k+8+j`, `k+12+j` from its lowest bits up; of `q + 32` | per 256 columns: 16 × 16 scales (bytes), 16 × `d` |
//!
//! A tile of a quantised format is a sequence of *blocks* in K order: the lines of their columns, then what is "then", so
//! a kernel reads one memory stream. Rows beyond `rows` and columns beyond `cols` are zero.

use memmap2::MmapMut;
use serde::{Deserialize, Serialize};

use crate::format::{BlockFormat, ScaleType, WeightFormat};

/// Output rows of one tile.
pub const TILE_ROWS: usize = 16;

/// Shape and format of a packed matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PackedLayout {
    /// Output rows (logical, not padded).
    pub rows: usize,
    /// Input columns (K). A multiple of the group for affine formats.
    pub cols: usize,
    /// Element format.
    pub format: WeightFormat,
}

impl PackedLayout {
    /// A layout for `[rows, cols]` in `format`.
    pub const fn new(rows: usize, cols: usize, format: WeightFormat) -> Self {
        Self { rows, cols, format }
    }

    /// Whether the format is one that exists and its group divides the columns: for layouts read from files.
    pub const fn is_well_formed(&self) -> bool {
        match self.format {
            WeightFormat::Affine { bits, group, .. } => matches!(bits, 4 | 8) && matches!(group, 32 | 64 | 128) && self.cols.is_multiple_of(group as usize),
            WeightFormat::Block(block) => self.cols.is_multiple_of(block.columns()),
            _ => true,
        }
    }

    /// Tiles of 16 rows.
    pub const fn tiles(&self) -> usize {
        self.rows.div_ceil(TILE_ROWS)
    }

    /// Bytes of one tile.
    pub const fn tile_bytes(&self) -> usize {
        match self.format {
            WeightFormat::F32 => self.cols * TILE_ROWS * 4,
            WeightFormat::F16 | WeightFormat::BF16 => self.cols.div_ceil(2) * TILE_ROWS * 4,
            WeightFormat::Affine { .. } | WeightFormat::Block(_) => self.cols / self.block_columns() * self.block_bytes(),
        }
    }

    /// Columns of one block of a tile; 1 for plain formats.
    pub const fn block_columns(&self) -> usize {
        match self.format {
            WeightFormat::Affine { group, .. } => group as usize,
            WeightFormat::Block(block) => block.columns(),
            _ => 1,
        }
    }

    /// Bytes of the lines of one block of a tile: what comes before its scales; 0 for plain formats.
    pub const fn line_bytes(&self) -> usize {
        let bits = match self.format {
            WeightFormat::Affine { bits, .. } => bits,
            WeightFormat::Block(block) => block.bits(),
            _ => 0,
        };
        self.block_columns() * TILE_ROWS * bits as usize / 8
    }

    /// Bytes of one block of a tile (lines, then scales and the like); 0 for plain formats.
    pub const fn block_bytes(&self) -> usize {
        let scales = match self.format {
            WeightFormat::Affine { scales, .. } => 2 * scales.bytes(),
            WeightFormat::Block(BlockFormat::Q8_0) => 2,
            WeightFormat::Block(BlockFormat::Q4K) => 8 + 8 + 2 + 2,
            WeightFormat::Block(BlockFormat::Q6K) => 16 + 2,
            _ => 0,
        };
        self.line_bytes() + TILE_ROWS * scales
    }

    /// Bytes of the whole matrix.
    pub const fn bytes(&self) -> usize {
        self.tiles() * self.tile_bytes()
    }

    /// Reads element `(row, col)` out of one tile: the definition of the layout, for tests and the reference
    /// backend. `tile` has `tile_bytes()` bytes, `row` is 0..16 within the tile.
    pub fn element(&self, tile: &[u8], row: usize, col: usize) -> f32 {
        match self.format {
            WeightFormat::F32 => {
                let at = (col * TILE_ROWS + row) * 4;
                f32::from_le_bytes([tile[at], tile[at + 1], tile[at + 2], tile[at + 3]])
            }
            WeightFormat::F16 | WeightFormat::BF16 => {
                let at = (col / 2 * TILE_ROWS + row) * 4 + col % 2 * 2;
                let bits = u16::from_le_bytes([tile[at], tile[at + 1]]);
                if self.format == WeightFormat::F16 { half::f16::from_bits(bits).to_f32() } else { half::bf16::from_bits(bits).to_f32() }
            }
            WeightFormat::Affine { .. } | WeightFormat::Block(_) => {
                let columns = self.block_columns();
                let (lines, params) = tile[col / columns * self.block_bytes()..][..self.block_bytes()].split_at(self.line_bytes());
                let q = f32::from(self.code(lines, row, col % columns));
                let (scale, bias) = self.scale(params, row, col % columns);
                scale.mul_add(q, bias)
            }
        }
    }

    /// The stored (unsigned) number of column `within` of a block.
    fn code(&self, lines: &[u8], row: usize, within: usize) -> u8 {
        let byte = |line: usize| lines[(line * TILE_ROWS + row) * 4 + within % 4];
        let nibble = |byte: u8| if within % 8 < 4 { byte & 15 } else { byte >> 4 };
        match self.format {
            WeightFormat::Affine { bits: 8, .. } | WeightFormat::Block(BlockFormat::Q8_0) => byte(within / 4),
            WeightFormat::Block(BlockFormat::Q6K) => {
                let sixteen = within / 16 * 3;
                nibble(byte(sixteen + within % 16 / 8)) | (byte(sixteen + 2) >> (within % 16 / 4 * 2) & 3) << 4
            }
            _ => nibble(byte(within / 8)),
        }
    }

    /// Scale and bias of column `within` of a block: its value is `scale·code + bias`.
    fn scale(&self, params: &[u8], row: usize, within: usize) -> (f32, f32) {
        let half = |at: usize| read_scale(&params[at..], row, ScaleType::F16);
        match self.format {
            WeightFormat::Affine { scales, .. } => (read_scale(params, row, scales), read_scale(&params[TILE_ROWS * scales.bytes()..], row, scales)),
            WeightFormat::Block(BlockFormat::Q8_0) => (half(0), -128.0 * half(0)),
            WeightFormat::Block(BlockFormat::Q4K) => {
                let at = within / 32 * TILE_ROWS + row;
                (half(256) * f32::from(params[at]), -(half(256 + 32) * f32::from(params[128 + at])))
            }
            WeightFormat::Block(BlockFormat::Q6K) => {
                let scale = half(256) * f32::from(params[within / 16 * TILE_ROWS + row] as i8);
                (scale, -32.0 * scale)
            }
            _ => (1.0, 0.0),
        }
    }
}

fn read_scale(at: &[u8], row: usize, ty: ScaleType) -> f32 {
    match ty {
        ScaleType::F32 => {
            let b = &at[row * 4..row * 4 + 4];
            f32::from_le_bytes([b[0], b[1], b[2], b[3]])
        }
        ScaleType::F16 => half::f16::from_le_bytes([at[row * 2], at[row * 2 + 1]]).to_f32(),
        ScaleType::BF16 => half::bf16::from_le_bytes([at[row * 2], at[row * 2 + 1]]).to_f32(),
    }
}

/// Gate and up projections of one feed-forward block in one stream: tile `t` of gate, then tile `t` of up,
/// so that a kernel finishes 16 activations per pair of tiles. Both matrices are `[inner, hidden]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GateUpLayout {
    /// Layout of either half.
    pub half: PackedLayout,
}

impl GateUpLayout {
    /// Bytes of both halves.
    pub const fn bytes(&self) -> usize {
        2 * self.half.bytes()
    }
}

/// A packed matrix in memory, 64-byte aligned.
#[derive(Clone)]
pub struct PackedMatrix {
    /// Shape and format.
    pub layout: PackedLayout,
    /// `layout.bytes()` bytes (twice that for a gate|up pair).
    pub data: AlignedBytes,
}

/// Alignment of [`AlignedBytes`]: a cache line, a tile line, a vector register.
const ALIGN: usize = 64;
/// What processors translate at once where the system grants it: streams of weights run a tenth faster.
const HUGE_PAGE: usize = 2 << 20;

/// Bytes at 64-byte alignment, large ones in huge pages where the system grants them. Fresh ones are zero pages that
/// cost nothing until they are written, so large matrices are first touched by the threads that fill them.
#[derive(Default)]
pub struct AlignedBytes {
    memory: Memory,
    start: usize,
    len: usize,
}

enum Memory {
    Heap(Vec<u8>),
    /// Anonymous: no file behind it.
    Mapped(MmapMut),
}

impl Default for Memory {
    fn default() -> Self {
        Self::Heap(Vec::new())
    }
}

impl Memory {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Heap(bytes) => bytes,
            Self::Mapped(map) => map,
        }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Heap(bytes) => bytes,
            Self::Mapped(map) => map,
        }
    }
}

impl AlignedBytes {
    /// `len` zero bytes.
    pub fn zeroed(len: usize) -> Self {
        Self::huge(len).unwrap_or_else(|| {
            let bytes = vec![0; len + ALIGN - 1];
            let start = (bytes.as_ptr() as usize).wrapping_neg() % ALIGN;
            Self { memory: Memory::Heap(bytes), start, len }
        })
    }

    /// A mapping whose whole huge pages are asked for as such; `None` where there is none or the system refuses.
    fn huge(len: usize) -> Option<Self> {
        if len < HUGE_PAGE {
            return None;
        }
        let map = MmapMut::map_anon(len.checked_add(HUGE_PAGE)?).ok()?;
        let start = (map.as_ptr() as usize).wrapping_neg() % HUGE_PAGE;
        // The rest stays in small pages: a huge one would hold memory beyond the end. Without any it is slower, no more.
        #[cfg(target_os = "linux")]
        let _ = map.advise_range(memmap2::Advice::HugePage, start, len / HUGE_PAGE * HUGE_PAGE);
        Some(Self { memory: Memory::Mapped(map), start, len })
    }
}

impl Clone for AlignedBytes {
    fn clone(&self) -> Self {
        let mut copy = Self::zeroed(self.len);
        copy.copy_from_slice(self);
        copy
    }
}

impl std::ops::Deref for AlignedBytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.memory.bytes()[self.start..self.start + self.len]
    }
}

impl std::ops::DerefMut for AlignedBytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory.bytes_mut()[self.start..self.start + self.len]
    }
}
