//! Fingerprints, sidecars of checkpoints, and packs.

use std::fs;
use std::path::Path;

use mach_format::sidecar::verify;
use mach_format::{
    Checkpoint, ExpertSource, LayerPlan, PackPlan, RowPick, SIDECAR_DIR, ScaleType, Sidecar, WeightFormat, fingerprint, pack_gate_up, write_pack, write_sidecar,
};
use serde_json::json;
use tempfile::tempdir;

use crate::support::{Tensor, plain, rounded, tensor, weights, write, write_sharded};

const EXPERTS: usize = 6;
const INNER: usize = 32;
const HIDDEN: usize = 64;

const fn affine(bits: u8) -> WeightFormat {
    WeightFormat::Affine { bits, group: 32, scales: ScaleType::F16 }
}

fn fused(seed: u64) -> Vec<Tensor> {
    vec![
        plain("embed.weight", "BF16", &[40, HIDDEN], &weights(40 * HIDDEN, seed)),
        plain("norm.weight", "F32", &[HIDDEN], &weights(HIDDEN, seed + 1)),
        plain("mlp.gate.weight", "BF16", &[EXPERTS, HIDDEN], &weights(EXPERTS * HIDDEN, seed + 2)),
        plain("mlp.experts.gate_up_proj", "BF16", &[EXPERTS, 2 * INNER, HIDDEN], &weights(EXPERTS * 2 * INNER * HIDDEN, seed + 3)),
        plain("mlp.experts.down_proj", "BF16", &[EXPERTS, HIDDEN, INNER], &weights(EXPERTS * HIDDEN * INNER, seed + 4)),
    ]
}

fn source(dir: &Path, seed: u64) -> Checkpoint {
    write(dir, &json!({ "model_type": "m", "text_config": { "hidden_size": HIDDEN } }), &fused(seed));
    fs::write(dir.join("tokenizer.json"), "{\"tokens\": 1}").unwrap();
    Checkpoint::open(dir).unwrap()
}

fn plan(ck: &Checkpoint, format: Option<WeightFormat>) -> PackPlan {
    let (gate_up, down) = (ck.matrix("mlp.experts.gate_up_proj").unwrap(), ck.matrix("mlp.experts.down_proj").unwrap());
    PackPlan {
        model_type: "m".to_owned(),
        experts: vec![LayerPlan {
            layer: 0,
            gate: ExpertSource::StackedRows(gate_up.clone(), RowPick { first: 0, step: 1, rows: INNER }),
            up: ExpertSource::StackedRows(gate_up, RowPick { first: INNER, step: 1, rows: INNER }),
            down: ExpertSource::Stacked(down),
        }],
        expert_format: format,
        quantise: vec![("embed".to_owned(), format)],
        keep: vec!["norm.weight".to_owned(), "mlp.gate.weight".to_owned()],
    }
}

#[test]
fn fingerprints_follow_content_not_place() {
    let (a, b, c) = (tempdir().unwrap(), tempdir().unwrap(), tempdir().unwrap());
    let print = |dir: &Path, seed| fingerprint(&source(dir, seed)).unwrap();
    let first = print(a.path(), 1);
    assert_eq!(first, print(b.path(), 1));
    assert_ne!(first, print(c.path(), 2), "other weights");
    assert_eq!(first.to_string().parse(), Ok(first));
    // The last byte of a small tensor counts, and so does the configuration.
    let file = a.path().join("model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&file, bytes).unwrap();
    assert_ne!(first, fingerprint(&Checkpoint::open(a.path()).unwrap()).unwrap());
    fs::write(b.path().join("config.json"), "{}").unwrap();
    assert_ne!(first, fingerprint(&Checkpoint::open(b.path()).unwrap()).unwrap());
    // How tensors are spread over shards does not.
    let (one, two) = (tempdir().unwrap(), tempdir().unwrap());
    write_sharded(one.path(), &json!({}), &[fused(1)]);
    let mut rest = fused(1);
    let shards = [rest.split_off(3), rest];
    write_sharded(two.path(), &json!({}), &shards);
    let print = |dir: &Path| fingerprint(&Checkpoint::open(dir).unwrap()).unwrap();
    assert_eq!(print(one.path()), print(two.path()));
}

#[test]
fn a_sidecar_holds_the_packed_experts_of_its_checkpoint() {
    let dir = tempdir().unwrap();
    let ck = source(dir.path(), 1);
    let at = dir.path().join(SIDECAR_DIR);
    let mut seen = Vec::new();
    let report = write_sidecar(&ck, &at, &plan(&ck, None), &mut |p| seen.push(p)).unwrap();
    assert_eq!((report.written, report.kept), (1, 0));
    assert!(seen.is_sorted_by_key(|p| p.done) && seen.last().is_some_and(|p| p.done <= p.total));
    let sidecar = Sidecar::open(&at, &fingerprint(&ck).unwrap()).unwrap();
    let layer = &sidecar.layers()[0];
    let file = fs::read(&layer.path).unwrap();
    let gate_up = ck.matrix("mlp.experts.gate_up_proj").unwrap();
    for e in 0..EXPERTS {
        let both = gate_up.expert(e);
        let expected = pack_gate_up(&both.rows_range(0..INNER), &both.rows_range(INNER..2 * INNER)).unwrap();
        assert!(file[layer.offset(e, 0) as usize..].starts_with(&expected));
        let down = ck.matrix("mlp.experts.down_proj").unwrap().expert(e).pack().unwrap();
        assert!(file[layer.offset(e, 1) as usize..].starts_with(&down.data));
    }
    // Built again, nothing is written; for a checkpoint of other weights it is refused.
    assert_eq!(write_sidecar(&ck, &at, &plan(&ck, None), &mut |_| ()).unwrap().kept, 1);
    let other = tempdir().unwrap();
    let other = fingerprint(&source(other.path(), 2)).unwrap();
    assert_eq!(Sidecar::open(&at, &other).unwrap_err().code(), "sidecar-mismatch");
}

/// Protects quantised sources: residents are copied with all that belongs to them, experts keep their format.
#[test]
fn a_pack_of_a_quantised_checkpoint_keeps_its_formats() {
    let dir = tempdir().unwrap();
    let own = |name: &str, dtype, shape: &[usize], bytes: usize| {
        tensor(name, dtype, shape, weights(bytes, 5).iter().map(|x| ((x.abs() * 1e6) as u8).min(0x77)).collect())
    };
    let tensors = [
        own("embed.weight", "F8_E4M3", &[40, HIDDEN], 40 * HIDDEN),
        plain("embed.weight_scale_inv", "F32", &[1, 1], &[0.25]),
        plain("norm.weight", "F32", &[HIDDEN], &weights(HIDDEN, 2)),
        plain("mlp.gate.weight", "BF16", &[EXPERTS, HIDDEN], &weights(EXPERTS * HIDDEN, 3)),
        own("mlp.experts.gate_up_proj_blocks", "U8", &[EXPERTS, 2 * INNER, HIDDEN / 32, 16], EXPERTS * INNER * HIDDEN),
        own("mlp.experts.gate_up_proj_scales", "U8", &[EXPERTS, 2 * INNER, HIDDEN / 32], EXPERTS * 2 * INNER * HIDDEN / 32),
        own("mlp.experts.down_proj_blocks", "U8", &[EXPERTS, HIDDEN, INNER / 32, 16], EXPERTS * HIDDEN * INNER / 2),
        own("mlp.experts.down_proj_scales", "U8", &[EXPERTS, HIDDEN, INNER / 32], EXPERTS * HIDDEN * INNER / 32),
    ];
    // The numbers of the general entry are those of the router's, its mode is not.
    let config = json!({ "quantization": { "mode": "mxfp8", "bits": 8, "group_size": 32 }, "quantization_config": { "quant_method": "fp8" } });
    write(&dir.path().join("model"), &config, &tensors);
    let (ck, out) = (Checkpoint::open(&dir.path().join("model")).unwrap(), dir.path().join("pack"));
    let mut plan = plan(&ck, None);
    plan.quantise.push(("mlp.gate".to_owned(), Some(affine(8))));
    plan.keep.retain(|name| name != "mlp.gate.weight");
    write_pack(&ck, &out, &plan, &mut |_| ()).unwrap();
    let pack = Checkpoint::open(&out).unwrap();
    assert_eq!(pack.matrix("mlp.gate").unwrap().format(), affine(8));
    assert_eq!(pack.tensors().map(|(name, _)| name).filter(|name| name.starts_with("embed")).count(), 2);
    assert_eq!(pack.matrix("embed").unwrap().to_f32().unwrap(), ck.matrix("embed").unwrap().to_f32().unwrap());
    let sidecar = Sidecar::open(&out.join(SIDECAR_DIR), &fingerprint(&pack).unwrap()).unwrap();
    let (layer, file) = (&sidecar.layers()[0], fs::read(&sidecar.layers()[0].path).unwrap());
    let down = ck.matrix("mlp.experts.down_proj").unwrap();
    assert_eq!(layer.layout.down.format, down.format());
    for e in 0..EXPERTS {
        assert!(file[layer.offset(e, 1) as usize..].starts_with(&down.expert(e).pack().unwrap().data));
    }
}

#[test]
fn a_pack_is_a_checkpoint_with_quantised_residents_and_its_own_sidecar() {
    let dir = tempdir().unwrap();
    let ck = source(&dir.path().join("model"), 1);
    let out = dir.path().join("pack");
    let mut plan = plan(&ck, Some(affine(4)));
    plan.quantise.push(("mlp.gate".to_owned(), Some(affine(8))));
    plan.keep.retain(|name| name != "mlp.gate.weight");
    // An earlier, interrupted build.
    fs::create_dir_all(out.join(".partial")).unwrap();
    fs::write(out.join(".partial/model.safetensors.tmp"), b"half").unwrap();
    write_pack(&ck, &out, &plan, &mut |_| ()).unwrap();
    let mut names: Vec<_> = fs::read_dir(&out).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["config.json", "expert_sidecar", "model.safetensors", "tokenizer.json"]);

    let pack = Checkpoint::open(&out).unwrap();
    assert_eq!(pack.text_config()["hidden_size"], HIDDEN);
    assert_eq!(pack.config()["quantization"]["bits"], 4);
    assert_eq!(pack.config()["quantization"]["mlp.gate"], json!({ "group_size": 32, "bits": 8 }));
    assert_eq!(pack.read_f32("norm.weight").unwrap(), weights(HIDDEN, 2));
    assert!(pack.tensor("mlp.experts.down_proj").is_none());
    for (module, bits, seed) in [("embed", 4, 1), ("mlp.gate", 8, 3)] {
        let m = pack.matrix(module).unwrap();
        assert_eq!(m.format(), affine(bits));
        let values = rounded("BF16", &weights(m.rows() * m.cols(), seed));
        let (mut error, mut power) = (0.0, 0.0);
        for (x, y) in values.iter().zip(m.to_f32().unwrap()) {
            error += (x - y).powi(2);
            power += x.powi(2);
        }
        assert!(error / power < if bits == 4 { 0.01 } else { 1e-4 }, "{module}: {}", error / power);
    }
    let sidecar = Sidecar::open(&out.join(SIDECAR_DIR), &fingerprint(&pack).unwrap()).unwrap();
    assert_eq!(sidecar.layers()[0].layout.gate_up.half.format, affine(4));
    assert_eq!(sidecar.manifest().source, fingerprint(&ck).unwrap());
    verify(&out.join(SIDECAR_DIR), &mut |_, _| ()).unwrap();
    assert_eq!(write_pack(&ck, &out, &plan, &mut |_| ()).unwrap_err().code(), "output-exists");
    // The same source gives the same bytes.
    let again = dir.path().join("again");
    write_pack(&ck, &again, &plan, &mut |_| ()).unwrap();
    for file in ["config.json", "model.safetensors", "expert_sidecar/manifest.json"] {
        assert!(fs::read(out.join(file)).unwrap() == fs::read(again.join(file)).unwrap(), "{file}");
    }
}

#[test]
fn a_plan_that_does_not_fit_is_refused_before_anything_is_written() {
    let dir = tempdir().unwrap();
    let ck = source(dir.path(), 1);
    let good = plan(&ck, Some(affine(4)));
    let code = |change: &dyn Fn(&mut PackPlan)| {
        let mut bad = good.clone();
        change(&mut bad);
        let out = dir.path().join("out");
        let code = write_pack(&ck, &out, &bad, &mut |_| ()).map_or_else(|e| e.code(), |_| "built");
        assert!(!out.exists());
        code
    };
    assert_eq!(code(&|p| p.keep.push("absent".to_owned())), "missing-tensor");
    assert_eq!(code(&|p| p.quantise.push(("absent".to_owned(), None))), "missing-tensor");
    assert_eq!(code(&|p| p.experts[0].down = p.experts[0].gate.clone()), "wrong-plan");
    assert_eq!(code(&|p| p.experts[0].up = ExpertSource::Each(vec![p.experts[0].gate.expert(0)])), "wrong-plan");
    assert_eq!(code(&|p| p.experts.push(p.experts[0].clone())), "wrong-plan");
    assert_eq!(code(&|p| p.expert_format = Some(WeightFormat::F16)), "unsupported-quantisation");
}
