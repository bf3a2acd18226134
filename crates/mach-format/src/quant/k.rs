//! The K types with numbers of 2, 3 and 5 bits, 256 values each.
//!
//! Q2_K: 16 bytes of scale (low nibble) and minimum (high) by 16 values, 64 bytes of bit pairs, halves `d` and `dmin`.
//! Q3_K: 32 bytes of upper bits, 64 bytes of bit pairs, 12 bytes of sixteen 6-bit scales from −32, the half `d`;
//! `x = d·scale·(q − 4)`. Q5_K: as Q4_K, with 32 bytes of fifth bits before the nibbles.

use super::half_at;
use super::q4_k::group;
use super::units::{Units, put_half};
use crate::format::BlockFormat;
use crate::packed::{TILE_ROWS, UNIT};

/// Bit pairs of unit `u`: 32 bytes hold four units, the first lowest.
fn pairs(bytes: &[u8], u: usize) -> [u8; UNIT] {
    std::array::from_fn(|i| bytes[u / 4 * 32 + i] >> (u % 4 * 2) & 3)
}

pub(super) struct Q2K;

impl Units for Q2K {
    const FORMAT: BlockFormat = BlockFormat::Q2K;
    const GGML: Option<u32> = Some(10);

    fn numbers(block: &[u8], u: usize) -> [u8; UNIT] {
        pairs(&block[16..], u)
    }

    fn scale(block: &[u8], g: usize) -> (f32, f32) {
        (half_at(block, 80) * f32::from(block[g] & 15), half_at(block, 82) * f32::from(block[g] >> 4))
    }

    fn params(block: &[u8], out: &mut [u8], row: usize) {
        for g in 0..16 {
            out[g * TILE_ROWS + row] = block[g];
        }
        put_half(block, 80, out, 16, row);
        put_half(block, 82, out, 18, row);
    }
}

pub(super) struct Q3K;

impl Q3K {
    fn small(block: &[u8], g: usize) -> i8 {
        let s = &block[96..108];
        let low = s[g % 8] >> (g / 8 * 4) & 15;
        (low | (s[8 + g % 4] >> (g / 4 * 2) & 3) << 4) as i8 - 32
    }
}

impl Units for Q3K {
    const FORMAT: BlockFormat = BlockFormat::Q3K;
    const GGML: Option<u32> = Some(11);

    fn numbers(block: &[u8], u: usize) -> [u8; UNIT] {
        let mut out = pairs(&block[32..], u);
        for (q, &high) in out.iter_mut().zip(block) {
            *q |= (high >> u & 1) << 2;
        }
        out
    }

    fn scale(block: &[u8], g: usize) -> (f32, f32) {
        (half_at(block, 108) * f32::from(Self::small(block, g)), 0.0)
    }

    fn params(block: &[u8], out: &mut [u8], row: usize) {
        for g in 0..16 {
            out[g * TILE_ROWS + row] = Self::small(block, g) as u8;
        }
        put_half(block, 108, out, 16, row);
    }
}

pub(super) struct Q5K;

impl Units for Q5K {
    const FORMAT: BlockFormat = BlockFormat::Q5K;
    const GGML: Option<u32> = Some(13);

    fn numbers(block: &[u8], u: usize) -> [u8; UNIT] {
        std::array::from_fn(|i| block[48 + u / 2 * 32 + i] >> (u % 2 * 4) & 15 | (block[16 + i] >> u & 1) << 4)
    }

    fn scale(block: &[u8], g: usize) -> (f32, f32) {
        let (scale, min) = group(block, g);
        (half_at(block, 0) * f32::from(scale), half_at(block, 2) * f32::from(min))
    }

    fn params(block: &[u8], out: &mut [u8], row: usize) {
        for g in 0..8 {
            (out[g * TILE_ROWS + row], out[(8 + g) * TILE_ROWS + row]) = group(block, g);
        }
        put_half(block, 0, out, 16, row);
        put_half(block, 2, out, 18, row);
    }
}

/// IQ4_XS: the half `d`, 16 upper bit pairs and 8 low nibbles of scales from −32 by 32 values, then nibbles that index the
/// table of IQ4_NL, 16 bytes for every 32 values as there.
pub(super) struct Iq4Xs;

impl Iq4Xs {
    fn small(block: &[u8], g: usize) -> i8 {
        let high = u16::from_le_bytes([block[2], block[3]]) >> (2 * g) & 3;
        (block[4 + g / 2] >> (g % 2 * 4) & 15 | (high as u8) << 4) as i8 - 32
    }
}

impl Units for Iq4Xs {
    const FORMAT: BlockFormat = BlockFormat::Iq4Xs;
    const GGML: Option<u32> = Some(23);

    fn numbers(block: &[u8], u: usize) -> [u8; UNIT] {
        super::units::halves(&block[8 + u * 16..])
    }

    fn scale(block: &[u8], g: usize) -> (f32, f32) {
        (half_at(block, 0) * f32::from(Self::small(block, g)), 0.0)
    }

    fn params(block: &[u8], out: &mut [u8], row: usize) {
        for g in 0..8 {
            out[g * TILE_ROWS + row] = Self::small(block, g) as u8;
        }
        put_half(block, 0, out, 8, row);
    }
}
