//! GGUF files seen as checkpoints: a family's tables turn names and metadata into those of a Hugging Face checkpoint, so
//! that everything after them is the same.
//!
//! Weights in such a file differ in three ways from those of the source: norms contain the `1 +`, decays are stored as
//! `−exp(A_log)`, and the value heads of delta nets lie tiled. The configuration made here says so (`weight_convention`), also
//! in a pack that is built from the file; heads are paired as they lie, because quantised columns cannot be put back.

use std::cell::RefCell;
use std::collections::HashSet;
use std::path::{Path, PathBuf};

use mach_format::gguf::{Gguf, MetaList, MetaValue, Metadata};
use mach_format::{Checkpoint, FormatError};
use serde_json::{Map, Value, json};

use crate::ModelError;
use crate::config::{Fields, MAX_LAYERS};
use crate::registry::REGISTRY;

/// Field of the configuration that says how weights are stored.
const CONVENTION: &str = "weight_convention";
const GGUF: &str = "gguf";

/// A family in GGUF files.
pub struct GgufArch {
    /// `general.architecture`.
    pub name: &'static str,
    /// Names of tensors.
    pub names: &'static GgufNames,
    /// Reads the metadata into the fields of a `config.json`.
    pub config: fn(&Meta<'_>) -> Result<Map<String, Value>, ModelError>,
}

/// Pairs of a GGUF name and that of a checkpoint.
pub struct GgufNames {
    /// Beside the layers.
    pub model: &'static [(&'static str, &'static str)],
    /// What stands before the number of a layer.
    pub layers: &'static str,
    /// After `blk.N.`: tables of pairs.
    pub layer: &'static [&'static [(&'static str, &'static str)]],
    /// Beginning of the names of layers beyond the last: heads that draft tokens.
    pub draft: &'static str,
}

impl GgufNames {
    fn layer_pairs(&self) -> impl Iterator<Item = &(&'static str, &'static str)> {
        self.layer.iter().copied().flatten()
    }

    /// The name in a checkpoint of `layers` layers.
    fn rename(&self, name: &str, layers: usize) -> Option<String> {
        let Some((layer, rest)) = name.strip_prefix("blk.").and_then(|n| n.split_once('.')) else {
            return self.model.iter().find(|(from, _)| *from == name).map(|(_, to)| (*to).to_owned());
        };
        let number: usize = layer.parse().ok()?;
        if number >= layers {
            return Some(format!("{}{layer}.{rest}", self.draft));
        }
        self.layer_pairs().find(|(from, _)| *from == rest).map(|(_, to)| format!("{}{number}.{to}", self.layers))
    }

    /// The name in a GGUF file of a checkpoint's tensor.
    pub fn original(&self, name: &str) -> Option<String> {
        let Some((layer, rest)) = name.strip_prefix(self.layers).and_then(|n| n.split_once('.')) else {
            return self.model.iter().find(|(_, to)| *to == name).map(|(from, _)| (*from).to_owned());
        };
        self.layer_pairs().find(|(_, to)| *to == rest).map(|(from, _)| format!("blk.{layer}.{from}"))
    }
}

/// Reads `architecture.*` of the metadata and remembers which keys were asked for.
pub struct Meta<'a> {
    metadata: &'a Metadata,
    arch: &'a str,
    vocab: usize,
    tied: bool,
    seen: RefCell<HashSet<String>>,
}

impl Meta<'_> {
    fn key(&self, key: &str) -> String {
        let full = format!("{}.{key}", self.arch);
        self.seen.borrow_mut().insert(full.clone());
        full
    }

    fn wrong(&self, key: &str, problem: impl Into<String>) -> ModelError {
        FormatError::GgufMetadata { key: format!("{}.{key}", self.arch), problem: problem.into() }.into()
    }

    /// Rows of the embedding.
    pub fn vocab(&self) -> usize {
        self.vocab
    }

    /// Whether there is no output head.
    pub fn tied(&self) -> bool {
        self.tied
    }

    /// Layers without those of draft heads.
    ///
    /// # Errors
    /// As [`Meta::size`].
    pub fn layers(&self) -> Result<usize, ModelError> {
        let (all, draft) = (self.size("block_count")?, self.size_or("nextn_predict_layers", 0)?);
        all.checked_sub(draft).filter(|n| (1..=MAX_LAYERS).contains(n)).ok_or_else(|| self.wrong("block_count", format!("is {all}, {draft} of them draft")))
    }

    fn size_opt(&self, key: &str) -> Result<Option<usize>, ModelError> {
        let full = self.key(key);
        // A list has one value a layer; only equal ones are known.
        let n = match self.metadata.get(&full) {
            Some(MetaValue::List(MetaList::Int(all))) => match all.first() {
                Some(&first) if all.iter().all(|&n| n == first) => u64::try_from(first).ok(),
                _ => return Err(self.wrong(key, "differs from layer to layer, which is not supported")),
            },
            _ => self.metadata.size(&full)?,
        };
        // 2^31 bounds products of two sizes well inside 64 bits.
        n.map(|n| if n <= 1 << 31 { Ok(n as usize) } else { Err(self.wrong(key, format!("is {n}"))) }).transpose()
    }

    /// A size of at least 1 that must be there.
    ///
    /// # Errors
    /// A missing key, a value of another type.
    pub fn size(&self, key: &str) -> Result<usize, ModelError> {
        match self.size_opt(key)? {
            Some(0) => Err(self.wrong(key, "is 0")),
            Some(n) => Ok(n),
            None => Err(self.wrong(key, "is missing")),
        }
    }

    /// A size with a default.
    ///
    /// # Errors
    /// A value of another type.
    pub fn size_or(&self, key: &str, default: usize) -> Result<usize, ModelError> {
        Ok(self.size_opt(key)?.unwrap_or(default))
    }

    /// Whole numbers, one a layer.
    ///
    /// # Errors
    /// A missing key, a value of another type, numbers below zero.
    pub fn sizes(&self, key: &str) -> Result<Vec<usize>, ModelError> {
        let not = || self.wrong(key, "is not a list of sizes");
        let Some(MetaList::Int(all)) = self.metadata.list(&self.key(key))? else { return Err(not()) };
        all.iter().map(|&n| usize::try_from(n).map_err(|_| not())).collect()
    }

    /// A number with a default. A list has one value a layer; only equal ones are known.
    ///
    /// # Errors
    /// A value of another type.
    pub fn number_or(&self, key: &str, default: f64) -> Result<f64, ModelError> {
        let full = self.key(key);
        match self.metadata.get(&full) {
            Some(MetaValue::List(MetaList::Float(all))) => match all.first() {
                Some(&first) if all.iter().all(|&x| x == first) => Ok(first),
                _ => Err(self.wrong(key, "differs from layer to layer, which is not supported")),
            },
            _ => Ok(self.metadata.number(&full)?.unwrap_or(default)),
        }
    }

    /// Text, if present.
    ///
    /// # Errors
    /// A value of another type.
    pub fn text(&self, key: &str) -> Result<Option<&str>, ModelError> {
        Ok(self.metadata.text(&self.key(key))?)
    }

    /// A list of flags, if present.
    ///
    /// # Errors
    /// A value of another type.
    pub fn flags(&self, key: &str) -> Result<Option<&[bool]>, ModelError> {
        match self.metadata.list(&self.key(key))? {
            None => Ok(None),
            Some(MetaList::Bool(flags)) => Ok(Some(flags)),
            Some(_) => Err(self.wrong(key, "is not a list of flags")),
        }
    }

    /// A key whose value has no effect here.
    pub fn skip(&self, key: &str) {
        self.key(key);
    }

    /// A key that must be absent or have one value (a flag counts as 0 or 1).
    ///
    /// # Errors
    /// Another value.
    pub fn only(&self, key: &str, value: usize) -> Result<(), ModelError> {
        let full = self.key(key);
        let got = match self.metadata.get(&full) {
            None => return Ok(()),
            Some(MetaValue::Bool(flag)) => f64::from(u8::from(*flag)),
            Some(_) => self.metadata.number(&full)?.unwrap_or_default(),
        };
        if got == value as f64 { Ok(()) } else { Err(self.wrong(key, format!("is {got}; only {value} is supported"))) }
    }

    /// Fields for the keys that nobody asked for, so that those that smell of maths are reported as in a `config.json`.
    fn rest(&self) -> Map<String, Value> {
        let seen = self.seen.borrow();
        let prefix = format!("{}.", self.arch);
        let value = |v: &MetaValue| match v {
            MetaValue::Bool(b) => json!(b),
            MetaValue::Text(t) => json!(t),
            MetaValue::F32(x) => json!(x),
            MetaValue::F64(x) => json!(x),
            MetaValue::U32(n) => json!(n),
            MetaValue::I32(n) => json!(n),
            MetaValue::U64(n) => json!(n),
            MetaValue::I64(n) => json!(n),
            MetaValue::List(list) => json!(format!("{} values", list.len())),
        };
        let unread = self.metadata.iter().filter(|(key, _)| !seen.contains(*key));
        unread.filter_map(|(key, v)| Some((key.strip_prefix(&prefix)?.replace('.', "_"), value(v)))).collect()
    }
}

/// Whether a configuration says that weights are as in GGUF files.
pub(crate) fn gguf_weights(c: &Fields<'_>) -> Result<bool, ModelError> {
    c.only(CONVENTION, &json!(GGUF))?;
    Ok(c.get(CONVENTION).is_some())
}

/// The same, of a whole checkpoint.
pub(crate) fn has_gguf_weights(ck: &Checkpoint) -> bool {
    ck.text_config().get(CONVENTION).is_some_and(|v| v == GGUF)
}

fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf")) && path.is_file()
}

/// The GGUF models of a directory: its files, of split ones the first part, without vision towers.
pub fn gguf_files(dir: &Path) -> Vec<PathBuf> {
    let later = |p: &Path| {
        let stem = p.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
        stem.rsplit_once("-of-").and_then(|(rest, _)| rest.rsplit_once('-')).is_some_and(|(_, n)| n.len() == 5 && n != "00001")
    };
    // A vision tower lies beside its model under this name.
    let projector = |p: &Path| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("mmproj"));
    let files = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path());
    files.filter(|p| is_gguf(p) && !later(p) && !projector(p)).collect()
}

/// The GGUF file that a path means: itself, or the only model of a directory without a `config.json`.
pub fn gguf_file(path: &Path) -> Option<PathBuf> {
    if path.is_file() {
        return is_gguf(path).then(|| path.to_owned());
    }
    if path.join("config.json").exists() {
        return None;
    }
    let mut files = gguf_files(path);
    if files.len() == 1 { files.pop() } else { None }
}

/// Opens a checkpoint directory, a GGUF file, or a directory with one GGUF file.
///
/// # Errors
/// Files that are malformed, an architecture that is not known.
pub fn open_checkpoint(path: &Path) -> Result<Checkpoint, ModelError> {
    let Some(file) = gguf_file(path) else { return Ok(Checkpoint::open(path)?) };
    let gguf = Gguf::open(&file)?;
    let key = "general.architecture";
    let name = gguf.metadata().text(key)?.ok_or_else(|| FormatError::GgufMetadata { key: key.to_owned(), problem: "is missing".to_owned() })?;
    let arch = REGISTRY
        .iter()
        .map(|a| a.gguf)
        .find(|a| a.name == name)
        .ok_or_else(|| ModelError::UnknownArch { model_type: name.to_owned(), known: REGISTRY.iter().map(|a| a.gguf.name).collect::<Vec<_>>().join(", ") })?;
    let tensor = |name: &str| gguf.tensors().find(|(n, _)| *n == name).map(|(_, info)| info);
    let vocab = tensor("token_embd.weight").and_then(|t| t.shape.first()).copied().unwrap_or(0);
    let meta = Meta { metadata: gguf.metadata(), arch: arch.name, vocab, tied: tensor("output.weight").is_none(), seen: RefCell::default() };
    let mut config = (arch.config)(&meta)?;
    meta.skip("vocab_size");
    let layers = meta.layers()?;
    config.insert(CONVENTION.to_owned(), json!(GGUF));
    for (key, field) in [("tokenizer.ggml.eos_token_id", "eos_token_id"), ("tokenizer.ggml.bos_token_id", "bos_token_id")] {
        if let Some(id) = gguf.metadata().size(key)? {
            config.insert(field.to_owned(), json!(id));
        }
    }
    config.extend(meta.rest());
    Ok(Checkpoint::from_gguf(gguf, Value::Object(config), &|name| arch.names.rename(name, layers))?)
}
