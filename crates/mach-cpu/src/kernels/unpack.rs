//! Numbers of packed tiles taken apart: a byte for each, for products that several rows share and for formats whose numbers
//! no product instruction takes as they are stored.
//!
//! Written over registers of 16 rows × 4 bytes: a line for every four columns comes out.

use mach_format::quant::grids::{IQ1, IQ2S, IQ2XS, IQ2XXS, IQ3S, IQ3XXS};
use mach_format::{Codes, E2M1, IQ4, PackedLayout, UNIT};

use super::blocks::Blocks;
use super::simd::{LANES, Simd};

/// [`unpack_panel`] of one kernel set: products call it instead of having a copy each.
pub(crate) type UnpackPanel = unsafe fn(&PackedLayout, *const u8, usize, usize, usize, *mut u8, *mut f32);

/// Bytes of 32 columns taken apart.
pub(super) const UNPACKED_UNIT: usize = UNIT * LANES;

/// Takes `columns` columns from `first` on apart: numbers to `codes`, then scale and bias for every `block` columns to `scales`.
///
/// # Safety
/// `tile` has `layout.tile_bytes()` bytes; `first` and `columns` are multiples of 32 within its columns. `codes` takes 16 bytes
/// a column, `scales` 32 values a block.
#[inline(always)]
pub(crate) unsafe fn unpack_panel<V: Simd>(
    layout: &PackedLayout,
    tile: *const u8,
    first: usize,
    columns: usize,
    block: usize,
    codes: *mut u8,
    scales: *mut f32,
) {
    let format = Blocks::of(layout, tile);
    match format.codes {
        Codes::Bits(2) => units::<V, 2>(format, first, columns, codes),
        Codes::Bits(3) => units::<V, 3>(format, first, columns, codes),
        Codes::Bits(4) => units::<V, 4>(format, first, columns, codes),
        Codes::Bits(5) => units::<V, 5>(format, first, columns, codes),
        Codes::Bits(6) => units::<V, 6>(format, first, columns, codes),
        Codes::Bits(_) => units::<V, 8>(format, first, columns, codes),
        Codes::E2m1 => units::<V, E2M1_TABLE>(format, first, columns, codes),
        Codes::Iq4 => units::<V, IQ4_TABLE>(format, first, columns, codes),
        Codes::Iq2Xxs => units::<V, IQ2_XXS>(format, first, columns, codes),
        Codes::Iq2Xs => units::<V, IQ2_XS>(format, first, columns, codes),
        Codes::Iq2S => units::<V, IQ2_S>(format, first, columns, codes),
        Codes::Iq3Xxs => units::<V, IQ3_XXS>(format, first, columns, codes),
        Codes::Iq3S => units::<V, IQ3_S>(format, first, columns, codes),
        Codes::Iq1S => units::<V, IQ1_S>(format, first, columns, codes),
        Codes::Iq1M => units::<V, IQ1_M>(format, first, columns, codes),
    }
    for i in 0..columns / block {
        let (scale, bias) = format.scales::<V>(first + i * block);
        V::store(scales.add(i * 2 * LANES), scale);
        V::store(scales.add((i * 2 + 1) * LANES), bias);
    }
}

/// Ways of storing numbers beside integers of so many bits.
pub(super) const E2M1_TABLE: u8 = 16;
const IQ4_TABLE: u8 = 17;
const IQ2_XXS: u8 = 18;
const IQ2_XS: u8 = 19;
const IQ2_S: u8 = 20;
const IQ3_XXS: u8 = 21;
const IQ3_S: u8 = 22;
const IQ1_S: u8 = 23;
const IQ1_M: u8 = 24;

#[inline(always)]
unsafe fn units<V: Simd, const KIND: u8>(format: Blocks, first: usize, columns: usize, codes: *mut u8) {
    for u in 0..columns / UNIT {
        unpack_unit::<V, KIND>(format.unit(first + u * UNIT), codes.add(u * UNPACKED_UNIT));
    }
}

/// `(v >> shift) & mask` of every 32 bits.
#[inline(always)]
unsafe fn part<V: Simd>(v: V::I, shift: usize, mask: u32) -> V::I {
    V::and_i(V::shr_i(v, shift as u32), V::splat_i(mask as i32))
}

#[inline(always)]
unsafe fn line<V: Simd>(unit: *const u8, line: usize) -> V::I {
    V::load_i(unit.add(line * 64).cast())
}

/// 32 columns of 16 rows.
#[inline(always)]
unsafe fn unpack_unit<V: Simd, const KIND: u8>(unit: *const u8, out: *mut u8) {
    match KIND {
        IQ2_XXS | IQ2_XS | IQ2_S => {
            for l in 0..4 {
                let (points, signs) = iq2::<V, KIND>(unit, l);
                V::store_i(out.add(l * 128), mirror::<V, 64>(points[0], signs, 0));
                V::store_i(out.add(l * 128 + 64), mirror::<V, 64>(points[1], signs, 1));
            }
        }
        IQ3_XXS => {
            for four in 0..8 {
                let points = V::gather4(&IQ3XXS, part::<V>(line::<V>(unit, four / 4), four % 4 * 8, 255));
                let signs = even_signs::<V>(part::<V>(line::<V>(unit, 2), four / 2 * 7, 127));
                V::store_i(out.add(four * 64), mirror::<V, 64>(points, signs, four % 2));
            }
        }
        IQ3_S => {
            let upper = V::load_u8(unit.add(192));
            for four in 0..8 {
                let index = part::<V>(line::<V>(unit, four / 4), four % 4 * 8, 255);
                let points = V::gather4(&IQ3S, V::or_i(index, V::shl_i::<8>(part::<V>(upper, four, 1))));
                let signs = part::<V>(line::<V>(unit, 2), four / 2 * 8, 255);
                V::store_i(out.add(four * 64), mirror::<V, 16>(points, signs, four % 2));
            }
        }
        IQ1_S | IQ1_M => {
            let (low, high) = (V::load_u8(unit.add(64)), V::load_u8(unit.add(80)));
            for l in 0..4 {
                // Three upper bits of the index; then 2 where the shift is up.
                let (upper, down) = if const { KIND == IQ1_S } {
                    let both = V::or_i(low, V::shl_i::<8>(high));
                    (part::<V>(both, l * 3, 7), part::<V>(high, 6, 2))
                } else {
                    let half = if l < 2 { low } else { high };
                    (part::<V>(half, l % 2 * 4, 7), part::<V>(half, l % 2 * 4 + 2, 2))
                };
                let up = V::spread_byte(V::xor_i(down, V::splat_i(2)));
                let points = V::gather8(&IQ1, V::or_i(part::<V>(line::<V>(unit, 0), l * 8, 255), V::shl_i::<8>(upper)));
                V::store_i(out.add(l * 128), V::add_bytes(points[0], up));
                V::store_i(out.add(l * 128 + 64), V::add_bytes(points[1], up));
            }
        }
        _ => {
            for four in 0..8 {
                V::store_i(out.add(four * 64), code_line::<V, KIND>(unit, four));
            }
        }
    }
}

/// Columns `4·four..4·four + 4` of integers, or of numbers from a table of 16.
#[inline(always)]
pub(super) unsafe fn code_line<V: Simd, const KIND: u8>(unit: *const u8, four: usize) -> V::I {
    match KIND {
        2 | 3 => {
            let low = part::<V>(line::<V>(unit, four / 4), four % 4 * 2, 0x0303_0303);
            if const { KIND == 3 } { V::or_i(low, V::shl_i::<2>(part::<V>(line::<V>(unit, 2), four, 0x0101_0101))) } else { low }
        }
        6 => {
            let sixteen = four / 4 * 3;
            let low = part::<V>(line::<V>(unit, sixteen + four % 4 / 2), four % 2 * 4, 0x0f0f_0f0f);
            V::or_i(low, V::shl_i::<4>(part::<V>(line::<V>(unit, sixteen + 2), four % 4 * 2, 0x0303_0303)))
        }
        8 => line::<V>(unit, four),
        _ => {
            let q = part::<V>(line::<V>(unit, four / 2), four % 2 * 4, 0x0f0f_0f0f);
            match KIND {
                5 => V::or_i(q, V::shl_i::<4>(part::<V>(line::<V>(unit, 4), four, 0x0101_0101))),
                E2M1_TABLE => V::lookup(&E2M1, q),
                IQ4_TABLE => V::lookup(&IQ4, q),
                _ => q,
            }
        }
    }
}

/// Magnitudes of columns `8·l..8·l + 8` of IQ2 types, and a byte of signs of each row.
#[inline(always)]
unsafe fn iq2<V: Simd, const KIND: u8>(unit: *const u8, l: usize) -> ([V::I; 2], V::I) {
    match KIND {
        IQ2_XXS => {
            let points = V::gather8(&IQ2XXS, part::<V>(line::<V>(unit, 0), l * 8, 255));
            (points, even_signs::<V>(part::<V>(line::<V>(unit, 1), l * 7, 127)))
        }
        IQ2_XS => {
            let q = part::<V>(line::<V>(unit, l / 2), l % 2 * 16, 0xffff);
            (V::gather8(&IQ2XS, part::<V>(q, 0, 511)), even_signs::<V>(part::<V>(q, 9, 127)))
        }
        _ => {
            let upper = V::shl_i::<8>(part::<V>(V::load_u8(unit.add(128)), l * 2, 3));
            let points = V::gather8(&IQ2S, V::or_i(part::<V>(line::<V>(unit, 0), l * 8, 255), upper));
            (points, part::<V>(line::<V>(unit, 1), l * 8, 255))
        }
    }
}

/// The upper bit of 7 with an odd number of ones.
const PARITY: [u8; 16] = [0, 128, 128, 0, 128, 0, 0, 128, 128, 0, 0, 128, 0, 128, 128, 0];

/// Signs of eight columns of which an even number is negative, by those of seven.
#[inline(always)]
unsafe fn even_signs<V: Simd>(seven: V::I) -> V::I {
    let folded = part::<V>(V::xor_i(seven, V::shr_i(seven, 4)), 0, 15);
    V::or_i(seven, V::lookup(&PARITY, folded))
}

/// Numbers about `ZERO` of columns `4·half..4·half + 4` of eight, mirrored where their bit of `signs` is set.
#[inline(always)]
unsafe fn mirror<V: Simd, const ZERO: i32>(numbers: V::I, signs: V::I, half: usize) -> V::I {
    let own = V::splat_i(if half == 0 { 0x0804_0201 } else { 0x8040_2010_u32 as i32 });
    let negative = V::equal_bytes(V::and_i(V::spread_byte(signs), own), own);
    // 2·ZERO − x is the complement of x and 2·ZERO + 1.
    V::add_bytes(V::xor_i(numbers, negative), V::and_i(negative, V::splat_i((2 * ZERO + 1).wrapping_mul(0x0101_0101))))
}
