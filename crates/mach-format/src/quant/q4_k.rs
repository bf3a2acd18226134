//! Q4_K: 256 values in 8 groups of 32. Halves `d` and `dmin`, twelve bytes with eight 6-bit scales and minima, 128
//! bytes of nibbles (32 bytes hold group `2i` low and `2i + 1` high); `x = d·scale·q − dmin·min`.

use super::{Codec, half_at, nibble_word, put_words};
use crate::format::BlockFormat;
use crate::packed::TILE_ROWS;

pub(super) const CODEC: Codec = Codec { format: BlockFormat::Q4K, ggml: Some(12), dequantise, pack };

/// Where the nibbles begin.
const QS: usize = 16;
/// Bytes of the lines of a packed block.
const LINES: usize = 256 * TILE_ROWS / 2;

/// Scale and minimum of group `j`.
pub(super) fn group(block: &[u8], j: usize) -> (u8, u8) {
    let s = &block[4..QS];
    if j < 4 { (s[j] & 63, s[j + 4] & 63) } else { (s[j + 4] & 15 | s[j - 4] >> 6 << 4, s[j + 4] >> 4 | s[j] >> 6 << 4) }
}

fn dequantise(block: &[u8], out: &mut [f32]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    for (j, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, min) = group(block, j);
        let (scale, min) = (d * f32::from(scale), dmin * f32::from(min));
        for (x, &byte) in out.iter_mut().zip(&block[QS + j / 2 * 32..]) {
            let q = if j % 2 == 0 { byte & 15 } else { byte >> 4 };
            *x = scale * f32::from(q) - min;
        }
    }
}

fn pack(block: &[u8], out: &mut [u8], row: usize) {
    let mut words = [0; 32];
    for (i, bytes) in block[QS..QS + 128].as_chunks().0.iter().enumerate() {
        // Of two groups.
        let (both, at) = (u64::from_le_bytes(*bytes), i / 4 * 8 + i % 4);
        words[at] = nibble_word(both & 0x0f0f_0f0f_0f0f_0f0f);
        words[at + 4] = nibble_word(both >> 4 & 0x0f0f_0f0f_0f0f_0f0f);
    }
    put_words(out, row, &words);
    for j in 0..8 {
        let (scale, min) = group(block, j);
        out[LINES + j * TILE_ROWS + row] = scale;
        out[LINES + (8 + j) * TILE_ROWS + row] = min;
    }
    let halves = LINES + 16 * TILE_ROWS;
    out[halves + row * 2..][..2].copy_from_slice(&block[..2]);
    out[halves + (TILE_ROWS + row) * 2..][..2].copy_from_slice(&block[2..4]);
}
