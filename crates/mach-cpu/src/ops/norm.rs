//! Norms and additions of rows.

use super::{Context, Shared};
use crate::tensor::Tensor;

pub(crate) fn rms_norm(cx: Context<'_>, x: &Tensor, x_row: usize, rows: usize, w: &Tensor, eps: f32, out: &mut Tensor) {
    let cols = x.cols();
    assert!(w.values().len() == cols && out.cols() == cols && out.rows() >= rows, "shapes of a norm");
    let x = x.part(x_row, rows);
    let to = Shared::new(out.values_mut());
    cx.rows(rows, cols, &|r| {
        // SAFETY: shapes checked; each row is written once.
        unsafe { (cx.k.rms_norm)(x[r * cols..].as_ptr(), w.values().as_ptr(), cols, eps, to.at(r * cols)) }
    });
}

pub(crate) fn add(cx: Context<'_>, x: &mut Tensor, x_row: usize, rows: usize, y: &Tensor) {
    let cols = x.cols();
    assert_eq!(y.cols(), cols, "columns of a sum");
    let y = y.part(0, rows);
    let to = Shared::new(x.part_mut(x_row, rows));
    cx.rows(rows, cols, &|r| {
        // SAFETY: both slices have `rows` rows; each is written once.
        unsafe { (cx.k.add)(to.at(r * cols), y[r * cols..].as_ptr(), cols) }
    });
}

pub(crate) fn add_bias(cx: Context<'_>, x: &mut Tensor, rows: usize, bias: &Tensor) {
    let cols = x.cols();
    assert_eq!(bias.values().len(), cols, "columns of a bias");
    let to = Shared::new(x.part_mut(0, rows));
    cx.rows(rows, cols, &|r| {
        // SAFETY: the slice has `rows` rows; each is written once.
        unsafe { (cx.k.add)(to.at(r * cols), bias.values().as_ptr(), cols) }
    });
}

/// Calls `f` with the first value of each row.
pub(crate) fn each(cx: Context<'_>, x: &mut Tensor, x_row: usize, rows: usize, f: &(dyn Fn(*mut f32, usize) + Sync)) {
    let cols = x.cols();
    let to = Shared::new(x.part_mut(x_row, rows));
    // SAFETY: the slice has `rows` rows.
    cx.rows(rows, cols, &|r| f(unsafe { to.at(r * cols) }, cols));
}
