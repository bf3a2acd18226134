//! The one error type of this crate.

use std::io;
use std::path::{Path, PathBuf};

/// What can be wrong with bytes on disk. Each variant names the file or tensor, what was expected and what was found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The operating system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// A verb: `open`, `read`, `write`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The directory is no checkpoint.
    #[error("{} is missing: {} is not a checkpoint directory", path.display(), path.parent().unwrap_or(path).display())]
    NotACheckpoint {
        /// The missing file.
        path: PathBuf,
    },
    /// A JSON file that does not parse or has the wrong shape.
    #[error("{} is not valid: {reason}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// No weights where they should be.
    #[error("{} has no model.safetensors.index.json and {found} *.safetensors files where exactly one is expected", dir.display())]
    NoWeights {
        /// The checkpoint directory.
        dir: PathBuf,
        /// Files that end in `.safetensors`.
        found: usize,
    },
    /// A shard that the index names is not there.
    #[error("shard {} is missing although {} names it: download it again", path.display(), index.display())]
    MissingShard {
        /// The shard.
        path: PathBuf,
        /// The index.
        index: PathBuf,
    },
    /// The index names a tensor that its shard lacks.
    #[error("{} says that {tensor} is in {}, which does not have it", index.display(), shard.display())]
    IndexMismatch {
        /// The index.
        index: PathBuf,
        /// The tensor.
        tensor: String,
        /// The shard.
        shard: PathBuf,
    },
    /// A file shorter (or longer) than its header says.
    #[error("{} has {got} bytes where its header says {expected}: download it again", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Bytes by the header.
        expected: u64,
        /// Bytes there are.
        got: u64,
    },
    /// A safetensors header that is malformed.
    #[error("{} has no valid safetensors header: {reason}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A GGUF file that is malformed, or parts that do not belong together.
    #[error("{} is not a valid GGUF file: {reason}", path.display())]
    Gguf {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// Metadata of a GGUF file that is missing or of the wrong type.
    #[error("GGUF metadata: `{key}` {problem}")]
    GgufMetadata {
        /// The key.
        key: String,
        /// What is wrong.
        problem: String,
    },
    /// A tensor that is needed and absent.
    #[error("tensor {tensor} is missing in {}", dir.display())]
    MissingTensor {
        /// The checkpoint directory.
        dir: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// A tensor of another shape.
    #[error("tensor {tensor} has shape {got:?}, expected {expected}")]
    Shape {
        /// The tensor.
        tensor: String,
        /// What was expected.
        expected: String,
        /// What the file says.
        got: Vec<usize>,
    },
    /// A tensor of a type that is not read.
    #[error("tensor {tensor} has type {got}, expected {expected}")]
    Dtype {
        /// The tensor.
        tensor: String,
        /// Types that are read.
        expected: &'static str,
        /// What the file says.
        got: String,
    },
    /// A quantisation that is recognised and not supported.
    #[error(
        "tensor {tensor} uses {what}, which is not supported (supported: F32, F16, BF16, MXFP4, NVFP4, FP8 (E4M3), affine 2 to 8 bits in groups of 32, 64, 128, compressed-tensors' integers, and all types of GGUF but TQ1_0, TQ2_0 and NVFP4)"
    )]
    UnsupportedQuantisation {
        /// The tensor.
        tensor: String,
        /// The scheme.
        what: String,
    },
    /// A quantisation whose order of bits fits no kernel.
    #[error(
        "tensor {tensor} is quantised by {method}, which is not read: take the model unquantised (`mach artifacts build --bits 4` quantises it), or in GGUF, MLX or compressed-tensors form"
    )]
    ForeignQuantisation {
        /// The tensor.
        tensor: String,
        /// GPTQ or AWQ.
        method: String,
    },
    /// Shapes and config disagree about a quantised tensor.
    #[error("tensor {tensor} does not fit its quantisation: config says {expected}, the shapes say {got}")]
    QuantisationMismatch {
        /// The tensor.
        tensor: String,
        /// By the config.
        expected: String,
        /// By the shapes.
        got: String,
    },
    /// A weight that cannot be quantised.
    #[error("tensor {tensor}, row {row}: {reason}")]
    Quantise {
        /// The tensor.
        tensor: String,
        /// The row.
        row: usize,
        /// Why.
        reason: String,
    },
    /// A destination buffer of the wrong size.
    #[error("buffer for {tensor} has {got} bytes, {expected} are needed")]
    Buffer {
        /// The tensor.
        tensor: String,
        /// Needed bytes.
        expected: usize,
        /// Given bytes.
        got: usize,
    },
    /// A plan that does not fit the checkpoint.
    #[error("the plan does not fit the checkpoint: {reason}")]
    Plan {
        /// Why.
        reason: String,
    },
    /// No sidecar.
    #[error("no expert sidecar at {}: build it with `mach artifacts build`", dir.display())]
    SidecarMissing {
        /// Where it was looked for.
        dir: PathBuf,
    },
    /// A sidecar of another version of the format.
    #[error("{} is version {got}, this program reads version {expected}: build it again", path.display())]
    SidecarVersion {
        /// The file.
        path: PathBuf,
        /// The version that is read.
        expected: u32,
        /// The version there is.
        got: u32,
    },
    /// A sidecar that was built from another checkpoint.
    #[error("the sidecar {} belongs to the checkpoint {got}, this one is {expected}: build it again", dir.display())]
    SidecarFingerprint {
        /// The sidecar.
        dir: PathBuf,
        /// Fingerprint of the checkpoint.
        expected: String,
        /// Fingerprint in the manifest.
        got: String,
    },
    /// A sidecar whose files do not fit each other.
    #[error("sidecar file {} is damaged: {reason}; build it again", path.display())]
    SidecarCorrupt {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        reason: String,
    },
    /// A record whose bytes are not those that were written.
    #[error("wrong checksum in {}: layer {layer}, expert {expert}, {part}: expected {expected:016x}, got {got:016x}; the disk or the file is damaged, build it again", path.display())]
    Checksum {
        /// The layer file.
        path: PathBuf,
        /// The layer.
        layer: usize,
        /// The expert.
        expert: usize,
        /// `gate|up` or `down`.
        part: &'static str,
        /// As written.
        expected: u64,
        /// As read.
        got: u64,
    },
    /// Another process builds in the same place.
    #[error("another process is building {}", dir.display())]
    Busy {
        /// The directory.
        dir: PathBuf,
    },
    /// The output exists.
    #[error("{} exists already: choose another place or remove it", path.display())]
    OutputExists {
        /// The path.
        path: PathBuf,
    },
    /// No room.
    #[error("the disk is full while writing {}: {needed} bytes are needed, {free} are free; what was finished is kept, run the same command again to go on", path.display())]
    DiskFull {
        /// The file.
        path: PathBuf,
        /// Bytes of the file.
        needed: u64,
        /// Bytes that are free.
        free: u64,
    },
}

impl FormatError {
    /// Stable kebab-case name of the variant, for scripts.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Io { .. } => "io",
            Self::NotACheckpoint { .. } => "not-a-checkpoint",
            Self::Json { .. } => "invalid-json",
            Self::NoWeights { .. } => "no-weights",
            Self::MissingShard { .. } => "missing-shard",
            Self::IndexMismatch { .. } => "index-mismatch",
            Self::Truncated { .. } => "truncated-file",
            Self::Header { .. } => "invalid-header",
            Self::Gguf { .. } => "invalid-gguf",
            Self::GgufMetadata { .. } => "gguf-metadata",
            Self::MissingTensor { .. } => "missing-tensor",
            Self::Shape { .. } => "wrong-shape",
            Self::Dtype { .. } => "wrong-dtype",
            Self::UnsupportedQuantisation { .. } => "unsupported-quantisation",
            Self::ForeignQuantisation { .. } => "foreign-quantisation",
            Self::QuantisationMismatch { .. } => "quantisation-mismatch",
            Self::Quantise { .. } => "cannot-quantise",
            Self::Buffer { .. } => "wrong-buffer",
            Self::Plan { .. } => "wrong-plan",
            Self::SidecarMissing { .. } => "sidecar-missing",
            Self::SidecarVersion { .. } => "sidecar-version",
            Self::SidecarFingerprint { .. } => "sidecar-mismatch",
            Self::SidecarCorrupt { .. } => "sidecar-corrupt",
            Self::Checksum { .. } => "checksum-mismatch",
            Self::Busy { .. } => "build-busy",
            Self::OutputExists { .. } => "output-exists",
            Self::DiskFull { .. } => "disk-full",
        }
    }

    /// Wraps an I/O error with what was done to which file.
    pub fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { action, path: path.to_owned(), source }
    }

    /// As [`FormatError::io`] for writes: a full disk gets its own name. `needed` is the size of the file.
    pub(crate) fn write(path: &Path, needed: u64) -> impl FnOnce(io::Error) -> Self {
        move |source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::DiskFull { path: path.to_owned(), needed, free: crate::disk::free_space(path).unwrap_or(0) }
            }
            _ => Self::io("write", path)(source),
        }
    }
}
