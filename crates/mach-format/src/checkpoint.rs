//! Checkpoints: a directory as Hugging Face writes it (`config.json`, `generation_config.json` and safetensors, sharded
//! or single), or a GGUF file seen as one.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use half::{bf16, f16};
use indexmap::IndexMap;
use safetensors::tensor::Metadata;
use serde_json::Value;

use crate::bytes::Bytes;
use crate::direct::{DirectFile, READ_ALIGN, ReadMode};
use crate::disk::forget_pages;
use crate::error::FormatError;
use crate::gguf::{GgmlType, Gguf};
use crate::outline::ShardAt;
use crate::sidecar::SIDECAR_DIR;

pub use safetensors::Dtype;

const INDEX: &str = "model.safetensors.index.json";
/// Headers beyond this are refused before they are read.
pub(crate) const MAX_HEADER: u64 = 100_000_000;

/// How the elements of a tensor are stored.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum ElementType {
    /// One after the other.
    Plain(Dtype),
    /// In blocks of ggml along the last dimension.
    Block(GgmlType),
}

/// The name of the type itself.
impl std::fmt::Debug for ElementType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Plain(dtype) => dtype.fmt(f),
            Self::Block(ty) => ty.fmt(f),
        }
    }
}

impl ElementType {
    /// Whether its values are F32, F16 or BF16.
    pub fn is_float(self) -> bool {
        matches!(self, Self::Plain(Dtype::F32 | Dtype::F16 | Dtype::BF16))
    }
}

/// Where a tensor lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Element type.
    pub dtype: ElementType,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Number of the file.
    pub file: usize,
    /// Absolute position in the file.
    pub offset: u64,
    /// Length.
    pub bytes: u64,
}

/// The open weight files of a checkpoint, shared by every [`Matrix`](crate::Matrix) of it.
pub(crate) struct Files {
    pub(crate) open: Vec<(PathBuf, File)>,
    /// The same for reads past the page cache, opened when first used; `None` where there are no such.
    direct: Vec<OnceLock<Option<DirectFile>>>,
}

impl Files {
    fn new(open: Vec<(PathBuf, File)>) -> Self {
        let direct = open.iter().map(|_| OnceLock::new()).collect();
        Self { open, direct }
    }

    /// A file for reads past the page cache, where the file system has them.
    pub(crate) fn direct(&self, file: usize) -> Option<&DirectFile> {
        let open = || DirectFile::open(&self.open[file].0).ok().filter(|f| f.mode() == ReadMode::Direct);
        self.direct[file].get_or_init(open).as_ref()
    }

    pub(crate) fn read(&self, file: usize, offset: u64, out: &mut [u8]) -> Result<(), FormatError> {
        let (path, file) = &self.open[file];
        file.read_exact_at(out, offset).map_err(FormatError::io("read", path))
    }

    /// The same into a buffer of the thread, leaving no pages in the page cache where `past_cache`.
    pub(crate) fn read_bytes(&self, file: usize, offset: u64, bytes: usize, past_cache: bool) -> Result<Bytes, FormatError> {
        if let Some(direct) = past_cache.then(|| self.direct(file)).flatten() {
            let start = offset / READ_ALIGN as u64 * READ_ALIGN as u64;
            let skip = (offset - start) as usize;
            let mut out = Bytes::with_len((skip + bytes).next_multiple_of(READ_ALIGN), READ_ALIGN);
            direct.read_blocks_at(start, skip + bytes, &mut out).map_err(FormatError::io("read", direct.path()))?;
            out.narrow(skip..skip + bytes);
            return Ok(out);
        }
        let mut out = Bytes::with_len(bytes, 1);
        self.read(file, offset, &mut out)?;
        if past_cache {
            forget_pages(&self.open[file].1, offset, Some(bytes as u64));
        }
        Ok(out)
    }
}

/// The file behind a checkpoint that is none. Its metadata, mostly vocabulary, is not kept.
struct GgufFile {
    path: PathBuf,
    vocabulary_bytes: u64,
}

/// A checkpoint with its weight files open. Tensors are read on demand, nothing is mapped.
pub struct Checkpoint {
    dir: PathBuf,
    /// Of a GGUF file.
    gguf: Option<GgufFile>,
    config: Value,
    generation: Option<Value>,
    tensors: IndexMap<String, TensorInfo>,
    /// Files of which only the outline is there.
    partial: Vec<usize>,
    pub(crate) files: Arc<Files>,
}

impl Checkpoint {
    /// Reads the configuration and the headers of all weight files. Shards are those that the index names; without
    /// an index there must be exactly one `*.safetensors` file.
    ///
    /// # Errors
    /// A missing or malformed `config.json`, a missing shard, an index that does not fit its shards, a file whose
    /// length or header is wrong.
    pub fn open(dir: &Path) -> Result<Self, FormatError> {
        Self::open_outline(dir, &|_| None)
    }

    /// As [`Checkpoint::open`] where not all shards are in the directory, or not whole: `shard` says of a file's name where it is
    /// and how long the whole is. Its header must be there, and what [`shape_tensors`](crate::shape_tensors) names; what else can be read,
    /// [`Checkpoint::has_data`] says.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn open_outline(dir: &Path, shard: &dyn Fn(&str) -> Option<ShardAt>) -> Result<Self, FormatError> {
        let config_path = dir.join("config.json");
        if !config_path.is_file() {
            return Err(FormatError::NotACheckpoint { path: config_path });
        }
        let config = read_json(&config_path)?;
        let generation_path = dir.join("generation_config.json");
        let generation = generation_path.is_file().then(|| read_json(&generation_path)).transpose()?;
        let index_path = dir.join(INDEX);
        let (shards, weight_map) = if index_path.is_file() { read_index(&index_path)? } else { (vec![single_file(dir)?], IndexMap::new()) };

        let mut tensors = IndexMap::new();
        let (mut open, mut partial) = (Vec::with_capacity(shards.len()), Vec::new());
        for (number, name) in shards.iter().enumerate() {
            let at = shard(name);
            let bytes = at.as_ref().map(|at| at.bytes);
            if at.as_ref().is_some_and(|at| !at.whole) {
                partial.push(number);
            }
            let path = at.map_or_else(|| dir.join(name), |at| at.path);
            let file = File::open(&path).map_err(|e| match e.kind() {
                std::io::ErrorKind::NotFound if !weight_map.is_empty() => FormatError::MissingShard { path: path.clone(), index: index_path.clone() },
                _ => FormatError::io("open", &path)(e),
            })?;
            let length = bytes.map_or_else(|| file.metadata().map(|m| m.len()), Ok).map_err(FormatError::io("examine", &path))?;
            for (tensor, info) in read_header(&path, &file, number, length)? {
                // The index decides where a name that stands in two shards is read from.
                if weight_map.get(&tensor).is_none_or(|home| home == name) {
                    tensors.entry(tensor).or_insert(info);
                }
            }
            open.push((path, file));
        }
        for (name, shard) in &weight_map {
            if tensors.get(name).is_none_or(|t| &shards[t.file] != shard) {
                return Err(FormatError::IndexMismatch { index: index_path, tensor: name.clone(), shard: dir.join(shard) });
            }
        }
        Ok(Self { dir: dir.to_owned(), gguf: None, config, generation, tensors, partial, files: Arc::new(Files::new(open)) })
    }

    /// A GGUF model seen as a checkpoint: `config` is what its metadata says in the words of a `config.json`, `rename`
    /// gives the names that tensors have in such a checkpoint (`None` keeps a name).
    ///
    /// # Errors
    /// Two tensors of one name.
    pub fn from_gguf(gguf: Gguf, config: Value, rename: &dyn Fn(&str) -> Option<String>) -> Result<Self, FormatError> {
        let Gguf { path, metadata, tensors: table, files: open } = gguf;
        let mut tensors = IndexMap::with_capacity(table.len());
        for (name, info) in table {
            let new = rename(&name).unwrap_or(name);
            if tensors.insert(new.clone(), info).is_some() {
                return Err(FormatError::Gguf { path, reason: format!("two of its tensors are {new}") });
            }
        }
        let dir = path.parent().unwrap_or_else(|| Path::new("")).to_owned();
        let gguf = Some(GgufFile { path, vocabulary_bytes: metadata.text_bytes() });
        Ok(Self { dir, gguf, config, generation: None, tensors, partial: Vec::new(), files: Arc::new(Files::new(open)) })
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What to call it in messages: the directory or the GGUF file.
    pub fn path(&self) -> &Path {
        self.gguf.as_ref().map_or(&self.dir, |gguf| &gguf.path)
    }

    /// Whether it is a GGUF file.
    pub fn is_gguf(&self) -> bool {
        self.gguf.is_some()
    }

    /// Bytes that the vocabulary in a GGUF file would take as a `tokenizer.json`; `None` for a directory.
    pub fn vocabulary_bytes(&self) -> Option<u64> {
        self.gguf.as_ref().map(|gguf| gguf.vocabulary_bytes)
    }

    /// Where its sidecar is kept: `expert_sidecar` in a directory, `NAME.expert_sidecar` beside `NAME.gguf`.
    pub fn sidecar_dir(&self) -> PathBuf {
        self.gguf.as_ref().map_or_else(|| self.dir.join(SIDECAR_DIR), |gguf| gguf.path.with_extension(SIDECAR_DIR))
    }

    /// `config.json`, or what stands for it.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// The part of the configuration that describes the language model: nested `text_config`, or the whole.
    pub fn text_config(&self) -> &Value {
        self.config.get("text_config").filter(|t| t.is_object()).unwrap_or(&self.config)
    }

    /// `generation_config.json`.
    pub fn generation(&self) -> Option<&Value> {
        self.generation.as_ref()
    }

    /// `model_type` of the top level.
    pub fn model_type(&self) -> Option<&str> {
        self.config.get("model_type")?.as_str()
    }

    /// A tensor by its full name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// Whether a tensor is there and can be read: of an outline it is known, no more.
    pub fn has_data(&self, name: &str) -> bool {
        self.tensors.get(name).is_some_and(|info| !self.partial.contains(&info.file))
    }

    /// All tensors in the order of their files.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &TensorInfo)> {
        self.tensors.iter().map(|(name, info)| (name.as_str(), info))
    }

    /// Bytes of all tensors.
    pub fn total_bytes(&self) -> u64 {
        self.tensors.values().map(|t| t.bytes).sum()
    }

    /// The weight files.
    pub fn weight_files(&self) -> impl Iterator<Item = &Path> {
        self.files.open.iter().map(|(path, _)| path.as_path())
    }

    /// A tensor or the error that names it.
    ///
    /// # Errors
    /// [`FormatError::MissingTensor`].
    pub fn require(&self, name: &str) -> Result<&TensorInfo, FormatError> {
        self.tensors.get(name).ok_or_else(|| FormatError::MissingTensor { dir: self.path().to_owned(), tensor: name.to_owned() })
    }

    /// The bytes of a tensor as they lie.
    ///
    /// # Errors
    /// A missing tensor, a read error.
    pub fn read_bytes(&self, name: &str) -> Result<Vec<u8>, FormatError> {
        let info = self.require(name)?;
        let mut bytes = vec![0; info.bytes as usize];
        self.files.read(info.file, info.offset, &mut bytes)?;
        Ok(bytes)
    }

    /// An F32, F16 or BF16 tensor of any shape, widened.
    ///
    /// # Errors
    /// A missing tensor, another element type, a read error.
    pub fn read_f32(&self, name: &str) -> Result<Vec<f32>, FormatError> {
        let ty = PlainType::of(name, self.require(name)?.dtype)?;
        let bytes = self.read_bytes(name)?;
        let mut out = vec![0.0; bytes.len() / ty.bytes()];
        ty.widen(&bytes, &mut out);
        Ok(out)
    }

    /// An I32 or I64 tensor of any shape whose values are numbers of things.
    ///
    /// # Errors
    /// A missing tensor, another element type, a value outside 32 bits or below zero, a read error.
    pub fn read_ids(&self, name: &str) -> Result<Vec<u32>, FormatError> {
        let dtype = self.require(name)?.dtype;
        let width = match dtype {
            ElementType::Plain(Dtype::I32) => 4,
            ElementType::Plain(Dtype::I64) => 8,
            other => return Err(FormatError::Dtype { tensor: name.to_owned(), expected: "I32 or I64", got: format!("{other:?}") }),
        };
        let bytes = self.read_bytes(name)?;
        let id = |b: &[u8]| {
            let mut wide = [0; 8];
            wide[..width].copy_from_slice(b);
            let n = if width == 4 { i64::from(u64::from_le_bytes(wide) as u32 as i32) } else { i64::from_le_bytes(wide) };
            u32::try_from(n).map_err(|_| FormatError::Dtype { tensor: name.to_owned(), expected: "ids", got: n.to_string() })
        };
        bytes.chunks_exact(width).map(id).collect()
    }
}

/// Element types that are widened to f32 exactly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PlainType {
    F32,
    F16,
    BF16,
}

impl PlainType {
    pub(crate) fn of(tensor: &str, dtype: ElementType) -> Result<Self, FormatError> {
        match dtype {
            ElementType::Plain(Dtype::F32) => Ok(Self::F32),
            ElementType::Plain(Dtype::F16) => Ok(Self::F16),
            ElementType::Plain(Dtype::BF16) => Ok(Self::BF16),
            other => Err(FormatError::Dtype { tensor: tensor.to_owned(), expected: "F32, F16 or BF16", got: format!("{other:?}") }),
        }
    }

    pub(crate) const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }

    /// Widens little-endian `bytes` into `out`, as many as both have.
    pub(crate) fn widen(self, bytes: &[u8], out: &mut [f32]) {
        match self {
            Self::F32 => bytes.as_chunks().0.iter().zip(out).for_each(|(b, o)| *o = f32::from_le_bytes(*b)),
            Self::F16 => bytes.as_chunks().0.iter().zip(out).for_each(|(b, o)| *o = f16::from_le_bytes(*b).to_f32()),
            Self::BF16 => bytes.as_chunks().0.iter().zip(out).for_each(|(b, o)| *o = bf16::from_le_bytes(*b).to_f32()),
        }
    }
}

fn read_json(path: &Path) -> Result<Value, FormatError> {
    let text = fs::read(path).map_err(FormatError::io("read", path))?;
    let value: Value = serde_json::from_slice(&text).map_err(|e| json_error(path, e.to_string()))?;
    if value.is_object() { Ok(value) } else { Err(json_error(path, "not an object".to_owned())) }
}

fn json_error(path: &Path, reason: String) -> FormatError {
    FormatError::Json { path: path.to_owned(), reason }
}

/// Shard names in order and the shard of every tensor.
fn read_index(path: &Path) -> Result<(Vec<String>, IndexMap<String, String>), FormatError> {
    let index = read_json(path)?;
    let map = index.get("weight_map").and_then(Value::as_object).filter(|m| !m.is_empty());
    let map = map.ok_or_else(|| json_error(path, "no weight_map".to_owned()))?;
    let mut weight_map = IndexMap::with_capacity(map.len());
    for (tensor, shard) in map {
        let shard = shard.as_str().filter(|s| Path::new(s).file_name().is_some_and(|f| f == *s));
        let shard = shard.ok_or_else(|| json_error(path, format!("the shard of {tensor} is not a plain file name")))?;
        weight_map.insert(tensor.clone(), shard.to_owned());
    }
    let mut shards: Vec<String> = weight_map.values().cloned().collect();
    shards.sort_unstable();
    shards.dedup();
    Ok((shards, weight_map))
}

/// The only `*.safetensors` file of a directory without an index.
fn single_file(dir: &Path) -> Result<String, FormatError> {
    if dir.join("model.safetensors").is_file() {
        return Ok("model.safetensors".to_owned());
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(FormatError::io("list", dir))? {
        let name = entry.map_err(FormatError::io("list", dir))?.file_name();
        if let Some(name) = name.to_str().filter(|n| n.ends_with(".safetensors")) {
            found.push(name.to_owned());
        }
    }
    match found.len() {
        1 => Ok(found.remove(0)),
        n => Err(FormatError::NoWeights { dir: dir.to_owned(), found: n }),
    }
}

/// Parses and validates a safetensors header against the length of its file when that is whole.
fn read_header(path: &Path, file: &File, number: usize, length: u64) -> Result<Vec<(String, TensorInfo)>, FormatError> {
    let header_error = |reason: String| FormatError::Header { path: path.to_owned(), reason };
    let truncated = |expected, got| FormatError::Truncated { path: path.to_owned(), expected, got };
    let mut prefix = [0; 8];
    if length < 8 {
        return Err(truncated(8, length));
    }
    file.read_exact_at(&mut prefix, 0).map_err(FormatError::io("read", path))?;
    let header_len = u64::from_le_bytes(prefix);
    if &prefix == b"version " {
        return Err(header_error("it is a Git LFS pointer, not the weights: fetch the real file".to_owned()));
    }
    if header_len > MAX_HEADER {
        return Err(header_error(format!("its length is given as {header_len} bytes")));
    }
    if 8 + header_len > length {
        return Err(truncated(8 + header_len, length));
    }
    let mut header = vec![0; header_len as usize];
    file.read_exact_at(&mut header, 8).map_err(FormatError::io("read", path))?;
    let metadata: Metadata = serde_json::from_slice(&header).map_err(|e| header_error(e.to_string()))?;
    let expected = 8 + header_len + metadata.data_len() as u64;
    if expected != length {
        return Err(truncated(expected, length));
    }
    let tensor = |name: String| {
        let t = metadata.info(&name)?;
        let (start, end) = t.data_offsets;
        let (dtype, offset, bytes) = (ElementType::Plain(t.dtype), 8 + header_len + start as u64, (end - start) as u64);
        Some((name, TensorInfo { dtype, shape: t.shape.clone(), file: number, offset, bytes }))
    };
    Ok(metadata.offset_keys().into_iter().filter_map(tensor).collect())
}
