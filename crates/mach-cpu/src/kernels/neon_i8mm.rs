//! NEON with int8 matrix multiplication: `usmmla` multiplies two output rows × 8 columns by two activation rows, a lone
//! activation row goes by `usdot`. By `asm!`, the intrinsics are not stable yet.

use std::arch::aarch64::*;
use std::arch::asm;

use super::neon::{Neon, broadcast, nibbles, six_bits};
use super::neon_dot::NeonDot;
use super::simd::Kernel;

pub(crate) struct NeonI8mm;

#[inline(always)]
unsafe fn usdot(acc: &mut int32x4_t, w: int8x16_t, x: int8x16_t) {
    asm!("usdot {0:v}.4s, {1:v}.16b, {2:v}.16b", inout(vreg) *acc, in(vreg) w, in(vreg) x, options(pure, nomem, nostack, preserves_flags));
}

#[inline(always)]
unsafe fn usmmla(acc: &mut int32x4_t, w: int8x16_t, x: int8x16_t) {
    asm!("usmmla {0:v}.4s, {1:v}.16b, {2:v}.16b", inout(vreg) *acc, in(vreg) w, in(vreg) x, options(pure, nomem, nostack, preserves_flags));
}

/// Columns `k..k + 4` and `k + 4..k + 8` of four rows, for 8 columns at step `step`.
#[inline(always)]
unsafe fn eight_columns<const BITS: u8>(w: *const u8, step: usize, quad: usize) -> [int8x16_t; 2] {
    if const { BITS == 4 } {
        nibbles(vld1q_u8(w.add(step * 64 + quad * 16)))
    } else if const { BITS == 6 } {
        let codes = six_bits(w.add(step / 2 * 192 + quad * 16));
        if step % 2 == 0 { [codes[0], codes[1]] } else { [codes[2], codes[3]] }
    } else {
        let at = w.add(step * 128 + quad * 16).cast();
        [vld1q_s8(at), vld1q_s8(at.add(64))]
    }
}

impl Kernel for NeonI8mm {
    type V = Neon;

    #[inline(always)]
    unsafe fn dot<const BITS: u8, const BLK: usize, const R: usize>(w: *const u8, x: [*const i8; R], _: [i32; R]) -> [[int32x4_t; 4]; R] {
        let mut out = [[vdupq_n_s32(0); 4]; R];
        for pair in 0..R / 2 {
            let (x0, x1) = (x[pair * 2], x[pair * 2 + 1]);
            let mut acc = [[vdupq_n_s32(0); 2]; 4];
            for step in 0..BLK / 8 {
                let rows = vcombine_s8(vld1_s8(x0.add(step * 8)), vld1_s8(x1.add(step * 8)));
                for quad in 0..4 {
                    let [a, b] = eight_columns::<BITS>(w, step, quad);
                    let (a, b) = (vreinterpretq_s32_s8(a), vreinterpretq_s32_s8(b));
                    usmmla(&mut acc[quad][0], vreinterpretq_s8_s32(vzip1q_s32(a, b)), rows);
                    usmmla(&mut acc[quad][1], vreinterpretq_s8_s32(vzip2q_s32(a, b)), rows);
                }
            }
            for quad in 0..4 {
                out[pair * 2][quad] = vuzp1q_s32(acc[quad][0], acc[quad][1]);
                out[pair * 2 + 1][quad] = vuzp2q_s32(acc[quad][0], acc[quad][1]);
            }
        }
        if R % 2 == 1 {
            let last = R - 1;
            for step in 0..BLK / 8 {
                let (x0, x1) = (broadcast(x[last].add(step * 8)), broadcast(x[last].add(step * 8 + 4)));
                for quad in 0..4 {
                    let [a, b] = eight_columns::<BITS>(w, step, quad);
                    usdot(&mut out[last][quad], a, x0);
                    usdot(&mut out[last][quad], b, x1);
                }
            }
        }
        out
    }

    #[inline(always)]
    unsafe fn add_eight(acc: [int32x4_t; 4], codes: [[int32x4_t; 4]; 2], x: *const i8) -> [int32x4_t; 4] {
        NeonDot::add_eight(acc, codes, x)
    }
}
