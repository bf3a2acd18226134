//! `mach pull --pack` against a server on this machine: what comes of it is what `mach artifacts build` makes of the whole checkpoint, and
//! few shards are on the disk at a time, whatever breaks on the way.

mod support;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use mach_format::{Checkpoint, ElementType, Planned, SafetensorsWriter};
use serde_json::{Value, json};
use support::hub::{COMMIT, Hub, REPO, is_large};
use support::{Ran, arg, copy, flip, goldens, mach, plain};

const SHARDS: usize = 6;

/// Writes a checkpoint anew in shards of about equal size, its tensors in the order of their names.
fn split(from: &Path, to: &Path, shards: usize) {
    let ck = Checkpoint::open(from).unwrap();
    std::fs::create_dir_all(to).unwrap();
    for name in ["config.json", "generation_config.json"] {
        std::fs::copy(from.join(name), to.join(name)).unwrap();
    }
    let mut tensors: Vec<(&str, u64)> = ck.tensors().map(|(name, info)| (name, info.bytes)).collect();
    tensors.sort_unstable();
    let total: u64 = tensors.iter().map(|t| t.1).sum();
    let (mut groups, mut done) = (vec![Vec::new(); shards], 0);
    for (name, bytes) in tensors {
        groups[(done * shards as u64 / total) as usize].push(name);
        done += bytes;
    }
    let mut map = serde_json::Map::new();
    for (i, names) in groups.iter().enumerate() {
        let file = if shards == 1 { "model.safetensors".to_owned() } else { format!("model-{:05}-of-{shards:05}.safetensors", i + 1) };
        let planned = names.iter().map(|name| match ck.tensor(name).unwrap() {
            info if let ElementType::Plain(dtype) = info.dtype => Planned { name: (*name).to_owned(), dtype, shape: info.shape.clone() },
            info => panic!("{info:?}"),
        });
        let mut writer = SafetensorsWriter::create(&to.join(&file), planned.collect()).unwrap();
        names.iter().for_each(|name| writer.write(name, &ck.read_bytes(name).unwrap()).unwrap());
        writer.finish().unwrap();
        map.extend(names.iter().map(|name| ((*name).to_owned(), json!(file))));
    }
    if shards > 1 {
        std::fs::write(to.join("model.safetensors.index.json"), json!({ "weight_map": map }).to_string()).unwrap();
    }
}

/// A checkpoint in shards, its server, and the pack that `mach artifacts build` makes of it.
struct Case {
    hub: Hub,
    dir: tempfile::TempDir,
}

impl Case {
    fn new(from: &Path, shards: usize, flags: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (model, pack) = (dir.path().join("model"), dir.path().join("pack"));
        split(from, &model, shards);
        let built = mach(&[&["artifacts", "build", arg(&model), "--out", arg(&pack)], flags].concat());
        assert_eq!(built.code, 0, "{}", built.err);
        Self { hub: Hub::of(&model), dir }
    }

    fn pull(&self, flags: &[&str]) -> Value {
        let ran = self.hub.run(&[&["pull", REPO, "--pack", "--json"], flags].concat(), &[]);
        assert_eq!(ran.code, 0, "{}", ran.err);
        ran.json()
    }

    /// Bytes of the largest shard.
    fn largest(&self) -> u64 {
        self.hub.state().files.iter().filter(|(name, _)| is_large(name)).map(|(_, bytes)| bytes.len() as u64).max().unwrap()
    }

    /// No more than so many shards were on the disk at a time, and none is now.
    fn held_at_most(&self, shards: u64) {
        let most = self.hub.state().most;
        let largest = self.largest();
        assert!(most <= shards * largest, "{most} bytes on the disk, {largest} in the largest shard");
        assert!(self.hub.blobs().is_empty(), "{:?}", self.hub.blobs());
    }

    /// The pack has the files and the records of the one that was built from the whole checkpoint.
    fn equals(&self, path: &Path) {
        let built = self.dir.path().join("pack");
        for name in ["config.json", "generation_config.json", "model.safetensors"] {
            assert!(std::fs::read(path.join(name)).unwrap() == std::fs::read(built.join(name)).unwrap(), "{name}");
        }
        let records = |dir: &Path| {
            let manifest: Value = serde_json::from_slice(&std::fs::read(dir.join("expert_sidecar/manifest.json")).unwrap()).unwrap();
            let layers = manifest["layers"].as_array().unwrap().clone();
            let read = |l: &Value| {
                let bytes = std::fs::read(dir.join("expert_sidecar").join(l["file"].as_str().unwrap())).unwrap();
                // The trailer names the source, which is told by its hashes on the hub instead of by samples.
                (l["layer"].as_u64(), bytes[..bytes.len() - 96].to_vec())
            };
            (manifest["fingerprint"].clone(), layers.iter().map(read).collect::<Vec<_>>())
        };
        assert!(records(path) == records(&built));
        let mut names: Vec<_> = std::fs::read_dir(path).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        assert_eq!(names, ["config.json", "expert_sidecar", "generation_config.json", "model.safetensors", "source.json"]);
    }

    /// Requests for the bytes of shards, by name.
    fn fetched(&self) -> HashMap<String, usize> {
        let mut count = HashMap::new();
        for seen in self.hub.state().seen.iter().filter(|s| s.to.is_none() && is_large(&s.path)) {
            *count.entry(seen.path.rsplit('/').next().unwrap().to_owned()).or_default() += 1;
        }
        count
    }
}

fn shard(i: usize) -> String {
    format!("model-{i:05}-of-{SHARDS:05}.safetensors")
}

/// Cut connections and a damaged shard change nothing: the pack is that of the whole checkpoint, two shards were on the disk at most, `org/name` finds it,
/// and another run loads nothing.
#[test]
fn packs_come_of_few_shards_at_a_time() {
    let case = Case::new(&plain(), SHARDS, &[]);
    (case.hub.state().cut, case.hub.state().damage) = (Some(30_000), 1);
    let pulled = case.pull(&[]);
    let path = case.hub.repo().join("packs").join(COMMIT);
    assert_eq!((pulled["path"].as_str(), pulled["kind"].as_str(), &pulled["shards_in_flight"]), (path.to_str(), Some("pack"), &json!(2)));
    assert_eq!((&pulled["layers_written"], &pulled["shards"], &pulled["notes"]), (&json!(4), &json!(SHARDS), &json!([])));
    case.equals(&path);
    case.held_at_most(2);
    assert!(case.hub.state().most > 0);
    // One shard came twice.
    let bytes: usize = case.hub.state().files.iter().filter(|(name, _)| is_large(name)).map(|(_, bytes)| bytes.len()).sum();
    assert!(pulled["downloaded_bytes"].as_u64().unwrap() > bytes as u64 + 50_000, "{pulled}");

    let tokens = case.dir.path().join("tokens.json");
    std::fs::write(&tokens, json!((5..25).collect::<Vec<u32>>()).to_string()).unwrap();
    let reply = |model: &str| {
        let args = ["generate", "--model", model, "--tokens", arg(&tokens), "-n", "12", "--ignore-eos", "--temperature", "0", "--streaming", "--json"];
        case.hub.run(&args, &[]).json()["tokens"].clone()
    };
    assert_eq!(reply(REPO), reply(arg(&case.dir.path().join("pack"))));
    let listed = case.hub.run(&["models", "--json"], &[]).json();
    assert!(listed.as_array().unwrap().iter().any(|m| m["name"] == REPO && m["path"] == pulled["path"]), "{listed}");

    let again = case.pull(&[]);
    assert_eq!((&again["downloaded_bytes"], &again["path"], &again["layers_written"]), (&json!(0), &pulled["path"], &json!(0)));
    let offline = case.hub.run(&["pull", REPO, "--pack", "--json"], &[("HF_HUB_OFFLINE", "1")]);
    assert_eq!(offline.json()["path"], pulled["path"]);
    case.hub.run(&["pull", REPO, "--pack", "--bits", "8"], &[("HF_HUB_OFFLINE", "1")]).failed_with("pull-offline");
}

/// A run that is killed goes on: what is packed stays, a shard that had begun to come is continued, one that was used up does not come again. A record that was damaged
/// meanwhile is made again from the shards that it needs.
#[test]
fn killed_runs_go_on() {
    for (at, damaged) in [(2, false), (4, false), (6, true)] {
        let case = Case::new(&plain(), SHARDS, &[]);
        case.hub.state().stall = Some(shard(at));
        let mut child = case.hub.command(&["pull", REPO, "--pack"], &[]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        while !case.hub.state().stalled {
            assert!(child.try_wait().unwrap().is_none(), "it ended before it could be killed");
            std::thread::sleep(Duration::from_millis(5));
        }
        let partial = case.hub.repo().join("blobs").join(format!("{}.incomplete", hashes(&case.hub)[&shard(at)]));
        while std::fs::metadata(&partial).map_or(0, |m| m.len()) == 0 {
            std::thread::sleep(Duration::from_millis(5));
        }
        let path = case.hub.repo().join("packs").join(COMMIT);
        child.kill().unwrap();
        child.wait().unwrap();
        (case.hub.state().stall, case.hub.state().stalled) = (None, false);
        assert!(!path.join("config.json").exists());
        case.hub.run(&["check", REPO], &[]).failed_with("model-not-found");
        let layers = layer_files(&path);
        if damaged {
            flip(layers.first().expect("a layer of the first shards is done"), 100);
        }
        case.hub.state().seen.clear();
        let pulled = case.pull(&[]);
        case.equals(&path);
        case.held_at_most(pulled["shards_in_flight"].as_u64().unwrap());
        let fetched = case.fetched();
        // When a shard is asked for, at most one before it is still in use.
        let again = (1..at).filter(|&before| fetched.contains_key(&shard(before))).count();
        assert!(damaged || again <= 1, "{fetched:?}");
        let kept = layers.len() as u64 - u64::from(damaged);
        assert_eq!((pulled["layers_kept"].as_u64(), pulled["layers_written"].as_u64()), (Some(kept), Some(4 - kept)));
        let seen = case.hub.state().seen.clone();
        assert!(seen.iter().any(|s| s.path.ends_with(&shard(at)) && s.from > 0 && s.to.is_none()), "it began anew: {seen:?}");
    }
}

/// A disk that fills up is named, before a pack and within it, and costs nothing that was done: the same command goes on. A device that is always
/// full stands in for it.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_costs_nothing() {
    use std::os::unix::fs::symlink;
    let case = Case::new(&plain(), SHARDS, &[]);
    let (whole, out) = (case.dir.path().join("whole"), case.dir.path().join("out"));
    case.pull(&["--out", arg(&whole)]);
    let layers = layer_files(&whole).len();
    let last = layer_files(&whole).last().unwrap().file_name().unwrap().to_str().unwrap().to_owned();
    let pull = ["pull", REPO, "--pack", "--out", arg(&out)];
    let outline = out.join(".pull").join(shard(1)).with_extension("tmp");
    std::fs::create_dir_all(outline.parent().unwrap()).unwrap();
    symlink("/dev/full", &outline).unwrap();
    let ran = case.hub.run(&pull, &[]);
    assert!(ran.failed_with("disk-full").err.contains(&shard(1)), "{}", ran.err);
    std::fs::remove_file(&outline).unwrap();

    // It is full when a layer is done, and a shard of the last one is still to come.
    let index: serde_json::Value = serde_json::from_slice(&case.hub.state().files["model.safetensors.index.json"]).unwrap();
    let of_last = index["weight_map"].as_object().unwrap().iter().filter(|(name, _)| name.contains(&format!("layers.{}.mlp.experts.", layers - 1)));
    let awaited = of_last.map(|(_, shard)| shard.as_str().unwrap().to_owned()).max().unwrap();
    case.hub.state().stall = Some(awaited);
    let mut child = case.hub.command(&pull, &[]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    while !case.hub.state().stalled || layer_files(&out).is_empty() {
        assert!(child.try_wait().unwrap().is_none(), "it ended before its last shards");
        std::thread::sleep(Duration::from_millis(5));
    }
    symlink("/dev/full", out.join("expert_sidecar").join(format!("{last}.tmp"))).unwrap();
    case.hub.state().stall = None;
    let ran = Ran::of(child.wait_with_output().unwrap());
    assert!(ran.failed_with("disk-full").err.contains(&last), "{}", ran.err);
    assert!(!out.join("config.json").exists());
    let kept = layer_files(&out).len();
    assert!(kept > 0);
    case.hub.state().seen.clear();
    let pulled = case.pull(&["--out", arg(&out)]);
    assert_eq!(pulled["layers_kept"], json!(kept));
    assert!(case.fetched().len() < SHARDS, "{:?}", case.fetched());
    case.equals(&out);
}

fn layer_files(pack: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(pack.join("expert_sidecar")).into_iter().flatten().flatten().map(|e| e.path());
    let mut files: Vec<PathBuf> = entries.filter(|p| p.extension().is_some_and(|e| e == "experts")).collect();
    files.sort();
    files
}

/// Hashes of the shards.
fn hashes(hub: &Hub) -> HashMap<String, String> {
    use sha1::Digest;
    let state = hub.state();
    state.files.iter().filter(|(name, _)| is_large(name)).map(|(name, bytes)| (name.clone(), support::hub::hex(&sha2::Sha256::digest(bytes)))).collect()
}

/// Every family and layout: experts in stacks and alone, packed and block-scaled, quantised on the way; and the single file that small
/// checkpoints are.
#[test]
fn every_layout_is_packed() {
    for (golden, shards, flags) in [
        ("qwen3-base", 5, &["--bits", "4", "--group-size", "32"][..]),
        ("qwen3-mlx8", 5, &[]),
        ("gpt_oss-mxfp4", 7, &[]),
        ("gemma4-base", 5, &["--bits", "8", "--group-size", "32"]),
        ("deepseek_v4-fp8fp4", 5, &[]),
        ("qwen3_5-mlx4", 1, &[]),
    ] {
        let case = Case::new(&goldens().join(golden), shards, flags);
        let out = case.dir.path().join("out");
        let pulled = case.pull(&[flags, &["--out", arg(&out)]].concat());
        assert_eq!(pulled["path"].as_str(), out.to_str(), "{golden}");
        case.equals(&out);
        case.held_at_most(pulled["shards_in_flight"].as_u64().unwrap());
    }
}

/// A layer that lies in more shards than may be on the disk brings as many as it needs, and says so.
#[test]
fn wide_layers_need_more_shards() {
    let case = Case::new(&goldens().join("qwen3-base"), 12, &[]);
    let ran = case.hub.run(&["pull", REPO, "--pack", "--shards-in-flight", "1", "--json"], &[]);
    let pulled = ran.json();
    let needed = pulled["shards_in_flight"].as_u64().unwrap();
    assert!(needed > 2 && needed < 12, "{pulled}");
    assert_eq!(pulled["notes"][0]["code"], "more-shards-in-flight");
    assert!(ran.err.contains("note[more-shards-in-flight]: layer ") && ran.err.contains(&format!("up to {needed} ")), "{}", ran.err);
    case.equals(&case.hub.repo().join("packs").join(COMMIT));
    case.held_at_most(needed);
}

/// Shards that a snapshot shows are read where they are, and stay; those of an interrupted plain download are used up.
#[test]
fn shards_that_are_there_are_used() {
    let case = Case::new(&plain(), SHARDS, &[]);
    assert_eq!(case.hub.pull().code, 0);
    let before = case.hub.blobs();
    let pulled = case.pull(&[]);
    assert_eq!((&pulled["downloaded_bytes"], case.hub.blobs()), (&json!(0), before));
    let path = case.hub.repo().join("packs").join(COMMIT);
    case.equals(&path);
    // The pack is what the name stands for from now on.
    let found = case.hub.run(&["models", "--json"], &[]).json();
    assert!(found.as_array().unwrap().iter().any(|m| m["name"] == REPO && m["path"].as_str() == path.to_str()), "{found}");
    std::fs::remove_dir_all(&path).unwrap();
    std::fs::remove_dir_all(case.hub.repo().join("snapshots")).unwrap();
    assert_eq!(case.pull(&[])["downloaded_bytes"].as_u64().map(|n| n < 60_000), Some(true));
    case.equals(&path);
    assert!(case.hub.blobs().is_empty());
}

/// What cannot be packed is named before anything large is downloaded.
#[test]
fn refusals_are_named() {
    let case = Case::new(&plain(), 2, &[]);
    let hub = &case.hub;
    let pack = |flags: &[&str]| hub.run(&[&["pull", REPO, "--pack"], flags].concat(), &[]);
    hub.run(&["pull", REPO, "--bits", "4"], &[]).failed_with("usage");
    hub.run(&["pull", REPO, "--shards-in-flight", "3"], &[]).failed_with("usage");
    pack(&["--bits", "5"]).failed_with("usage");
    pack(&["--include", "x"]).failed_with("usage");
    hub.run(&["pull", REPO, "--pack"], &[("HF_HUB_OFFLINE", "1")]).failed_with("pull-offline");
    // A folder with another model stays as it is.
    let taken = case.dir.path().join("taken");
    copy(&case.dir.path().join("model"), &taken);
    pack(&["--out", arg(&taken)]).failed_with("output-exists");
    let out = case.dir.path().join("out");
    assert_eq!(pack(&["--out", arg(&out)]).code, 0);
    assert!(pack(&["--out", arg(&out), "--bits", "8", "--group-size", "32"]).failed_with("output-exists").err.contains("\"bits\":null"));
    hub.state().damage = usize::MAX;
    pack(&[]).failed_with("pull-checksum");
    hub.state().damage = 0;

    let sidecar = b"{}".to_vec();
    hub.state().files.insert("expert_sidecar/manifest.json".to_owned(), sidecar);
    pack(&[]).failed_with("pull-is-pack");
    hub.state().files.retain(|name, _| !name.contains("safetensors"));
    hub.state().files.insert("m-Q8_0.gguf".to_owned(), vec![7; 9]);
    assert!(pack(&[]).failed_with("pull-pack-gguf").err.contains("mach artifacts build"));
}

/// A model that mach does not run costs the headers of its shards, and leaves no half of a pack behind.
#[test]
fn unknown_models_are_told_by_their_headers() {
    let case = Case::new(&plain(), SHARDS, &[]);
    case.hub.state().files.insert("config.json".to_owned(), br#"{"model_type": "other"}"#.to_vec());
    let ran = case.hub.run(&["pull", REPO, "--pack"], &[]);
    assert!(ran.failed_with("unknown-arch").err.contains("other"), "{}", ran.err);
    assert!(case.fetched().is_empty() && !case.hub.repo().join("packs").join(COMMIT).exists());
}
