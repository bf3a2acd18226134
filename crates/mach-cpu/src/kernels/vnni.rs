//! AVX-512 VNNI: `vpdpbusd` multiplies 64 unsigned weights and signed activations into 16 exact i32 sums.

use std::arch::x86_64::*;

use super::avx512::{Avx512, six_bits};
use super::simd::Kernel;

pub(crate) struct Vnni;

impl Kernel for Vnni {
    type V = Avx512;
    const UNPACKS: bool = true;
    /// Two chains of additions each: 16 cover their latency.
    const TOGETHER: usize = 8;

    #[inline(always)]
    unsafe fn dot<const BITS: u8, const BLK: usize, const R: usize>(w: *const u8, x: [*const i8; R], _: [i32; R]) -> [__m512i; R] {
        let nibble = _mm512_set1_epi8(15);
        let mut out = [[_mm512_setzero_si512(); 2]; R];
        if const { BITS == 6 } {
            for sixteen in 0..BLK / 16 {
                let codes = six_bits(w.add(sixteen * 192));
                for r in 0..R {
                    for four in 0..4 {
                        let x = _mm512_set1_epi32(x[r].add(sixteen * 16 + four * 4).cast::<i32>().read_unaligned());
                        out[r][four % 2] = _mm512_dpbusd_epi32(out[r][four % 2], codes[four], x);
                    }
                }
            }
        }
        for line in 0..if const { BITS == 6 } { 0 } else { BLK * BITS as usize / 32 } {
            let bytes = _mm512_loadu_si512(w.add(line * 64).cast());
            for r in 0..R {
                let at = x[r].add(line * 32 / BITS as usize).cast::<i32>();
                let x0 = _mm512_set1_epi32(at.read_unaligned());
                if const { BITS == 4 } {
                    let x1 = _mm512_set1_epi32(at.add(1).read_unaligned());
                    let high = _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), nibble);
                    out[r][0] = _mm512_dpbusd_epi32(out[r][0], _mm512_and_si512(bytes, nibble), x0);
                    out[r][1] = _mm512_dpbusd_epi32(out[r][1], high, x1);
                } else {
                    out[r][line % 2] = _mm512_dpbusd_epi32(out[r][line % 2], bytes, x0);
                }
            }
        }
        let mut sums = [_mm512_setzero_si512(); R];
        for r in 0..R {
            sums[r] = _mm512_add_epi32(out[r][0], out[r][1]);
        }
        sums
    }

    #[inline(always)]
    unsafe fn add_eight(acc: __m512i, codes: [__m512i; 2], x: *const i8) -> __m512i {
        let x = x.cast::<i32>();
        let first = _mm512_dpbusd_epi32(acc, codes[0], _mm512_set1_epi32(x.read_unaligned()));
        _mm512_dpbusd_epi32(first, codes[1], _mm512_set1_epi32(x.add(1).read_unaligned()))
    }
}
