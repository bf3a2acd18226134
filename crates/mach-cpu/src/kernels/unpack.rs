//! Numbers of packed tiles taken apart: a byte for each, for products that several rows share and for formats whose numbers
//! no product instruction takes as they are stored.
//!
//! Written over registers of 16 rows × 4 bytes: a line for every four columns comes out.

use mach_format::{Codes, E2M1, PackedLayout, UNIT};

use super::blocks::Blocks;
use super::products::PREFETCH;
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
        Codes::E2m1 => units::<V, TABLE>(format, first, columns, codes),
    }
    for i in 0..columns / block {
        let (scale, bias) = format.scales::<V>(first + i * block);
        V::store(scales.add(i * 2 * LANES), scale);
        V::store(scales.add((i * 2 + 1) * LANES), bias);
    }
}

/// Numbers by a table of 16.
const TABLE: u8 = 16;

#[inline(always)]
unsafe fn units<V: Simd, const KIND: u8>(format: Blocks, first: usize, columns: usize, codes: *mut u8) {
    let bytes = format.codes.unit_bytes();
    for u in 0..columns / UNIT {
        let unit = format.unit(first + u * UNIT);
        for line in 0..bytes.div_ceil(64) {
            V::prefetch(unit.wrapping_add(PREFETCH + line * 64));
        }
        unpack_unit::<V, KIND>(unit, codes.add(u * UNPACKED_UNIT));
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
        2 | 3 => {
            let above = if KIND == 3 { line::<V>(unit, 2) } else { V::splat_i(0) };
            for four in 0..8 {
                let mut q = part::<V>(line::<V>(unit, four / 4), four % 4 * 2, 0x0303_0303);
                if KIND == 3 {
                    q = V::or_i(q, V::shl_i::<2>(part::<V>(above, four, 0x0101_0101)));
                }
                V::store_i(out.add(four * 64), q);
            }
        }
        6 => {
            for four in 0..8 {
                let sixteen = four / 4 * 3;
                let low = part::<V>(line::<V>(unit, sixteen + four % 4 / 2), four % 2 * 4, 0x0f0f_0f0f);
                let high = V::shl_i::<4>(part::<V>(line::<V>(unit, sixteen + 2), four % 4 * 2, 0x0303_0303));
                V::store_i(out.add(four * 64), V::or_i(low, high));
            }
        }
        8 => {
            for four in 0..8 {
                V::store_i(out.add(four * 64), line::<V>(unit, four));
            }
        }
        _ => {
            let above = if KIND == 5 { line::<V>(unit, 4) } else { V::splat_i(0) };
            for four in 0..8 {
                let mut q = part::<V>(line::<V>(unit, four / 2), four % 2 * 4, 0x0f0f_0f0f);
                if KIND == 5 {
                    q = V::or_i(q, V::shl_i::<4>(part::<V>(above, four, 0x0101_0101)));
                } else if KIND == TABLE {
                    q = V::lookup(&E2M1, q);
                }
                V::store_i(out.add(four * 64), q);
            }
        }
    }
}
