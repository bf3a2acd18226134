//! What every request passes: its id, the Host and Origin check on loopback, the API key.

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use crate::error::ApiError;
use crate::generate::random_id;
use crate::server::App;

const REQUEST_ID: &str = "x-request-id";

/// Paths that need no key.
const PUBLIC: [&str; 3] = ["/health", "/v1/health", "/healthz"];

/// Checks a request, hands it on, and gives the answer its id.
pub(crate) async fn check(State(app): State<App>, request: Request, next: Next) -> Response {
    let id = request.headers().get(REQUEST_ID).filter(|id| id.len() <= 128).cloned();
    let id = id.or_else(|| HeaderValue::try_from(format!("req-{}", random_id())).ok());
    let mut response = match allowed(&app, request.uri(), request.headers()) {
        Ok(()) => next.run(request).await,
        Err(e) => e.into_response(),
    };
    if let Some(id) = id {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response
}

fn allowed(app: &App, uri: &Uri, headers: &HeaderMap) -> Result<(), ApiError> {
    if app.loopback {
        // A web page that resolves its own name to 127.0.0.1 still sends that name here.
        let host = uri.authority().map(|a| a.as_str()).or_else(|| text(headers, header::HOST));
        if host.is_some_and(|host| !is_local(host)) || (host.is_none() && headers.contains_key(header::HOST)) {
            return Err(ApiError::foreign("Host"));
        }
        if let Some(origin) = headers.get(header::ORIGIN) {
            let local = origin.to_str().ok().and_then(|o| o.split_once("://")).is_some_and(|(_, host)| is_local(host));
            if !local {
                return Err(ApiError::foreign("Origin"));
            }
        }
    }
    if app.config.api_keys.is_empty() || PUBLIC.contains(&uri.path()) {
        return Ok(());
    }
    let bearer = text(headers, header::AUTHORIZATION).and_then(|value| {
        let (scheme, key) = value.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
    });
    let keys = [bearer, headers.get("x-api-key").and_then(|v| v.to_str().ok())];
    if keys.into_iter().flatten().any(|key| app.config.api_keys.iter().any(|k| same(k, key))) { Ok(()) } else { Err(ApiError::unauthorized()) }
}

fn text(headers: &HeaderMap, name: header::HeaderName) -> Option<&str> {
    headers.get(name).and_then(|v| v.to_str().ok())
}

/// `localhost`, `127.0.0.1` or `[::1]`, with any port.
fn is_local(authority: &str) -> bool {
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, port),
        _ => (authority, "0"),
    };
    let host_is_local = host.eq_ignore_ascii_case("localhost") || host == "127.0.0.1" || host == "[::1]";
    host_is_local && port.parse::<u16>().is_ok()
}

/// Equality in a time that does not tell how far the key is right.
fn same(a: &str, b: &str) -> bool {
    a.len() == b.len() && a.bytes().zip(b.bytes()).fold(0, |acc, (x, y)| acc | (x ^ y)) == 0
}

/// 404 in the API's shape.
pub(crate) async fn no_route(method: Method, uri: Uri) -> ApiError {
    ApiError::no_route(method.as_str(), uri.path())
}

/// 405 in the API's shape.
pub(crate) async fn wrong_method(method: Method, uri: Uri) -> ApiError {
    ApiError::wrong_method(method.as_str(), uri.path())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Names of this machine pass with any port; names that only look like it do not.
    #[test]
    fn local_names() {
        for local in ["localhost", "LocalHost:8080", "127.0.0.1", "127.0.0.1:1", "[::1]", "[::1]:8080"] {
            assert!(is_local(local), "{local}");
        }
        for foreign in ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:80", "[::2]:80", "localhost:80x", "", "127.0.0.1:"] {
            assert!(!is_local(foreign), "{foreign}");
        }
    }

    /// Keys are compared whole.
    #[test]
    fn keys() {
        assert!(same("abc", "abc"));
        assert!(!same("abc", "abd") && !same("abc", "ab") && !same("", "a"));
    }
}
