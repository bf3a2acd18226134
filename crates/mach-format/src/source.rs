//! How weights lie in a checkpoint, recognised by the tensors that are there and their types; what a configuration says
//! of quantisation only checks it.

use std::sync::Arc;

use safetensors::Dtype;
use serde_json::{Map, Value};

use crate::bytes::Bytes;
use crate::checkpoint::{Checkpoint, ElementType, PlainType, TensorInfo};
use crate::error::FormatError;
use crate::format::{BlockFormat, ScaleType, WeightFormat};
use crate::matrix::{Matrix, Plane, Source};
use crate::packed::PackedLayout;
use crate::quant::{affine, fp8, mxfp4, nvfp4};

/// How the rows of a matrix are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stored {
    /// As tiles are packed of them.
    Rows,
    /// MXFP4: neighbours in a byte, exponents apart.
    Mxfp4,
    /// FP8 with scales of so many bytes for so many columns; single bytes are exponents.
    Fp8 { columns: usize, width: usize },
    /// compressed-tensors' integers of so many bits, a stream along the row as MLX's, scales for so many columns; with or without
    /// what stands for zero, a stream down the rows.
    Integers { bits: u8, columns: usize, scales: ScaleType, zeros: bool },
    /// NVFP4: neighbours in a byte, scales apart, and one for the whole tensor.
    Nvfp4(Global),
}

/// What the scale of a whole NVFP4 tensor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Global {
    /// 1.
    None,
    /// As it is stored.
    Factor,
    /// Its inverse is stored (compressed-tensors).
    Divisor,
    /// The largest value, which the largest scale times the largest number stands for (MLX).
    Largest,
}

impl Stored {
    /// Rows as tiles are packed of them; `number` gives those of rows in their matrix.
    pub(crate) fn rows(self, layout: &PackedLayout, number: impl Fn(usize) -> usize, [data, scales, biases]: [Bytes; 3]) -> [Bytes; 3] {
        match self {
            Self::Rows => [data, scales, biases],
            Self::Mxfp4 => [mxfp4::join(&data, &scales).into(), Bytes::default(), Bytes::default()],
            Self::Fp8 { columns, width } => {
                let row = layout.cols.div_ceil(columns) * width;
                let scales = fp8::spread(&scales, row, width, width == 1, [layout.cols, columns, layout.block_columns()]);
                [data, scales.into(), Bytes::default()]
            }
            Self::Integers { bits, columns, scales: ty, zeros } => {
                let (cols, group) = (layout.cols, layout.block_columns());
                let row = cols / columns * ty.bytes();
                let [mut to_scales, mut to_biases] = [const { Vec::new() }; 2];
                for (i, scales) in scales.chunks_exact(row).enumerate() {
                    for g in (0..cols).step_by(group).map(|col| col / columns) {
                        let scale = affine::get(ty, &scales[g * ty.bytes()..][..ty.bytes()]);
                        let (zero, ty) = if zeros {
                            let word = u32::from_le_bytes([0, 1, 2, 3].map(|j| biases[(i * cols / columns + g) * 4 + j]));
                            let at = number(i) % (32 / usize::from(bits)) * usize::from(bits);
                            (word >> at & ((1 << bits) - 1), ScaleType::F32)
                        } else {
                            (1 << (bits - 1), ty)
                        };
                        affine::push(ty, scale, &mut to_scales);
                        affine::push(ty, -(zero as f32 * scale), &mut to_biases);
                    }
                }
                [data, to_scales.into(), to_biases.into()]
            }
            Self::Nvfp4(global) => {
                let rows = data.len() * 2 / layout.cols;
                let stored = |at: usize| f32::from_le_bytes([0, 1, 2, 3].map(|i| biases[at * 4 + i]));
                let factor = |row: usize| match global {
                    Global::None => 1.0,
                    Global::Factor => stored(row),
                    Global::Divisor => 1.0 / stored(row),
                    Global::Largest => stored(row) / (448.0 * 6.0),
                };
                let factors: Vec<u8> = (0..rows).flat_map(|row| f32::to_le_bytes(factor(row))).collect();
                [nvfp4::join(&data, &scales).into(), factors.into(), Bytes::default()]
            }
        }
    }
}

/// A tensor that belongs to a matrix.
struct Part<'a> {
    name: String,
    info: &'a TensorInfo,
}

/// Dimensions of a weight: a stack or not, rows, and what is left.
struct Shape {
    leading: Option<usize>,
    rows: usize,
    width: usize,
}

impl Shape {
    /// One to three dimensions; a single one is a row.
    fn of(name: &str, info: &TensorInfo, dims: &[usize]) -> Result<Self, FormatError> {
        let (leading, rows, width) = match *dims {
            [width] => (None, 1, width),
            [rows, width] => (None, rows, width),
            [leading, rows, width] => (Some(leading), rows, width),
            _ => return Err(shape_error(name, "1 to 3 dimensions", info)),
        };
        if info.shape.contains(&0) {
            return Err(shape_error(name, "no empty dimension", info));
        }
        Ok(Self { leading, rows, width })
    }

    fn all_rows(&self) -> usize {
        self.rows * self.leading.unwrap_or(1)
    }
}

/// Endings of the tensor with the data of a module.
pub(crate) const ENDINGS: [&str; 4] = ["_blocks", ".weight_packed", ".qweight", ".weight"];

impl Checkpoint {
    /// Whether there is a weight of this module, in any form that [`Checkpoint::matrix`] knows.
    pub fn has_matrix(&self, prefix: &str) -> bool {
        self.tensor(prefix).is_some() || ENDINGS.iter().any(|ending| self.tensor(&format!("{prefix}{ending}")).is_some())
    }

    /// The weight of a module, however it is stored: `{prefix}.weight`, or `prefix` itself where a tensor has that name, alone or
    /// with what belongs to its quantisation (`.scales` and `.biases` of MLX, `.scale` of DeepSeek, `{prefix}_blocks` and
    /// `{prefix}_scales` of gpt-oss, `.weight_packed` of compressed-tensors). Two dimensions, or three for a stack of experts; one is a single row.
    ///
    /// # Errors
    /// A missing tensor, another number of dimensions, a type or quantisation that is not read, shapes that do not
    /// fit each other or the `quantization` of the configuration.
    pub fn matrix(&self, prefix: &str) -> Result<Matrix, FormatError> {
        let blocks = format!("{prefix}_blocks");
        if self.tensor(&blocks).is_some() {
            return self.blocks_and_scales(prefix, blocks);
        }
        let packed = format!("{prefix}.weight_packed");
        if self.tensor(&packed).is_some() {
            return self.compressed(prefix, packed);
        }
        let words = format!("{prefix}.qweight");
        if self.tensor(&words).is_some() {
            let says = self.config().get("quantization_config").and_then(|q| q.get("quant_method")).and_then(Value::as_str);
            let by_name = if self.tensor(&format!("{prefix}.g_idx")).is_some() { "GPTQ" } else { "AWQ" };
            return Err(FormatError::ForeignQuantisation { tensor: words, method: says.map_or(by_name.to_owned(), str::to_uppercase) });
        }
        let dotted = format!("{prefix}.weight");
        let name = if self.tensor(&dotted).is_none() && self.tensor(prefix).is_some() { prefix.to_owned() } else { dotted };
        let info = self.require(&name)?;
        let shape = Shape::of(&name, info, &info.shape)?;
        let data = Part { name, info };
        let unsupported =
            || FormatError::UnsupportedQuantisation { tensor: data.name.clone(), what: format!("{:?} weights{}", info.dtype, self.quant_method()) };
        let (format, cols) = match info.dtype {
            ElementType::Plain(Dtype::U32) => return self.mlx(prefix, data, &shape),
            ElementType::Plain(Dtype::I8) if self.tensor(&format!("{prefix}.scale")).is_some() => {
                let scales = self.part(format!("{prefix}.scale"))?;
                return self.mxfp4(data, &shape, shape.width * 2, scales);
            }
            ElementType::Plain(Dtype::U8) if self.tensor(&format!("{prefix}.weight_scale_2")).is_some() => return self.model_opt(prefix, data, &shape),
            ElementType::Plain(Dtype::U8) => {
                let block = self.block_mode(prefix).ok_or_else(unsupported)?;
                if !shape.width.is_multiple_of(block.source_bytes()) {
                    return Err(shape_error(&data.name, &format!("rows of whole {} blocks", block.name()), info));
                }
                (WeightFormat::Block(block), shape.width / block.source_bytes() * block.columns())
            }
            ElementType::Block(ty) => (WeightFormat::Block(ty.block().ok_or_else(unsupported)?), shape.width),
            ElementType::Plain(Dtype::F8_E4M3) => return self.fp8(prefix, data, &shape),
            _ if info.dtype.is_float() => (
                match PlainType::of(&data.name, info.dtype)? {
                    PlainType::F32 => WeightFormat::F32,
                    PlainType::F16 => WeightFormat::F16,
                    PlainType::BF16 => WeightFormat::BF16,
                },
                shape.width,
            ),
            _ => return Err(unsupported()),
        };
        Ok(self.whole(&shape, cols, format, Stored::Rows, vec![data]))
    }

    fn part(&self, name: String) -> Result<Part<'_>, FormatError> {
        Ok(Part { info: self.require(&name)?, name })
    }

    /// A matrix whose tensors all have a row for each of its rows.
    fn whole(&self, shape: &Shape, cols: usize, format: WeightFormat, stored: Stored, parts: Vec<Part<'_>>) -> Matrix {
        let mut planes = [None; 3];
        for (to, part) in planes.iter_mut().zip(&parts) {
            *to = plane(part, part.info.bytes as usize / shape.all_rows(), 1);
        }
        self.of_planes(shape, cols, format, stored, planes, parts)
    }

    fn of_planes(&self, shape: &Shape, cols: usize, format: WeightFormat, stored: Stored, planes: [Option<Plane>; 3], parts: Vec<Part<'_>>) -> Matrix {
        let parts = parts.into_iter().map(|part| part.name).collect();
        Matrix {
            source: Arc::new(Source { files: Arc::clone(&self.files), parts, planes, rows: shape.rows, stored }),
            layout: PackedLayout::new(shape.rows, cols, format),
            leading: shape.leading,
            first: 0,
            step: 1,
            transposed: None,
            past_cache: false,
        }
    }

    /// E2M1 numbers, neighbours in a byte, with exponents for every 32 columns.
    fn mxfp4(&self, data: Part<'_>, shape: &Shape, cols: usize, scales: Part<'_>) -> Result<Matrix, FormatError> {
        if !matches!(scales.info.dtype, ElementType::Plain(Dtype::U8 | Dtype::F8_E8M0)) {
            return Err(FormatError::Dtype { tensor: scales.name, expected: "U8 or F8_E8M0", got: format!("{:?}", scales.info.dtype) });
        }
        let expected: Vec<usize> = shape.leading.into_iter().chain([shape.rows, cols / 32]).collect();
        if !cols.is_multiple_of(32) || scales.info.shape != expected {
            return Err(shape_error(&scales.name, &format!("{expected:?}, an exponent for every 32 of {cols} columns"), scales.info));
        }
        Ok(self.whole(shape, cols, WeightFormat::Block(BlockFormat::Mxfp4), Stored::Mxfp4, vec![data, scales]))
    }

    /// gpt-oss: `[.., rows, groups, 16]` bytes beside `[.., rows, groups]` exponents.
    fn blocks_and_scales(&self, prefix: &str, blocks: String) -> Result<Matrix, FormatError> {
        let (data, scales) = (self.part(blocks)?, self.part(format!("{prefix}_scales"))?);
        let ([outer @ .., groups, 16], ElementType::Plain(Dtype::U8)) = (&data.info.shape[..], data.info.dtype) else {
            return Err(shape_error(&data.name, "bytes [.., rows, groups, 16]", data.info));
        };
        let dims: Vec<usize> = outer.iter().copied().chain([groups * 16]).collect();
        let shape = Shape::of(&data.name, data.info, &dims)?;
        self.mxfp4(data, &shape, shape.width * 2, scales)
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

    /// Words of MLX with their scales: floating-point modes have bytes for scales, affine ones numbers and biases.
    fn mlx(&self, prefix: &str, data: Part<'_>, shape: &Shape) -> Result<Matrix, FormatError> {
        let scales = self.part(format!("{prefix}.scales"))?;
        let (outer, last) = scales.info.shape.split_at(scales.info.shape.len().saturating_sub(1));
        let expected = &data.info.shape[..data.info.shape.len() - 1];
        let &[groups] = last else { return Err(shape_error(&scales.name, &format!("{expected:?} and the groups"), scales.info)) };
        if outer != expected || groups == 0 {
            return Err(shape_error(&scales.name, &format!("{expected:?} and the groups"), scales.info));
        }
        let scale_type = match scales.info.dtype {
            ElementType::Plain(Dtype::F16) => ScaleType::F16,
            ElementType::Plain(Dtype::BF16) => ScaleType::BF16,
            ElementType::Plain(Dtype::F32) => ScaleType::F32,
            ElementType::Plain(Dtype::U8) => return self.mlx_float(prefix, data, shape, scales, groups),
            other => return Err(FormatError::UnsupportedQuantisation { tensor: data.name, what: format!("scales of type {other:?}") }),
        };
        let (bits, group) = self.affine_groups(prefix, &data.name, shape.width, groups)?;
        let biases = self.part(format!("{prefix}.biases"))?;
        if (biases.info.dtype, &biases.info.shape) != (scales.info.dtype, &scales.info.shape) {
            return Err(shape_error(&biases.name, &format!("that of the scales, {:?}", scales.info.shape), biases.info));
        }
        let format = WeightFormat::Affine { bits: bits as u8, group: group as u16, scales: scale_type };
        Ok(self.whole(shape, groups * group, format, Stored::Rows, vec![data, scales, biases]))
    }

    /// Bits and columns of a group are told apart by their words alone: 4 and 32, 4 and 16, 8 and 32.
    fn mlx_float(&self, prefix: &str, data: Part<'_>, shape: &Shape, scales: Part<'_>, groups: usize) -> Result<Matrix, FormatError> {
        let entry = self.mlx_entry(prefix, &data.name)?;
        let says = || entry.as_ref().map_or("no mode".to_owned(), MlxEntry::to_string);
        let got = format!("{} words of 32 bits for {groups} groups", shape.width);
        let (mode, bits, group) = match shape.width {
            words if words == groups * 4 => ("mxfp4", 4, 32),
            words if words == groups * 8 => ("mxfp8", 8, 32),
            words if words == groups * 2 => ("nvfp4", 4, 16),
            _ => return Err(mismatch(&data.name, says(), got)),
        };
        if entry.as_ref().is_some_and(|entry| (entry.mode, entry.bits, entry.group) != (mode, bits, group)) {
            return Err(mismatch(&data.name, says(), format!("{mode}: {got}")));
        }
        match mode {
            "mxfp4" => self.mxfp4(data, shape, shape.width * 8, scales),
            "nvfp4" => {
                let global = format!("{prefix}.global_scale");
                let global = self.tensor(&global).map(|info| (Part { name: global, info }, Global::Largest));
                self.nvfp4(data, shape, shape.width * 8, scales, global)
            }
            _ => {
                let format = WeightFormat::Fp8 { group: 32, scales: ScaleType::BF16 };
                Ok(self.whole(shape, shape.width * 4, format, Stored::Fp8 { columns: 32, width: 1 }, vec![data, scales]))
            }
        }
    }

    /// FP8 with scales by blocks of rows and columns (`weight_scale_inv`, which multiplies, or `scale`), by row or for the whole
    /// (`weight_scale`).
    fn fp8(&self, prefix: &str, data: Part<'_>, shape: &Shape) -> Result<Matrix, FormatError> {
        let names = if data.name == prefix {
            [format!("{prefix}_scale_inv"), format!("{prefix}_scale"), format!("{prefix}.scale")]
        } else {
            ["weight_scale_inv", "scale", "weight_scale"].map(|name| format!("{prefix}.{name}"))
        };
        let scales = self.part(names.iter().find(|name| self.tensor(name).is_some()).unwrap_or(&names[0]).clone())?;
        let (scale_type, width) = match scales.info.dtype {
            ElementType::Plain(Dtype::F32) => (ScaleType::F32, 4),
            ElementType::Plain(Dtype::BF16) => (ScaleType::BF16, 2),
            ElementType::Plain(Dtype::F16) => (ScaleType::F16, 2),
            ElementType::Plain(Dtype::F8_E8M0 | Dtype::U8) => (ScaleType::BF16, 1),
            other => return Err(FormatError::Dtype { tensor: scales.name, expected: "F32, BF16, F16 or F8_E8M0", got: format!("{other:?}") }),
        };
        let cols = shape.width;
        let [block_rows, block_cols] = self.weight_block();
        // One matrix of a stack at a time: what follows the leading dimension.
        let own = match shape.leading {
            Some(leading) if scales.info.shape.first() == Some(&leading) => &scales.info.shape[1..],
            Some(_) => return Err(shape_error(&scales.name, "scales for every matrix of the stack", scales.info)),
            None => &scales.info.shape[..],
        };
        let blocks = [shape.rows.div_ceil(block_rows), cols.div_ceil(block_cols)];
        let (rows_per, columns) = match *own {
            [rows, cols] if [rows, cols] == blocks => (block_rows, block_cols),
            [rows] | [rows, 1] if rows == shape.rows => (1, cols),
            [] | [1] | [1, 1] => (shape.rows, cols),
            _ => return Err(shape_error(&scales.name, &format!("{blocks:?} by blocks, one by row, or a single one"), scales.info)),
        };
        let Some(group) = [128, 64, 32].into_iter().find(|group| cols.is_multiple_of(*group) && (columns == cols || columns.is_multiple_of(*group))) else {
            return Err(shape_error(&data.name, "columns that 32 divides, in blocks that 32 divides", data.info));
        };
        let planes = [plane(&data, cols, 1), plane(&scales, cols.div_ceil(columns) * width, rows_per), None];
        let format = WeightFormat::Fp8 { group: group as u16, scales: scale_type };
        let mut parts = vec![data, scales];
        parts.extend(self.unused_parts(prefix));
        Ok(self.of_planes(shape, cols, format, Stored::Fp8 { columns, width }, planes, parts))
    }

    /// E2M1 numbers, neighbours in a byte, with E4M3 scales for every 16 columns and perhaps one number for each matrix.
    fn nvfp4<'a>(&'a self, data: Part<'a>, shape: &Shape, cols: usize, scales: Part<'a>, global: Option<(Part<'a>, Global)>) -> Result<Matrix, FormatError> {
        let expected: Vec<usize> = shape.leading.into_iter().chain([shape.rows, cols / 16]).collect();
        if !cols.is_multiple_of(32) || scales.info.shape != expected {
            return Err(shape_error(&scales.name, &format!("{expected:?}, a scale for every 16 of {cols} columns, a multiple of 32"), scales.info));
        }
        let mut planes = [plane(&data, cols / 2, 1), plane(&scales, cols / 16, 1), None];
        let (mut parts, mut kind) = (vec![data, scales], Global::None);
        if let Some((part, what)) = global {
            if part.info.dtype != ElementType::Plain(Dtype::F32) {
                return Err(FormatError::Dtype { tensor: part.name, expected: "F32", got: format!("{:?}", part.info.dtype) });
            }
            if part.info.bytes as usize != 4 * shape.leading.unwrap_or(1) {
                return Err(shape_error(&part.name, "one number for each matrix", part.info));
            }
            planes[2] = plane(&part, 4, shape.rows);
            kind = what;
            parts.push(part);
        }
        Ok(self.of_planes(shape, cols, WeightFormat::Block(BlockFormat::Nvfp4), Stored::Nvfp4(kind), planes, parts))
    }

    /// NVIDIA's ModelOpt: bytes with `weight_scale` (E4M3) and `weight_scale_2`.
    fn model_opt(&self, prefix: &str, data: Part<'_>, shape: &Shape) -> Result<Matrix, FormatError> {
        let scales = self.part(format!("{prefix}.weight_scale"))?;
        if scales.info.dtype != ElementType::Plain(Dtype::F8_E4M3) {
            return Err(FormatError::Dtype { tensor: scales.name, expected: "F8_E4M3", got: format!("{:?}", scales.info.dtype) });
        }
        let global = self.part(format!("{prefix}.weight_scale_2"))?;
        let mut m = self.nvfp4(data, shape, shape.width * 2, scales, Some((global, Global::Factor)))?;
        if let (Some(unused), Some(source)) = (self.unused_parts(prefix), Arc::get_mut(&mut m.source)) {
            source.parts.push(unused.name);
        }
        Ok(m)
    }

    /// compressed-tensors: `weight_packed` with `weight_scale`, integers with `weight_shape`, floats with `weight_global_scale`.
    fn compressed(&self, prefix: &str, packed: String) -> Result<Matrix, FormatError> {
        let (data, scales) = (self.part(packed)?, self.part(format!("{prefix}.weight_scale"))?);
        let shape = Shape::of(&data.name, data.info, &data.info.shape)?;
        let unsupported = |what: &str| FormatError::UnsupportedQuantisation { tensor: data.name.clone(), what: what.to_owned() };
        match data.info.dtype {
            ElementType::Plain(Dtype::U8) => {
                let global = self.part(format!("{prefix}.weight_global_scale"))?;
                let cols = shape.width * 2;
                return self.nvfp4(data, &shape, cols, scales, Some((global, Global::Divisor)));
            }
            ElementType::Plain(Dtype::I32) => {}
            other => return Err(unsupported(&format!("packed weights of type {other:?}"))),
        }
        if self.tensor(&format!("{prefix}.weight_g_idx")).is_some() {
            return Err(unsupported("groups in an order of their own (weight_g_idx)"));
        }
        let dims = self.part(format!("{prefix}.weight_shape"))?;
        let cols = self.read_integers(&dims)?.last().copied().unwrap_or(0);
        let bits = shape.width * 32 / cols.max(1);
        if !matches!(bits, 2..=6 | 8) || !cols.is_multiple_of(32) || bits * cols != shape.width * 32 {
            return Err(unsupported(&format!("{} words for {cols} columns", shape.width)));
        }
        let scale_type = match scales.info.dtype {
            ElementType::Plain(Dtype::F16) => ScaleType::F16,
            ElementType::Plain(Dtype::BF16) => ScaleType::BF16,
            ElementType::Plain(Dtype::F32) => ScaleType::F32,
            other => return Err(unsupported(&format!("scales of type {other:?}"))),
        };
        let (outer, &groups) = match scales.info.shape.split_last() {
            Some((groups, outer)) if outer == &data.info.shape[..data.info.shape.len() - 1] && *groups > 0 => (outer, groups),
            _ => return Err(shape_error(&scales.name, "a row of scales for each row of weights", scales.info)),
        };
        let columns = cols / groups;
        let Some(group) = [128, 64, 32].into_iter().find(|group| columns.is_multiple_of(*group)).filter(|_| cols.is_multiple_of(groups)) else {
            return Err(shape_error(&scales.name, &format!("groups of a multiple of 32 of {cols} columns"), scales.info));
        };
        let mut planes = [plane(&data, shape.width * 4, 1), plane(&scales, groups * scale_type.bytes(), 1), None];
        let mut parts = vec![data, scales, dims];
        let zeros = format!("{prefix}.weight_zero_point");
        let with_zeros = self.tensor(&zeros).is_some();
        if with_zeros {
            let part = self.part(zeros)?;
            let per = 32 / bits;
            let last = outer.len() - 1;
            let expected: Vec<usize> = outer[..last].iter().copied().chain([shape.rows.div_ceil(per), groups]).collect();
            if !matches!(bits, 4 | 8) || part.info.dtype != ElementType::Plain(Dtype::I32) || part.info.shape != expected {
                return Err(shape_error(&part.name, &format!("words {expected:?} of zeros of 4 or 8 bits"), part.info));
            }
            planes[2] = plane(&part, groups * 4, per);
            parts.push(part);
        }
        parts.extend(self.unused_parts(prefix));
        // Products of zeros and scales are exact in f32; without zeros they are scales times a power of two.
        let scales = if with_zeros { ScaleType::F32 } else { scale_type };
        let format = WeightFormat::Affine { bits: bits as u8, group: group as u16, scales };
        let stored = Stored::Integers { bits: bits as u8, columns, scales: scale_type, zeros: with_zeros };
        Ok(self.of_planes(&shape, cols, format, stored, planes, parts))
    }

    /// The numbers of a small tensor of whole numbers.
    fn read_integers(&self, part: &Part<'_>) -> Result<Vec<usize>, FormatError> {
        let bytes = self.read_bytes(&part.name)?;
        let numbers = match part.info.dtype {
            ElementType::Plain(Dtype::I64) => bytes.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b) as usize).collect(),
            ElementType::Plain(Dtype::I32) => bytes.as_chunks().0.iter().map(|b| i32::from_le_bytes(*b) as usize).collect(),
            other => return Err(FormatError::Dtype { tensor: part.name.clone(), expected: "I64 or I32", got: format!("{other:?}") }),
        };
        Ok(numbers)
    }

    /// What belongs to a quantised module and plays no part here: scales of activations.
    fn unused_parts(&self, prefix: &str) -> Option<Part<'_>> {
        let name = format!("{prefix}.input_scale");
        self.tensor(&name).map(|info| Part { name, info })
    }

    /// Rows and columns that share a scale of FP8.
    fn weight_block(&self) -> [usize; 2] {
        let block = self.quantization_entry().and_then(|q| q.get("weight_block_size")).and_then(Value::as_array);
        let side = |i: usize| block.and_then(|b| b.get(i)?.as_u64()).filter(|&n| n > 0).map_or(128, |n| n as usize);
        [side(0), side(1)]
    }

    /// What the configuration says of quantisation; packs keep what other files call `quantization_config` where MLX does.
    fn quantization_entry(&self) -> Option<&Map<String, Value>> {
        ["quantization", "quantization_config"].iter().find_map(|key| self.config().get(key)?.as_object())
    }

    /// What the configuration says of a module of MLX, `None` where it says nothing. The module's own entry stands alone: it takes neither
    /// mode nor numbers from the general one. Numbers that an entry leaves out are those of its mode, and no mode is `affine`.
    fn mlx_entry(&self, prefix: &str, name: &str) -> Result<Option<MlxEntry<'_>>, FormatError> {
        let Some(general) = self.quantization_entry() else { return Ok(None) };
        let entry = match general.get(prefix) {
            Some(Value::Bool(false)) => return Err(mismatch(name, "not quantised", "packed words with scales".to_owned())),
            Some(Value::Object(own)) => own,
            _ => general,
        };
        if !["mode", "bits", "group_size"].iter().any(|key| entry.contains_key(*key)) {
            return Ok(None);
        }
        let mode = entry.get("mode").and_then(Value::as_str).unwrap_or("affine");
        let (bits, group) = match mode {
            "affine" => (4, 64),
            "mxfp4" => (4, 32),
            "nvfp4" => (4, 16),
            "mxfp8" => (8, 32),
            other => return Err(FormatError::UnsupportedQuantisation { tensor: name.to_owned(), what: format!("the mode {other} of MLX") }),
        };
        let number = |key: &str, default: u64| entry.get(key).and_then(Value::as_u64).unwrap_or(default);
        Ok(Some(MlxEntry { mode, bits: number("bits", bits), group: number("group_size", group) }))
    }

    /// Bits and columns of a group, as the configuration names them; the shapes of words and scales must agree.
    fn affine_groups(&self, prefix: &str, name: &str, words: usize, groups: usize) -> Result<(usize, usize), FormatError> {
        let unsupported = |what: String| FormatError::UnsupportedQuantisation { tensor: name.to_owned(), what };
        let Some(entry) = self.mlx_entry(prefix, name)? else {
            return Err(mismatch(name, "nothing (no bits and group_size in quantization)", "packed words with scales".to_owned()));
        };
        if entry.mode != "affine" {
            return Err(mismatch(name, entry.to_string(), "affine: scales that are no bytes".to_owned()));
        }
        if !matches!(entry.bits, 2..=6 | 8) {
            return Err(unsupported(format!("{} bits", entry.bits)));
        }
        if !matches!(entry.group, 32 | 64 | 128) {
            return Err(unsupported(format!("groups of {}", entry.group)));
        }
        let (bits, group) = (entry.bits as usize, entry.group as usize);
        if words * 32 != groups * group * bits {
            return Err(mismatch(name, entry.to_string(), format!("{words} words of 32 bits for {groups} groups")));
        }
        Ok((bits, group))
    }
}

/// How a module of MLX is stored, by the configuration.
struct MlxEntry<'a> {
    mode: &'a str,
    bits: u64,
    group: u64,
}

impl std::fmt::Display for MlxEntry<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}, {} bits in groups of {}", self.mode, self.bits, self.group)
    }
}

/// Rows of a tensor, each of which `rows_per` rows of the weight share.
fn plane(part: &Part<'_>, row_bytes: usize, rows_per: usize) -> Option<Plane> {
    Some(Plane { file: part.info.file, offset: part.info.offset, row_bytes, rows_per })
}

fn mismatch(tensor: &str, expected: impl Into<String>, got: String) -> FormatError {
    FormatError::QuantisationMismatch { tensor: tensor.to_owned(), expected: expected.into(), got }
}

fn shape_error(tensor: &str, expected: &str, info: &TensorInfo) -> FormatError {
    FormatError::Shape { tensor: tensor.to_owned(), expected: expected.to_owned(), got: info.shape.clone() }
}
