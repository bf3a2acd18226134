//! AVX2 with FMA and F16C: 16 lanes in two registers.

use std::arch::asm;
use std::arch::x86_64::*;

use super::simd::{Kernel, Simd};

#[derive(Clone, Copy)]
pub(crate) struct Avx2;

type F = [__m256; 2];
type I = [__m256i; 2];

#[inline(always)]
pub(super) unsafe fn load_bytes(p: *const u8) -> __m256i {
    _mm256_loadu_si256(p.cast())
}

/// Rows 0 1 | 2 3 and 4 5 | 6 7: even and odd picked per 128 bits, then the 64-bit quarters put in order.
#[inline(always)]
unsafe fn pair_sum_f16(v: F) -> __m256 {
    let even = _mm256_shuffle_ps::<0b10_00_10_00>(v[0], v[1]);
    let odd = _mm256_shuffle_ps::<0b11_01_11_01>(v[0], v[1]);
    _mm256_castpd_ps(_mm256_permute4x64_pd::<0b11_01_10_00>(_mm256_castps_pd(_mm256_add_ps(even, odd))))
}

/// Keeps the sums in registers from line to line: left alone, the compiler interleaves lines and spills them.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) unsafe fn pin(sums: &mut [__m256i; 2]) {
    asm!("/* {0} {1} */", inout(ymm_reg) sums[0], inout(ymm_reg) sums[1], options(pure, nomem, nostack, preserves_flags));
}

/// The same addresses, of which the compiler does not know that it has read them before.
#[inline(always)]
unsafe fn anew<const R: usize>(mut x: [*const i8; R]) -> [*const i8; R] {
    for p in &mut x {
        let mut address = p.addr();
        asm!("/* {0} */", inout(reg) address, options(nomem, nostack, preserves_flags));
        *p = p.with_addr(address);
    }
    x
}

/// Half a line of each of the four columns' numbers of 16 columns of 6 bits.
#[inline(always)]
pub(super) unsafe fn six_bits(w: *const u8) -> [__m256i; 4] {
    let (nibble, two) = (_mm256_set1_epi8(15), _mm256_set1_epi8(0x30));
    let (a, b, high) = (load_bytes(w), load_bytes(w.add(64)), load_bytes(w.add(128)));
    let join = |low: __m256i, high: __m256i| _mm256_or_si256(_mm256_and_si256(low, nibble), _mm256_and_si256(high, two));
    [
        join(a, _mm256_slli_epi16::<4>(high)),
        join(_mm256_srli_epi16::<4>(a), _mm256_slli_epi16::<2>(high)),
        join(b, high),
        join(_mm256_srli_epi16::<4>(b), _mm256_srli_epi16::<2>(high)),
    ]
}

impl Simd for Avx2 {
    type F = F;
    type I = I;

    #[inline(always)]
    unsafe fn splat(x: f32) -> F {
        [_mm256_set1_ps(x); 2]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> F {
        [_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))]
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: F) {
        _mm256_storeu_ps(p, v[0]);
        _mm256_storeu_ps(p.add(8), v[1]);
    }
    #[inline(always)]
    unsafe fn add(a: F, b: F) -> F {
        [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn sub(a: F, b: F) -> F {
        [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn mul(a: F, b: F) -> F {
        [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn div(a: F, b: F) -> F {
        [_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn fma(a: F, b: F, c: F) -> F {
        [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])]
    }
    #[inline(always)]
    unsafe fn max(a: F, b: F) -> F {
        [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn min(a: F, b: F) -> F {
        [_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn abs(a: F) -> F {
        let sign = _mm256_set1_ps(-0.0);
        [_mm256_andnot_ps(sign, a[0]), _mm256_andnot_ps(sign, a[1])]
    }
    #[inline(always)]
    unsafe fn zero_where_gt(a: F, b: F, x: F) -> F {
        let gt = [_mm256_cmp_ps::<_CMP_GT_OQ>(a[0], b[0]), _mm256_cmp_ps::<_CMP_GT_OQ>(a[1], b[1])];
        [_mm256_andnot_ps(gt[0], x[0]), _mm256_andnot_ps(gt[1], x[1])]
    }
    #[inline(always)]
    unsafe fn gt_bits(a: F, b: F) -> u32 {
        let low = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(a[0], b[0])) as u32;
        low | (_mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(a[1], b[1])) as u32) << 8
    }
    #[inline(always)]
    unsafe fn sum(a: F) -> f32 {
        let eight = _mm256_add_ps(a[0], a[1]);
        let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
    }

    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> F {
        [_mm256_cvtph_ps(_mm_loadu_si128(p.cast())), _mm256_cvtph_ps(_mm_loadu_si128(p.add(8).cast()))]
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> F {
        let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
        let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.add(8).cast()));
        Self::from_bits([_mm256_slli_epi32::<16>(low), _mm256_slli_epi32::<16>(high)])
    }
    /// Pairs stay interleaved, because `vcvtph2ps` takes neighbours: four registers of `(even, odd)`.
    #[inline(always)]
    unsafe fn f16_pairs(p: *const u8) -> [F; 2] {
        let p = p.cast::<u16>();
        [Self::load_f16(p), Self::load_f16(p.add(16))]
    }
    #[inline(always)]
    unsafe fn f16_pair_x(even: f32, odd: f32) -> [F; 2] {
        let pair = i64::from(even.to_bits()) | i64::from(odd.to_bits()) << 32;
        [[_mm256_castsi256_ps(_mm256_set1_epi64x(pair)); 2]; 2]
    }
    #[inline(always)]
    unsafe fn f16_pair_sum(acc: [F; 2]) -> F {
        [pair_sum_f16(acc[0]), pair_sum_f16(acc[1])]
    }

    #[inline(always)]
    unsafe fn splat_i(x: i32) -> I {
        [_mm256_set1_epi32(x); 2]
    }
    #[inline(always)]
    unsafe fn load_i(p: *const i32) -> I {
        [load_bytes(p.cast()), load_bytes(p.add(8).cast())]
    }
    #[inline(always)]
    unsafe fn load_u8(p: *const u8) -> I {
        [_mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast())), _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.add(8).cast()))]
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> I {
        [_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast())), _mm256_cvtepi8_epi32(_mm_loadl_epi64(p.add(8).cast()))]
    }
    #[inline(always)]
    unsafe fn add_i(a: I, b: I) -> I {
        [_mm256_add_epi32(a[0], b[0]), _mm256_add_epi32(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn and_i(a: I, b: I) -> I {
        [_mm256_and_si256(a[0], b[0]), _mm256_and_si256(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn or_i(a: I, b: I) -> I {
        [_mm256_or_si256(a[0], b[0]), _mm256_or_si256(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn store_i(p: *mut u8, a: I) {
        _mm256_storeu_si256(p.cast(), a[0]);
        _mm256_storeu_si256(p.add(32).cast(), a[1]);
    }
    #[inline(always)]
    unsafe fn xor_i(a: I, b: I) -> I {
        [_mm256_xor_si256(a[0], b[0]), _mm256_xor_si256(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn add_bytes(a: I, b: I) -> I {
        [_mm256_add_epi8(a[0], b[0]), _mm256_add_epi8(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn equal_bytes(a: I, b: I) -> I {
        [_mm256_cmpeq_epi8(a[0], b[0]), _mm256_cmpeq_epi8(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn spread_byte(a: I) -> I {
        let lowest = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12));
        [_mm256_shuffle_epi8(a[0], lowest), _mm256_shuffle_epi8(a[1], lowest)]
    }
    /// Loads of single entries: `vpgatherdd` takes three times as long here.
    #[inline(always)]
    unsafe fn gather4(table: &[u32], index: I) -> I {
        let mut at = [0_u32; 16];
        Self::store_i(at.as_mut_ptr().cast(), index);
        let table = table.as_ptr();
        let mut out = index;
        for h in 0..2 {
            let mut quads = [_mm_setzero_si128(); 2];
            for q in 0..2 {
                let at = at.as_ptr().add(h * 8 + q * 4);
                let first = _mm_cvtsi32_si128(*table.add(*at as usize) as i32);
                let second = _mm_insert_epi32::<1>(first, *table.add(*at.add(1) as usize) as i32);
                let third = _mm_insert_epi32::<2>(second, *table.add(*at.add(2) as usize) as i32);
                quads[q] = _mm_insert_epi32::<3>(third, *table.add(*at.add(3) as usize) as i32);
            }
            out[h] = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(quads[0]), quads[1]);
        }
        out
    }
    /// Two entries to a register of 128 bits, so that one shuffle of two gives four rows.
    #[inline(always)]
    unsafe fn gather8(table: &[u64], index: I) -> [I; 2] {
        let mut at = [0_u32; 16];
        Self::store_i(at.as_mut_ptr().cast(), index);
        let table = table.as_ptr();
        let mut out = [index; 2];
        for h in 0..2 {
            let mut pairs = [_mm_setzero_si128(); 4];
            for p in 0..4 {
                let at = at.as_ptr().add(h * 8 + p * 2);
                let first = _mm_loadl_epi64(table.add(*at as usize).cast());
                pairs[p] = _mm_castpd_si128(_mm_loadh_pd(_mm_castsi128_pd(first), table.add(*at.add(1) as usize).cast()));
            }
            // Rows 0 1 4 5 and 2 3 6 7.
            let even = _mm256_castsi256_ps(_mm256_inserti128_si256::<1>(_mm256_castsi128_si256(pairs[0]), pairs[2]));
            let odd = _mm256_castsi256_ps(_mm256_inserti128_si256::<1>(_mm256_castsi128_si256(pairs[1]), pairs[3]));
            out[0][h] = _mm256_castps_si256(_mm256_shuffle_ps::<0b10_00_10_00>(even, odd));
            out[1][h] = _mm256_castps_si256(_mm256_shuffle_ps::<0b11_01_11_01>(even, odd));
        }
        out
    }
    #[inline(always)]
    unsafe fn lookup(table: &[u8; 16], a: I) -> I {
        let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
        [_mm256_shuffle_epi8(table, a[0]), _mm256_shuffle_epi8(table, a[1])]
    }
    #[inline(always)]
    unsafe fn max_i(a: I, b: I) -> I {
        [_mm256_max_epi32(a[0], b[0]), _mm256_max_epi32(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn shl_i<const N: i32>(a: I) -> I {
        [_mm256_slli_epi32::<N>(a[0]), _mm256_slli_epi32::<N>(a[1])]
    }
    #[inline(always)]
    unsafe fn shr_i(a: I, n: u32) -> I {
        let n = _mm_cvtsi32_si128(n as i32);
        [_mm256_srl_epi32(a[0], n), _mm256_srl_epi32(a[1], n)]
    }
    #[inline(always)]
    unsafe fn largest_i(a: I) -> i32 {
        let eight = _mm256_max_epi32(a[0], a[1]);
        let four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256::<1>(eight));
        let two = _mm_max_epi32(four, _mm_shuffle_epi32::<0b11_10>(four));
        _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32::<1>(two)))
    }
    #[inline(always)]
    unsafe fn sum_i(a: I) -> i32 {
        let eight = _mm256_add_epi32(a[0], a[1]);
        let four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256::<1>(eight));
        let two = _mm_add_epi32(four, _mm_shuffle_epi32::<0b11_10>(four));
        _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32::<1>(two)))
    }
    #[inline(always)]
    unsafe fn to_f(a: I) -> F {
        [_mm256_cvtepi32_ps(a[0]), _mm256_cvtepi32_ps(a[1])]
    }
    #[inline(always)]
    unsafe fn round(a: F) -> I {
        [_mm256_cvtps_epi32(a[0]), _mm256_cvtps_epi32(a[1])]
    }
    #[inline(always)]
    unsafe fn bits(a: F) -> I {
        [_mm256_castps_si256(a[0]), _mm256_castps_si256(a[1])]
    }
    #[inline(always)]
    unsafe fn from_bits(a: I) -> F {
        [_mm256_castsi256_ps(a[0]), _mm256_castsi256_ps(a[1])]
    }
    #[inline(always)]
    unsafe fn store_i8(p: *mut i8, a: I) {
        let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(a[0], a[1]));
        _mm_storeu_si128(p.cast(), _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words)));
    }
    #[inline(always)]
    unsafe fn store_i16(p: *mut i16, a: I) {
        let pairs = _mm256_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15, 0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
        let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(a[0], a[1]));
        _mm256_storeu_si256(p.cast(), _mm256_shuffle_epi8(words, pairs));
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        _mm_prefetch::<_MM_HINT_T0>(p.cast());
    }
}

impl Kernel for Avx2 {
    type V = Self;
    const I16: bool = true;
    const UNPACKS: bool = true;

    /// The even bytes of a row's four, then the odd ones, each with two integers: sums in i32 from the start.
    #[inline(always)]
    unsafe fn dot_i16<const BLK: usize, const R: usize>(w: *const u8, x: [*const i16; R]) -> [I; R] {
        let low = _mm256_set1_epi16(255);
        let mut out = [[_mm256_setzero_si256(); 2]; R];
        for line in 0..BLK / 4 {
            let bytes = [load_bytes(w.add(line * 64)), load_bytes(w.add(line * 64 + 32))];
            let even = [_mm256_and_si256(bytes[0], low), _mm256_and_si256(bytes[1], low)];
            let odd = [_mm256_srli_epi16::<8>(bytes[0]), _mm256_srli_epi16::<8>(bytes[1])];
            for r in 0..R {
                let x = x[r].add(line * 4).cast::<i32>();
                let (x0, x1) = (_mm256_set1_epi32(x.read_unaligned()), _mm256_set1_epi32(x.add(1).read_unaligned()));
                for h in 0..2 {
                    out[r][h] = _mm256_add_epi32(out[r][h], _mm256_madd_epi16(even[h], x0));
                    out[r][h] = _mm256_add_epi32(out[r][h], _mm256_madd_epi16(odd[h], x1));
                }
                pin(&mut out[r]);
            }
        }
        out
    }

    /// Two products of 6 bits are added in i16: see `dot`.
    #[inline(always)]
    unsafe fn add_eight(mut acc: I, codes: [I; 2], x: *const i8) -> I {
        let x = x.cast::<i32>();
        let (x0, x1) = (_mm256_set1_epi32(x.read_unaligned()), _mm256_set1_epi32(x.add(1).read_unaligned()));
        for h in 0..2 {
            let sum = _mm256_add_epi16(_mm256_maddubs_epi16(codes[0][h], x0), _mm256_maddubs_epi16(codes[1][h], x1));
            acc[h] = _mm256_add_epi32(acc[h], _mm256_madd_epi16(sum, _mm256_set1_epi16(1)));
        }
        acc
    }

    /// `maddubs` adds two products in i16. Nibbles are at most 15, so eight of them (16·15·128 = 30,720) fit before
    /// they are widened; a byte weight is its two nibbles, low + 16·high, each exact in the same way.
    #[inline(always)]
    unsafe fn dot<const BITS: u8, const BLK: usize, const R: usize>(w: *const u8, x: [*const i8; R], _: [i32; R]) -> [I; R] {
        let nibble = _mm256_set1_epi8(15);
        let ones = _mm256_set1_epi16(1);
        let mut out = [[_mm256_setzero_si256(); 2]; R];
        if const { BITS == 6 } {
            for sixteen in 0..BLK / 16 {
                for h in 0..2 {
                    let codes = six_bits(w.add(sixteen * 192 + h * 32));
                    for r in 0..R {
                        // Two products of 6 bits fit into i16 (4·63·128 = 32,256).
                        for pair in 0..2 {
                            let x = x[r].add(sixteen * 16 + pair * 8).cast::<i32>();
                            let (x0, x1) = (_mm256_set1_epi32(x.read_unaligned()), _mm256_set1_epi32(x.add(1).read_unaligned()));
                            let sum = _mm256_add_epi16(_mm256_maddubs_epi16(codes[pair * 2], x0), _mm256_maddubs_epi16(codes[pair * 2 + 1], x1));
                            out[r][h] = _mm256_add_epi32(out[r][h], _mm256_madd_epi16(sum, ones));
                        }
                    }
                }
            }
        } else if const { BITS == 4 } {
            for four in 0..BLK / 32 {
                let mut acc = [[_mm256_setzero_si256(); 2]; R];
                for line in four * 4..four * 4 + 4 {
                    let at = w.add(line * 64);
                    let bytes = [load_bytes(at), load_bytes(at.add(32))];
                    let low = [_mm256_and_si256(bytes[0], nibble), _mm256_and_si256(bytes[1], nibble)];
                    let high = [_mm256_and_si256(_mm256_srli_epi16::<4>(bytes[0]), nibble), _mm256_and_si256(_mm256_srli_epi16::<4>(bytes[1]), nibble)];
                    for r in 0..R {
                        let x0 = _mm256_set1_epi32(x[r].add(line * 8).cast::<i32>().read_unaligned());
                        let x1 = _mm256_set1_epi32(x[r].add(line * 8 + 4).cast::<i32>().read_unaligned());
                        for h in 0..2 {
                            acc[r][h] = _mm256_add_epi16(acc[r][h], _mm256_maddubs_epi16(low[h], x0));
                            acc[r][h] = _mm256_add_epi16(acc[r][h], _mm256_maddubs_epi16(high[h], x1));
                        }
                        pin(&mut acc[r]);
                    }
                }
                for r in 0..R {
                    for h in 0..2 {
                        out[r][h] = _mm256_add_epi32(out[r][h], _mm256_madd_epi16(acc[r][h], ones));
                    }
                }
            }
        } else {
            let sixteens = _mm256_set1_epi16(16);
            // One half of the rows at a time, for the registers' sake.
            for eight in 0..BLK.div_ceil(32) {
                for h in 0..2 {
                    // Activations are broadcast again for the second half; the compiler would keep 64 vectors on the stack.
                    let x = anew(x);
                    let mut acc = [[_mm256_setzero_si256(); 2]; R];
                    for line in eight * 8..(eight * 8 + 8).min(BLK / 4) {
                        let bytes = load_bytes(w.add(line * 64 + h * 32));
                        let low = _mm256_and_si256(bytes, nibble);
                        let high = _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), nibble);
                        for r in 0..R {
                            let x = _mm256_set1_epi32(x[r].add(line * 4).cast::<i32>().read_unaligned());
                            acc[r][0] = _mm256_add_epi16(acc[r][0], _mm256_maddubs_epi16(low, x));
                            acc[r][1] = _mm256_add_epi16(acc[r][1], _mm256_maddubs_epi16(high, x));
                            pin(&mut acc[r]);
                        }
                    }
                    for r in 0..R {
                        let low = _mm256_madd_epi16(acc[r][0], ones);
                        out[r][h] = _mm256_add_epi32(out[r][h], _mm256_add_epi32(low, _mm256_madd_epi16(acc[r][1], sixteens)));
                    }
                }
            }
        }
        out
    }
}
