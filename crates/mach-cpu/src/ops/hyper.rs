//! Hyper-connections: reading a block's input out of several streams, and writing its output back.

use mach_backend::{HyperSpec, HyperWeights};

use super::linear::{Product, Scratch, Weight, exact, identity, plain_from, products};
use super::{Context, Shared, grown};
use crate::kernels::MAX_STREAMS;
use crate::tensor::Tensor;

/// `project · x` of each row, `[rows, mixes]`, and after them `1 / rms` of each row.
fn numbers<'s>(cx: Context<'_>, scratch: &'s mut Scratch, spec: &HyperSpec, w: &Weight, x: &Tensor, x_row: usize, rows: usize) -> &'s mut [f32] {
    let mixes = w.layout.rows;
    assert!(w.layout.cols == x.cols() && x_row + rows <= x.rows(), "shapes of a hyper-connection");
    assert!((1..=MAX_STREAMS).contains(&spec.streams) && x.cols().is_multiple_of(spec.streams), "{} streams", spec.streams);
    let ids = identity(&mut scratch.identity, rows);
    let all = grown(&mut scratch.values, rows * (mixes + 1));
    let to = Shared::new(all);
    let acts = exact(w.layout.format, plain_from(x, x_row));
    let product = Product { layout: w.layout, data: w.data(), per: 1, acts, rows: ids };
    // SAFETY: shapes checked; units write disjoint numbers, and each row its own norm.
    unsafe {
        products(cx, &[product], &|done| done.store(to, mixes, 0, mixes));
        cx.rows(rows, x.cols(), &|r| (cx.k.inverse_rms)(x.part(x_row + r, 1).as_ptr(), x.cols(), spec.norm_eps, to.at(rows * mixes + r)));
    }
    all
}

/// `weights[j] = sigmoid(numbers[j] · scale + base[j]) · factor + add`.
fn squash(cx: Context<'_>, numbers: &[f32], scale: f32, base: &[f32], factor: f32, add: f32, weights: &mut [f32]) {
    for ((w, f), b) in weights.iter_mut().zip(numbers).zip(base) {
        *w = f * scale + b;
    }
    // SAFETY: as many values as it says.
    unsafe { (cx.k.sigmoid)(weights.as_mut_ptr(), weights.len()) };
    weights.iter_mut().for_each(|w| *w = *w * factor + add);
}

/// `h = Σ_j weights[j] · stream_j`.
fn read(cx: Context<'_>, x: &[f32], weights: &[f32], h: &mut [f32]) {
    h.fill(0.0);
    for (stream, &w) in x.chunks_exact(h.len()).zip(weights) {
        // SAFETY: both have as many values as `h`.
        unsafe { (cx.k.add_scaled)(h.as_mut_ptr(), w, stream.as_ptr(), h.len()) };
    }
}

#[allow(clippy::too_many_arguments)]
pub(crate) fn mix(
    cx: Context<'_>,
    scratch: &mut Scratch,
    spec: &HyperSpec,
    w: &HyperWeights<'_, Tensor, Weight>,
    x: &Tensor,
    x_row: usize,
    rows: usize,
    h: &mut Tensor,
    mix: &mut Tensor,
) {
    let (n, mixes, hidden) = (spec.streams, spec.mixes(), x.cols() / spec.streams.max(1));
    assert!(w.project.layout.rows == mixes && w.base.cols() == mixes && w.scale.cols() == 3, "weights of a hyper-connection");
    assert!(h.cols() == hidden && mix.cols() == n * (1 + n) && rows <= h.rows().min(mix.rows()), "outputs of a hyper-connection");
    let numbers = &*numbers(cx, scratch, spec, w.project, x, x_row, rows);
    let (base, scale) = (w.base.values(), w.scale.values());
    let (h, mix) = (Shared::new(h.values_mut()), Shared::new(mix.values_mut()));
    cx.rows(rows, 2 * x.cols(), &|r| {
        // SAFETY: each row has its own outputs.
        let (h, out) =
            unsafe { (std::slice::from_raw_parts_mut(h.at(r * hidden), hidden), std::slice::from_raw_parts_mut(mix.at(r * n * (1 + n)), n * (1 + n))) };
        let inverse = numbers[rows * mixes + r];
        let mut f = [0.0; MAX_STREAMS * (2 + MAX_STREAMS)];
        let f = &mut f[..mixes];
        f.iter_mut().zip(&numbers[r * mixes..]).for_each(|(f, x)| *f = x * inverse);
        let mut reading = [0.0; MAX_STREAMS];
        squash(cx, &f[..n], scale[0], base, 1.0, spec.eps, &mut reading[..n]);
        read(cx, x.part(x_row + r, 1), &reading[..n], h);
        let (writing, c) = out.split_at_mut(n);
        squash(cx, &f[n..2 * n], scale[1], &base[n..], 2.0, 0.0, writing);
        for ((c, f), b) in c.iter_mut().zip(&f[2 * n..]).zip(&base[2 * n..]) {
            *c = f * scale[2] + b;
        }
        for row in c.chunks_exact_mut(n) {
            // SAFETY: as many values as it says.
            unsafe { (cx.k.softmax)(row.as_mut_ptr(), n) };
            row.iter_mut().for_each(|c| *c += spec.eps);
        }
        sinkhorn(c, n, spec);
    });
}

/// Columns, then rows and columns in turn, are divided by their sums.
fn sinkhorn(c: &mut [f32], n: usize, spec: &HyperSpec) {
    for round in 0..spec.rounds {
        if round > 0 {
            for row in c.chunks_exact_mut(n) {
                let sum = row.iter().sum::<f32>() + spec.eps;
                row.iter_mut().for_each(|c| *c /= sum);
            }
        }
        for i in 0..n {
            let sum = (0..n).map(|j| c[j * n + i]).sum::<f32>() + spec.eps;
            (0..n).for_each(|j| c[j * n + i] /= sum);
        }
    }
}

pub(crate) fn add(cx: Context<'_>, spec: &HyperSpec, x: &mut Tensor, x_row: usize, rows: usize, y: &Tensor, mix: &Tensor) {
    let (n, cols, hidden) = (spec.streams, x.cols(), y.cols());
    assert!(n <= MAX_STREAMS && cols == n * hidden && mix.cols() == n * (1 + n), "shapes of a hyper-connection");
    assert!(rows <= y.rows().min(mix.rows()), "{rows} rows of a hyper-connection");
    let to = Shared::new(x.part_mut(x_row, rows));
    cx.rows(rows, cols, &|r| {
        // SAFETY: shapes checked; each row is written once.
        unsafe { (cx.k.hyper_add)(to.at(r * cols), n, hidden, y.part(r, 1).as_ptr(), mix.part(r, 1).as_ptr()) }
    });
}

#[allow(clippy::too_many_arguments)]
pub(crate) fn head(
    cx: Context<'_>,
    scratch: &mut Scratch,
    spec: &HyperSpec,
    w: &HyperWeights<'_, Tensor, Weight>,
    x: &Tensor,
    x_row: usize,
    rows: usize,
    out: &mut Tensor,
) {
    let (n, hidden) = (spec.streams, x.cols() / spec.streams.max(1));
    assert!(w.project.layout.rows == n && w.base.cols() == n && w.scale.cols() == 1, "weights of a hyper-connection");
    assert!(out.cols() == hidden && rows <= out.rows(), "output of a hyper-connection");
    let numbers = &*numbers(cx, scratch, spec, w.project, x, x_row, rows);
    let to = Shared::new(out.values_mut());
    cx.rows(rows, x.cols(), &|r| {
        // SAFETY: each row has its own output.
        let h = unsafe { std::slice::from_raw_parts_mut(to.at(r * hidden), hidden) };
        let inverse = numbers[rows * n + r];
        let mut f = [0.0; MAX_STREAMS];
        f.iter_mut().zip(&numbers[r * n..][..n]).for_each(|(f, x)| *f = x * inverse);
        let mut reading = [0.0; MAX_STREAMS];
        squash(cx, &f[..n], w.scale.values()[0], w.base.values(), 1.0, spec.eps, &mut reading[..n]);
        read(cx, x.part(x_row + r, 1), &reading[..n], h);
    });
}
