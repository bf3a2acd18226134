//! NVFP4: numbers of [`E2M1`](crate::format::E2M1), an E4M3 scale for every 16 and an f32 for the whole tensor;
//! `x = (scale·global)·number`.
//!
//! Checkpoints keep all three apart. A block here is 32 values of a row: two scales, then 16 bytes of neighbours; the global
//! scale of each row lies beside its blocks, in a packed tile after all of them.

use super::fp8::e4m3;
use super::units::Units;
use crate::format::{BlockFormat, E2M1};
use crate::packed::{TILE_ROWS, UNIT};

const BLOCK: usize = 18;

pub(super) struct Nvfp4;

impl Units for Nvfp4 {
    const FORMAT: BlockFormat = BlockFormat::Nvfp4;
    /// ggml's type of this name has other blocks and no global scale.
    const GGML: Option<u32> = None;

    fn numbers(block: &[u8], _: usize) -> [u8; UNIT] {
        std::array::from_fn(|i| block[2 + i / 2] >> (i % 2 * 4) & 15)
    }

    fn scale(block: &[u8], g: usize) -> (f32, f32) {
        (e4m3(block[g]) * 0.5, 0.0)
    }

    fn params(block: &[u8], out: &mut [u8], row: usize) {
        out[row] = block[0];
        out[TILE_ROWS + row] = block[1];
    }
}

/// A row of blocks → its values.
pub(super) fn dequantise_row(row: &[u8], global: &[u8], out: &mut [f32]) {
    let global = f32::from_le_bytes([0, 1, 2, 3].map(|i| global[i]));
    for (block, out) in row.chunks_exact(BLOCK).zip(out.chunks_exact_mut(UNIT)) {
        let numbers = Nvfp4::numbers(block, 0);
        for (i, (x, q)) in out.iter_mut().zip(numbers).enumerate() {
            let number = f32::from(E2M1[usize::from(q)]) - f32::from(BlockFormat::Nvfp4.offset());
            *x = Nvfp4::scale(block, i / 16).0 * global * number;
        }
    }
}

/// Rows of neighbours and rows of scales → rows of blocks.
pub(crate) fn join(data: &[u8], scales: &[u8]) -> Vec<u8> {
    let mut out = vec![0; data.len() / 16 * BLOCK];
    for ((block, pairs), scales) in out.chunks_exact_mut(BLOCK).zip(data.chunks_exact(16)).zip(scales.chunks_exact(2)) {
        block[..2].copy_from_slice(scales);
        block[2..].copy_from_slice(pairs);
    }
    out
}
