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
use mach_format::{BlockFormat, PackedLayout, ScaleType, TILE_ROWS, WeightFormat};

use super::simd::{Kernel, LANES, Simd};

const _: () = assert!(TILE_ROWS == LANES && KV_BLOCK.is_multiple_of(LANES));

/// Most activation rows that one kernel call takes.
pub(crate) const MAX_ROWS: usize = 64;

/// Bytes that a streaming kernel asks for ahead of use: one row's arithmetic then covers the latency of memory (1.5 KiB
/// gave three quarters of the speed).
pub(super) const PREFETCH: usize = 6144;

/// Columns of a tile that stay in L1 together with some activation rows: as they are stored, and a byte for each number.
const PANEL: usize = 2048;
const UNPACKED_PANEL: usize = 512;

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
    /// The f32 row of each row.
    pub x: *const *const f32,
}

// SAFETY: while rows are quantised each is written by one thread; afterwards they are only read.
unsafe impl Sync for QuantRows {}

impl QuantRows {
    pub fn blocks(&self) -> usize {
        self.cols / self.block
    }
    /// Plane `plane` of block `j` of a row, and its sum.
    #[inline(always)]
    unsafe fn plane(&self, row: usize, plane: usize, j: usize) -> (*const i8, i32) {
        let at = row * self.planes + plane;
        (self.q.add(at * self.cols + j * self.block), *self.sum.add(at * self.blocks() + j))
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
pub(crate) unsafe fn quantise_row<V: Simd>(to: &QuantRows, row: usize) {
    let (x, cols, block) = (*to.x.add(row), to.cols, to.block);
    // The mean of |x| without what is far above it, by two passes.
    let mut total = V::splat(0.0);
    for c in (0..cols).step_by(LANES) {
        total = V::add(total, V::abs(V::load(x.add(c))));
    }
    let limit = V::splat(4.0 * (V::sum(total) / cols as f32));
    let (mut kept, mut count) = (V::splat(0.0), V::splat(0.0));
    for c in (0..cols).step_by(LANES) {
        let a = V::abs(V::load(x.add(c)));
        kept = V::add(kept, V::zero_where_gt(a, limit, a));
        count = V::add(count, V::zero_where_gt(a, limit, V::splat(1.0)));
    }
    let mean = V::sum(kept) / V::sum(count);
    let threshold = V::splat(if mean > 0.0 { OUTLIER * mean } else { f32::INFINITY });

    let planes = to.planes;
    let top = if planes == 2 { TOP * 256.0 } else { TOP };
    let q = to.q.cast_mut().add(row * planes * cols);
    let mask = to.mask.cast_mut().add(row * to.words());
    let mut outliers = 0;
    for word in 0..to.words() {
        let mut bits = 0;
        for c in (word * 64..cols.min(word * 64 + 64)).step_by(LANES) {
            bits |= u64::from(V::gt_bits(V::abs(V::load(x.add(c))), threshold)) << (c % 64);
        }
        *mask.add(word) = bits;
        outliers += bits.count_ones();
    }
    *to.outliers.cast_mut().add(row) = outliers;

    for b in 0..to.blocks() {
        let at = x.add(b * block);
        // Integer maximum of the bits, so that a NaN is seen everywhere alike.
        let mut largest = V::splat_i(0);
        for c in (0..block).step_by(LANES) {
            let v = V::load(at.add(c));
            let a = V::abs(v);
            largest = V::max_i(largest, V::bits(V::zero_where_gt(a, threshold, a)));
        }
        let amax = f32::from_bits(V::largest_i(largest) as u32);
        let (scale, inverse) = if amax.is_finite() && amax > 1e-30 {
            (amax / top, top / amax)
        } else if amax.is_finite() {
            (0.0, 0.0)
        } else {
            (f32::NAN, f32::NAN)
        };
        let mut sums = [V::splat_i(0); 2];
        for c in (0..block).step_by(LANES) {
            let v = V::load(at.add(c));
            let v = V::zero_where_gt(V::abs(v), threshold, v);
            let i = if inverse.is_nan() { V::splat_i(0) } else { V::round(V::mul(v, V::splat(inverse))) };
            let parts = if planes == 2 {
                // Both planes offset by 128, so that shifting and masking split them.
                let (offset, back) = (V::add_i(i, V::splat_i(128 * 256 + 128)), V::splat_i(-128));
                [V::add_i(V::shr_i(offset, 8), back), V::add_i(V::and_i(offset, V::splat_i(255)), back)]
            } else {
                [i; 2]
            };
            if V::I16 && planes == 2 {
                V::store_i16(to.whole.cast_mut().add(row * cols + b * block + c), i);
            }
            for plane in 0..planes {
                V::store_i8(q.add(plane * cols + b * block + c), parts[plane]);
                sums[plane] = V::add_i(sums[plane], parts[plane]);
            }
        }
        let (sums, at) = ([V::sum_i(sums[0]), V::sum_i(sums[1])], row * to.blocks() + b);
        *to.scale.cast_mut().add(at) = scale;
        *to.bias.cast_mut().add(at) = scale * if planes == 2 { 256 * sums[0] + sums[1] } else { sums[0] } as f32;
        for plane in 0..planes {
            *to.sum.cast_mut().add((row * planes + plane) * to.blocks() + b) = sums[plane];
        }
    }
}

/// Where the numbers and scales of a quantised tile lie.
#[derive(Clone, Copy)]
struct Blocks {
    /// Bits of a stored number: 4, 6 or 8.
    bits: usize,
    /// Columns of a block of the tile, log₂ of them, and the block's bytes.
    columns: usize,
    shift: u32,
    bytes: usize,
    /// Bytes before the scales.
    line_bytes: usize,
    /// Columns that share a scale.
    group: usize,
    scales: Scales,
}

/// How scales are stored.
#[derive(Clone, Copy)]
enum Scales {
    Affine(ScaleType),
    Block(BlockFormat),
}

impl Blocks {
    #[inline(always)]
    fn of(layout: &PackedLayout) -> Self {
        let (bits, group, scales) = match layout.format {
            WeightFormat::Affine { bits, group, scales } => (bits, group.into(), Scales::Affine(scales)),
            WeightFormat::Block(block) => (block.bits(), block.group(), Scales::Block(block)),
            format => unreachable!("{format} weights are not quantised"),
        };
        let columns = layout.block_columns();
        let shift = columns.trailing_zeros();
        Self { bits: bits.into(), columns, shift, bytes: layout.block_bytes(), line_bytes: layout.line_bytes(), group, scales }
    }

    /// The block of column `column`.
    #[inline(always)]
    unsafe fn block(&self, tile: *const u8, column: usize) -> *const u8 {
        tile.add((column >> self.shift) * self.bytes)
    }

    /// Scale and bias of column `within` of the block at `block`: exact, or rounded once from exact values.
    #[inline(always)]
    unsafe fn scales<V: Simd>(&self, block: *const u8, within: usize) -> (V::F, V::F) {
        let at = block.add(self.line_bytes);
        match self.scales {
            Scales::Affine(ScaleType::BF16) => (V::load_bf16(at.cast()), V::load_bf16(at.add(LANES * 2).cast())),
            Scales::Affine(ScaleType::F16) => (V::load_f16(at.cast()), V::load_f16(at.add(LANES * 2).cast())),
            Scales::Affine(ScaleType::F32) => (V::load(at.cast()), V::load(at.add(LANES * 4).cast())),
            Scales::Block(BlockFormat::Q8_0) => {
                let d = V::load_f16(at.cast());
                (d, V::mul(d, V::splat(-128.0)))
            }
            Scales::Block(BlockFormat::Q4K) => {
                let line = at.add(within / 32 * LANES);
                let (scale, min) = (V::to_f(V::load_u8(line)), V::to_f(V::load_u8(line.add(8 * LANES))));
                let (d, dmin) = (V::load_f16(at.add(256).cast()), V::load_f16(at.add(288).cast()));
                (V::mul(d, scale), V::sub(V::splat(0.0), V::mul(dmin, min)))
            }
            Scales::Block(BlockFormat::Q6K) => {
                let scale = V::to_f(V::load_i8(at.add(within / 16 * LANES).cast()));
                let scale = V::mul(V::load_f16(at.add(256).cast()), scale);
                (scale, V::mul(scale, V::splat(-32.0)))
            }
        }
    }

    /// Column `within` of a block as numbers, given its scales.
    #[inline(always)]
    unsafe fn column<V: Simd>(&self, block: *const u8, within: usize, scale: V::F, bias: V::F) -> V::F {
        let bits = |line: usize, shift: usize, mask: i32| V::and_i(V::shr_i(V::load_i(block.add(line * 64).cast()), shift as u32), V::splat_i(mask));
        let nibble = |line: usize| bits(line, within % 4 * 8 + within / 4 % 2 * 4, 15);
        let q = match self.bits {
            8 => bits(within / 4, within % 4 * 8, 255),
            6 => {
                let sixteen = within / 16 * 3;
                let high = bits(sixteen + 2, within % 4 * 8 + within % 16 / 4 * 2, 3);
                V::add_i(nibble(sixteen + within % 16 / 8), V::shl_i::<4>(high))
            }
            _ => nibble(within / 8),
        };
        V::fma(scale, V::to_f(q), bias)
    }
}

/// `out[i][0..16]` = tile × quantised row `rows[i]`, for at most [`MAX_ROWS`] rows.
///
/// # Safety
/// `tile` has `layout.tile_bytes()` bytes, `rows` are rows of `acts`, `out` has 16 values for each.
#[inline(always)]
pub(crate) unsafe fn quant_tile<K: Kernel>(layout: &PackedLayout, tile: *const u8, acts: &QuantRows, rows: &[u32], out: *mut f32) {
    let format = Blocks::of(layout);
    if acts.planes == 2 {
        quant_planes::<K, 2>(format, tile, acts, rows, out);
    } else {
        quant_planes::<K, 1>(format, tile, acts, rows, out);
    }
    for (i, &row) in rows.iter().enumerate() {
        if *acts.outliers.add(row as usize) > 0 {
            add_outliers::<K::V>(format, tile, acts, row as usize, out.add(i * LANES));
        }
    }
}

#[inline(always)]
unsafe fn quant_planes<K: Kernel, const PLANES: usize>(format: Blocks, tile: *const u8, acts: &QuantRows, rows: &[u32], out: *mut f32) {
    match (format.bits, acts.block) {
        (4, 64) => quant_blocks::<K, PLANES, 4, 64>(format, tile, acts, rows, out),
        (4, _) => quant_blocks::<K, PLANES, 4, 32>(format, tile, acts, rows, out),
        (6, _) => quant_blocks::<K, PLANES, 6, 16>(format, tile, acts, rows, out),
        (_, 64) => quant_blocks::<K, PLANES, 8, 64>(format, tile, acts, rows, out),
        _ => quant_blocks::<K, PLANES, 8, 32>(format, tile, acts, rows, out),
    }
}

#[inline(always)]
unsafe fn quant_blocks<K: Kernel, const PLANES: usize, const BITS: u8, const BLK: usize>(
    format: Blocks,
    tile: *const u8,
    acts: &QuantRows,
    rows: &[u32],
    out: *mut f32,
) {
    let blocks = acts.cols / BLK;
    let wide = K::WIDE && rows.len() > 2;
    if wide {
        K::begin::<BLK>();
    }
    // Integers of 16 bits times bytes take half the instructions of two planes times nibbles.
    let whole = K::V::I16 && PLANES == 2;
    // With planes, nibbles are taken apart as fast as bytes are loaded.
    let unpack = K::UNPACKS && !wide && (BITS == 6 && rows.len() >= UNPACK_FROM[0] || BITS == 4 && whole && rows.len() >= UNPACK_FROM[1]);
    let mut unpacked = Unpacked { codes: [MaybeUninit::uninit(); _], scales: [MaybeUninit::uninit(); _] };
    let columns = if unpack { UNPACKED_PANEL } else { PANEL };
    for first in (0..blocks).step_by(columns / BLK) {
        let panel = first..blocks.min(first + columns / BLK);
        if unpack {
            unpacked.fill::<K, BITS, BLK>(format, tile, panel.clone());
        }
        let mut i = 0;
        while i < rows.len() {
            let (rest, to) = (&rows[i..], out.add(i * LANES));
            let panel = panel.clone();
            i += if wide {
                quant_wide::<K, PLANES, BITS, BLK>(format, tile, acts, rest, panel, to)
            } else if unpack && whole {
                next_rows::<K, 1, BITS, BLK, true, true>(format, tile, &unpacked, acts, rest, panel, to)
            } else if unpack {
                next_rows::<K, PLANES, BITS, BLK, false, true>(format, tile, &unpacked, acts, rest, panel, to)
            } else if whole && BITS == 8 {
                next_rows::<K, 1, BITS, BLK, true, false>(format, tile, &unpacked, acts, rest, panel, to)
            } else {
                next_rows::<K, PLANES, BITS, BLK, false, false>(format, tile, &unpacked, acts, rest, panel, to)
            };
        }
    }
    if wide {
        K::end();
    }
}

/// A panel of a tile with a byte for each number, which many rows then share.
#[repr(align(64))]
struct Unpacked {
    codes: [MaybeUninit<u8>; UNPACKED_PANEL * LANES],
    /// Scales and biases of each block of activations.
    scales: [MaybeUninit<f32>; UNPACKED_PANEL / 16 * 2 * LANES],
}

impl Unpacked {
    #[inline(always)]
    unsafe fn fill<K: Kernel, const BITS: u8, const BLK: usize>(&mut self, format: Blocks, tile: *const u8, panel: std::ops::Range<usize>) {
        for (i, j) in panel.enumerate() {
            let (lines, block, within) = block_at::<BITS, BLK>(format, tile, j);
            K::unpack::<BITS, BLK>(lines, self.codes.as_mut_ptr().cast::<u8>().add(i * BLK * LANES));
            let (scale, bias) = format.scales::<K::V>(block, within);
            let to = self.scales.as_mut_ptr().cast::<f32>().add(i * 2 * LANES);
            K::V::store(to, scale);
            K::V::store(to.add(LANES), bias);
        }
    }
}

/// Lines of block `j` of the activations, the block of the tile that they lie in, and the column within it.
#[inline(always)]
unsafe fn block_at<const BITS: u8, const BLK: usize>(format: Blocks, tile: *const u8, j: usize) -> (*const u8, *const u8, usize) {
    let block = format.block(tile, j * BLK);
    let within = (j * BLK) & (format.columns - 1);
    (block.add(within * LANES * BITS as usize / 8), block, within)
}

/// The first of `rows`, as many as go together; returns their number.
#[inline(always)]
unsafe fn next_rows<K: Kernel, const PLANES: usize, const BITS: u8, const BLK: usize, const WHOLE: bool, const UNPACKED: bool>(
    format: Blocks,
    tile: *const u8,
    unpacked: &Unpacked,
    acts: &QuantRows,
    rows: &[u32],
    panel: std::ops::Range<usize>,
    out: *mut f32,
) -> usize {
    match rows.len() * PLANES {
        1 => quant_rows::<K, PLANES, BITS, BLK, 1, WHOLE, UNPACKED>(format, tile, unpacked, acts, rows, panel, out),
        2 | 3 => quant_rows::<K, PLANES, BITS, BLK, 2, WHOLE, UNPACKED>(format, tile, unpacked, acts, rows, panel, out),
        _ => quant_rows::<K, PLANES, BITS, BLK, 4, WHOLE, UNPACKED>(format, tile, unpacked, acts, rows, panel, out),
    }
}

/// `P / PLANES` rows as `P` planes, or as integers of 16 bits where `WHOLE` (`PLANES` is then 1); weights from `unpacked`, which holds the panel, or as they are stored.
#[inline(always)]
unsafe fn quant_rows<K: Kernel, const PLANES: usize, const BITS: u8, const BLK: usize, const P: usize, const WHOLE: bool, const UNPACKED: bool>(
    format: Blocks,
    tile: *const u8,
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
            (x[p], sums[p]) = acts.plane(rows[p / PLANES] as usize, p % PLANES, j);
        }
        let (codes, scale, bias);
        if UNPACKED {
            codes = unpacked.codes.as_ptr().cast::<u8>().add((j - first) * BLK * LANES);
            let at = unpacked.scales.as_ptr().cast::<f32>().add((j - first) * 2 * LANES);
            (scale, bias) = (K::V::load(at), K::V::load(at.add(LANES)));
        } else {
            let (block, within);
            (codes, block, within) = block_at::<BITS, BLK>(format, tile, j);
            for line in 0..BLK * BITS as usize / 32 + 1 {
                K::V::prefetch(codes.wrapping_add(PREFETCH + line * 64));
            }
            (scale, bias) = format.scales::<K::V>(block, within);
        }
        let isum = if WHOLE {
            let mut x = [acts.whole; P];
            for r in 0..P {
                x[r] = acts.whole.add(rows[r] as usize * acts.cols + j * BLK);
            }
            K::dot_i16::<BLK, P>(codes, x)
        } else if UNPACKED {
            K::dot_unpacked::<BLK, P>(codes, x)
        } else {
            K::dot::<BITS, BLK, P>(codes, x, sums)
        };
        for r in 0..P / PLANES {
            let at = rows[r] as usize * blocks + j;
            let isum = if PLANES == 2 { K::V::add_i(K::V::shl_i::<8>(isum[2 * r]), isum[2 * r + 1]) } else { isum[r] };
            acc[r] = add_block::<K::V>(acts, at, isum, scale, bias, acc[r]);
        }
    }
    for r in 0..P / PLANES {
        K::V::store(out.add(r * LANES), acc[r]);
    }
    P / PLANES
}

/// One block of one row: scaled integers, then the bias.
#[inline(always)]
unsafe fn add_block<V: Simd>(acts: &QuantRows, at: usize, isum: V::I, scale: V::F, bias: V::F, acc: V::F) -> V::F {
    let (xs, xb) = (V::splat(*acts.scale.add(at)), V::splat(*acts.bias.add(at)));
    V::fma(bias, xb, V::fma(scale, V::mul(xs, V::to_f(isum)), acc))
}

/// The same arithmetic, integers from the matrix unit: 16 planes at a time.
#[inline(always)]
unsafe fn quant_wide<K: Kernel, const PLANES: usize, const BITS: u8, const BLK: usize>(
    format: Blocks,
    tile: *const u8,
    acts: &QuantRows,
    rows: &[u32],
    panel: std::ops::Range<usize>,
    out: *mut f32,
) -> usize {
    let n = rows.len().min(LANES / PLANES);
    let blocks = acts.cols / BLK;
    let mut isum = [[0; LANES]; LANES];
    let mut x = [acts.q; LANES];
    let mut acc = [K::V::splat(0.0); LANES];
    if panel.start > 0 {
        for r in 0..n {
            acc[r] = K::V::load(out.add(r * LANES));
        }
    }
    for j in panel {
        let (lines, block, within) = block_at::<BITS, BLK>(format, tile, j);
        for p in 0..PLANES * n {
            x[p] = acts.plane(rows[p / PLANES] as usize, p % PLANES, j).0;
        }
        K::dot_wide::<BITS, BLK>(lines, &x[..PLANES * n], &mut isum);
        let (scale, bias) = format.scales::<K::V>(block, within);
        for r in 0..n {
            let at = rows[r] as usize * blocks + j;
            let sum = |plane: usize| K::V::load_i(isum[r * PLANES + plane].as_ptr());
            let isum = if PLANES == 2 { K::V::add_i(K::V::shl_i::<8>(sum(0)), sum(1)) } else { sum(0) };
            acc[r] = add_block::<K::V>(acts, at, isum, scale, bias, acc[r]);
        }
    }
    for r in 0..n {
        K::V::store(out.add(r * LANES), acc[r]);
    }
    n
}

/// Adds the columns that were left out of the blocks, in f32.
#[inline(always)]
unsafe fn add_outliers<V: Simd>(format: Blocks, tile: *const u8, acts: &QuantRows, row: usize, out: *mut f32) {
    let x = *acts.x.add(row);
    let mut acc = V::load(out);
    let (mut last, mut scale, mut bias) = (usize::MAX, V::splat(0.0), V::splat(0.0));
    for word in 0..acts.words() {
        let mut bits = *acts.mask.add(row * acts.words() + word);
        while bits != 0 {
            let column = word * 64 + bits.trailing_zeros() as usize;
            bits &= bits - 1;
            let (block, within, group) = (format.block(tile, column), column & (format.columns - 1), column / format.group);
            if group != last {
                (scale, bias) = format.scales::<V>(block, within);
                last = group;
            }
            acc = V::fma(format.column::<V>(block, within, scale, bias), V::splat(*x.add(column)), acc);
        }
    }
    V::store(out, acc);
}

/// Writes a quantised tile as an `F32` tile, `[cols][16]`.
///
/// # Safety
/// `tile` has `layout.tile_bytes()` bytes, `out` takes `16·cols` values.
#[inline(always)]
pub(crate) unsafe fn dequantise_tile<V: Simd>(layout: &PackedLayout, tile: *const u8, out: *mut f32) {
    let format = Blocks::of(layout);
    for first in (0..layout.cols).step_by(format.group) {
        let (block, within) = (format.block(tile, first), first & (format.columns - 1));
        let (scale, bias) = format.scales::<V>(block, within);
        for column in 0..format.group {
            V::store(out.add((first + column) * LANES), format.column::<V>(block, within + column, scale, bias));
        }
    }
}
