//! NEON with `sdot`: four products of each of four rows into i32 lanes. By `asm!`, the intrinsic is not stable yet.

use std::arch::aarch64::*;
use std::arch::asm;

use super::neon::{Neon, broadcast, nibbles, six_bits};
use super::simd::Kernel;

pub(crate) struct NeonDot;

#[inline(always)]
unsafe fn sdot(acc: &mut int32x4_t, w: int8x16_t, x: int8x16_t) {
    asm!("sdot {0:v}.4s, {1:v}.16b, {2:v}.16b", inout(vreg) *acc, in(vreg) w, in(vreg) x, options(pure, nomem, nostack, preserves_flags));
}

impl Kernel for NeonDot {
    type V = Neon;

    /// Byte weights are made signed by subtracting 128, which the sum of the activations puts right.
    #[inline(always)]
    unsafe fn dot<const BITS: u8, const BLK: usize, const R: usize>(w: *const u8, x: [*const i8; R], sums: [i32; R]) -> [[int32x4_t; 4]; R] {
        let mut out = [[vdupq_n_s32(0); 4]; R];
        if const { BITS == 8 } {
            for r in 0..R {
                out[r] = [vdupq_n_s32(128 * sums[r]); 4];
            }
        }
        if const { BITS == 6 } {
            for quad in 0..4 {
                for sixteen in 0..BLK / 16 {
                    let codes = six_bits(w.add(sixteen * 192 + quad * 16));
                    for (four, codes) in codes.into_iter().enumerate() {
                        for r in 0..R {
                            sdot(&mut out[r][quad], codes, broadcast(x[r].add(sixteen * 16 + four * 4)));
                        }
                    }
                }
            }
        }
        for line in 0..if const { BITS == 6 } { 0 } else { BLK * BITS as usize / 32 } {
            let (mut x0, mut x1) = ([vdupq_n_s8(0); R], [vdupq_n_s8(0); R]);
            for r in 0..R {
                let at = x[r].add(line * 32 / BITS as usize);
                x0[r] = broadcast(at);
                if const { BITS == 4 } {
                    x1[r] = broadcast(at.add(4));
                }
            }
            for quad in 0..4 {
                let bytes = vld1q_u8(w.add(line * 64 + quad * 16));
                if const { BITS == 4 } {
                    let [low, high] = nibbles(bytes);
                    for r in 0..R {
                        sdot(&mut out[r][quad], low, x0[r]);
                        sdot(&mut out[r][quad], high, x1[r]);
                    }
                } else {
                    let signed = vreinterpretq_s8_u8(veorq_u8(bytes, vdupq_n_u8(128)));
                    for r in 0..R {
                        sdot(&mut out[r][quad], signed, x0[r]);
                    }
                }
            }
        }
        out
    }

    #[inline(always)]
    unsafe fn add_eight(mut acc: [int32x4_t; 4], codes: [[int32x4_t; 4]; 2], x: *const i8) -> [int32x4_t; 4] {
        for i in 0..2 {
            let x = broadcast(x.add(i * 4));
            for quad in 0..4 {
                sdot(&mut acc[quad], vreinterpretq_s8_s32(codes[i][quad]), x);
            }
        }
        acc
    }
}
