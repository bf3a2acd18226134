//! Products of FP8 weights with f32 activations: numbers are widened exactly, a group's sum is scaled once.
//!
//! Per group two chains of fused multiply-adds for each output row, over even and over odd columns, added and then
//! scaled into the row's sum, whatever the number of activation rows.

use mach_format::{PackedLayout, ScaleType};

use super::plain::PlainRows;
use super::products::PREFETCH;
use super::simd::{LANES, Simd};

/// Columns of the largest group.
const GROUP: usize = 128;

/// Rows from which on a group is widened once for all.
const WIDEN_FROM: usize = 3;

/// `out[t][i][0..16]` = tile `t` of `tiles` × row `rows[i]`, groups of `group` columns.
///
/// # Safety
/// As `plain_tiles`.
#[inline(always)]
pub(super) unsafe fn fp8_tiles<V: Simd>(
    layout: &PackedLayout,
    (group, scales): (usize, ScaleType),
    data: *const u8,
    tiles: usize,
    acts: &PlainRows,
    rows: &[u32],
    out: *mut f32,
) {
    let mut wide = [0.0; GROUP * LANES];
    for t in 0..tiles {
        let (tile, to) = (data.add(t * layout.tile_bytes()), out.add(t * rows.len() * LANES));
        for g in 0..layout.cols / group {
            let lines = tile.add(g * layout.block_bytes());
            let scale = match scales {
                ScaleType::BF16 => V::load_bf16(lines.add(group * LANES).cast()),
                ScaleType::F16 => V::load_f16(lines.add(group * LANES).cast()),
                ScaleType::F32 => V::load(lines.add(group * LANES).cast()),
            };
            if rows.len() < WIDEN_FROM {
                for i in 0..rows.len() {
                    let x = acts.x.add(rows[i] as usize * acts.stride + g * group);
                    add_group::<V>(stored::<V>(lines, x, group), scale, g, to.add(i * LANES));
                }
                continue;
            }
            for four in 0..group / 4 {
                let w = line::<V>(lines.add(four * 64));
                for c in 0..4 {
                    V::store(wide.as_mut_ptr().add((four * 4 + c) * LANES), w[c]);
                }
            }
            let mut i = 0;
            while i < rows.len() {
                let x0 = acts.x.add(rows[i] as usize * acts.stride + g * group);
                if i + 2 <= rows.len() {
                    let x1 = acts.x.add(rows[i + 1] as usize * acts.stride + g * group);
                    let sums = widened::<V, 2>(wide.as_ptr(), [x0, x1], group);
                    add_group::<V>(sums[0], scale, g, to.add(i * LANES));
                    add_group::<V>(sums[1], scale, g, to.add((i + 1) * LANES));
                } else {
                    add_group::<V>(widened::<V, 1>(wide.as_ptr(), [x0], group)[0], scale, g, to.add(i * LANES));
                }
                i += 2;
            }
        }
    }
}

#[inline(always)]
unsafe fn add_group<V: Simd>(sum: V::F, scale: V::F, g: usize, out: *mut f32) {
    let before = if g == 0 { V::splat(0.0) } else { V::load(out) };
    V::store(out, V::fma(scale, sum, before));
}

/// One row's sum over a group of numbers as they are stored.
#[inline(always)]
unsafe fn stored<V: Simd>(lines: *const u8, x: *const f32, group: usize) -> V::F {
    let mut acc = [V::splat(0.0); 2];
    for four in 0..group / 4 {
        let at = lines.add(four * 64);
        V::prefetch(at.wrapping_add(PREFETCH));
        let w = line::<V>(at);
        for c in 0..4 {
            acc[c % 2] = V::fma(w[c], V::splat(*x.add(four * 4 + c)), acc[c % 2]);
        }
    }
    V::add(acc[0], acc[1])
}

/// The sums of `R` rows over a widened group.
#[inline(always)]
unsafe fn widened<V: Simd, const R: usize>(wide: *const f32, x: [*const f32; R], group: usize) -> [V::F; R] {
    let mut acc = [[V::splat(0.0); 2]; R];
    for pair in 0..group / 2 {
        for c in 0..2 {
            let w = V::load(wide.add((pair * 2 + c) * LANES));
            for r in 0..R {
                acc[r][c] = V::fma(w, V::splat(*x[r].add(pair * 2 + c)), acc[r][c]);
            }
        }
    }
    let mut sums = [V::splat(0.0); R];
    for r in 0..R {
        sums[r] = V::add(acc[r][0], acc[r][1]);
    }
    sums
}

/// Four columns of 16 rows: exponent and mantissa to where f32 has them, and a factor of 2¹²⁰ between the biases.
#[inline(always)]
unsafe fn line<V: Simd>(at: *const u8) -> [V::F; 4] {
    let (word, sign, rest) = (V::load_i(at.cast()), V::splat_i(i32::MIN), V::splat_i(0x07f0_0000));
    let bias = V::splat(f32::from_bits((127 + 120) << 23));
    let bits = [
        V::or_i(V::and_i(V::shl_i::<24>(word), sign), V::and_i(V::shl_i::<20>(word), rest)),
        V::or_i(V::and_i(V::shl_i::<16>(word), sign), V::and_i(V::shl_i::<12>(word), rest)),
        V::or_i(V::and_i(V::shl_i::<8>(word), sign), V::and_i(V::shl_i::<4>(word), rest)),
        V::or_i(V::and_i(word, sign), V::and_i(V::shr_i(word, 4), rest)),
    ];
    let mut out = [bias; 4];
    for c in 0..4 {
        out[c] = V::mul(V::from_bits(bits[c]), bias);
    }
    out
}
