//! Matrix products over tiles, and the linear and feed-forward operations.

use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, Ordering};

use mach_backend::Activation;
use mach_format::{AlignedBytes, PackedLayout, PackedMatrix, WeightFormat};

use super::quant::QuantBuffer;
use super::{Context, Shared, grown, with_scratch};
use crate::kernels::{LANES, MAX_ROWS, PlainRows, QuantRows, WideRows, wide_from};
use crate::tensor::Tensor;

/// Affine weights with at most this many rows are multiplied in f32: router-like and recurrence projections, whose
/// errors weigh more than their cost.
const SMALL_ROWS: usize = 64;

/// A packed linear weight.
pub struct Weight {
    pub(crate) layout: PackedLayout,
    data: AlignedBytes,
}

impl Weight {
    pub(crate) fn new(m: PackedMatrix) -> Self {
        assert!(m.data.len() >= m.layout.bytes(), "{} bytes for a weight of {}", m.data.len(), m.layout.bytes());
        Self { layout: m.layout, data: m.data }
    }

    pub(crate) fn data(&self) -> *const u8 {
        self.data.as_ptr()
    }
}

/// A packed gate|up pair.
pub struct GateUp {
    half: PackedLayout,
    data: AlignedBytes,
}

impl GateUp {
    pub(crate) fn new(half: PackedLayout, data: AlignedBytes) -> Self {
        assert!(data.len() >= 2 * half.bytes(), "{} bytes for a gate|up pair of {}", data.len(), 2 * half.bytes());
        Self { half, data }
    }
}

/// Activations in the form that a weight format takes.
#[derive(Clone, Copy)]
pub(crate) enum Acts {
    Plain(PlainRows),
    Quant(QuantRows),
    /// f32 activations for an affine weight, whose tiles are dequantised on the way.
    Exact(PlainRows),
}

/// Columns per activation block for a quantised format, `None` for a plain one.
pub(crate) fn block(format: WeightFormat) -> Option<usize> {
    match format {
        WeightFormat::Affine { bits: 4 | 8, group, .. } => Some(usize::from(group.min(64))),
        // Every group has whole blocks of these.
        WeightFormat::Affine { .. } => Some(32),
        WeightFormat::Block(block) => Some(block.group()),
        _ => None,
    }
}

pub(crate) fn plain(x: &Tensor) -> PlainRows {
    PlainRows { x: x.values().as_ptr(), stride: x.cols() }
}

/// Rows from `row` on.
pub(crate) fn plain_from(x: &Tensor, row: usize) -> PlainRows {
    PlainRows { x: x.values()[row * x.cols()..].as_ptr(), stride: x.cols() }
}

/// f32 activations in the form that `format` takes.
pub(crate) fn exact(format: WeightFormat, x: PlainRows) -> Acts {
    if format.is_quantised() { Acts::Exact(x) } else { Acts::Plain(x) }
}

/// `rows` of `x` in the form that weights of `layout` take.
pub(crate) fn activations(cx: Context<'_>, quant: &mut [QuantBuffer; 3], layout: &PackedLayout, x: &Tensor, rows: impl Iterator<Item = u32>) -> Acts {
    assert_eq!(layout.cols, x.cols(), "columns of weight and input");
    match block(layout.format) {
        Some(block) => Acts::Quant(quant[block / 32].quantise(cx, x, (0, x.cols()), rows, block)),
        None => Acts::Plain(plain(x)),
    }
}

/// One matrix times some rows.
pub(crate) struct Product<'a> {
    pub layout: PackedLayout,
    pub data: *const u8,
    /// Tiles per unit of work: 2 for gate|up pairs, else 1.
    pub per: usize,
    pub acts: Acts,
    /// Rows of `acts`.
    pub rows: &'a [u32],
}

/// Finished units of a product: `[tiles][n][16]` values of rows `first..first + n` of its list.
pub(crate) struct Done<'a> {
    pub product: usize,
    /// The first unit, and how many lie beside it.
    pub unit: usize,
    pub units: usize,
    pub first: usize,
    pub n: usize,
    pub values: &'a [f32],
}

impl Done<'_> {
    /// The 16 values of row `i` in tile `t` of the units.
    pub fn row(&self, t: usize, i: usize) -> &[f32] {
        &self.values[(t * self.n + i) * LANES..][..LANES]
    }

    /// Calls `f` with row and tile of units of one tile, and the column where it begins; the product has `cols` columns, the last tile perhaps fewer
    /// than 16: their number comes last.
    pub fn each(&self, cols: usize, mut f: impl FnMut(usize, usize, usize, usize)) {
        for i in 0..self.n {
            for t in 0..self.units {
                let column = (self.unit + t) * LANES;
                f(i, t, column, (cols - column).min(LANES));
            }
        }
    }

    /// Copies units of one tile to their rows of `out`, whose rows are `stride` apart; the product has `cols` columns, and they begin
    /// at `column`.
    ///
    /// # Safety
    /// The rows and columns lie inside `out`, and no other unit writes them.
    pub unsafe fn store(&self, out: Shared<f32>, stride: usize, column: usize, cols: usize) {
        self.each(cols, |i, t, at, n| {
            // SAFETY: the caller's promise; a row of a tile has 16 values.
            unsafe { copy(self.row(t, i).as_ptr(), out.at((self.first + i) * stride + column + at), n) };
        });
    }
}

/// Copies at most 16 values; nearly always all of them, for which no call is made.
///
/// # Safety
/// Both are valid for `n` values.
#[inline(always)]
pub(crate) unsafe fn copy(from: *const f32, to: *mut f32, n: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        if n == LANES {
            to.cast::<[f32; LANES]>().write(*from.cast());
        } else {
            std::ptr::copy_nonoverlapping(from, to, n);
        }
    }
}

// SAFETY: weights and activations are only read while a region runs.
unsafe impl Sync for Product<'_> {}

/// Computes all units of all products as one parallel region and hands each to `sink`, on any thread.
///
/// # Safety
/// Weights hold their layouts' bytes (`per` times), and rows are rows of the activations, whose columns fit.
pub(crate) unsafe fn products(cx: Context<'_>, list: &[Product<'_>], sink: &(dyn Fn(&Done<'_>) + Sync)) {
    static REGIONS: AtomicU64 = AtomicU64::new(0);
    let region = REGIONS.fetch_add(1, Ordering::Relaxed);
    let total: usize = list.iter().map(|p| p.layout.tiles()).sum();
    let rows = list.iter().map(|p| p.rows.len()).max().unwrap_or(0);
    // Long runs for streams; with many rows, as many tiles as stay in L2 beside the activations. A matrix unit wants longer ones: every
    // run gathers its rows, and where they go by chunks, each anew.
    let (most, parts) = if rows <= 4 {
        (64, 4)
    } else if cx.k.wide {
        (if rows <= MAX_ROWS { 32 } else { 64 }, 2)
    } else {
        (8, 4)
    };
    let size = total.div_ceil(cx.pool.threads() * parts).clamp(1, most);
    cx.pool.ranges(total, size, &|range| {
        let mut start = 0;
        for (index, product) in list.iter().enumerate() {
            let tiles = product.layout.tiles();
            let run = range.start.max(start).saturating_sub(start)..range.end.min(start + tiles).saturating_sub(start);
            start += tiles;
            if !run.is_empty() {
                // SAFETY: the caller vouches for the products.
                unsafe { run_tiles(cx, (region, index), product, run, sink) };
            }
        }
    });
}

unsafe fn run_tiles(cx: Context<'_>, (region, index): (u64, usize), product: &Product<'_>, run: std::ops::Range<usize>, sink: &(dyn Fn(&Done<'_>) + Sync)) {
    let bytes = product.layout.tile_bytes() * product.per;
    for (chunk, rows) in product.rows.chunks(MAX_ROWS).enumerate() {
        let n = rows.len();
        // SAFETY: `unit` lies inside the matrix, and `out` has room for `units`.
        let multiply = |wide: Option<&WideRows>, units: usize, out: &mut [f32]| unsafe {
            let mut unit = run.start;
            while unit < run.end {
                let units = units.min(run.end - unit);
                compute(cx, product, product.data.add(unit * bytes), units * product.per, rows, wide, out.as_mut_ptr());
                sink(&Done { product: index, unit, units, first: chunk * MAX_ROWS, n, values: &out[..units * product.per * n * LANES] });
                unit += units;
            }
        };
        match product.acts {
            Acts::Quant(acts) if cx.k.wide && wide_from(acts.planes, acts.block).is_some_and(|from| n >= from) => TOGETHER.with_borrow_mut(|t| {
                // SAFETY: the caller vouches for the rows, which are the same for the same key.
                let (wide, out) = unsafe { t.gathered(cx, (region, index, chunk), &acts, rows) };
                multiply(Some(wide), WIDE_TILES / product.per, out);
            }),
            // A single row does better with two plain tiles at once.
            _ => multiply(None, if n == 1 { 2 / product.per } else { 1 }, &mut [0.0; 2 * MAX_ROWS * LANES]),
        }
    }
}

/// Tiles that go to a matrix unit together: setting it up takes as long as some blocks.
const WIDE_TILES: usize = 16;

/// Rows gathered for a matrix unit. They stay with their thread, which mostly multiplies the same ones next.
#[derive(Default)]
struct Together {
    memory: AlignedBytes,
    rows: Option<WideRows>,
    out: Vec<f32>,
    /// Region, product of it, and chunk of its rows.
    key: (u64, usize, usize),
}

thread_local!(static TOGETHER: RefCell<Together> = RefCell::default());

impl Together {
    /// `rows`, gathered, and room for [`WIDE_TILES`] tiles of their products.
    ///
    /// # Safety
    /// `rows` are rows of `acts`, and the same for the same key.
    unsafe fn gathered(&mut self, cx: Context<'_>, key: (u64, usize, usize), acts: &QuantRows, rows: &[u32]) -> (&WideRows, &mut [f32]) {
        if self.key != key {
            self.rows = None;
        }
        self.key = key;
        let wide = self.rows.get_or_insert_with(|| {
            let bytes = WideRows::bytes(acts, rows.len());
            if self.memory.len() < bytes {
                self.memory = AlignedBytes::zeroed(bytes);
            }
            let wide = WideRows::new(acts, rows.len(), &mut self.memory);
            // SAFETY: the caller's promise, and `wide` was made for these.
            unsafe { (cx.k.gather)(acts, rows, &wide) };
            wide
        });
        (wide, grown(&mut self.out, WIDE_TILES * rows.len() * LANES))
    }
}

/// `count` tiles at `data` times `rows`, to `[count][rows][16]`.
unsafe fn compute(cx: Context<'_>, product: &Product<'_>, data: *const u8, count: usize, rows: &[u32], wide: Option<&WideRows>, out: *mut f32) {
    let layout = &product.layout;
    // SAFETY: as the caller vouches; tiles lie one after another.
    unsafe {
        match (&product.acts, wide) {
            (Acts::Plain(x), _) => (cx.k.plain_tiles)(layout, data, count, x, rows, out),
            (Acts::Quant(x), Some(wide)) => (cx.k.wide_tiles)(cx.k.unpack_panel, layout, (data, count), x, rows, wide, out),
            (Acts::Quant(x), None) => {
                for t in 0..count {
                    (cx.k.quant_tile)(cx.k.unpack_panel, layout, data.add(t * layout.tile_bytes()), x, rows, out.add(t * rows.len() * LANES));
                }
            }
            (Acts::Exact(x), _) => with_scratch(layout.cols * LANES * count, |wide| {
                for t in 0..count {
                    (cx.k.dequantise_tile)(cx.k.unpack_panel, layout, data.add(t * layout.tile_bytes()), wide.as_mut_ptr().add(t * layout.cols * LANES));
                }
                let layout = PackedLayout::new(layout.rows, layout.cols, WeightFormat::F32);
                (cx.k.plain_tiles)(&layout, wide.as_ptr().cast(), count, x, rows, out);
            }),
        }
    }
}

/// Reused memory of the operations.
#[derive(Default)]
pub(crate) struct Scratch {
    /// Activations in blocks of 16, 32 and 64: what a layer reads, and what its feed-forward blocks hold between their products.
    pub quant: [QuantBuffer; 3],
    pub inner: [QuantBuffer; 3],
    /// 0, 1, 2, …
    pub identity: Vec<u32>,
    pub values: Vec<f32>,
}

/// The first `n` row numbers.
pub(crate) fn identity(buffer: &mut Vec<u32>, n: usize) -> &[u32] {
    while buffer.len() < n {
        buffer.push(buffer.len() as u32);
    }
    &buffer[..n]
}

pub(crate) fn linear(cx: Context<'_>, scratch: &mut Scratch, x: &Tensor, rows: usize, outs: &mut [(&Weight, &mut Tensor)]) {
    assert!(rows <= x.rows(), "{rows} rows of {}", x.rows());
    let ids = identity(&mut scratch.identity, rows);
    let mut list = Vec::with_capacity(outs.len());
    let mut targets = Vec::with_capacity(outs.len());
    for (w, out) in outs.iter_mut() {
        assert_eq!(w.layout.cols, x.cols(), "columns of weight and input");
        assert!(out.cols() == w.layout.rows && out.rows() >= rows, "output of {} columns for {} rows of weight", out.cols(), w.layout.rows);
        let acts = match block(w.layout.format) {
            Some(block) if w.layout.rows > SMALL_ROWS => Acts::Quant(scratch.quant[block / 32].quantise(cx, x, (0, x.cols()), ids.iter().copied(), block)),
            _ => exact(w.layout.format, plain(x)),
        };
        list.push(Product { layout: w.layout, data: w.data.as_ptr(), per: 1, acts, rows: ids });
        targets.push((Shared::new(out.values_mut()), w.layout.rows));
    }
    // SAFETY: shapes were checked above and when the weights were made; a unit has its tile's columns to itself.
    unsafe {
        products(cx, &list, &|done| {
            let (out, cols) = targets[done.product];
            done.store(out, cols, 0, cols);
        });
    }
}

pub(crate) fn linear_grouped(cx: Context<'_>, scratch: &mut Scratch, x: &Tensor, rows: usize, weights: &[Weight], out: &mut Tensor) {
    let (x_cols, out_cols) = (x.cols(), out.cols());
    let part = x_cols / weights.len().max(1);
    assert!(rows <= x.rows().min(out.rows()), "{rows} rows of a grouped product");
    assert_eq!(weights.iter().map(|w| w.layout.rows).sum::<usize>(), out_cols, "columns of a grouped product");
    let to = Shared::new(out.values_mut());
    let mut first = 0;
    for (g, w) in weights.iter().enumerate() {
        assert_eq!(w.layout.cols, part, "columns of weight and input");
        let ids = identity(&mut scratch.identity, rows);
        // SAFETY: `ids` are rows of `x`, which outlives the products; shapes were checked, and a unit has its columns to itself.
        unsafe {
            let acts = match block(w.layout.format) {
                Some(block) if w.layout.rows > SMALL_ROWS => {
                    Acts::Quant(scratch.quant[block / 32].quantise(cx, x, (g * part, part), ids.iter().copied(), block))
                }
                _ => exact(w.layout.format, PlainRows { x: x.values()[g * part..].as_ptr(), stride: x_cols }),
            };
            let product = Product { layout: w.layout, data: w.data.as_ptr(), per: 1, acts, rows: ids };
            products(cx, &[product], &|done| done.store(to, out_cols, first, w.layout.rows));
        }
        first += w.layout.rows;
    }
}

/// Writes `activation(gate, up)` of a finished gate|up unit to row `rows(i)` of `out`; `bias` are rows of gate and up, or null.
///
/// # Safety
/// The rows lie inside `out`, which has `inner` columns (biases too), and no other unit writes this tile of them.
pub(crate) unsafe fn activate(
    cx: Context<'_>,
    activation: &Activation,
    done: &Done<'_>,
    inner: usize,
    bias: [*const f32; 2],
    out: Shared<f32>,
    rows: impl Fn(usize) -> usize,
) {
    done.each(inner, |i, t, column, n| {
        let from = bias.map(|b| if b.is_null() { b } else { b.wrapping_add(column) });
        // SAFETY: the caller's promise; 16 values in, `n` out.
        unsafe {
            let to = out.at(rows(done.first + i) * inner + column);
            (cx.k.activate)(activation, done.row(2 * t, i).as_ptr(), done.row(2 * t + 1, i).as_ptr(), from, n, to);
        }
    });
}

/// Adds `weight(i) · value` of a finished unit to row `rows(i)` of `out`.
///
/// # Safety
/// As [`activate`].
pub(crate) unsafe fn add_scaled(cx: Context<'_>, done: &Done<'_>, cols: usize, out: Shared<f32>, rows: impl Fn(usize) -> usize, weight: impl Fn(usize) -> f32) {
    done.each(cols, |i, t, column, n| {
        // SAFETY: the caller's promise.
        unsafe { (cx.k.add_scaled)(out.at(rows(done.first + i) * cols + column), weight(done.first + i), done.row(t, i).as_ptr(), n) };
    });
}

#[allow(clippy::too_many_arguments)]
pub(crate) fn ffn_add(
    cx: Context<'_>,
    scratch: &mut Scratch,
    activation: Activation,
    x: &Tensor,
    rows: usize,
    gate_up: &GateUp,
    down: &Weight,
    gate: Option<&Weight>,
    act: &mut Tensor,
    out: &mut Tensor,
) {
    let half = gate_up.half;
    assert!(half.cols == x.cols() && half.rows == act.cols() && down.layout.cols == act.cols() && down.layout.rows == out.cols(), "feed-forward shapes");
    assert!(rows <= x.rows() && rows <= act.rows() && rows <= out.rows(), "{rows} rows");
    let ids = identity(&mut scratch.identity, rows);
    let factors = grown(&mut scratch.values, rows);
    factors.fill(1.0);
    if let Some(w) = gate {
        assert!(w.layout.rows == 1 && w.layout.cols == x.cols(), "the gate of a feed-forward block is one row");
        let to = Shared::new(factors);
        let product = Product { layout: w.layout, data: w.data.as_ptr(), per: 1, acts: exact(w.layout.format, plain(x)), rows: ids };
        // SAFETY: shapes checked; each row is written once.
        unsafe {
            products(cx, &[product], &|done| {
                done.each(1, |i, t, _, _| to.at(done.first + i).write(done.row(t, i)[0]));
            });
            (cx.k.sigmoid)(factors.as_mut_ptr(), rows);
        }
    }
    // SAFETY: `ids` are rows of `x`, of `act` and of `out`; units write disjoint parts.
    unsafe {
        let acts = activations(cx, &mut scratch.quant, &half, x, ids.iter().copied());
        let to = Shared::new(act.values_mut());
        let product = Product { layout: half, data: gate_up.data.as_ptr(), per: 2, acts, rows: ids };
        products(cx, &[product], &|done| activate(cx, &activation, done, half.rows, [std::ptr::null(); 2], to, |i| i));

        let acts = activations(cx, &mut scratch.inner, &down.layout, act, ids.iter().copied());
        let (to, cols) = (Shared::new(out.values_mut()), out.cols());
        let product = Product { layout: down.layout, data: down.data.as_ptr(), per: 1, acts, rows: ids };
        products(cx, &[product], &|done| add_scaled(cx, done, cols, to, |i| i, |i| factors[i]));
    }
}
