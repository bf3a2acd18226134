//! Q6_K: 256 values in 16 groups of 16. 128 bytes of low nibbles, 64 of upper bit pairs, 16 signed scales, the half
//! `d`; `x = d·scale·(q − 32)`.

use super::{Codec, half_at, nibble_word, put_words, u64_at};
use crate::format::BlockFormat;
use crate::packed::TILE_ROWS;

pub(super) const CODEC: Codec = Codec { format: BlockFormat::Q6K, ggml: Some(14), dequantise, pack };

const QH: usize = 128;
const SCALES: usize = 192;
const D: usize = 208;
/// Bytes of the lines of a packed block.
const LINES: usize = 256 * TILE_ROWS * 6 / 8;

/// Low nibbles and upper pairs of the eight values from `at` on, as bytes.
fn eight(block: &[u8], at: usize) -> (u64, u64) {
    // Each half of 128 has four runs of 32: nibbles low, low, high, high of two runs of bytes, pairs from the lowest up.
    let (half, run, l) = (at / 128, at % 128 / 32, at % 32);
    let low = u64_at(block, half * 64 + run % 2 * 32 + l) >> (run / 2 * 4) & 0x0f0f_0f0f_0f0f_0f0f;
    let high = u64_at(block, QH + half * 32 + l) >> (run * 2) & 0x0303_0303_0303_0303;
    (low, high)
}

fn dequantise(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, D);
    for (i, out) in out.chunks_exact_mut(8).enumerate() {
        let scale = d * f32::from(block[SCALES + i / 2] as i8);
        let (low, high) = eight(block, i * 8);
        for (x, code) in out.iter_mut().zip((low | high << 4).to_le_bytes()) {
            *x = scale * f32::from(code as i8 - 32);
        }
    }
}

fn pack(block: &[u8], out: &mut [u8], row: usize) {
    let mut words = [0; 48];
    for g in 0..16 {
        let ((low0, high0), (low1, high1)) = (eight(block, g * 16), eight(block, g * 16 + 8));
        words[g * 3] = nibble_word(low0);
        words[g * 3 + 1] = nibble_word(low1);
        let pairs = |high: u64| high as u32 | ((high >> 32) as u32) << 2;
        words[g * 3 + 2] = pairs(high0) | pairs(high1) << 4;
        out[LINES + g * TILE_ROWS + row] = block[SCALES + g];
    }
    put_words(out, row, &words);
    out[LINES + 16 * TILE_ROWS + row * 2..][..2].copy_from_slice(&block[D..D + 2]);
}
