//! Matrices on disk, and their packed form against the definition of the layout.

use std::path::Path;

use mach_format::{Checkpoint, Matrix, PackedLayout, RowPick, TILE_ROWS, WeightFormat, pack_f32, pack_gate_up, pack_gate_up_into};
use serde_json::{Value, json};
use tempfile::tempdir;

use crate::support::{Tensor, mlx, plain, rounded, tensor, weights, write};

fn open(dir: &Path, config: &Value, tensors: &[Tensor]) -> Checkpoint {
    write(dir, config, tensors);
    Checkpoint::open(dir).unwrap()
}

/// A packed matrix read element by element.
fn unpack(layout: &PackedLayout, tiles: &[u8], stride: usize) -> Vec<f32> {
    let at = |row: usize, col: usize| layout.element(&tiles[row / TILE_ROWS * stride..][..layout.tile_bytes()], row % TILE_ROWS, col);
    (0..layout.rows).flat_map(|r| (0..layout.cols).map(move |c| (r, c))).map(|(r, c)| at(r, c)).collect()
}

fn check(m: &Matrix, expected: &[f32]) {
    assert_eq!(m.to_f32().unwrap(), expected, "to_f32 of {}", m.name());
    let packed = m.pack().unwrap();
    assert_eq!(unpack(&packed.layout, &packed.data, packed.layout.tile_bytes()), expected, "pack of {}", m.name());
    let mut row = vec![0.0; m.cols()];
    let last = m.rows() - 1;
    m.row_f32(last, &mut row).unwrap();
    assert_eq!(row, expected[last * m.cols()..]);
    // Padding rows are zero.
    let layout = packed.layout;
    let tile = &packed.data[(layout.tiles() - 1) * layout.tile_bytes()..];
    for r in layout.rows % TILE_ROWS..if layout.rows.is_multiple_of(TILE_ROWS) { 0 } else { TILE_ROWS } {
        assert!((0..layout.cols).all(|c| layout.element(tile, r, c) == 0.0));
    }
    // Packing over old bytes gives the same.
    let mut dirty = vec![0xff; layout.bytes()];
    m.pack_into(&mut dirty, layout.tile_bytes()).unwrap();
    assert_eq!(dirty, packed.data[..]);
    // So does reading past the page cache, wherever in the file the rows begin and end.
    dirty.fill(0xff);
    m.clone().past_cache().pack_into(&mut dirty, layout.tile_bytes()).unwrap();
    assert_eq!(dirty, packed.data[..]);
}

#[test]
fn plain_weights_pack_exactly() {
    // More rows than one read takes, partial tiles, odd columns.
    for (rows, cols) in [(1, 1), (16, 2), (37, 7), (40, 64), (530, 1030)] {
        for dtype in ["F32", "F16", "BF16"] {
            let dir = tempdir().unwrap();
            let values = weights(rows * cols, 7);
            let ck = open(dir.path(), &json!({}), &[plain("m.weight", dtype, &[rows, cols], &values)]);
            let m = ck.matrix("m").unwrap();
            assert_eq!((m.rows(), m.cols(), m.leading()), (rows, cols, None));
            assert_eq!(m.bytes(), ck.total_bytes());
            check(&m, &rounded(dtype, &values));
        }
    }
}

/// Levels, scales and biases of a random affine weight and its values by the definition `fma(scale, q, bias)`.
fn affine(n: usize, bits: u32, group: usize, ty: &str) -> (Vec<u8>, Vec<f32>, Vec<f32>, Vec<f32>) {
    let q: Vec<u8> = weights(n, 3).iter().map(|x| ((x.abs() * 1e6) as u32 % (1 << bits)) as u8).collect();
    // MLX writes scales of both signs.
    let (scales, biases) = (rounded(ty, &weights(n / group, 4)), rounded(ty, &weights(n / group, 5)));
    let values = q.iter().enumerate().map(|(i, q)| scales[i / group].mul_add(f32::from(*q), biases[i / group])).collect();
    (q, scales, biases, values)
}

#[test]
fn mlx_affine_weights_pack_exactly() {
    for bits in [2, 3, 4, 5, 6, 8] {
        for group in [32, 64, 128] {
            for ty in ["F16", "BF16", "F32"] {
                let (rows, cols) = (21, 256);
                let (q, scales, biases, values) = affine(rows * cols, bits, group, ty);
                let dir = tempdir().unwrap();
                let config = json!({ "quantization": { "bits": bits, "group_size": group } });
                let ck = open(dir.path(), &config, &mlx("m", &[rows, cols], bits as usize, &q, &scales, &biases, ty));
                let m = ck.matrix("m").unwrap();
                assert_eq!(m.bytes(), ck.total_bytes());
                check(&m, &values);
            }
        }
    }
}

#[test]
fn an_override_by_path_beats_the_general_entry() {
    let (q, scales, biases, values) = affine(16 * 128, 8, 64, "F32");
    let dir = tempdir().unwrap();
    let tensors = mlx("model.gate", &[16, 128], 8, &q, &scales, &biases, "F32");
    let entry = |own: Value| json!({ "quantization": { "bits": 4, "group_size": 64, "mode": "affine", "model.gate": own } });
    let open = |config: &Value| {
        write(dir.path(), config, &[]);
        std::fs::write(dir.path().join("model.safetensors"), crate::support::safetensors(&tensors)).unwrap();
        Checkpoint::open(dir.path()).unwrap().matrix("model.gate")
    };
    check(&open(&entry(json!({ "bits": 8, "group_size": 64 }))).unwrap(), &values);
    let code = |config: &Value| open(config).err().map(|e| e.code());
    assert_eq!(code(&json!({})), Some("quantisation-mismatch"), "no quantization at all");
    assert_eq!(code(&entry(json!(false))), Some("quantisation-mismatch"));
    assert_eq!(code(&entry(json!(true))), Some("quantisation-mismatch"), "8-bit data, 4 bits by the config");
    assert_eq!(code(&entry(json!({ "bits": 6 }))), Some("quantisation-mismatch"));
    assert_eq!(code(&entry(json!({ "bits": 7 }))), Some("unsupported-quantisation"));
    assert_eq!(code(&entry(json!({ "bits": 8, "group_size": 16 }))), Some("unsupported-quantisation"));
    assert_eq!(code(&entry(json!({ "bits": 8, "mode": "mxfp8" }))), Some("quantisation-mismatch"));
    assert_eq!(code(&entry(json!({ "bits": 8, "mode": "mxfp9" }))), Some("unsupported-quantisation"));
}

/// Protects configurations as MLX writes them: a module's own entry stands alone (routers are affine although the mode is another, and say
/// so by saying nothing), and numbers that are left out are those of the mode. What the shapes contradict is refused.
#[test]
fn an_entry_without_numbers_or_mode_means_what_mlx_means() {
    let (q, scales, biases, values) = affine(16 * 128, 8, 64, "F32");
    let tensors = |width: usize, groups: usize| {
        let floats = [("m.weight", "U32", width, 0x22, 64 * width), ("m.scales", "U8", groups, 127, 16 * groups)];
        let floats = floats.map(|(name, dtype, last, byte, bytes)| tensor(name, dtype, &[16, last], vec![byte; bytes]));
        mlx("gate", &[16, 128], 8, &q, &scales, &biases, "F32").into_iter().chain(floats).collect::<Vec<_>>()
    };
    let read = |config: Value, width: usize, groups: usize, module: &str| {
        let dir = tempdir().unwrap();
        let m = open(dir.path(), &json!({ "quantization": config }), &tensors(width, groups)).matrix(module);
        m.map(|m| m.to_f32().unwrap()).map_err(|e| (e.code(), e.to_string()))
    };
    let router = json!({ "group_size": 64, "bits": 8 });
    let general = json!({ "group_size": 32, "bits": 4, "mode": "mxfp4", "gate": router });
    assert_eq!(read(general.clone(), 16, 4, "gate").unwrap(), values);
    assert_eq!(read(general.clone(), 16, 4, "m").unwrap(), [1.0; 16 * 128]);
    for (mode, width, groups) in [("mxfp4", 16, 4), ("nvfp4", 16, 8), ("mxfp8", 32, 4)] {
        assert!(read(json!({ "mode": mode }), width, groups, "m").is_ok(), "{mode}");
        assert!(read(json!({ "group_size": 64, "bits": 8, "m": { "mode": mode } }), width, groups, "m").is_ok(), "{mode}");
        let (code, message) = read(json!({ "mode": mode }), width, 32, "m").unwrap_err();
        assert!(code == "quantisation-mismatch" && message.contains(mode) && message.contains("32 groups"), "{message}");
        let other = if mode == "mxfp4" { "nvfp4" } else { "mxfp4" };
        assert_eq!(read(json!({ "mode": other }), width, groups, "m").unwrap_err().0, "quantisation-mismatch", "{mode}");
        assert_eq!(read(json!({ "mode": mode, "m": router }), width, groups, "m").unwrap_err().0, "quantisation-mismatch", "{mode}");
        assert_eq!(read(json!({ "mode": mode, "m": false }), width, groups, "m").unwrap_err().0, "quantisation-mismatch", "{mode}");
    }
    // What the shapes cannot tell (8 bits in groups of 32 have those of 4 in 64) is never guessed.
    assert_eq!(read(json!({}), 16, 4, "gate").unwrap_err().0, "quantisation-mismatch");
}

#[test]
fn scales_must_fit_their_words() {
    let (q, scales, biases, _) = affine(16 * 128, 4, 64, "F32");
    let config = json!({ "quantization": { "bits": 4, "group_size": 64 } });
    let code = |change: &dyn Fn(&mut Vec<Tensor>)| {
        let dir = tempdir().unwrap();
        let mut tensors = Vec::from(mlx("m", &[16, 128], 4, &q, &scales, &biases, "F32"));
        change(&mut tensors);
        open(dir.path(), &config, &tensors).matrix("m").err().map(|e| e.code())
    };
    assert_eq!(code(&|_| ()), None);
    assert_eq!(code(&|t| drop(t.pop())), Some("missing-tensor"));
    assert_eq!(code(&|t| drop(t.remove(1))), Some("missing-tensor"));
    assert_eq!(code(&|t| t[1].shape = vec![8, 4]), Some("wrong-shape"));
    assert_eq!(code(&|t| (t[1].shape, t[2].shape) = (vec![8, 4], vec![8, 4])), Some("wrong-shape"));
    assert_eq!(code(&|t| t[0] = tensor("m.weight", "U32", &[16, 8], vec![0; 512])), Some("quantisation-mismatch"));
    assert_eq!(code(&|t| t[1] = tensor("m.scales", "U8", &[16, 2], vec![0; 32])), Some("quantisation-mismatch"), "affine by the config");
    assert_eq!(code(&|t| t[1].dtype = "I32"), Some("unsupported-quantisation"));
}

/// Protects the three ways in which checkpoints keep MXFP4: the same bytes give the same values, those of the format.
#[test]
fn mxfp4_is_read_as_every_publisher_stores_it() {
    let (experts, rows, cols) = (2, 21, 96);
    let n = experts * rows * cols;
    let bytes: Vec<u8> = weights(n / 2, 1).iter().map(|x| (x.abs() * 1e6) as u8).collect();
    let exponents: Vec<u8> = (0..n / 32).map(|i| [0, 1, 2, 100, 127, 130, 254][i % 7]).collect();
    let numbers = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let value = |i: usize| {
        let q = bytes[i / 2] >> (i % 2 * 4) & 15;
        let x = numbers[usize::from(q & 7)] * 2f64.powi(i32::from(exponents[i / 32]) - 127);
        if q > 7 { -x as f32 } else { x as f32 }
    };
    let values: Vec<f32> = (0..n).map(value).collect();
    let own = |name: &str, dtype, shape: &[usize], data: &[u8]| tensor(name, dtype, shape, data.to_vec());
    let stack = |last: &[usize]| [&[experts, rows], last].concat();
    let tensors = [
        own("oss_blocks", "U8", &stack(&[cols / 32, 16]), &bytes),
        own("oss_scales", "U8", &stack(&[cols / 32]), &exponents),
        own("mlx.weight", "U32", &stack(&[cols / 8]), &bytes),
        own("mlx.scales", "U8", &stack(&[cols / 32]), &exponents),
        own("ds.weight", "I8", &[rows, cols / 2], &bytes[..rows * cols / 2]),
        own("ds.scale", "F8_E8M0", &[rows, cols / 32], &exponents[..rows * cols / 32]),
    ];
    let dir = tempdir().unwrap();
    let ck = open(dir.path(), &json!({ "quantization": { "mode": "mxfp4", "bits": 4, "group_size": 32 } }), &tensors);
    for name in ["oss", "mlx"] {
        let m = ck.matrix(name).unwrap();
        assert_eq!((m.leading(), m.rows(), m.cols(), m.bytes()), (Some(experts), rows, cols, (n / 2 + n / 32) as u64), "{name}");
        check(&m.expert(1), &values[rows * cols..]);
        check(&m.expert(1).rows_range(3..20), &values[(rows + 3) * cols..][..17 * cols]);
    }
    check(&ck.matrix("ds").unwrap(), &values[..rows * cols]);

    let code = |change: &dyn Fn(&mut Vec<Tensor>)| {
        let dir = tempdir().unwrap();
        let mut tensors = vec![own("oss_blocks", "U8", &stack(&[3, 16]), &bytes), own("oss_scales", "U8", &stack(&[3]), &exponents)];
        change(&mut tensors);
        open(dir.path(), &json!({}), &tensors).matrix("oss").err().map(|e| e.code())
    };
    assert_eq!(code(&|_| ()), None);
    assert_eq!(code(&|t| drop(t.pop())), Some("missing-tensor"));
    assert_eq!(code(&|t| t[1].shape = vec![experts, 3, rows]), Some("wrong-shape"));
    assert_eq!(code(&|t| t[1].dtype = "I8"), Some("wrong-dtype"));
    assert_eq!(code(&|t| t[0].shape = stack(&[6, 8])), Some("wrong-shape"));
}

#[test]
fn fused_and_separate_experts_pack_equally() {
    let (experts, inner, hidden) = (3, 24, 64);
    let values = weights(experts * 2 * inner * hidden, 9);
    let one = |e: usize, half: usize| &values[(2 * e + half) * inner * hidden..][..inner * hidden];
    let mut tensors = vec![plain("experts.gate_up_proj", "BF16", &[experts, 2 * inner, hidden], &values)];
    for e in 0..experts {
        for (half, name) in ["gate", "up"].iter().enumerate() {
            tensors.push(plain(&format!("experts.{e}.{name}.weight"), "BF16", &[inner, hidden], one(e, half)));
        }
    }
    let dir = tempdir().unwrap();
    let ck = open(dir.path(), &json!({}), &tensors);
    let fused = ck.matrix("experts.gate_up_proj").unwrap();
    assert_eq!(fused.leading(), Some(experts));
    assert_eq!(fused.to_f32().unwrap(), rounded("BF16", &values));
    for e in 0..experts {
        let (gate, up) = (ck.matrix(&format!("experts.{e}.gate")).unwrap(), ck.matrix(&format!("experts.{e}.up")).unwrap());
        let separate = pack_gate_up(&gate, &up).unwrap();
        let both = fused.expert(e);
        let halves = (both.rows_range(0..inner), both.rows_range(inner..2 * inner));
        assert!(pack_gate_up(&halves.0, &halves.1).unwrap()[..] == separate[..]);
        // The same through the reader threads' way.
        let tile = gate.layout().tile_bytes();
        let mut slot = vec![0xee; separate.len()];
        pack_gate_up_into(&gate, &up, &mut slot).unwrap();
        assert!(slot == separate[..]);
        assert_eq!(unpack(&gate.layout(), &slot, 2 * tile), rounded("BF16", one(e, 0)));
        assert_eq!(unpack(&up.layout(), &slot[tile..], 2 * tile), rounded("BF16", one(e, 1)));
        assert_eq!(gate.pack_into(&mut slot[..100], 2 * tile).unwrap_err().code(), "wrong-buffer");
    }
}

/// Protects gpt-oss's experts, whose gate and up rows alternate: read once, in pieces of more rows than one read takes, they give
/// the tiles of each half read by itself.
#[test]
fn rows_that_alternate_are_read_once() {
    let (experts, inner, hidden) = (2, 601, 1030);
    let values: Vec<f32> = (0..experts * 2 * inner * hidden).map(|i| (i % 4099) as f32 / 16.0).collect();
    let dir = tempdir().unwrap();
    let ck = open(dir.path(), &json!({}), &[plain("experts.gate_up_proj", "BF16", &[experts, 2 * inner, hidden], &values)]);
    for stack in [ck.matrix("experts.gate_up_proj").unwrap(), ck.matrix("experts.gate_up_proj").unwrap().past_cache()] {
        for e in 0..experts {
            let [gate, up] = [0, 1].map(|first| stack.expert(e).pick(RowPick { first, step: 2, rows: inner }));
            let separate = pack_gate_up(&gate, &up).unwrap();
            let mut slot = vec![0xee; separate.len()];
            let read = pack_gate_up_into(&gate, &up, &mut slot).unwrap();
            assert!(slot == separate[..]);
            assert_eq!(read, (2 * inner * hidden * 2) as u64);
            assert_eq!(pack_gate_up_into(&gate, &up, &mut slot[1..]).unwrap_err().code(), "wrong-buffer");
            // The other way round they are a pair too.
            pack_gate_up_into(&up, &gate, &mut slot).unwrap();
            assert!(slot == pack_gate_up(&up, &gate).unwrap()[..]);
        }
    }
}

#[test]
fn stacked_mlx_experts_are_sliced_with_their_scales() {
    let (experts, rows, cols) = (4, 20, 64);
    let (q, scales, biases, values) = affine(experts * rows * cols, 4, 32, "BF16");
    let dir = tempdir().unwrap();
    let config = json!({ "quantization": { "bits": 4, "group_size": 32 } });
    let ck = open(dir.path(), &config, &mlx("switch", &[experts, rows, cols], 4, &q, &scales, &biases, "BF16"));
    let stack = ck.matrix("switch").unwrap();
    for e in 0..experts {
        check(&stack.expert(e), &values[e * rows * cols..][..rows * cols]);
    }
    check(&stack.expert(2).rows_range(3..20), &values[(2 * rows + 3) * cols..][..17 * cols]);
}

#[test]
fn values_in_memory_pack_as_f32() {
    let values = weights(18 * 5, 1);
    let packed = pack_f32(18, 5, &values);
    assert_eq!(packed.layout.format, WeightFormat::F32);
    assert_eq!(unpack(&packed.layout, &packed.data, packed.layout.tile_bytes()), values);
}
