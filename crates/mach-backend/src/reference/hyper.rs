//! Hyper-connections, row by row.

use super::{Tensor, Weight, rms, sigmoid};
use crate::hyper::{HyperSpec, HyperWeights};

/// `project · x / rms(x)`: the numbers of a mixture before their factors.
fn numbers(spec: &HyperSpec, w: &HyperWeights<'_, Tensor, Weight>, x: &[f32]) -> Vec<f32> {
    let inv = rms(x, spec.norm_eps);
    w.project.apply(x).into_iter().map(|f| f * inv).collect()
}

/// `Σ_j read[j] · stream j`.
fn read(spec: &HyperSpec, x: &[f32], weights: impl Iterator<Item = f32>, h: &mut [f32]) {
    h.fill(0.0);
    for (stream, w) in x.chunks_exact(x.len() / spec.streams).zip(weights) {
        h.iter_mut().zip(stream).for_each(|(h, x)| *h += w * x);
    }
}

pub(super) fn mix(spec: &HyperSpec, w: &HyperWeights<'_, Tensor, Weight>, x: &Tensor, x_row: usize, rows: usize, h: &mut Tensor, mix: &mut Tensor) {
    let (n, eps) = (spec.streams, spec.eps);
    let (base, scale) = (w.base.row(0), w.scale.row(0));
    for r in 0..rows {
        let x = x.row(x_row + r);
        let f = numbers(spec, w, x);
        read(spec, x, (0..n).map(|j| sigmoid(f[j] * scale[0] + base[j]) + eps), h.row_mut(r));
        let out = mix.row_mut(r);
        (0..n).for_each(|i| out[i] = 2.0 * sigmoid(f[n + i] * scale[1] + base[n + i]));
        let c = &mut out[n..];
        for (j, row) in c.chunks_exact_mut(n).enumerate() {
            let at = 2 * n + j * n;
            row.iter_mut().enumerate().for_each(|(i, c)| *c = f[at + i] * scale[2] + base[at + i]);
            let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f32 = row.iter().map(|c| (c - max).exp()).sum();
            row.iter_mut().for_each(|c| *c = (*c - max).exp() / sum + eps);
        }
        let columns = |c: &mut [f32]| {
            for i in 0..n {
                let sum: f32 = (0..n).map(|j| c[j * n + i]).sum();
                (0..n).for_each(|j| c[j * n + i] /= sum + eps);
            }
        };
        columns(c);
        for _ in 1..spec.rounds {
            for row in c.chunks_exact_mut(n) {
                let sum: f32 = row.iter().sum();
                row.iter_mut().for_each(|c| *c /= sum + eps);
            }
            columns(c);
        }
    }
}

pub(super) fn add(spec: &HyperSpec, x: &mut Tensor, x_row: usize, rows: usize, y: &Tensor, mix: &Tensor) {
    let n = spec.streams;
    for r in 0..rows {
        let (y, m) = (y.row(r), mix.row(r));
        let x = x.row_mut(x_row + r);
        let old = x.to_vec();
        let hidden = old.len() / n;
        for i in 0..n {
            for c in 0..hidden {
                x[i * hidden + c] = m[i] * y[c] + (0..n).map(|j| m[n + j * n + i] * old[j * hidden + c]).sum::<f32>();
            }
        }
    }
}

pub(super) fn head(spec: &HyperSpec, w: &HyperWeights<'_, Tensor, Weight>, x: &Tensor, x_row: usize, rows: usize, out: &mut Tensor) {
    for r in 0..rows {
        let x = x.row(x_row + r);
        let f = numbers(spec, w, x);
        read(spec, x, (0..spec.streams).map(|j| sigmoid(f[j] * w.scale.row(0)[0] + w.base.row(0)[j]) + spec.eps), out.row_mut(r));
    }
}
