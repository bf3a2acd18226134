//! GGUF files: what is read back, what is refused, and values that are those of ggml.

use std::path::{Path, PathBuf};

use mach_format::gguf::{Gguf, GgufTensor, GgufWriter, MetaList, MetaValue, Metadata};
use mach_format::{BlockFormat, Checkpoint, FormatError, WeightFormat};
use serde_json::json;
use tempfile::tempdir;

use crate::support::weights;

const NUMBERS: [(&str, MetaValue); 7] = [
    ("u32", MetaValue::U32(7)),
    ("i32", MetaValue::I32(-7)),
    ("f32", MetaValue::F32(0.5)),
    ("u64", MetaValue::U64(u64::MAX)),
    ("i64", MetaValue::I64(-1 << 40)),
    ("f64", MetaValue::F64(1e300)),
    ("bool", MetaValue::Bool(true)),
];

fn metadata() -> Metadata {
    let mut m = Metadata::default();
    for (key, value) in NUMBERS {
        m.set(key, value);
    }
    m.set("text", MetaValue::Text("größe".to_owned()));
    m.set("ints", MetaValue::List(MetaList::Int(vec![1, -2, 3])));
    m.set("wide", MetaValue::List(MetaList::Int(vec![1, 1 << 40])));
    m.set("floats", MetaValue::List(MetaList::Float(vec![0.5, -2.0])));
    m.set("flags", MetaValue::List(MetaList::Bool(vec![true, false])));
    m.set("texts", MetaValue::List(MetaList::Text(vec!["a".to_owned(), String::new()])));
    m
}

fn f32_tensor(name: &str, shape: &[usize]) -> GgufTensor {
    GgufTensor { name: name.to_owned(), format: WeightFormat::F32, shape: shape.to_vec() }
}

/// Writes tensors of `weights` with their index as seed.
fn write(path: &Path, metadata: &Metadata, tensors: &[GgufTensor]) {
    let mut writer = GgufWriter::create(path, metadata, tensors).unwrap();
    for (i, t) in tensors.iter().enumerate() {
        let bytes: Vec<u8> = weights(t.bytes().unwrap() as usize / 4, i as u64).iter().flat_map(|x| x.to_le_bytes()).collect();
        let (a, b) = bytes.split_at(bytes.len() / 2);
        writer.write(&t.name, a).unwrap();
        writer.write(&t.name, b).unwrap();
    }
    writer.finish().unwrap();
}

fn small(dir: &Path) -> PathBuf {
    let path = dir.join("small.gguf");
    write(&path, &metadata(), &[f32_tensor("v", &[5]), f32_tensor("m", &[3, 4]), f32_tensor("stack", &[2, 3, 4])]);
    path
}

/// Protects the container: every kind of value, shapes outermost first, data where the table says, stacks by expert.
#[test]
fn what_is_written_is_read_back() {
    let dir = tempdir().unwrap();
    let gguf = Gguf::open(&small(dir.path())).unwrap();
    assert_eq!(gguf.metadata(), &metadata());
    let shapes: Vec<_> = gguf.tensors().map(|(name, t)| (name.to_owned(), t.shape.clone())).collect();
    assert_eq!(shapes, [("v".to_owned(), vec![5]), ("m".to_owned(), vec![3, 4]), ("stack".to_owned(), vec![2, 3, 4])]);
    let ck = Checkpoint::from_gguf(gguf, json!({}), &|name| (name == "m").then(|| "mm.weight".to_owned())).unwrap();
    assert_eq!(ck.read_f32("v").unwrap(), weights(5, 0));
    assert_eq!(ck.matrix("mm").unwrap().to_f32().unwrap(), weights(12, 1));
    assert_eq!(ck.matrix("stack").unwrap().expert(1).to_f32().unwrap(), weights(24, 2)[12..]);
    // One dimension is one row.
    assert_eq!((ck.matrix("v").unwrap().rows(), ck.matrix("v").unwrap().cols()), (1, 5));
    assert_eq!(ck.sidecar_dir(), dir.path().join("small.expert_sidecar"));
}

/// A split model of two parts, one tensor each, with what the parts say of themselves.
fn split(dir: &Path, says: [(u32, u32, i32); 2]) -> PathBuf {
    let part = |n: usize| dir.join(format!("big-{n:05}-of-00002.gguf"));
    for (i, (no, count, tensors)) in says.into_iter().enumerate() {
        let mut m = Metadata::default();
        m.set("split.no", MetaValue::U32(no));
        m.set("split.count", MetaValue::U32(count));
        m.set("split.tensors.count", MetaValue::I32(tensors));
        write(&part(i + 1), &m, &[f32_tensor(&format!("t{i}"), &[4])]);
    }
    part(1)
}

fn code(path: &Path) -> (&'static str, String) {
    match Gguf::open(path) {
        Ok(_) => ("ok", String::new()),
        Err(e) => (e.code(), e.to_string()),
    }
}

/// Protects split models: any part opens all; parts that are missing or strangers are named.
#[test]
fn split_models() {
    let dir = tempdir().unwrap();
    let first = split(dir.path(), [(0, 2, 2), (1, 2, 2)]);
    let second = dir.path().join("big-00002-of-00002.gguf");
    for path in [&first, &second] {
        let gguf = Gguf::open(path).unwrap();
        assert_eq!(gguf.path(), first);
        let ck = Checkpoint::from_gguf(gguf, json!({}), &|_| None).unwrap();
        assert_eq!(ck.read_f32("t1").unwrap(), weights(4, 0));
    }
    std::fs::remove_file(&second).unwrap();
    assert_eq!(code(&first).0, "missing-shard");
    for says in [[(0, 2, 2), (0, 2, 2)], [(0, 3, 2), (1, 3, 2)], [(0, 2, 3), (1, 2, 3)]] {
        let (code, text) = code(&split(dir.path(), says));
        assert!(code == "invalid-gguf" && (text.contains("part") || text.contains("announced")), "{text}");
    }
}

/// A header of hand-made parts: (version, tensors, pairs), then raw bytes, then room for data.
fn raw(version: u32, tensors: u64, pairs: u64, rest: &[u8], data: usize) -> Vec<u8> {
    let mut out = b"GGUF".to_vec();
    out.extend(version.to_le_bytes());
    out.extend(tensors.to_le_bytes());
    out.extend(pairs.to_le_bytes());
    out.extend(rest);
    out.resize(out.len().next_multiple_of(32) + data, 0);
    out
}

fn text(s: &str) -> Vec<u8> {
    [&(s.len() as u64).to_le_bytes()[..], s.as_bytes()].concat()
}

fn entry(name: &str, dims: &[u64], ty: u32, offset: u64) -> Vec<u8> {
    let mut out = text(name);
    out.extend((dims.len() as u32).to_le_bytes());
    dims.iter().for_each(|d| out.extend(d.to_le_bytes()));
    out.extend(ty.to_le_bytes());
    out.extend(offset.to_le_bytes());
    out
}

/// Protects the reader against every field that lies: the file is named, nothing large is allocated.
#[test]
fn malformed_files_are_named() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("bad.gguf");
    let pair = |key: &str, ty: u32, value: &[u8]| [&text(key)[..], &ty.to_le_bytes(), value].concat();
    let list = |ty: u32, n: u64| [&9u32.to_le_bytes()[..], &ty.to_le_bytes(), &n.to_le_bytes()].concat();
    let two = |a: Vec<u8>, b: Vec<u8>| [a, b].concat();
    let cases = [
        ("its version is 1", raw(1, 0, 0, &[], 0), "invalid-gguf"),
        ("big-endian", raw(3u32.swap_bytes(), 0, 0, &[], 0), "invalid-gguf"),
        ("announces", raw(3, u64::MAX, 0, &[], 64), "invalid-gguf"),
        ("announces", raw(3, 0, 1 << 40, &[], 64), "invalid-gguf"),
        ("announces", raw(3, 0, 1, &u64::MAX.to_le_bytes(), 64), "invalid-gguf"),
        ("announces", raw(3, 0, 1, &two(text("k"), list(8, 1 << 60)), 64), "invalid-gguf"),
        ("list of lists", raw(3, 0, 1, &two(text("k"), list(9, 1)), 64), "invalid-gguf"),
        ("unknown type 13", raw(3, 0, 1, &pair("k", 13, &[]), 64), "invalid-gguf"),
        ("occurs twice", raw(3, 0, 2, &two(pair("k", 7, &[1]), pair("k", 7, &[1])), 64), "invalid-gguf"),
        ("UTF-8", raw(3, 0, 1, &pair("k", 8, &[2, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff]), 64), "invalid-gguf"),
        ("alignment is 24", raw(3, 0, 1, &pair("general.alignment", 4, &24u32.to_le_bytes()), 0), "invalid-gguf"),
        ("alignment is 0", raw(3, 0, 1, &pair("general.alignment", 4, &[0; 4]), 0), "invalid-gguf"),
        ("not a size", raw(3, 0, 1, &pair("general.alignment", 7, &[1]), 0), "gguf-metadata"),
        ("5 dimensions", raw(3, 1, 0, &entry("t", &[1; 5], 0, 0), 64), "invalid-gguf"),
        ("0 dimensions", raw(3, 1, 0, &entry("t", &[], 0, 0), 64), "invalid-gguf"),
        ("impossible size", raw(3, 1, 0, &entry("t", &[u64::MAX, 3], 0, 0), 64), "invalid-gguf"),
        ("impossible size", raw(3, 1, 0, &entry("t", &[4, 0], 0, 0), 64), "invalid-gguf"),
        ("unknown type 99", raw(3, 1, 0, &entry("t", &[4], 99, 0), 64), "invalid-gguf"),
        ("blocks of 256", raw(3, 1, 0, &entry("t", &[128, 2], 12, 0), 4096), "invalid-gguf"),
        ("multiple of 32", raw(3, 1, 0, &entry("t", &[4], 0, 8), 64), "invalid-gguf"),
        ("bytes where its header says", raw(3, 1, 0, &entry("t", &[4], 0, 64), 64), "truncated-file"),
        ("bytes where its header says", raw(3, 1, 0, &entry("t", &[4], 0, u64::MAX - 31), 64), "truncated-file"),
        ("occurs twice", raw(3, 2, 0, &two(entry("t", &[4], 0, 0), entry("t", &[4], 0, 32)), 64), "invalid-gguf"),
        ("does not begin", b"GGML and more".to_vec(), "invalid-gguf"),
        ("bytes where its header says", b"GG".to_vec(), "truncated-file"),
    ];
    for (what, bytes, expected) in cases {
        std::fs::write(&path, bytes).unwrap();
        let (code, text) = code(&path);
        assert!(code == expected && text.contains(what), "{what}: {code} {text}");
    }
    // Types that are known and not computed with open, and are named where they are used.
    std::fs::write(&path, raw(3, 1, 0, &entry("t", &[256], 34, 0), 96)).unwrap();
    let ck = Checkpoint::from_gguf(Gguf::open(&path).unwrap(), json!({}), &|_| None).unwrap();
    let error = ck.matrix("t").map(drop).unwrap_err();
    assert!(error.code() == "unsupported-quantisation" && error.to_string().contains("TQ1_0"), "{error}");
}

/// Protects against the files that nobody thought of: any byte changed, any length cut, and opening says what is wrong
/// or gives tensors inside the file.
#[test]
fn no_mutation_is_fatal() {
    let dir = tempdir().unwrap();
    let good = std::fs::read(small(dir.path())).unwrap();
    let path = dir.path().join("mutated.gguf");
    let check = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        if let Ok(gguf) = Gguf::open(&path) {
            assert!(gguf.tensors().all(|(_, t)| t.offset + t.bytes <= bytes.len() as u64));
        }
    };
    for length in (0..good.len()).step_by(3) {
        check(&good[..length]);
    }
    let header = good.len() - 4 * (5 + 12 + 24);
    for at in 0..header {
        for value in [0, 0xff, good[at] ^ 0x10] {
            let mut bytes = good.clone();
            bytes[at] = value;
            check(&bytes);
        }
    }
}

/// Protects writers from files that no one reads: formats and shapes without a place, tensors out of turn.
#[test]
fn plans_that_do_not_fit_are_refused() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("out.gguf");
    let create = |tensors: &[GgufTensor]| GgufWriter::create(&path, &Metadata::default(), tensors);
    let q4 = |shape: &[usize]| GgufTensor { name: "q".to_owned(), format: WeightFormat::Block(BlockFormat::Q4K), shape: shape.to_vec() };
    let refused = |r: Result<GgufWriter, FormatError>| r.err().is_some_and(|e| e.code() == "wrong-plan");
    assert!(refused(create(&[q4(&[2, 128])])) && refused(create(&[q4(&[])])));
    assert!(refused(create(&[f32_tensor("a", &[1]), f32_tensor("a", &[1])])));
    let mut writer = create(&[f32_tensor("a", &[2])]).unwrap();
    assert!(writer.write("b", &[0; 8]).is_err() && writer.write("a", &[0; 12]).is_err());
    assert!(writer.finish().is_err());
    assert!(!path.exists());
}
