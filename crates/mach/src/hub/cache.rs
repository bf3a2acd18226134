//! The cache's layout, which all Hugging Face tools share: `blobs/HASH`, `snapshots/COMMIT/PATH` as links to them, `refs/REVISION`;
//! and mach's own `packs/COMMIT`.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use super::HubError;
use super::api::{Hash, RemoteFile};
use crate::locate::PACKS;

/// One repository's folder in the cache.
pub(super) struct RepoCache {
    dir: PathBuf,
}

impl RepoCache {
    pub(super) fn new(cache: &Path, repo: &str) -> Self {
        Self { dir: cache.join(format!("models--{}", repo.replace('/', "--"))) }
    }

    /// Makes its folders.
    pub(super) fn create(&self) -> Result<(), HubError> {
        let blobs = self.dir.join("blobs");
        fs::create_dir_all(&blobs).map_err(HubError::io(format!("create {}", blobs.display())))
    }

    pub(super) fn blob(&self, hash: &Hash) -> PathBuf {
        self.dir.join("blobs").join(hash.hex())
    }

    /// Where a blob grows.
    pub(super) fn incomplete(&self, hash: &Hash) -> PathBuf {
        self.dir.join("blobs").join(format!("{}.incomplete", hash.hex()))
    }

    /// Whether a file's blob is complete.
    pub(super) fn has(&self, file: &RemoteFile) -> bool {
        fs::metadata(self.blob(&file.hash)).is_ok_and(|m| m.len() == file.size)
    }

    /// Bytes of it that an earlier run left.
    pub(super) fn left(&self, file: &RemoteFile) -> u64 {
        fs::metadata(self.incomplete(&file.hash)).map_or(0, |m| if m.len() <= file.size { m.len() } else { 0 })
    }

    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.dir.join("snapshots").join(commit)
    }

    /// The commit that a revision named when it was last downloaded, if its snapshot is there.
    pub(super) fn known(&self, revision: &str) -> Option<String> {
        let named = fs::read_to_string(self.dir.join("refs").join(revision)).ok().map(|commit| commit.trim().to_owned());
        let commit = named.unwrap_or_else(|| revision.to_owned());
        (super::api::is_inside(&commit) && self.snapshot(&commit).is_dir()).then_some(commit)
    }

    /// Where a pack of a commit is kept.
    pub(super) fn pack(&self, commit: &str, bits: Option<(u8, u16)>) -> PathBuf {
        let name = bits.map_or_else(|| commit.to_owned(), |(bits, group)| format!("{commit}-{bits}bit-g{group}"));
        self.packs().join(name)
    }

    /// The folder of all packs.
    pub(super) fn packs(&self) -> PathBuf {
        self.dir.join(PACKS)
    }

    /// Names of the blobs that snapshots show.
    pub(super) fn shown(&self) -> HashSet<OsString> {
        fn walk(dir: &Path, found: &mut HashSet<OsString>) {
            for entry in fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path()) {
                match fs::read_link(&entry) {
                    Ok(target) => found.extend(target.file_name().map(OsString::from)),
                    Err(_) if entry.is_dir() => walk(&entry, found),
                    Err(_) => {}
                }
            }
        }
        let mut found = HashSet::new();
        walk(&self.dir.join("snapshots"), &mut found);
        found
    }

    /// Removes a file's blob, or what there is of it.
    pub(super) fn remove(&self, hash: &Hash) -> Result<(), HubError> {
        for path in [self.blob(hash), self.incomplete(hash)] {
            match fs::remove_file(&path) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(HubError::io(format!("remove {}", path.display()))(e)),
                _ => {}
            }
        }
        Ok(())
    }

    /// Shows a blob under its name.
    pub(super) fn link(&self, commit: &str, file: &RemoteFile) -> Result<(), HubError> {
        let path = self.snapshot(commit).join(&file.path);
        let failed = |action: &str| HubError::io(format!("{action} {}", path.display()));
        fs::create_dir_all(path.parent().unwrap_or(&path)).map_err(failed("create the folder of"))?;
        // Relative, so that the cache may be moved.
        let up = "../".repeat(file.path.matches('/').count() + 2);
        let target = PathBuf::from(format!("{up}blobs/{}", file.hash.hex()));
        if fs::read_link(&path).is_ok_and(|there| there == target) {
            return Ok(());
        }
        match fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(failed("replace")(e)),
            _ => {}
        }
        #[cfg(unix)]
        let linked = std::os::unix::fs::symlink(&target, &path);
        #[cfg(not(unix))]
        let linked = fs::hard_link(self.blob(&file.hash), &path);
        linked.map_err(failed("link"))
    }

    /// Remembers what a revision names. A commit names itself.
    pub(super) fn name(&self, revision: &str, commit: &str) -> Result<(), HubError> {
        if revision == commit {
            return Ok(());
        }
        let path = self.dir.join("refs").join(revision);
        let failed = |action: &str| HubError::io(format!("{action} {}", path.display()));
        fs::create_dir_all(path.parent().unwrap_or(&path)).map_err(failed("create the folder of"))?;
        fs::write(&path, commit).map_err(failed("write"))
    }
}
