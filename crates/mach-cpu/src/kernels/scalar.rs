//! The plain twin of every vector set: arrays of 16, no instruction set needed.
//! All functions are unsafe only because the traits' are.

use super::simd::{Kernel, LANES, Simd};

#[derive(Clone, Copy)]
pub(crate) struct Scalar;

#[inline(always)]
fn zip<T: Copy, U: Copy + Default>(a: [T; LANES], b: [T; LANES], f: impl Fn(T, T) -> U) -> [U; LANES] {
    let mut out = [U::default(); LANES];
    for i in 0..LANES {
        out[i] = f(a[i], b[i]);
    }
    out
}

#[inline(always)]
unsafe fn read<T: Copy>(p: *const T) -> [T; LANES] {
    p.cast::<[T; LANES]>().read_unaligned()
}

impl Simd for Scalar {
    type F = [f32; LANES];
    type I = [i32; LANES];

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::F {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::F {
        read(p)
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::F) {
        p.cast::<Self::F>().write_unaligned(v);
    }
    #[inline(always)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        let mut out = c;
        for i in 0..LANES {
            out[i] = a[i].mul_add(b[i], c[i]);
        }
        out
    }
    #[inline(always)]
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    unsafe fn abs(a: Self::F) -> Self::F {
        a.map(f32::abs)
    }
    #[inline(always)]
    unsafe fn zero_where_gt(a: Self::F, b: Self::F, x: Self::F) -> Self::F {
        let mut out = x;
        for i in 0..LANES {
            if a[i] > b[i] {
                out[i] = 0.0;
            }
        }
        out
    }
    #[inline(always)]
    unsafe fn gt_bits(a: Self::F, b: Self::F) -> u32 {
        (0..LANES).map(|i| u32::from(a[i] > b[i]) << i).sum()
    }
    #[inline(always)]
    unsafe fn sum(mut a: Self::F) -> f32 {
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                a[i] += a[i + half];
            }
        }
        a[0]
    }

    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self::F {
        read(p).map(|h| half::f16::from_bits(h).to_f32())
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self::F {
        read(p).map(|h| f32::from_bits(u32::from(h) << 16))
    }
    #[inline(always)]
    unsafe fn f16_pairs(p: *const u8) -> [Self::F; 2] {
        let pairs = read(p.cast::<[u16; 2]>());
        let wide = |h: u16| half::f16::from_bits(h).to_f32();
        [pairs.map(|p| wide(p[0])), pairs.map(|p| wide(p[1]))]
    }
    #[inline(always)]
    unsafe fn f16_pair_x(even: f32, odd: f32) -> [Self::F; 2] {
        [[even; LANES], [odd; LANES]]
    }
    #[inline(always)]
    unsafe fn f16_pair_sum(acc: [Self::F; 2]) -> Self::F {
        Self::add(acc[0], acc[1])
    }

    #[inline(always)]
    unsafe fn splat_i(x: i32) -> Self::I {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load_u8(p: *const u8) -> Self::I {
        p.cast::<[u8; LANES]>().read().map(i32::from)
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> Self::I {
        p.cast::<[i8; LANES]>().read().map(i32::from)
    }
    #[inline(always)]
    unsafe fn load_i(p: *const i32) -> Self::I {
        read(p)
    }
    #[inline(always)]
    unsafe fn add_i(a: Self::I, b: Self::I) -> Self::I {
        zip(a, b, i32::wrapping_add)
    }
    #[inline(always)]
    unsafe fn and_i(a: Self::I, b: Self::I) -> Self::I {
        zip(a, b, |a, b| a & b)
    }
    #[inline(always)]
    unsafe fn or_i(a: Self::I, b: Self::I) -> Self::I {
        zip(a, b, |a, b| a | b)
    }
    #[inline(always)]
    unsafe fn store_i(p: *mut u8, a: Self::I) {
        p.cast::<Self::I>().write_unaligned(a);
    }
    #[inline(always)]
    unsafe fn xor_i(a: Self::I, b: Self::I) -> Self::I {
        zip(a, b, |a, b| a ^ b)
    }
    #[inline(always)]
    unsafe fn add_bytes(a: Self::I, b: Self::I) -> Self::I {
        // The upper bit of each byte apart, so that nothing is carried out of it.
        zip(a, b, |a, b| ((a & 0x7f7f_7f7f) + (b & 0x7f7f_7f7f)) ^ ((a ^ b) & i32::from_ne_bytes([0x80; 4])))
    }
    #[inline(always)]
    unsafe fn equal_bytes(a: Self::I, b: Self::I) -> Self::I {
        zip(a, b, |a, b| i32::from_le_bytes((a ^ b).to_le_bytes().map(|x| if x == 0 { 255 } else { 0 })))
    }
    #[inline(always)]
    unsafe fn spread_byte(a: Self::I) -> Self::I {
        a.map(|x| i32::from_ne_bytes([x as u8; 4]))
    }
    #[inline(always)]
    unsafe fn lookup(table: &[u8; 16], a: Self::I) -> Self::I {
        a.map(|x| i32::from_le_bytes(x.to_le_bytes().map(|i| table[usize::from(i & 15)])))
    }
    #[inline(always)]
    unsafe fn max_i(a: Self::I, b: Self::I) -> Self::I {
        zip(a, b, i32::max)
    }
    #[inline(always)]
    unsafe fn shl_i<const N: i32>(a: Self::I) -> Self::I {
        a.map(|x| x << N)
    }
    #[inline(always)]
    unsafe fn shr_i(a: Self::I, n: u32) -> Self::I {
        a.map(|x| (x as u32 >> n) as i32)
    }
    #[inline(always)]
    unsafe fn largest_i(a: Self::I) -> i32 {
        a.into_iter().fold(i32::MIN, i32::max)
    }
    #[inline(always)]
    unsafe fn sum_i(a: Self::I) -> i32 {
        a.into_iter().fold(0, i32::wrapping_add)
    }
    #[inline(always)]
    unsafe fn to_f(a: Self::I) -> Self::F {
        a.map(|x| x as f32)
    }
    #[inline(always)]
    unsafe fn round(a: Self::F) -> Self::I {
        a.map(|x| x.round_ties_even() as i32)
    }
    #[inline(always)]
    unsafe fn bits(a: Self::F) -> Self::I {
        a.map(|x| x.to_bits() as i32)
    }
    #[inline(always)]
    unsafe fn from_bits(a: Self::I) -> Self::F {
        a.map(|x| f32::from_bits(x as u32))
    }
    #[inline(always)]
    unsafe fn store_i8(p: *mut i8, a: Self::I) {
        p.cast::<[i8; LANES]>().write(a.map(|x| x as i8));
    }
    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}
}

/// Numbers of 4 columns × 16 rows, `[row][column]`: columns `4·four..` of the lines at `w`.
#[inline(always)]
unsafe fn codes<const BITS: u8>(w: *const u8, four: usize) -> [u8; 64] {
    let line = |line: usize| w.add(line * 64).cast::<[u8; 64]>().read();
    let nibbles = |bytes: [u8; 64]| bytes.map(|b| if four.is_multiple_of(2) { b & 15 } else { b >> 4 });
    match BITS {
        8 => line(four),
        6 => {
            let sixteen = four / 4 * 3;
            let (low, high) = (nibbles(line(sixteen + four % 4 / 2)), line(sixteen + 2).map(|b| (b >> (four % 4 * 2) & 3) << 4));
            std::array::from_fn(|i| low[i] | high[i])
        }
        _ => nibbles(line(four / 2)),
    }
}

impl Kernel for Scalar {
    type V = Self;

    #[inline(always)]
    unsafe fn dot<const BITS: u8, const BLK: usize, const R: usize>(w: *const u8, x: [*const i8; R], _: [i32; R]) -> [[i32; LANES]; R] {
        let mut out = [[0; LANES]; R];
        for four in 0..BLK / 4 {
            let codes = codes::<BITS>(w, four);
            for r in 0..R {
                let x = x[r].add(four * 4).cast::<[i8; 4]>().read();
                for (sum, codes) in out[r].iter_mut().zip(codes.as_chunks::<4>().0) {
                    for (&code, &x) in codes.iter().zip(&x) {
                        *sum += i32::from(code) * i32::from(x);
                    }
                }
            }
        }
        out
    }

    #[inline(always)]
    unsafe fn add_eight(mut acc: [i32; LANES], codes: [[i32; LANES]; 2], x: *const i8) -> [i32; LANES] {
        for (i, codes) in codes.into_iter().enumerate() {
            let x = x.add(i * 4).cast::<[i8; 4]>().read();
            for (sum, codes) in acc.iter_mut().zip(codes) {
                for (code, x) in codes.to_le_bytes().into_iter().zip(x) {
                    *sum += i32::from(code) * i32::from(x);
                }
            }
        }
        acc
    }
}
