//! The templates that checkpoints of the five families are shipped with, from the source package of llama-cpp-python, against transformers.
//! Fetched into `.cache/`; runs with `MACH_NET_TESTS=1`.

mod common;

use std::path::PathBuf;
use std::process::Command;

use common::{fetched, goldens, here, python, run};
use mach_text::{CallFormat, ChatTemplate, ReasoningFormat, ReplyFormat};
use serde_json::Map;

const VERSION: &str = "0.3.36";

/// The folder of the package's templates.
fn templates(python: &std::path::Path) -> Option<PathBuf> {
    let folder = fetched(here("../../.cache/templates").join(format!("llama_cpp_python-{VERSION}")), |folder| {
        let package = format!("llama-cpp-python=={VERSION}");
        run(Command::new(python).args(["-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python", &package]).current_dir(folder))?;
        let archive = format!("llama_cpp_python-{VERSION}.tar.gz");
        run(Command::new("tar").args(["xzf", &archive, "--strip-components=1", "--wildcards", "*/models/templates/*"]).current_dir(folder))?;
        std::fs::remove_file(folder.join(archive)).ok()
    })?;
    Some(folder.join("vendor/llama.cpp/models/templates"))
}

/// `switch` and `degrees`: whether the template turns thinking on and off, and whether it takes an effort.
fn check(name: &str, format: ReplyFormat, (switch, degrees): (bool, bool)) {
    if std::env::var("MACH_NET_TESTS").as_deref() != Ok("1") {
        eprintln!("skipped: {name} is fetched only with MACH_NET_TESTS=1");
        return;
    }
    let Some((python, folder)) = python().and_then(|python| Some((python.clone(), templates(&python)?))) else {
        eprintln!("skipped: {name} needs pip, tar and a Python with transformers and jinja2 (MACH_PYTHON)");
        return;
    };
    let path = folder.join(name);
    let source = std::fs::read_to_string(&path).unwrap();
    let mut tokens = Map::new();
    tokens.insert("bos_token".to_owned(), "<bos>".into());
    let template = || ChatTemplate::new(&source, tokens.clone()).unwrap();
    assert_eq!(template().reply_format(), format);
    assert_eq!((template().thinking(Some(true), None).is_ok(), template().thinking(None, Some("high")).is_ok()), (switch, degrees), "{name}");
    let rendered = goldens(&python, "make_template_goldens.py", &[&path]).expect("transformers renders");
    let whole = rendered["rendered"].as_array().unwrap().iter().filter(|case| case["text"].is_string()).count();
    assert!(whole >= 15, "{whole} conversations are rendered");
    common::compare_renderings(&rendered, |_| template());
}

fn tagged(reasoning: Option<ReasoningFormat>, calls: CallFormat) -> ReplyFormat {
    ReplyFormat::Tagged { reasoning, calls: Some(calls) }
}

/// XML of tools by macros, calls in tags.
#[test]
fn qwen3_coder() {
    check("Qwen3-Coder.jinja", tagged(None, CallFormat::QwenXml), (false, false));
}

/// Reasoning of the last turns kept.
#[test]
fn qwen3_5() {
    check("Qwen3.5-4B.jinja", tagged(Some(ReasoningFormat::Think), CallFormat::QwenXml), (true, false));
}

/// Tools as type declarations, the date, channels.
#[test]
fn gpt_oss() {
    check("openai-gpt-oss-120b.jinja", ReplyFormat::Harmony, (false, true));
}

/// Recursive macros over schemas, sorted keys, results inside the model's turn.
#[test]
fn gemma_4() {
    check("google-gemma-4-31B-it.jinja", tagged(Some(ReasoningFormat::Channel), CallFormat::Gemma), (true, false));
    check("google-gemma-4-31B-it-interleaved.jinja", tagged(Some(ReasoningFormat::Channel), CallFormat::Gemma), (true, false));
}

/// The templates that GGUF files of DeepSeek-V4 carry.
#[test]
fn deepseek_v4() {
    check("deepseek-ai-DeepSeek-V4.jinja", tagged(Some(ReasoningFormat::Think), CallFormat::Dsml), (true, true));
    check("deepseek-ai-DeepSeek-V4-Flash-0731.jinja", tagged(Some(ReasoningFormat::Think), CallFormat::Dsml), (true, true));
}
