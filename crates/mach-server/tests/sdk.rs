//! The official openai Python SDK against a server in this process.

mod common;

use std::path::PathBuf;
use std::process::Command;

/// A Python that has the SDK: `MACH_PYTHON`, else the one that `.ci/run` sets up.
fn python() -> Option<PathBuf> {
    let ours = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../.cache/venv/bin/python");
    let candidates = std::env::var_os("MACH_PYTHON").map(PathBuf::from).into_iter().chain([ours]);
    candidates.into_iter().find(|p| Command::new(p).args(["-c", "import openai"]).output().is_ok_and(|o| o.status.success()))
}

/// Everything that clients built on the SDK do works: see openai_sdk.py.
#[test]
fn the_openai_sdk_is_served() {
    let Some(python) = python() else {
        eprintln!("skipped: no Python with the openai package (set MACH_PYTHON, or run .ci/run once)");
        return;
    };
    let server = common::Fixture::start();
    let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/openai_sdk.py");
    let output = Command::new(python).arg(script).arg(server.url()).arg("--scripted").output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{out}{err}");
    assert!(out.contains("check_eight_at_once: ok"), "{out}");
}
