//! Response objects of both endpoints.

use mach_text::{ReplyEvent, ReplyMessage, ToolCall};
use serde_json::{Value, json};

use crate::generate::{Choice, Job, Kind, Totals, random_id};

/// The answer to a request that does not stream.
pub(crate) fn response(job: &Job, choices: Vec<Choice>, totals: &Totals) -> Value {
    let choices: Vec<Value> = choices
        .into_iter()
        .enumerate()
        .map(|(index, choice)| match job.kind {
            Kind::Chat => json!({
                "index": index,
                "message": message(choice.message),
                "logprobs": null,
                "finish_reason": choice.finish_reason,
            }),
            Kind::Completion => json!({
                "index": index,
                "text": choice.message.content,
                "logprobs": null,
                "finish_reason": choice.finish_reason,
            }),
        })
        .collect();
    let object = match job.kind {
        Kind::Chat => "chat.completion",
        Kind::Completion => "text_completion",
    };
    let mut response = envelope(job, object, choices);
    response["usage"] = totals.usage();
    response["timings"] = totals.timings();
    response["seed"] = job.seed().into();
    response
}

/// The assistant's message; what it lacks is left out, content beside calls is null.
fn message(reply: ReplyMessage) -> Value {
    let content = if reply.content.is_empty() && !reply.calls.is_empty() { Value::Null } else { reply.content.into() };
    let mut message = json!({ "role": "assistant", "content": content });
    if !reply.reasoning.is_empty() {
        message["reasoning_content"] = reply.reasoning.into();
    }
    if !reply.calls.is_empty() {
        let call = |ToolCall { name, arguments }| json!({ "id": call_id(), "type": "function", "function": { "name": name, "arguments": arguments } });
        message["tool_calls"] = reply.calls.into_iter().map(call).collect();
    }
    message
}

fn call_id() -> String {
    format!("call_{}", random_id())
}

fn envelope(job: &Job, object: &str, choices: Vec<Value>) -> Value {
    json!({
        "id": job.id,
        "object": object,
        "created": job.created,
        "model": job.common.model,
        "choices": choices,
    })
}

fn chunk(job: &Job, choices: Vec<Value>) -> Value {
    let object = match job.kind {
        Kind::Chat => "chat.completion.chunk",
        Kind::Completion => "text_completion",
    };
    let mut chunk = envelope(job, object, choices);
    if job.common.include_usage {
        chunk["usage"] = Value::Null;
    }
    chunk
}

fn choice(job: &Job, index: usize, delta: Value, text: &str, finish_reason: Option<&str>) -> Value {
    match job.kind {
        Kind::Chat => json!({ "index": index, "delta": delta, "logprobs": null, "finish_reason": finish_reason }),
        Kind::Completion => json!({ "index": index, "text": text, "logprobs": null, "finish_reason": finish_reason }),
    }
}

/// The first chunk of a chat choice: whose turn it is.
pub(crate) fn role_chunk(job: &Job, index: usize) -> Value {
    chunk(job, vec![choice(job, index, json!({ "role": "assistant", "content": "" }), "", None)])
}

/// A part of a reply; the end of a call has no shape of its own.
pub(crate) fn part_chunk(job: &Job, index: usize, part: &ReplyEvent) -> Option<Value> {
    let calls = |call: Value| json!({ "tool_calls": [call] });
    let (delta, text) = match part {
        ReplyEvent::Content(text) => (json!({ "content": text }), text.as_str()),
        ReplyEvent::Reasoning(text) => (json!({ "reasoning_content": text }), ""),
        ReplyEvent::CallStart { index, name } => {
            let function = json!({ "name": name, "arguments": "" });
            (calls(json!({ "index": index, "id": call_id(), "type": "function", "function": function })), "")
        }
        ReplyEvent::CallArguments { index, json } => (calls(json!({ "index": index, "function": { "arguments": json } })), ""),
        ReplyEvent::CallEnd { .. } | ReplyEvent::CallDropped { .. } => return None,
    };
    Some(chunk(job, vec![choice(job, index, delta, text, None)]))
}

/// The end of a choice.
pub(crate) fn finish_chunk(job: &Job, index: usize, finish_reason: &str, totals: &Totals) -> Value {
    let mut end = chunk(job, vec![choice(job, index, json!({}), "", Some(finish_reason))]);
    end["timings"] = totals.timings();
    end["seed"] = job.seed().into();
    end
}

/// The last chunk when usage was asked for: no choices.
pub(crate) fn usage_chunk(job: &Job, totals: &Totals) -> Value {
    let mut last = chunk(job, Vec::new());
    last["usage"] = totals.usage();
    last["timings"] = totals.timings();
    last
}
