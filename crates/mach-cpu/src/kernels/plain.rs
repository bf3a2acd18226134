//! Products of f32, f16 and bf16 weights: 16 output rows of one packed tile times activation rows.
//!
//! Two chains of fused multiply-adds for each output row, over even and over odd columns, added at the end, whatever the
//! number of activation rows.

use mach_format::{PackedLayout, WeightFormat};

use super::fp8::fp8_tiles;
use super::products::PREFETCH;
use super::simd::{LANES, Simd};

/// Rows of f32 activations.
#[derive(Clone, Copy)]
pub(crate) struct PlainRows {
    pub x: *const f32,
    pub stride: usize,
}

/// `out[t][i][0..16]` = plain tile `t` of `tiles` × row `rows[i]`.
///
/// # Safety
/// `data` has `tiles` tiles of `layout`, `rows` are rows of `acts`, `out` has 16 values for each tile and row.
#[inline(always)]
pub(crate) unsafe fn plain_tiles<V: Simd>(layout: &PackedLayout, data: *const u8, tiles: usize, acts: &PlainRows, rows: &[u32], out: *mut f32) {
    match layout.format {
        WeightFormat::F32 => plain_format::<V, 0>(layout, data, tiles, acts, rows, out),
        WeightFormat::F16 => plain_format::<V, 1>(layout, data, tiles, acts, rows, out),
        WeightFormat::BF16 => plain_format::<V, 2>(layout, data, tiles, acts, rows, out),
        WeightFormat::Fp8 { group, scales } => fp8_tiles::<V>(layout, (group.into(), scales), data, tiles, acts, rows, out),
        format => unreachable!("{format} weights are not plain"),
    }
}

#[inline(always)]
unsafe fn plain_format<V: Simd, const FORMAT: u8>(layout: &PackedLayout, data: *const u8, tiles: usize, acts: &PlainRows, rows: &[u32], out: *mut f32) {
    let (bytes, per_tile) = (layout.tile_bytes(), rows.len() * LANES);
    let mut t = 0;
    while t < tiles {
        let (tile, to) = (data.add(t * bytes), out.add(t * per_tile));
        // One row alone has too few chains to hide the latency of a multiply-add: two tiles go together.
        if rows.len() == 1 && t + 2 <= tiles {
            plain_rows::<V, FORMAT, 2, 1>([tile, tile.add(bytes)], layout.cols, acts, rows, [to, to.add(per_tile)]);
            t += 2;
            continue;
        }
        let mut i = 0;
        while i + 2 <= rows.len() {
            plain_rows::<V, FORMAT, 1, 2>([tile], layout.cols, acts, &rows[i..], [to.add(i * LANES)]);
            i += 2;
        }
        if i < rows.len() {
            plain_rows::<V, FORMAT, 1, 1>([tile], layout.cols, acts, &rows[i..], [to.add(i * LANES)]);
        }
        t += 1;
    }
}

#[inline(always)]
unsafe fn plain_rows<V: Simd, const FORMAT: u8, const T: usize, const R: usize>(
    tiles: [*const u8; T],
    cols: usize,
    acts: &PlainRows,
    rows: &[u32],
    out: [*mut f32; T],
) {
    let line = if const { FORMAT == 0 } { 128 } else { 64 };
    let mut acc = [[[V::splat(0.0); 2]; R]; T];
    let mut x = [acts.x; R];
    for r in 0..R {
        x[r] = acts.x.add(rows[r] as usize * acts.stride);
    }
    for pair in 0..cols / 2 {
        plain_step::<V, FORMAT, T, R>(&mut acc, tiles, pair * line, x.map(|x| (*x.add(pair * 2), *x.add(pair * 2 + 1))));
    }
    if cols % 2 == 1 {
        let last = x.map(|x| *x.add(cols - 1));
        let at = cols / 2 * line;
        if const { FORMAT == 0 } {
            for t in 0..T {
                let w = V::load(tiles[t].add(at).cast());
                for r in 0..R {
                    acc[t][r][0] = V::fma(w, V::splat(last[r]), acc[t][r][0]);
                }
            }
        } else {
            plain_step::<V, FORMAT, T, R>(&mut acc, tiles, at, last.map(|x| (x, 0.0)));
        }
    }
    for t in 0..T {
        for r in 0..R {
            let sum = if const { FORMAT == 1 } { V::f16_pair_sum(acc[t][r]) } else { V::add(acc[t][r][0], acc[t][r][1]) };
            V::store(out[t].add(r * LANES), sum);
        }
    }
}

/// One pair of columns.
#[inline(always)]
unsafe fn plain_step<V: Simd, const FORMAT: u8, const T: usize, const R: usize>(
    acc: &mut [[[V::F; 2]; R]; T],
    tiles: [*const u8; T],
    at: usize,
    x: [(f32, f32); R],
) {
    for t in 0..T {
        let line = tiles[t].add(at);
        V::prefetch(line.wrapping_add(PREFETCH));
        let w = match FORMAT {
            0 => {
                V::prefetch(line.wrapping_add(PREFETCH + 64));
                [V::load(line.cast()), V::load(line.add(64).cast())]
            }
            1 => V::f16_pairs(line),
            _ => {
                let pairs = V::load_i(line.cast());
                [V::from_bits(V::shl_i::<16>(pairs)), V::from_bits(V::and_i(pairs, V::splat_i(0xffff_0000_u32 as i32)))]
            }
        };
        for r in 0..R {
            let x = if const { FORMAT == 1 } { V::f16_pair_x(x[r].0, x[r].1) } else { [V::splat(x[r].0), V::splat(x[r].1)] };
            acc[t][r][0] = V::fma(w[0], x[0], acc[t][r][0]);
            acc[t][r][1] = V::fma(w[1], x[1], acc[t][r][1]);
        }
    }
}
