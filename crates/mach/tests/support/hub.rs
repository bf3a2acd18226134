//! A Hugging Face hub on this machine that cuts connections, damages bytes and refuses.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard};

use serde_json::{Value, json};
use sha1::Digest as _;

use super::{Ran, command};

/// The folder of blobs of [`REPO`] under `HF_HOME`.
const BLOBS: &str = "hub/models--org--model/blobs";
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
pub const REPO: &str = "org/model";

/// A request as the server saw it.
#[derive(Clone, Debug)]
pub struct Seen {
    pub path: String,
    pub from: u64,
    /// Where a range ends, when the request says so.
    pub to: Option<u64>,
    pub token: Option<String>,
}

#[derive(Default)]
pub struct State {
    pub files: HashMap<String, Vec<u8>>,
    /// Bytes of a large file after which its connection ends.
    pub cut: Option<usize>,
    /// Further answers to large files that end before their first byte.
    pub silent: bool,
    pub ignore_ranges: bool,
    /// So many answers with the end of a large file have a wrong last byte.
    pub damage: usize,
    /// Answer everything with this.
    pub status: Option<u16>,
    /// Large files are elsewhere.
    pub elsewhere: bool,
    /// A large file of which half is sent, and no more.
    pub stall: Option<String>,
    /// Half of it was sent.
    pub stalled: bool,
    pub seen: Vec<Seen>,
    /// Most bytes of large files that were in the cache when something was asked for or had been sent.
    pub most: u64,
}

/// The hub, as far as a download needs it.
pub struct Hub {
    port: u16,
    state: Arc<Mutex<State>>,
    pub home: tempfile::TempDir,
}

impl Hub {
    /// Serves the files of a checkpoint.
    pub fn of(dir: &Path) -> Self {
        let files = std::fs::read_dir(dir).unwrap().flatten();
        Self::start(files.map(|f| (f.file_name().to_string_lossy().into_owned(), std::fs::read(f.path()).unwrap())).collect())
    }

    pub fn start(files: HashMap<String, Vec<u8>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let state = Arc::new(Mutex::new(State { files, ..State::default() }));
        let (shared, home) = (state.clone(), tempfile::tempdir().unwrap());
        let blobs = home.path().join(BLOBS);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (shared, blobs) = (shared.clone(), blobs.clone());
                std::thread::spawn(move || answer(stream, port, &shared, &blobs));
            }
        });
        Self { port, state, home }
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// The command, with this server as its hub.
    pub fn command(&self, args: &[&str], env: &[(&str, &str)]) -> Command {
        let mut command = command(args);
        command.env_remove("HF_HUB_CACHE").env("HF_HOME", self.home.path()).env("HF_ENDPOINT", format!("http://127.0.0.1:{}/", self.port));
        for name in ["HF_TOKEN", "HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"] {
            command.env_remove(name);
        }
        command.envs(env.iter().copied());
        command
    }

    pub fn run(&self, args: &[&str], env: &[(&str, &str)]) -> Ran {
        Ran::of(self.command(args, env).output().unwrap())
    }

    pub fn pull(&self) -> Ran {
        self.run(&["pull", REPO, "--json"], &[])
    }

    pub fn repo(&self) -> PathBuf {
        self.home.path().join(BLOBS).parent().unwrap().to_owned()
    }

    /// What stands in the folder of blobs.
    pub fn blobs(&self) -> Vec<String> {
        let mut names: Vec<String> =
            std::fs::read_dir(self.repo().join("blobs")).into_iter().flatten().flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

pub fn is_large(name: &str) -> bool {
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

/// Bytes of large files in a folder of blobs: their names are longer.
fn large_bytes(blobs: &Path) -> u64 {
    let entries = std::fs::read_dir(blobs).into_iter().flatten().flatten();
    let large = entries.filter(|e| e.file_name().to_string_lossy().trim_end_matches(".incomplete").len() == 64);
    large.filter_map(|e| e.metadata().ok()).map(|m| m.len()).sum()
}

fn answer(mut stream: TcpStream, port: u16, state: &Mutex<State>, blobs: &Path) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
    let path = lines.next().unwrap_or_default().split(' ').nth(1).unwrap_or_default().to_owned();
    let headers: HashMap<String, String> =
        lines.take_while(|l| !l.is_empty()).filter_map(|l| l.split_once(": ").map(|(k, v)| (k.to_lowercase(), v.to_owned()))).collect();
    let range = headers.get("range").and_then(|r| r.strip_prefix("bytes=")?.split_once('-'));
    let from: u64 = range.map_or(0, |(from, _)| from.parse().unwrap());
    let to: Option<u64> = range.and_then(|(_, last)| last.parse().ok()).map(|last: u64| last + 1);
    let mut state_now = state.lock().unwrap();
    state_now.most = state_now.most.max(large_bytes(blobs));
    state_now.seen.push(Seen { path: path.clone(), from, to, token: headers.get("authorization").cloned() });
    let mut reply = |head: String, body: &[u8]| {
        let _ = stream.write_all(format!("HTTP/1.1 {head}\r\nConnection: close\r\n\r\n").as_bytes()).and_then(|()| stream.write_all(body));
    };
    if let Some(status) = state_now.status {
        return reply(format!("{status} X\r\nContent-Length: 0"), b"");
    }
    if path == format!("/api/models/{REPO}/revision/main?blobs=true") {
        let body = listing(&state_now.files).to_string();
        return reply(format!("200 OK\r\nContent-Length: {}", body.len()), body.as_bytes());
    }
    let Some(name) = path.strip_prefix(&format!("/{REPO}/resolve/{COMMIT}/")).or(path.strip_prefix("/elsewhere/")) else {
        return reply("404 X\r\nX-Error-Code: RevisionNotFound\r\nContent-Length: 0".to_owned(), b"");
    };
    let large = is_large(name);
    if large && state_now.elsewhere && !path.starts_with("/elsewhere/") {
        return reply(format!("302 Found\r\nLocation: http://localhost:{port}/elsewhere/{name}\r\nContent-Length: 0"), b"");
    }
    let mut bytes = state_now.files[name].clone();
    let all = bytes.len();
    let (from, end) = if state_now.ignore_ranges { (0, all) } else { (from as usize, to.map_or(all, |to| all.min(to as usize))) };
    let head = match (from, end) {
        (0, end) if end == all => format!("200 OK\r\nContent-Length: {all}"),
        (from, end) => format!("206 Partial Content\r\nContent-Range: bytes {from}-{}/{all}\r\nContent-Length: {}", end - 1, end - from),
    };
    let limit = match (large, state_now.cut, state_now.silent && from > 0) {
        (true, _, true) => 0,
        (true, Some(cut), _) => cut,
        _ => usize::MAX,
    };
    if state_now.ignore_ranges {
        // Only the first connection of a file is cut.
        state_now.cut = None;
    }
    let sent = (end - from).min(limit);
    if large && to.is_none() && from + sent == all && state_now.damage > 0 {
        state_now.damage -= 1;
        bytes[all - 1] ^= 1;
    }
    if to.is_none() && state_now.stall.as_deref() == Some(name) {
        drop(state_now);
        reply(head, &bytes[from..from + sent / 2]);
        state.lock().unwrap().stalled = true;
        while state.lock().unwrap().stall.is_some() {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        return;
    }
    reply(head, &bytes[from..from + sent]);
    state_now.most = state_now.most.max(large_bytes(blobs));
}
