//! Chat templates, rendered to the byte as `transformers` renders them.

use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Error, ErrorKind, Value};
use serde_json::{Map, Value as Json};

use crate::deepseek_v4;
use crate::error::TextError;
use crate::python;
use crate::reply::{CallFormat, ReasoningFormat, ReplyFormat};
use crate::tokenizer::{Tokenizer, read_json};

const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";
/// Variables by which templates are told how much the model is to think.
const SWITCH: &str = "enable_thinking";
const EFFORT: &str = "reasoning_effort";

/// How a checkpoint's conversations become text: a compiled template, or an encoder in code where there is none.
pub struct ChatTemplate {
    encoder: Encoder,
    reply_format: ReplyFormat,
}

enum Encoder {
    Jinja {
        env: Box<Environment<'static>>,
        /// Variables that every rendering sees.
        tokens: Map<String, Json>,
        source: String,
    },
    DeepseekV4,
}

/// Carries the message of `raise_exception` through the template engine's error.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

impl ChatTemplate {
    /// Opens the template of a checkpoint: `chat_template.jinja`, else `chat_template` of `tokenizer_config.json` (one text, or a list
    /// of named ones of which `default` and `tool_use` count). DeepSeek-V4 comes without; its encoder is built in.
    ///
    /// # Errors
    /// [`TextError::NoTemplate`] when there is none, [`TextError::TemplateSyntax`], [`TextError::Read`], [`TextError::Invalid`].
    pub fn open(dir: &Path, tokenizer: &Tokenizer) -> Result<Self, TextError> {
        let path = dir.join("chat_template.jinja");
        let sources = match std::fs::read_to_string(&path) {
            Ok(source) => vec![(DEFAULT.to_owned(), source)],
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                let config = read_json(&dir.join("tokenizer_config.json"))?.unwrap_or_default();
                named_sources(&config["chat_template"])
            }
            Err(source) => return Err(TextError::Read { path, source }),
        };
        if sources.is_empty() {
            let config = read_json(&dir.join("config.json"))?.unwrap_or_default();
            return Self::built_in(config["model_type"].as_str().unwrap_or_default()).ok_or_else(|| TextError::NoTemplate(dir.into()));
        }
        Self::compile(sources, tokenizer.named_tokens().clone())
    }

    /// A template from its source. `tokens` are variables that every rendering sees (`bos_token` …).
    ///
    /// # Errors
    /// [`TextError::TemplateSyntax`].
    pub fn new(source: &str, tokens: Map<String, Json>) -> Result<Self, TextError> {
        Self::compile(vec![(DEFAULT.to_owned(), source.to_owned())], tokens)
    }

    /// The encoder of a model type whose checkpoints bring no template.
    pub fn built_in(model_type: &str) -> Option<Self> {
        let reply_format = ReplyFormat::Tagged { reasoning: Some(ReasoningFormat::Think), calls: Some(CallFormat::Dsml) };
        (model_type == "deepseek_v4").then_some(Self { encoder: Encoder::DeepseekV4, reply_format })
    }

    fn compile(sources: Vec<(String, String)>, tokens: Map<String, Json>) -> Result<Self, TextError> {
        let mut env = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        env.set_syntax(syntax.map_err(|e| TextError::TemplateSyntax(describe(&e)))?);
        env.set_unknown_method_callback(python::method);
        env.set_formatter(|out, _, value| out.write_str(&python::str_of(value)).map_err(Error::from));
        env.add_filter("tojson", python::tojson);
        env.add_filter("from_json", python::from_json);
        env.add_filter("trim", python::trim);
        env.add_filter("string", |value: &Value| if value.as_str().is_some() { value.clone() } else { python::str_of(value).into() });
        env.add_test("sequence", python::is_sequence);
        env.add_test("iterable", python::is_iterable);
        env.add_function("raise_exception", |message: &Value| -> Result<Value, Error> {
            let raised = Raised(message.to_string());
            Err(Error::new(ErrorKind::InvalidOperation, raised.0.clone()).with_source(raised))
        });
        // The moment at which the template was opened: a date that changed at midnight would change every prompt from its first line on, and
        // no state that was computed for one would be of use again.
        let opened = jiff::Zoned::now();
        env.add_function("strftime_now", move |format: &str| -> Result<String, Error> {
            jiff::fmt::strtime::format(format, &opened).map_err(|e| Error::new(ErrorKind::InvalidOperation, e.to_string()))
        });
        let source = sources[0].1.clone();
        // The one for tools may be the only one that shows how calls are written.
        let reply_format = ReplyFormat::detect(&sources.iter().map(|(_, text)| text.as_str()).collect::<String>());
        for (name, text) in sources {
            env.add_template_owned(name, without_generation_tags(&text)).map_err(|e| TextError::TemplateSyntax(describe(&e)))?;
        }
        Ok(Self { encoder: Encoder::Jinja { env: Box::new(env), tokens, source }, reply_format })
    }

    /// The template's source (the default one where there are several); empty for an encoder in code.
    pub fn source(&self) -> &str {
        match &self.encoder {
            Encoder::Jinja { source, .. } => source,
            Encoder::DeepseekV4 => "",
        }
    }

    /// How the model marks reasoning and calls in its replies.
    pub fn reply_format(&self) -> ReplyFormat {
        self.reply_format
    }

    /// Renders a conversation. `kwargs` are further variables (`enable_thinking`); they win over the named tokens.
    ///
    /// As `transformers` does, message keys that are null are left out, and `reasoning_content` is filled from `thinking` or `reasoning`.
    ///
    /// # Errors
    /// [`TextError::BadMessages`], [`TextError::TemplateRaised`] with the template's own words, [`TextError::TemplateFailed`].
    pub fn render(&self, messages: &Json, tools: Option<&Json>, kwargs: &Map<String, Json>, add_generation_prompt: bool) -> Result<String, TextError> {
        let Json::Array(messages) = messages else {
            return Err(TextError::BadMessages("messages must be an array".to_owned()));
        };
        let (env, tokens) = match &self.encoder {
            Encoder::Jinja { env, tokens, .. } => (env, tokens),
            Encoder::DeepseekV4 => return deepseek_v4::render(messages, tools, kwargs, add_generation_prompt),
        };
        let messages = messages.iter().enumerate().map(|(i, m)| message_value(i, m)).collect::<Result<Vec<_>, _>>()?;
        let tools = match tools {
            None | Some(Json::Null) => Value::from(()),
            Some(tools @ Json::Array(_)) => python::value_from_json(tools),
            Some(_) => return Err(TextError::BadMessages("tools must be an array".to_owned())),
        };
        let name = if !tools.is_none() && env.get_template(TOOL_USE).is_ok() { TOOL_USE } else { DEFAULT };
        let template = env.get_template(name).map_err(|e| TextError::TemplateFailed(describe(&e)))?;

        let mut variables = tokens.clone();
        variables.extend(kwargs.iter().map(|(k, v)| (k.clone(), v.clone())));
        let variables = variables.iter().map(|(k, v)| (k.clone(), python::value_from_json(v)));
        let fixed = [
            ("messages", Value::from(messages)),
            ("tools", tools),
            ("documents", Value::from(())),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
        ];
        let context = Value::from_pairs(variables.chain(fixed.into_iter().map(|(k, v)| (k.to_owned(), v))));
        template.render(context).map_err(|e| match raised(&e) {
            Some(message) => TextError::TemplateRaised(message),
            None => TextError::TemplateFailed(describe(&e)),
        })
    }

    /// The variables that ask this template for thinking (`on`) and for a degree of it, which asks for thinking too. What is `None` stays as
    /// the template has it. The templates of Qwen, Gemma 4 and DeepSeek-V4 share the switch `enable_thinking`, gpt-oss has `reasoning_effort`
    /// (`low`, `medium`, `high`), DeepSeek-V4 both.
    ///
    /// # Errors
    /// [`TextError::NoThinkingSwitch`], [`TextError::NoReasoningEffort`] when the template writes the same prompt either way; those of
    /// [`ChatTemplate::render`].
    pub fn thinking(&self, on: Option<bool>, effort: Option<&str>) -> Result<Map<String, Json>, TextError> {
        let question = serde_json::json!([{"role": "user", "content": "?"}]);
        // Degrees may count only while thinking is on, so both are tried with it.
        let prompt = |on: bool, effort: &str| {
            let asked = [(SWITCH, Json::from(on)), (EFFORT, effort.into())].map(|(name, value)| (name.to_owned(), value));
            self.render(&question, None, &asked.into_iter().collect(), true)
        };
        let reference = prompt(true, "low")?;
        let (has_switch, has_effort) = (prompt(false, "low")? != reference, prompt(true, "max")? != reference);
        if on.is_some() && !has_switch {
            return Err(TextError::NoThinkingSwitch { effort: has_effort });
        }
        if effort.is_some() && !has_effort {
            return Err(TextError::NoReasoningEffort { switch: has_switch });
        }
        let on = on.or(effort.filter(|_| has_switch).map(|_| true)).map(Json::from);
        let asked = [(SWITCH, on), (EFFORT, effort.map(Json::from))];
        Ok(asked.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect())
    }
}

/// What an assistant thought, by whichever of its names clients send it.
pub(crate) fn reasoning_of(message: &Map<String, Json>) -> Option<&Json> {
    ["reasoning_content", "thinking", "reasoning"].into_iter().find_map(|key| message.get(key).filter(|v| !v.is_null()))
}

/// One message as the template sees it.
fn message_value(index: usize, message: &Json) -> Result<Value, TextError> {
    let Json::Object(message) = message else {
        return Err(TextError::BadMessages(format!("messages[{index}] must be an object")));
    };
    let mut fields: Vec<(&str, Value)> = Vec::with_capacity(message.len() + 2);
    let present = |key: &str| message.get(key).filter(|v| !v.is_null());
    let reasoning = reasoning_of(message).map(python::value_from_json);
    if let (Some(reasoning), None) = (&reasoning, present("thinking")) {
        fields.push(("thinking", reasoning.clone()));
    }
    fields.extend(message.iter().filter(|(_, v)| !v.is_null()).map(|(k, v)| (k.as_str(), python::value_from_json(v))));
    if let (Some(reasoning), None) = (reasoning, present("reasoning_content")) {
        fields.push(("reasoning_content", reasoning));
    }
    Ok(Value::from_pairs(fields))
}

fn named_sources(template: &Json) -> Vec<(String, String)> {
    match template {
        Json::String(source) => vec![(DEFAULT.to_owned(), source.clone())],
        Json::Array(list) => {
            let named = |name: &str| {
                let entry = list.iter().find(|t| t["name"] == name)?;
                Some((name.to_owned(), entry["template"].as_str()?.to_owned()))
            };
            [DEFAULT, TOOL_USE].into_iter().filter_map(named).collect()
        }
        _ => Vec::new(),
    }
}

/// `{% generation %}` only marks text for training. A bare `with` has the same scope and keeps the tag's white-space control.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let inner = at + 2;
        let Some(end) = rest[inner..].find("%}").map(|e| inner + e) else { break };
        let word = rest[inner..end].trim_start_matches(['-', '+']).trim_end_matches(['-', '+']).trim();
        let with = match word {
            "generation" => "with",
            "endgeneration" => "endwith",
            _ => word,
        };
        out.push_str(&rest[..inner]);
        out.push_str(&rest[inner..end].replace(word, with));
        rest = &rest[end..];
    }
    out.push_str(rest);
    out
}

/// The message of a `raise_exception` anywhere below `error`.
fn raised(error: &Error) -> Option<String> {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(e) = source {
        if let Some(Raised(message)) = e.downcast_ref::<Raised>() {
            return Some(message.clone());
        }
        source = e.source();
    }
    None
}

/// The error with its line, and what it came from.
fn describe(error: &Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(e) = source {
        text.push_str(": ");
        text.push_str(&e.to_string());
        source = e.source();
    }
    text
}
