//! Checkpoints of which only the headers are there, and packs that are written as the rest comes.

use std::fs;
use std::path::Path;

use mach_format::sidecar::verify;
use mach_format::{
    Checkpoint, ExpertSource, Fingerprint, FormatError, LayerPlan, PackJob, PackPlan, RowPick, SIDECAR_DIR, ScaleType, ShardAt, WeightFormat, data_start,
    shape_tensors, write_pack,
};
use serde_json::json;
use tempfile::tempdir;

use crate::support::{Tensor, plain, tensor, weights, write_sharded};

const HIDDEN: usize = 64;
const EXPERTS: usize = 4;

/// Keeps the header of a shard and the tensors that say what shape others have.
fn cut(from: &Path, to: &Path) {
    let bytes = fs::read(from).unwrap();
    let start = data_start(from, *bytes.first_chunk().unwrap()).unwrap() as usize;
    let mut outline = bytes[..start].to_vec();
    for range in shape_tensors(from, &bytes[..start]).unwrap() {
        outline.resize(range.end as usize, 0);
        let range = range.start as usize..range.end as usize;
        outline[range.clone()].copy_from_slice(&bytes[range]);
    }
    fs::write(to, outline).unwrap();
}

/// Protects plans made before the weights are there: with the headers alone matrices have their shapes, those of compressed-tensors too, and
/// what is not there is told.
#[test]
fn an_outline_knows_shapes_and_what_is_missing() {
    let dir = tempdir().unwrap();
    let (model, outline) = (dir.path().join("model"), dir.path().join("outline"));
    let packed = [
        plain("norm.weight", "F32", &[8], &weights(8, 1)),
        tensor("up.weight_packed", "I32", &[8, HIDDEN / 8], weights(8 * HIDDEN / 2, 2).iter().map(|x| (x.abs() * 1e6) as u8).collect()),
        plain("up.weight_scale", "BF16", &[8, 2], &weights(16, 3)),
        tensor("up.weight_shape", "I64", &[2], [8i64, HIDDEN as i64].iter().flat_map(|n| n.to_le_bytes()).collect()),
    ];
    write_sharded(&model, &json!({}), &[packed.into()]);
    fs::create_dir_all(&outline).unwrap();
    for name in ["config.json", "model.safetensors.index.json"] {
        fs::copy(model.join(name), outline.join(name)).unwrap();
    }
    let shard = "model-00001-of-00001.safetensors";
    cut(&model.join(shard), &outline.join(shard));
    let bytes = fs::metadata(model.join(shard)).unwrap().len();
    let at = |path: &Path, bytes, whole| {
        let path = path.to_owned();
        move |name: &str| Some(ShardAt { path: path.join(name), bytes, whole })
    };
    let (whole, part) = (Checkpoint::open(&model).unwrap(), Checkpoint::open_outline(&outline, &at(&outline, bytes, false)).unwrap());
    assert_eq!(part.matrix("up").unwrap().layout(), whole.matrix("up").unwrap().layout());
    assert_eq!(part.dir(), outline);
    assert!(!part.has_data("norm.weight") && whole.has_data("norm.weight"));
    // Of the whole, elsewhere, everything is read; a length that is not that of the header is told.
    let elsewhere = Checkpoint::open_outline(&outline, &at(&model, bytes, true)).unwrap();
    assert!(elsewhere.has_data("norm.weight"));
    assert_eq!(elsewhere.read_f32("norm.weight").unwrap(), weights(8, 1));
    assert_eq!(Checkpoint::open_outline(&outline, &at(&outline, bytes + 1, false)).err().map(|e| e.code()), Some("truncated-file"));
    assert_eq!(data_start(&model, [255; 8]).unwrap_err().code(), "invalid-header");
}

fn layer(i: usize, seed: u64) -> Vec<Tensor> {
    vec![
        plain(&format!("{i}.norm.weight"), "F32", &[HIDDEN], &weights(HIDDEN, seed)),
        plain(&format!("{i}.dense.weight"), "BF16", &[32, HIDDEN], &weights(32 * HIDDEN, seed + 1)),
        plain(&format!("{i}.gate_up"), "BF16", &[EXPERTS, 64, HIDDEN], &weights(EXPERTS * 64 * HIDDEN, seed + 2)),
        plain(&format!("{i}.down"), "BF16", &[EXPERTS, HIDDEN, 32], &weights(EXPERTS * HIDDEN * 32, seed + 3)),
    ]
}

fn plan(ck: &Checkpoint) -> PackPlan {
    let format = WeightFormat::Affine { bits: 4, group: 32, scales: ScaleType::F16 };
    let experts = |i: usize| {
        let gate_up = ck.matrix(&format!("{i}.gate_up")).unwrap();
        let half = |first| ExpertSource::StackedRows(gate_up.clone(), RowPick { first, step: 1, rows: 32 });
        LayerPlan { layer: i, gate: half(0), up: half(32), down: ExpertSource::Stacked(ck.matrix(&format!("{i}.down")).unwrap()) }
    };
    PackPlan {
        model_type: "m".to_owned(),
        experts: vec![experts(0), experts(1)],
        expert_format: Some(format),
        quantise: (0..2).map(|i| (format!("{i}.dense"), Some(format))).collect(),
        keep: (0..2).map(|i| format!("{i}.norm.weight")).collect(),
    }
}

/// Protects packs that are written in any order and over several runs: the same bytes come out, what is whole stays, and what was damaged in between is
/// written again. Another source takes nothing over.
#[test]
fn pieces_come_in_any_order_and_over_several_runs() {
    let dir = tempdir().unwrap();
    let (model, at_once, out) = (dir.path().join("model"), dir.path().join("at_once"), dir.path().join("out"));
    write_sharded(&model, &json!({ "model_type": "m" }), &[layer(0, 1), layer(1, 9)]);
    let ck = Checkpoint::open(&model).unwrap();
    let source = mach_format::fingerprint(&ck).unwrap();
    write_pack(&ck, &at_once, &plan(&ck), &mut |_| ()).unwrap();
    let start = |source: Fingerprint| {
        let job = PackJob::new(&ck, &plan(&ck), source).unwrap();
        let missing = job.missing_bytes(&out).unwrap();
        let mut kept = 0;
        (missing, job.start(&out, &mut |bytes| kept += bytes).unwrap(), kept)
    };
    // Pieces: two quantised, two copied, two layers.
    let (all, mut writer, _) = start(source);
    writer.write(&ck, &plan(&ck), &[5, 3, 0], &mut |_| ()).unwrap();
    assert_eq!(writer.finish(&ck).unwrap_err().code(), "wrong-plan");
    let (missing, writer, kept) = start(source);
    assert_eq!((0..6).map(|p| writer.is_done(p)).collect::<Vec<_>>(), [true, false, false, true, false, true]);
    let written: u64 = [0, 3, 5].iter().map(|&p: &usize| writer.pieces()[p].bytes).sum();
    assert_eq!(kept, written);
    assert!(missing < all - written);
    drop(writer);

    // A byte of the file of resident weights, and one of a record.
    let flip = |path: &Path, at: usize| {
        let mut bytes = fs::read(path).unwrap();
        bytes[at] ^= 1;
        fs::write(path, bytes).unwrap();
    };
    let weights = out.join(".partial/model.safetensors.tmp");
    flip(&weights, fs::metadata(&weights).unwrap().len() as usize - 1);
    let record = fs::read_dir(out.join(SIDECAR_DIR)).unwrap().map(|e| e.unwrap().path()).find(|p| p.extension().is_some_and(|e| e == "experts")).unwrap();
    flip(&record, 7);
    let (_, mut writer, _) = start(source);
    assert_eq!((writer.is_done(0), writer.is_done(3), writer.is_done(5)), (true, false, false));
    let mut other = source;
    other.0[0] ^= 1;
    drop(writer);
    let (_, theirs, kept) = start(other);
    assert!(kept == 0 && (0..6).all(|p| !theirs.is_done(p)));
    drop(theirs);

    let (_, restarted, _) = start(source);
    writer = restarted;
    writer.write(&ck, &plan(&ck), &[4, 2, 1, 5, 3, 0], &mut |_| ()).unwrap();
    let report = writer.finish(&ck).unwrap();
    assert_eq!((report.written, report.kept), (2, 0));
    verify(&out.join(SIDECAR_DIR), &mut |_, _| ()).unwrap();
    let files = |dir: &Path| {
        let mut all: Vec<_> = [dir.to_owned(), dir.join(SIDECAR_DIR)].iter().flat_map(|d| fs::read_dir(d).unwrap().flatten()).map(|e| e.path()).collect();
        all.retain(|p| p.is_file());
        all.sort();
        all.iter().map(|p| (p.strip_prefix(dir).unwrap().to_owned(), fs::read(p).unwrap())).collect::<Vec<_>>()
    };
    assert!(files(&out) == files(&at_once));
}

/// A tensor that has another shape than when the pack began is not written.
#[test]
fn a_checkpoint_that_changed_is_told() {
    let dir = tempdir().unwrap();
    let (first, second) = (dir.path().join("first"), dir.path().join("second"));
    write_sharded(&first, &json!({}), &[layer(0, 1), layer(1, 9)]);
    let mut changed = [layer(0, 1), layer(1, 9)];
    changed[0][0] = plain("0.norm.weight", "F32", &[HIDDEN + 1], &weights(HIDDEN + 1, 1));
    changed[1][2] = plain("1.gate_up", "BF16", &[EXPERTS, 64, 32], &weights(EXPERTS * 64 * 32, 3));
    changed[1][3] = plain("1.down", "BF16", &[EXPERTS, 32, 32], &weights(EXPERTS * 32 * 32, 3));
    write_sharded(&second, &json!({}), &changed);
    let [first, second] = [first, second].map(|dir| Checkpoint::open(&dir).unwrap());
    let job = PackJob::new(&first, &plan(&first), mach_format::fingerprint(&first).unwrap()).unwrap();
    let mut writer = job.start(&dir.path().join("out"), &mut |_| ()).unwrap();
    let mut write = |piece| writer.write(&second, &plan(&second), &[piece], &mut |_| ());
    let is_plan = |result: Result<(), FormatError>| assert_eq!(result.unwrap_err().code(), "wrong-plan");
    is_plan(write(2));
    is_plan(write(5));
    write(3).unwrap();
}

/// A tensor of which only the header is there is not packed as something else.
#[test]
fn what_is_not_there_is_not_packed() {
    let dir = tempdir().unwrap();
    let (model, shard) = (dir.path().join("model"), "model-00002-of-00002.safetensors");
    write_sharded(&model, &json!({}), &[layer(0, 1), layer(1, 9)]);
    let (bytes, outline) = (fs::metadata(model.join(shard)).unwrap().len(), dir.path().join(shard));
    cut(&model.join(shard), &outline);
    let at = |name: &str| (name == shard).then(|| ShardAt { path: outline.clone(), bytes, whole: false });
    let ck = Checkpoint::open_outline(&model, &at).unwrap();
    let job = PackJob::new(&ck, &plan(&ck), Fingerprint::of_hashes(b"", [(shard, "00")].into_iter())).unwrap();
    let mut writer = job.start(&dir.path().join("out"), &mut |_| ()).unwrap();
    let mut write = |piece| writer.write(&ck, &plan(&ck), &[piece], &mut |_| ()).map_err(|e| e.code());
    assert_eq!([0, 1, 2, 3, 4, 5].map(|piece| write(piece).err()), [None, Some("wrong-plan"), None, Some("wrong-plan"), None, Some("wrong-plan")]);
}
