//! The gated delta rule, one block of state columns at a time.

use super::simd::{LANES, Simd};

/// Most tokens of a call, so that what they share stays in the caches while blocks of columns are looped over.
pub(crate) const MAX_TOKENS: usize = 64;

/// Tokens of one value head of one sequence. Rows of values are padded with zeros to whole vectors.
pub(crate) struct DeltaHead {
    /// `[k_dim][columns]` blocks of the head's state, one after another.
    pub state: *mut f32,
    /// Columns per block: 16 or 32.
    pub columns: usize,
    pub k_dim: usize,
    pub v_dim: usize,
    /// At most [`MAX_TOKENS`].
    pub tokens: usize,
    /// Normed and scaled queries and normed keys, `[tokens][k_dim]`.
    pub q: *const f32,
    pub k: *const f32,
    /// `[tokens][v_dim]`.
    pub v: *const f32,
    /// Decay and β of every token, `gate_stride` values apart.
    pub decay: *const f32,
    pub beta: *const f32,
    pub gate_stride: usize,
    /// `[tokens][v_dim]`.
    pub out: *mut f32,
}

/// All tokens of a head: `u = Sᵀk`, `w = Sᵀq`, `δ = β(v − a·u)`, `o = a·w + (q·k)·δ`, `S = fma(k, δ, a·S)`.
///
/// # Safety
/// The pointers of `h` are valid for its shape.
#[inline(always)]
pub(crate) unsafe fn delta_head<V: Simd>(h: &DeltaHead) {
    let stride = h.k_dim.next_multiple_of(LANES);
    let mut qk = [0.0; MAX_TOKENS];
    for (t, qk) in qk[..h.tokens].iter_mut().enumerate() {
        let mut products = V::splat(0.0);
        for i in (t * stride..(t + 1) * stride).step_by(LANES) {
            products = V::fma(V::load(h.q.add(i)), V::load(h.k.add(i)), products);
        }
        *qk = V::sum(products);
    }
    for first in (0..h.v_dim).step_by(h.columns) {
        if h.columns == LANES {
            delta_block::<V, 1>(h, &qk, first);
        } else {
            delta_block::<V, 2>(h, &qk, first);
        }
    }
}

/// The block of columns from `first` on.
#[inline(always)]
unsafe fn delta_block<V: Simd, const N: usize>(h: &DeltaHead, qk: &[f32; MAX_TOKENS], first: usize) {
    let (k_dim, width) = (h.k_dim, N * LANES);
    let (k_stride, v_stride) = (k_dim.next_multiple_of(LANES), h.v_dim.next_multiple_of(LANES));
    let state = h.state.add(first * k_dim);
    let (mut u, mut w) = ([V::splat(0.0); N], [V::splat(0.0); N]);
    for t in 0..h.tokens {
        let (q, k) = (h.q.add(t * k_stride), h.k.add(t * k_stride));
        if t == 0 || !V::MANY_REGISTERS {
            (u, w) = ([V::splat(0.0); N], [V::splat(0.0); N]);
            for i in 0..k_dim {
                let (ki, qi) = (V::splat(*k.add(i)), V::splat(*q.add(i)));
                for n in 0..N {
                    let s = V::load(state.add(i * width + n * LANES));
                    u[n] = V::fma(s, ki, u[n]);
                    w[n] = V::fma(s, qi, w[n]);
                }
            }
        }
        let decay = V::splat(*h.decay.add(t * h.gate_stride));
        let beta = V::splat(*h.beta.add(t * h.gate_stride));
        let mut delta = [V::splat(0.0); N];
        for n in 0..N {
            let c = t * v_stride + first + n * LANES;
            delta[n] = V::mul(beta, V::sub(V::load(h.v.add(c)), V::mul(decay, u[n])));
            V::store(h.out.add(c), V::fma(V::splat(qk[t]), delta[n], V::mul(decay, w[n])));
        }
        if t + 1 == h.tokens || !V::MANY_REGISTERS {
            // The next block is seldom in a cache when a sequence goes on token by token. The next head may be another thread's.
            let ahead = t + 1 == h.tokens && first + width < h.v_dim;
            for i in 0..k_dim {
                let ki = V::splat(*k.add(i));
                for n in 0..N {
                    let at = i * width + n * LANES;
                    if ahead {
                        V::prefetch(state.add(k_dim * width + at).cast());
                    }
                    V::store(state.add(at), V::fma(ki, delta[n], V::mul(decay, V::load(state.add(at)))));
                }
            }
            continue;
        }
        // One pass for two tokens: what the next one sums up is in registers anyway.
        let (next_k, next_q) = (k.add(k_stride), q.add(k_stride));
        (u, w) = ([V::splat(0.0); N], [V::splat(0.0); N]);
        for i in 0..k_dim {
            let (ki, next_ki, next_qi) = (V::splat(*k.add(i)), V::splat(*next_k.add(i)), V::splat(*next_q.add(i)));
            let at = state.add(i * width);
            let mut s = [V::splat(0.0); N];
            for n in 0..N {
                s[n] = V::mul(decay, V::load(at.add(n * LANES)));
            }
            for n in 0..N {
                let s = V::fma(ki, delta[n], s[n]);
                V::store(at.add(n * LANES), s);
                u[n] = V::fma(s, next_ki, u[n]);
                w[n] = V::fma(s, next_qi, w[n]);
            }
        }
    }
}
