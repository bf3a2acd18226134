//! DeepSeek-V4's prompt, which its checkpoints describe by code instead of a template.
//!
//! A conversation is BOS, the system text with the tools, then `<｜User｜>text<｜Assistant｜>` and the assistant's turn, which begins with
//! reasoning (`<think>` … `</think>`) or, without any, with a lone `</think>`.

use serde_json::{Map, Value};

use crate::error::TextError;
use crate::python;
use crate::template::reasoning_of;

const BOS: &str = "<｜begin▁of▁sentence｜>";
const EOS: &str = "<｜end▁of▁sentence｜>";
const USER: &str = "<｜User｜>";
const ASSISTANT: &str = "<｜Assistant｜>";
const THINK: &str = "<think>";
const THINK_END: &str = "</think>";
const MAX_EFFORT: &str = "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n\
    You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, rigorously stress-testing \
    your logic against all potential paths, edge cases, and adversarial scenarios.\n\
    Explicitly write out your entire deliberation process, documenting every intermediate step, considered alternative, and rejected \
    hypothesis to ensure absolutely no assumption is left unchecked.\n\n";
const TOOLS_BEFORE: &str = "## Tools\n\nYou have access to a set of tools to help answer the user's question. You can invoke tools by writing a \
    \"<｜DSML｜tool_calls>\" block like the following:\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"$TOOL_NAME\">\n<｜DSML｜parameter \
    name=\"$PARAMETER_NAME\" string=\"true|false\">$PARAMETER_VALUE</｜DSML｜parameter>\n...\n</｜DSML｜invoke>\n<｜DSML｜invoke \
    name=\"$TOOL_NAME2\">\n...\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>\n\nString parameters should be specified as is and set `string=\"true\"`. For \
    all other types (numbers, booleans, arrays, objects), pass the value in JSON format and set `string=\"false\"`.\n\nIf thinking_mode is enabled \
    (triggered by <think>), you MUST output your complete reasoning inside <think>...</think> BEFORE any tool calls or final \
    response.\n\nOtherwise, output directly after </think> with tool calls or final response.\n\n### Available Tool Schemas\n\n";
const TOOLS_AFTER: &str = "\n\nYou MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.\n";

/// A turn: what one side says until the other does.
enum Turn<'a> {
    System(String),
    User(Vec<Block<'a>>),
    Assistant(&'a Map<String, Value>),
}

/// A part of a user's turn.
enum Block<'a> {
    Text(&'a str),
    /// A result, and the call that it answers.
    Result {
        call: &'a str,
        text: String,
    },
}

/// Renders a conversation. Variables: `thinking` or `enable_thinking` (off unless asked for; an effort asks for it), `drop_thinking`
/// (reasoning of earlier turns is left out, the default without tools), `reasoning_effort` (`max` adds a paragraph, `none` turns
/// thinking off).
///
/// # Errors
/// [`TextError::BadMessages`].
pub(crate) fn render(messages: &[Value], tools: Option<&Value>, kwargs: &Map<String, Value>, add_generation_prompt: bool) -> Result<String, TextError> {
    let effort = kwargs.get("reasoning_effort").and_then(Value::as_str).filter(|effort| *effort != "none");
    let flag = |name: &str| kwargs.get(name).and_then(Value::as_bool);
    let thinking = flag("thinking").or(flag("enable_thinking")).unwrap_or(effort.is_some());
    let tools = tools.and_then(Value::as_array).filter(|tools| !tools.is_empty());
    // Calls depend on the reasoning before them.
    let drop = tools.is_none() && flag("drop_thinking").unwrap_or(true);

    let mut turns = turns(messages)?;
    if let Some(tools) = tools {
        let schemas: Vec<String> = tools.iter().map(|tool| python::dumps(tool.get("function").unwrap_or(tool))).collect();
        let text = format!("\n\n{TOOLS_BEFORE}{}{TOOLS_AFTER}", schemas.join("\n"));
        match turns.first_mut() {
            Some(Turn::System(system)) => system.push_str(&text),
            _ => turns.insert(0, Turn::System(text)),
        }
    }
    let last_user = turns.iter().rposition(|turn| matches!(turn, Turn::User(_)));
    let mut out = BOS.to_owned();
    if thinking && effort == Some("max") && !turns.is_empty() {
        out.push_str(MAX_EFFORT);
    }
    for (i, turn) in turns.iter().enumerate() {
        match turn {
            Turn::System(text) => out.push_str(text),
            Turn::User(blocks) => {
                out.push_str(USER);
                let text = |block: &Block<'_>| match block {
                    Block::Text(text) => (*text).to_owned(),
                    Block::Result { text, .. } => format!("<tool_result>{text}</tool_result>"),
                };
                out.push_str(&blocks.iter().map(text).collect::<Vec<_>>().join("\n\n"));
                let follows = turns.get(i + 1).is_some_and(|turn| matches!(turn, Turn::Assistant(_)));
                if follows || (i + 1 == turns.len() && add_generation_prompt) {
                    out.push_str(ASSISTANT);
                    out.push_str(if thinking && (!drop || last_user <= Some(i)) { THINK } else { THINK_END });
                }
            }
            Turn::Assistant(message) => {
                if thinking && (!drop || last_user < Some(i)) {
                    out.push_str(reasoning_of(message).and_then(Value::as_str).unwrap_or_default());
                    out.push_str(THINK_END);
                }
                out.push_str(message.get("content").and_then(Value::as_str).unwrap_or_default());
                write_calls(message, &mut out)?;
                out.push_str(EOS);
            }
        }
    }
    Ok(out)
}

/// Joins what belongs to one turn: results and user messages in a row are one. Results stand in the order of their calls.
fn turns(messages: &[Value]) -> Result<Vec<Turn<'_>>, TextError> {
    let mut turns: Vec<Turn<'_>> = Vec::new();
    for (i, message) in messages.iter().enumerate() {
        let Value::Object(message) = message else {
            return Err(TextError::BadMessages(format!("messages[{i}] must be an object")));
        };
        let text = match message.get("content") {
            None | Some(Value::Null) => "",
            Some(Value::String(text)) => text,
            Some(_) => return Err(TextError::BadMessages(format!("messages[{i}].content must be a string"))),
        };
        let block = match message.get("role").and_then(Value::as_str) {
            Some("system") => {
                turns.push(Turn::System(text.to_owned()));
                continue;
            }
            Some("assistant") => {
                turns.push(Turn::Assistant(message));
                continue;
            }
            Some("user" | "developer") => Block::Text(text),
            Some("tool") => Block::Result { call: message.get("tool_call_id").and_then(Value::as_str).unwrap_or_default(), text: text.to_owned() },
            role => return Err(TextError::BadMessages(format!("messages[{i}].role is {role:?}; it must be system, user, assistant or tool"))),
        };
        match turns.last_mut() {
            Some(Turn::User(blocks)) => blocks.push(block),
            _ => turns.push(Turn::User(vec![block])),
        }
    }
    sort_results(&mut turns);
    Ok(turns)
}

fn sort_results(turns: &mut [Turn<'_>]) {
    let mut order: Vec<&str> = Vec::new();
    for turn in turns {
        match turn {
            Turn::Assistant(message) => {
                let calls = message.get("tool_calls").and_then(Value::as_array).filter(|calls| !calls.is_empty());
                if let Some(calls) = calls {
                    order = calls.iter().filter_map(|call| call["id"].as_str()).collect();
                }
            }
            Turn::User(blocks) => {
                let place = |block: &Block<'_>| match block {
                    Block::Result { call, .. } => order.iter().position(|id| id == call).unwrap_or(0),
                    Block::Text(_) => 0,
                };
                let slots: Vec<usize> = (0..blocks.len()).filter(|&i| matches!(blocks[i], Block::Result { .. })).collect();
                let mut results: Vec<Block<'_>> = Vec::with_capacity(slots.len());
                for &i in &slots {
                    results.push(std::mem::replace(&mut blocks[i], Block::Text("")));
                }
                results.sort_by_key(place);
                for (i, result) in slots.into_iter().zip(results) {
                    blocks[i] = result;
                }
            }
            Turn::System(_) => {}
        }
    }
}

fn write_calls(message: &Map<String, Value>, out: &mut String) -> Result<(), TextError> {
    let Some(calls) = message.get("tool_calls").and_then(Value::as_array).filter(|calls| !calls.is_empty()) else { return Ok(()) };
    out.push_str("\n\n<｜DSML｜tool_calls>\n");
    for call in calls {
        let function = &call["function"];
        let name = function["name"].as_str().unwrap_or_default();
        let parsed = function["arguments"].as_str().map(serde_json::from_str::<Value>);
        let arguments = match &parsed {
            Some(Ok(arguments)) => arguments,
            Some(Err(e)) => return Err(TextError::BadMessages(format!("the arguments of the call of {name:?} are no JSON: {e}"))),
            None => &function["arguments"],
        };
        let Value::Object(arguments) = arguments else {
            return Err(TextError::BadMessages(format!("the arguments of the call of {name:?} must be an object")));
        };
        out.push_str(&format!("<｜DSML｜invoke name=\"{name}\">\n"));
        let parameter = |(key, value): (&String, &Value)| {
            let (is_text, text) = value.as_str().map_or_else(|| (false, python::dumps(value)), |text| (true, text.to_owned()));
            format!("<｜DSML｜parameter name=\"{key}\" string=\"{is_text}\">{text}</｜DSML｜parameter>")
        };
        out.push_str(&arguments.iter().map(parameter).collect::<Vec<_>>().join("\n"));
        out.push_str("\n</｜DSML｜invoke>\n");
    }
    out.push_str("</｜DSML｜tool_calls>");
    Ok(())
}
