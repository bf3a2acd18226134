//! A weight on disk: where its rows lie and how they are stored. Nothing is read until it is asked for.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use crate::bytes::Bytes;
use crate::checkpoint::{Files, PlainType};
use crate::disk::expect_pages;
use crate::error::FormatError;
use crate::format::WeightFormat;
use crate::packed::{AlignedBytes, GateUpLayout, PackedLayout, PackedMatrix, TILE_ROWS};
use crate::quant::fp8::e4m3;
use crate::quant::{self, affine};
use crate::source::{ENDINGS, Stored};
use crate::tile::{pack_tile, row_bytes};

/// Bytes that are read at once while packing.
const READ_BYTES: usize = 1 << 20;

/// Rows of equal length in one file, one after the other.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plane {
    pub(crate) file: usize,
    pub(crate) offset: u64,
    pub(crate) row_bytes: usize,
    /// Rows of the weight that share a row of the plane. Matrices of a stack share none.
    pub(crate) rows_per: usize,
}

impl Plane {
    /// Where a row of the weight has its own, in matrices of `rows` rows.
    fn row(&self, rows: usize, row: usize) -> usize {
        row / rows * rows.div_ceil(self.rows_per) + row % rows / self.rows_per
    }

    /// The bytes of a range of the weight's rows, which is not empty: where they begin and how many they are.
    fn range(&self, rows: usize, range: &Range<usize>) -> (u64, usize) {
        let (first, last) = (self.row(rows, range.start), self.row(rows, range.end - 1));
        (self.offset + (first * self.row_bytes) as u64, (last + 1 - first) * self.row_bytes)
    }
}

/// The tensors of a weight.
pub(crate) struct Source {
    pub(crate) files: Arc<Files>,
    /// Their names, the one with the data first.
    pub(crate) parts: Vec<String>,
    /// Data, scales, biases.
    pub(crate) planes: [Option<Plane>; 3],
    /// Rows of one matrix.
    pub(crate) rows: usize,
    pub(crate) stored: Stored,
}

/// A lazy view of a weight `[rows, cols]`, or of a stack `[leading, rows, cols]`. Cheap to clone; keeps the
/// weight files open.
#[derive(Clone)]
pub struct Matrix {
    pub(crate) source: Arc<Source>,
    pub(crate) layout: PackedLayout,
    pub(crate) leading: Option<usize>,
    /// Its first row among those of the tensors, and the distance of its rows.
    pub(crate) first: usize,
    pub(crate) step: usize,
    /// Of a matrix that lies transposed: the first of its columns among the tensor's rows. `first` and `step` count the
    /// tensor's columns then.
    pub(crate) transposed: Option<usize>,
    /// Read past the page cache.
    pub(crate) past_cache: bool,
}

/// Rows of a matrix: every `step`-th from `first` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowPick {
    /// The first.
    pub first: usize,
    /// From one to the next.
    pub step: usize,
    /// How many.
    pub rows: usize,
}

/// What a tile is made of: the rows as stored, or rows quantised on the way.
#[derive(Clone, Copy)]
struct Target {
    layout: PackedLayout,
    requantise: bool,
}

impl Matrix {
    /// Name of the tensor that holds the data.
    pub fn name(&self) -> &str {
        &self.source.parts[0]
    }

    /// The module that it is the weight of: the name without its ending.
    pub fn module(&self) -> &str {
        ENDINGS.iter().find_map(|ending| self.name().strip_suffix(ending)).unwrap_or(self.name())
    }

    /// Names of all tensors that it consists of.
    pub fn tensors(&self) -> &[String] {
        &self.source.parts
    }

    /// Output rows.
    pub fn rows(&self) -> usize {
        self.layout.rows
    }

    /// Input columns.
    pub fn cols(&self) -> usize {
        self.layout.cols
    }

    /// Element format on disk.
    pub fn format(&self) -> WeightFormat {
        self.layout.format
    }

    /// Shape and format of one packed matrix.
    pub fn layout(&self) -> PackedLayout {
        self.layout
    }

    /// Bytes on disk, scales and biases included, of the whole stack.
    pub fn bytes(&self) -> u64 {
        let rows = self.all_rows();
        let planes = self.source.planes.iter().flatten().filter(|_| !rows.is_empty());
        planes.map(|plane| plane.range(self.source.rows, &rows).1 as u64).sum()
    }

    /// Its rows, of the whole stack, among those of the tensors.
    fn all_rows(&self) -> Range<usize> {
        let matrices = self.leading.unwrap_or(1);
        match self.transposed {
            Some(column) => column..column + self.cols() * matrices,
            None => self.first..self.first + (self.rows() * matrices).saturating_sub(1) * self.step + self.rows().min(1),
        }
    }

    /// Number of matrices of a stack, `None` for a single matrix.
    pub fn leading(&self) -> Option<usize> {
        self.leading
    }

    /// Matrix `e` of a stack.
    ///
    /// # Panics
    /// When this is no stack or `e` is outside: stacks are checked when a model is loaded.
    pub fn expert(&self, e: usize) -> Self {
        assert!(self.leading.is_some_and(|n| e < n), "expert {e} of {:?} in {}", self.leading, self.name());
        let mut one = self.clone();
        one.leading = None;
        match &mut one.transposed {
            Some(column) => *column += e * self.cols(),
            None => one.first += e * self.rows(),
        }
        one
    }

    /// The rows `r` of a single matrix. A range of a stack is the same rows of each of its matrices, to be picked
    /// with [`Matrix::expert`] first.
    ///
    /// # Panics
    /// When the range is outside or this is a stack.
    pub fn rows_range(&self, r: Range<usize>) -> Self {
        assert!(r.start <= r.end, "rows {r:?} in {}", self.name());
        self.pick(RowPick { first: r.start, step: 1, rows: r.len() })
    }

    /// Some rows of a single matrix.
    ///
    /// # Panics
    /// When they are outside or this is a stack.
    pub fn pick(&self, pick: RowPick) -> Self {
        let end = if pick.rows == 0 { pick.first } else { pick.first + (pick.rows - 1) * pick.step + 1 };
        assert!(self.leading.is_none() && end <= self.rows(), "{pick:?} of {} rows in {}", self.rows(), self.name());
        let mut part = self.clone();
        part.layout.rows = pick.rows;
        part.first += pick.first * self.step;
        part.step *= pick.step;
        part
    }

    /// The transpose of a whole plain matrix, or of every matrix of a stack.
    ///
    /// # Errors
    /// Weights that are quantised: their groups run along the rows.
    pub fn transposed(&self) -> Result<Self, FormatError> {
        if !self.format().is_plain() || self.transposed.is_some() || self.step != 1 || self.first != 0 {
            return Err(FormatError::UnsupportedQuantisation {
                tensor: self.name().to_owned(),
                what: format!("{} weights that lie transposed", self.format()),
            });
        }
        let layout = PackedLayout::new(self.cols(), self.rows(), self.format());
        Ok(Self { layout, transposed: Some(0), ..self.clone() })
    }

    /// Of plain formats.
    fn element_bytes(&self) -> usize {
        if self.format() == WeightFormat::F32 { 4 } else { 2 }
    }

    /// Reads `rows` in the form that tiles are packed of: data, scales, biases.
    fn read_rows(&self, rows: Range<usize>) -> Result<[Bytes; 3], FormatError> {
        if let Some(column) = self.transposed {
            return self.read_transposed(rows, column);
        }
        let first = self.first + rows.start * self.step;
        let span = first..first + rows.len().saturating_sub(1) * self.step + rows.len().min(1);
        let read = self.read_span(span.clone())?;
        if self.step == 1 {
            return self.checked(rows, read);
        }
        self.picked(rows, &read, span)
    }

    /// Rows of the tensors one after the other, with what lies between those of this matrix.
    fn read_span(&self, span: Range<usize>) -> Result<[Bytes; 3], FormatError> {
        let mut out = [(); 3].map(|()| Bytes::default());
        for (out, plane) in out.iter_mut().zip(&self.source.planes) {
            if let Some(plane) = plane.filter(|_| !span.is_empty()) {
                *out = self.read_plane(&plane, span.clone())?;
            }
        }
        let number = |i: usize| (span.start + i) % self.source.rows;
        Ok(self.source.stored.rows(&self.layout, number, out))
    }

    /// `rows` of this matrix, of a span that was read.
    fn picked(&self, rows: Range<usize>, read: &[Bytes; 3], span: Range<usize>) -> Result<[Bytes; 3], FormatError> {
        let first = self.first + rows.start * self.step - span.start;
        let out = read.each_ref().map(|bytes| {
            let row = bytes.len() / span.len().max(1);
            let mut out = Bytes::with_len(rows.len() * row, 1);
            if row > 0 {
                for (to, from) in out.chunks_exact_mut(row).zip(bytes.chunks_exact(row).skip(first).step_by(self.step)) {
                    to.copy_from_slice(from);
                }
            }
            out
        });
        self.checked(rows, out)
    }

    fn checked(&self, rows: Range<usize>, read: [Bytes; 3]) -> Result<[Bytes; 3], FormatError> {
        if matches!(self.layout.format, WeightFormat::Fp8 { .. })
            && let Some(at) = read[0].iter().position(|code| code & 127 == 127)
        {
            let reason = format!("column {} is not a number", at % self.cols());
            return Err(FormatError::Quantise { tensor: self.name().to_owned(), row: rows.start + at / self.cols(), reason });
        }
        Ok(read)
    }

    /// A row of the plane for each of `rows`, which are not none.
    fn read_plane(&self, plane: &Plane, rows: Range<usize>) -> Result<Bytes, FormatError> {
        let (offset, bytes) = plane.range(self.source.rows, &rows);
        let read = self.source.files.read_bytes(plane.file, offset, bytes, self.past_cache)?;
        if plane.rows_per == 1 {
            return Ok(read);
        }
        let first = plane.row(self.source.rows, rows.start);
        let row = |r: usize| &read[(plane.row(self.source.rows, r) - first) * plane.row_bytes..][..plane.row_bytes];
        Ok(rows.flat_map(row).copied().collect::<Vec<_>>().into())
    }

    /// Rows of a matrix whose columns lie one after another from the tensor's row `column` on.
    fn read_transposed(&self, rows: Range<usize>, column: usize) -> Result<[Bytes; 3], FormatError> {
        let mut out = [(); 3].map(|()| Bytes::default());
        let (Some(plane), size) = (&self.source.planes[0], self.element_bytes()) else { return Ok(out) };
        let (offset, bytes) = (plane.offset + (column * plane.row_bytes) as u64, self.cols() * plane.row_bytes);
        let columns = self.source.files.read_bytes(plane.file, offset, bytes, self.past_cache)?;
        out[0] = Bytes::with_len(rows.len() * self.cols() * size, 1);
        // A few columns at a time, so that their lines stay in cache while rows are gathered from them.
        const COLUMNS: usize = 64;
        for first in (0..self.cols()).step_by(COLUMNS) {
            let n = COLUMNS.min(self.cols() - first);
            for (to, r) in out[0].chunks_exact_mut(self.cols() * size).zip(rows.clone()) {
                let at = (self.first + r * self.step) * size;
                for (c, to) in to[first * size..(first + n) * size].chunks_exact_mut(size).enumerate() {
                    to.copy_from_slice(&columns[(first + c) * plane.row_bytes + at..][..size]);
                }
            }
        }
        Ok(out)
    }

    fn widen_row(&self, [data, scales, biases]: [&[u8]; 3], out: &mut [f32]) {
        match self.layout.format {
            WeightFormat::F32 => PlainType::F32.widen(data, out),
            WeightFormat::F16 => PlainType::F16.widen(data, out),
            WeightFormat::BF16 => PlainType::BF16.widen(data, out),
            WeightFormat::Affine { bits, group, scales: ty } => affine::dequantise_row(bits, group.into(), ty, data, scales, biases, out),
            WeightFormat::Fp8 { group, scales: ty } => {
                let groups = data.chunks_exact(group.into()).zip(out.chunks_exact_mut(group.into()));
                for ((codes, out), scale) in groups.zip(scales.chunks_exact(ty.bytes())) {
                    let scale = affine::get(ty, scale);
                    out.iter_mut().zip(codes).for_each(|(x, &code)| *x = scale * e4m3(code));
                }
            }
            WeightFormat::Block(block) => quant::dequantise_row(block, data, scales, out),
        }
    }

    /// One row, dequantised.
    ///
    /// # Errors
    /// A read error.
    ///
    /// # Panics
    /// When `row` is outside, this is a stack, or `out` is not `cols` long.
    pub fn row_f32(&self, row: usize, out: &mut [f32]) -> Result<(), FormatError> {
        assert!(self.leading.is_none() && row < self.rows() && out.len() == self.cols(), "row {row} of {}", self.name());
        let [data, scales, biases] = self.read_rows(row..row + 1)?;
        self.widen_row([&data, &scales, &biases], out);
        Ok(())
    }

    /// All rows (of the whole stack), row-major, dequantised.
    ///
    /// # Errors
    /// A read error.
    pub fn to_f32(&self) -> Result<Vec<f32>, FormatError> {
        assert!(self.leading.is_none() || self.transposed.is_none(), "{} is a stack of transposed matrices", self.name());
        let mut flat = self.clone();
        flat.layout.rows *= self.leading.unwrap_or(1);
        flat.leading = None;
        let mut out = vec![0.0; flat.rows() * flat.cols()];
        let step = flat.rows_per_read();
        let chunks = out.par_chunks_mut(step * flat.cols()).enumerate();
        chunks.try_for_each(|(i, out)| flat.widen_rows(i * step, out))?;
        Ok(out)
    }

    fn widen_rows(&self, first: usize, out: &mut [f32]) -> Result<(), FormatError> {
        let rows = out.len() / self.cols();
        let [data, scales, biases] = self.read_rows(first..first + rows)?;
        for (r, out) in out.chunks_exact_mut(self.cols()).enumerate() {
            self.widen_row([nth(&data, rows, r), nth(&scales, rows, r), nth(&biases, rows, r)], out);
        }
        Ok(())
    }

    /// A multiple of 16 rows of about [`READ_BYTES`]; of a transposed matrix all, because each read takes it whole.
    fn rows_per_read(&self) -> usize {
        if self.transposed.is_some() {
            return self.rows().next_multiple_of(TILE_ROWS);
        }
        let row: usize = row_bytes(&self.layout).iter().sum();
        (READ_BYTES / row.max(1) / TILE_ROWS).max(1) * TILE_ROWS
    }

    /// The same weight for readers that stream experts from a checkpoint: reads leave nothing in the page cache, past which they go
    /// where the file system lets them.
    pub fn past_cache(self) -> Self {
        Self { past_cache: true, ..self }
    }

    /// Whether reads go past the page cache.
    pub fn is_direct(&self) -> bool {
        self.past_cache && self.source.planes.iter().flatten().all(|plane| self.source.files.direct(plane.file).is_some())
    }

    /// Lets the system begin to read this matrix, for a loader that comes to it soon.
    pub fn expect(&self) {
        self.each_part(expect_pages);
    }

    /// Calls `f` with the file, offset and length of data, scales and biases.
    fn each_part(&self, f: fn(&File, u64, u64)) {
        for plane in self.source.planes.iter().flatten() {
            let rows = self.all_rows();
            if !rows.is_empty() {
                let (offset, bytes) = plane.range(self.source.rows, &rows);
                f(&self.source.files.open[plane.file].1, offset, bytes as u64);
            }
        }
    }

    /// Layout of this matrix quantised to `format`.
    ///
    /// # Errors
    /// When `format` is not affine 4 or 8 bits or its group does not divide the columns.
    pub fn quantised_layout(&self, format: WeightFormat) -> Result<PackedLayout, FormatError> {
        match format {
            WeightFormat::Affine { bits: 4 | 8, group: group @ (32 | 64 | 128), .. } if self.cols().is_multiple_of(group.into()) => {
                Ok(PackedLayout::new(self.rows(), self.cols(), format))
            }
            _ => Err(FormatError::UnsupportedQuantisation { tensor: self.name().to_owned(), what: format!("{format} for {} columns", self.cols()) }),
        }
    }

    /// Writes the tiles from `first` on into `dst`, tile `first + i` at `i·stride`, as many as `tiles` says.
    fn pack_tiles(&self, target: Target, first: usize, tiles: usize, dst: &mut [u8], stride: usize) -> Result<(), FormatError> {
        let step = self.rows_per_read() / TILE_ROWS;
        for start in (0..tiles).step_by(step) {
            let end = tiles.min(start + step);
            let rows = (first + start) * TILE_ROWS..((first + end) * TILE_ROWS).min(self.rows());
            let read = if target.requantise { self.quantise_rows(target.layout.format, rows)? } else { self.read_rows(rows)? };
            pack_rows(&target.layout, &read, end - start, &mut dst[start * stride..], stride);
        }
        Ok(())
    }

    /// Reads `rows` and quantises them to `format` (affine): packed words, scales, biases as MLX stores them.
    pub(crate) fn quantise_rows(&self, format: WeightFormat, rows: Range<usize>) -> Result<[Bytes; 3], FormatError> {
        let WeightFormat::Affine { bits, group, scales: ty } = self.quantised_layout(format)?.format else {
            unreachable!("quantised layouts are affine");
        };
        let [data_row, scale_row, bias_row] = row_bytes(&PackedLayout::new(rows.len(), self.cols(), format));
        let mut values = vec![0.0; rows.len() * self.cols()];
        self.widen_rows(rows.start, &mut values)?;
        let mut out = [data_row, scale_row, bias_row].map(|row| Bytes::from(vec![0; rows.len() * row]));
        let [data, scales, biases] = &mut out;
        let params = scales.chunks_exact_mut(scale_row).zip(biases.chunks_exact_mut(bias_row));
        for (i, ((values, data), (scales, biases))) in values.chunks_exact(self.cols()).zip(data.chunks_exact_mut(data_row)).zip(params).enumerate() {
            affine::quantise_row(values, bits, group.into(), ty, data, scales, biases).map_err(|e| FormatError::Quantise {
                tensor: self.name().to_owned(),
                row: rows.start + i,
                reason: e.to_string(),
            })?;
        }
        Ok(out)
    }

    fn pack_strided(&self, target: Target, dst: &mut [u8], tile_stride: usize) -> Result<(), FormatError> {
        assert!(self.leading.is_none(), "{} is a stack", self.name());
        let tiles = target.layout.tiles();
        let needed = if tiles == 0 { 0 } else { (tiles - 1) * tile_stride + target.layout.tile_bytes() };
        if dst.len() < needed || tile_stride < target.layout.tile_bytes() {
            return Err(FormatError::Buffer { tensor: self.name().to_owned(), expected: needed, got: dst.len() });
        }
        self.pack_tiles(target, 0, tiles, dst, tile_stride)
    }

    fn as_is(&self) -> Target {
        Target { layout: self.layout, requantise: false }
    }

    /// Writes the packed tiles, tile `t` at `dst[t·tile_stride..]`, on the calling thread. For the halves of a
    /// gate|up pair the stride is two tiles, gate starts at 0 and up one tile later.
    ///
    /// # Errors
    /// A read error, a buffer that is too small.
    pub fn pack_into(&self, dst: &mut [u8], tile_stride: usize) -> Result<(), FormatError> {
        self.pack_strided(self.as_is(), dst, tile_stride)
    }

    /// As [`Matrix::pack_into`], quantising to `format` (affine) on the way.
    ///
    /// # Errors
    /// Also values that cannot be quantised and a group that does not divide the columns.
    pub fn pack_quantised_into(&self, dst: &mut [u8], tile_stride: usize, format: WeightFormat) -> Result<(), FormatError> {
        let target = Target { layout: self.quantised_layout(format)?, requantise: true };
        self.pack_strided(target, dst, tile_stride)
    }

    /// The packed matrix, read by all threads of the rayon pool.
    ///
    /// # Errors
    /// A read error.
    pub fn pack(&self) -> Result<PackedMatrix, FormatError> {
        assert!(self.leading.is_none(), "{} is a stack", self.name());
        let mut data = AlignedBytes::zeroed(self.layout.bytes());
        let tile_bytes = self.layout.tile_bytes();
        let step = self.rows_per_read() / TILE_ROWS;
        data.par_chunks_mut(step * tile_bytes)
            .enumerate()
            .try_for_each(|(i, dst)| self.pack_tiles(self.as_is(), i * step, dst.len() / tile_bytes, dst, tile_bytes))?;
        Ok(PackedMatrix { layout: self.layout, data })
    }
}

fn nth(bytes: &[u8], rows: usize, r: usize) -> &[u8] {
    let row = bytes.len() / rows;
    &bytes[r * row..(r + 1) * row]
}

/// Tiles of rows that were read, tile `t` at `t·stride`.
fn pack_rows(layout: &PackedLayout, read: &[Bytes; 3], tiles: usize, dst: &mut [u8], stride: usize) {
    let row = row_bytes(layout);
    for t in 0..tiles {
        let rows = [0, 1, 2].map(|i| nth_chunk(&read[i], row[i] * TILE_ROWS, t));
        pack_tile(layout, rows, &mut dst[t * stride..][..layout.tile_bytes()]);
    }
}

/// Chunk `i` of `size` bytes; the last may be shorter.
fn nth_chunk(bytes: &[u8], size: usize, i: usize) -> &[u8] {
    &bytes[i * size..((i + 1) * size).min(bytes.len())]
}

/// Packs a gate|up pair: tiles of `gate` and `up` in turn.
///
/// # Errors
/// A read error, halves of different shape or format.
pub fn pack_gate_up(gate: &Matrix, up: &Matrix) -> Result<AlignedBytes, FormatError> {
    let half = gate.layout;
    if half != up.layout || gate.leading.is_some() || up.leading.is_some() {
        return Err(FormatError::Plan { reason: format!("{} {:?} and {} {:?} are no gate|up pair", gate.name(), half, up.name(), up.layout) });
    }
    let tile = half.tile_bytes();
    let step = gate.rows_per_read() / TILE_ROWS;
    let mut data = AlignedBytes::zeroed(GateUpLayout { half }.bytes());
    data.par_chunks_mut(2 * step * tile).enumerate().try_for_each(|(i, dst)| {
        let tiles = dst.len() / (2 * tile);
        gate.pack_tiles(gate.as_is(), i * step, tiles, dst, 2 * tile)?;
        up.pack_tiles(up.as_is(), i * step, tiles, &mut dst[tile..], 2 * tile)
    })?;
    Ok(data)
}

/// Writes the tiles of a gate|up pair in turns on the calling thread, and returns the bytes that it read: rows of the two that lie among
/// one another are read once.
///
/// # Errors
/// As [`Matrix::pack_into`].
pub fn pack_gate_up_into(gate: &Matrix, up: &Matrix, dst: &mut [u8]) -> Result<u64, FormatError> {
    let tile = gate.layout.tile_bytes();
    let among = gate.step > 1 && gate.step == up.step && gate.first.abs_diff(up.first) < gate.step;
    if !among || !Arc::ptr_eq(&gate.source, &up.source) || gate.layout != up.layout || gate.transposed.is_some() || gate.layout.rows == 0 {
        gate.pack_into(dst, 2 * tile)?;
        up.pack_into(dst.get_mut(tile..).unwrap_or_default(), 2 * tile)?;
        return Ok(gate.bytes() + up.bytes());
    }
    let needed = GateUpLayout { half: gate.layout }.bytes();
    if dst.len() < needed {
        return Err(FormatError::Buffer { tensor: gate.name().to_owned(), expected: needed, got: dst.len() });
    }
    let (step, rows) = (gate.step, gate.layout.rows);
    let span = |rows: &Range<usize>| gate.first.min(up.first) + rows.start * step..gate.first.max(up.first) + (rows.end - 1) * step + 1;
    for first in (0..rows).step_by(gate.rows_per_read()) {
        let part = first..rows.min(first + gate.rows_per_read());
        let read = gate.read_span(span(&part))?;
        let to = &mut dst[first / TILE_ROWS * 2 * tile..];
        for (matrix, at) in [(gate, 0), (up, tile)] {
            let picked = matrix.picked(part.clone(), &read, span(&part))?;
            pack_rows(&matrix.layout, &picked, part.len().div_ceil(TILE_ROWS), &mut to[at..], 2 * tile);
        }
    }
    let all = span(&(0..rows));
    Ok(gate.source.planes.iter().flatten().map(|plane| plane.range(gate.source.rows, &all).1 as u64).sum())
}

/// Packs values in memory as F32: routers and other small weights that were dequantised.
///
/// # Panics
/// When `values` is not `rows·cols` long.
pub fn pack_f32(rows: usize, cols: usize, values: &[f32]) -> PackedMatrix {
    assert_eq!(values.len(), rows * cols, "values of a [{rows}, {cols}] matrix");
    let layout = PackedLayout::new(rows, cols, WeightFormat::F32);
    let mut data = AlignedBytes::zeroed(layout.bytes());
    for (tile, rows) in data.chunks_exact_mut(layout.tile_bytes()).zip(values.chunks(TILE_ROWS * cols)) {
        let bytes: Vec<u8> = rows.iter().flat_map(|x| x.to_le_bytes()).collect();
        pack_tile(&layout, [&bytes, &[], &[]], tile);
    }
    PackedMatrix { layout, data }
}
