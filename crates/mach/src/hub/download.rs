//! One file into the cache: resumed where it stopped, checked against its hash.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use sha1::{Digest as _, Sha1};
use sha2::Sha256;

use super::api::{Client, Hash, RemoteFile};
use super::{HubError, PullEvent};
use crate::hub::cache::RepoCache;

/// Attempts in a row that may bring nothing.
const ATTEMPTS: u32 = 5;
const BUFFER: usize = 1 << 20;

/// What a file's download needs to know of the others.
pub(super) struct Shared<'a> {
    pub(super) client: &'a Client,
    pub(super) cache: &'a RepoCache,
    pub(super) progress: &'a (dyn Fn(PullEvent) + Sync),
    /// Set when a file has failed.
    pub(super) stop: &'a AtomicBool,
}

/// Runs a request again while it fails for a passing reason.
pub(super) fn with_retries<T>(mut request: impl FnMut() -> Result<T, HubError>) -> Result<T, HubError> {
    let mut failures = 0;
    loop {
        match request() {
            Err(e) if e.is_passing() && failures + 1 < ATTEMPTS => {
                failures += 1;
                std::thread::sleep(pause(failures));
            }
            other => return other,
        }
    }
}

fn pause(failures: u32) -> Duration {
    Duration::from_millis(100 << failures.min(6))
}

/// Calls `f` with the numbers below `count` in turn, several at a time. The first failure stops the others.
pub(super) fn in_parallel(jobs: usize, count: usize, stop: &AtomicBool, f: impl Fn(usize) -> Result<(), HubError> + Sync) -> Result<(), HubError> {
    let (next, failure) = (AtomicUsize::new(0), Mutex::new(None));
    std::thread::scope(|scope| {
        for _ in 0..jobs.clamp(1, count.max(1)) {
            scope.spawn(|| {
                while let Some(i) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|&i| i < count && !stop.load(Ordering::Relaxed)) {
                    if let Err(e) = f(i) {
                        stop.store(true, Ordering::Relaxed);
                        let mut first = failure.lock().unwrap_or_else(PoisonError::into_inner);
                        if !matches!(e, HubError::Stopped) {
                            first.get_or_insert(e);
                        }
                    }
                }
            });
        }
    });
    failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

/// Downloads a file's blob unless it is there. Returns the bytes that came over the network.
pub(super) fn fetch(shared: &Shared<'_>, url: &str, file: &RemoteFile) -> Result<u64, HubError> {
    let mut came = 0;
    match fetch_once(shared, url, file, &mut came) {
        // What was damaged on its way comes whole the next time; what is damaged where it lies does not.
        Err(HubError::Checksum { .. }) => {
            (shared.progress)(PullEvent::Done(-(file.size as i64)));
            fetch_once(shared, url, file, &mut came)?;
        }
        other => other?,
    }
    Ok(came)
}

fn fetch_once(shared: &Shared<'_>, url: &str, file: &RemoteFile, came: &mut u64) -> Result<(), HubError> {
    let blob = shared.cache.blob(&file.hash);
    if shared.cache.has(file) {
        (shared.progress)(PullEvent::Done(file.size as i64));
        return Ok(());
    }
    let partial = shared.cache.incomplete(&file.hash);
    let failed = |action: &str| HubError::io(format!("{action} {}", partial.display()));
    let mut out = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(&partial).map_err(failed("write"))?;
    match out.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(HubError::Busy { file: partial }),
        // Some network drives know no locks.
        Err(TryLockError::Error(_)) => {}
    }
    let mut hasher = Hasher::new(file);
    let mut have = hasher.read(&mut out, file.size).map_err(failed("read"))?;
    (shared.progress)(PullEvent::Done(have as i64));
    let (mut best, mut failures) = (have, 0);
    while have < file.size {
        let result = append(shared, url, file, &mut out, &mut hasher, &mut have, came);
        match result {
            Ok(()) => {}
            Err(e) if e.is_passing() => {
                // A connection that brought something new counts as a good one.
                failures = if have > best { 1 } else { failures + 1 };
                best = best.max(have);
                if failures >= ATTEMPTS {
                    return Err(e);
                }
                std::thread::sleep(pause(failures));
            }
            Err(e) => return Err(e),
        }
    }
    let found = hasher.hex();
    if found != file.hash.hex() {
        std::fs::remove_file(&partial).map_err(failed("remove"))?;
        return Err(HubError::Checksum { file: file.path.clone(), want: file.hash.hex().to_owned(), found });
    }
    out.sync_all().map_err(failed("write"))?;
    std::fs::rename(&partial, &blob).map_err(failed("rename"))
}

/// One request: what it brings is written, hashed and counted.
fn append(shared: &Shared<'_>, url: &str, file: &RemoteFile, out: &mut File, hasher: &mut Hasher, have: &mut u64, came: &mut u64) -> Result<(), HubError> {
    let broken = |reason: String| HubError::Connection { url: url.to_owned(), reason };
    let response = shared.client.get(url, *have, None)?;
    let continues = response.status().as_u16() == 206 && range_start(&response) == Some(*have);
    if *have > 0 && !continues {
        // The server starts anew: so do we.
        (shared.progress)(PullEvent::Done(-(*have as i64)));
        out.set_len(0).and_then(|()| out.rewind()).map_err(HubError::io(format!("write {}", file.path)))?;
        *hasher = Hasher::new(file);
        *have = 0;
        if response.status().as_u16() != 200 {
            return Err(broken("the server does not continue where it was asked to".to_owned()));
        }
    }
    let mut body = response.into_body().into_reader();
    let mut buffer = vec![0; BUFFER];
    loop {
        if shared.stop.load(Ordering::Relaxed) {
            return Err(HubError::Stopped);
        }
        let n = body.read(&mut buffer).map_err(|e| broken(e.to_string()))?;
        if n == 0 {
            break;
        }
        if *have + n as u64 > file.size {
            return Err(HubError::Answer { url: url.to_owned(), reason: format!("it is longer than its {} bytes", file.size) });
        }
        out.write_all(&buffer[..n]).map_err(HubError::io(format!("write {}", shared.cache.incomplete(&file.hash).display())))?;
        hasher.update(&buffer[..n]);
        *have += n as u64;
        *came += n as u64;
        (shared.progress)(PullEvent::Done(n as i64));
    }
    if *have < file.size { Err(broken(format!("the connection ended after {have} of {} bytes", file.size))) } else { Ok(()) }
}

/// The first byte of a partial answer.
pub(super) fn range_start(response: &ureq::http::Response<ureq::Body>) -> Option<u64> {
    let range = response.headers().get("content-range")?.to_str().ok()?;
    range.trim().strip_prefix("bytes ")?.split('-').next()?.parse().ok()
}

/// A file's hash while it grows.
enum Hasher {
    Sha256(Sha256),
    Git(Sha1),
}

impl Hasher {
    fn new(file: &RemoteFile) -> Self {
        match file.hash {
            Hash::Sha256(_) => Self::Sha256(Sha256::new()),
            Hash::Git(_) => {
                let mut sha = Sha1::new();
                sha.update(format!("blob {}\0", file.size));
                Self::Git(sha)
            }
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(sha) => sha.update(bytes),
            Self::Git(sha) => sha.update(bytes),
        }
    }

    /// Takes what an earlier run left; more than `size` is thrown away whole.
    fn read(&mut self, file: &mut File, size: u64) -> std::io::Result<u64> {
        if file.metadata()?.len() > size {
            file.set_len(0)?;
        }
        file.seek(SeekFrom::Start(0))?;
        let (mut buffer, mut have) = (vec![0; BUFFER], 0);
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(have),
                n => {
                    self.update(&buffer[..n]);
                    have += n as u64;
                }
            }
        }
    }

    fn hex(self) -> String {
        let bytes = match self {
            Self::Sha256(sha) => sha.finalize().to_vec(),
            Self::Git(sha) => sha.finalize().to_vec(),
        };
        bytes.iter().map(|b| format!("{b:02x}")).collect()
    }
}
