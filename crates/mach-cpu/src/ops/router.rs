//! Router: f32 scores, softmax over all experts, top k.

use mach_backend::RouterSpec;

use super::linear::{Product, Scratch, Weight, exact, identity, plain, products};
use super::{Context, Shared, grown};
use crate::kernels::LANES;
use crate::tensor::Tensor;

/// Choices of a batch of rows, largest weight first within a row.
#[derive(Default)]
pub struct Routes {
    pub(crate) ids: Vec<u32>,
    pub(crate) weights: Vec<f32>,
}

pub(crate) fn route(cx: Context<'_>, scratch: &mut Scratch, spec: &RouterSpec, x: &Tensor, rows: usize, w: &Weight, routes: &mut Routes) {
    let (experts, k) = (spec.experts, spec.top_k);
    assert!(w.layout.rows == experts && w.layout.cols == x.cols() && rows <= x.rows(), "shapes of a router");
    assert!(k <= experts, "top {k} of {experts}");
    let ids = identity(&mut scratch.identity, rows);
    let scores = Shared::new(grown(&mut scratch.values, rows * experts));
    let product = Product { layout: w.layout, data: w.data(), per: 1, acts: exact(w.layout.format, plain(x)), rows: ids };
    // SAFETY: shapes checked; units write disjoint scores.
    unsafe {
        products(cx, &[product], &|done| {
            let (column, n) = (done.tile * LANES, (experts - done.tile * LANES).min(LANES));
            for i in 0..done.n {
                std::ptr::copy_nonoverlapping(done.row(0, i).as_ptr(), scores.at((done.first + i) * experts + column), n);
            }
        });
    }
    routes.ids.clear();
    routes.ids.resize(rows * k, 0);
    routes.weights.clear();
    routes.weights.resize(rows * k, 0.0);
    let (to_ids, to_weights) = (Shared::new(&mut routes.ids), Shared::new(&mut routes.weights));
    cx.rows(rows, experts * k, &|r| {
        // SAFETY: row `r` of the scores and of the routes is this call's alone.
        let (p, ids, weights) = unsafe {
            (cx.k.softmax)(scores.at(r * experts), experts);
            (
                std::slice::from_raw_parts_mut(scores.at(r * experts), experts),
                std::slice::from_raw_parts_mut(to_ids.at(r * k), k),
                std::slice::from_raw_parts_mut(to_weights.at(r * k), k),
            )
        };
        top_k(p, ids, weights);
        if spec.renormalise {
            let total: f32 = weights.iter().sum();
            weights.iter_mut().for_each(|w| *w /= total);
        }
    });
}

/// The largest of `p`, largest first, ties to the lowest id. A NaN counts as less than anything, so there are always
/// `ids.len()` different ids.
fn top_k(p: &mut [f32], ids: &mut [u32], weights: &mut [f32]) {
    for (id, weight) in ids.iter_mut().zip(weights) {
        let mut best = (0, f32::NEG_INFINITY);
        let mut found = false;
        for (i, &p) in p.iter().enumerate() {
            if p > best.1 {
                best = (i, p);
                found = true;
            }
        }
        if !found {
            // Only NaN left: the lowest that was not taken.
            best = p.iter().enumerate().find(|(_, p)| p.is_nan()).map_or((0, f32::NAN), |(i, &p)| (i, p));
        }
        (*id, *weight) = (best.0 as u32, best.1);
        p[best.0] = f32::NEG_INFINITY;
    }
}

#[cfg(test)]
mod tests {
    use super::top_k;

    fn pick(p: &[f32], k: usize) -> (Vec<u32>, Vec<f32>) {
        let (mut ids, mut weights) = (vec![0; k], vec![0.0; k]);
        top_k(&mut p.to_vec(), &mut ids, &mut weights);
        (ids, weights)
    }

    #[test]
    fn ties_go_to_the_lowest_id() {
        assert_eq!(pick(&[0.1, 0.3, 0.3, 0.2, 0.1], 4), (vec![1, 2, 3, 0], vec![0.3, 0.3, 0.2, 0.1]));
    }

    #[test]
    fn ids_stay_distinct_when_scores_are_nan() {
        assert_eq!(pick(&[f32::NAN, 0.5, f32::NAN], 3).0, [1, 0, 2]);
    }
}
