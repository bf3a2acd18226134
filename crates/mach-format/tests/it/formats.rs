//! Every number format against an independent dequantiser: `xtask/goldens/make_formats.py` says which.

use std::path::Path;

use mach_format::gguf::Gguf;
use mach_format::{Checkpoint, Matrix, TILE_ROWS};
use serde_json::json;
use tempfile::tempdir;

use crate::support::{plain, tensor, write};

fn goldens() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens")
}

/// Rows read from disk are within `tolerance` of what is expected, as a share of a value; so are elements of packed tiles.
fn check(m: &Matrix, want: &[f32], tolerance: f32, name: &str) {
    let near = |got: f32, want: f32| (got - want).abs() <= tolerance * want.abs();
    for (i, (&got, &want)) in m.to_f32().unwrap().iter().zip(want).enumerate() {
        assert!(near(got, want), "{name}, value {i}: {got} {want}");
    }
    let layout = m.layout();
    assert!(layout.is_well_formed(), "{name}");
    for e in 0..m.leading().unwrap_or(1) {
        let one = if m.leading().is_some() { m.expert(e) } else { m.clone() };
        let want = &want[e * layout.rows * layout.cols..][..layout.rows * layout.cols];
        let tiles = one.pack().unwrap();
        for (i, &want) in want.iter().enumerate() {
            let (row, col) = (i / layout.cols, i % layout.cols);
            let tile = &tiles.data[row / TILE_ROWS * layout.tile_bytes()..][..layout.tile_bytes()];
            let got = layout.element(tile, row % TILE_ROWS, col);
            assert!(near(got, want), "{name}, packed row {row} column {col}: {got} {want}");
        }
        let last = layout.rows - 1;
        let mut row = vec![0.0; layout.cols];
        one.row_f32(last, &mut row).unwrap();
        assert!(row.iter().zip(&want[last * layout.cols..]).all(|(&got, &want)| near(got, want)), "{name}: last row");
    }
}

/// Protects what published checkpoints hold: values are those of MLX, transformers and torch.
#[test]
fn modules_have_the_values_of_their_publishers() {
    let dir = tempdir().unwrap();
    std::fs::copy(goldens().join("formats.json"), dir.path().join("config.json")).unwrap();
    std::fs::copy(goldens().join("formats.safetensors"), dir.path().join("model.safetensors")).unwrap();
    let ck = Checkpoint::open(dir.path()).unwrap();
    let mut seen: Vec<&str> = Vec::new();
    for (tensor, info) in ck.tensors() {
        let Some(name) = tensor.strip_suffix(".expect") else { continue };
        let m = ck.matrix(name).unwrap_or_else(|e| panic!("{name}: {e}"));
        let own = m.leading().into_iter().chain([m.rows(), m.cols()]).collect::<Vec<_>>();
        assert_eq!(own, info.shape, "{name}");
        // MLX multiplies and adds in two roundings.
        let tolerance = if name.starts_with("mlx_affine") { 1e-4 } else { 0.0 };
        check(&m, &ck.read_f32(tensor).unwrap(), tolerance, name);
        seen.extend(m.tensors().iter().map(|t| ck.tensors().find(|(n, _)| n == t).unwrap().0));
    }
    // Nothing that belongs to a module is left over.
    let left: Vec<_> = ck.tensors().map(|(name, _)| name).filter(|name| !name.ends_with(".expect") && !seen.contains(name)).collect();
    assert!(left.is_empty(), "{left:?}");
}

/// Protects users of quantisers whose files are not read: the error says what to take instead.
#[test]
fn gptq_and_awq_are_named() {
    let dir = tempdir().unwrap();
    let words = |name: &str| tensor(name, "I32", &[2, 4], vec![0; 32]);
    write(dir.path(), &json!({}), &[words("a.qweight"), words("b.qweight"), tensor("b.g_idx", "I32", &[4], vec![0; 16])]);
    let ck = Checkpoint::open(dir.path()).unwrap();
    for (module, method) in [("a", "AWQ"), ("b", "GPTQ")] {
        let e = ck.matrix(module).err().unwrap();
        assert!(ck.has_matrix(module) && e.code() == "foreign-quantisation" && e.to_string().contains(method), "{e}");
    }
}

/// Protects products, which have no NaN of FP8: a weight that holds one is refused by its row.
#[test]
fn an_fp8_weight_that_is_no_number_is_refused() {
    let dir = tempdir().unwrap();
    let mut codes = vec![0x38; 3 * 32];
    codes[2 * 32 + 7] = 0xff;
    write(dir.path(), &json!({}), &[tensor("m.weight", "F8_E4M3", &[3, 32], codes), plain("m.weight_scale", "F32", &[3, 1], &[0.5; 3])]);
    let m = Checkpoint::open(dir.path()).unwrap().matrix("m").unwrap();
    assert_eq!(m.rows_range(0..2).to_f32().unwrap(), [0.5; 64]);
    for e in [m.pack().err().unwrap(), m.to_f32().err().unwrap()] {
        assert!(e.code() == "cannot-quantise" && e.to_string().contains("row 2: column 7"), "{e}");
    }
}

/// Protects values: blocks of every type dequantise to the very bits that ggml's Python package gives.
#[test]
fn blocks_have_the_values_of_ggml() {
    let ck = Checkpoint::from_gguf(Gguf::open(&goldens().join("blocks.gguf")).unwrap(), json!({}), &|_| None).unwrap();
    let names: Vec<_> = ck.tensors().map(|(name, _)| name.to_owned()).filter(|name| !name.ends_with(".f32")).collect();
    assert!(names.len() >= 20, "{names:?}");
    for name in names {
        let m = ck.matrix(&name).unwrap();
        let want = ck.read_f32(&format!("{name}.f32")).unwrap();
        let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!((m.rows(), m.cols()), (3, 512));
        assert!(m.format().to_string().eq_ignore_ascii_case(&name), "{} is read as {}", name, m.format());
        assert_eq!(bits(&m.to_f32().unwrap()), bits(&want), "{name}");
        // A tile's rule is one fused rounding, ggml's are two where a group has a minimum: what is left of a difference of
        // numbers of size 0.1 to 1.
        let packed = m.pack().unwrap();
        for (i, want) in want.iter().enumerate() {
            let got = packed.layout.element(&packed.data, i / 512, i % 512);
            assert!((got - want).abs() <= 1e-6 * want.abs().max(0.5), "{name} {i}: {got} {want}");
        }
    }
}
