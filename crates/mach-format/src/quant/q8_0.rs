//! Q8_0: 32 values, one half scale `d`, then 32 signed bytes; `x = d·q`.

use super::{Codec, half_at, put_word, u64_at};
use crate::format::BlockFormat;
use crate::packed::TILE_ROWS;

pub(super) const CODEC: Codec = Codec { format: BlockFormat::Q8_0, ggml: Some(8), dequantise, pack };

fn dequantise(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    for (x, &q) in out.iter_mut().zip(&block[2..34]) {
        *x = f32::from(q as i8) * d;
    }
}

fn pack(block: &[u8], out: &mut [u8], row: usize) {
    for pair in 0..4 {
        // Codes are stored from −128 on.
        let codes = u64_at(block, 2 + pair * 8) ^ 0x8080_8080_8080_8080;
        put_word(out, 2 * pair, row, codes as u32);
        put_word(out, 2 * pair + 1, row, (codes >> 32) as u32);
    }
    out[8 * TILE_ROWS * 4 + row * 2..][..2].copy_from_slice(&block[..2]);
}
