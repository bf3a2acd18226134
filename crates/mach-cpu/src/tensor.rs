//! The CPU's tensor: a 64-byte aligned f32 matrix in host memory.

use std::sync::atomic::{AtomicU64, Ordering};

use mach_format::AlignedBytes;

/// An f32 matrix `[rows, cols]`, row-major without padding.
#[derive(Clone)]
pub struct Tensor {
    data: AlignedBytes,
    rows: usize,
    cols: usize,
    version: u64,
}

/// A number that no other content of a tensor had.
fn new_version() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl Tensor {
    /// A zeroed matrix.
    pub fn zeroed(rows: usize, cols: usize) -> Self {
        Self { data: AlignedBytes::zeroed(rows * cols * 4), rows, cols, version: new_version() }
    }

    /// Gives the matrix another shape within its allocation.
    pub fn reshape(&mut self, rows: usize, cols: usize) {
        assert!(rows * cols * 4 <= self.data.len(), "{rows} x {cols} exceeds the allocation");
        (self.rows, self.cols, self.version) = (rows, cols, new_version());
    }

    /// Tells contents and shapes apart: it changes whenever they may have changed.
    pub(crate) fn version(&self) -> u64 {
        self.version
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// All values, row by row.
    pub fn values(&self) -> &[f32] {
        &bytemuck::cast_slice(&self.data)[..self.rows * self.cols]
    }

    /// All values, row by row.
    pub fn values_mut(&mut self) -> &mut [f32] {
        self.version = new_version();
        &mut bytemuck::cast_slice_mut(&mut self.data)[..self.rows * self.cols]
    }

    /// `n` rows from `row` on.
    pub fn part(&self, row: usize, n: usize) -> &[f32] {
        &self.values()[row * self.cols..(row + n) * self.cols]
    }

    /// `n` rows from `row` on.
    pub fn part_mut(&mut self, row: usize, n: usize) -> &mut [f32] {
        let cols = self.cols;
        &mut self.values_mut()[row * cols..(row + n) * cols]
    }
}
