//! Router: f32 scores, top k, weights.

use mach_backend::{RouterBias, RouterScore, RouterSpec, RouterWeights};

use super::linear::{Product, Scratch, Weight, exact, identity, plain, products};
use super::{Context, Shared, grown};
use crate::tensor::Tensor;

/// Choices of a batch of rows, within a row in the order of choice.
#[derive(Default)]
pub struct Routes {
    pub(crate) ids: Vec<u32>,
    pub(crate) weights: Vec<f32>,
}

#[allow(clippy::too_many_arguments)]
pub(crate) fn route(
    cx: Context<'_>,
    scratch: &mut Scratch,
    spec: &RouterSpec,
    w: &RouterWeights<'_, Tensor, Weight>,
    x: &Tensor,
    rows: usize,
    given: Option<&[u32]>,
    routes: &mut Routes,
) {
    let (experts, k) = (spec.experts, spec.top_k);
    let project = w.project;
    assert!(project.layout.rows == experts && project.layout.cols == x.cols() && rows <= x.rows(), "shapes of a router");
    assert!(k <= experts, "top {k} of {experts}");
    assert!([w.bias, w.expert_scale].into_iter().flatten().all(|t| t.cols() == experts), "shapes of a router's small weights");
    assert!(given.is_none_or(|ids| ids.len() == rows * k && ids.iter().all(|&id| (id as usize) < experts)), "given ids");
    let ids = identity(&mut scratch.identity, rows);
    // Scores, and beside each row a copy to choose from.
    let scores = Shared::new(grown(&mut scratch.values, 2 * rows * experts));
    let product = Product { layout: project.layout, data: project.data(), per: 1, acts: exact(project.layout.format, plain(x)), rows: ids };
    // SAFETY: shapes checked; units write disjoint scores.
    unsafe {
        products(cx, &[product], &|done| done.store(scores, 2 * experts, 0, experts));
    }
    routes.ids.clear();
    routes.ids.resize(rows * k, 0);
    routes.weights.clear();
    routes.weights.resize(rows * k, 0.0);
    let (to_ids, to_weights) = (Shared::new(&mut routes.ids), Shared::new(&mut routes.weights));
    let bias = |kind| w.bias.filter(|_| spec.bias == kind).map(|b| b.values());
    cx.rows(rows, experts * k, &|r| {
        // SAFETY: row `r` of the scores and of the routes is this call's alone.
        let (scores, ids, weights) = unsafe {
            (
                std::slice::from_raw_parts_mut(scores.at(2 * r * experts), 2 * experts),
                std::slice::from_raw_parts_mut(to_ids.at(r * k), k),
                std::slice::from_raw_parts_mut(to_weights.at(r * k), k),
            )
        };
        let (scores, choice) = scores.split_at_mut(experts);
        // SAFETY: all of these have a value for each expert, the chosen weights `k`.
        unsafe {
            if let Some(bias) = bias(RouterBias::Logits) {
                (cx.k.add)(scores.as_mut_ptr(), bias.as_ptr(), experts);
            }
            match spec.score {
                RouterScore::Softmax => (cx.k.softmax)(scores.as_mut_ptr(), experts),
                RouterScore::SoftmaxOfChosen => {}
                RouterScore::SqrtSoftplus => (cx.k.sqrt_softplus)(scores.as_mut_ptr(), experts),
            }
            match given {
                Some(given) => ids.copy_from_slice(&given[r * k..(r + 1) * k]),
                None => {
                    choice.copy_from_slice(scores);
                    if let Some(bias) = bias(RouterBias::Choice) {
                        (cx.k.add)(choice.as_mut_ptr(), bias.as_ptr(), experts);
                    }
                    top_k(choice, ids);
                }
            }
            weights.iter_mut().zip(&*ids).for_each(|(w, &id)| *w = scores[id as usize]);
            if spec.score == RouterScore::SoftmaxOfChosen {
                (cx.k.softmax)(weights.as_mut_ptr(), k);
            }
        }
        if spec.renormalise {
            let total = weights.iter().sum::<f32>() + if spec.score == RouterScore::SqrtSoftplus { 1e-20 } else { 0.0 };
            weights.iter_mut().for_each(|w| *w /= total);
        }
        for (weight, &id) in weights.iter_mut().zip(&*ids) {
            *weight = *weight * spec.factor * w.expert_scale.map_or(1.0, |s| s.values()[id as usize]);
        }
    });
}

/// The largest of `p`, largest first, ties to the lowest id. A NaN counts as less than anything, so there are always
/// `ids.len()` different ids.
fn top_k(p: &mut [f32], ids: &mut [u32]) {
    for id in ids {
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
        *id = best.0 as u32;
        p[best.0] = f32::NEG_INFINITY;
    }
}

#[cfg(test)]
mod tests {
    use super::top_k;

    fn pick(p: &[f32], k: usize) -> Vec<u32> {
        let mut ids = vec![0; k];
        top_k(&mut p.to_vec(), &mut ids);
        ids
    }

    #[test]
    fn ties_go_to_the_lowest_id() {
        assert_eq!(pick(&[0.1, 0.3, 0.3, 0.2, 0.1], 4), [1, 2, 3, 0]);
    }

    #[test]
    fn ids_stay_distinct_when_scores_are_nan() {
        assert_eq!(pick(&[f32::NAN, 0.5, f32::NAN], 3), [1, 0, 2]);
    }
}
