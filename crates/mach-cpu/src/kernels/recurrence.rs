//! The gated delta rule, one block of state columns at a time.

use super::math::{load_n, store_n};
use super::simd::{LANES, Simd};

/// Tokens of one value head of one sequence.
pub(crate) struct DeltaHead {
    /// `[k_dim][columns]` blocks of the head's state, one after another.
    pub state: *mut f32,
    /// Columns per block: 16 or 32.
    pub columns: usize,
    pub k_dim: usize,
    pub v_dim: usize,
    pub tokens: usize,
    /// Per token, with strides: normed and scaled query, normed key, value, decay, β, output.
    pub q: *const f32,
    pub k: *const f32,
    pub v: *const f32,
    pub qkv_stride: usize,
    pub decay: *const f32,
    pub beta: *const f32,
    pub gate_stride: usize,
    pub out: *mut f32,
    pub out_stride: usize,
}

/// All tokens of a head: `u = Sᵀk`, `w = Sᵀq`, `δ = β(v − a·u)`, `o = a·w + (q·k)·δ`, `S = fma(k, δ, a·S)`.
///
/// # Safety
/// The pointers of `h` are valid for its shape.
#[inline(always)]
pub(crate) unsafe fn delta_head<V: Simd>(h: &DeltaHead) {
    if h.columns == LANES {
        delta_blocks::<V, 1>(h);
    } else {
        delta_blocks::<V, 2>(h);
    }
}

#[inline(always)]
unsafe fn delta_blocks<V: Simd, const N: usize>(h: &DeltaHead) {
    let width = N * LANES;
    for block in 0..h.v_dim.div_ceil(width) {
        let state = h.state.add(block * h.k_dim * width);
        let first = block * width;
        for t in 0..h.tokens {
            let (q, k) = (h.q.add(t * h.qkv_stride), h.k.add(t * h.qkv_stride));
            let (mut u, mut w) = ([V::splat(0.0); N], [V::splat(0.0); N]);
            for i in 0..h.k_dim {
                let (ki, qi) = (V::splat(*k.add(i)), V::splat(*q.add(i)));
                for n in 0..N {
                    let s = V::load(state.add(i * width + n * LANES));
                    u[n] = V::fma(s, ki, u[n]);
                    w[n] = V::fma(s, qi, w[n]);
                }
            }
            // Once per block rather than once per head: the blocks stay independent of each other.
            let mut products = V::splat(0.0);
            for i in (0..h.k_dim).step_by(LANES) {
                products = V::fma(load_n::<V>(q.add(i), h.k_dim - i), load_n::<V>(k.add(i), h.k_dim - i), products);
            }
            let qk = V::splat(V::sum(products));

            let decay = V::splat(*h.decay.add(t * h.gate_stride));
            let beta = V::splat(*h.beta.add(t * h.gate_stride));
            let mut delta = [V::splat(0.0); N];
            for n in 0..N {
                let c = first + n * LANES;
                let left = h.v_dim.saturating_sub(c);
                if left == 0 {
                    continue;
                }
                let v = load_n::<V>(h.v.add(t * h.qkv_stride + c), left);
                delta[n] = V::mul(beta, V::sub(v, V::mul(decay, u[n])));
                let o = V::fma(qk, delta[n], V::mul(decay, w[n]));
                store_n::<V>(h.out.add(t * h.out_stride + c), o, left);
            }
            for i in 0..h.k_dim {
                let ki = V::splat(*k.add(i));
                for n in 0..N {
                    let at = state.add(i * width + n * LANES);
                    V::store(at, V::fma(ki, delta[n], V::mul(decay, V::load(at))));
                }
            }
        }
    }
}
