//! Products of many activation rows by a matrix unit ([`Kernel::WIDE`]): the arithmetic of `products`, integers from tiles.
//!
//! Activation rows are gathered once for a run of weight tiles, so that every tile of the unit reads 16 lines that lie beside
//! each other. Weights are taken apart a panel at a time, whatever their format. Sums of a block are begun, stored a block later
//! and scaled one more later: no step waits for the one before.

use std::mem::MaybeUninit;

use mach_format::PackedLayout;

use super::blocks::Blocks;
use super::products::{QuantRows, Tile, UNPACKED_PANEL, Unpacked, add_outliers, joined, scaled};
use super::simd::{Kernel, LANES, Simd, StepOperands};
use super::unpack::UnpackPanel;

/// Blocks whose sums are on their way: scaled so many blocks after they were begun, and stored halfway.
const BEHIND: usize = 2;

/// `$body` for every number below [`LANES`], which is the constant `$i` in it: what a loop might leave rolled up, and sums in memory.
macro_rules! unrolled {
    ($i:ident, $body:block) => {
        unrolled!(@ $i, $body, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15)
    };
    (@ $i:ident, $body:block, $($n:literal)*) => {
        $({
            const $i: usize = $n;
            $body
        })*
    };
}

/// Rows from which on a matrix unit multiplies them, where there is one, by planes and columns of a block: the shorter a block and
/// the fewer the planes, the more of its time goes to scaling sums, which vector instructions do on their way (measured on a Xeon). What is `None` [`wide_tiles`] does not take.
pub(crate) const fn wide_from(planes: usize, block: usize) -> Option<usize> {
    match (planes, block) {
        (2, 64 | 32) => Some(8),
        (1, 64 | 32) => Some(12),
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

/// How many groups rows make, and how many rows each has: as equal as the numbers that [`panels`] is compiled for allow.
fn groups(planes: usize, rows: usize) -> (usize, usize) {
    let groups = rows.div_ceil(LANES / planes).max(1);
    let rows = rows.div_ceil(groups);
    (groups, if planes == 2 { rows.max(5) } else { rows.next_multiple_of(2).max(10) })
}

/// Fills `to` with `rows` of `acts`.
///
/// # Safety
/// `to` was made for as many rows of `acts`.
#[inline(always)]
pub(crate) unsafe fn gather<V: Simd>(acts: &QuantRows, rows: &[u32], to: &WideRows) {
    // Blocks of a row that are copied together: so many lines of a group stay in L1 until all its rows are there.
    const TOGETHER: usize = 8;
    let (blocks, size, planes) = (acts.blocks(), acts.block, acts.planes);
    let step = to.group * planes * size;
    for (group, rows) in rows.chunks(to.group).enumerate() {
        let into = to.q.add(group * blocks * step);
        let scales = to.scales.add(group * blocks * 2 * LANES);
        for first in (0..blocks).step_by(TOGETHER) {
            let part = first..blocks.min(first + TOGETHER);
            for (i, &row) in rows.iter().enumerate() {
                let row = row as usize;
                for plane in 0..planes {
                    let (from, into) = (acts.plane(row, plane, 0), into.add((i * planes + plane) * size));
                    for j in part.clone() {
                        match size {
                            64 => V::store_i(into.add(j * step).cast(), V::load_i(from.add(j * 64).cast())),
                            32 => std::ptr::copy_nonoverlapping(from.add(j * 32), into.add(j * step), 32),
                            _ => unreachable!("blocks of {size} columns are not gathered"),
                        }
                    }
                }
                for j in part.clone() {
                    *scales.add(j * 2 * LANES + i) = *acts.scale.add(row * blocks + j);
                    *scales.add((j * 2 + 1) * LANES + i) = *acts.bias.add(row * blocks + j);
                }
            }
            // Rows that the last group lacks count for nothing.
            for i in rows.len()..to.group {
                for j in part.clone() {
                    (*scales.add(j * 2 * LANES + i), *scales.add((j * 2 + 1) * LANES + i)) = (0.0, 0.0);
                }
            }
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
        // Calls, not addresses: what is not inlined here has no instruction set.
        macro_rules! panels {
            ($($planes:literal $block:literal $rows:literal),*) => {
                match (acts.planes, acts.block, wide.group) {
                    $(($planes, $block, $rows) => panels::<K, $planes, $block, $rows>(unpack, layout, tiles, count, acts, wide, out),)*
                    (planes, block, rows) => unreachable!("groups of {rows} rows of {planes} planes in blocks of {block} go through other kernels"),
                }
            };
        }
        panels!(2 64 5, 2 64 6, 2 64 7, 2 64 8, 2 32 5, 2 32 6, 2 32 7, 2 32 8, 1 64 10, 1 64 12, 1 64 14, 1 64 16, 1 32 10, 1 32 12, 1 32 14, 1 32 16);
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
unsafe fn panels<K: Kernel, const PLANES: usize, const BLK: usize, const ROWS: usize>(
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
    let block_bytes = layout.tile_bytes() / blocks;
    K::begin::<BLK>(ROWS * PLANES);
    for first_tile in (0..count).step_by(PLANES) {
        let n = PLANES.min(count - first_tile);
        for first in (0..blocks).step_by(together) {
            let panel = first..blocks.min(first + together);
            for t in 0..n {
                let (tile, to) = (tiles.add((first_tile + t) * layout.tile_bytes()), weights.cast::<Unpacked>().add(t));
                let (codes, scales) = ((&raw mut (*to).codes).cast(), (&raw mut (*to).scales).cast());
                unpack(layout, tile, first * BLK, panel.len() * BLK, BLK, codes, scales);
            }
            // What is taken apart next comes while this is multiplied.
            let next = if panel.end < blocks {
                tiles.add(first_tile * layout.tile_bytes() + panel.end * block_bytes)
            } else {
                tiles.add((first_tile + n) * layout.tile_bytes())
            };
            // Where there is one tile it takes both places.
            let panel = Panel {
                weights: [weights.cast::<Unpacked>().cast_const(), weights.cast::<Unpacked>().add(n - 1).cast_const()],
                wide,
                first,
                n: panel.len(),
                blocks,
                ahead: [next, next.wrapping_add(layout.tile_bytes())],
                ahead_bytes: panel.len() * block_bytes,
                sums: sums.cast(),
                out: [out.add(first_tile * wide.rows * LANES), out.add((first_tile + n - 1) * wide.rows * LANES)],
            };
            panel.product::<K, PLANES, BLK, ROWS>();
        }
    }
    K::end();
}

/// Sums of a block of two tiles.
type TileSums = [[[i32; LANES]; LANES]; 2];

/// Blocks of `PLANES` tiles of weights, times all rows.
struct Panel<'a> {
    weights: [*const Unpacked; 2],
    wide: &'a WideRows,
    /// First block of the panel, its blocks, those of the matrix.
    first: usize,
    n: usize,
    blocks: usize,
    /// Where the panels after it lie, and their bytes.
    ahead: [*const u8; 2],
    ahead_bytes: usize,
    sums: *mut TileSums,
    out: [*mut f32; 2],
}

impl Panel<'_> {
    /// Adds the products to `out`. A step is a block of a group of rows.
    #[inline(always)]
    unsafe fn product<K: Kernel, const PLANES: usize, const BLK: usize, const ROWS: usize>(&self) {
        let groups = self.wide.rows.div_ceil(ROWS);
        let mut begun = Place::default();
        let mut operands = |k: usize| {
            let at = begun;
            begun = at.next(self.n, groups);
            StepOperands {
                stored: self.sums.add((k + 1) % BEHIND).cast(),
                x: self.wide.q.add((at.group * self.blocks + self.first + at.block) * ROWS * PLANES * BLK),
                stride: BLK,
                w: self.weights.map(|w| (&raw const (*w).codes).cast::<u8>().add(at.block * BLK * LANES)),
            }
        };
        let both = [operands(0), operands(1)];
        unrolled!(PART, { K::step_part::<PLANES, 0>(PART, &both[0]) });
        unrolled!(PART, { K::step_part::<PLANES, 1>(PART, &both[1]) });
        let each = self.ahead_bytes.div_ceil(groups * self.n * 64) * 64;
        let mut k = BEHIND;
        for group in 0..groups {
            let (first, rows) = (group * ROWS, ROWS.min(self.wide.rows - group * ROWS));
            let out = self.out.map(|out| out.add(first * LANES));
            let mut acc = [[K::V::splat(0.0); ROWS]; PLANES];
            if self.first > 0 {
                unrolled!(R, {
                    if R < ROWS && R < rows {
                        for t in 0..PLANES {
                            acc[t][R] = K::V::load(out[t].add(R * LANES));
                        }
                    }
                });
            }
            for block in 0..self.n {
                let (operands, at) = (operands(k), Place { group, block });
                if k.is_multiple_of(2) {
                    self.step::<K, PLANES, BLK, ROWS, 0>(&operands, at, &mut acc);
                } else {
                    self.step::<K, PLANES, BLK, ROWS, 1>(&operands, at, &mut acc);
                }
                for at in ((k - BEHIND) * each..((k - BEHIND + 1) * each).min(self.ahead_bytes)).step_by(64) {
                    for ahead in &self.ahead[..PLANES] {
                        K::V::prefetch(ahead.wrapping_add(at));
                    }
                }
                k += 1;
            }
            unrolled!(R, {
                if R < ROWS && R < rows {
                    for t in 0..PLANES {
                        K::V::store(out[t].add(R * LANES), acc[t][R]);
                    }
                }
            });
        }
    }

    /// Begins the sums of a step of this `PARITY`, and scales those of [`BEHIND`] steps ago, which are of the block `at`.
    #[inline(always)]
    unsafe fn step<K: Kernel, const PLANES: usize, const BLK: usize, const ROWS: usize, const PARITY: usize>(
        &self,
        operands: &StepOperands,
        at: Place,
        acc: &mut [[<K::V as Simd>::F; ROWS]; PLANES],
    ) {
        let scales = self.wide.scales.add((at.group * self.blocks + self.first + at.block) * 2 * LANES);
        let sums = self.sums.add(PARITY).cast::<[i32; LANES]>();
        let mut of_tiles = [(K::V::splat(0.0), K::V::splat(0.0)); PLANES];
        for t in 0..PLANES {
            let (_, scale, bias) = (*self.weights[t]).block::<K::V, BLK>(at.block);
            of_tiles[t] = (scale, bias);
        }
        unrolled!(R, {
            // Parts of the step lie between the rows.
            for part in R * PLANES..(R + 1) * PLANES {
                K::step_part::<PLANES, PARITY>(part, operands);
            }
            if R < ROWS {
                let (xs, xb) = (K::V::splat(*scales.add(R)), K::V::splat(*scales.add(LANES + R)));
                for t in 0..PLANES {
                    let sums = sums.add(t * LANES + R * PLANES);
                    let first = K::V::load_i(sums.cast());
                    let isum = if const { PLANES == 2 } { joined::<K::V>(first, K::V::load_i(sums.add(1).cast())) } else { first };
                    acc[t][R] = scaled::<K::V>(of_tiles[t], (xs, xb), isum, acc[t][R]);
                }
            }
        });
    }
}

/// A block of a group of rows.
#[derive(Clone, Copy, Default)]
struct Place {
    group: usize,
    block: usize,
}

impl Place {
    /// The next, where a panel has `n` blocks, or the first after the last.
    #[inline(always)]
    fn next(self, n: usize, groups: usize) -> Self {
        match self {
            Self { group, block } if block + 1 < n => Self { group, block: block + 1 },
            Self { group, .. } if group + 1 < groups => Self { group: group + 1, block: 0 },
            _ => Self::default(),
        }
    }
}
