//! Response objects of both endpoints.

use serde_json::{Value, json};

use crate::generate::{Choice, Job, Kind, Totals};

/// The answer to a request that does not stream.
pub(crate) fn response(job: &Job, choices: Vec<Choice>, totals: &Totals) -> Value {
    let choices: Vec<Value> = choices
        .into_iter()
        .enumerate()
        .map(|(index, choice)| match job.kind {
            Kind::Chat => json!({
                "index": index,
                "message": { "role": "assistant", "content": choice.text },
                "logprobs": null,
                "finish_reason": choice.finish_reason,
            }),
            Kind::Completion => json!({
                "index": index,
                "text": choice.text,
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

/// New text.
pub(crate) fn text_chunk(job: &Job, index: usize, text: &str) -> Value {
    chunk(job, vec![choice(job, index, json!({ "content": text }), text, None)])
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
