//! Comparing with what transformers gave.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use mach_text::{ChatTemplate, TextDecoder, TextError, Tokenizer};
use serde_json::{Map, Value};

pub fn here(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(path)
}

pub fn golden(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(here("tests/goldens").join(name)).unwrap()).unwrap()
}

/// Every case of `goldens.rendered` through the template that `compiled` gives for its name; reports what differs.
pub fn compare_renderings(goldens: &Value, mut compiled: impl FnMut(&str) -> ChatTemplate) {
    let mut wrong = Vec::new();
    for case in goldens["rendered"].as_array().unwrap() {
        let template = compiled(case["template"].as_str().unwrap());
        let conversation = &goldens["conversations"][case["conversation"].as_str().unwrap()];
        let kwargs = conversation["kwargs"].as_object().cloned().unwrap_or_default();
        let prompt = case["add_generation_prompt"].as_bool().unwrap();
        let got = template.render(&conversation["messages"], conversation.get("tools"), &kwargs, prompt);
        let same = match &got {
            Ok(text) => case["text"] == text.as_str(),
            Err(TextError::TemplateRaised(message)) => case["raised"] == message.as_str(),
            Err(TextError::TemplateFailed(_)) => case["failed"] == true,
            Err(_) => false,
        };
        if !same {
            wrong.push(format!("{case}\n  got {got:?}"));
        }
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
}

/// Every text to the same ids, every sequence of ids to the same text, at once and piece by piece.
pub fn compare_tokens(goldens: &Value, tokenizer: &Arc<Tokenizer>) {
    let ids = |v: &Value| v.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect::<Vec<_>>();
    for case in goldens["encoded"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        assert_eq!(tokenizer.encode(text, false).unwrap(), ids(&case["plain"]), "{text:?}");
        assert_eq!(tokenizer.encode(text, true).unwrap(), ids(&case["with_special"]), "{text:?}");
    }
    for case in goldens["decoded"].as_array().unwrap() {
        let ids = ids(&case["ids"]);
        let want = case["text"].as_str().unwrap();
        assert_eq!(tokenizer.decode(&ids), want, "{ids:?}");
        let mut decoder = TextDecoder::new(tokenizer.clone());
        let mut text = String::new();
        for &id in &ids {
            text.push_str(&decoder.push(id));
            assert!(want.starts_with(&text), "{text:?} is taken back in {want:?}");
        }
        text.push_str(&decoder.finish());
        assert_eq!(text, want, "{ids:?}");
    }
}

pub fn no_tokens() -> Map<String, Value> {
    Map::new()
}

/// What a command printed; `None`, with its complaint on stderr, when it failed.
pub fn run(command: &mut Command) -> Option<Vec<u8>> {
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

/// A folder of the cache that is fetched once. `fill` gets an empty folder, which takes its place when all is there; tests run at the same
/// time, in processes of their own, so the others wait for the first.
pub fn fetched(folder: PathBuf, fill: impl FnOnce(&Path) -> Option<()>) -> Option<PathBuf> {
    let cache = folder.parent()?;
    std::fs::create_dir_all(cache).ok()?;
    let lock = std::fs::File::create(cache.join(".lock")).ok()?;
    lock.lock().ok()?;
    if !folder.exists() {
        let part = tempfile::tempdir_in(cache).ok()?;
        fill(part.path())?;
        std::fs::rename(part.path(), &folder).ok()?;
    }
    Some(folder)
}

/// A Python with transformers.
pub fn python() -> Option<PathBuf> {
    let candidates = std::env::var_os("MACH_PYTHON").map(PathBuf::from).into_iter().chain([here("../../.cache/venv/bin/python")]);
    candidates.into_iter().find(|p| Command::new(p).args(["-c", "import transformers, jinja2"]).output().is_ok_and(|o| o.status.success()))
}

/// What a script of `tests/goldens` printed.
pub fn goldens(python: &Path, script: &str, arguments: &[&Path]) -> Option<Value> {
    let out = run(Command::new(python).arg(here("tests/goldens").join(script)).args(arguments))?;
    serde_json::from_slice(&out).ok()
}
