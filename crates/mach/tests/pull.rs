//! `mach pull` against a server on this machine that cuts connections, damages bytes and refuses.

mod support;

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use serde_json::{Value, json};
use sha1::Digest as _;
use support::{Ran, command, plain};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const REPO: &str = "org/model";

/// A request as the server saw it.
#[derive(Clone, Debug)]
struct Seen {
    path: String,
    from: u64,
    token: Option<String>,
}

#[derive(Default)]
struct State {
    files: HashMap<String, Vec<u8>>,
    /// Bytes of a large file after which its connection ends.
    cut: Option<usize>,
    /// Further answers to large files that end before their first byte.
    silent: bool,
    ignore_ranges: bool,
    damage: bool,
    /// Answer everything with this.
    status: Option<u16>,
    /// Large files are elsewhere.
    elsewhere: bool,
    seen: Vec<Seen>,
}

/// The hub, as far as a download needs it.
struct Hub {
    port: u16,
    state: Arc<Mutex<State>>,
    home: tempfile::TempDir,
}

impl Hub {
    /// Serves the files of a checkpoint.
    fn of(dir: &Path) -> Self {
        let files = std::fs::read_dir(dir).unwrap().flatten();
        Self::start(files.map(|f| (f.file_name().to_string_lossy().into_owned(), std::fs::read(f.path()).unwrap())).collect())
    }

    fn start(files: HashMap<String, Vec<u8>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let state = Arc::new(Mutex::new(State { files, ..State::default() }));
        let shared = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = shared.clone();
                std::thread::spawn(move || answer(stream, port, &shared));
            }
        });
        Self { port, state, home: tempfile::tempdir().unwrap() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn run(&self, args: &[&str], env: &[(&str, &str)]) -> Ran {
        let mut command = command(args);
        command.env_remove("HF_HUB_CACHE").env("HF_HOME", self.home.path()).env("HF_ENDPOINT", format!("http://127.0.0.1:{}/", self.port));
        for name in ["HF_TOKEN", "HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"] {
            command.env_remove(name);
        }
        Ran::of(command.envs(env.iter().copied()).output().unwrap())
    }

    fn pull(&self) -> Ran {
        self.run(&["pull", REPO, "--json"], &[])
    }

    fn repo(&self) -> PathBuf {
        self.home.path().join("hub/models--org--model")
    }

    /// What stands in the folder of blobs.
    fn blobs(&self) -> Vec<String> {
        let mut names: Vec<String> =
            std::fs::read_dir(self.repo().join("blobs")).into_iter().flatten().flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn is_large(name: &str) -> bool {
    name.ends_with(".safetensors") || name.ends_with(".gguf")
}

fn listing(files: &HashMap<String, Vec<u8>>) -> Value {
    let sibling = |(name, bytes): (&String, &Vec<u8>)| {
        let mut git = sha1::Sha1::new();
        git.update(format!("blob {}\0", bytes.len()));
        git.update(bytes);
        let mut entry = json!({"rfilename": name, "size": bytes.len(), "blobId": hex(&git.finalize())});
        if is_large(name) {
            entry["lfs"] = json!({"sha256": hex(&sha2::Sha256::digest(bytes)), "size": bytes.len(), "pointerSize": 130});
        }
        entry
    };
    json!({"sha": COMMIT, "siblings": files.iter().map(sibling).collect::<Vec<_>>()})
}

fn answer(mut stream: TcpStream, port: u16, state: &Mutex<State>) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
    let path = lines.next().unwrap_or_default().split(' ').nth(1).unwrap_or_default().to_owned();
    let headers: HashMap<String, String> =
        lines.take_while(|l| !l.is_empty()).filter_map(|l| l.split_once(": ").map(|(k, v)| (k.to_lowercase(), v.to_owned()))).collect();
    let from = headers.get("range").map_or(0, |r| r.trim_start_matches("bytes=").trim_end_matches('-').parse().unwrap());
    let mut state = state.lock().unwrap();
    state.seen.push(Seen { path: path.clone(), from, token: headers.get("authorization").cloned() });
    let mut reply = |head: String, body: &[u8]| {
        let _ = stream.write_all(format!("HTTP/1.1 {head}\r\nConnection: close\r\n\r\n").as_bytes()).and_then(|()| stream.write_all(body));
    };
    if let Some(status) = state.status {
        return reply(format!("{status} X\r\nContent-Length: 0"), b"");
    }
    if path == format!("/api/models/{REPO}/revision/main?blobs=true") {
        let body = listing(&state.files).to_string();
        return reply(format!("200 OK\r\nContent-Length: {}", body.len()), body.as_bytes());
    }
    let Some(name) = path.strip_prefix(&format!("/{REPO}/resolve/{COMMIT}/")).or(path.strip_prefix("/elsewhere/")) else {
        return reply("404 X\r\nX-Error-Code: RevisionNotFound\r\nContent-Length: 0".to_owned(), b"");
    };
    let large = is_large(name);
    if large && state.elsewhere && !path.starts_with("/elsewhere/") {
        return reply(format!("302 Found\r\nLocation: http://localhost:{port}/elsewhere/{name}\r\nContent-Length: 0"), b"");
    }
    let mut bytes = state.files[name].clone();
    if state.damage && large {
        *bytes.last_mut().unwrap() ^= 1;
    }
    let from = if state.ignore_ranges { 0 } else { from as usize };
    let head = match from {
        0 => format!("200 OK\r\nContent-Length: {}", bytes.len()),
        n => format!("206 Partial Content\r\nContent-Range: bytes {n}-{}/{}\r\nContent-Length: {}", bytes.len() - 1, bytes.len(), bytes.len() - n),
    };
    let limit = match (large, state.cut, state.silent && from > 0) {
        (true, _, true) => 0,
        (true, Some(cut), _) => cut,
        _ => usize::MAX,
    };
    if state.ignore_ranges {
        // Only the first connection of a file is cut.
        state.cut = None;
    }
    let rest = &bytes[from..];
    reply(head, &rest[..rest.len().min(limit)]);
}

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
    hub.state().damage = true;
    let ran = hub.pull();
    assert!(ran.failed_with("pull-checksum").err.contains(".safetensors"), "{}", ran.err);
    assert!(!hub.repo().join("snapshots").exists());
    hub.state().damage = false;
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
