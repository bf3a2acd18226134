//! AVX-VNNI, which client processors have without AVX-512: `vpdpbusd` multiplies 32 unsigned weights and signed activations
//! into eight exact i32 sums.
//!
//! Activations of 16 bits go through it as two planes. `vpdpwssd` takes them whole, but wants bytes spread to 16 bits: at best as
//! fast with many rows, and a third slower with one row of byte weights.

use std::arch::x86_64::*;

use super::avx2::{Avx2, load_bytes, pin, six_bits};
use super::simd::{Kernel, Simd};

pub(crate) struct AvxVnni;

type I = <Avx2 as Simd>::I;

/// `sums` and the products of four numbers of each of 16 rows and four activations.
#[inline(always)]
unsafe fn add_four(sums: I, codes: I, x: *const i8) -> I {
    let x = _mm256_set1_epi32(x.cast::<i32>().read_unaligned());
    [_mm256_dpbusd_avx_epi32(sums[0], codes[0], x), _mm256_dpbusd_avx_epi32(sums[1], codes[1], x)]
}

impl Kernel for AvxVnni {
    type V = Avx2;
    const UNPACKS: bool = true;
    const UNPACKS_NIBBLES: bool = true;
    /// Twelve chains of additions: ten cover their latency, and four registers are left.
    const TOGETHER: usize = 6;

    #[inline(always)]
    unsafe fn dot<const BITS: u8, const BLK: usize, const R: usize>(w: *const u8, x: [*const i8; R], _: [i32; R]) -> [I; R] {
        let nibble = _mm256_set1_epi8(15);
        // One or two rows have registers for twice as many chains.
        let (mut sums, mut others) = ([[_mm256_setzero_si256(); 2]; R], [[_mm256_setzero_si256(); 2]; R]);
        if const { BITS == 6 } {
            for sixteen in 0..BLK / 16 {
                let at = w.add(sixteen * 192);
                let halves = [six_bits(at), six_bits(at.add(32))];
                for r in 0..R {
                    for four in 0..4 {
                        sums[r] = add_four(sums[r], [halves[0][four], halves[1][four]], x[r].add(sixteen * 16 + four * 4));
                    }
                }
            }
        } else if const { BITS == 4 } {
            for line in 0..BLK / 8 {
                let bytes = [load_bytes(w.add(line * 64)), load_bytes(w.add(line * 64 + 32))];
                let low = [_mm256_and_si256(bytes[0], nibble), _mm256_and_si256(bytes[1], nibble)];
                let high = [_mm256_and_si256(_mm256_srli_epi16::<4>(bytes[0]), nibble), _mm256_and_si256(_mm256_srli_epi16::<4>(bytes[1]), nibble)];
                for r in 0..R {
                    let x = x[r].add(line * 8);
                    sums[r] = add_four(sums[r], low, x);
                    if const { R <= 2 } {
                        others[r] = add_four(others[r], high, x.add(4));
                    } else {
                        sums[r] = add_four(sums[r], high, x.add(4));
                        pin(&mut sums[r]);
                    }
                }
            }
        } else {
            for line in 0..BLK / 4 {
                let bytes = [load_bytes(w.add(line * 64)), load_bytes(w.add(line * 64 + 32))];
                for r in 0..R {
                    let x = x[r].add(line * 4);
                    if const { R > 2 } {
                        sums[r] = add_four(sums[r], bytes, x);
                        pin(&mut sums[r]);
                    } else if line % 2 == 0 {
                        sums[r] = add_four(sums[r], bytes, x);
                    } else {
                        others[r] = add_four(others[r], bytes, x);
                    }
                }
            }
        }
        if const { R <= 2 } {
            for r in 0..R {
                sums[r] = Avx2::add_i(sums[r], others[r]);
            }
        }
        sums
    }

    #[inline(always)]
    unsafe fn add_eight(acc: I, codes: [I; 2], x: *const i8) -> I {
        add_four(add_four(acc, codes[0], x), codes[1], x.add(4))
    }
}
