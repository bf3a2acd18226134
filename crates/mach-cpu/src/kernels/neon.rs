//! NEON: 16 lanes in four registers. Products by widening multiplies; see `neon_dot` and `neon_i8mm` for better.

use std::arch::aarch64::*;
use std::arch::asm;

use super::simd::{Kernel, Simd};

#[derive(Clone, Copy)]
pub(crate) struct Neon;

type F = [float32x4_t; 4];
type I = [int32x4_t; 4];

/// The same operation on all four registers.
macro_rules! each {
    ($i:ident => $e:expr) => {
        [
            {
                let $i = 0;
                $e
            },
            {
                let $i = 1;
                $e
            },
            {
                let $i = 2;
                $e
            },
            {
                let $i = 3;
                $e
            },
        ]
    };
}

/// Eight f16 to two registers of f32. The intrinsics for it are not stable yet.
#[inline(always)]
unsafe fn widen_f16(p: *const u16) -> [float32x4_t; 2] {
    let halves = vld1q_u16(p);
    let (low, high): (float32x4_t, float32x4_t);
    asm!("fcvtl {0:v}.4s, {1:v}.4h", out(vreg) low, in(vreg) halves, options(pure, nomem, nostack, preserves_flags));
    asm!("fcvtl2 {0:v}.4s, {1:v}.8h", out(vreg) high, in(vreg) halves, options(pure, nomem, nostack, preserves_flags));
    [low, high]
}

impl Simd for Neon {
    type F = F;
    type I = I;

    #[inline(always)]
    unsafe fn splat(x: f32) -> F {
        [vdupq_n_f32(x); 4]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> F {
        each!(i => vld1q_f32(p.add(i * 4)))
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: F) {
        for i in 0..4 {
            vst1q_f32(p.add(i * 4), v[i]);
        }
    }
    #[inline(always)]
    unsafe fn add(a: F, b: F) -> F {
        each!(i => vaddq_f32(a[i], b[i]))
    }
    #[inline(always)]
    unsafe fn sub(a: F, b: F) -> F {
        each!(i => vsubq_f32(a[i], b[i]))
    }
    #[inline(always)]
    unsafe fn mul(a: F, b: F) -> F {
        each!(i => vmulq_f32(a[i], b[i]))
    }
    #[inline(always)]
    unsafe fn div(a: F, b: F) -> F {
        each!(i => vdivq_f32(a[i], b[i]))
    }
    #[inline(always)]
    unsafe fn fma(a: F, b: F, c: F) -> F {
        each!(i => vfmaq_f32(c[i], a[i], b[i]))
    }
    #[inline(always)]
    unsafe fn max(a: F, b: F) -> F {
        each!(i => vbslq_f32(vcgtq_f32(a[i], b[i]), a[i], b[i]))
    }
    #[inline(always)]
    unsafe fn min(a: F, b: F) -> F {
        each!(i => vbslq_f32(vcltq_f32(a[i], b[i]), a[i], b[i]))
    }
    #[inline(always)]
    unsafe fn abs(a: F) -> F {
        each!(i => vabsq_f32(a[i]))
    }
    #[inline(always)]
    unsafe fn zero_where_gt(a: F, b: F, x: F) -> F {
        each!(i => vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(x[i]), vcgtq_f32(a[i], b[i]))))
    }
    #[inline(always)]
    unsafe fn gt_bits(a: F, b: F) -> u32 {
        let weights = vld1q_u32([1, 2, 4, 8].as_ptr());
        let mut bits = 0;
        for i in 0..4 {
            bits |= vaddvq_u32(vandq_u32(vcgtq_f32(a[i], b[i]), weights)) << (4 * i);
        }
        bits
    }
    #[inline(always)]
    unsafe fn sum(a: F) -> f32 {
        let four = vaddq_f32(vaddq_f32(a[0], a[2]), vaddq_f32(a[1], a[3]));
        let two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
        vget_lane_f32::<0>(two) + vget_lane_f32::<1>(two)
    }

    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> F {
        let ([a, b], [c, d]) = (widen_f16(p), widen_f16(p.add(8)));
        [a, b, c, d]
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> F {
        each!(i => vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(p.add(i * 4)))))
    }
    /// Pairs stay interleaved: rows 0..8, then rows 8..16.
    #[inline(always)]
    unsafe fn f16_pairs(p: *const u8) -> [F; 2] {
        [Self::load_f16(p.cast()), Self::load_f16(p.add(32).cast())]
    }
    #[inline(always)]
    unsafe fn f16_pair_x(even: f32, odd: f32) -> [F; 2] {
        [[vld1q_f32([even, odd, even, odd].as_ptr()); 4]; 2]
    }
    #[inline(always)]
    unsafe fn f16_pair_sum(acc: [F; 2]) -> F {
        each!(i => {
            let (a, b) = (acc[i / 2][i % 2 * 2], acc[i / 2][i % 2 * 2 + 1]);
            vaddq_f32(vuzp1q_f32(a, b), vuzp2q_f32(a, b))
        })
    }

    #[inline(always)]
    unsafe fn splat_i(x: i32) -> I {
        [vdupq_n_s32(x); 4]
    }
    #[inline(always)]
    unsafe fn load_u8(p: *const u8) -> I {
        let v = vld1q_u8(p);
        let words = [vmovl_u8(vget_low_u8(v)), vmovl_high_u8(v)];
        each!(i => vreinterpretq_s32_u32(if i % 2 == 0 { vmovl_u16(vget_low_u16(words[i / 2])) } else { vmovl_high_u16(words[i / 2]) }))
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> I {
        let v = vld1q_s8(p);
        let words = [vmovl_s8(vget_low_s8(v)), vmovl_high_s8(v)];
        each!(i => if i % 2 == 0 { vmovl_s16(vget_low_s16(words[i / 2])) } else { vmovl_high_s16(words[i / 2]) })
    }
    #[inline(always)]
    unsafe fn load_i(p: *const i32) -> I {
        each!(i => vld1q_s32(p.add(i * 4)))
    }
    #[inline(always)]
    unsafe fn add_i(a: I, b: I) -> I {
        each!(i => vaddq_s32(a[i], b[i]))
    }
    #[inline(always)]
    unsafe fn and_i(a: I, b: I) -> I {
        each!(i => vandq_s32(a[i], b[i]))
    }
    #[inline(always)]
    unsafe fn or_i(a: I, b: I) -> I {
        each!(i => vorrq_s32(a[i], b[i]))
    }
    #[inline(always)]
    unsafe fn store_i(p: *mut u8, a: I) {
        for i in 0..4 {
            vst1q_u8(p.add(i * 16), vreinterpretq_u8_s32(a[i]));
        }
    }
    #[inline(always)]
    unsafe fn xor_i(a: I, b: I) -> I {
        each!(i => veorq_s32(a[i], b[i]))
    }
    #[inline(always)]
    unsafe fn add_bytes(a: I, b: I) -> I {
        each!(i => vreinterpretq_s32_s8(vaddq_s8(vreinterpretq_s8_s32(a[i]), vreinterpretq_s8_s32(b[i]))))
    }
    #[inline(always)]
    unsafe fn equal_bytes(a: I, b: I) -> I {
        each!(i => vreinterpretq_s32_u8(vceqq_s8(vreinterpretq_s8_s32(a[i]), vreinterpretq_s8_s32(b[i]))))
    }
    #[inline(always)]
    unsafe fn spread_byte(a: I) -> I {
        let lowest = vld1q_u8([0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12].as_ptr());
        each!(i => vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_s32(a[i]), lowest)))
    }
    #[inline(always)]
    unsafe fn lookup(table: &[u8; 16], a: I) -> I {
        let table = vld1q_u8(table.as_ptr());
        each!(i => vreinterpretq_s32_u8(vqtbl1q_u8(table, vreinterpretq_u8_s32(a[i]))))
    }
    #[inline(always)]
    unsafe fn max_i(a: I, b: I) -> I {
        each!(i => vmaxq_s32(a[i], b[i]))
    }
    #[inline(always)]
    unsafe fn shl_i<const N: i32>(a: I) -> I {
        each!(i => vshlq_n_s32::<N>(a[i]))
    }
    #[inline(always)]
    unsafe fn shr_i(a: I, n: u32) -> I {
        let left = vdupq_n_s32(-(n as i32));
        each!(i => vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a[i]), left)))
    }
    #[inline(always)]
    unsafe fn largest_i(a: I) -> i32 {
        vmaxvq_s32(vmaxq_s32(vmaxq_s32(a[0], a[1]), vmaxq_s32(a[2], a[3])))
    }
    #[inline(always)]
    unsafe fn sum_i(a: I) -> i32 {
        vaddvq_s32(vaddq_s32(vaddq_s32(a[0], a[1]), vaddq_s32(a[2], a[3])))
    }
    #[inline(always)]
    unsafe fn to_f(a: I) -> F {
        each!(i => vcvtq_f32_s32(a[i]))
    }
    #[inline(always)]
    unsafe fn round(a: F) -> I {
        each!(i => vcvtnq_s32_f32(a[i]))
    }
    #[inline(always)]
    unsafe fn bits(a: F) -> I {
        each!(i => vreinterpretq_s32_f32(a[i]))
    }
    #[inline(always)]
    unsafe fn from_bits(a: I) -> F {
        each!(i => vreinterpretq_f32_s32(a[i]))
    }
    #[inline(always)]
    unsafe fn store_i8(p: *mut i8, a: I) {
        let low = vcombine_s16(vmovn_s32(a[0]), vmovn_s32(a[1]));
        let high = vcombine_s16(vmovn_s32(a[2]), vmovn_s32(a[3]));
        vst1q_s8(p, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        asm!("prfm pldl1keep, [{}]", in(reg) p, options(nostack, readonly, preserves_flags));
    }
}

/// Four activation bytes in every 32-bit lane.
#[inline(always)]
pub(crate) unsafe fn broadcast(x: *const i8) -> int8x16_t {
    vreinterpretq_s8_s32(vdupq_n_s32(x.cast::<i32>().read_unaligned()))
}

/// Low and high nibbles of 16 bytes.
#[inline(always)]
pub(crate) unsafe fn nibbles(bytes: uint8x16_t) -> [int8x16_t; 2] {
    [vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(15))), vreinterpretq_s8_u8(vshrq_n_u8::<4>(bytes))]
}

/// The four columns' numbers of four rows, of 16 columns of 6 bits.
#[inline(always)]
pub(crate) unsafe fn six_bits(w: *const u8) -> [int8x16_t; 4] {
    let (a, b, high) = (vld1q_u8(w), vld1q_u8(w.add(64)), vld1q_u8(w.add(128)));
    let join = |low: uint8x16_t, high: uint8x16_t| vreinterpretq_s8_u8(vorrq_u8(vandq_u8(low, vdupq_n_u8(15)), vandq_u8(high, vdupq_n_u8(0x30))));
    [join(a, vshlq_n_u8::<4>(high)), join(vshrq_n_u8::<4>(a), vshlq_n_u8::<2>(high)), join(b, high), join(vshrq_n_u8::<4>(b), vshrq_n_u8::<2>(high))]
}

/// Adds 16 products into 8 + 8 lanes of i16.
#[inline(always)]
unsafe fn multiply_add(acc: &mut [int16x8_t; 2], w: int8x16_t, x: int8x16_t) {
    acc[0] = vmlal_s8(acc[0], vget_low_s8(w), vget_low_s8(x));
    acc[1] = vmlal_high_s8(acc[1], w, x);
}

/// Adds the four neighbours of each row.
#[inline(always)]
unsafe fn sum_rows(acc: [int16x8_t; 2]) -> int32x4_t {
    vpaddq_s32(vpaddlq_s16(acc[0]), vpaddlq_s16(acc[1]))
}

impl Kernel for Neon {
    type V = Self;

    /// A lane of i16 takes 16 products of a nibble (16·15·128 = 30,720) before it is widened: one block of 64 columns.
    /// A byte weight is its two nibbles.
    #[inline(always)]
    unsafe fn dot<const BITS: u8, const BLK: usize, const R: usize>(w: *const u8, x: [*const i8; R], _: [i32; R]) -> [I; R] {
        let mut out = [[vdupq_n_s32(0); 4]; R];
        for quad in 0..4 {
            let mut acc = [[[vdupq_n_s16(0); 2]; 2]; R];
            if const { BITS == 6 } {
                // One product of 6 bits in each of 16 columns' four lines: 4·63·128 = 32,256.
                for (four, codes) in six_bits(w.add(quad * 16)).into_iter().enumerate() {
                    for r in 0..R {
                        multiply_add(&mut acc[r][0], codes, broadcast(x[r].add(four * 4)));
                    }
                }
            }
            for line in 0..if const { BITS == 6 } { 0 } else { BLK * BITS as usize / 32 } {
                let [low, high] = nibbles(vld1q_u8(w.add(line * 64 + quad * 16)));
                for r in 0..R {
                    let at = x[r].add(line * 32 / BITS as usize);
                    if const { BITS == 4 } {
                        multiply_add(&mut acc[r][0], low, broadcast(at));
                        multiply_add(&mut acc[r][0], high, broadcast(at.add(4)));
                    } else {
                        multiply_add(&mut acc[r][0], low, broadcast(at));
                        multiply_add(&mut acc[r][1], high, broadcast(at));
                    }
                }
            }
            for r in 0..R {
                out[r][quad] = sum_rows(acc[r][0]);
                if const { BITS == 8 } {
                    out[r][quad] = vaddq_s32(out[r][quad], vshlq_n_s32::<4>(sum_rows(acc[r][1])));
                }
            }
        }
        out
    }

    /// Two products of 6 bits fit into i16 (2·63·128 = 16,128).
    #[inline(always)]
    unsafe fn add_eight(mut acc: I, codes: [I; 2], x: *const i8) -> I {
        let x = [broadcast(x), broadcast(x.add(4))];
        for quad in 0..4 {
            let mut sums = [vdupq_n_s16(0); 2];
            for i in 0..2 {
                multiply_add(&mut sums, vreinterpretq_s8_s32(codes[i][quad]), x[i]);
            }
            acc[quad] = vaddq_s32(acc[quad], sum_rows(sums));
        }
        acc
    }
}
