//! What block formats have in common: numbers in units of 32 columns, scales by group.

use super::{Codec, nibble_word, put_word, u64_at};
use crate::format::{BlockFormat, Codes, E2M1, IQ4};
use crate::packed::{TILE_ROWS, UNIT};

/// How the blocks of a format are read, from which [`codec`] makes the rest.
pub(super) trait Units {
    const FORMAT: BlockFormat;
    /// Number of the type in GGUF files, where they have it.
    const GGML: Option<u32>;

    /// The numbers of unit `u` of a block in the order of columns: as they are stored, or points of a grid with their signs.
    fn numbers(block: &[u8], u: usize) -> [u8; UNIT];

    /// Scale and minimum of group `g`: a value is `scale·number − min`, or `scale·(number − offset)` where there is none.
    fn scale(block: &[u8], g: usize) -> (f32, f32);

    /// Writes what follows the lines of a packed block for one row.
    fn params(block: &[u8], out: &mut [u8], row: usize);

    /// Writes the words of unit `u` for one row of its lines.
    fn pack_unit(block: &[u8], u: usize, lines: &mut [u8], row: usize) {
        put_numbers(Self::FORMAT.codes(), &Self::numbers(block, u), lines, row);
    }
}

pub(super) const fn codec<B: Units>() -> Codec {
    Codec { format: B::FORMAT, ggml: B::GGML, dequantise: dequantise::<B>, pack: pack::<B> }
}

fn dequantise<B: Units>(block: &[u8], out: &mut [f32]) {
    let offset = i32::from(B::FORMAT.offset());
    for (u, out) in out.chunks_exact_mut(UNIT).enumerate() {
        let numbers = values(B::FORMAT.codes(), B::numbers(block, u));
        let group = B::FORMAT.group().min(UNIT);
        for (i, (out, numbers)) in out.chunks_exact_mut(group).zip(numbers.chunks_exact(group)).enumerate() {
            let (scale, min) = B::scale(block, (u * UNIT) / B::FORMAT.group() + i);
            for (x, &q) in out.iter_mut().zip(numbers) {
                let q = (i32::from(q) - offset) as f32;
                *x = if offset == 0 { scale * q - min } else { scale * q };
            }
        }
    }
}

/// What stored numbers stand for.
fn values(codes: Codes, mut numbers: [u8; UNIT]) -> [u8; UNIT] {
    let table = match codes {
        Codes::E2m1 => E2M1,
        Codes::Iq4 => IQ4,
        _ => return numbers,
    };
    numbers.iter_mut().for_each(|q| *q = table[usize::from(*q)]);
    numbers
}

fn pack<B: Units>(block: &[u8], out: &mut [u8], row: usize) {
    let unit = B::FORMAT.codes().unit_bytes();
    let (lines, params) = out.split_at_mut(B::FORMAT.columns() / UNIT * unit);
    for (u, lines) in lines.chunks_exact_mut(unit).enumerate() {
        B::pack_unit(block, u, lines, row);
    }
    B::params(block, params, row);
}

/// The words of one row of a unit's lines, for bits and indices of a table.
pub(crate) fn put_numbers(codes: Codes, numbers: &[u8; UNIT], lines: &mut [u8], row: usize) {
    let bits = if let Codes::Bits(bits) = codes { bits } else { 4 };
    let four = |i: usize, shift: u8, mask: u32| u32::from_le_bytes([0, 1, 2, 3].map(|j| numbers[4 * i + j])) >> shift & mask;
    let pairs = |sixteen: usize, shift: u8| (0..4).fold(0, |word, i| word | four(sixteen * 4 + i, shift, 0x0303_0303) << (2 * i));
    let nibbles = |eight: usize| nibble_word(u64_at(numbers, eight * 8) & 0x0f0f_0f0f_0f0f_0f0f);
    match bits {
        8 => (0..8).for_each(|i| put_word(lines, i, row, four(i, 0, u32::MAX))),
        6 => {
            for s in 0..2 {
                put_word(lines, s * 3, row, nibbles(s * 2));
                put_word(lines, s * 3 + 1, row, nibbles(s * 2 + 1));
                put_word(lines, s * 3 + 2, row, pairs(s, 4));
            }
        }
        4 | 5 => (0..4).for_each(|i| put_word(lines, i, row, nibbles(i))),
        _ => (0..2).for_each(|s| put_word(lines, s, row, pairs(s, 0))),
    }
    if bits == 3 || bits == 5 {
        let above = (0..8).fold(0, |word, i| word | four(i, bits - 1, 0x0101_0101) << i);
        put_word(lines, usize::from(bits - 1), row, above);
    }
}

/// The nibbles of 16 bytes: low ones, then high ones.
pub(super) fn halves(bytes: &[u8]) -> [u8; UNIT] {
    let mut out = [0; UNIT];
    let (low, high) = out.split_at_mut(UNIT / 2);
    for ((low, high), &byte) in low.iter_mut().zip(high).zip(bytes) {
        (*low, *high) = (byte & 15, byte >> 4);
    }
    out
}

/// Copies the half at `at` of a block into entry `row` of the halves at line `to` of the parameters.
pub(super) fn put_half(block: &[u8], at: usize, out: &mut [u8], to: usize, row: usize) {
    out[to * TILE_ROWS + row * 2..][..2].copy_from_slice(&block[at..at + 2]);
}
