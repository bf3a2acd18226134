//! `/v1/completions`: text or ids without a template.

use axum::body::Body;
use axum::extract::State;
use axum::http::Request;
use axum::response::Response;
use mach_session::{Prompt, TextModel};
use serde_json::Value;

use crate::chat::respond;
use crate::error::ApiError;
use crate::fields::Fields;
use crate::generate::{Common, Job, Kind};
use crate::server::App;

/// What the API promises when a completion says no length.
const DEFAULT_MAX_TOKENS: usize = 16;

/// Answers a completion request.
pub(crate) async fn handle(State(app): State<App>, request: Request<Body>) -> Result<Response, ApiError> {
    let mut fields = Fields::read(request).await?;
    let session = app.session.clone();
    fields.refuse("logprobs", |v| v == false, "the server does not return log probabilities")?;
    fields.refuse("echo", |v| v == false, "the prompt is not repeated in the answer")?;
    fields.refuse("best_of", |v| v == 1, "use `n`")?;
    fields.refuse("suffix", |v| v == "", "the server completes at the end only")?;
    let mut common = Common::read(&fields, app.model_id(), session.engine().info().vocab)?;
    common.default_max_tokens(DEFAULT_MAX_TOKENS);
    let inputs = inputs(fields.take("prompt"))?;
    let text = session.text().clone();
    let prompts = tokio::task::spawn_blocking(move || inputs.into_iter().map(|input| input.prompt(&text)).collect::<Result<Vec<_>, _>>())
        .await
        .map_err(|e| ApiError::failed("tokenizer-failed", e.to_string()))??;
    respond(&app, Job::new(Kind::Completion, common, prompts, session)?).await
}

/// One prompt as it was sent.
#[derive(Debug, PartialEq)]
enum Input {
    Text(String),
    Ids(Vec<u32>),
}

impl Input {
    fn prompt(self, text: &TextModel) -> Result<Prompt, ApiError> {
        match self {
            Self::Text(prompt) => text.raw_prompt(&prompt).map_err(|e| ApiError::from_text(&e, "prompt")),
            Self::Ids(ids) => Ok(Prompt::from_tokens(ids)),
        }
    }
}

/// A string, strings, ids, or lists of ids.
fn inputs(prompt: Option<Value>) -> Result<Vec<Input>, ApiError> {
    let wrong = || ApiError::invalid("prompt", "`prompt` must be a string, an array of strings, an array of token ids or an array of such arrays");
    let ids = |values: &[Value]| {
        let id = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(wrong);
        values.iter().map(id).collect::<Result<Vec<u32>, _>>().map(Input::Ids)
    };
    match prompt {
        None => Err(ApiError::invalid("prompt", "`prompt` is missing")),
        Some(Value::String(text)) => Ok(vec![Input::Text(text)]),
        Some(Value::Array(list)) => match list.first() {
            None => Err(ApiError::invalid("prompt", "`prompt` is empty")),
            Some(Value::Number(_)) => Ok(vec![ids(&list)?]),
            Some(_) => list
                .iter()
                .map(|entry| match entry {
                    Value::String(text) => Ok(Input::Text(text.clone())),
                    Value::Array(values) => ids(values),
                    _ => Err(wrong()),
                })
                .collect(),
        },
        Some(_) => Err(wrong()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Every form of the prompt, and no other.
    #[test]
    fn forms_of_the_prompt() {
        let read = |v: Value| inputs(Some(v)).ok();
        assert_eq!(read(json!("a")), Some(vec![Input::Text("a".into())]));
        assert_eq!(read(json!(["a", "b"])), Some(vec![Input::Text("a".into()), Input::Text("b".into())]));
        assert_eq!(read(json!([1, 2])), Some(vec![Input::Ids(vec![1, 2])]));
        assert_eq!(read(json!([[1], [2, 3]])), Some(vec![Input::Ids(vec![1]), Input::Ids(vec![2, 3])]));
        for bad in [json!([]), json!([1, "a"]), json!([-1]), json!({"a": 1}), json!([[1.5]]), json!(3)] {
            assert_eq!(read(bad.clone()), None, "{bad}");
        }
    }
}
