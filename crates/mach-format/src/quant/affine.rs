//! MLX's affine groups: `x = scale·q + bias`, `q` an unsigned integer of 2 to 8 bits, a little-endian stream of bits along
//! the input.

use half::{bf16, f16};

use crate::format::ScaleType;
use crate::packed::UNIT;

/// Parts of the range of a group that are tried when quantising to 4 bits: clipping the ends can lower the error.
const SHRINK: [f32; 6] = [1.0, 0.95, 0.9, 0.85, 0.8, 0.75];

/// Why a row cannot be quantised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QuantiseError {
    /// A value is NaN or infinite.
    NotFinite {
        /// Its column.
        col: usize,
    },
    /// A scale or bias exceeds the range of its type.
    ScaleRange {
        /// First column of the group.
        col: usize,
    },
}

impl std::fmt::Display for QuantiseError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NotFinite { col } => write!(f, "column {col} is not a finite number"),
            Self::ScaleRange { col } => write!(f, "the group at column {col} exceeds the range of its scale type"),
        }
    }
}

/// Rounds to a scale type.
fn round_to(ty: ScaleType, x: f32) -> f32 {
    match ty {
        ScaleType::F16 => f16::from_f32(x).to_f32(),
        ScaleType::BF16 => bf16::from_f32(x).to_f32(),
        ScaleType::F32 => x,
    }
}

fn put(ty: ScaleType, x: f32, out: &mut [u8]) {
    match ty {
        ScaleType::F16 => out.copy_from_slice(&f16::from_f32(x).to_le_bytes()),
        ScaleType::BF16 => out.copy_from_slice(&bf16::from_f32(x).to_le_bytes()),
        ScaleType::F32 => out.copy_from_slice(&x.to_le_bytes()),
    }
}

pub(crate) fn get(ty: ScaleType, at: &[u8]) -> f32 {
    match ty {
        ScaleType::F16 => f16::from_le_bytes([at[0], at[1]]).to_f32(),
        ScaleType::BF16 => bf16::from_le_bytes([at[0], at[1]]).to_f32(),
        ScaleType::F32 => f32::from_le_bytes([at[0], at[1], at[2], at[3]]),
    }
}

/// Adds a number to the end of `out`.
pub(crate) fn push(ty: ScaleType, x: f32, out: &mut Vec<u8>) {
    let end = out.len();
    out.resize(end + ty.bytes(), 0);
    put(ty, x, &mut out[end..]);
}

/// Affine parameters of a group and what they cost.
#[derive(Clone, Copy)]
struct Fit {
    scale: f32,
    bias: f32,
    error: f32,
}

/// Level of a value, `round((x − bias) / scale)` with ties to even. Adding and taking away 1.5·2²³ rounds a small
/// number without a call, so that loops over it become vector instructions.
fn level(x: f32, inverse: f32, bias: f32, top: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0;
    (((x - bias) * inverse).max(0.0).min(top) + ROUND) - ROUND
}

fn inverse(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

/// Squared error of a group under rounded parameters.
fn fit(values: &[f32], scale: f32, bias: f32, top: f32) -> Fit {
    let inverse = inverse(scale);
    let mut sums = [0.0f32; 8];
    for chunk in values.as_chunks::<8>().0 {
        for (sum, &x) in sums.iter_mut().zip(chunk) {
            let e = x - (scale * level(x, inverse, bias, top) + bias);
            *sum += e * e;
        }
    }
    Fit { scale, bias, error: sums.iter().sum() }
}

/// Smallest and largest value of a group (a multiple of 8 values).
fn range(values: &[f32]) -> (f32, f32) {
    let (mut lo, mut hi) = ([f32::INFINITY; 8], [f32::NEG_INFINITY; 8]);
    for chunk in values.as_chunks::<8>().0 {
        for ((lo, hi), &x) in lo.iter_mut().zip(&mut hi).zip(chunk) {
            *lo = if x < *lo { x } else { *lo };
            *hi = if x > *hi { x } else { *hi };
        }
    }
    (lo.into_iter().fold(f32::INFINITY, f32::min), hi.into_iter().fold(f32::NEG_INFINITY, f32::max))
}

/// Scale and bias for one group, already rounded to `ty`: the whole range, and for 4 bits a few smaller ones, the
/// one with the least squared error.
fn choose(values: &[f32], bits: u8, ty: ScaleType) -> (f32, f32) {
    let (lo, hi) = range(values);
    let top = f32::from((1u16 << bits) - 1);
    let candidate = |shrink: f32| {
        // Halves first: the range of two finite values may not be finite.
        let (mid, half) = (lo / 2.0 + hi / 2.0, (hi / 2.0 - lo / 2.0) * shrink);
        fit(values, round_to(ty, half / (top / 2.0)), round_to(ty, if shrink == 1.0 { lo } else { mid - half }), top)
    };
    let tries = if bits == 4 { &SHRINK[..] } else { &SHRINK[..1] };
    let best = tries[1..].iter().fold(candidate(tries[0]), |best, &shrink| {
        let next = candidate(shrink);
        if next.error < best.error { next } else { best }
    });
    (best.scale, best.bias)
}

/// Quantises one row. `data` takes `row.len()·bits/8` bytes of packed words, `scales` and `biases` one value of
/// type `ty` per group each. `bits` is 4 or 8, `row.len()` a multiple of `group`.
///
/// # Errors
/// Values that are not finite or groups beyond the range of `ty`.
pub fn quantise_row(row: &[f32], bits: u8, group: usize, ty: ScaleType, data: &mut [u8], scales: &mut [u8], biases: &mut [u8]) -> Result<(), QuantiseError> {
    // One pass without an exit is vector code; the column is looked for only when there is one.
    if !row.iter().fold(true, |all, x| all & x.is_finite()) {
        let col = row.iter().position(|x| !x.is_finite()).unwrap_or_default();
        return Err(QuantiseError::NotFinite { col });
    }
    let top = f32::from((1u16 << bits) - 1);
    let width = ty.bytes();
    let out = data.chunks_exact_mut(group * usize::from(bits) / 8).zip(scales.chunks_exact_mut(width).zip(biases.chunks_exact_mut(width)));
    for (g, (values, (data, (scale_at, bias_at)))) in row.chunks_exact(group).zip(out).enumerate() {
        let (scale, bias) = choose(values, bits, ty);
        if !scale.is_finite() || !bias.is_finite() {
            return Err(QuantiseError::ScaleRange { col: g * group });
        }
        put(ty, scale, scale_at);
        put(ty, bias, bias_at);
        let inverse = inverse(scale);
        let level = |x: f32| level(x, inverse, bias, top) as u8;
        if bits == 8 {
            data.iter_mut().zip(values).for_each(|(byte, &x)| *byte = level(x));
        } else {
            let pairs = values.as_chunks::<2>().0;
            data.iter_mut().zip(pairs).for_each(|(byte, pair)| *byte = level(pair[0]) | level(pair[1]) << 4);
        }
    }
    Ok(())
}

/// The numbers of 32 columns of a stream of `bits` bits each.
pub(crate) fn numbers(bits: u8, stream: &[u8]) -> [u8; UNIT] {
    let mut out = [0; UNIT];
    // Eight numbers take as many bytes as one has bits.
    for (out, bytes) in out.chunks_exact_mut(8).zip(stream.chunks_exact(bits.into())) {
        let mut word = [0; 8];
        word[..bytes.len()].copy_from_slice(bytes);
        let word = u64::from_le_bytes(word);
        for (i, q) in out.iter_mut().enumerate() {
            *q = (word >> (i * usize::from(bits))) as u8 & u8::MAX >> (8 - bits);
        }
    }
    out
}

/// The inverse of [`quantise_row`], for 2, 3, 5 and 6 bits too: `fma(scale, q, bias)` in f32.
pub fn dequantise_row(bits: u8, group: usize, ty: ScaleType, data: &[u8], scales: &[u8], biases: &[u8], out: &mut [f32]) {
    let width = ty.bytes();
    let params = scales.chunks_exact(width).zip(biases.chunks_exact(width));
    let groups = data.chunks_exact(group * usize::from(bits) / 8).zip(params).zip(out.chunks_exact_mut(group));
    for ((data, (scale, bias)), out) in groups {
        let (scale, bias) = (get(ty, scale), get(ty, bias));
        for (data, out) in data.chunks_exact(UNIT * usize::from(bits) / 8).zip(out.chunks_exact_mut(UNIT)) {
            for (x, q) in out.iter_mut().zip(numbers(bits, data)) {
                *x = scale.mul_add(f32::from(q), bias);
            }
        }
    }
}
