//! Rows as they lie in a checkpoint → tiles of the packed layout.

use crate::format::{Codes, WeightFormat};
use crate::packed::{PackedLayout, TILE_ROWS, UNIT};
use crate::quant::units::put_numbers;
use crate::quant::{self, affine};

/// One 64-byte line: a 4-byte word of each of 16 rows.
const LINE: usize = TILE_ROWS * 4;

/// Up to 16 consecutive rows in row-major order: data, scales, biases. Plain formats and blocks have only data; affine data
/// is MLX's: a little-endian stream of bits along the row.
pub(crate) type Rows<'a> = [&'a [u8]; 3];

/// Bytes of one row of each of [`Rows`].
pub(crate) const fn row_bytes(layout: &PackedLayout) -> [usize; 3] {
    match layout.format {
        WeightFormat::F32 => [layout.cols * 4, 0, 0],
        WeightFormat::F16 | WeightFormat::BF16 => [layout.cols * 2, 0, 0],
        WeightFormat::Affine { bits, group, scales } => {
            let params = layout.cols / group as usize * scales.bytes();
            [layout.cols * bits as usize / 8, params, params]
        }
        WeightFormat::Fp8 { group, scales } => [layout.cols, layout.cols / group as usize * scales.bytes(), 0],
        WeightFormat::Block(block) => [layout.cols / block.columns() * block.source_bytes(), layout.tail_bytes() / TILE_ROWS, 0],
    }
}

/// Writes one tile. `data` holds 1 to 16 whole rows; the rest of the tile becomes zero.
pub(crate) fn pack_tile(layout: &PackedLayout, [data, scale_rows, bias_rows]: Rows<'_>, tile: &mut [u8]) {
    let [data_row, scale_row, _] = row_bytes(layout);
    let count = data.len() / data_row;
    if count < TILE_ROWS {
        tile.fill(0);
    }
    match layout.format {
        WeightFormat::F32 => interleave(data, data_row, 0, data_row, tile, |w| w),
        WeightFormat::F16 | WeightFormat::BF16 => {
            let whole = data_row / 4 * 4;
            interleave(data, data_row, 0, whole, tile, |w| w);
            if whole < data_row {
                // An odd number of columns: the second half of the last word is zero.
                for (row, word) in data.chunks_exact(data_row).zip(tile[whole * TILE_ROWS..].chunks_exact_mut(4)) {
                    word.copy_from_slice(&[row[whole], row[whole + 1], 0, 0]);
                }
            }
        }
        WeightFormat::Affine { bits, group, scales } => {
            let per_group = group as usize * bits as usize / 8;
            let width = scales.bytes();
            for (g, block) in tile.chunks_exact_mut(layout.block_bytes()).enumerate() {
                let (lines, rest) = block.split_at_mut(layout.line_bytes());
                match bits {
                    8 => interleave(data, data_row, g * per_group, per_group, lines, |w| w),
                    4 => interleave(data, data_row, g * per_group, per_group, lines, split_nibbles),
                    _ => {
                        for (r, row) in data.chunks_exact(data_row).enumerate() {
                            let units = row[g * per_group..][..per_group].chunks_exact(bits as usize * UNIT / 8);
                            for (from, lines) in units.zip(lines.chunks_exact_mut(bits as usize * 64)) {
                                put_numbers(Codes::Bits(bits), &affine::numbers(bits, from), lines, r);
                            }
                        }
                    }
                }
                let (to_scales, to_biases) = rest.split_at_mut(TILE_ROWS * width);
                for (from, to) in [(scale_rows, to_scales), (bias_rows, to_biases)] {
                    for (row, out) in from.chunks_exact(scale_row).zip(to.chunks_exact_mut(width)) {
                        out.copy_from_slice(&row[g * width..][..width]);
                    }
                }
            }
        }
        WeightFormat::Fp8 { scales, .. } => {
            let (per_group, width) = (layout.block_columns(), scales.bytes());
            for (g, block) in tile.chunks_exact_mut(layout.block_bytes()).enumerate() {
                let (lines, to) = block.split_at_mut(layout.line_bytes());
                interleave(data, data_row, g * per_group, per_group, lines, |w| w);
                for (row, out) in scale_rows.chunks_exact(scale_row).zip(to.chunks_exact_mut(width)) {
                    out.copy_from_slice(&row[g * width..][..width]);
                }
            }
        }
        WeightFormat::Block(block) => {
            let (blocks, tail) = tile.split_at_mut(layout.tile_bytes() - layout.tail_bytes());
            quant::pack_tile(block, data, data_row, layout.block_bytes(), blocks);
            let rows = scale_rows.len().min(tail.len());
            tail[..rows].copy_from_slice(&scale_rows[..rows]);
        }
    }
}

/// MLX's word of eight nibbles (element `t` at bits `4t`) → byte `j` with element `j` low and `j + 4` high.
fn split_nibbles(word: u32) -> u32 {
    let spread = |half: u32| {
        let x = (half | half << 8) & 0x00ff_00ff;
        (x | x << 4) & 0x0f0f_0f0f
    };
    spread(word & 0xffff) | spread(word >> 16) << 4
}

/// Transposes `bytes` bytes from `at` on of every row in 4-byte words: word `w` of row `r` becomes word `r` of line
/// `w`. One source line of a row is consumed whole before the next row, because rows often lie a power of two apart.
fn interleave(src: &[u8], row_bytes: usize, at: usize, bytes: usize, lines: &mut [u8], map: impl Fn(u32) -> u32) {
    const BLOCK: usize = 16;
    let lines = lines.as_chunks_mut::<LINE>().0;
    for (block, lines) in lines[..bytes / 4].chunks_mut(BLOCK).enumerate() {
        let start = at + block * BLOCK * 4;
        for (r, row) in src.chunks_exact(row_bytes).enumerate().take(TILE_ROWS) {
            let words = row[start..start + lines.len() * 4].as_chunks::<4>().0;
            for (line, word) in lines.iter_mut().zip(words) {
                line.as_chunks_mut::<4>().0[r] = map(u32::from_le_bytes(*word)).to_le_bytes();
            }
        }
    }
}
