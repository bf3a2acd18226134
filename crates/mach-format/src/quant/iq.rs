//! The IQ types with codebooks, 256 values each: per 8 (IQ2, IQ1) or 4 (IQ3) values an index into a grid, signs by 8 values,
//! a small scale by 16 or 32. Packed units keep the indices, signs and scales as they are, words and bytes of 16 rows together.

use super::grids::{IQ1, IQ2S, IQ2XS, IQ2XXS, IQ3S, IQ3XXS};
use super::units::{Units, put_half};
use super::{half_at, put_word};
use crate::format::BlockFormat;
use crate::packed::{TILE_ROWS, UNIT};

fn u16_at(block: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([block[at], block[at + 1]])
}

fn u32_at(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

/// Signs of eight values by an index of 7 bits: the number of negative ones is even.
pub(crate) fn even_signs(index: u32) -> u8 {
    let index = (index & 127) as u8;
    index | ((index.count_ones() & 1) as u8) << 7
}

/// Eight numbers about `zero`, those with a bit of `signs` mirrored.
pub(crate) fn mirror(numbers: [u8; 8], signs: u8, zero: u8) -> [u8; 8] {
    std::array::from_fn(|i| if signs >> i & 1 == 1 { (2 * zero).wrapping_sub(numbers[i]) } else { numbers[i] })
}

/// Two grid points of four.
fn eight(points: [u32; 2]) -> [u8; 8] {
    (u64::from(points[0]) | u64::from(points[1]) << 32).to_le_bytes()
}

/// Numbers of a unit, eight at a time.
fn unit(eights: impl Fn(usize) -> [u8; 8]) -> [u8; UNIT] {
    let mut out = [0; UNIT];
    for (l, out) in out.chunks_exact_mut(8).enumerate() {
        out.copy_from_slice(&eights(l));
    }
    out
}

/// Four bytes of a block as the word of a row.
fn copy_word(block: &[u8], at: usize, lines: &mut [u8], line: usize, row: usize) {
    put_word(lines, line, row, u32_at(block, at));
}

/// `d·(n + 1/2)/4` and the like, written as an odd number times a power of two.
fn odd(d: f32, n: u8, unit: f32) -> (f32, f32) {
    (d * f32::from(2 * n + 1) * unit, 0.0)
}

/// Half `d`, then by 32 values four bytes of indices and a word of four 7-bit sign indices under a 4-bit scale.
pub(super) struct Iq2Xxs;

impl Units for Iq2Xxs {
    const FORMAT: BlockFormat = BlockFormat::Iq2Xxs;
    const GGML: Option<u32> = Some(16);

    fn numbers(block: &[u8], u: usize) -> [u8; UNIT] {
        let signs = u32_at(block, 6 + u * 8);
        unit(|l| mirror(IQ2XXS[usize::from(block[2 + u * 8 + l])].to_le_bytes(), even_signs(signs >> (7 * l)), 64))
    }

    fn scale(block: &[u8], g: usize) -> (f32, f32) {
        odd(half_at(block, 0), (u32_at(block, 6 + g * 8) >> 28) as u8, 0.125)
    }

    fn params(block: &[u8], out: &mut [u8], row: usize) {
        put_half(block, 0, out, 0, row);
    }

    fn pack_unit(block: &[u8], u: usize, lines: &mut [u8], row: usize) {
        copy_word(block, 2 + u * 8, lines, 0, row);
        copy_word(block, 6 + u * 8, lines, 1, row);
    }
}

/// Half `d`, 32 pairs of bytes (index of 9 bits under a sign index of 7), 8 bytes of two 4-bit scales.
pub(super) struct Iq2Xs;

impl Units for Iq2Xs {
    const FORMAT: BlockFormat = BlockFormat::Iq2Xs;
    const GGML: Option<u32> = Some(17);

    fn numbers(block: &[u8], u: usize) -> [u8; UNIT] {
        unit(|l| {
            let q = u16_at(block, 2 + u * 8 + l * 2);
            mirror(IQ2XS[usize::from(q & 511)].to_le_bytes(), even_signs(u32::from(q >> 9)), 64)
        })
    }

    fn scale(block: &[u8], g: usize) -> (f32, f32) {
        odd(half_at(block, 0), block[66 + g / 2] >> (g % 2 * 4) & 15, 0.125)
    }

    fn params(block: &[u8], out: &mut [u8], row: usize) {
        put_half(block, 0, out, 0, row);
    }

    fn pack_unit(block: &[u8], u: usize, lines: &mut [u8], row: usize) {
        copy_word(block, 2 + u * 8, lines, 0, row);
        copy_word(block, 6 + u * 8, lines, 1, row);
        lines[128 + row] = block[66 + u];
    }
}

/// Half `d`, 32 bytes of indices, 32 of signs, 8 with the upper two bits of four indices, 8 of two 4-bit scales.
pub(super) struct Iq2S;

impl Units for Iq2S {
    const FORMAT: BlockFormat = BlockFormat::Iq2S;
    const GGML: Option<u32> = Some(22);

    fn numbers(block: &[u8], u: usize) -> [u8; UNIT] {
        unit(|l| {
            let index = usize::from(block[2 + u * 4 + l]) | usize::from(block[66 + u] >> (2 * l) & 3) << 8;
            mirror(IQ2S[index].to_le_bytes(), block[34 + u * 4 + l], 64)
        })
    }

    fn scale(block: &[u8], g: usize) -> (f32, f32) {
        odd(half_at(block, 0), block[74 + g / 2] >> (g % 2 * 4) & 15, 0.125)
    }

    fn params(block: &[u8], out: &mut [u8], row: usize) {
        put_half(block, 0, out, 0, row);
    }

    fn pack_unit(block: &[u8], u: usize, lines: &mut [u8], row: usize) {
        copy_word(block, 2 + u * 4, lines, 0, row);
        copy_word(block, 34 + u * 4, lines, 1, row);
        lines[128 + row] = block[66 + u];
        lines[144 + row] = block[74 + u];
    }
}

/// Half `d`, 64 bytes of indices, then by 32 values a word as in IQ2_XXS.
pub(super) struct Iq3Xxs;

impl Units for Iq3Xxs {
    const FORMAT: BlockFormat = BlockFormat::Iq3Xxs;
    const GGML: Option<u32> = Some(18);

    fn numbers(block: &[u8], u: usize) -> [u8; UNIT] {
        let signs = u32_at(block, 66 + u * 4);
        unit(|l| mirror(eight([0, 1].map(|i| IQ3XXS[usize::from(block[2 + u * 8 + l * 2 + i])])), even_signs(signs >> (7 * l)), 64))
    }

    fn scale(block: &[u8], g: usize) -> (f32, f32) {
        odd(half_at(block, 0), (u32_at(block, 66 + g * 4) >> 28) as u8, 0.25)
    }

    fn params(block: &[u8], out: &mut [u8], row: usize) {
        put_half(block, 0, out, 0, row);
    }

    fn pack_unit(block: &[u8], u: usize, lines: &mut [u8], row: usize) {
        copy_word(block, 2 + u * 8, lines, 0, row);
        copy_word(block, 6 + u * 8, lines, 1, row);
        copy_word(block, 66 + u * 4, lines, 2, row);
    }
}

/// Half `d`, 64 bytes of indices, 8 with the ninth bits of eight, 32 bytes of signs, 4 of two 4-bit scales.
pub(super) struct Iq3S;

impl Units for Iq3S {
    const FORMAT: BlockFormat = BlockFormat::Iq3S;
    const GGML: Option<u32> = Some(21);

    fn numbers(block: &[u8], u: usize) -> [u8; UNIT] {
        let point = |i: usize| IQ3S[usize::from(block[2 + u * 8 + i]) | usize::from(block[66 + u] >> i & 1) << 8];
        unit(|l| mirror(eight([point(2 * l), point(2 * l + 1)]), block[74 + u * 4 + l], 16))
    }

    fn scale(block: &[u8], g: usize) -> (f32, f32) {
        odd(half_at(block, 0), block[106 + g / 2] >> (g % 2 * 4) & 15, 1.0)
    }

    fn params(block: &[u8], out: &mut [u8], row: usize) {
        for i in 0..4 {
            out[i * TILE_ROWS + row] = block[106 + i];
        }
        put_half(block, 0, out, 4, row);
    }

    fn pack_unit(block: &[u8], u: usize, lines: &mut [u8], row: usize) {
        copy_word(block, 2 + u * 8, lines, 0, row);
        copy_word(block, 6 + u * 8, lines, 1, row);
        copy_word(block, 74 + u * 4, lines, 2, row);
        lines[192 + row] = block[66 + u];
    }
}

/// Eight numbers of an IQ1 grid, shifted up or down by an eighth.
fn shifted(index: usize, down: bool) -> [u8; 8] {
    IQ1[index].to_le_bytes().map(|q| if down { q } else { q + 2 })
}

/// Half `d`, 32 bytes of indices, then by 32 values two bytes: the upper three bits of four indices, a scale of 3 bits, the
/// direction of the shift.
pub(super) struct Iq1S;

impl Units for Iq1S {
    const FORMAT: BlockFormat = BlockFormat::Iq1S;
    const GGML: Option<u32> = Some(19);

    fn numbers(block: &[u8], u: usize) -> [u8; UNIT] {
        let high = u16_at(block, 34 + u * 2);
        unit(|l| shifted(usize::from(block[2 + u * 4 + l]) | usize::from(high >> (3 * l) & 7) << 8, high >> 15 == 1))
    }

    fn scale(block: &[u8], g: usize) -> (f32, f32) {
        odd(half_at(block, 0), (u16_at(block, 34 + g * 2) >> 12 & 7) as u8, 0.125)
    }

    fn params(block: &[u8], out: &mut [u8], row: usize) {
        put_half(block, 0, out, 0, row);
    }

    fn pack_unit(block: &[u8], u: usize, lines: &mut [u8], row: usize) {
        copy_word(block, 2 + u * 4, lines, 0, row);
        lines[64 + row] = block[34 + u * 2];
        lines[80 + row] = block[35 + u * 2];
    }
}

/// 32 bytes of indices, 16 with the upper three bits and the direction of two, 8 with four words of four 3-bit scales by 16
/// values under a quarter of the half `d`.
pub(super) struct Iq1M;

impl Iq1M {
    fn d(block: &[u8]) -> [u8; 2] {
        (0..4).fold(0, |d, i| d | u16_at(block, 48 + i * 2) >> 12 << (4 * i)).to_le_bytes()
    }

    fn small(block: &[u8], g: usize) -> u8 {
        (u16_at(block, 48 + g / 4 * 2) >> (g % 4 * 3) & 7) as u8
    }
}

impl Units for Iq1M {
    const FORMAT: BlockFormat = BlockFormat::Iq1M;
    const GGML: Option<u32> = Some(29);

    fn numbers(block: &[u8], u: usize) -> [u8; UNIT] {
        unit(|l| {
            let high = block[32 + u * 2 + l / 2] >> (l % 2 * 4);
            shifted(usize::from(block[u * 4 + l]) | usize::from(high & 7) << 8, high & 8 == 8)
        })
    }

    fn scale(block: &[u8], g: usize) -> (f32, f32) {
        odd(half_at(&Self::d(block), 0), Self::small(block, g), 0.125)
    }

    fn params(block: &[u8], out: &mut [u8], row: usize) {
        put_half(&Self::d(block), 0, out, 0, row);
    }

    fn pack_unit(block: &[u8], u: usize, lines: &mut [u8], row: usize) {
        copy_word(block, u * 4, lines, 0, row);
        lines[64 + row] = block[32 + u * 2];
        lines[80 + row] = block[33 + u * 2];
        lines[96 + row] = Self::small(block, 2 * u) | Self::small(block, 2 * u + 1) << 4;
    }
}
