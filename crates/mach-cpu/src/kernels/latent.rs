//! Entries of latent attention, scores of their index, and streams of hyper-connections.

use super::math::{self, load_n, store_n};
use super::simd::{LANES, Simd};

/// Most streams of a residual.
pub(crate) const MAX_STREAMS: usize = 8;

/// `out[c] = Σ_i softmax(gates[·][c])[i] · keys[i][c]`, channel by channel in the order of the slots.
///
/// # Safety
/// As many keys as gates, at least one, of `n` values each; `out` too.
#[inline(always)]
pub(crate) unsafe fn pool<V: Simd>(keys: &[*const f32], gates: &[*const f32], n: usize, out: *mut f32) {
    for c in (0..n).step_by(LANES) {
        let n = n - c;
        let mut max = load_n::<V>(gates[0].add(c), n);
        for gate in &gates[1..] {
            max = V::max(load_n::<V>(gate.add(c), n), max);
        }
        let (mut total, mut acc) = (V::splat(0.0), V::splat(0.0));
        for i in 0..keys.len() {
            let e = math::exp::<V>(V::sub(load_n::<V>(gates[i].add(c), n), max));
            total = V::add(total, e);
            acc = V::fma(e, load_n::<V>(keys[i].add(c), n), acc);
        }
        store_n::<V>(out.add(c), V::div(acc, total), n);
    }
}

/// Scores of 16 index keys that lie `[dim][16]`: `Σ_h w[h] · max(0, q_h · k)`, heads in order, a product one chain over the
/// channels.
///
/// # Safety
/// `q` has `heads·dim` values, `w` `heads`, `keys` `16·dim`, `out` 16.
#[inline(always)]
pub(crate) unsafe fn index_scores<V: Simd>(q: *const f32, w: *const f32, heads: usize, dim: usize, keys: *const f32, out: *mut f32) {
    let mut total = V::splat(0.0);
    let mut head = 0;
    while head + 4 <= heads {
        total = scores_of::<V, 4>(q.add(head * dim), w.add(head), dim, keys, total);
        head += 4;
    }
    while head < heads {
        total = scores_of::<V, 1>(q.add(head * dim), w.add(head), dim, keys, total);
        head += 1;
    }
    V::store(out, total);
}

#[inline(always)]
unsafe fn scores_of<V: Simd, const R: usize>(q: *const f32, w: *const f32, dim: usize, keys: *const f32, mut total: V::F) -> V::F {
    let mut acc = [V::splat(0.0); R];
    for d in 0..dim {
        let k = V::load(keys.add(d * LANES));
        for r in 0..R {
            acc[r] = V::fma(k, V::splat(*q.add(r * dim + d)), acc[r]);
        }
    }
    for r in 0..R {
        total = V::fma(V::splat(*w.add(r)), V::max(acc[r], V::splat(0.0)), total);
    }
    total
}

/// `*out = 1 / sqrt(mean(x²) + eps)`.
///
/// # Safety
/// `x` has `n` values.
#[inline(always)]
pub(crate) unsafe fn inverse_rms<V: Simd>(x: *const f32, n: usize, eps: f32, out: *mut f32) {
    let mut acc = V::splat(0.0);
    for c in (0..n).step_by(LANES) {
        let v = load_n::<V>(x.add(c), n - c);
        acc = V::fma(v, v, acc);
    }
    *out = 1.0 / (V::sum(acc) / n as f32 + eps).sqrt();
}

/// Stream `i` becomes `mix[i] · y + Σ_j mix[streams + j·streams + i] · stream_j`, streams in order.
///
/// # Safety
/// `x` has `streams·n` values, `y` `n`, `mix` `streams·(1 + streams)`; at most [`MAX_STREAMS`] streams.
#[inline(always)]
pub(crate) unsafe fn hyper_add<V: Simd>(x: *mut f32, streams: usize, n: usize, y: *const f32, mix: *const f32) {
    for c in (0..n).step_by(LANES) {
        let left = n - c;
        let mut old = [V::splat(0.0); MAX_STREAMS];
        for j in 0..streams {
            old[j] = load_n::<V>(x.add(j * n + c), left);
        }
        let y = load_n::<V>(y.add(c), left);
        for i in 0..streams {
            let mut acc = V::mul(V::splat(*mix.add(i)), y);
            for j in 0..streams {
                acc = V::fma(V::splat(*mix.add(streams + j * streams + i)), old[j], acc);
            }
            store_n::<V>(x.add(i * n + c), acc, left);
        }
    }
}
