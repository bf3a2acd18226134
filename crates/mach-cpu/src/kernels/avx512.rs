//! AVX-512 F, BW, DQ and VL: 16 lanes in one register. Products by `maddubs` as in AVX2, 64 bytes at a time.

use std::arch::x86_64::*;

use super::simd::{Kernel, Simd};

#[derive(Clone, Copy)]
pub(crate) struct Avx512;

impl Simd for Avx512 {
    type F = __m512;
    type I = __m512i;

    const MANY_REGISTERS: bool = true;

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        _mm512_set1_ps(x)
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m512 {
        _mm512_loadu_ps(p)
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: __m512) {
        _mm512_storeu_ps(p, v);
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        _mm512_add_ps(a, b)
    }
    #[inline(always)]
    unsafe fn sub(a: __m512, b: __m512) -> __m512 {
        _mm512_sub_ps(a, b)
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        _mm512_mul_ps(a, b)
    }
    #[inline(always)]
    unsafe fn div(a: __m512, b: __m512) -> __m512 {
        _mm512_div_ps(a, b)
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        _mm512_fmadd_ps(a, b, c)
    }
    #[inline(always)]
    unsafe fn max(a: __m512, b: __m512) -> __m512 {
        _mm512_max_ps(a, b)
    }
    #[inline(always)]
    unsafe fn min(a: __m512, b: __m512) -> __m512 {
        _mm512_min_ps(a, b)
    }
    #[inline(always)]
    unsafe fn abs(a: __m512) -> __m512 {
        _mm512_abs_ps(a)
    }
    #[inline(always)]
    unsafe fn zero_where_gt(a: __m512, b: __m512, x: __m512) -> __m512 {
        _mm512_maskz_mov_ps(!_mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b), x)
    }
    #[inline(always)]
    unsafe fn gt_bits(a: __m512, b: __m512) -> u32 {
        u32::from(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b))
    }
    #[inline(always)]
    unsafe fn sum(a: __m512) -> f32 {
        let eight = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
        let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
    }

    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> __m512 {
        _mm512_cvtph_ps(_mm256_loadu_si256(p.cast()))
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> __m512 {
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()))))
    }
    /// Pairs stay interleaved: rows 0..8, then rows 8..16.
    #[inline(always)]
    unsafe fn f16_pairs(p: *const u8) -> [__m512; 2] {
        [Self::load_f16(p.cast()), Self::load_f16(p.add(32).cast())]
    }
    #[inline(always)]
    unsafe fn f16_pair_x(even: f32, odd: f32) -> [__m512; 2] {
        let pair = i64::from(even.to_bits()) | i64::from(odd.to_bits()) << 32;
        [_mm512_castsi512_ps(_mm512_set1_epi64(pair)); 2]
    }
    #[inline(always)]
    unsafe fn f16_pair_sum(acc: [__m512; 2]) -> __m512 {
        let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        let odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
        _mm512_add_ps(_mm512_permutex2var_ps(acc[0], even, acc[1]), _mm512_permutex2var_ps(acc[0], odd, acc[1]))
    }

    #[inline(always)]
    unsafe fn splat_i(x: i32) -> __m512i {
        _mm512_set1_epi32(x)
    }
    #[inline(always)]
    unsafe fn load_u8(p: *const u8) -> __m512i {
        _mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast()))
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> __m512i {
        _mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()))
    }
    #[inline(always)]
    unsafe fn load_i(p: *const i32) -> __m512i {
        _mm512_loadu_si512(p.cast())
    }
    #[inline(always)]
    unsafe fn add_i(a: __m512i, b: __m512i) -> __m512i {
        _mm512_add_epi32(a, b)
    }
    #[inline(always)]
    unsafe fn and_i(a: __m512i, b: __m512i) -> __m512i {
        _mm512_and_si512(a, b)
    }
    #[inline(always)]
    unsafe fn or_i(a: __m512i, b: __m512i) -> __m512i {
        _mm512_or_si512(a, b)
    }
    #[inline(always)]
    unsafe fn store_i(p: *mut u8, a: __m512i) {
        _mm512_storeu_si512(p.cast(), a);
    }
    #[inline(always)]
    unsafe fn xor_i(a: __m512i, b: __m512i) -> __m512i {
        _mm512_xor_si512(a, b)
    }
    #[inline(always)]
    unsafe fn add_bytes(a: __m512i, b: __m512i) -> __m512i {
        _mm512_add_epi8(a, b)
    }
    #[inline(always)]
    unsafe fn equal_bytes(a: __m512i, b: __m512i) -> __m512i {
        _mm512_movm_epi8(_mm512_cmpeq_epi8_mask(a, b))
    }
    #[inline(always)]
    unsafe fn spread_byte(a: __m512i) -> __m512i {
        _mm512_shuffle_epi8(a, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12)))
    }
    #[inline(always)]
    unsafe fn lookup(table: &[u8; 16], a: __m512i) -> __m512i {
        _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast())), a)
    }
    #[inline(always)]
    unsafe fn max_i(a: __m512i, b: __m512i) -> __m512i {
        _mm512_max_epi32(a, b)
    }
    #[inline(always)]
    unsafe fn shl_i<const N: i32>(a: __m512i) -> __m512i {
        _mm512_sll_epi32(a, _mm_cvtsi32_si128(N))
    }
    #[inline(always)]
    unsafe fn shr_i(a: __m512i, n: u32) -> __m512i {
        _mm512_srl_epi32(a, _mm_cvtsi32_si128(n as i32))
    }
    #[inline(always)]
    unsafe fn largest_i(a: __m512i) -> i32 {
        _mm512_reduce_max_epi32(a)
    }
    #[inline(always)]
    unsafe fn sum_i(a: __m512i) -> i32 {
        _mm512_reduce_add_epi32(a)
    }
    #[inline(always)]
    unsafe fn to_f(a: __m512i) -> __m512 {
        _mm512_cvtepi32_ps(a)
    }
    #[inline(always)]
    unsafe fn round(a: __m512) -> __m512i {
        _mm512_cvtps_epi32(a)
    }
    #[inline(always)]
    unsafe fn bits(a: __m512) -> __m512i {
        _mm512_castps_si512(a)
    }
    #[inline(always)]
    unsafe fn from_bits(a: __m512i) -> __m512 {
        _mm512_castsi512_ps(a)
    }
    #[inline(always)]
    unsafe fn store_i8(p: *mut i8, a: __m512i) {
        _mm_storeu_si128(p.cast(), _mm512_cvtepi32_epi8(a));
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        _mm_prefetch::<_MM_HINT_T0>(p.cast());
    }
}

/// The four columns' numbers of 16 columns of 6 bits, a line of each.
#[inline(always)]
pub(crate) unsafe fn six_bits(w: *const u8) -> [__m512i; 4] {
    let (nibble, two) = (_mm512_set1_epi8(15), _mm512_set1_epi8(0x30));
    let (a, b, high) = (_mm512_loadu_si512(w.cast()), _mm512_loadu_si512(w.add(64).cast()), _mm512_loadu_si512(w.add(128).cast()));
    let join = |low: __m512i, high: __m512i| _mm512_or_si512(_mm512_and_si512(low, nibble), _mm512_and_si512(high, two));
    [
        join(a, _mm512_slli_epi16::<4>(high)),
        join(_mm512_srli_epi16::<4>(a), _mm512_slli_epi16::<2>(high)),
        join(b, high),
        join(_mm512_srli_epi16::<4>(b), _mm512_srli_epi16::<2>(high)),
    ]
}

impl Kernel for Avx512 {
    type V = Self;

    /// See `Avx2::dot`: up to eight `maddubs` of nibbles are added in i16.
    #[inline(always)]
    unsafe fn dot<const BITS: u8, const BLK: usize, const R: usize>(w: *const u8, x: [*const i8; R], _: [i32; R]) -> [__m512i; R] {
        let nibble = _mm512_set1_epi8(15);
        let (ones, sixteens) = (_mm512_set1_epi16(1), _mm512_set1_epi16(16));
        let mut out = [_mm512_setzero_si512(); R];
        if const { BITS == 6 } {
            for sixteen in 0..BLK / 16 {
                let codes = six_bits(w.add(sixteen * 192));
                for r in 0..R {
                    for pair in 0..2 {
                        let x = x[r].add(sixteen * 16 + pair * 8).cast::<i32>();
                        let (x0, x1) = (_mm512_set1_epi32(x.read_unaligned()), _mm512_set1_epi32(x.add(1).read_unaligned()));
                        let sum = _mm512_add_epi16(_mm512_maddubs_epi16(codes[pair * 2], x0), _mm512_maddubs_epi16(codes[pair * 2 + 1], x1));
                        out[r] = _mm512_add_epi32(out[r], _mm512_madd_epi16(sum, ones));
                    }
                }
            }
            return out;
        }
        let per_run = if const { BITS == 4 } { 4 } else { 8 };
        for run in 0..BLK.div_ceil(32) {
            let mut acc = [[_mm512_setzero_si512(); 2]; R];
            for line in run * per_run..((run + 1) * per_run).min(BLK * BITS as usize / 32) {
                let bytes = _mm512_loadu_si512(w.add(line * 64).cast());
                let low = _mm512_and_si512(bytes, nibble);
                let high = _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), nibble);
                for r in 0..R {
                    let at = x[r].add(line * 32 / BITS as usize).cast::<i32>();
                    let x0 = _mm512_set1_epi32(at.read_unaligned());
                    if const { BITS == 4 } {
                        let x1 = _mm512_set1_epi32(at.add(1).read_unaligned());
                        acc[r][0] = _mm512_add_epi16(acc[r][0], _mm512_maddubs_epi16(low, x0));
                        acc[r][0] = _mm512_add_epi16(acc[r][0], _mm512_maddubs_epi16(high, x1));
                    } else {
                        acc[r][0] = _mm512_add_epi16(acc[r][0], _mm512_maddubs_epi16(low, x0));
                        acc[r][1] = _mm512_add_epi16(acc[r][1], _mm512_maddubs_epi16(high, x0));
                    }
                }
            }
            for r in 0..R {
                out[r] = _mm512_add_epi32(out[r], _mm512_madd_epi16(acc[r][0], ones));
                if const { BITS == 8 } {
                    out[r] = _mm512_add_epi32(out[r], _mm512_madd_epi16(acc[r][1], sixteens));
                }
            }
        }
        out
    }

    #[inline(always)]
    unsafe fn add_eight(acc: __m512i, codes: [__m512i; 2], x: *const i8) -> __m512i {
        let x = x.cast::<i32>();
        let (x0, x1) = (_mm512_set1_epi32(x.read_unaligned()), _mm512_set1_epi32(x.add(1).read_unaligned()));
        let sum = _mm512_add_epi16(_mm512_maddubs_epi16(codes[0], x0), _mm512_maddubs_epi16(codes[1], x1));
        _mm512_add_epi32(acc, _mm512_madd_epi16(sum, _mm512_set1_epi16(1)))
    }
}
