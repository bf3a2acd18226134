//! Products of quantised weights: 16 output rows of one packed tile times activation rows.
//!
//! The order of float operations is fixed per output row and does not depend on the number of activation rows:
//! blocks in column order, each `acc = fma(scale, xs·isum, acc)` and then `acc = fma(bias, xs·xsum, acc)` with exact
//! integers `isum` and `xsum`; last the outliers in column order.
//!
//! Quantised activations are 8-bit integers, or 16-bit ones `256·high + low` in two int8 planes, so that every kernel
//! set's int8 instructions multiply them: a row goes through [`Kernel::dot`] once or twice.

use std::mem::MaybeUninit;

use mach_backend::KV_BLOCK;
use mach_format::{Codes, PackedLayout, TILE_ROWS, UNIT};

use super::blocks::Blocks;
use super::simd::{Kernel, LANES, Simd};
use super::unpack::{E2M1_TABLE, UnpackPanel, code_line};

const _: () = assert!(TILE_ROWS == LANES && KV_BLOCK.is_multiple_of(LANES));

/// Most activation rows that one kernel call takes.
pub(crate) const MAX_ROWS: usize = 64;

/// Bytes that a streaming kernel asks for ahead of use: one row's arithmetic then covers the latency of memory (1.5 KiB
/// gave three quarters of the speed).
pub(super) const PREFETCH: usize = 6144;

/// Columns of a tile that stay in L1 together with some activation rows: as they are stored, and a byte for each number.
const PANEL: usize = 2048;
pub(super) const UNPACKED_PANEL: usize = 512;

/// Rows from which on a set that unpacks does so, with weights of 6 bits and of 4.
const UNPACK_FROM: [usize; 2] = [4, 24];

/// Columns this many times above the row's trimmed mean magnitude stay f32. Channels scaled a hundredfold are then caught
/// (at 128 times their blocks keep enough error to flip 0.3 % of the routes of such a model), while gated activations
/// seldom are (at 16 times it were 3 to 7 columns in a thousand, which a row's product would feel).
const OUTLIER: f32 = 32.0;

/// Rows of activations quantised in blocks; see `ops::quant`.
#[derive(Clone, Copy)]
pub(crate) struct QuantRows {
    /// `[rows][planes][cols]`: the high plane, then the low one.
    pub q: *const i8,
    /// 1 or 2: activations of 8 or 16 bits.
    pub planes: usize,
    /// `[rows][cols]`: integers of 16 bits as [`Simd::store_i16`] orders them, for sets that multiply those.
    pub whole: *const i16,
    pub cols: usize,
    /// Columns per block: 16, 32 or 64.
    pub block: usize,
    /// Per block: scale `xs`, and `xs` times the sum of the integers.
    pub scale: *const f32,
    pub bias: *const f32,
    /// `[rows][planes][blocks]`: sums of the planes.
    pub sum: *const i32,
    /// Outliers of each row: how many, and one bit per column.
    pub outliers: *const u32,
    pub mask: *const u64,
    /// The f32 rows, `stride` apart.
    pub x: *const f32,
    pub stride: usize,
}

// SAFETY: while rows are quantised each is written by one thread; afterwards they are only read.
unsafe impl Sync for QuantRows {}

impl QuantRows {
    pub fn blocks(&self) -> usize {
        self.cols / self.block
    }
    /// Plane `plane` of block `j` of a row.
    #[inline(always)]
    pub(super) unsafe fn plane(&self, row: usize, plane: usize, j: usize) -> *const i8 {
        self.q.add((row * self.planes + plane) * self.cols + j * self.block)
    }
    /// The sum of that plane.
    #[inline(always)]
    unsafe fn plane_sum(&self, row: usize, plane: usize, j: usize) -> i32 {
        *self.sum.add((row * self.planes + plane) * self.blocks() + j)
    }
    /// Words of one row's mask.
    pub fn words(&self) -> usize {
        self.cols.div_ceil(64)
    }
}

/// Largest magnitude of the (high) plane.
const TOP: f32 = 127.0;

/// Quantises row `row`: splits off outliers, then rounds blocks to planes of int8.
///
/// # Safety
/// All of `to` is writable for that row; `x` has `to.cols` values, a multiple of the block.
#[inline(always)]
pub(crate) unsafe fn quantise_row<K: Kernel>(to: &QuantRows, row: usize) {
    let (x, cols, block) = (to.x.add(row * to.stride), to.cols, to.block);
    // The mean of |x| without what is far above it, by two passes.
    let mut total = K::V::splat(0.0);
    for c in (0..cols).step_by(LANES) {
        total = K::V::add(total, K::V::abs(K::V::load(x.add(c))));
    }
    let limit = K::V::splat(4.0 * (K::V::sum(total) / cols as f32));
    let (mut kept, mut count) = (K::V::splat(0.0), K::V::splat(0.0));
    for c in (0..cols).step_by(LANES) {
        let a = K::V::abs(K::V::load(x.add(c)));
        kept = K::V::add(kept, K::V::zero_where_gt(a, limit, a));
        count = K::V::add(count, K::V::zero_where_gt(a, limit, K::V::splat(1.0)));
    }
    let mean = K::V::sum(kept) / K::V::sum(count);
    let threshold = K::V::splat(if mean > 0.0 { OUTLIER * mean } else { f32::INFINITY });

    let planes = to.planes;
    let top = if planes == 2 { TOP * 256.0 } else { TOP };
    let q = to.q.cast_mut().add(row * planes * cols);
    let mask = to.mask.cast_mut().add(row * to.words());
    let mut outliers = 0;
    for word in 0..to.words() {
        let mut bits = 0;
        for c in (word * 64..cols.min(word * 64 + 64)).step_by(LANES) {
            bits |= u64::from(K::V::gt_bits(K::V::abs(K::V::load(x.add(c))), threshold)) << (c % 64);
        }
        *mask.add(word) = bits;
        outliers += bits.count_ones();
    }
    *to.outliers.cast_mut().add(row) = outliers;

    for b in 0..to.blocks() {
        let at = x.add(b * block);
        // Integer maximum of the bits, so that a NaN is seen everywhere alike.
        let mut largest = K::V::splat_i(0);
        for c in (0..block).step_by(LANES) {
            let v = K::V::load(at.add(c));
            let a = K::V::abs(v);
            largest = K::V::max_i(largest, K::V::bits(K::V::zero_where_gt(a, threshold, a)));
        }
        let amax = f32::from_bits(K::V::largest_i(largest) as u32);
        let (scale, inverse) = if amax.is_finite() && amax > 1e-30 {
            (amax / top, top / amax)
        } else if amax.is_finite() {
            (0.0, 0.0)
        } else {
            (f32::NAN, f32::NAN)
        };
        let mut sums = [K::V::splat_i(0); 2];
        for c in (0..block).step_by(LANES) {
            let v = K::V::load(at.add(c));
            let v = K::V::zero_where_gt(K::V::abs(v), threshold, v);
            let i = if inverse.is_nan() { K::V::splat_i(0) } else { K::V::round(K::V::mul(v, K::V::splat(inverse))) };
            let parts = if planes == 2 {
                // Both planes offset by 128, so that shifting and masking split them.
                let (offset, back) = (K::V::add_i(i, K::V::splat_i(128 * 256 + 128)), K::V::splat_i(-128));
                [K::V::add_i(K::V::shr_i(offset, 8), back), K::V::add_i(K::V::and_i(offset, K::V::splat_i(255)), back)]
            } else {
                [i; 2]
            };
            if K::I16 && planes == 2 {
                K::V::store_i16(to.whole.cast_mut().add(row * cols + b * block + c), i);
            }
            for plane in 0..planes {
                K::V::store_i8(q.add(plane * cols + b * block + c), parts[plane]);
                sums[plane] = K::V::add_i(sums[plane], parts[plane]);
            }
        }
        let (sums, at) = ([K::V::sum_i(sums[0]), K::V::sum_i(sums[1])], row * to.blocks() + b);
        *to.scale.cast_mut().add(at) = scale;
        *to.bias.cast_mut().add(at) = scale * if planes == 2 { 256 * sums[0] + sums[1] } else { sums[0] } as f32;
        for plane in 0..planes {
            *to.sum.cast_mut().add((row * planes + plane) * to.blocks() + b) = sums[plane];
        }
    }
}

/// `out[i][0..16]` = tile × quantised row `rows[i]`, for at most [`MAX_ROWS`] rows. `unpack` is that of the same set.
///
/// # Safety
/// `tile` has `layout.tile_bytes()` bytes, `rows` are rows of `acts`, `out` has 16 values for each.
#[inline(always)]
pub(crate) unsafe fn quant_tile<K: Kernel>(unpack: UnpackPanel, layout: &PackedLayout, tile: *const u8, acts: &QuantRows, rows: &[u32], out: *mut f32) {
    let tile = Tile { format: Blocks::of(layout, tile), layout, unpack };
    if acts.planes == 2 {
        quant_planes::<K, 2>(&tile, acts, rows, out);
    } else {
        quant_planes::<K, 1>(&tile, acts, rows, out);
    }
    add_outliers::<K::V>(&tile, acts, rows, out);
}

/// A tile, and what takes it apart.
pub(super) struct Tile<'a> {
    pub(super) format: Blocks,
    pub(super) layout: &'a PackedLayout,
    pub(super) unpack: UnpackPanel,
}

/// In place of the bits of numbers: they are taken apart before every product.
const APART: u8 = 0;

/// Planes up to which numbers are taken apart in registers, once for all of them, instead of by panels.
const APART_AT_ONCE: usize = 4;

#[inline(always)]
unsafe fn quant_planes<K: Kernel, const PLANES: usize>(tile: &Tile<'_>, acts: &QuantRows, rows: &[u32], out: *mut f32) {
    if rows.len() * PLANES <= APART_AT_ONCE {
        match (tile.format.codes, acts.block) {
            (Codes::E2m1, 32) => return few_rows::<K, PLANES, E2M1_TABLE, 32>(tile.format, acts, rows, out),
            (Codes::E2m1, 16) => return few_rows::<K, PLANES, E2M1_TABLE, 16>(tile.format, acts, rows, out),
            (Codes::Bits(2), 16) => return few_rows::<K, PLANES, 2, 16>(tile.format, acts, rows, out),
            (Codes::Bits(3), 16) => return few_rows::<K, PLANES, 3, 16>(tile.format, acts, rows, out),
            (Codes::Bits(5), 32) => return few_rows::<K, PLANES, 5, 32>(tile.format, acts, rows, out),
            _ => {}
        }
    }
    match (tile.format.codes, acts.block) {
        (Codes::Bits(4), 64) => quant_blocks::<K, PLANES, 4, 64>(tile, acts, rows, out),
        (Codes::Bits(4), 32) => quant_blocks::<K, PLANES, 4, 32>(tile, acts, rows, out),
        (Codes::Bits(6), 16) => quant_blocks::<K, PLANES, 6, 16>(tile, acts, rows, out),
        (Codes::Bits(8), 64) => quant_blocks::<K, PLANES, 8, 64>(tile, acts, rows, out),
        (Codes::Bits(8), 32) => quant_blocks::<K, PLANES, 8, 32>(tile, acts, rows, out),
        (_, 32) => quant_blocks::<K, PLANES, APART, 32>(tile, acts, rows, out),
        _ => quant_blocks::<K, PLANES, APART, 16>(tile, acts, rows, out),
    }
}

/// Whether weights of `bits` bits are taken apart where many rows share them. Integers of 16 bits times bytes take half the
/// instructions of two planes times nibbles. With planes, nibbles are taken apart about as fast as bytes are loaded, but scales, too,
/// are then computed once for all rows: with the fewer instructions of AVX-VNNI that shows.
const fn many_apart<K: Kernel>(bits: u8, planes: usize) -> bool {
    K::UNPACKS && (bits == 6 || bits == 4 && (K::I16 && planes == 2 || K::UNPACKS_NIBBLES))
}

#[inline(always)]
unsafe fn quant_blocks<K: Kernel, const PLANES: usize, const BITS: u8, const BLK: usize>(tile: &Tile<'_>, acts: &QuantRows, rows: &[u32], out: *mut f32) {
    let blocks = acts.cols / BLK;
    let many = const { many_apart::<K>(BITS, PLANES) } && rows.len() >= UNPACK_FROM[usize::from(BITS == 4)];
    let unpack = BITS == APART || many;
    let mut unpacked = Unpacked { codes: [MaybeUninit::uninit(); _], scales: [MaybeUninit::uninit(); _] };
    let columns = if unpack { UNPACKED_PANEL } else { PANEL };
    for first in (0..blocks).step_by(columns / BLK) {
        let panel = first..blocks.min(first + columns / BLK);
        if unpack {
            let (codes, scales) = (unpacked.codes.as_mut_ptr().cast(), unpacked.scales.as_mut_ptr().cast());
            let (from, bytes) = (tile.format.block(first * BLK).0, tile.layout.tile_bytes() / blocks * panel.len());
            for line in (0..bytes).step_by(64) {
                K::V::prefetch(from.wrapping_add(PREFETCH + line));
            }
            (tile.unpack)(tile.layout, tile.format.tile, first * BLK, panel.len() * BLK, BLK, codes, scales);
        }
        let mut i = 0;
        while i < rows.len() {
            let (rest, to) = (&rows[i..], out.add(i * LANES));
            let (format, panel) = (tile.format, panel.clone());
            // Conditions in `const` leave no code behind where they do not hold.
            if const { BITS == APART || many_apart::<K>(BITS, PLANES) } && unpack {
                i += if const { K::I16 && PLANES == 2 } {
                    next_rows::<K, 1, BITS, BLK, true, true>(format, &unpacked, acts, rest, panel, to)
                } else {
                    next_rows::<K, PLANES, BITS, BLK, false, true>(format, &unpacked, acts, rest, panel, to)
                };
                continue;
            }
            if const { BITS != APART } {
                i += if const { K::I16 && PLANES == 2 && BITS == 8 } {
                    next_rows::<K, 1, BITS, BLK, true, false>(format, &unpacked, acts, rest, panel, to)
                } else {
                    next_rows::<K, PLANES, BITS, BLK, false, false>(format, &unpacked, acts, rest, panel, to)
                };
            }
        }
    }
}

/// A panel of a tile with a byte for each number.
#[repr(align(64))]
pub(super) struct Unpacked {
    pub(super) codes: [MaybeUninit<u8>; UNPACKED_PANEL * LANES],
    /// Scales and biases of each block of activations.
    pub(super) scales: [MaybeUninit<f32>; UNPACKED_PANEL / 16 * 2 * LANES],
}

impl Unpacked {
    /// Numbers, scale and bias of block `i` of the panel.
    #[inline(always)]
    pub(super) unsafe fn block<V: Simd, const BLK: usize>(&self, i: usize) -> (*const u8, V::F, V::F) {
        let at = self.scales.as_ptr().cast::<f32>().add(i * 2 * LANES);
        (self.codes.as_ptr().cast::<u8>().add(i * BLK * LANES), V::load(at), V::load(at.add(LANES)))
    }
}

/// Lines of block `j` of the activations, as they are stored.
#[inline(always)]
unsafe fn lines_of<const BITS: u8, const BLK: usize>(format: Blocks, j: usize) -> *const u8 {
    let (block, within) = format.block(j * BLK);
    block.add(within * LANES * BITS as usize / 8)
}

/// The first of `rows`, as many as go together; returns their number.
#[inline(always)]
unsafe fn next_rows<K: Kernel, const PLANES: usize, const BITS: u8, const BLK: usize, const WHOLE: bool, const UNPACKED: bool>(
    format: Blocks,
    unpacked: &Unpacked,
    acts: &QuantRows,
    rows: &[u32],
    panel: std::ops::Range<usize>,
    out: *mut f32,
) -> usize {
    match rows.len() * PLANES {
        1 => quant_rows::<K, PLANES, BITS, BLK, 1, WHOLE, UNPACKED>(format, unpacked, acts, rows, panel, out),
        2 | 3 => quant_rows::<K, PLANES, BITS, BLK, 2, WHOLE, UNPACKED>(format, unpacked, acts, rows, panel, out),
        6.. if const { K::TOGETHER == 6 } => quant_rows::<K, PLANES, BITS, BLK, 6, WHOLE, UNPACKED>(format, unpacked, acts, rows, panel, out),
        8.. if const { K::TOGETHER == 8 } => quant_rows::<K, PLANES, BITS, BLK, 8, WHOLE, UNPACKED>(format, unpacked, acts, rows, panel, out),
        _ => quant_rows::<K, PLANES, BITS, BLK, 4, WHOLE, UNPACKED>(format, unpacked, acts, rows, panel, out),
    }
}

/// `P / PLANES` rows as `P` planes, or as integers of 16 bits where `WHOLE` (`PLANES` is then 1); weights from `unpacked`, which holds the panel, or as they are stored.
#[inline(always)]
unsafe fn quant_rows<K: Kernel, const PLANES: usize, const BITS: u8, const BLK: usize, const P: usize, const WHOLE: bool, const UNPACKED: bool>(
    format: Blocks,
    unpacked: &Unpacked,
    acts: &QuantRows,
    rows: &[u32],
    panel: std::ops::Range<usize>,
    out: *mut f32,
) -> usize {
    let blocks = acts.cols / BLK;
    let mut acc = [K::V::splat(0.0); P];
    if panel.start > 0 {
        for r in 0..P / PLANES {
            acc[r] = K::V::load(out.add(r * LANES));
        }
    }
    let first = panel.start;
    for j in panel {
        let (mut x, mut sums) = ([acts.q; P], [0; P]);
        for p in 0..P {
            let row = rows[p / PLANES] as usize;
            (x[p], sums[p]) = (acts.plane(row, p % PLANES, j), acts.plane_sum(row, p % PLANES, j));
        }
        let (codes, scale, bias);
        if UNPACKED {
            (codes, scale, bias) = unpacked.block::<K::V, BLK>(j - first);
        } else {
            codes = lines_of::<BITS, BLK>(format, j);
            for line in 0..BLK * BITS as usize / 32 + 1 {
                K::V::prefetch(codes.wrapping_add(PREFETCH + line * 64));
            }
            (scale, bias) = format.scales::<K::V>(j * BLK);
        }
        let isum = if WHOLE {
            let mut x = [acts.whole; P];
            for r in 0..P {
                x[r] = acts.whole.add(rows[r] as usize * acts.cols + j * BLK);
            }
            K::dot_i16::<BLK, P>(codes, x)
        } else if const { BITS == APART } && !(K::UNPACKS && format.codes.fit_in_six_bits()) {
            K::dot::<8, BLK, P>(codes, x, sums)
        } else if UNPACKED {
            dot_lines::<K, 8, BLK, P>(codes, 0, x)
        } else {
            K::dot::<BITS, BLK, P>(codes, x, sums)
        };
        add_blocks::<K::V, PLANES, P>(acts, rows, (j, blocks), isum, (scale, bias), &mut acc);
    }
    for r in 0..P / PLANES {
        K::V::store(out.add(r * LANES), acc[r]);
    }
    P / PLANES
}

/// Exact sums of one block: numbers of at most 6 bits from line `first` of four columns on.
#[inline(always)]
unsafe fn dot_lines<K: Kernel, const KIND: u8, const BLK: usize, const P: usize>(unit: *const u8, first: usize, x: [*const i8; P]) -> [<K::V as Simd>::I; P] {
    let mut isum = [K::V::splat_i(0); P];
    for eight in 0..BLK / 8 {
        let codes = [code_line::<K::V, KIND>(unit, first + eight * 2), code_line::<K::V, KIND>(unit, first + eight * 2 + 1)];
        for p in 0..P {
            isum[p] = K::add_eight(isum[p], codes, x[p].add(eight * 8));
        }
    }
    isum
}

/// At most [`APART_AT_ONCE`] planes of rows and numbers of at most 6 bits that are taken apart.
#[inline(always)]
unsafe fn few_rows<K: Kernel, const PLANES: usize, const KIND: u8, const BLK: usize>(format: Blocks, acts: &QuantRows, rows: &[u32], out: *mut f32) {
    let mut rest = (rows, out);
    while !rest.0.is_empty() {
        let n = match rest.0.len() * PLANES {
            1 => rows_apart::<K, PLANES, KIND, BLK, 1>(format, acts, rest.0, rest.1),
            2 | 3 => rows_apart::<K, PLANES, KIND, BLK, 2>(format, acts, rest.0, rest.1),
            _ => rows_apart::<K, PLANES, KIND, BLK, 4>(format, acts, rest.0, rest.1),
        };
        rest = (&rest.0[n..], rest.1.add(n * LANES));
    }
}

#[inline(always)]
unsafe fn rows_apart<K: Kernel, const PLANES: usize, const KIND: u8, const BLK: usize, const P: usize>(
    format: Blocks,
    acts: &QuantRows,
    rows: &[u32],
    out: *mut f32,
) -> usize {
    let blocks = acts.cols / BLK;
    let mut acc = [K::V::splat(0.0); P];
    for column in (0..acts.cols).step_by(UNIT) {
        let unit = format.unit(column);
        for line in 0..format.unit_bytes.div_ceil(64) {
            K::V::prefetch(unit.wrapping_add(PREFETCH + line * 64));
        }
        for part in 0..UNIT / BLK {
            let j = column / BLK + part;
            let mut x = [acts.q; P];
            for p in 0..P {
                x[p] = acts.plane(rows[p / PLANES] as usize, p % PLANES, j);
            }
            let isum = dot_lines::<K, KIND, BLK, P>(unit, part * BLK / 4, x);
            let (scale, bias) = format.scales::<K::V>(j * BLK);
            add_blocks::<K::V, PLANES, P>(acts, rows, (j, blocks), isum, (scale, bias), &mut acc);
        }
    }
    for r in 0..P / PLANES {
        K::V::store(out.add(r * LANES), acc[r]);
    }
    P / PLANES
}

/// Block `j` of `blocks` of the rows whose planes have the sums `isum`.
#[inline(always)]
unsafe fn add_blocks<V: Simd, const PLANES: usize, const P: usize>(
    acts: &QuantRows,
    rows: &[u32],
    (j, blocks): (usize, usize),
    isum: [V::I; P],
    (scale, bias): (V::F, V::F),
    acc: &mut [V::F; P],
) {
    for r in 0..P / PLANES {
        let isum = if const { PLANES == 2 } { joined::<V>(isum[2 * r], isum[2 * r + 1]) } else { isum[r] };
        acc[r] = add_block::<V>(acts, rows[r] as usize * blocks + j, isum, scale, bias, acc[r]);
    }
}

/// Sums of integers of 16 bits by those of their planes.
#[inline(always)]
pub(super) unsafe fn joined<V: Simd>(high: V::I, low: V::I) -> V::I {
    V::add_i(V::shl_i::<8>(high), low)
}

/// One block of one row: scaled integers, then the bias.
#[inline(always)]
unsafe fn add_block<V: Simd>(acts: &QuantRows, at: usize, isum: V::I, scale: V::F, bias: V::F, acc: V::F) -> V::F {
    scaled::<V>((scale, bias), (V::splat(*acts.scale.add(at)), V::splat(*acts.bias.add(at))), isum, acc)
}

/// The float operations of a block, in the order that all sets have.
#[inline(always)]
pub(super) unsafe fn scaled<V: Simd>((scale, bias): (V::F, V::F), (xs, xb): (V::F, V::F), isum: V::I, acc: V::F) -> V::F {
    V::fma(bias, xb, V::fma(scale, V::mul(xs, V::to_f(isum)), acc))
}

/// Adds the columns of `rows` that were left out of the blocks, in f32.
#[inline(always)]
pub(super) unsafe fn add_outliers<V: Simd>(tile: &Tile<'_>, acts: &QuantRows, rows: &[u32], out: *mut f32) {
    for (i, &row) in rows.iter().enumerate() {
        if *acts.outliers.add(row as usize) > 0 {
            add_outliers_of::<V>(tile, acts, row as usize, out.add(i * LANES));
        }
    }
}

#[inline(always)]
unsafe fn add_outliers_of<V: Simd>(tile: &Tile<'_>, acts: &QuantRows, row: usize, out: *mut f32) {
    let (x, format) = (acts.x.add(row * acts.stride), tile.format);
    let mut acc = V::load(out);
    let (mut last, mut scales) = (usize::MAX, (V::splat(0.0), V::splat(0.0)));
    for word in 0..acts.words() {
        let mut bits = *acts.mask.add(row * acts.words() + word);
        while bits != 0 {
            let column = word * 64 + bits.trailing_zeros() as usize;
            bits &= bits - 1;
            if column / format.group != last {
                scales = format.scales::<V>(column);
                last = column / format.group;
            }
            acc = V::fma(format.column::<V>(tile.unpack, tile.layout, column, scales), V::splat(*x.add(column)), acc);
        }
    }
    V::store(out, acc);
}
