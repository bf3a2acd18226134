//! Properties of the affine quantiser.

use half::f16;
use mach_format::quant::affine::{QuantiseError, dequantise_row, quantise_row};
use mach_format::{Checkpoint, ScaleType, WeightFormat};
use proptest::prelude::*;
use serde_json::json;
use tempfile::tempdir;

use crate::support::{plain, weights, write};

struct Quantised {
    values: Vec<f32>,
    scales: Vec<f32>,
    biases: Vec<f32>,
}

fn roundtrip(row: &[f32], bits: u8, group: usize) -> Result<Quantised, QuantiseError> {
    let ty = ScaleType::F16;
    let (mut data, mut scales) = (vec![0; row.len() * usize::from(bits) / 8], vec![0; row.len() / group * 2]);
    let mut biases = scales.clone();
    quantise_row(row, bits, group, ty, &mut data, &mut scales, &mut biases)?;
    let mut values = vec![0.0; row.len()];
    dequantise_row(bits, group, ty, &data, &scales, &biases, &mut values);
    let widen = |bytes: &[u8]| bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect();
    Ok(Quantised { values, scales: widen(&scales), biases: widen(&biases) })
}

/// Plain rounding over the whole range of a group, in f64: what the quantiser must not be worse than.
fn min_max_error(values: &[f32], bits: u8) -> f64 {
    let (lo, hi) = values.iter().fold((f64::MAX, f64::MIN), |(lo, hi), &x| (lo.min(x.into()), hi.max(x.into())));
    let top = f64::from((1u32 << bits) - 1);
    let (scale, bias) = (f64::from(f16::from_f64((hi - lo) / top)), f64::from(f16::from_f64(lo)));
    let error = |x: f64| x - (((x - bias) / scale).round().clamp(0.0, top) * scale + bias);
    if scale == 0.0 { f64::MAX } else { values.iter().map(|&x| error(x.into()).powi(2)).sum() }
}

fn row() -> impl Strategy<Value = Vec<f32>> {
    let magnitude = prop_oneof![Just(1e-3f32), Just(0.05), Just(1.0), Just(300.0)];
    (magnitude, prop::collection::vec(-1.0f32..1.0, 128), prop::option::of((0usize..128, 4.0f32..20.0)), -1.0f32..1.0).prop_map(
        |(magnitude, mut row, outlier, shift)| {
            if let Some((at, factor)) = outlier {
                row[at] *= factor;
            }
            row.iter_mut().for_each(|x| *x = (*x + shift) * magnitude);
            row
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]

    /// At 8 bits every value is within half a step, plus what rounding scale and bias to f16 costs.
    #[test]
    fn eight_bits_are_within_half_a_step(row in row(), group in prop::sample::select(vec![32usize, 64, 128])) {
        let out = roundtrip(&row, 8, group).unwrap();
        for (i, (x, y)) in row.iter().zip(&out.values).enumerate() {
            let (scale, bias) = (out.scales[i / group], out.biases[i / group]);
            // f16 steps are 2^-11 of a number, and 2^-25 below its normal range.
            let half = |x: f32| (x.abs() * 2f32.powi(-11)).max(2f32.powi(-25));
            let rounding = 255.0 * half(scale) + half(bias) + bias.abs() * 2f32.powi(-23);
            prop_assert!((x - y).abs() <= scale.abs() / 2.0 + rounding, "{x} became {y} at scale {scale}");
        }
    }

    /// At 4 bits ends may be clipped, but never to a larger squared error than plain rounding.
    #[test]
    fn four_bits_are_no_worse_than_plain_rounding(row in row(), group in prop::sample::select(vec![32usize, 64, 128])) {
        let out = roundtrip(&row, 4, group).unwrap();
        for (x, y) in row.chunks(group).zip(out.values.chunks(group)) {
            let error: f64 = x.iter().zip(y).map(|(x, y)| f64::from(x - y).powi(2)).sum();
            prop_assert!(error <= min_max_error(x, 4) * 1.0001 + 1e-12, "{error} against {}", min_max_error(x, 4));
        }
    }
}

#[test]
fn constant_groups_and_zeros_are_exact() {
    for value in [0.0, 1.5, -0.25, 1e-30] {
        let out = roundtrip(&[value; 64], 4, 32).unwrap();
        assert!(out.values.iter().all(|x| (x - value).abs() <= 1e-7), "{value}");
    }
}

#[test]
fn what_cannot_be_represented_is_an_error() {
    let mut row = vec![0.5; 64];
    row[40] = f32::NAN;
    assert_eq!(roundtrip(&row, 4, 32).err(), Some(QuantiseError::NotFinite { col: 40 }));
    row[40] = 1e6;
    assert_eq!(roundtrip(&row, 4, 32).err(), Some(QuantiseError::ScaleRange { col: 32 }));
    row[40] = f32::MAX;
    row[41] = f32::MIN;
    assert_eq!(roundtrip(&row, 8, 32).err(), Some(QuantiseError::ScaleRange { col: 32 }));
}

#[test]
fn packing_quantises_on_the_way() {
    let (rows, cols) = (20, 96);
    let dir = tempdir().unwrap();
    write(dir.path(), &json!({}), &[plain("m.weight", "F32", &[rows, cols], &weights(rows * cols, 2))]);
    let m = Checkpoint::open(dir.path()).unwrap().matrix("m").unwrap();
    let format = |group| WeightFormat::Affine { bits: 4, group, scales: ScaleType::F16 };
    let layout = m.quantised_layout(format(32)).unwrap();
    let mut tiles = vec![0xee; layout.bytes()];
    m.pack_quantised_into(&mut tiles, layout.tile_bytes(), format(32)).unwrap();
    for (r, row) in weights(rows * cols, 2).chunks(cols).enumerate() {
        let tile = &tiles[r / 16 * layout.tile_bytes()..][..layout.tile_bytes()];
        let got: Vec<f32> = (0..cols).map(|c| layout.element(tile, r % 16, c)).collect();
        assert_eq!(got, roundtrip(row, 4, 32).unwrap().values);
    }
    assert_eq!(m.quantised_layout(format(64)).unwrap_err().code(), "unsupported-quantisation", "64 does not divide 96");
    assert_eq!(m.quantised_layout(WeightFormat::F16).unwrap_err().code(), "unsupported-quantisation");
}
