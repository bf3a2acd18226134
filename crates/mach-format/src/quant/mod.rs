//! Quantised block formats, one file each.

pub mod affine;
pub mod fp8;
pub mod grids;
pub(crate) mod iq;
mod k;
mod legacy;
pub(crate) mod mxfp4;
pub(crate) mod nvfp4;
pub(crate) mod q4_k;
pub(crate) mod q6_k;
pub(crate) mod q8_0;
pub(crate) mod units;

use half::f16;

use self::units::codec as codec_of;
use crate::format::BlockFormat;
use crate::packed::TILE_ROWS;

/// How the blocks of one GGUF type are read. A new type is one file with one of these, and a line in [`CODECS`].
pub(crate) struct Codec {
    pub(crate) format: BlockFormat,
    /// Number of the type in GGUF files, where they have it.
    pub(crate) ggml: Option<u32>,
    /// One block → its values, with the roundings of ggml's own dequantisation.
    pub(crate) dequantise: fn(&[u8], &mut [f32]),
    /// One block of one row of a tile → its words in the lines and its entries in what follows them: the packed block
    /// of 16 rows, the row in it.
    pub(crate) pack: fn(&[u8], &mut [u8], usize),
}

/// Every block type that has kernels.
static CODECS: [Codec; 21] = [
    q8_0::CODEC,
    q4_k::CODEC,
    q6_k::CODEC,
    codec_of::<legacy::Q40>(),
    codec_of::<legacy::Q41>(),
    codec_of::<legacy::Q50>(),
    codec_of::<legacy::Q51>(),
    codec_of::<k::Q2K>(),
    codec_of::<k::Q3K>(),
    codec_of::<k::Q5K>(),
    codec_of::<iq::Iq2Xxs>(),
    codec_of::<iq::Iq2Xs>(),
    codec_of::<iq::Iq2S>(),
    codec_of::<iq::Iq3Xxs>(),
    codec_of::<iq::Iq3S>(),
    codec_of::<iq::Iq1S>(),
    codec_of::<iq::Iq1M>(),
    codec_of::<legacy::Iq4Nl>(),
    codec_of::<k::Iq4Xs>(),
    codec_of::<mxfp4::Mxfp4>(),
    codec_of::<nvfp4::Nvfp4>(),
];

/// The format of a GGUF type, if it can be computed with.
pub(crate) fn block_format(ggml: u32) -> Option<BlockFormat> {
    CODECS.iter().find(|c| c.ggml == Some(ggml)).map(|c| c.format)
}

/// Number of a block format in GGUF files, where they have it.
pub(crate) fn ggml_type(format: BlockFormat) -> Option<u32> {
    codec(format).ggml
}

pub(crate) fn codec(format: BlockFormat) -> &'static Codec {
    // In the order of the formats, which a test holds.
    &CODECS[format as usize]
}

/// A row of blocks → its values. `global` is the f32 beside the row, of NVFP4 alone.
pub(crate) fn dequantise_row(format: BlockFormat, row: &[u8], global: &[u8], out: &mut [f32]) {
    if format == BlockFormat::Nvfp4 {
        return nvfp4::dequantise_row(row, global, out);
    }
    let dequantise = codec(format).dequantise;
    for (block, out) in row.chunks_exact(format.source_bytes()).zip(out.chunks_exact_mut(format.columns())) {
        dequantise(block, out);
    }
}

/// Up to 16 rows of blocks → one tile, whose other rows are zero already. `packed` is the size of a packed block.
pub(crate) fn pack_tile(format: BlockFormat, rows: &[u8], row_bytes: usize, packed: usize, tile: &mut [u8]) {
    let (pack, source) = (codec(format).pack, format.source_bytes());
    // Block after block, so that the packed block of all rows stays in the nearest cache.
    for (b, out) in tile.chunks_exact_mut(packed).enumerate() {
        for (r, row) in rows.chunks_exact(row_bytes).enumerate() {
            pack(&row[b * source..][..source], out, r);
        }
    }
}

/// Half of `2^(e − 127)`, the scale of doubled numbers; 255 is no number.
pub(crate) fn e8m0_half(e: u8) -> f32 {
    match e {
        0 | 1 => f32::from_bits(0x0020_0000 << e),
        255 => f32::NAN,
        _ => f32::from_bits(u32::from(e - 1) << 23),
    }
}

fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// Puts the word of `row` into line `line` of a packed block.
fn put_word(out: &mut [u8], line: usize, row: usize, word: u32) {
    out[(line * TILE_ROWS + row) * 4..][..4].copy_from_slice(&word.to_le_bytes());
}

/// Puts a word of `row` into each line of a packed block. They are all there before the first is put, so that they are computed
/// in vectors: stores far apart would come between.
fn put_words<const LINES: usize>(out: &mut [u8], row: usize, words: &[u32; LINES]) {
    for (line, word) in out.as_chunks_mut::<{ TILE_ROWS * 4 }>().0.iter_mut().zip(words) {
        line.as_chunks_mut::<4>().0[row] = word.to_le_bytes();
    }
}

/// Eight codes below 16 → byte `j` with code `j` low and `j + 4` high. Codes are the bytes of `codes`, lowest first.
fn nibble_word(codes: u64) -> u32 {
    codes as u32 | ((codes >> 32) as u32) << 4
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::WeightFormat;
    use crate::packed::PackedLayout;

    /// Protects the lossless way from blocks to tiles: every element of a tile is the value that its block says, for
    /// full and for short tiles.
    #[test]
    fn tiles_hold_the_values_of_their_blocks() {
        let mut seed = 7u32;
        let mut byte = || {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 24) as u8
        };
        for format in CODECS.iter().map(|c| c.format) {
            for rows in [1, 5, 16] {
                let (cols, source) = (512, format.source_bytes());
                let layout = PackedLayout::new(rows, cols, WeightFormat::Block(format));
                let row_bytes = cols / format.columns() * source;
                let mut data: Vec<u8> = (0..rows * row_bytes).map(|_| byte()).collect();
                for block in data.chunks_exact_mut(source) {
                    // Halves (and exponents) of a sane size where the scales lie.
                    let (high, places): (u8, &[usize]) = match format {
                        BlockFormat::Q4K | BlockFormat::Q4_1 | BlockFormat::Q5_1 | BlockFormat::Q5K => (0x20, &[1, 3]),
                        BlockFormat::Q6K => (0x20, &[209]),
                        BlockFormat::Q2K => (0x20, &[81, 83]),
                        BlockFormat::Q3K => (0x20, &[109]),
                        BlockFormat::Iq1M => (0x20, &[55]),
                        BlockFormat::Mxfp4 => (0x70, &[0]),
                        BlockFormat::Nvfp4 => (0x30, &[0, 1]),
                        _ => (0x20, &[1]),
                    };
                    for &at in places {
                        block[at] = high | block[at] & 0x0f;
                    }
                }
                let mut tile = vec![0; layout.tile_bytes()];
                let (blocks, tail) = tile.split_at_mut(layout.tile_bytes() - layout.tail_bytes());
                pack_tile(format, &data, row_bytes, layout.block_bytes(), blocks);
                tail.chunks_exact_mut(4).for_each(|global| global.copy_from_slice(&1f32.to_le_bytes()));
                let mut values = vec![0.0; cols];
                for r in 0..TILE_ROWS {
                    if r < rows {
                        dequantise_row(format, &data[r * row_bytes..][..row_bytes], &1f32.to_le_bytes(), &mut values);
                    } else {
                        values.fill(0.0);
                    }
                    for (c, want) in values.iter().enumerate() {
                        let got = layout.element(&tile, r, c);
                        // The tile's rule is one fused rounding, ggml's are two.
                        assert!((got - want).abs() <= 1e-4 * want.abs().max(0.05), "{format:?} row {r} column {c}: {got} {want}");
                    }
                }
            }
        }
    }

    /// Protects the table: every format is found by its number.
    #[test]
    fn formats_have_numbers() {
        for found in &CODECS {
            assert_eq!(codec(found.format).format, found.format);
            assert!(found.ggml.is_none_or(|ggml| block_format(ggml) == Some(found.format)));
        }
        assert_eq!(block_format(0), None);
    }
}
