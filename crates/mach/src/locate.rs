//! Finding models: a directory, a GGUF file, `org/name` in the Hugging Face cache, or the built-in one.

use std::fs;
use std::path::{Path, PathBuf};

use crate::Error;

/// Where packs stand in a repository's folder of the cache.
pub(crate) const PACKS: &str = "packs";

/// A model on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelPath {
    /// Its directory, or its GGUF file.
    pub dir: PathBuf,
    /// What to call it.
    pub name: String,
    /// The built-in demonstration model.
    pub builtin: bool,
}

/// Where Hugging Face tools keep checkpoints: `HF_HUB_CACHE`, `HF_HOME/hub`, `~/.cache/huggingface/hub`.
pub fn hub_cache() -> PathBuf {
    let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let home = || var("HOME").unwrap_or_default();
    var("HF_HUB_CACHE").or_else(|| var("HF_HOME").map(|h| h.join("hub"))).unwrap_or_else(|| home().join(".cache/huggingface/hub"))
}

/// Finds a model; without a name the built-in one.
///
/// # Errors
/// [`Error::ModelNotFound`] with the command that downloads it, [`Error::NoSuchPath`], [`Error::NoBuiltin`].
pub fn locate(model: Option<&str>) -> Result<ModelPath, Error> {
    let Some(model) = model else { return builtin() };
    let path = Path::new(model);
    if let Some(file) = mach_models::gguf_file(path) {
        let name = file.file_stem().map_or_else(|| model.to_owned(), |n| n.to_string_lossy().into_owned());
        return Ok(ModelPath { dir: file, name, builtin: false });
    }
    if path.is_dir() {
        let absolute = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let name = absolute.file_name().map_or_else(|| model.to_owned(), |n| n.to_string_lossy().into_owned());
        return Ok(ModelPath { dir: path.to_owned(), name, builtin: false });
    }
    if !is_repo_name(model) {
        return Err(Error::NoSuchPath { path: model.to_owned() });
    }
    let cache = hub_cache();
    match in_cache(&cache.join(format!("models--{}", model.replace('/', "--")))) {
        Some(dir) => Ok(ModelPath { dir, name: model.to_owned(), builtin: false }),
        None => Err(Error::ModelNotFound { name: model.to_owned(), cache }),
    }
}

/// Whether this is `org/name`.
pub(crate) fn is_repo_name(name: &str) -> bool {
    let valid = |s: &str| !s.is_empty() && !s.starts_with('.') && s.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
    name.split_once('/').is_some_and(|(org, repo)| valid(org) && valid(repo))
}

/// The newest pack of a repository, else the snapshot that `refs/main` names, else the newest.
fn in_cache(repo: &Path) -> Option<PathBuf> {
    newest(&repo.join(PACKS)).or_else(|| snapshot(repo))
}

fn newest(dir: &Path) -> Option<PathBuf> {
    let found = fs::read_dir(dir).ok()?.flatten().map(|e| e.path());
    found.filter_map(|d| model_in(&d)).max_by_key(|m| fs::metadata(m).and_then(|m| m.modified()).ok())
}

fn snapshot(repo: &Path) -> Option<PathBuf> {
    let snapshots = repo.join("snapshots");
    if let Ok(rev) = fs::read_to_string(repo.join("refs/main")) {
        let dir = snapshots.join(rev.trim());
        if let Some(model) = model_in(&dir) {
            return Some(model);
        }
    }
    newest(&snapshots)
}

/// A directory that is a checkpoint, or the one GGUF model that it holds.
fn model_in(dir: &Path) -> Option<PathBuf> {
    if dir.join("config.json").exists() { Some(dir.to_owned()) } else { mach_models::gguf_file(dir) }
}

fn builtin() -> Result<ModelPath, Error> {
    let mut tried: Vec<PathBuf> = Vec::new();
    tried.extend(std::env::var_os("MACH_TINY").map(PathBuf::from));
    if let Ok(exe) = std::env::current_exe() {
        tried.extend(exe.parent().map(|bin| bin.join("../share/mach/tiny")));
    }
    tried.push(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny"));
    match tried.iter().find(|d| d.join("config.json").exists()) {
        Some(dir) => Ok(ModelPath { dir: dir.canonicalize().unwrap_or_else(|_| dir.clone()), name: "mach-tiny".to_owned(), builtin: true }),
        None => Err(Error::NoBuiltin { tried: tried.iter().map(|d| d.display().to_string()).collect::<Vec<_>>().join(", ") }),
    }
}

/// Checkpoints and GGUF files in the Hugging Face cache and in `models_dir`, sorted by name.
pub fn installed(models_dir: Option<&Path>) -> Vec<ModelPath> {
    let mut found = Vec::new();
    for entry in fs::read_dir(hub_cache()).into_iter().flatten().flatten() {
        let folder = entry.file_name().to_string_lossy().into_owned();
        if let (Some(repo), Some(dir)) = (folder.strip_prefix("models--"), in_cache(&entry.path())) {
            found.push(ModelPath { dir, name: repo.replacen("--", "/", 1), builtin: false });
        }
    }
    // One level of folders, and one of org/name below it.
    let mut look = |dir: &Path, prefix: &str| -> Vec<PathBuf> {
        let mut others = Vec::new();
        for file in mach_models::gguf_files(dir) {
            let name = format!("{prefix}{}", file.file_name().unwrap_or_default().to_string_lossy());
            found.push(ModelPath { dir: file, name, builtin: false });
        }
        for entry in fs::read_dir(dir).into_iter().flatten().flatten().filter(|e| e.path().is_dir()) {
            let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
            if entry.path().join("config.json").exists() {
                found.push(ModelPath { dir: entry.path(), name, builtin: false });
            } else {
                others.push(entry.path());
            }
        }
        others
    };
    if let Some(dir) = models_dir {
        for sub in look(dir, "") {
            let prefix = format!("{}/", sub.file_name().unwrap_or_default().to_string_lossy());
            look(&sub, &prefix);
        }
    }
    found.sort_by(|a, b| a.name.cmp(&b.name).then(a.dir.cmp(&b.dir)));
    found
}

#[cfg(test)]
mod tests {
    use super::is_repo_name;

    /// Protects the difference between a mistyped path and a repository to download.
    #[test]
    fn repository_names() {
        assert!(is_repo_name("Qwen/Qwen3.6-35B-A3B"));
        for not in ["Qwen", "./models/x", "/tmp/x", "a/b/c", "../x", "org/", "org/na me"] {
            assert!(!is_repo_name(not), "{not}");
        }
    }
}
