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
//! | affine | numbers of 2 to 8 bits | per group: 16 scales, 16 biases |
//! | `Q8_0` | 8 bits, `q + 128` | per 32 columns: 16 × `d` |
//! | `Q4_K` | 4 bits | per 256 columns: 8 × 16 scales, 8 × 16 minima (bytes), 16 × `d`, 16 × `dmin` |
//! | `Q6_K` | 6 bits, `q + 32` | per 256 columns: 16 × 16 scales (bytes), 16 × `d` |
//! | FP8 | 8 bits | per group: 16 scales |
//! | MXFP4 | 4 bits, an index of [`E2M1`](crate::format::E2M1) | per 32 columns: 16 exponents (bytes) |
//! | NVFP4 | as MXFP4 | per 16 columns: 16 scales (E4M3); after all blocks 16 scales of whole rows (f32) |
//!
//! Numbers of fewer than 8 bits lie in lines as follows; `j` is a byte of a row's four.
//!
//! | bits | a 64-byte line |
//! |---|---|
//! | 8 | `k+j` |
//! | 4 | `k+j` in the low nibble, `k+4+j` in the high one |
//! | 2 | `k+j`, `k+4+j`, `k+8+j`, `k+12+j` from the lowest bits up |
//! | 6 | per 16 columns two lines of low nibbles, then one of the pairs above them as for 2 bits |
//! | 3, 5 | per 32 columns the lines of 2 or 4 bits, then one of the bits above: bit `i` belongs to `k+4i+j` |
//!
//! A tile of a quantised format is a sequence of *blocks* in K order: the lines of their columns, then what is "then", so
//! a kernel reads one memory stream. Rows beyond `rows` and columns beyond `cols` are zero.

use memmap2::MmapMut;
use serde::{Deserialize, Serialize};

use crate::format::{BlockFormat, Codes, WeightFormat};

/// Output rows of one tile.
pub const TILE_ROWS: usize = 16;
/// Columns that any way of storing numbers divides into.
pub const UNIT: usize = 32;

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
            WeightFormat::Affine { bits, group, .. } => matches!(bits, 2..=6 | 8) && matches!(group, 32 | 64 | 128) && self.cols.is_multiple_of(group as usize),
            WeightFormat::Block(block) => self.cols.is_multiple_of(block.columns()),
            WeightFormat::Fp8 { group, .. } => matches!(group, 32 | 64 | 128) && self.cols.is_multiple_of(group as usize),
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
            _ => self.cols / self.block_columns() * self.block_bytes() + self.tail_bytes(),
        }
    }

    /// Columns of one block of a tile; 1 for plain formats.
    pub const fn block_columns(&self) -> usize {
        match self.format {
            WeightFormat::Affine { group, .. } | WeightFormat::Fp8 { group, .. } => group as usize,
            WeightFormat::Block(block) => block.columns(),
            _ => 1,
        }
    }

    /// Bytes after the blocks of a tile: a scale of each whole row.
    pub const fn tail_bytes(&self) -> usize {
        if matches!(self.format, WeightFormat::Block(BlockFormat::Nvfp4)) { TILE_ROWS * 4 } else { 0 }
    }

    /// How the lines hold integers; `None` for formats of floats.
    pub const fn codes(&self) -> Option<Codes> {
        match self.format {
            WeightFormat::Affine { bits, .. } => Some(Codes::Bits(bits)),
            WeightFormat::Block(block) => Some(block.codes()),
            _ => None,
        }
    }

    /// Bytes of the lines of one block of a tile: what comes before its scales; 0 for plain formats.
    pub const fn line_bytes(&self) -> usize {
        match self.codes() {
            Some(codes) => self.block_columns() / UNIT * codes.unit_bytes(),
            None if matches!(self.format, WeightFormat::Fp8 { .. }) => self.block_columns() * TILE_ROWS,
            None => 0,
        }
    }

    /// Bytes of one block of a tile (lines, then scales and the like); 0 for plain formats.
    pub const fn block_bytes(&self) -> usize {
        let scales = match self.format {
            WeightFormat::Affine { scales, .. } => 2 * scales.bytes(),
            WeightFormat::Fp8 { scales, .. } => scales.bytes(),
            WeightFormat::Block(block) => {
                let [small, halves] = block.params();
                small + 2 * halves
            }
            _ => 0,
        };
        self.line_bytes() + TILE_ROWS * scales
    }

    /// Bytes of the whole matrix.
    pub const fn bytes(&self) -> usize {
        self.tiles() * self.tile_bytes()
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
