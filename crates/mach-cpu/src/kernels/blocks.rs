//! Where the numbers and scales of a quantised tile lie, and what they are.

use mach_format::{BlockFormat, Codes, E2M1, IQ4, PackedLayout, ScaleType, UNIT, WeightFormat};

use super::simd::{LANES, Simd};
use super::unpack::{UNPACKED_UNIT, UnpackPanel};

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
    /// Bytes of 32 columns, and minus the number that stands for zero where groups have no minimum.
    pub(super) unit_bytes: usize,
    zero: f32,
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
        let (codes, group, scales, zero) = match layout.format {
            WeightFormat::Affine { bits, group, scales } => (Codes::Bits(bits), group.into(), Scales::Affine(scales), 0.0),
            WeightFormat::Block(block) => (block.codes(), block.group(), Scales::Block(block), -f32::from(block.offset())),
            format => unreachable!("{format} weights are not quantised"),
        };
        let columns = layout.block_columns();
        let tail = tile.wrapping_add(layout.tile_bytes() - layout.tail_bytes());
        Self {
            tile,
            tail,
            codes,
            columns,
            shift: columns.trailing_zeros(),
            bytes: layout.block_bytes(),
            line_bytes: layout.line_bytes(),
            group,
            scales,
            unit_bytes: codes.unit_bytes(),
            zero,
        }
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
        block.add(within / UNIT * self.unit_bytes)
    }

    /// Scale and bias of column `column`: exact, or rounded once from exact values.
    #[inline(always)]
    pub(super) unsafe fn scales<V: Simd>(&self, column: usize) -> (V::F, V::F) {
        let (block, within) = self.block(column);
        let (at, unit) = (block.add(self.line_bytes), block.add(within / UNIT * self.unit_bytes));
        match self.scales {
            Scales::Affine(ScaleType::BF16) => (V::load_bf16(at.cast()), V::load_bf16(at.add(LANES * 2).cast())),
            Scales::Affine(ScaleType::F16) => (V::load_f16(at.cast()), V::load_f16(at.add(LANES * 2).cast())),
            Scales::Affine(ScaleType::F32) => (V::load(at.cast()), V::load(at.add(LANES * 4).cast())),
            Scales::Block(BlockFormat::Q4_1 | BlockFormat::Q5_1) => (V::load_f16(at.cast()), V::load_f16(at.add(LANES * 2).cast())),
            Scales::Block(BlockFormat::Q2K) => {
                let pair = V::load_u8(at.add(within / 16 * LANES));
                let (d, dmin) = (V::load_f16(at.add(256).cast()), V::load_f16(at.add(288).cast()));
                let (scale, min) = (V::to_f(V::and_i(pair, V::splat_i(15))), V::to_f(V::shr_i(pair, 4)));
                (V::mul(d, scale), V::sub(V::splat(0.0), V::mul(dmin, min)))
            }
            Scales::Block(BlockFormat::Q4K | BlockFormat::Q5K) => {
                let line = at.add(within / 32 * LANES);
                let (scale, min) = (V::to_f(V::load_u8(line)), V::to_f(V::load_u8(line.add(8 * LANES))));
                let (d, dmin) = (V::load_f16(at.add(256).cast()), V::load_f16(at.add(288).cast()));
                (V::mul(d, scale), V::sub(V::splat(0.0), V::mul(dmin, min)))
            }
            Scales::Block(format) => {
                let scale = match format {
                    BlockFormat::Q6K | BlockFormat::Q3K => {
                        let scale = V::to_f(V::load_i8(at.add(within / 16 * LANES).cast()));
                        V::mul(V::load_f16(at.add(256).cast()), scale)
                    }
                    BlockFormat::Iq4Xs => {
                        let scale = V::to_f(V::load_i8(at.add(within / 32 * LANES).cast()));
                        V::mul(V::load_f16(at.add(128).cast()), scale)
                    }
                    BlockFormat::Iq2Xxs => odd::<V>(V::shr_i(V::load_i(unit.add(64).cast()), 28), 0.125, at),
                    BlockFormat::Iq3Xxs => odd::<V>(V::shr_i(V::load_i(unit.add(128).cast()), 28), 0.25, at),
                    BlockFormat::Iq2Xs => odd::<V>(nibble::<V>(unit.add(128), within / 16), 0.125, at),
                    BlockFormat::Iq2S => odd::<V>(nibble::<V>(unit.add(144), within / 16), 0.125, at),
                    BlockFormat::Iq3S => odd::<V>(nibble::<V>(at.add(within / 64 * LANES), within / 32), 1.0, at.add(4 * LANES)),
                    BlockFormat::Iq1S => odd::<V>(V::and_i(V::shr_i(V::load_u8(unit.add(80)), 4), V::splat_i(7)), 0.125, at),
                    BlockFormat::Iq1M => odd::<V>(nibble::<V>(unit.add(96), within / 16), 0.125, at),
                    BlockFormat::Mxfp4 => e8m0_half::<V>(V::load_u8(at)),
                    BlockFormat::Nvfp4 => V::mul(e4m3_half::<V>(V::load_u8(at.add(within / 16 * LANES))), V::load(self.tail.cast())),
                    _ => V::load_f16(at.cast()),
                };
                (scale, V::mul(scale, V::splat(self.zero)))
            }
        }
    }

    /// Column `column` as numbers, given its scales. `unpack` takes grids apart.
    #[inline(always)]
    pub(super) unsafe fn column<V: Simd>(&self, unpack: UnpackPanel, layout: &PackedLayout, column: usize, (scale, bias): (V::F, V::F)) -> V::F {
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
            Codes::Iq4 => V::and_i(V::lookup(&IQ4, nibble(c / 8)), V::splat_i(255)),
            _ => {
                let (mut apart, mut scales) = ([0; UNPACKED_UNIT], [0.0; 2 * LANES]);
                unpack(layout, self.tile, column - c, UNIT, UNIT, apart.as_mut_ptr(), scales.as_mut_ptr());
                apart_column::<V>(apart.as_ptr(), c)
            }
        };
        V::fma(scale, V::to_f(q), bias)
    }
}

/// One of the two nibbles of a byte of each row.
#[inline(always)]
unsafe fn nibble<V: Simd>(bytes: *const u8, i: usize) -> V::I {
    V::and_i(V::shr_i(V::load_u8(bytes), (i % 2 * 4) as u32), V::splat_i(15))
}

/// `(2·n + 1)·unit` times the half at `d`.
#[inline(always)]
unsafe fn odd<V: Simd>(n: V::I, unit: f32, d: *const u8) -> V::F {
    let scale = V::to_f(V::or_i(V::shl_i::<1>(n), V::splat_i(1)));
    V::mul(V::mul(V::load_f16(d.cast()), scale), V::splat(unit))
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

/// Column `c` of numbers that were taken apart.
#[inline(always)]
unsafe fn apart_column<V: Simd>(codes: *const u8, c: usize) -> V::I {
    V::and_i(V::shr_i(V::load_i(codes.add(c / 4 * 64).cast()), (c % 4 * 8) as u32), V::splat_i(255))
}

/// Writes a quantised tile as an `F32` tile, `[cols][16]`. `unpack` is that of the same set.
///
/// # Safety
/// `tile` has `layout.tile_bytes()` bytes, `out` takes `16·cols` values.
#[inline(always)]
pub(crate) unsafe fn dequantise_tile<V: Simd>(unpack: UnpackPanel, layout: &PackedLayout, tile: *const u8, out: *mut f32) {
    // No group has fewer columns.
    const GROUP: usize = 16;
    let (mut codes, mut scales) = ([0; UNPACKED_UNIT], [0.0; UNIT / GROUP * 2 * LANES]);
    for first in (0..layout.cols).step_by(UNIT) {
        unpack(layout, tile, first, UNIT, GROUP, codes.as_mut_ptr(), scales.as_mut_ptr());
        for c in 0..UNIT {
            let at = scales.as_ptr().add(c / GROUP * 2 * LANES);
            let q = V::to_f(apart_column::<V>(codes.as_ptr(), c));
            V::store(out.add((first + c) * LANES), V::fma(V::load(at), q, V::load(at.add(LANES))));
        }
    }
}
