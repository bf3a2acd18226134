//! Which files of a repository mach needs.

use serde_json::Value;

use super::HubError;
use super::api::RemoteFile;

/// Configuration, tokenizer and template.
const TEXT: [&str; 6] = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "hf_quant_config.json"];
/// Which tensor is in which file.
pub(super) const INDEX: &str = "model.safetensors.index.json";

/// The files to download: a checkpoint's text files with its weights, or one GGUF model alone. `index` is the parsed [`INDEX`], where
/// there is one; `include` are patterns, of which a weight file must match one.
pub(super) fn select<'a>(repo: &str, files: &'a [RemoteFile], index: Option<&Value>, include: &[String]) -> Result<Vec<&'a RemoteFile>, HubError> {
    let asked = |path: &str| include.is_empty() || include.iter().any(|pattern| matches(pattern, path));
    let listed = |path: &str| index.is_none_or(|index| index["weight_map"].as_object().is_none_or(|map| map.values().any(|file| file == path)));
    // Folders hold the same weights for other programs.
    let is_weights = |f: &&RemoteFile| f.path.ends_with(".safetensors") && !f.path.contains('/') && listed(&f.path) && asked(&f.path);
    let sidecar = |f: &&RemoteFile| f.path.starts_with(mach_format::SIDECAR_DIR) && f.path[mach_format::SIDECAR_DIR.len()..].starts_with('/');
    let weights: Vec<&RemoteFile> = files.iter().filter(is_weights).collect();
    if !weights.is_empty() {
        let text = files.iter().filter(|f| TEXT.contains(&f.path.as_str()) || f.path == INDEX);
        return Ok(text.chain(weights).chain(files.iter().filter(sidecar)).collect());
    }
    let is_gguf = |f: &&RemoteFile| f.path.ends_with(".gguf") && !name(&f.path).starts_with("mmproj") && asked(&f.path);
    let ggufs: Vec<&RemoteFile> = files.iter().filter(is_gguf).collect();
    let mut models: Vec<&str> = ggufs.iter().map(|f| model(&f.path)).collect();
    models.sort_unstable();
    models.dedup();
    match models.as_slice() {
        [] => Err(HubError::NoWeights { repo: repo.to_owned(), including: if include.is_empty() { "" } else { " among those asked for" } }),
        [_] => Ok(ggufs),
        [first, ..] => Err(HubError::Choose { repo: repo.to_owned(), example: format!("*{}*", name(first)), names: models.join(", ") }),
    }
}

fn name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// The model that a GGUF file is, or is a part of.
fn model(path: &str) -> &str {
    let stem = path.strip_suffix(".gguf").unwrap_or(path);
    let number = |text: &str| text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
    match stem.rsplit_once("-of-") {
        Some((rest, all)) if number(all) => rest.rsplit_once('-').filter(|(_, part)| number(part)).map_or(stem, |(model, _)| model),
        _ => stem,
    }
}

/// Whether a path matches a pattern of `*` (any text) and `?` (any character).
fn matches(pattern: &str, path: &str) -> bool {
    let mut chars = pattern.chars();
    match chars.next() {
        None => path.is_empty(),
        Some('*') => (0..=path.len()).filter(|&i| path.is_char_boundary(i)).any(|i| matches(chars.as_str(), &path[i..])),
        Some(c) => path.chars().next().is_some_and(|p| (c == '?' || c == p) && matches(chars.as_str(), &path[p.len_utf8()..])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hub::api::Hash;
    use serde_json::json;

    fn selected(paths: &[&str], index: Option<&Value>, include: &[&str]) -> Result<Vec<String>, &'static str> {
        let files: Vec<RemoteFile> = paths.iter().map(|p| RemoteFile { path: (*p).into(), size: 1, hash: Hash::Git("0".repeat(40)) }).collect();
        let include: Vec<String> = include.iter().map(|s| (*s).to_owned()).collect();
        select("a/b", &files, index, &include).map(|s| s.iter().map(|f| f.path.clone()).collect()).map_err(|e| e.code())
    }

    /// Of a checkpoint come its text files and the shards of its index, not the copies for other programs.
    #[test]
    fn checkpoints() {
        let paths = [
            "README.md",
            "config.json",
            "tokenizer.json",
            "vocab.json",
            INDEX,
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "consolidated.safetensors",
            "original/model.safetensors",
            "metal/model.bin",
            "pytorch_model.bin",
            "model-Q4_K.gguf",
            "expert_sidecar/manifest.json",
            "expert_sidecars.txt",
        ];
        let index = json!({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}});
        let want =
            ["config.json", "tokenizer.json", INDEX, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "expert_sidecar/manifest.json"];
        assert_eq!(selected(&paths, Some(&index), &[]).unwrap(), want);
        assert_eq!(selected(&["README.md", "model.bin"], None, &[]), Err("pull-no-weights"));
    }

    /// Of GGUF files comes one model with all its parts; between several somebody must choose.
    #[test]
    fn gguf_files() {
        let paths = ["config.json", "m-Q4_K_M.gguf", "Q8_0/m-Q8_0-00001-of-00002.gguf", "Q8_0/m-Q8_0-00002-of-00002.gguf", "mmproj-F16.gguf"];
        assert_eq!(selected(&paths, None, &[]), Err("pull-choose"));
        assert_eq!(selected(&paths, None, &["*Q4_K*"]).unwrap(), ["m-Q4_K_M.gguf"]);
        assert_eq!(selected(&paths, None, &["*q8*", "Q8_0/*"]).unwrap(), [paths[2], paths[3]]);
        assert_eq!(selected(&paths, None, &["*Q5*"]), Err("pull-no-weights"));
        assert_eq!(selected(&["m.gguf", "config.json"], None, &[]).unwrap(), ["m.gguf"]);
        assert!(matches("a?c*", "aüc") && !matches("a", "ab") && matches("**", ""));
    }
}
