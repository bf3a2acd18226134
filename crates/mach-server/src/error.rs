//! Errors in the shape that OpenAI clients expect.

use axum::http::{HeaderValue, StatusCode, header::RETRY_AFTER};
use axum::response::{IntoResponse, Response};
use mach_engine::SubmitError;
use mach_session::SessionError;
use mach_text::TextError;
use serde_json::{Value, json};

/// An error on its way to a client.
#[derive(Debug)]
pub(crate) struct ApiError {
    status: StatusCode,
    kind: &'static str,
    code: &'static str,
    param: Option<String>,
    message: String,
    retry_after: Option<u32>,
    /// Prompt tokens and context size of an overflow, in llama.cpp's fields.
    overflow: Option<(usize, usize)>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, kind, code, param: None, message: message.into(), retry_after: None, overflow: None }
    }

    fn param(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// 400 for one parameter.
    pub(crate) fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", "invalid_value", message).param(param)
    }

    /// 400 for a parameter that is known and not served.
    pub(crate) fn unsupported(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", "unsupported_parameter", message).param(param)
    }

    /// 400 for a body that is no JSON object.
    pub(crate) fn malformed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", "invalid_json", message)
    }

    /// 413.
    pub(crate) fn too_large(limit: usize) -> Self {
        let message = format!("the request body is larger than {} MiB", limit >> 20);
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", "request_too_large", message)
    }

    /// 401.
    pub(crate) fn unauthorized() -> Self {
        let message = "missing or wrong API key: send it as \"Authorization: Bearer KEY\" or \"x-api-key: KEY\"";
        Self::new(StatusCode::UNAUTHORIZED, "authentication_error", "invalid_api_key", message)
    }

    /// 403 for a Host or Origin that is not this machine.
    pub(crate) fn foreign(header: &str) -> Self {
        let message = format!("the {header} header does not name this machine, and the server listens on loopback only");
        Self::new(StatusCode::FORBIDDEN, "permission_error", "foreign_host", message)
    }

    /// 404 for a path.
    pub(crate) fn no_route(method: &str, path: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found_error", "not_found", format!("there is no {method} {path}"))
    }

    /// 405.
    pub(crate) fn wrong_method(method: &str, path: &str) -> Self {
        let message = format!("{path} does not take {method}");
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", "method_not_allowed", message)
    }

    /// 404 for a model.
    pub(crate) fn no_model(id: &str, served: &str) -> Self {
        let message = format!("the model `{id}` does not exist; this server serves `{served}`");
        Self::new(StatusCode::NOT_FOUND, "not_found_error", "model_not_found", message).param("model")
    }

    /// 400 in the words that agents look for: vLLM's, OpenAI's and llama.cpp's.
    pub(crate) fn context_overflow(prompt: usize, context: usize, param: &str) -> Self {
        let message = format!(
            "This model's maximum context length is {context} tokens. However, your request has {prompt} prompt tokens, which exceeds the \
             available context size ({context} tokens). Shorten the prompt or start the server with a larger --ctx-size."
        );
        let mut error = Self::new(StatusCode::BAD_REQUEST, "exceed_context_size_error", "context_length_exceeded", message).param(param);
        error.overflow = Some((prompt, context));
        error
    }

    /// 500 for a request that failed while it was computed.
    pub(crate) fn failed(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", code, message)
    }

    /// The engine is gone or going.
    pub(crate) fn closed() -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable_error", "engine_closed", "the engine is shutting down")
    }

    /// From a session; `param` is what held the prompt.
    pub(crate) fn from_session(error: SessionError, param: &str) -> Self {
        match error {
            SessionError::Text(e) => Self::from_text(&e, param),
            SessionError::Submit(SubmitError::QueueFull(_)) => {
                let mut full = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", "queue_full", error.to_string());
                full.retry_after = Some(2);
                full
            }
            SessionError::Submit(SubmitError::ContextOverflow { prompt, context }) => Self::context_overflow(prompt, context, param),
            SessionError::Submit(SubmitError::Closed) => Self::closed(),
            SessionError::Submit(e) => Self::invalid(param, e.to_string()),
            SessionError::Failed { code, message } => Self::failed(code, message),
        }
    }

    /// From tokenizer or template.
    pub(crate) fn from_text(error: &TextError, param: &str) -> Self {
        match error {
            // What a template refuses or trips over is the conversation it was given.
            TextError::TemplateRaised(_) | TextError::TemplateFailed(_) | TextError::BadMessages(_) => {
                Self { code: error.code(), ..Self::invalid(param, error.to_string()) }
            }
            TextError::NoTemplate(_) => {
                let message = "the model has no chat template: use /v1/completions";
                Self { code: error.code(), ..Self::unsupported(param, message) }
            }
            _ => Self::failed(error.code(), error.to_string()),
        }
    }

    /// The body, also sent as an event in a stream.
    pub(crate) fn body(&self) -> Value {
        let mut error = json!({
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        });
        if let Some((prompt, context)) = self.overflow {
            error["n_prompt_tokens"] = prompt.into();
            error["n_ctx"] = context.into();
        }
        json!({ "error": error })
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, axum::Json(self.body())).into_response();
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}
