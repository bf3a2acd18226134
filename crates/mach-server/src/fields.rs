//! Reading a JSON request: wrong types and ranges become errors that name the parameter, null counts as absent.

use std::ops::RangeInclusive;

use axum::body::Body;
use axum::http::Request;
use axum::http::header::CONTENT_LENGTH;
use serde_json::{Map, Value};

use crate::error::ApiError;

/// Agents send megabytes of history.
pub(crate) const BODY_LIMIT: usize = 64 << 20;

/// The fields of a request object.
pub(crate) struct Fields(Map<String, Value>);

impl Fields {
    /// Reads a request's body.
    ///
    /// # Errors
    /// 413, and 400 for what is no JSON object.
    pub(crate) async fn read(request: Request<Body>) -> Result<Self, ApiError> {
        let announced = request.headers().get(CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<usize>().ok());
        if announced.is_some_and(|n| n > BODY_LIMIT) {
            return Err(ApiError::too_large(BODY_LIMIT));
        }
        let bytes = axum::body::to_bytes(request.into_body(), BODY_LIMIT).await.map_err(|_| ApiError::too_large(BODY_LIMIT))?;
        match serde_json::from_slice(&bytes) {
            Ok(Value::Object(fields)) => Ok(Self(fields)),
            Ok(_) => Err(ApiError::malformed("the request body must be a JSON object")),
            Err(e) => Err(ApiError::malformed(format!("the request body is not valid JSON: {e}"))),
        }
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|v| !v.is_null())
    }

    pub(crate) fn take(&mut self, name: &str) -> Option<Value> {
        self.0.get_mut(name).map(Value::take).filter(|v| !v.is_null())
    }

    fn typed<T>(&self, name: &str, kind: &str, read: impl FnOnce(&Value) -> Option<T>) -> Result<Option<T>, ApiError> {
        match self.get(name) {
            None => Ok(None),
            Some(value) => match read(value) {
                Some(read) => Ok(Some(read)),
                None => Err(ApiError::invalid(name, format!("`{name}` must be {kind}"))),
            },
        }
    }

    pub(crate) fn boolean(&self, name: &str) -> Result<Option<bool>, ApiError> {
        self.typed(name, "a boolean", Value::as_bool)
    }

    pub(crate) fn string(&self, name: &str) -> Result<Option<String>, ApiError> {
        self.typed(name, "a string", |v| v.as_str().map(str::to_owned))
    }

    pub(crate) fn object(&self, name: &str) -> Result<Option<&Map<String, Value>>, ApiError> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(map)),
            Some(_) => Err(ApiError::invalid(name, format!("`{name}` must be an object"))),
        }
    }

    pub(crate) fn number(&self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f32>, ApiError> {
        let value = self.typed(name, "a number", Value::as_f64)?;
        match value {
            Some(x) if !range.contains(&x) => {
                let message = format!("`{name}` is {x}; it must be between {} and {}", range.start(), range.end());
                Err(ApiError::invalid(name, message))
            }
            value => Ok(value.map(|x| x as f32)),
        }
    }

    pub(crate) fn integer(&self, name: &str, range: RangeInclusive<i64>) -> Result<Option<i64>, ApiError> {
        let whole = |v: &Value| v.as_i64().or_else(|| v.as_f64().filter(|x| x.fract() == 0.0 && x.abs() < 9e15).map(|x| x as i64));
        let value = self.typed(name, "an integer", whole)?;
        match value {
            Some(n) if !range.contains(&n) => {
                let limit = match (*range.start(), *range.end()) {
                    (least, i64::MAX) => format!("at least {least}"),
                    (least, most) => format!("between {least} and {most}"),
                };
                Err(ApiError::invalid(name, format!("`{name}` is {n}; it must be {limit}")))
            }
            value => Ok(value),
        }
    }

    /// A parameter that is known and not served: an error unless its value asks for nothing.
    pub(crate) fn refuse(&self, name: &str, harmless: impl FnOnce(&Value) -> bool, why: &str) -> Result<(), ApiError> {
        match self.get(name) {
            Some(value) if !harmless(value) => Err(ApiError::unsupported(name, format!("`{name}` is not supported: {why}"))),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
impl Fields {
    pub(crate) fn from_json(value: Value) -> Self {
        match value {
            Value::Object(fields) => Self(fields),
            _ => Self(Map::new()),
        }
    }
}
