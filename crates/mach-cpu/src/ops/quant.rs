//! Activation rows as blocks of integers with outliers split off.
//!
//! Each row is quantised alone, in blocks of 16 to 64 columns with scale `max|x| / 32,512`, and stored as two planes
//! of int8: integers of 16 bits. With 8 bits ([`CpuOptions::activation_bits`](crate::CpuOptions)) there is one plane
//! and scale `max|x| / 127`: half the work, but 3.6 % of the routes of the built-in model change, where 16 bits change
//! none worth naming. A few hidden channels of real models are hundreds of times larger than the rest and would take
//! precision from their block: columns far above the row's trimmed mean magnitude are left out of the blocks and
//! multiplied in f32.
//!
//! A buffer remembers whose rows it holds: all experts of a layer and its shared block read the same ones.

use mach_format::AlignedBytes;

use super::{Context, grown};
use crate::kernels::QuantRows;
use crate::tensor::Tensor;

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
    source: Option<Source>,
    /// Rows of the source that are quantised.
    done: Vec<bool>,
    missing: Vec<u32>,
}

/// What the rows of a buffer were made of.
#[derive(Clone, Copy, PartialEq)]
struct Source {
    version: u64,
    address: usize,
    cols: usize,
}

impl QuantBuffer {
    /// Rows `rows` of `x`, `cols` columns from `column` on, quantised: row `i` of the result is row `i` of `x`. It is valid while `x` does not
    /// change and the buffer is not used for anything else; a buffer always has blocks of one size.
    pub fn quantise(&mut self, cx: Context<'_>, x: &Tensor, (column, cols): (usize, usize), rows: impl Iterator<Item = u32>, block: usize) -> QuantRows {
        assert!(cols.is_multiple_of(block) && column + cols <= x.cols(), "{cols} of {} columns in blocks of {block}", x.cols());
        let (all, blocks, words, planes) = (x.rows(), cols / block, cols.div_ceil(64), cx.planes);
        let values = x.values().as_ptr().wrapping_add(column);
        let source = Source { version: x.version(), address: values.addr(), cols };
        // Back at the end: a panic on the way leaves a buffer that holds nothing.
        if self.source.take() != Some(source) {
            self.done.clear();
            self.done.resize(all, false);
        }
        self.missing.clear();
        for row in rows {
            if !std::mem::replace(&mut self.done[row as usize], true) {
                self.missing.push(row);
            }
        }
        if self.q.len() < all * planes * cols {
            self.q = AlignedBytes::zeroed(all * planes * cols);
        }
        let to = QuantRows {
            q: self.q.as_mut_ptr().cast(),
            planes,
            whole: grown(&mut self.whole, if cx.k.i16 && planes == 2 { all * cols } else { 0 }).as_mut_ptr(),
            cols,
            block,
            scale: grown(&mut self.scale, all * blocks).as_mut_ptr(),
            bias: grown(&mut self.bias, all * blocks).as_mut_ptr(),
            sum: grown(&mut self.sum, all * planes * blocks).as_mut_ptr(),
            outliers: grown(&mut self.outliers, all).as_mut_ptr(),
            mask: grown(&mut self.mask, all * words).as_mut_ptr(),
            x: values,
            stride: x.cols(),
        };
        cx.rows(self.missing.len(), cols, &|i| {
            // SAFETY: `x` has the row, all buffers have room for as many as `x` has, and each row is written once.
            unsafe { (cx.k.quantise_row)(&to, self.missing[i] as usize) }
        });
        self.source = Some(source);
        to
    }
}
