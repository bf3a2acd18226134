//! Running the command and making checkpoints to break.
#![allow(dead_code, reason = "every test binary uses its own part")]

pub mod hub;
pub mod server;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// The repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The built-in model's folder.
pub fn tiny() -> PathBuf {
    root().join("models/tiny")
}

/// Golden checkpoints.
pub fn goldens() -> PathBuf {
    root().join("crates/mach-models/tests/goldens")
}

/// A golden checkpoint of plain weights.
pub fn plain() -> PathBuf {
    goldens().join("qwen3_5-base")
}

/// A command with a clean environment of settings.
pub fn command(args: &[&str]) -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_mach"));
    c.args(args).stdin(Stdio::null()).env("HF_HUB_CACHE", "/nonexistent/hub");
    for (name, _) in std::env::vars().filter(|(n, _)| n.starts_with("MACH_")) {
        c.env_remove(name);
    }
    c
}

/// What a run gave.
pub struct Ran {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Ran {
    pub fn of(output: Output) -> Self {
        let text = |b: Vec<u8>| String::from_utf8_lossy(&b).into_owned();
        Self { code: output.status.code().unwrap_or(-1), out: text(output.stdout), err: text(output.stderr) }
    }

    /// stdout as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|e| panic!("{e}: stdout {:?}, stderr {}", self.out, self.err))
    }

    /// The run failed with this code, on stderr and in JSON, without a panic.
    pub fn failed_with(&self, code: &str) -> &Self {
        assert!(self.err.contains(&format!("error[{code}]: ")), "expected {code}, got {}\n{}", self.err, self.out);
        assert!(!self.err.contains("panicked") && !self.err.contains("error[internal]"), "{}", self.err);
        assert_eq!(self.code, if code == "usage" { 2 } else { 1 }, "{}", self.err);
        self
    }
}

/// Runs the command.
pub fn mach(args: &[&str]) -> Ran {
    Ran::of(command(args).output().unwrap())
}

/// Copies a folder.
pub fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().flatten() {
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// Flips one byte of a file.
pub fn flip(path: &Path, at: usize) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[at] ^= 0x10;
    std::fs::write(path, bytes).unwrap();
}

/// Changes a JSON file.
pub fn edit_json(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut value: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    change(&mut value);
    std::fs::write(path, value.to_string()).unwrap();
}

/// A path as an argument.
pub fn arg(path: &Path) -> &str {
    path.to_str().unwrap()
}
