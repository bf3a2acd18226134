//! Small file-system helpers: free space, atomic replacement.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::error::FormatError;

/// Bytes that an unprivileged process may still write to the file system that holds `path` (or its nearest
/// existing parent).
///
/// # Errors
/// When no parent can be examined.
pub fn free_space(path: &Path) -> Result<u64, FormatError> {
    let mut at = path;
    while !at.exists() {
        match at.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => at = parent,
            _ => {
                at = Path::new(".");
                break;
            }
        }
    }
    let stat = rustix::fs::statvfs(at).map_err(|e| FormatError::io("examine", at)(e.into()))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Tells the system that the cached pages of a file (all from `offset` on where `len` is `None`) are not needed
/// again: experts must not push other data out of the page cache. Pages must be clean. Only a hint; does nothing
/// where there is no such call.
pub fn forget_pages(file: &File, offset: u64, len: Option<u64>) {
    #[cfg(target_os = "linux")]
    let _ = rustix::fs::fadvise(file, offset, len.and_then(std::num::NonZeroU64::new), rustix::fs::Advice::DontNeed);
    #[cfg(not(target_os = "linux"))]
    let _ = (file, offset, len);
}

/// Lets the system begin to read a part of a file into its page cache. Only a hint; does nothing where there is no such
/// call.
pub(crate) fn expect_pages(file: &File, offset: u64, len: u64) {
    // Linux reads no more than its read-ahead at a call.
    #[cfg(target_os = "linux")]
    for at in (0..len).step_by(128 << 10) {
        let piece = std::num::NonZeroU64::new((len - at).min(128 << 10));
        let _ = rustix::fs::fadvise(file, offset + at, piece, rustix::fs::Advice::WillNeed);
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (file, offset, len);
}

/// A file written under a temporary name and renamed when it is complete; removed when dropped before.
pub(crate) struct AtomicFile {
    file: File,
    tmp: PathBuf,
    path: PathBuf,
    bytes: u64,
    forget: bool,
    done: bool,
}

impl AtomicFile {
    /// Opens `path` + `.tmp` for writing. `bytes` is the expected size, for the message of a full disk.
    pub(crate) fn create(path: &Path, bytes: u64) -> Result<Self, FormatError> {
        let mut tmp = path.as_os_str().to_owned();
        tmp.push(".tmp");
        let tmp = PathBuf::from(tmp);
        let file = File::create(&tmp).map_err(FormatError::write(&tmp, bytes))?;
        Ok(Self { file, tmp, path: path.to_owned(), bytes, forget: false, done: false })
    }

    /// Does not leave the content in the page cache.
    pub(crate) fn forget_when_done(mut self) -> Self {
        self.forget = true;
        self
    }

    /// Appends.
    pub(crate) fn write(&mut self, data: &[u8]) -> Result<(), FormatError> {
        self.file.write_all(data).map_err(FormatError::write(&self.path, self.bytes))
    }

    /// Makes the content durable and gives it its name.
    pub(crate) fn commit(mut self) -> Result<(), FormatError> {
        self.file.sync_all().map_err(FormatError::write(&self.path, self.bytes))?;
        fs::rename(&self.tmp, &self.path).map_err(FormatError::io("rename", &self.tmp))?;
        self.done = true;
        if self.forget {
            forget_pages(&self.file, 0, None);
        }
        if let Some(dir) = self.path.parent() {
            sync_dir(dir)?;
        }
        Ok(())
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if !self.done {
            // Nothing can be done about a failure here; a stale .tmp file is never read.
            let _ = fs::remove_file(&self.tmp);
        }
    }
}

/// Writes a small file atomically.
pub(crate) fn write_atomic(path: &Path, data: &[u8]) -> Result<(), FormatError> {
    let mut file = AtomicFile::create(path, data.len() as u64)?;
    file.write(data)?;
    file.commit()
}

/// Makes renames in `dir` durable.
pub(crate) fn sync_dir(dir: &Path) -> Result<(), FormatError> {
    let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
    File::open(dir).and_then(|d| d.sync_all()).map_err(FormatError::io("sync", dir))
}
