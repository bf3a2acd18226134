//! `/v1/chat/completions`: messages and tools become a prompt.

use axum::body::Body;
use axum::extract::State;
use axum::http::Request;
use axum::response::{IntoResponse, Response};
use mach_session::{ChatInput, Prompt, TextModel};
use serde_json::{Map, Value};

use crate::error::ApiError;
use crate::fields::Fields;
use crate::generate::{Common, Job, Kind, Offered};
use crate::server::App;
use crate::{sse, wire};

/// Answers a chat request.
pub(crate) async fn handle(State(app): State<App>, request: Request<Body>) -> Result<Response, ApiError> {
    let mut fields = Fields::read(request).await?;
    let session = app.session.clone();
    let common = Common::read(&fields, app.model_id(), session.engine().info().vocab)?;
    let conversation = Conversation::read(&mut fields)?;
    let text = session.text().clone();
    // Rendering and tokenising a long history takes a while: not on the threads that serve sockets.
    let rendered = tokio::task::spawn_blocking(move || conversation.prompt(&text).map(|prompt| (prompt, conversation.tools, conversation.one_call)));
    let (prompt, tools, one_call) = rendered.await.map_err(|e| ApiError::failed("tokenizer-failed", e.to_string()))??;
    let job = Job::new(Kind::Chat, common, vec![prompt], session)?.offering(Offered { tools, one_call });
    respond(&app, job).await
}

/// Runs a job, streamed or not.
pub(crate) async fn respond(app: &App, job: Job) -> Result<Response, ApiError> {
    if job.common.stream {
        let first = job.start(0)?;
        return Ok(sse::stream(job, first, app.config.keep_alive));
    }
    let (choices, totals) = job.run().await?;
    Ok(axum::Json(wire::response(&job, choices, &totals)).into_response())
}

/// What the template is given.
#[derive(Debug)]
struct Conversation {
    messages: Value,
    tools: Option<Value>,
    kwargs: Map<String, Value>,
    /// The reply ends behind its first call.
    one_call: bool,
}

impl Conversation {
    fn read(fields: &mut Fields) -> Result<Self, ApiError> {
        refuse_unsupported(fields)?;
        let mut kwargs = fields.object("chat_template_kwargs")?.cloned().unwrap_or_default();
        if let Some(effort) = fields.string("reasoning_effort")? {
            kwargs.entry("reasoning_effort").or_insert(effort.into());
        }
        let tools = tools(fields)?;
        let one_call = fields.boolean("parallel_tool_calls")? == Some(false);
        let messages = match fields.take("messages") {
            Some(Value::Array(messages)) if !messages.is_empty() => messages,
            Some(Value::Array(_)) => return Err(ApiError::invalid("messages", "`messages` is empty")),
            Some(_) => return Err(ApiError::invalid("messages", "`messages` must be an array")),
            None => return Err(ApiError::invalid("messages", "`messages` is missing")),
        };
        let messages = messages.into_iter().enumerate().map(|(i, m)| message(i, m)).collect::<Result<Vec<_>, _>>()?;
        Ok(Self { messages: messages.into(), tools, kwargs, one_call })
    }

    fn prompt(&self, text: &TextModel) -> Result<Prompt, ApiError> {
        let input = ChatInput { messages: &self.messages, tools: self.tools.as_ref(), kwargs: &self.kwargs, add_generation_prompt: true };
        text.chat_prompt(input).map_err(|e| ApiError::from_text(&e, "messages"))
    }
}

fn refuse_unsupported(fields: &Fields) -> Result<(), ApiError> {
    let off = |v: &Value| v == false;
    fields.refuse("logprobs", off, "the server does not return log probabilities")?;
    fields.refuse("top_logprobs", |v| v == 0, "the server does not return log probabilities")?;
    fields.refuse("response_format", |v| v["type"] == "text", "only {\"type\": \"text\"} is")?;
    fields.refuse("functions", |_| false, "use `tools`")?;
    fields.refuse("function_call", |_| false, "use `tools`")?;
    fields.refuse("audio", |_| false, "the model reads and writes text")?;
    let text_only = |v: &Value| v.as_array().is_some_and(|m| m.iter().all(|m| m == "text"));
    fields.refuse("modalities", text_only, "the model reads and writes text")
}

/// The tools to render: functions only, none when the caller forbids calls.
fn tools(fields: &mut Fields) -> Result<Option<Value>, ApiError> {
    let choice = fields.take("tool_choice");
    let forbidden = match &choice {
        None => false,
        Some(Value::String(choice)) => match choice.as_str() {
            "auto" => false,
            "none" => true,
            "required" => return Err(ApiError::unsupported("tool_choice", "`tool_choice` \"required\" is not supported: use \"auto\"")),
            other => return Err(ApiError::invalid("tool_choice", format!("`tool_choice` {other:?} is unknown: use \"auto\" or \"none\""))),
        },
        Some(Value::Object(_)) => {
            let message = "`tool_choice` with a named tool is not supported: use \"auto\"";
            return Err(ApiError::unsupported("tool_choice", message));
        }
        Some(_) => return Err(ApiError::invalid("tool_choice", "`tool_choice` must be a string or an object")),
    };
    let tools = match fields.take("tools") {
        None => return Ok(None),
        Some(Value::Array(tools)) => tools,
        Some(_) => return Err(ApiError::invalid("tools", "`tools` must be an array")),
    };
    let mut functions = Vec::with_capacity(tools.len());
    for (i, tool) in tools.into_iter().enumerate() {
        match tool["type"].as_str() {
            Some("function") => {
                check_function(&format!("tools[{i}].function"), &tool["function"])?;
                functions.push(tool);
            }
            // Tools that some hosts run themselves (web search): clients send them blindly.
            Some(_) => {}
            None => {
                let param = format!("tools[{i}].type");
                return Err(ApiError::invalid(&param, format!("`{param}` must be a string")));
            }
        }
    }
    Ok((!functions.is_empty() && !forbidden).then_some(Value::Array(functions)))
}

/// A name that can stand in the markup of a call, and a schema that says how its arguments are read.
fn check_function(at: &str, function: &Value) -> Result<(), ApiError> {
    let param = format!("{at}.name");
    let Some(name) = function["name"].as_str() else {
        return Err(ApiError::invalid(&param, format!("`{param}` must be a string")));
    };
    if name.is_empty() || name.contains(|c: char| c.is_whitespace() || c.is_control() || "<>\"".contains(c)) {
        let message = format!("`{param}` is {name:?}; it must be a word without spaces, quotes and angle brackets");
        return Err(ApiError::invalid(&param, message));
    }
    let param = format!("{at}.parameters");
    let parameters = &function["parameters"];
    let what = match parameters {
        Value::Null => return Ok(()),
        Value::Object(_) if parameters["properties"].is_null() || parameters["properties"].is_object() => return Ok(()),
        Value::Object(_) => ".properties",
        _ => "",
    };
    let param = format!("{param}{what}");
    Err(ApiError::invalid(&param, format!("`{param}` must be an object of a JSON schema")))
}

/// One message as templates take it.
fn message(index: usize, message: Value) -> Result<Value, ApiError> {
    let at = format!("messages[{index}]");
    let Value::Object(mut message) = message else {
        return Err(ApiError::invalid(&at, format!("`{at}` must be an object")));
    };
    let role = match message.get("role").and_then(Value::as_str) {
        Some("developer") => "system",
        Some(role @ ("system" | "user" | "assistant" | "tool")) => role,
        Some(role) => {
            let allowed = "system, developer, user, assistant or tool";
            return Err(ApiError::invalid(format!("{at}.role"), format!("`{at}.role` is {role:?}; it must be {allowed}")));
        }
        None => return Err(ApiError::invalid(format!("{at}.role"), format!("`{at}.role` must be a string"))),
    }
    .to_owned();
    match message.get_mut("content").map(Value::take) {
        None | Some(Value::Null) if role == "assistant" => {
            message.shift_remove("content");
        }
        Some(Value::String(text)) => {
            message.insert("content".to_owned(), text.into());
        }
        Some(Value::Array(parts)) => {
            message.insert("content".to_owned(), joined_parts(&at, parts)?.into());
        }
        _ => {
            let param = format!("{at}.content");
            let message = format!("`{param}` must be a string or an array of text parts");
            return Err(ApiError::invalid(param, message));
        }
    }
    match message.get_mut("tool_calls") {
        None | Some(Value::Null) => {}
        Some(Value::Array(calls)) => {
            for (i, call) in calls.iter_mut().enumerate() {
                parse_arguments(&format!("{at}.tool_calls[{i}].function"), call)?;
            }
        }
        Some(_) => {
            let param = format!("{at}.tool_calls");
            return Err(ApiError::invalid(&param, format!("`{param}` must be an array")));
        }
    }
    message.insert("role".to_owned(), role.into());
    Ok(Value::Object(message))
}

fn joined_parts(at: &str, parts: Vec<Value>) -> Result<String, ApiError> {
    let mut texts = Vec::with_capacity(parts.len());
    for (i, part) in parts.iter().enumerate() {
        let param = format!("{at}.content[{i}]");
        match (part["type"].as_str(), part["text"].as_str()) {
            (Some("text"), Some(text)) => texts.push(text),
            (Some("text"), None) => return Err(ApiError::invalid(&param, format!("`{param}.text` must be a string"))),
            (Some(kind), _) => {
                let message = format!("`{param}` is of type {kind:?}: the model reads text only");
                return Err(ApiError::unsupported(param, message));
            }
            (None, _) => return Err(ApiError::invalid(&param, format!("`{param}.type` must be a string"))),
        }
    }
    Ok(texts.join("\n"))
}

/// Clients send the arguments of earlier calls as JSON text; templates want the object.
fn parse_arguments(at: &str, call: &mut Value) -> Result<(), ApiError> {
    let Some(function) = call.get_mut("function").filter(|function| function["name"].is_string()) else {
        return Err(ApiError::invalid(format!("{at}.name"), format!("`{at}.name` must be a string")));
    };
    let parsed = match &function["arguments"] {
        Value::Object(_) => return Ok(()),
        Value::Null => Some(Value::Object(Map::new())),
        Value::String(text) if text.trim().is_empty() => Some(Value::Object(Map::new())),
        Value::String(text) => serde_json::from_str::<Value>(text).ok().filter(Value::is_object),
        _ => None,
    };
    match parsed {
        Some(arguments) => {
            function["arguments"] = arguments;
            Ok(())
        }
        None => {
            let param = format!("{at}.arguments");
            let message = format!("`{param}` must be a JSON object, or a string that holds one");
            Err(ApiError::invalid(param, message))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(request: Value) -> Result<Conversation, Value> {
        Conversation::read(&mut Fields::from_json(request)).map_err(|e| e.body()["error"].clone())
    }

    /// Messages reach the template with parsed arguments in their order, joined parts and known roles.
    #[test]
    fn messages_become_what_templates_take() {
        let conversation = read(json!({
            "messages": [
                {"role": "developer", "content": "Rules"},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": null, "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"z\": 1, \"a\": [2.0]}"}},
                    {"id": "2", "type": "function", "function": {"name": "g", "arguments": ""}}]},
                {"role": "tool", "tool_call_id": "1", "content": "ok"},
            ],
            "tools": [{"type": "web_search"}, {"type": "function", "function": {"name": "f"}}],
            "chat_template_kwargs": {"enable_thinking": true},
        }))
        .unwrap();
        assert_eq!(
            conversation.messages.to_string(),
            json!([
                {"role": "system", "content": "Rules"},
                {"role": "user", "content": "a\nb"},
                {"role": "assistant", "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"z": 1, "a": [2.0]}}},
                    {"id": "2", "type": "function", "function": {"name": "g", "arguments": {}}}]},
                {"role": "tool", "tool_call_id": "1", "content": "ok"},
            ])
            .to_string()
        );
        assert_eq!(conversation.tools, Some(json!([{"type": "function", "function": {"name": "f"}}])));
        assert_eq!(conversation.kwargs["enable_thinking"], true);
    }

    /// `tool_choice: none` keeps the tools out of the prompt; `auto` keeps them in.
    #[test]
    fn tool_choice_decides_what_is_rendered() {
        let tools = |choice: &str| {
            let request = json!({"messages": [{"role": "user", "content": "x"}], "tool_choice": choice,
                "tools": [{"type": "function", "function": {"name": "f"}}]});
            read(request).unwrap().tools.is_some()
        };
        assert!(tools("auto"));
        assert!(!tools("none"));
    }
}
