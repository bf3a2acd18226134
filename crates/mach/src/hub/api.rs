//! The hub's HTTP interface: what a revision of a repository holds, and the bytes of its files.

use std::time::Duration;

use serde_json::Value;
use ureq::Agent;
use ureq::config::RedirectAuthHeaders;
use ureq::http::Response;

use super::HubError;

/// Most bytes of a listing.
const MAX_LISTING: u64 = 64 << 20;

/// A client of one endpoint.
pub(super) struct Client {
    agent: Agent,
    endpoint: String,
    token: Option<String>,
}

/// A revision of a repository.
pub(super) struct Listing {
    /// The commit that the revision names.
    pub(super) commit: String,
    pub(super) files: Vec<RemoteFile>,
}

/// A file of a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RemoteFile {
    /// Path in the repository.
    pub(super) path: String,
    pub(super) size: u64,
    pub(super) hash: Hash,
}

/// A file's hash, which is also the name of its blob in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Hash {
    /// Of the bytes: large files.
    Sha256(String),
    /// Of a git blob: small ones.
    Git(String),
}

impl Hash {
    pub(super) fn hex(&self) -> &str {
        match self {
            Self::Sha256(hex) | Self::Git(hex) => hex,
        }
    }
}

impl Client {
    pub(super) fn new(endpoint: String, token: Option<String>) -> Self {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            // The drives that serve large files are other hosts, and need no token.
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .user_agent(concat!("mach/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(Duration::from_secs(20)))
            .timeout_recv_response(Some(Duration::from_secs(60)))
            // A connection that stalls is given up, one that is slow goes on where it was.
            .timeout_recv_body(Some(Duration::from_secs(120)))
            .build();
        Self { agent: config.into(), endpoint, token }
    }

    /// Requests the bytes of a URL from `from` on, to `to` where it says so.
    pub(super) fn get(&self, url: &str, from: u64, to: Option<u64>) -> Result<Response<ureq::Body>, HubError> {
        let mut request = self.agent.get(url);
        if let Some(token) = &self.token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        match to {
            Some(to) => request = request.header("Range", format!("bytes={from}-{}", to.saturating_sub(1))),
            None if from > 0 => request = request.header("Range", format!("bytes={from}-")),
            None => {}
        }
        let response = request.call().map_err(|e| HubError::Connection { url: url.to_owned(), reason: e.to_string() })?;
        let code = response.headers().get("x-error-code").and_then(|code| code.to_str().ok()).unwrap_or_default();
        match response.status().as_u16() {
            200 | 206 | 416 => Ok(response),
            // The hub does not say which private repositories exist.
            401 | 404 if matches!(code, "RepoNotFound" | "RevisionNotFound" | "EntryNotFound") => Err(HubError::NotFound { url: url.to_owned() }),
            404 => Err(HubError::NotFound { url: url.to_owned() }),
            status @ (401 | 403) => {
                let hint = match &self.token {
                    None => "set HF_TOKEN to a token that may read it, and accept the model's terms on its page if it has some",
                    Some(_) => "HF_TOKEN may not read it; accept the model's terms on its page, or use another token",
                };
                Err(HubError::Refused { url: url.to_owned(), status, hint })
            }
            status => Err(HubError::Status { url: url.to_owned(), status }),
        }
    }

    /// Where a file's bytes are.
    pub(super) fn file_url(&self, repo: &str, commit: &str, path: &str) -> String {
        format!("{}/{repo}/resolve/{commit}/{}", self.endpoint, encoded(path))
    }

    /// What a revision holds.
    pub(super) fn listing(&self, repo: &str, revision: &str) -> Result<Listing, HubError> {
        let url = format!("{}/api/models/{repo}/revision/{}?blobs=true", self.endpoint, encoded(revision).replace('/', "%2F"));
        let wrong = |reason: String| HubError::Answer { url: url.clone(), reason };
        let response = super::download::with_retries(|| self.get(&url, 0, None))?;
        let text = response.into_body().into_with_config().limit(MAX_LISTING).read_to_string().map_err(|e| wrong(e.to_string()))?;
        let answer: Value = serde_json::from_str(&text).map_err(|e| wrong(e.to_string()))?;
        let commit = answer["sha"].as_str().filter(|sha| is_hex(sha)).ok_or_else(|| wrong("it names no commit".to_owned()))?;
        let files = answer["siblings"].as_array().ok_or_else(|| wrong("it lists no files".to_owned()))?;
        let files = files.iter().map(|file| remote_file(file).ok_or_else(|| wrong(format!("{file} has no usable name, size and hash"))));
        Ok(Listing { commit: commit.to_owned(), files: files.collect::<Result<_, _>>()? })
    }
}

/// Names become paths in the cache, so they must stay inside.
fn remote_file(file: &Value) -> Option<RemoteFile> {
    let path = file["rfilename"].as_str().filter(|path| is_inside(path))?;
    let large = |key: &str| file["lfs"].get(key);
    let size = large("size").or_else(|| file.get("size"))?.as_u64()?;
    let hash = match (large("sha256").and_then(Value::as_str), file["blobId"].as_str()) {
        (Some(hex), _) if is_hex(hex) => Hash::Sha256(hex.to_owned()),
        (None, Some(hex)) if is_hex(hex) => Hash::Git(hex.to_owned()),
        _ => return None,
    };
    Some(RemoteFile { path: path.to_owned(), size, hash })
}

/// A relative path of plain names.
pub(super) fn is_inside(path: &str) -> bool {
    !path.contains(['\\', '\0']) && path.split('/').all(|part| !matches!(part, "" | "." | ".."))
}

fn is_hex(text: &str) -> bool {
    (40..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// A path with what URLs cannot hold escaped.
fn encoded(path: &str) -> String {
    let keep = |b: u8| b.is_ascii_alphanumeric() || b"-_.~/".contains(&b);
    path.bytes().map(|b| if keep(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// A listing is outside data: paths that leave the cache and hashes that are none are refused.
    #[test]
    fn listings_are_checked() {
        let sha = "a".repeat(64);
        let git = "b".repeat(40);
        let large = json!({"rfilename": "a/b.safetensors", "size": 9, "blobId": git, "lfs": {"sha256": sha, "size": 9}});
        assert_eq!(remote_file(&large), Some(RemoteFile { path: "a/b.safetensors".into(), size: 9, hash: Hash::Sha256(sha) }));
        let small = json!({"rfilename": "config.json", "size": 3, "blobId": git});
        assert_eq!(remote_file(&small).map(|f| f.hash), Some(Hash::Git(git.clone())));
        for path in ["../x", "/etc/x", "a//b", "a/../b", "..", "", "a\\b"] {
            assert_eq!(remote_file(&json!({"rfilename": path, "size": 3, "blobId": git})), None, "{path}");
        }
        assert_eq!(remote_file(&json!({"rfilename": "x", "size": 3, "blobId": "../../etc/passwd"})), None);
        assert_eq!(remote_file(&json!({"rfilename": "x", "blobId": git})), None);
        assert_eq!(encoded("a b/ü?.gguf"), "a%20b/%C3%BC%3F.gguf");
    }
}
