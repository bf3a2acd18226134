//! Downloads from the Hugging Face hub into its standard cache.

mod api;
mod cache;
mod download;
mod error;
mod outline;
mod pack;
mod packing;
mod schedule;
mod select;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use serde_json::Value;

use api::{Client, Listing, RemoteFile};
use cache::RepoCache;
use download::{Shared, fetch, in_parallel};
pub use error::HubError;
pub use pack::{PackRequest, PulledPack};
use select::{INDEX, select};

/// Where checkpoints come from and go to.
#[derive(Clone, Debug)]
pub struct Hub {
    /// The server.
    pub endpoint: String,
    /// What opens private and gated repositories.
    pub token: Option<String>,
    /// The cache's folder.
    pub cache: PathBuf,
    /// Nothing is downloaded.
    pub offline: bool,
}

/// What to download.
#[derive(Clone, Debug)]
pub struct PullRequest {
    /// `org/name`.
    pub repo: String,
    /// Branch, tag or commit.
    pub revision: String,
    /// Patterns (`*`, `?`) of which a weight file must match one; empty takes all.
    pub include: Vec<String>,
    /// Files at a time.
    pub jobs: usize,
}

/// A checkpoint that is complete in the cache.
#[derive(Clone, Debug)]
pub struct Pulled {
    /// Its folder, or its GGUF file.
    pub path: PathBuf,
    /// The commit; empty when a snapshot was found offline under another name.
    pub commit: String,
    /// Its files.
    pub files: usize,
    /// Bytes of all of them.
    pub bytes: u64,
    /// Bytes that came over the network now.
    pub downloaded: u64,
}

/// What happens during a download.
#[derive(Clone, Debug)]
pub enum PullEvent {
    /// Bytes of all files.
    Total(u64),
    /// So many more of them are there; less where a server could not go on.
    Done(i64),
    /// Bytes of the pack.
    PackTotal(u64),
    /// So many more of them are written.
    Packed(u64),
    /// Something that should be known, with a stable code.
    Note(&'static str, String),
}

impl Hub {
    /// As the environment says: `HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME`, `HF_HUB_CACHE`, `HF_HUB_OFFLINE`.
    pub fn from_env() -> Self {
        let var = |name: &str| std::env::var(name).ok().map(|v| v.trim().to_owned()).filter(|v| !v.is_empty());
        let offline = var("HF_HUB_OFFLINE").is_some_and(|v| ["1", "true", "yes", "on"].contains(&v.to_lowercase().as_str()));
        let endpoint = var("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned());
        Self { endpoint: endpoint.trim_end_matches('/').to_owned(), token: var("HF_TOKEN"), cache: crate::hub_cache(), offline }
    }

    /// Downloads what mach needs of a checkpoint. What is there already is not downloaded again; what was broken off goes on.
    /// `progress` is called from several threads.
    ///
    /// # Errors
    /// [`HubError`]; what was downloaded stays for the next attempt.
    pub fn pull(&self, request: &PullRequest, progress: &(dyn Fn(PullEvent) + Sync)) -> Result<Pulled, HubError> {
        let cache = RepoCache::new(&self.cache, &request.repo);
        if self.offline {
            let offline = || HubError::Offline { repo: request.repo.clone(), revision: request.revision.clone(), cache: self.cache.clone() };
            let commit = cache.known(&request.revision).ok_or_else(offline)?;
            return Ok(Pulled { path: cache.snapshot(&commit), commit, files: 0, bytes: 0, downloaded: 0 });
        }
        let client = self.client(&request.repo)?;
        let listing = client.listing(&request.repo, &request.revision)?;
        cache.create()?;
        let stop = AtomicBool::new(false);
        let quiet = Shared { client: &client, cache: &cache, progress: &|_| {}, stop: &stop };
        let (files, index_bytes) = chosen(request, &listing, &quiet)?;
        let missing: u64 = files.iter().filter(|f| !cache.has(f)).map(|f| f.size - cache.left(f)).sum();
        self.check_space(missing)?;
        progress(PullEvent::Total(files.iter().map(|f| f.size).sum()));
        let shared = Shared { progress, ..quiet };
        let downloaded = index_bytes + fetch_all(&shared, request, &listing.commit, &files)?;
        // A snapshot is shown when it is complete.
        for file in &files {
            cache.link(&listing.commit, file)?;
        }
        cache.name(&request.revision, &listing.commit)?;
        let snapshot = cache.snapshot(&listing.commit);
        let gguf = files.iter().map(|f| &f.path).filter(|path| path.ends_with(".gguf")).min();
        Ok(Pulled {
            path: gguf.map_or(snapshot.clone(), |file| snapshot.join(file)),
            commit: listing.commit.clone(),
            files: files.len(),
            bytes: files.iter().map(|f| f.size).sum(),
            downloaded,
        })
    }

    /// A client, unless this build cannot speak to the server.
    fn client(&self, repo: &str) -> Result<Client, HubError> {
        if cfg!(not(feature = "tls")) && self.endpoint.starts_with("https:") {
            return Err(HubError::NoTls { endpoint: self.endpoint.clone(), repo: repo.to_owned() });
        }
        Ok(Client::new(self.endpoint.clone(), self.token.clone()))
    }

    fn check_space(&self, need: u64) -> Result<(), HubError> {
        // Where it cannot be asked, writing will tell.
        match mach_format::free_space(&self.cache) {
            Ok(free) if free < need => Err(HubError::DiskFull { cache: self.cache.clone(), free: crate::units::size(free), need: crate::units::size(need) }),
            _ => Ok(()),
        }
    }
}

/// The files to download, and the bytes that came for the index that says which.
fn chosen<'a>(request: &PullRequest, listing: &'a Listing, shared: &Shared<'_>) -> Result<(Vec<&'a RemoteFile>, u64), HubError> {
    let (index, bytes) = match listing.files.iter().find(|f| f.path == INDEX) {
        Some(file) => read_index(request, listing, file, shared).map(|(index, bytes)| (Some(index), bytes))?,
        None => (None, 0),
    };
    Ok((select(&request.repo, &listing.files, index.as_ref(), &request.include)?, bytes))
}

/// The index of the shards, and the bytes that came for it.
fn read_index(request: &PullRequest, listing: &Listing, file: &RemoteFile, shared: &Shared<'_>) -> Result<(Value, u64), HubError> {
    let url = shared.client.file_url(&request.repo, &listing.commit, &file.path);
    let came = fetch(shared, &url, file)?;
    let blob = shared.cache.blob(&file.hash);
    let bytes = std::fs::read(&blob).map_err(HubError::io(format!("read {}", blob.display())))?;
    let index = serde_json::from_slice(&bytes).map_err(|e| HubError::Answer { url, reason: e.to_string() })?;
    Ok((index, came))
}

/// All files, several at a time, the large ones first. The first failure stops the others.
fn fetch_all(shared: &Shared<'_>, request: &PullRequest, commit: &str, files: &[&RemoteFile]) -> Result<u64, HubError> {
    let mut order: Vec<&RemoteFile> = files.to_vec();
    order.sort_by(|a, b| b.size.cmp(&a.size).then_with(|| a.hash.hex().cmp(b.hash.hex())));
    // Copies of one file are one blob.
    order.dedup_by(|a, b| a.hash == b.hash);
    let downloaded = AtomicU64::new(0);
    in_parallel(request.jobs, order.len(), shared.stop, |i| {
        let came = fetch(shared, &shared.client.file_url(&request.repo, commit, &order[i].path), order[i])?;
        downloaded.fetch_add(came, Ordering::Relaxed);
        Ok(())
    })?;
    Ok(downloaded.into_inner())
}
