//! What the server says of itself: models, capabilities, statistics, health. Nothing here computes.

use axum::Json;
use axum::extract::{Path, State};
use serde_json::{Map, Value, json};

use crate::error::ApiError;
use crate::generate::ratio;
use crate::server::App;

/// `/health`: the engine is loaded before the server listens, so an answer is health.
pub(crate) async fn health() -> Json<Value> {
    Json(json!({ "status": "ok" }))
}

fn model_object(app: &App) -> Value {
    let info = app.session.engine().info();
    json!({
        "id": app.model_id(),
        "object": "model",
        "created": app.started_unix,
        "owned_by": "mach",
        "context_window": info.context,
        "max_model_len": info.context,
        "meta": {
            "n_ctx": info.context,
            "n_ctx_train": info.context_train,
            "n_vocab": info.vocab,
            "n_params": info.parameters,
            "size": info.weight_bytes,
        },
    })
}

/// `/v1/models`.
pub(crate) async fn models(State(app): State<App>) -> Json<Value> {
    Json(json!({ "object": "list", "data": [model_object(&app)] }))
}

/// `/v1/models/{id}`; ids may hold slashes.
pub(crate) async fn model(State(app): State<App>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    if !app.is_served(&id) {
        return Err(ApiError::no_model(&id, app.model_id()));
    }
    let mut model = model_object(&app);
    model["id"] = id.into();
    Ok(Json(model))
}

fn signals(app: &App) -> Value {
    let pairs = app.session.engine().info().signals.iter();
    Value::Object(pairs.map(|(k, v)| (k.clone(), Value::from(v.as_str()))).collect::<Map<_, _>>())
}

/// `/v1/capabilities`.
pub(crate) async fn capabilities(State(app): State<App>) -> Json<Value> {
    let info = app.session.engine().info();
    let replies = app.session.text().reply_format();
    Json(json!({
        "model": app.model_id(),
        "arch": info.arch,
        "context": info.context,
        "context_train": info.context_train,
        "vocabulary": info.vocab,
        "parameters": info.parameters,
        "weight_bytes": info.weight_bytes,
        "endpoints": [
            "/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/{id}", "/v1/capabilities", "/v1/stats", "/health",
        ],
        "features": {
            "chat_template": app.session.text().has_template(),
            "streaming": true,
            "stop": true,
            "seed": true,
            "n": true,
            "logit_bias": true,
            "tools": replies.has_calls(),
            "tool_choice": ["auto", "none"],
            "parallel_tool_calls": replies.has_calls(),
            "reasoning_content": replies.has_reasoning(),
            "response_format": ["text"],
            "logprobs": false,
            "images": false,
        },
        "sampling": [
            "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty", "logit_bias", "seed",
        ],
        "signals": signals(&app),
    }))
}

/// `/v1/stats`.
pub(crate) async fn stats(State(app): State<App>) -> Json<Value> {
    let s = app.session.engine().stats();
    let accesses = s.hits + s.misses;
    Json(json!({
        "uptime_ms": app.started.elapsed().as_millis() as u64,
        "requests": {
            "running": s.running,
            "queued": s.queued,
            "finished": s.finished,
            "cancelled": s.cancelled,
            "failed": s.failed,
        },
        "tokens": {
            "prompt": s.prompt_tokens,
            "cached": s.cached_tokens,
            "generated": s.generated_tokens,
        },
        "bank": {
            "slots": s.slots,
            "slot_bytes": s.slot_bytes,
            "experts": s.experts,
            "hits": s.hits,
            "misses": s.misses,
            "hit_rate": (accesses > 0).then(|| ratio(s.hits as f64, accesses as f64)),
            "evictions": s.evictions,
        },
        "io": {
            "bytes_read": s.bytes_read,
            "errors": s.io_errors,
            "stall_ms": s.stall_ms,
        },
        "kv": { "bytes": s.kv_bytes },
        "signals": signals(&app),
    }))
}
