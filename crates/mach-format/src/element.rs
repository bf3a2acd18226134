//! The packed layout read element by element: its definition, for tests and the reference backend.

use crate::format::{BlockFormat, Codes, E2M1, IQ4, ScaleType, WeightFormat};
use crate::packed::{PackedLayout, TILE_ROWS, UNIT};
use crate::quant::e8m0_half;
use crate::quant::fp8::e4m3;
use crate::quant::grids::{IQ1, IQ2S, IQ2XS, IQ2XXS, IQ3S, IQ3XXS};
use crate::quant::iq::{even_signs, mirror};

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
                let unit = &lines[within / UNIT * block.codes().unit_bytes()..];
                let (scale, min) = scale(block, [unit, params], row, within);
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
            Codes::Iq4 => IQ4[usize::from(nibble(c / 8))],
            _ => grid(codes, unit, row, c / 8)[c % 8],
        }
    }
}

/// Numbers `8·l..8·l + 8` of a row of a unit that holds points of a grid.
fn grid(codes: Codes, unit: &[u8], row: usize, l: usize) -> [u8; 8] {
    let word = |line: usize| u32::from_le_bytes([0, 1, 2, 3].map(|j| unit[(line * TILE_ROWS + row) * 4 + j]));
    // A byte of the row's words; then bytes of rows that follow so many lines.
    let index = |i: usize| usize::from((word(i / 4) >> (i % 4 * 8)) as u8);
    let extra = |lines: usize, i: usize| usize::from(unit[lines * 64 + i * TILE_ROWS + row]);
    let fours = |a: u32, b: u32| (u64::from(a) | u64::from(b) << 32).to_le_bytes();
    let shift = |index: usize, down: bool| IQ1[index].to_le_bytes().map(|q| if down { q } else { q + 2 });
    match codes {
        Codes::Iq2Xxs => mirror(IQ2XXS[index(l)].to_le_bytes(), even_signs(word(1) >> (7 * l)), 64),
        Codes::Iq2Xs => {
            let q = word(l / 2) >> (l % 2 * 16) & 0xffff;
            mirror(IQ2XS[(q & 511) as usize].to_le_bytes(), even_signs(q >> 9), 64)
        }
        Codes::Iq2S => mirror(IQ2S[index(l) | (extra(2, 0) >> (2 * l) & 3) << 8].to_le_bytes(), index(4 + l) as u8, 64),
        Codes::Iq3Xxs => mirror(fours(IQ3XXS[index(2 * l)], IQ3XXS[index(2 * l + 1)]), even_signs(word(2) >> (7 * l)), 64),
        Codes::Iq3S => {
            let point = |i: usize| IQ3S[index(i) | (extra(3, 0) >> i & 1) << 8];
            mirror(fours(point(2 * l), point(2 * l + 1)), index(8 + l) as u8, 16)
        }
        Codes::Iq1S => {
            let high = extra(1, 0) | extra(1, 1) << 8;
            shift(index(l) | (high >> (3 * l) & 7) << 8, high >> 15 == 1)
        }
        _ => {
            let high = extra(1, l / 2) >> (l % 2 * 4);
            shift(index(l) | (high & 7) << 8, high & 8 == 8)
        }
    }
}

/// Scale and minimum of column `within` of a block: its value is `scale·number − min`, or `scale·(number − offset)`.
fn scale(block: BlockFormat, [unit, params]: [&[u8]; 2], row: usize, within: usize) -> (f32, f32) {
    let [small, _] = block.params();
    let byte = |line: usize| params[line * TILE_ROWS + row];
    let half = |i: usize| read_scale(&params[(small + 2 * i) * TILE_ROWS..], row, ScaleType::F16);
    // Scales of grids, most of them beside the indices of their unit: twice the number and one, times a power of two.
    let nibble = |byte: u8, i: usize| byte >> (i % 2 * 4) & 15;
    let odd = |n: u8, unit: f32| (half(0) * f32::from(2 * n + 1) * unit, 0.0);
    let (top, extra) = (|line: usize| unit[(line * TILE_ROWS + row) * 4 + 3] >> 4, |at: usize| unit[at + row]);
    match block {
        BlockFormat::Q8_0 | BlockFormat::Q4_0 | BlockFormat::Q5_0 | BlockFormat::Iq4Nl => (half(0), 0.0),
        BlockFormat::Q4_1 | BlockFormat::Q5_1 => (half(0), -half(1)),
        BlockFormat::Q2K => (half(0) * f32::from(byte(within / 16) & 15), half(1) * f32::from(byte(within / 16) >> 4)),
        BlockFormat::Iq4Xs => (half(0) * f32::from(byte(within / 32) as i8), 0.0),
        BlockFormat::Iq2Xxs => odd(top(1), 0.125),
        BlockFormat::Iq2Xs => odd(nibble(extra(128), within / 16), 0.125),
        BlockFormat::Iq2S => odd(nibble(extra(144), within / 16), 0.125),
        BlockFormat::Iq3Xxs => odd(top(2), 0.25),
        BlockFormat::Iq3S => odd(nibble(byte(within / 64), within / 32), 1.0),
        BlockFormat::Iq1S => odd(extra(80) >> 4 & 7, 0.125),
        BlockFormat::Iq1M => odd(nibble(extra(96), within / 16), 0.125),
        BlockFormat::Q4K | BlockFormat::Q5K => (half(0) * f32::from(byte(within / 32)), half(1) * f32::from(byte(8 + within / 32))),
        BlockFormat::Q6K | BlockFormat::Q3K => (half(0) * f32::from(byte(within / 16) as i8), 0.0),
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
