//! Kernels over single rows.

use mach_backend::Activation;

use super::math::{self, load_n, store_n};
use super::simd::{LANES, Simd};

/// `out = x / sqrt(mean(x²) + eps) ⊙ w`. `out` may be `x`.
///
/// # Safety
/// `x`, `w` and `out` have `n` values.
#[inline(always)]
pub(crate) unsafe fn rms_norm<V: Simd>(x: *const f32, w: *const f32, n: usize, eps: f32, out: *mut f32) {
    let r = V::splat(1.0 / (sum_squares::<V>(x, n) / n as f32 + eps).sqrt());
    for c in (0..n).step_by(LANES) {
        let v = V::mul(load_n::<V>(x.add(c), n - c), r);
        store_n::<V>(out.add(c), V::mul(v, load_n::<V>(w.add(c), n - c)), n - c);
    }
}

#[inline(always)]
unsafe fn sum_squares<V: Simd>(x: *const f32, n: usize) -> f32 {
    dot::<V>(x, x, n)
}

/// `Σ a·b` in 16 chains and the fixed tree.
#[inline(always)]
unsafe fn dot<V: Simd>(a: *const f32, b: *const f32, n: usize) -> f32 {
    let mut acc = V::splat(0.0);
    for c in (0..n).step_by(LANES) {
        acc = V::fma(load_n::<V>(a.add(c), n - c), load_n::<V>(b.add(c), n - c), acc);
    }
    V::sum(acc)
}

/// `x += y`.
///
/// # Safety
/// Both have `n` values.
#[inline(always)]
pub(crate) unsafe fn add<V: Simd>(x: *mut f32, y: *const f32, n: usize) {
    for c in (0..n).step_by(LANES) {
        store_n::<V>(x.add(c), V::add(load_n::<V>(x.add(c), n - c), load_n::<V>(y.add(c), n - c)), n - c);
    }
}

/// `x = fma(w, y, x)`.
///
/// # Safety
/// Both have `n` values.
#[inline(always)]
pub(crate) unsafe fn add_scaled<V: Simd>(x: *mut f32, w: f32, y: *const f32, n: usize) {
    let w = V::splat(w);
    for c in (0..n).step_by(LANES) {
        store_n::<V>(x.add(c), V::fma(w, load_n::<V>(y.add(c), n - c), load_n::<V>(x.add(c), n - c)), n - c);
    }
}

/// `out = activation(gate + bias, up + bias)` for up to 16 values; biases may be null.
///
/// # Safety
/// `gate` and `up` have 16 values, biases and `out` have `n`.
#[inline(always)]
pub(crate) unsafe fn activate<V: Simd>(activation: &Activation, gate: *const f32, up: *const f32, bias: [*const f32; 2], n: usize, out: *mut f32) {
    let (mut g, mut u) = (V::load(gate), V::load(up));
    if !bias[0].is_null() {
        g = V::add(g, load_n::<V>(bias[0], n));
        u = V::add(u, load_n::<V>(bias[1], n));
    }
    let y = match *activation {
        Activation::SwiGlu => V::mul(math::silu::<V>(g), u),
        Activation::SwiGluClamped { limit } => V::mul(math::silu::<V>(V::min(V::splat(limit), g)), clip::<V>(u, limit)),
        Activation::SwiGluOai { alpha, limit } => {
            let g = V::min(V::splat(limit), g);
            let gated = V::div(g, V::add(V::splat(1.0), math::exp::<V>(V::mul(V::splat(-alpha), g))));
            V::mul(gated, V::add(clip::<V>(u, limit), V::splat(1.0)))
        }
        Activation::GeGlu => V::mul(math::gelu::<V>(g), u),
    };
    store_n::<V>(out, y, n);
}

/// `x` within ±`limit`.
#[inline(always)]
unsafe fn clip<V: Simd>(x: V::F, limit: f32) -> V::F {
    V::min(V::splat(limit), V::max(V::splat(-limit), x))
}

/// `x = x · by`.
///
/// # Safety
/// `x` has `n` values.
#[inline(always)]
pub(crate) unsafe fn scale<V: Simd>(x: *mut f32, n: usize, by: f32) {
    for c in (0..n).step_by(LANES) {
        store_n::<V>(x.add(c), V::mul(load_n::<V>(x.add(c), n - c), V::splat(by)), n - c);
    }
}

/// `x = cap · tanh(x / cap)`.
///
/// # Safety
/// `x` has `n` values.
#[inline(always)]
pub(crate) unsafe fn soft_cap<V: Simd>(x: *mut f32, n: usize, cap: f32) {
    for c in (0..n).step_by(LANES) {
        let y = V::div(load_n::<V>(x.add(c), n - c), V::splat(cap));
        store_n::<V>(x.add(c), V::mul(V::splat(cap), math::tanh::<V>(y)), n - c);
    }
}

/// `x = sqrt(ln(1 + eˣ))`.
///
/// # Safety
/// `x` has `n` values.
#[inline(always)]
pub(crate) unsafe fn sqrt_softplus<V: Simd>(x: *mut f32, n: usize) {
    for c in (0..n).step_by(LANES) {
        store_n::<V>(x.add(c), math::softplus::<V>(load_n::<V>(x.add(c), n - c)), n - c);
    }
    // Exactly rounded on every processor.
    for i in 0..n {
        *x.add(i) = (*x.add(i)).sqrt();
    }
}

/// `x = sigmoid(x)`.
///
/// # Safety
/// `x` has `n` values.
#[inline(always)]
pub(crate) unsafe fn sigmoid<V: Simd>(x: *mut f32, n: usize) {
    for c in (0..n).step_by(LANES) {
        store_n::<V>(x.add(c), math::sigmoid::<V>(load_n::<V>(x.add(c), n - c)), n - c);
    }
}

/// Rotates the pairs `(j, j + half)` by the angles given as `half` cosines, then `half` sines.
///
/// # Safety
/// `x` and `rope` have `2·half` values.
#[inline(always)]
pub(crate) unsafe fn rope<V: Simd>(x: *mut f32, rope: *const f32, half: usize) {
    for c in (0..half).step_by(LANES) {
        let n = half - c;
        let (a, b) = (load_n::<V>(x.add(c), n), load_n::<V>(x.add(half + c), n));
        let (cos, sin) = (load_n::<V>(rope.add(c), n), load_n::<V>(rope.add(half + c), n));
        store_n::<V>(x.add(c), V::fma(a, cos, V::sub(V::splat(0.0), V::mul(b, sin))), n);
        store_n::<V>(x.add(half + c), V::fma(b, cos, V::mul(a, sin)), n);
    }
}

/// Softmax over all of `x` in place.
///
/// # Safety
/// `x` has `n` values.
#[inline(always)]
pub(crate) unsafe fn softmax<V: Simd>(x: *mut f32, n: usize) {
    let mut max = f32::NEG_INFINITY;
    for i in 0..n {
        max = max.max(*x.add(i));
    }
    let total = exp_sum::<V>(x, n, max);
    for c in (0..n).step_by(LANES) {
        store_n::<V>(x.add(c), V::div(load_n::<V>(x.add(c), n - c), V::splat(total)), n - c);
    }
}

/// `x = exp(x − max)` in place; returns the sum, by 16 chains and the fixed tree.
///
/// # Safety
/// `x` has `n` values.
#[inline(always)]
pub(crate) unsafe fn exp_sum<V: Simd>(x: *mut f32, n: usize, max: f32) -> f32 {
    let mut total = V::splat(0.0);
    for c in (0..n).step_by(LANES) {
        let n = n - c;
        store_n::<V>(x.add(c), math::exp::<V>(V::sub(load_n::<V>(x.add(c), n), V::splat(max))), n);
        total = V::add(total, load_n::<V>(x.add(c), n));
    }
    V::sum(total)
}

/// One token of the causal depthwise conv with silu, for `n` channels from `first` on: `taps` rows of weights `w` and of inputs.
/// Asks for what a later token reads at `ahead`, which need not be valid.
///
/// # Safety
/// `w` has `taps` rows of stride `w_stride` and these channels, each pointer of `x` has them, `out` has `n` values.
#[inline(always)]
pub(crate) unsafe fn conv_silu<V: Simd>(w: *const f32, w_stride: usize, x: &[*const f32], first: usize, n: usize, ahead: *const f32, out: *mut f32) {
    for c in (0..n).step_by(LANES) {
        V::prefetch(ahead.wrapping_add(c).cast());
        let mut acc = V::splat(0.0);
        for (tap, x) in x.iter().enumerate() {
            acc = V::fma(load_n::<V>(w.add(tap * w_stride + first + c), n - c), load_n::<V>(x.add(first + c), n - c), acc);
        }
        store_n::<V>(out.add(c), math::silu::<V>(acc), n - c);
    }
}

/// `x = x / sqrt(Σx² + 1e-6) · scale`.
///
/// # Safety
/// `x` has `n` values.
#[inline(always)]
pub(crate) unsafe fn l2_norm<V: Simd>(x: *mut f32, n: usize, scale: f32) {
    let r = V::splat(1.0 / (sum_squares::<V>(x, n) + 1e-6).sqrt() * scale);
    for c in (0..n).step_by(LANES) {
        store_n::<V>(x.add(c), V::mul(load_n::<V>(x.add(c), n - c), r), n - c);
    }
}

/// Per value head of one token: decay `exp(neg_exp_a · softplus(a + dt_bias))` and `β = sigmoid(b)`.
///
/// # Safety
/// Everything has `n` values.
#[inline(always)]
pub(crate) unsafe fn gates<V: Simd>(a: *const f32, b: *const f32, neg_exp_a: *const f32, dt_bias: *const f32, n: usize, decay: *mut f32, beta: *mut f32) {
    for c in (0..n).step_by(LANES) {
        let n = n - c;
        let step = math::softplus::<V>(V::add(load_n::<V>(a.add(c), n), load_n::<V>(dt_bias.add(c), n)));
        store_n::<V>(decay.add(c), math::exp::<V>(V::mul(load_n::<V>(neg_exp_a.add(c), n), step)), n);
        store_n::<V>(beta.add(c), math::sigmoid::<V>(load_n::<V>(b.add(c), n)), n);
    }
}

/// `out = x / sqrt(mean(x²) + eps) ⊙ w ⊙ silu(z)`. Asks for what a later row reads at `ahead`, which need not be valid.
///
/// # Safety
/// Everything else has `n` values.
#[inline(always)]
pub(crate) unsafe fn gated_norm<V: Simd>(x: *const f32, w: *const f32, z: *const f32, n: usize, eps: f32, ahead: *const f32, out: *mut f32) {
    let r = V::splat(1.0 / (sum_squares::<V>(x, n) / n as f32 + eps).sqrt());
    for c in (0..n).step_by(LANES) {
        V::prefetch(ahead.wrapping_add(c).cast());
        let v = V::mul(V::mul(load_n::<V>(x.add(c), n - c), r), load_n::<V>(w.add(c), n - c));
        store_n::<V>(out.add(c), V::mul(v, math::silu::<V>(load_n::<V>(z.add(c), n - c))), n - c);
    }
}
