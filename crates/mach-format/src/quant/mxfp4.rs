//! MXFP4: 32 values, one byte of exponent `e`, then 16 bytes of nibbles (byte `j` holds `j` low, `j + 16` high), codes
//! of [`E2M1`](crate::format::E2M1); `x = 2^(e − 127)·number`.
//!
//! Checkpoints of gpt-oss, DeepSeek and MLX keep exponents apart and put neighbours into a byte; [`join`] makes blocks.

use super::e8m0_half;
use super::units::{Units, halves};
use crate::format::BlockFormat;
use crate::packed::UNIT;

pub(super) struct Mxfp4;

impl Units for Mxfp4 {
    const FORMAT: BlockFormat = BlockFormat::Mxfp4;
    const GGML: Option<u32> = Some(39);

    fn numbers(block: &[u8], _: usize) -> [u8; UNIT] {
        halves(&block[1..])
    }

    fn scale(block: &[u8], _: usize) -> (f32, f32) {
        (e8m0_half(block[0]), 0.0)
    }

    fn params(block: &[u8], out: &mut [u8], row: usize) {
        out[row] = block[0];
    }
}

/// Rows of neighbours in a byte and rows of exponents → rows of blocks.
pub(crate) fn join(data: &[u8], scales: &[u8]) -> Vec<u8> {
    let mut out = vec![0; scales.len() * 17];
    for ((block, pairs), &e) in out.chunks_exact_mut(17).zip(data.chunks_exact(16)).zip(scales) {
        block[0] = e;
        block[1..].copy_from_slice(&neighbours_to_halves(pairs));
    }
    out
}

/// 16 bytes with `2j` low and `2j + 1` high → with `j` low and `j + 16` high.
pub(super) fn neighbours_to_halves(pairs: &[u8]) -> [u8; 16] {
    let number = |i: usize| pairs[i / 2] >> (i % 2 * 4) & 15;
    std::array::from_fn(|j| number(j) | number(j + 16) << 4)
}
