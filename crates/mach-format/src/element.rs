//! The packed layout read element by element: its definition, for tests and the reference backend.

use crate::format::{BlockFormat, Codes, E2M1, ScaleType, WeightFormat};
use crate::packed::{PackedLayout, TILE_ROWS, UNIT};
use crate::quant::e8m0_half;
use crate::quant::fp8::e4m3;

impl PackedLayout {
    /// Reads element `(row, col)` out of one tile. `tile` has `tile_bytes()` bytes, `row` is 0..16 within the tile.
    pub fn element(&self, tile: &[u8], row: usize, col: usize) -> f32 {
        match self.format {
            WeightFormat::F32 => {
                let at = (col * TILE_ROWS + row) * 4;
                f32::from_le_bytes([tile[at], tile[at + 1], tile[at + 2], tile[at + 3]])
            }
            WeightFormat::F16 | WeightFormat::BF16 => {
                let at = (col / 2 * TILE_ROWS + row) * 4 + col % 2 * 2;
                let bits = u16::from_le_bytes([tile[at], tile[at + 1]]);
                if self.format == WeightFormat::F16 { half::f16::from_bits(bits).to_f32() } else { half::bf16::from_bits(bits).to_f32() }
            }
            WeightFormat::Affine { scales, .. } => {
                let (lines, params, within) = self.block(tile, col);
                let q = f32::from(self.number(lines, row, within));
                read_scale(params, row, scales).mul_add(q, read_scale(&params[TILE_ROWS * scales.bytes()..], row, scales))
            }
            WeightFormat::Fp8 { scales, .. } => {
                let (lines, params, within) = self.block(tile, col);
                read_scale(params, row, scales) * e4m3(lines[(within / 4 * TILE_ROWS + row) * 4 + within % 4])
            }
            WeightFormat::Block(block) => {
                let (lines, params, within) = self.block(tile, col);
                let q = f32::from(self.number(lines, row, within));
                let (scale, min) = scale(block, params, row, within);
                let scale = if block == BlockFormat::Nvfp4 { scale * read_scale(&tile[tile.len() - TILE_ROWS * 4..], row, ScaleType::F32) } else { scale };
                if block.offset() == 0 { scale.mul_add(q, -min) } else { scale * (q - f32::from(block.offset())) }
            }
        }
    }

    /// Lines and parameters of the block of a column, and the column within it.
    fn block<'a>(&self, tile: &'a [u8], col: usize) -> (&'a [u8], &'a [u8], usize) {
        let columns = self.block_columns();
        let (lines, params) = tile[col / columns * self.block_bytes()..][..self.block_bytes()].split_at(self.line_bytes());
        (lines, params, col % columns)
    }

    /// The (unsigned) number of column `within` of a block.
    fn number(&self, lines: &[u8], row: usize, within: usize) -> u8 {
        let Some(codes) = self.codes() else { return 0 };
        let (unit, c) = (&lines[within / UNIT * codes.unit_bytes()..], within % UNIT);
        let byte = |line: usize| unit[(line * TILE_ROWS + row) * 4 + c % 4];
        let nibble = |line: usize| if c % 8 < 4 { byte(line) & 15 } else { byte(line) >> 4 };
        let pair = |line: usize| byte(line) >> (c % 16 / 4 * 2) & 3;
        let bit = |line: usize| byte(line) >> (c / 4) & 1;
        match codes {
            Codes::Bits(2) => pair(c / 16),
            Codes::Bits(3) => pair(c / 16) | bit(2) << 2,
            Codes::Bits(5) => nibble(c / 8) | bit(4) << 4,
            Codes::Bits(6) => nibble(c / 16 * 3 + c % 16 / 8) | pair(c / 16 * 3 + 2) << 4,
            Codes::Bits(8) => byte(c / 4),
            Codes::Bits(_) => nibble(c / 8),
            Codes::E2m1 => E2M1[usize::from(nibble(c / 8))],
        }
    }
}

/// Scale and minimum of column `within` of a block: its value is `scale·number − min`, or `scale·(number − offset)`.
fn scale(block: BlockFormat, params: &[u8], row: usize, within: usize) -> (f32, f32) {
    let [small, _] = block.params();
    let byte = |line: usize| params[line * TILE_ROWS + row];
    let half = |i: usize| read_scale(&params[(small + 2 * i) * TILE_ROWS..], row, ScaleType::F16);
    match block {
        BlockFormat::Q8_0 => (half(0), 0.0),
        BlockFormat::Q4K => (half(0) * f32::from(byte(within / 32)), half(1) * f32::from(byte(8 + within / 32))),
        BlockFormat::Q6K => (half(0) * f32::from(byte(within / 16) as i8), 0.0),
        BlockFormat::Mxfp4 => (e8m0_half(byte(0)), 0.0),
        BlockFormat::Nvfp4 => (e4m3(byte(within / 16)) * 0.5, 0.0),
    }
}

fn read_scale(at: &[u8], row: usize, ty: ScaleType) -> f32 {
    match ty {
        ScaleType::F32 => {
            let b = &at[row * 4..row * 4 + 4];
            f32::from_le_bytes([b[0], b[1], b[2], b[3]])
        }
        ScaleType::F16 => half::f16::from_le_bytes([at[row * 2], at[row * 2 + 1]]).to_f32(),
        ScaleType::BF16 => half::bf16::from_le_bytes([at[row * 2], at[row * 2 + 1]]).to_f32(),
    }
}
