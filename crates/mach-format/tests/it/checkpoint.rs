//! What is accepted as a checkpoint, and the names of what is not.

use std::fs;
use std::path::Path;

use mach_format::{Checkpoint, FormatError};
use serde_json::json;
use tempfile::tempdir;

use crate::support::{plain, safetensors, tensor, weights, with_header, write, write_sharded};

fn code(dir: &Path) -> &'static str {
    match Checkpoint::open(dir) {
        Ok(_) => "opened",
        Err(e) => {
            assert!(!e.to_string().is_empty());
            e.code()
        }
    }
}

fn two_shards(dir: &Path) {
    let shard = |name: &str, seed| vec![plain(name, "BF16", &[4, 8], &weights(32, seed))];
    write_sharded(dir, &json!({ "model_type": "m" }), &[shard("a.weight", 1), shard("b.weight", 2)]);
}

#[test]
fn reads_sharded_and_nested_configurations() {
    let dir = tempdir().unwrap();
    two_shards(dir.path());
    fs::write(dir.path().join("config.json"), r#"{"model_type": "outer", "text_config": {"hidden_size": 8}}"#).unwrap();
    fs::write(dir.path().join("generation_config.json"), r#"{"top_k": 20}"#).unwrap();
    // Not named by the index, so not looked at.
    fs::write(dir.path().join("stray.safetensors"), b"no header").unwrap();
    let ck = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(ck.model_type(), Some("outer"));
    assert_eq!(ck.text_config()["hidden_size"], 8);
    assert_eq!(ck.generation().unwrap()["top_k"], 20);
    assert_eq!(ck.tensors().map(|(name, _)| name).collect::<Vec<_>>(), ["a.weight", "b.weight"]);
    assert_eq!(ck.total_bytes(), 128);
    assert_eq!(ck.tensor("b.weight").unwrap().shape, [4, 8]);
    let expected: Vec<f32> = weights(32, 2).iter().map(|x| half::bf16::from_f32(*x).to_f32()).collect();
    assert_eq!(ck.read_f32("b.weight").unwrap(), expected);
}

#[test]
fn an_unsharded_file_may_have_any_name_but_must_be_alone() {
    let dir = tempdir().unwrap();
    fs::write(dir.path().join("config.json"), "{}").unwrap();
    assert_eq!(code(dir.path()), "no-weights");
    let bytes = safetensors(&[plain("w", "F32", &[2], &[1.0, 2.0])]);
    fs::write(dir.path().join("weights.safetensors"), &bytes).unwrap();
    assert_eq!(code(dir.path()), "opened");
    fs::write(dir.path().join("other.safetensors"), &bytes).unwrap();
    assert_eq!(code(dir.path()), "no-weights");
}

#[test]
fn faults_of_directory_and_index_have_names() {
    let dir = tempdir().unwrap();
    let (a, index) = (dir.path().join("model-00001-of-00002.safetensors"), dir.path().join("model.safetensors.index.json"));
    assert_eq!(code(dir.path()), "not-a-checkpoint");
    two_shards(dir.path());

    let whole = fs::read(&a).unwrap();
    for keep in [0, 7, 8, 40, whole.len() - 1] {
        fs::write(&a, &whole[..keep]).unwrap();
        assert_eq!(code(dir.path()), "truncated-file", "{keep} bytes");
    }
    fs::write(&a, [&whole[..], b"x"].concat()).unwrap();
    assert_eq!(code(dir.path()), "truncated-file", "a longer file");
    fs::remove_file(&a).unwrap();
    assert_eq!(code(dir.path()), "missing-shard");
    fs::write(&a, &whole).unwrap();

    let good = fs::read_to_string(&index).unwrap();
    let swapped = good.replace("00001-of", "0000X-of").replace("00002-of", "00001-of").replace("0000X-of", "00002-of");
    for (bad, expected) in [
        (swapped.as_str(), "index-mismatch"),
        (&good.replace("a.weight", "c.weight"), "index-mismatch"),
        (&good.replace("model-00001", "../model-00001"), "invalid-json"),
        ("{\"weight_map\": {}}", "invalid-json"),
        ("{", "invalid-json"),
    ] {
        fs::write(&index, bad).unwrap();
        assert_eq!(code(dir.path()), expected, "{bad}");
    }
    fs::write(&index, good).unwrap();
    fs::write(dir.path().join("config.json"), "[1]").unwrap();
    assert_eq!(code(dir.path()), "invalid-json");
}

#[test]
fn hostile_headers_are_refused() {
    let dir = tempdir().unwrap();
    write(dir.path(), &json!({}), &[]);
    let entry = |offsets: &str| format!("\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":{offsets}");
    let files: Vec<(Vec<u8>, &str)> = vec![
        ([&u64::MAX.to_le_bytes()[..], b"{}"].concat(), "invalid-header"),
        ([&99_000_000u64.to_le_bytes()[..], b"{}"].concat(), "truncated-file"),
        (b"version https://git-lfs.github.com/spec/v1\n".to_vec(), "invalid-header"),
        (with_header("{\"a\":", &[]), "invalid-header"),
        (with_header("\u{0}\u{1}", &[]), "invalid-header"),
        (with_header(&"[".repeat(100_000), &[]), "invalid-header"),
        (with_header(&format!("{{\"a\":{{{}}},\"b\":{{{}}}}}", entry("[0,8]"), entry("[4,12]")), &[0; 12]), "invalid-header"),
        (with_header(&format!("{{\"a\":{{{}}}}}", entry("[8,16]")), &[0; 16]), "invalid-header"),
        (with_header(&format!("{{\"a\":{{{}}}}}", entry("[8,0]")), &[0; 8]), "invalid-header"),
        (with_header(&format!("{{\"a\":{{{}}}}}", entry("[0,9]")), &[0; 9]), "invalid-header"),
        (with_header("{\"a\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296,4],\"data_offsets\":[0,8]}}", &[0; 8]), "invalid-header"),
        (with_header("{\"a\":{\"dtype\":\"F99\",\"shape\":[2],\"data_offsets\":[0,8]}}", &[0; 8]), "invalid-header"),
    ];
    for (i, (bytes, expected)) in files.iter().enumerate() {
        fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
        assert_eq!(code(dir.path()), *expected, "case {i}");
    }
}

#[test]
fn wrong_tensors_are_named() {
    let dir = tempdir().unwrap();
    let ids = tensor("ids", "I64", &[1], vec![0; 8]);
    let fp8 = tensor("fp8.weight", "F8_E5M2", &[2, 2], vec![0; 4]);
    write(dir.path(), &json!({}), &[ids, fp8, plain("v.weight", "F32", &[1, 1, 1, 3], &[0.0; 3]), plain("empty", "F32", &[0, 4], &[])]);
    let ck = Checkpoint::open(dir.path()).unwrap();
    let name = |r: Result<_, FormatError>| r.err().map(|e| (e.code(), e.to_string()));
    let (code, text) = name(ck.read_f32("ids").map(drop)).unwrap();
    assert!(code == "wrong-dtype" && text.contains("ids") && text.contains("I64"), "{text}");
    assert_eq!(name(ck.read_f32("nothing").map(drop)).unwrap().0, "missing-tensor");
    assert_eq!(name(ck.matrix("v").map(drop)).unwrap().0, "wrong-shape");
    assert_eq!(name(ck.matrix("empty").map(drop)).unwrap().0, "wrong-shape");
    let (code, text) = name(ck.matrix("fp8").map(drop)).unwrap();
    assert!(code == "unsupported-quantisation" && text.contains("F8_E5M2"), "{text}");
}
