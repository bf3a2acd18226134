//! Runs openai_sdk.py, the checks with the official openai Python SDK.

use std::path::{Path, PathBuf};
use std::process::Command;

/// A Python that has the SDK: `MACH_PYTHON`, else the one that `.ci/run` sets up.
fn python(crates: &Path) -> Option<PathBuf> {
    let ours = crates.join("../.cache/venv/bin/python");
    let candidates = std::env::var_os("MACH_PYTHON").map(PathBuf::from).into_iter().chain([ours]);
    candidates.into_iter().find(|p| Command::new(p).args(["-c", "import openai"]).output().is_ok_and(|o| o.status.success()))
}

/// Every check against the server at `url`; says so and does nothing where there is no SDK.
pub fn check(url: &str, flags: &[&str]) {
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let Some(python) = python(&crates) else {
        eprintln!("skipped: no Python with the openai package (set MACH_PYTHON, or run .ci/run test once)");
        return;
    };
    let output = Command::new(python).arg(crates.join("mach-server/tests/openai_sdk.py")).arg(url).args(flags).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{out}{err}");
    assert!(out.contains("check_eight_at_once: ok"), "{out}");
}
