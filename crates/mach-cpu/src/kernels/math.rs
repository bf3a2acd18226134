//! Functions whose bytes must not depend on the platform's maths library.

use super::simd::{LANES, Simd};

/// Coefficients of `eʳ ≈ 1 + r + r²·p(r)` on |r| ≤ ln 2 / 2, highest first.
const EXP: [f32; 5] = [1.987_569_2e-4, 1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1];

/// `eˣ` to about 1 ulp. Below −87.3 it stays at the smallest normal number, above 88.3 at 2.3e38; NaN stays NaN.
#[inline(always)]
pub(crate) unsafe fn exp<V: Simd>(x: V::F) -> V::F {
    let x = V::min(V::splat(88.3), V::max(V::splat(-87.3), x));
    let n = V::round(V::mul(x, V::splat(std::f32::consts::LOG2_E)));
    let nf = V::to_f(n);
    // ln 2 in two parts, the first with few bits, so that n·ln 2 is exact enough.
    let r = V::fma(nf, V::splat(-0.693_359_4), x);
    let r = V::fma(nf, V::splat(2.121_944_4e-4), r);
    let mut p = V::splat(EXP[0]);
    for &c in &EXP[1..] {
        p = V::fma(p, r, V::splat(c));
    }
    p = V::fma(p, r, V::splat(0.5));
    p = V::add(V::fma(p, V::mul(r, r), r), V::splat(1.0));
    V::mul(p, V::from_bits(V::shl_i::<23>(V::add_i(n, V::splat_i(127)))))
}

/// `1 / (1 + e⁻ˣ)`.
#[inline(always)]
pub(crate) unsafe fn sigmoid<V: Simd>(x: V::F) -> V::F {
    V::div(V::splat(1.0), V::add(V::splat(1.0), exp::<V>(V::sub(V::splat(0.0), x))))
}

/// `x · sigmoid(x)` in one division.
#[inline(always)]
pub(crate) unsafe fn silu<V: Simd>(x: V::F) -> V::F {
    V::div(x, V::add(V::splat(1.0), exp::<V>(V::sub(V::splat(0.0), x))))
}

/// The form of gelu with a tanh, `x/2 · (1 + tanh y)` = `x · sigmoid(2y)` of `y = sqrt(2/π) · (x + 0.044715·x³)`.
#[inline(always)]
pub(crate) unsafe fn gelu<V: Simd>(x: V::F) -> V::F {
    const MINUS_2C: f32 = -1.595_769;
    let slope = V::fma(V::mul(x, x), V::splat(MINUS_2C * 0.044_715), V::splat(MINUS_2C));
    V::div(x, V::add(V::splat(1.0), exp::<V>(V::mul(x, slope))))
}

/// `tanh(x)` as `1 − 2 / (e²ˣ + 1)`, to about 1e-7.
#[inline(always)]
pub(crate) unsafe fn tanh<V: Simd>(x: V::F) -> V::F {
    V::sub(V::splat(1.0), V::div(V::splat(2.0), V::add(exp::<V>(V::add(x, x)), V::splat(1.0))))
}

/// `ln(1 + eˣ)` as `max(x, 0) + ln(1 + e^−|x|)`, which cannot overflow; `ln(1 + y) = 2 atanh(y / (2 + y))` by its series,
/// whose argument is at most 1/3.
#[inline(always)]
pub(crate) unsafe fn softplus<V: Simd>(x: V::F) -> V::F {
    let y = exp::<V>(V::sub(V::splat(0.0), V::abs(x)));
    let s = V::div(y, V::add(V::splat(2.0), y));
    let s2 = V::mul(s, s);
    let mut p = V::splat(1.0 / 15.0);
    for c in [1.0 / 13.0, 1.0 / 11.0, 1.0 / 9.0, 1.0 / 7.0, 1.0 / 5.0, 1.0 / 3.0, 1.0] {
        p = V::fma(p, s2, V::splat(c));
    }
    let log = V::mul(V::add(s, s), p);
    V::add(V::max(V::splat(0.0), x), log)
}

/// Up to 16 values from `p`, the other lanes zero.
#[inline(always)]
pub(crate) unsafe fn load_n<V: Simd>(p: *const f32, n: usize) -> V::F {
    if n >= LANES {
        return V::load(p);
    }
    let mut lanes = [0.0; LANES];
    std::ptr::copy_nonoverlapping(p, lanes.as_mut_ptr(), n);
    V::load(lanes.as_ptr())
}

/// The first `n` lanes (at most 16) to `p`.
#[inline(always)]
pub(crate) unsafe fn store_n<V: Simd>(p: *mut f32, v: V::F, n: usize) {
    if n >= LANES {
        return V::store(p, v);
    }
    let mut lanes = [0.0; LANES];
    V::store(lanes.as_mut_ptr(), v);
    std::ptr::copy_nonoverlapping(lanes.as_ptr(), p, n);
}
