//! Chat templates against what transformers rendered (goldens/make_template_goldens.py).

use std::path::PathBuf;

use mach_text::{ChatTemplate, TextError};
use serde_json::{Map, Value};

fn here(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn goldens() -> Value {
    serde_json::from_slice(&std::fs::read(here("tests/goldens/templates.json")).unwrap()).unwrap()
}

fn kwargs(extra: &Value) -> Map<String, Value> {
    extra.as_object().cloned().unwrap_or_default()
}

/// Every conversation gives the same bytes, or the same refusal, through the built-in model's template and three others.
#[test]
fn conversations_render_as_transformers_renders_them() {
    let goldens = goldens();
    let mut wrong = Vec::new();
    for case in goldens["rendered"].as_array().unwrap() {
        let template = case["template"].as_str().unwrap();
        let path = match template {
            "tiny" => here("../../models/tiny/chat_template.jinja"),
            name => here(&format!("tests/goldens/{name}.jinja")),
        };
        let mut tokens = Map::new();
        tokens.insert("bos_token".to_owned(), "<bos>".into());
        let compiled = ChatTemplate::new(&std::fs::read_to_string(path).unwrap(), tokens).unwrap();
        let conversation = &goldens["conversations"][case["conversation"].as_str().unwrap()];
        let prompt = case["add_generation_prompt"].as_bool().unwrap();
        let got = compiled.render(&conversation["messages"], conversation.get("tools"), &kwargs(&conversation["kwargs"]), prompt);
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

/// The idioms that templates use mean what they mean in Python.
#[test]
fn idioms_mean_what_python_means() {
    let goldens = goldens();
    let messages = serde_json::json!([{"role": "user", "content": "x"}]);
    let mut variables = Map::new();
    variables.insert("v".to_owned(), goldens["values"].clone());
    let mut wrong = Vec::new();
    for case in goldens["idioms"].as_array().unwrap() {
        let source = case["source"].as_str().unwrap();
        let got = ChatTemplate::new(source, Map::new()).and_then(|t| t.render(&messages, None, &variables, false));
        if got.as_deref().ok() != case["text"].as_str() {
            wrong.push(format!("{source}\n  want {}\n  got  {got:?}", case["text"]));
        }
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
}
