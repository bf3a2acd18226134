//! Activation rows as blocks of integers with outliers split off.
//!
//! Each row is quantised alone, in blocks of 16 to 64 columns with scale `max|x| / 32,512`, and stored as two planes
//! of int8: integers of 16 bits. With 8 bits ([`CpuOptions::activation_bits`](crate::CpuOptions)) there is one plane
//! and scale `max|x| / 127`: half the work, but 3.6 % of the routes of the built-in model change, where 16 bits change
//! none worth naming. A few hidden channels of real models are hundreds of times larger than the rest and would take
//! precision from their block: columns far above the row's trimmed mean magnitude are left out of the blocks and
//! multiplied in f32.

use mach_format::AlignedBytes;

use super::{Context, grown};
use crate::kernels::{PlainRows, QuantRows};

/// Reused memory for quantised rows.
#[derive(Default)]
pub(crate) struct QuantBuffer {
    q: AlignedBytes,
    whole: Vec<i16>,
    scale: Vec<f32>,
    bias: Vec<f32>,
    sum: Vec<i32>,
    outliers: Vec<u32>,
    mask: Vec<u64>,
    /// Addresses of the f32 rows.
    x: Vec<usize>,
}

impl QuantBuffer {
    /// Quantises the rows `ids` of `x`, `cols` wide; row `i` of the result is row `ids[i]`.
    ///
    /// # Safety
    /// Every id is a row of `x`, and `x` outlives the result.
    pub unsafe fn quantise(&mut self, cx: Context<'_>, x: PlainRows, ids: &[u32], cols: usize, block: usize) -> QuantRows {
        assert!(cols.is_multiple_of(block), "{cols} columns in blocks of {block}");
        let (rows, blocks, words, planes) = (ids.len(), cols / block, cols.div_ceil(64), cx.planes);
        if self.q.len() < rows * planes * cols {
            self.q = AlignedBytes::zeroed(rows * planes * cols);
        }
        for (to, &id) in grown(&mut self.x, rows).iter_mut().zip(ids) {
            // SAFETY: the caller vouches for the row.
            *to = unsafe { x.x.add(id as usize * x.stride) }.expose_provenance();
        }
        let to = QuantRows {
            q: self.q.as_mut_ptr().cast(),
            planes,
            whole: grown(&mut self.whole, if planes == 2 { rows * cols } else { 0 }).as_mut_ptr(),
            cols,
            block,
            scale: grown(&mut self.scale, rows * blocks).as_mut_ptr(),
            bias: grown(&mut self.bias, rows * blocks).as_mut_ptr(),
            sum: grown(&mut self.sum, rows * planes * blocks).as_mut_ptr(),
            outliers: grown(&mut self.outliers, rows).as_mut_ptr(),
            mask: grown(&mut self.mask, rows * words).as_mut_ptr(),
            x: self.x.as_ptr().cast(),
        };
        cx.rows(rows, cols, &|row| {
            // SAFETY: all buffers have room for `rows` rows, and each row is written once.
            unsafe { (cx.k.quantise_row)(&to, row) }
        });
        to
    }
}
