//! Chat templates against what transformers rendered (goldens/make_template_goldens.py), and where they come from.

mod common;

use common::{golden, here, no_tokens};
use mach_text::{ChatTemplate, TextError, Tokenizer};
use serde_json::{Map, Value, json};

/// Every conversation gives the same bytes, or the same refusal, through the built-in model's template and three others.
#[test]
fn conversations_render_as_transformers_renders_them() {
    common::compare_renderings(&golden("templates.json"), |name| {
        let path = match name {
            "tiny" => here("../../models/tiny/chat_template.jinja"),
            name => here(&format!("tests/goldens/{name}.jinja")),
        };
        let mut tokens = Map::new();
        tokens.insert("bos_token".to_owned(), "<bos>".into());
        ChatTemplate::new(&std::fs::read_to_string(path).unwrap(), tokens).unwrap()
    });
}

/// DeepSeek-V4 has no template: its encoder gives the same bytes as one written from its rules in Python (goldens/make_deepseek_goldens.py),
/// in chat and thinking mode; a checkpoint's own template wins over it.
#[test]
fn deepseek_v4_is_encoded_in_code() {
    common::compare_renderings(&golden("deepseek_v4.json"), |name| ChatTemplate::built_in(name).unwrap());
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(here("../../models/tiny/tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
    std::fs::write(dir.path().join("config.json"), r#"{"model_type": "deepseek_v4"}"#).unwrap();
    let open = || ChatTemplate::open(dir.path(), &Tokenizer::open(dir.path()).unwrap()).unwrap();
    assert_eq!(render(&open(), None).unwrap(), "<｜begin▁of▁sentence｜><｜User｜>x<｜Assistant｜></think>");
    std::fs::write(dir.path().join("chat_template.jinja"), "file").unwrap();
    assert_eq!(render(&open(), None).unwrap(), "file");
    for messages in [json!([3]), json!([{"role": "critic"}]), json!([{"role": "user", "content": [1]}])] {
        let refused = ChatTemplate::built_in("deepseek_v4").unwrap().render(&messages, None, &no_tokens(), true);
        assert!(matches!(refused, Err(TextError::BadMessages(_))), "{refused:?}");
    }
}

/// The idioms that templates use mean what they mean in Python.
#[test]
fn idioms_mean_what_python_means() {
    let goldens = golden("templates.json");
    let messages = json!([{"role": "user", "content": "x"}]);
    let mut variables = Map::new();
    variables.insert("v".to_owned(), goldens["values"].clone());
    let mut wrong = Vec::new();
    for case in goldens["idioms"].as_array().unwrap() {
        let source = case["source"].as_str().unwrap();
        let got = ChatTemplate::new(source, no_tokens()).and_then(|t| t.render(&messages, None, &variables, false));
        if got.as_deref().ok() != case["text"].as_str() {
            wrong.push(format!("{source}\n  want {}\n  got  {got:?}", case["text"]));
        }
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
}

fn render(template: &ChatTemplate, tools: Option<&Value>) -> Result<String, TextError> {
    template.render(&json!([{"role": "user", "content": "x"}]), tools, &no_tokens(), true)
}

/// chat_template.jinja beats tokenizer_config.json; there a list of named templates is understood, `tool_use` serves tools; without any
/// the error names the directory.
#[test]
fn templates_are_found_where_checkpoints_keep_them() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(here("../../models/tiny/tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
    let open = |config: Value| {
        std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        ChatTemplate::open(dir.path(), &Tokenizer::open(dir.path()).unwrap())
    };
    assert!(matches!(open(json!({})), Err(TextError::NoTemplate(_))));
    let config = json!({"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": "{{ bos_token }}{{ eos_token }}{{ pad_token }}one"});
    assert_eq!(render(&open(config).unwrap(), None).unwrap(), "<s></s>one");
    let named = json!({"chat_template": [{"name": "tool_use", "template": "with {{ tools | length }}"}, {"name": "default", "template": "without"}]});
    let named = open(named).unwrap();
    assert_eq!(render(&named, None).unwrap(), "without");
    assert_eq!(render(&named, Some(&json!([{}, {}]))).unwrap(), "with 2");
    std::fs::write(dir.path().join("chat_template.jinja"), "file").unwrap();
    assert_eq!(render(&open(json!({"chat_template": "config"})).unwrap(), None).unwrap(), "file");
}

/// Thinking is switched by what a template understands, and a template without a switch or without degrees says so instead of doing as before.
#[test]
fn thinking_is_asked_for_in_the_templates_words() {
    let tiny = ChatTemplate::new(&std::fs::read_to_string(here("../../models/tiny/chat_template.jinja")).unwrap(), no_tokens()).unwrap();
    let deepseek = ChatTemplate::built_in("deepseek_v4").unwrap();
    let degrees = ChatTemplate::new("<|channel|><|message|>Reasoning: {{ reasoning_effort | default('medium') }}", no_tokens()).unwrap();
    let prompt = |template: &ChatTemplate, on: Option<bool>, effort: Option<&str>| {
        let variables = template.thinking(on, effort).map_err(|e| (e.code(), e.to_string()))?;
        Ok(template.render(&json!([{"role": "user", "content": "x"}]), None, &variables, true).unwrap())
    };
    let ends = |template: &ChatTemplate, on, effort, end: &str| {
        let prompt: Result<String, (&str, String)> = prompt(template, on, effort);
        assert!(prompt.as_ref().is_ok_and(|p| p.ends_with(end)), "{prompt:?} {end:?}");
    };
    ends(&tiny, Some(true), None, "<think>\n");
    for on in [None, Some(false)] {
        ends(&tiny, on, None, "</think>\n\n");
        ends(&deepseek, on, None, "</think>");
        ends(&degrees, None, None, "medium");
    }
    for effort in [None, Some("low"), Some("max")] {
        ends(&deepseek, Some(true), effort, "<think>");
        assert_eq!(prompt(&deepseek, None, effort).unwrap().contains("Absolute maximum"), effort == Some("max"));
    }
    ends(&degrees, None, Some("high"), "high");
    let refused = |template, on, effort| prompt(template, on, effort).unwrap_err();
    for on in [true, false] {
        let (code, message) = refused(&degrees, Some(on), None);
        assert!(code == "no-thinking-switch" && message.contains("reasoning effort"), "{message}");
    }
    let (code, message) = refused(&tiny, None, Some("high"));
    assert!(code == "no-reasoning-effort" && message.contains("on or off"), "{message}");
}

/// Errors carry the template's own words, or the place where it broke.
#[test]
fn template_errors_are_told_apart() {
    let template = |source: &str| ChatTemplate::new(source, no_tokens());
    assert!(matches!(template("{% if %}"), Err(TextError::TemplateSyntax(m)) if m.contains("line 1") || m.contains(":1")));
    let nested = template("{% macro m() %}{{ raise_exception('no ' ~ messages[0].role) }}{% endmacro %}{{ m() }}").unwrap();
    assert!(matches!(render(&nested, None), Err(TextError::TemplateRaised(m)) if m == "no user"));
    assert!(matches!(render(&template("{{ a.b }}").unwrap(), None), Err(TextError::TemplateFailed(_))));
    let plain = template("x").unwrap();
    assert!(matches!(plain.render(&json!("x"), None, &no_tokens(), false), Err(TextError::BadMessages(_))));
    assert!(matches!(render(&plain, Some(&json!("x"))), Err(TextError::BadMessages(_))));
}

/// `strftime_now` is the local date in the given form.
#[test]
fn templates_know_the_date() {
    let date = render(&ChatTemplate::new("{{ strftime_now('%Y-%m-%d|%B|%d %b %Y') }}", no_tokens()).unwrap(), None).unwrap();
    let (iso, rest) = date.split_once('|').unwrap();
    assert!(iso.len() == 10 && iso.starts_with("20") && rest.ends_with(&iso[..4]), "{date}");
}
