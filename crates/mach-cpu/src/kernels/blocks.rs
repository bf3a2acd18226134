//! Where the numbers and scales of a quantised tile lie, and what they are.

use mach_format::{BlockFormat, Codes, E2M1, PackedLayout, ScaleType, UNIT, WeightFormat};

use super::simd::{LANES, Simd};

/// A tile of a quantised format.
#[derive(Clone, Copy)]
pub(super) struct Blocks {
    pub(super) tile: *const u8,
    pub(super) codes: Codes,
    /// Columns of a block of the tile, log₂ of them, and the block's bytes.
    columns: usize,
    shift: u32,
    bytes: usize,
    /// Bytes before the scales.
    line_bytes: usize,
    /// Scales of whole rows, where there are such.
    tail: *const u8,
    /// Columns that share a scale.
    pub(super) group: usize,
    scales: Scales,
}

/// How scales are stored.
#[derive(Clone, Copy)]
enum Scales {
    Affine(ScaleType),
    Block(BlockFormat),
}

impl Blocks {
    #[inline(always)]
    pub(super) fn of(layout: &PackedLayout, tile: *const u8) -> Self {
        let (codes, group, scales) = match layout.format {
            WeightFormat::Affine { bits, group, scales } => (Codes::Bits(bits), group.into(), Scales::Affine(scales)),
            WeightFormat::Block(block) => (block.codes(), block.group(), Scales::Block(block)),
            format => unreachable!("{format} weights are not quantised"),
        };
        let columns = layout.block_columns();
        let tail = tile.wrapping_add(layout.tile_bytes() - layout.tail_bytes());
        Self { tile, tail, codes, columns, shift: columns.trailing_zeros(), bytes: layout.block_bytes(), line_bytes: layout.line_bytes(), group, scales }
    }

    /// The block of column `column`, and the column within it.
    #[inline(always)]
    pub(super) unsafe fn block(&self, column: usize) -> (*const u8, usize) {
        (self.tile.add((column >> self.shift) * self.bytes), column & (self.columns - 1))
    }

    /// The lines of the 32 columns of `column`.
    #[inline(always)]
    pub(super) unsafe fn unit(&self, column: usize) -> *const u8 {
        let (block, within) = self.block(column);
        block.add(within / UNIT * self.codes.unit_bytes())
    }

    /// Scale and bias of column `column`: exact, or rounded once from exact values.
    #[inline(always)]
    pub(super) unsafe fn scales<V: Simd>(&self, column: usize) -> (V::F, V::F) {
        let (block, within) = self.block(column);
        let at = block.add(self.line_bytes);
        match self.scales {
            Scales::Affine(ScaleType::BF16) => (V::load_bf16(at.cast()), V::load_bf16(at.add(LANES * 2).cast())),
            Scales::Affine(ScaleType::F16) => (V::load_f16(at.cast()), V::load_f16(at.add(LANES * 2).cast())),
            Scales::Affine(ScaleType::F32) => (V::load(at.cast()), V::load(at.add(LANES * 4).cast())),
            Scales::Block(BlockFormat::Q4K) => {
                let line = at.add(within / 32 * LANES);
                let (scale, min) = (V::to_f(V::load_u8(line)), V::to_f(V::load_u8(line.add(8 * LANES))));
                let (d, dmin) = (V::load_f16(at.add(256).cast()), V::load_f16(at.add(288).cast()));
                (V::mul(d, scale), V::sub(V::splat(0.0), V::mul(dmin, min)))
            }
            Scales::Block(format) => {
                let scale = match format {
                    BlockFormat::Q6K => {
                        let scale = V::to_f(V::load_i8(at.add(within / 16 * LANES).cast()));
                        V::mul(V::load_f16(at.add(256).cast()), scale)
                    }
                    BlockFormat::Mxfp4 => e8m0_half::<V>(V::load_u8(at)),
                    BlockFormat::Nvfp4 => V::mul(e4m3_half::<V>(V::load_u8(at.add(within / 16 * LANES))), V::load(self.tail.cast())),
                    _ => V::load_f16(at.cast()),
                };
                (scale, V::mul(scale, V::splat(-f32::from(format.offset()))))
            }
        }
    }

    /// Column `column` as numbers, given its scales.
    #[inline(always)]
    pub(super) unsafe fn column<V: Simd>(&self, column: usize, (scale, bias): (V::F, V::F)) -> V::F {
        let (unit, c) = (self.unit(column), column % UNIT);
        let bits = |line: usize, shift: usize, mask: i32| V::and_i(V::shr_i(V::load_i(unit.add(line * 64).cast()), shift as u32), V::splat_i(mask));
        let nibble = |line: usize| bits(line, c % 4 * 8 + c / 4 % 2 * 4, 15);
        let pair = |line: usize| bits(line, c % 4 * 8 + c % 16 / 4 * 2, 3);
        let bit = |line: usize| bits(line, c % 4 * 8 + c / 4, 1);
        let q = match self.codes {
            Codes::Bits(2) => pair(c / 16),
            Codes::Bits(3) => V::or_i(pair(c / 16), V::shl_i::<2>(bit(2))),
            Codes::Bits(5) => V::or_i(nibble(c / 8), V::shl_i::<4>(bit(4))),
            Codes::Bits(6) => V::or_i(nibble(c / 16 * 3 + c % 16 / 8), V::shl_i::<4>(pair(c / 16 * 3 + 2))),
            Codes::Bits(8) => bits(c / 4, c % 4 * 8, 255),
            Codes::Bits(_) => nibble(c / 8),
            // The other bytes of a lane become the table's first number.
            Codes::E2m1 => V::and_i(V::lookup(&E2M1, nibble(c / 8)), V::splat_i(255)),
        };
        V::fma(scale, V::to_f(q), bias)
    }
}

/// Half of an E4M3 number.
#[inline(always)]
unsafe fn e4m3_half<V: Simd>(code: V::I) -> V::F {
    let sign = V::and_i(V::shl_i::<24>(code), V::splat_i(i32::MIN));
    let bits = V::or_i(sign, V::shl_i::<20>(V::and_i(code, V::splat_i(127))));
    V::mul(V::from_bits(bits), V::splat(f32::from_bits((127 + 119) << 23)))
}

/// Half of `2^(e − 127)`; 255 gives no number.
#[inline(always)]
unsafe fn e8m0_half<V: Simd>(e: V::I) -> V::F {
    // An exponent of 0 is 2^-127, below what the bits of a normal number can say.
    V::mul(V::max(V::from_bits(V::shl_i::<23>(e)), V::splat(f32::from_bits(0x0040_0000))), V::splat(0.5))
}

/// Writes a quantised tile as an `F32` tile, `[cols][16]`.
///
/// # Safety
/// `tile` has `layout.tile_bytes()` bytes, `out` takes `16·cols` values.
#[inline(always)]
pub(crate) unsafe fn dequantise_tile<V: Simd>(layout: &PackedLayout, tile: *const u8, out: *mut f32) {
    let format = Blocks::of(layout, tile);
    for first in (0..layout.cols).step_by(format.group) {
        let scales = format.scales::<V>(first);
        for column in first..first + format.group {
            V::store(out.add(column * LANES), format.column::<V>(column, scales));
        }
    }
}
