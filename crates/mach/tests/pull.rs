//! `mach pull` against a server on this machine that cuts connections, damages bytes and refuses.

mod support;

use serde_json::json;
use support::hub::{COMMIT, Hub, REPO, is_large};
use support::plain;

/// Connections that end early are taken up where they ended; the result is the checkpoint in the layout that all tools share, shown only
/// when it is whole; a second run loads nothing, and an offline one needs no server.
#[test]
fn broken_downloads_go_on() {
    let hub = Hub::of(&plain());
    hub.state().files.insert("README.md".into(), b"not needed".to_vec());
    hub.state().cut = Some(100_000);
    let ran = hub.pull();
    assert_eq!(ran.code, 0, "{}", ran.err);
    let pulled = ran.json();
    let snapshot = hub.repo().join("snapshots").join(COMMIT);
    assert_eq!((pulled["path"].as_str(), pulled["commit"].as_str()), (snapshot.to_str(), Some(COMMIT)));
    assert_eq!(std::fs::read_to_string(hub.repo().join("refs/main")).unwrap(), COMMIT);
    let mut bytes = 0;
    for entry in std::fs::read_dir(&snapshot).unwrap().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let got = std::fs::read(entry.path()).unwrap();
        bytes += got.len();
        assert_eq!(got, hub.state().files[&name], "{name}");
        let target = std::fs::read_link(entry.path()).unwrap();
        assert!(target.starts_with("../../blobs") && is_large(&name) == (target.file_name().unwrap().len() == 64), "{target:?}");
    }
    assert!(snapshot.join("config.json").exists() && !snapshot.join("README.md").exists() && !snapshot.join("golden.safetensors").exists());
    assert_eq!((pulled["bytes"].as_u64(), pulled["downloaded_bytes"].as_u64()), (Some(bytes as u64), Some(bytes as u64)));
    assert!(hub.blobs().iter().all(|name| !name.contains("incomplete")));
    let ranges: Vec<u64> = hub.state().seen.iter().filter(|s| s.path.ends_with("00001-of-00002.safetensors")).map(|s| s.from).collect();
    assert!(ranges.len() > 2 && ranges.iter().enumerate().all(|(i, from)| *from == i as u64 * 100_000), "{ranges:?}");

    let again = hub.pull().json();
    assert_eq!((&again["downloaded_bytes"], &again["path"]), (&json!(0), &pulled["path"]));
    let listed = hub.run(&["models", "--json"], &[]).json();
    assert!(listed.as_array().unwrap().iter().any(|m| m["name"] == REPO), "{listed}");
    hub.state().status = Some(500);
    let offline = hub.run(&["pull", REPO, "--json"], &[("HF_HUB_OFFLINE", "1")]);
    assert_eq!(offline.json()["path"], pulled["path"]);
    hub.run(&["pull", "org/other", "--json"], &[("HF_HUB_OFFLINE", "1")]).failed_with("pull-offline");
}

/// What a run that failed had loaded is where the next one begins; nothing that is not whole looks like a checkpoint.
#[test]
fn a_later_run_goes_on() {
    let hub = Hub::of(&plain());
    (hub.state().cut, hub.state().silent) = (Some(50_000), true);
    hub.pull().failed_with("pull-connection");
    assert!(hub.blobs().iter().any(|name| name.ends_with(".incomplete")));
    assert!(!hub.repo().join("snapshots").exists() && !hub.repo().join("refs").exists());
    (hub.state().cut, hub.state().silent) = (None, false);
    hub.state().seen.clear();
    let pulled = hub.pull().json();
    assert!(pulled["downloaded_bytes"].as_u64() < pulled["bytes"].as_u64().map(|n| n - 49_000), "{pulled}");
    assert!(hub.state().seen.iter().any(|s| s.from == 50_000));
}

/// A server that starts anew instead of going on costs time, not bytes.
#[test]
fn servers_without_ranges() {
    let hub = Hub::of(&plain());
    (hub.state().cut, hub.state().ignore_ranges) = (Some(50_000), true);
    let ran = hub.pull();
    assert_eq!(ran.code, 0, "{}", ran.err);
}

/// Damaged bytes are told and thrown away, and do not spoil the next attempt.
#[test]
fn damaged_files_are_named() {
    let hub = Hub::of(&plain());
    hub.state().damage = usize::MAX;
    let ran = hub.pull();
    assert!(ran.failed_with("pull-checksum").err.contains(".safetensors"), "{}", ran.err);
    assert!(!hub.repo().join("snapshots").exists());
    hub.state().damage = 0;
    assert_eq!(hub.pull().code, 0);
}

/// A token goes to the hub and to no other host.
#[test]
fn tokens_stay_with_the_hub() {
    let hub = Hub::of(&plain());
    hub.state().elsewhere = true;
    let ran = hub.run(&["pull", REPO, "--json"], &[("HF_TOKEN", "secret")]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    for seen in &hub.state().seen {
        assert_eq!(seen.token.as_deref(), (!seen.path.starts_with("/elsewhere/")).then_some("Bearer secret"), "{seen:?}");
    }
    assert!(hub.state().seen.iter().any(|s| s.path.starts_with("/elsewhere/")));
}

/// Refusals say what they are and what to do.
#[test]
fn refusals_are_named() {
    let hub = Hub::of(&plain());
    for (status, code) in [(401, "pull-refused"), (403, "pull-refused"), (418, "pull-status"), (404, "pull-not-found")] {
        hub.state().status = Some(status);
        let ran = hub.pull();
        ran.failed_with(code);
        assert_eq!(ran.json()["error"]["code"], code);
    }
    assert!(hub.run(&["pull", REPO], &[("HF_TOKEN", "x")]).failed_with("pull-not-found").out.is_empty());
    hub.state().status = None;
    hub.run(&["pull", "org/model@v2"], &[]).failed_with("pull-not-found");
    hub.state().files.retain(|name, _| !is_large(name));
    hub.pull().failed_with("pull-no-weights");
    for wrong in ["model", "a/b/c", "org/model@", "org/model@../x", "../x@main"] {
        hub.run(&["pull", wrong], &[]).failed_with("usage");
    }
    hub.run(&["pull", REPO], &[("HF_ENDPOINT", "http://127.0.0.1:1")]).failed_with("pull-connection");
}

/// Of several GGUF models one is chosen, comes with all its parts and nothing else, and is found by the repository's name.
#[test]
fn gguf_models_are_chosen() {
    let bytes = |n: usize| vec![7u8; n];
    let names = ["m-Q4_K_M-00001-of-00002.gguf", "m-Q4_K_M-00002-of-00002.gguf", "m-Q8_0.gguf", "config.json"];
    let hub = Hub::start(names.iter().enumerate().map(|(i, name)| ((*name).to_owned(), bytes(i + 1))).collect());
    let ran = hub.pull();
    assert!(ran.failed_with("pull-choose").err.contains("m-Q4_K_M, m-Q8_0"), "{}", ran.err);
    let pulled = hub.run(&["pull", REPO, "--include", "*Q4_K_M*", "--json"], &[]).json();
    assert!(pulled["path"].as_str().unwrap().ends_with("m-Q4_K_M-00001-of-00002.gguf"), "{pulled}");
    assert_eq!((&pulled["files"], &pulled["bytes"]), (&json!(2), &json!(3)));
}
