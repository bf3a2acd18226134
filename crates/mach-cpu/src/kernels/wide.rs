//! Products of many activation rows by a matrix unit ([`Kernel::WIDE`]): the arithmetic of `products`, integers from tiles.
//!
//! Activation rows are gathered once for a run of weight tiles, so that every tile of the unit reads 16 lines that lie beside
//! each other. Weights are taken apart a panel at a time, whatever their format. Sums of a block are begun, stored two blocks
//! later and scaled two more later: no step waits for the one before.

use std::mem::MaybeUninit;

use mach_format::PackedLayout;

use super::blocks::Blocks;
use super::products::{QuantRows, Tile, UNPACKED_PANEL, Unpacked, add_outliers, joined, scaled};
use super::simd::{Kernel, LANES, Simd, StepOperands};
use super::unpack::UnpackPanel;

/// Blocks whose sums are on their way: scaled so many blocks after they were begun, and stored halfway.
const BEHIND: usize = 4;

/// Rows from which on a matrix unit multiplies them, where there is one, by planes and columns of a block: the shorter a block and
/// the fewer the planes, the more of its time goes to scaling sums, which vector instructions do on their way (measured on a Xeon). What is `None` [`wide_tiles`] does not take.
pub(crate) const fn wide_from(planes: usize, block: usize) -> Option<usize> {
    match (planes, block) {
        (2, 64) => Some(8),
        (2, 32) | (1, 64) => Some(24),
        _ => None,
    }
}

/// Activation rows as the matrix unit reads them, in groups of at most 16 planes.
pub(crate) struct WideRows {
    /// `[groups][blocks][rows of a group][planes][columns of a block]`.
    q: *mut i8,
    /// `[groups][blocks]`: scales of 16 rows, then their biases.
    scales: *mut f32,
    rows: usize,
    /// Rows of a group; the last may have fewer.
    group: usize,
}

impl WideRows {
    /// Bytes at which the scales begin, and all bytes.
    fn sizes(acts: &QuantRows, rows: usize) -> (usize, usize) {
        let (groups, group) = groups(acts.planes, rows);
        let scales = (groups * group * acts.planes * acts.cols).next_multiple_of(64);
        (scales, scales + groups * acts.blocks() * 2 * LANES * size_of::<f32>())
    }

    /// Bytes that `rows` rows take.
    pub fn bytes(acts: &QuantRows, rows: usize) -> usize {
        Self::sizes(acts, rows).1
    }

    /// In `memory`, which has [`WideRows::bytes`] and begins at a line.
    pub fn new(acts: &QuantRows, rows: usize, memory: &mut [u8]) -> Self {
        let (scales, all) = Self::sizes(acts, rows);
        assert!(memory.len() >= all && memory.as_ptr().addr().is_multiple_of(64), "memory of gathered rows");
        let q = memory.as_mut_ptr();
        Self { q: q.cast(), scales: q.wrapping_add(scales).cast(), rows, group: groups(acts.planes, rows).1 }
    }
}

/// How many groups rows make, and how many rows each has: as equal as can be.
fn groups(planes: usize, rows: usize) -> (usize, usize) {
    let groups = rows.div_ceil(LANES / planes);
    (groups, rows.div_ceil(groups.max(1)))
}

/// Fills `to` with `rows` of `acts`.
///
/// # Safety
/// `to` was made for as many rows of `acts`.
#[inline(always)]
pub(crate) unsafe fn gather<V: Simd>(acts: &QuantRows, rows: &[u32], to: &WideRows) {
    let (blocks, size) = (acts.blocks(), acts.block);
    let step = to.group * acts.planes * size;
    for (i, &row) in rows.iter().enumerate() {
        let (group, place, row) = (i / to.group, i % to.group, row as usize);
        let into = to.q.add(group * blocks * step + place * acts.planes * size);
        for plane in 0..acts.planes {
            let (from, into) = (acts.plane(row, plane, 0), into.add(plane * size));
            for j in 0..blocks {
                match size {
                    64 => V::store_i(into.add(j * step).cast(), V::load_i(from.add(j * 64).cast())),
                    32 => std::ptr::copy_nonoverlapping(from.add(j * 32), into.add(j * step), 32),
                    _ => unreachable!("blocks of {size} columns are not gathered"),
                }
            }
        }
        let scales = to.scales.add(group * blocks * 2 * LANES + place);
        for j in 0..blocks {
            *scales.add(j * 2 * LANES) = *acts.scale.add(row * blocks + j);
            *scales.add((j * 2 + 1) * LANES) = *acts.bias.add(row * blocks + j);
        }
    }
}

/// `out[t][i][0..16]` = tile `t` of those that lie beside each other (an address and their number) × quantised row `rows[i]`. `wide` has
/// these rows, gathered; `unpack` is that of the same set.
///
/// # Safety
/// Only where [`Kernel::WIDE`]. The tiles have `layout.tile_bytes()` bytes each, `rows` are rows of `acts`, `out` has 16 values for each
/// and every tile.
#[inline(always)]
pub(crate) unsafe fn wide_tiles<K: Kernel>(
    unpack: UnpackPanel,
    layout: &PackedLayout,
    (tiles, count): (*const u8, usize),
    acts: &QuantRows,
    rows: &[u32],
    wide: &WideRows,
    out: *mut f32,
) {
    // Conditions in `const` leave no code behind where they do not hold.
    if const { K::WIDE } {
        match (acts.planes, acts.block) {
            (2, 64) => panels::<K, 2, 64>(unpack, layout, tiles, count, acts, wide, out),
            (2, 32) => panels::<K, 2, 32>(unpack, layout, tiles, count, acts, wide, out),
            (1, 64) => panels::<K, 1, 64>(unpack, layout, tiles, count, acts, wide, out),
            (planes, block) => unreachable!("{planes} planes in blocks of {block} go through other kernels"),
        }
        for t in 0..count {
            let tile = Tile { format: Blocks::of(layout, tiles.add(t * layout.tile_bytes())), layout, unpack };
            add_outliers::<K::V>(&tile, acts, rows, out.add(t * rows.len() * LANES));
        }
    }
}

/// Two weight tiles share the activations of 8 rows of two planes; 16 rows of one plane have a tile to themselves.
#[repr(align(64))]
struct Panels {
    weights: [Unpacked; 2],
    sums: [TileSums; BEHIND],
}

#[inline(always)]
unsafe fn panels<K: Kernel, const PLANES: usize, const BLK: usize>(
    unpack: UnpackPanel,
    layout: &PackedLayout,
    tiles: *const u8,
    count: usize,
    acts: &QuantRows,
    wide: &WideRows,
    out: *mut f32,
) {
    let mut memory = MaybeUninit::<Panels>::uninit();
    let (weights, sums) = (&raw mut (*memory.as_mut_ptr()).weights, &raw mut (*memory.as_mut_ptr()).sums);
    let (blocks, together) = (acts.blocks(), UNPACKED_PANEL / BLK);
    K::begin::<BLK>(wide.group * PLANES);
    for first_tile in (0..count).step_by(PLANES) {
        let n = PLANES.min(count - first_tile);
        for first in (0..blocks).step_by(together) {
            let panel = first..blocks.min(first + together);
            for t in 0..n {
                let (tile, to) = (tiles.add((first_tile + t) * layout.tile_bytes()), weights.cast::<Unpacked>().add(t));
                let (codes, scales) = ((&raw mut (*to).codes).cast(), (&raw mut (*to).scales).cast());
                unpack(layout, tile, first * BLK, panel.len() * BLK, BLK, codes, scales);
            }
            // Where there is one tile it takes both places.
            let pair = [weights.cast::<Unpacked>().cast_const(), weights.cast::<Unpacked>().add(n - 1).cast_const()];
            let out = [out.add(first_tile * wide.rows * LANES), out.add((first_tile + n - 1) * wide.rows * LANES)];
            panel_product::<K, PLANES, BLK>(pair, wide, (panel, blocks), sums.cast(), out);
        }
    }
    K::end();
}

/// The blocks `panel` of `blocks` for all rows: `PLANES` tiles of weights, added to `out`.
#[inline(always)]
unsafe fn panel_product<K: Kernel, const PLANES: usize, const BLK: usize>(
    weights: [*const Unpacked; 2],
    wide: &WideRows,
    (panel, blocks): (std::ops::Range<usize>, usize),
    sums: *mut TileSums,
    out: [*mut f32; 2],
) {
    let n = panel.len();
    let steps = wide.rows.div_ceil(wide.group) * n;
    let cx = Step { weights, wide, first: panel.start, n, blocks, sums, out };
    let (mut begun, mut done) = (Place::default(), Place::default());
    let mut acc = [K::V::splat(0.0); LANES];
    for k in (0..steps + BEHIND).step_by(2) {
        cx.run::<K, PLANES, BLK, 0>((k, steps), &mut begun, &mut done, &mut acc);
        if k + 1 < steps + BEHIND {
            cx.run::<K, PLANES, BLK, 1>((k + 1, steps), &mut begun, &mut done, &mut acc);
        }
    }
}

/// Sums of a block of two tiles.
type TileSums = [[[i32; LANES]; LANES]; 2];

/// A block of a group of rows.
#[derive(Clone, Copy, Default)]
struct Place {
    group: usize,
    block: usize,
}

impl Place {
    /// The next, where a panel has `n` blocks.
    #[inline(always)]
    fn next(&mut self, n: usize) {
        self.block += 1;
        if self.block == n {
            (self.group, self.block) = (self.group + 1, 0);
        }
    }
}

/// What all steps of a panel share.
struct Step<'a> {
    weights: [*const Unpacked; 2],
    wide: &'a WideRows,
    /// First block of the panel, its blocks, those of the matrix.
    first: usize,
    n: usize,
    blocks: usize,
    sums: *mut TileSums,
    out: [*mut f32; 2],
}

impl Step<'_> {
    /// Begins the sums of step `k` of `steps`, and scales those of [`BEHIND`] steps ago.
    #[inline(always)]
    unsafe fn run<K: Kernel, const PLANES: usize, const BLK: usize, const PARITY: usize>(
        &self,
        (k, steps): (usize, usize),
        begun: &mut Place,
        done: &mut Place,
        acc: &mut [<K::V as Simd>::F; LANES],
    ) {
        let begins = k < steps;
        let at = if begins { *begun } else { Place::default() };
        let operands = StepOperands {
            // Those of two steps ago, which the sums of this one would replace.
            stored: self.sums.add((k + BEHIND - 2) % BEHIND).cast(),
            x: self.wide.q.add((at.group * self.blocks + self.first + at.block) * self.wide.group * PLANES * BLK),
            stride: BLK,
            w: self.weights.map(|w| (&raw const (*w).codes).cast::<u8>().add(at.block * BLK * LANES)),
        };
        begun.next(self.n);
        if !begins && k < steps + 2 {
            K::store_sums::<PLANES, PARITY>(&operands);
        }
        if k < BEHIND {
            if begins {
                for part in 0..LANES {
                    K::step_part::<PLANES, PARITY>(part, &operands);
                }
            }
            return;
        }
        let (group, most) = (self.wide.group, LANES / PLANES);
        let (at, first) = (*done, done.group * group);
        let rows = group.min(self.wide.rows - first);
        let out = self.out.map(|out| out.wrapping_add(first * LANES));
        if at.block == 0 {
            for t in 0..PLANES {
                for r in 0..most {
                    let anew = self.first == 0 || r >= rows;
                    acc[t * most + r] = if anew { K::V::splat(0.0) } else { K::V::load(out[t].add(r * LANES)) };
                }
            }
        }
        let sums = self.sums.add(k % BEHIND);
        match (rows == most, begins) {
            (true, true) => self.scale::<K, PLANES, BLK, PARITY, true, true>(at, sums, rows, &operands, acc),
            (false, true) => self.scale::<K, PLANES, BLK, PARITY, false, true>(at, sums, rows, &operands, acc),
            _ => self.scale::<K, PLANES, BLK, PARITY, false, false>(at, sums, rows, &operands, acc),
        }
        if at.block + 1 == self.n {
            for t in 0..PLANES {
                for r in 0..most {
                    if r < rows {
                        K::V::store(out[t].add(r * LANES), acc[t * most + r]);
                    }
                }
            }
        }
        done.next(self.n);
    }

    /// Scales the sums of a block, all rows of a group (`FULL`) or `rows` of them, between the parts of the step that `BEGINS`.
    #[inline(always)]
    unsafe fn scale<K: Kernel, const PLANES: usize, const BLK: usize, const PARITY: usize, const FULL: bool, const BEGINS: bool>(
        &self,
        at: Place,
        sums: *const TileSums,
        rows: usize,
        operands: &StepOperands,
        acc: &mut [<K::V as Simd>::F; LANES],
    ) {
        let most = LANES / PLANES;
        let scales = self.wide.scales.add((at.group * self.blocks + self.first + at.block) * 2 * LANES);
        for t in 0..PLANES {
            let (_, scale, bias) = (*self.weights[t]).block::<K::V, BLK>(at.block);
            let sums = (&raw const (*sums)[t]).cast::<[i32; LANES]>();
            for r in 0..most {
                if BEGINS {
                    K::step_part::<PLANES, PARITY>(t * most + r, operands);
                }
                if FULL || r < rows {
                    let first = K::V::load_i(sums.add(r * PLANES).cast());
                    let isum = if const { PLANES == 2 } { joined::<K::V>(first, K::V::load_i(sums.add(r * PLANES + 1).cast())) } else { first };
                    let (xs, xb) = (K::V::splat(*scales.add(r)), K::V::splat(*scales.add(LANES + r)));
                    let acc = &mut acc[t * most + r];
                    *acc = scaled::<K::V>((scale, bias), (xs, xb), isum, *acc);
                }
            }
        }
    }
}
