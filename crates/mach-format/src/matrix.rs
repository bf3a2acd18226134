//! A weight on disk: where its rows lie and how they are stored. Nothing is read until it is asked for.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;
use safetensors::Dtype;
use serde_json::Value;

use crate::checkpoint::{Checkpoint, ElementType, Files, PlainType, TensorInfo};
use crate::disk::{expect_pages, forget_pages};
use crate::error::FormatError;
use crate::format::{BlockFormat, ScaleType, WeightFormat};
use crate::packed::{AlignedBytes, GateUpLayout, PackedLayout, PackedMatrix, TILE_ROWS};
use crate::quant::{self, affine};
use crate::tile::{Rows, pack_tile, row_bytes};

/// Bytes that are read at once while packing.
const READ_BYTES: usize = 1 << 20;

/// Rows of equal length, one after the other in one file.
#[derive(Clone, Copy, Debug)]
struct Plane {
    file: usize,
    offset: u64,
    row_bytes: usize,
}

impl Plane {
    fn skip_rows(&mut self, rows: usize) {
        self.offset += rows as u64 * self.row_bytes as u64;
    }
}

/// A lazy view of a weight `[rows, cols]`, or of a stack `[leading, rows, cols]`. Cheap to clone; keeps the
/// weight files open.
#[derive(Clone)]
pub struct Matrix {
    files: Arc<Files>,
    name: Arc<str>,
    layout: PackedLayout,
    leading: Option<usize>,
    /// Data, and scales and biases of affine formats.
    data: Plane,
    params: Option<[Plane; 2]>,
}

impl Checkpoint {
    /// The weight `{prefix}.weight` (or `prefix` itself where a tensor has that name), with `{prefix}.scales` and
    /// `{prefix}.biases` where it is quantised in MLX's groups. Two dimensions, or three for a stack of experts; one is a
    /// single row.
    ///
    /// # Errors
    /// A missing tensor, another number of dimensions, a type or quantisation that is not read, shapes that do not
    /// fit the `quantization` of the configuration.
    pub fn matrix(&self, prefix: &str) -> Result<Matrix, FormatError> {
        let dotted = format!("{prefix}.weight");
        let name = if self.tensor(&dotted).is_none() && self.tensor(prefix).is_some() { prefix } else { &dotted };
        let info = self.require(name)?;
        let (leading, rows, width) = match info.shape[..] {
            [width] => (None, 1, width),
            [rows, width] => (None, rows, width),
            [leading, rows, width] => (Some(leading), rows, width),
            _ => return Err(shape_error(name, "1 to 3 dimensions", info)),
        };
        if info.shape.contains(&0) {
            return Err(shape_error(name, "no empty dimension", info));
        }
        let plane = |info: &TensorInfo| Plane { file: info.file, offset: info.offset, row_bytes: info.bytes as usize / (rows * leading.unwrap_or(1)) };
        let unsupported = || FormatError::UnsupportedQuantisation { tensor: name.to_owned(), what: format!("{:?} weights{}", info.dtype, self.quant_method()) };
        let (format, cols, params) = match info.dtype {
            ElementType::Plain(Dtype::U32) => {
                let (format, cols, scales, biases) = self.affine_params(prefix, name, info)?;
                (format, cols, Some([plane(scales), plane(biases)]))
            }
            ElementType::Plain(Dtype::U8) => {
                let block = self.block_mode(prefix).ok_or_else(unsupported)?;
                if !width.is_multiple_of(block.source_bytes()) {
                    return Err(shape_error(name, &format!("rows of whole {} blocks", block.name()), info));
                }
                (WeightFormat::Block(block), width / block.source_bytes() * block.columns(), None)
            }
            ElementType::Block(ty) => (WeightFormat::Block(ty.block().ok_or_else(unsupported)?), width, None),
            _ if info.dtype.is_float() => {
                let format = match PlainType::of(name, info.dtype)? {
                    PlainType::F32 => WeightFormat::F32,
                    PlainType::F16 => WeightFormat::F16,
                    PlainType::BF16 => WeightFormat::BF16,
                };
                (format, width, None)
            }
            _ => return Err(unsupported()),
        };
        Ok(Matrix { files: Arc::clone(&self.files), name: name.into(), layout: PackedLayout::new(rows, cols, format), leading, data: plane(info), params })
    }

    fn quant_method(&self) -> String {
        let method = self.config().get("quantization_config").and_then(|q| q.get("quant_method")).and_then(Value::as_str);
        method.map_or(String::new(), |m| format!(" (quant_method {m})"))
    }

    /// The block format that a pack of a GGUF file gives for the bytes of a module.
    fn block_mode(&self, prefix: &str) -> Option<BlockFormat> {
        let mode = self.config().get("quantization")?.get(prefix)?.get("mode")?;
        serde_json::from_value(mode.clone()).ok()
    }

    /// MLX's rule for a packed tensor: the config names bits and group (an exact path wins over the general
    /// entry), and the shapes of words and scales must agree.
    fn affine_params(&self, prefix: &str, name: &str, info: &TensorInfo) -> Result<(WeightFormat, usize, &TensorInfo, &TensorInfo), FormatError> {
        let unsupported = |what: String| FormatError::UnsupportedQuantisation { tensor: name.to_owned(), what };
        let mismatch = |expected: String, got: String| FormatError::QuantisationMismatch { tensor: name.to_owned(), expected, got };
        let scales = self.require(&format!("{prefix}.scales"))?;
        let scale_type = match scales.dtype {
            ElementType::Plain(Dtype::F16) => ScaleType::F16,
            ElementType::Plain(Dtype::BF16) => ScaleType::BF16,
            ElementType::Plain(Dtype::F32) => ScaleType::F32,
            ElementType::Plain(Dtype::U8) => return Err(unsupported("an MX or NV floating-point mode (scales of type U8)".to_owned())),
            other => return Err(unsupported(format!("scales of type {other:?}"))),
        };
        let biases = self.require(&format!("{prefix}.biases"))?;
        if (biases.dtype, &biases.shape) != (scales.dtype, &scales.shape) {
            return Err(shape_error(&format!("{prefix}.biases"), &format!("that of the scales, {:?}", scales.shape), biases));
        }
        let quantization = ["quantization", "quantization_config"].iter().find_map(|key| self.config().get(key)?.as_object());
        let quantization = quantization.ok_or_else(|| mismatch("nothing (no quantization)".to_owned(), "packed words with scales".to_owned()))?;
        let own = match quantization.get(prefix) {
            Some(Value::Object(own)) => own,
            Some(Value::Bool(false)) => return Err(mismatch("not quantised".to_owned(), "packed words with scales".to_owned())),
            _ => quantization,
        };
        let field = |key: &str| own.get(key).or_else(|| quantization.get(key));
        if let Some(mode) = field("mode").and_then(Value::as_str).filter(|m| *m != "affine") {
            return Err(unsupported(format!("the mode {mode}")));
        }
        let number = |key: &str| field(key).and_then(Value::as_u64).and_then(|n| usize::try_from(n).ok());
        let (Some(bits), Some(group)) = (number("bits"), number("group_size")) else {
            return Err(mismatch("no bits and group_size".to_owned(), "packed words with scales".to_owned()));
        };
        if !matches!(bits, 4 | 8) {
            return Err(unsupported(format!("{bits} bits")));
        }
        if !matches!(group, 32 | 64 | 128) {
            return Err(unsupported(format!("groups of {group}")));
        }
        let (outer, words) = info.shape.split_at(info.shape.len() - 1);
        let (scale_outer, groups) = scales.shape.split_at(scales.shape.len().saturating_sub(1));
        if outer != scale_outer {
            return Err(shape_error(&format!("{prefix}.scales"), &format!("{outer:?} and the groups"), scales));
        }
        let cols = groups[0] * group;
        if words[0] * 32 != cols * bits {
            let got = format!("{} words of 32 bits for {} groups", words[0], groups[0]);
            return Err(mismatch(format!("{bits} bits in groups of {group}"), got));
        }
        let format = WeightFormat::Affine { bits: bits as u8, group: group as u16, scales: scale_type };
        Ok((format, cols, scales, biases))
    }
}

fn shape_error(tensor: &str, expected: &str, info: &TensorInfo) -> FormatError {
    FormatError::Shape { tensor: tensor.to_owned(), expected: expected.to_owned(), got: info.shape.clone() }
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
        &self.name
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
        let (data, scales) = row_bytes(&self.layout);
        (self.rows() * self.leading.unwrap_or(1)) as u64 * (data + 2 * scales) as u64
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
        assert!(self.leading.is_some_and(|n| e < n), "expert {e} of {:?} in {}", self.leading, self.name);
        let mut one = self.clone();
        one.leading = None;
        one.for_planes(|plane| plane.skip_rows(e * self.rows()));
        one
    }

    /// The rows `r` of a single matrix. A range of a stack is the same rows of each of its matrices, to be picked
    /// with [`Matrix::expert`] first.
    ///
    /// # Panics
    /// When the range is outside or this is a stack.
    pub fn rows_range(&self, r: Range<usize>) -> Self {
        assert!(self.leading.is_none() && r.start <= r.end && r.end <= self.rows(), "rows {r:?} of {} in {}", self.rows(), self.name);
        let mut part = self.clone();
        part.layout.rows = r.len();
        part.for_planes(|plane| plane.skip_rows(r.start));
        part
    }

    fn for_planes(&mut self, f: impl Fn(&mut Plane)) {
        f(&mut self.data);
        self.params.iter_mut().flatten().for_each(f);
    }

    /// Reads `rows` as they lie: data, scales, biases.
    fn read_rows(&self, rows: Range<usize>) -> Result<[Vec<u8>; 3], FormatError> {
        let read = |plane: &Plane| {
            let mut bytes = vec![0; rows.len() * plane.row_bytes];
            self.files.read(plane.file, plane.offset + rows.start as u64 * plane.row_bytes as u64, &mut bytes)?;
            Ok(bytes)
        };
        match &self.params {
            Some([scales, biases]) => Ok([read(&self.data)?, read(scales)?, read(biases)?]),
            None => Ok([read(&self.data)?, Vec::new(), Vec::new()]),
        }
    }

    fn widen_row(&self, [data, scales, biases]: [&[u8]; 3], out: &mut [f32]) {
        match self.layout.format {
            WeightFormat::F32 => PlainType::F32.widen(data, out),
            WeightFormat::F16 => PlainType::F16.widen(data, out),
            WeightFormat::BF16 => PlainType::BF16.widen(data, out),
            WeightFormat::Affine { bits, group, scales: ty } => affine::dequantise_row(bits, group.into(), ty, data, scales, biases, out),
            WeightFormat::Block(block) => quant::dequantise_row(block, data, out),
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
        assert!(self.leading.is_none() && row < self.rows() && out.len() == self.cols(), "row {row} of {}", self.name);
        let [data, scales, biases] = self.read_rows(row..row + 1)?;
        self.widen_row([&data, &scales, &biases], out);
        Ok(())
    }

    /// All rows (of the whole stack), row-major, dequantised.
    ///
    /// # Errors
    /// A read error.
    pub fn to_f32(&self) -> Result<Vec<f32>, FormatError> {
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

    /// A multiple of 16 rows of about [`READ_BYTES`].
    fn rows_per_read(&self) -> usize {
        let (data, scales) = row_bytes(&self.layout);
        (READ_BYTES / (data + 2 * scales).max(1) / TILE_ROWS).max(1) * TILE_ROWS
    }

    /// Lets the system drop its cached pages of this matrix, for readers that stream experts from a checkpoint.
    pub fn forget(&self) {
        self.each_part(|file, offset, bytes| forget_pages(file, offset, Some(bytes)));
    }

    /// Lets the system begin to read this matrix, for a loader that comes to it soon.
    pub fn expect(&self) {
        self.each_part(expect_pages);
    }

    /// Calls `f` with the file, offset and length of data, scales and biases.
    fn each_part(&self, f: fn(&File, u64, u64)) {
        for plane in std::iter::once(&self.data).chain(self.params.iter().flatten()) {
            let bytes = (self.rows() * self.leading.unwrap_or(1) * plane.row_bytes) as u64;
            f(&self.files.open[plane.file].1, plane.offset, bytes);
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
            _ => Err(FormatError::UnsupportedQuantisation { tensor: self.name.to_string(), what: format!("{format} for {} columns", self.cols()) }),
        }
    }

    /// Writes the tiles from `first` on into `dst`, tile `first + i` at `i·stride`, as many as `tiles` says.
    fn pack_tiles(&self, target: Target, first: usize, tiles: usize, dst: &mut [u8], stride: usize) -> Result<(), FormatError> {
        let step = self.rows_per_read() / TILE_ROWS;
        let tile_bytes = target.layout.tile_bytes();
        for start in (0..tiles).step_by(step) {
            let end = tiles.min(start + step);
            let rows = (first + start) * TILE_ROWS..((first + end) * TILE_ROWS).min(self.rows());
            let [data, scales, biases] = if target.requantise { self.quantise_rows(target.layout.format, rows)? } else { self.read_rows(rows)? };
            let (data_row, scale_row) = row_bytes(&target.layout);
            let piece = |bytes, row, t| nth_chunk(bytes, row * TILE_ROWS, t);
            for t in 0..end - start {
                let rows = Rows { data: piece(&data, data_row, t), scales: piece(&scales, scale_row, t), biases: piece(&biases, scale_row, t) };
                pack_tile(&target.layout, rows, &mut dst[(start + t) * stride..][..tile_bytes]);
            }
        }
        Ok(())
    }

    /// Reads `rows` and quantises them to `format` (affine): packed words, scales, biases as MLX stores them.
    pub(crate) fn quantise_rows(&self, format: WeightFormat, rows: Range<usize>) -> Result<[Vec<u8>; 3], FormatError> {
        let WeightFormat::Affine { bits, group, scales: ty } = self.quantised_layout(format)?.format else {
            unreachable!("quantised layouts are affine");
        };
        let (data_row, scale_row) = row_bytes(&PackedLayout::new(rows.len(), self.cols(), format));
        let mut values = vec![0.0; rows.len() * self.cols()];
        self.widen_rows(rows.start, &mut values)?;
        let mut out = [data_row, scale_row, scale_row].map(|row| vec![0; rows.len() * row]);
        let [data, scales, biases] = &mut out;
        let params = scales.chunks_exact_mut(scale_row).zip(biases.chunks_exact_mut(scale_row));
        for (i, ((values, data), (scales, biases))) in values.chunks_exact(self.cols()).zip(data.chunks_exact_mut(data_row)).zip(params).enumerate() {
            affine::quantise_row(values, bits, group.into(), ty, data, scales, biases).map_err(|e| FormatError::Quantise {
                tensor: self.name.to_string(),
                row: rows.start + i,
                reason: e.to_string(),
            })?;
        }
        Ok(out)
    }

    fn pack_strided(&self, target: Target, dst: &mut [u8], tile_stride: usize) -> Result<(), FormatError> {
        assert!(self.leading.is_none(), "{} is a stack", self.name);
        let tiles = target.layout.tiles();
        let needed = if tiles == 0 { 0 } else { (tiles - 1) * tile_stride + target.layout.tile_bytes() };
        if dst.len() < needed || tile_stride < target.layout.tile_bytes() {
            return Err(FormatError::Buffer { tensor: self.name.to_string(), expected: needed, got: dst.len() });
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
        assert!(self.leading.is_none(), "{} is a stack", self.name);
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
        return Err(FormatError::Plan { reason: format!("{} {:?} and {} {:?} are no gate|up pair", gate.name, half, up.name, up.layout) });
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
        let rows = Rows { data: &bytes, scales: &[], biases: &[] };
        pack_tile(&layout, rows, tile);
    }
    PackedMatrix { layout, data }
}
