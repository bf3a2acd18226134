//! The CPU's tensor: a 64-byte aligned f32 matrix in host memory.

use mach_format::AlignedBytes;

/// An f32 matrix `[rows, cols]`, row-major without padding.
#[derive(Clone)]
pub struct Tensor {
    data: AlignedBytes,
    rows: usize,
    cols: usize,
}

impl Tensor {
    /// A zeroed matrix.
    pub fn zeroed(rows: usize, cols: usize) -> Self {
        Self { data: AlignedBytes::zeroed(rows * cols * 4), rows, cols }
    }

    /// Gives the matrix another shape within its allocation.
    pub fn reshape(&mut self, rows: usize, cols: usize) {
        assert!(rows * cols * 4 <= self.data.len(), "{rows} x {cols} exceeds the allocation");
        (self.rows, self.cols) = (rows, cols);
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
