//! What can go wrong while a checkpoint is downloaded.

use std::path::PathBuf;

/// Errors of `mach pull`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    /// `HF_HUB_OFFLINE` is set and the checkpoint is not complete on this machine.
    #[error("{repo} at {revision} is not in the cache ({cache}), and HF_HUB_OFFLINE forbids to download it; unset it")]
    Offline {
        /// As asked for.
        repo: String,
        /// As asked for.
        revision: String,
        /// Where it was looked for.
        cache: PathBuf,
    },
    /// 404, or the hub's way of saying so.
    #[error("{url} was not found; check the name and the revision; a private repository needs HF_TOKEN")]
    NotFound {
        /// What was asked for.
        url: String,
    },
    /// 401 or 403.
    #[error("access to {url} was refused (status {status}): {hint}")]
    Refused {
        /// What was asked for.
        url: String,
        /// 401 or 403.
        status: u16,
        /// What to do.
        hint: &'static str,
    },
    /// Another status.
    #[error("{url} answered with status {status}; try again later")]
    Status {
        /// What was asked for.
        url: String,
        /// HTTP status.
        status: u16,
    },
    /// No connection, or one that broke again and again.
    #[error("cannot download {url}: {reason}; what was downloaded is kept, run the command again to go on")]
    Connection {
        /// What was asked for.
        url: String,
        /// Why.
        reason: String,
    },
    /// An answer that makes no sense.
    #[error("{url} gave an answer that cannot be used: {reason}; is HF_ENDPOINT a Hugging Face server?")]
    Answer {
        /// What was asked for.
        url: String,
        /// Why.
        reason: String,
    },
    /// The bytes are not those that the hub has.
    #[error("{file} is damaged: its hash is {found}, the hub's is {want}; it was removed, run the command again")]
    Checksum {
        /// Path in the repository.
        file: String,
        /// The hub's hash.
        want: String,
        /// That of the bytes that came.
        found: String,
    },
    /// Too little space.
    #[error("{cache} has {free} free and {need} are missing; free some space, or set HF_HUB_CACHE to another drive")]
    DiskFull {
        /// The cache.
        cache: PathBuf,
        /// Free space.
        free: String,
        /// Bytes to download.
        need: String,
    },
    /// No pack in the cache, and `HF_HUB_OFFLINE` is set.
    #[error(
        "no such pack of {repo} at {revision} is in {place}, and HF_HUB_OFFLINE forbids to download its checkpoint; unset it, or pack a checkpoint that is on this machine with: mach artifacts build"
    )]
    OfflinePack {
        /// As asked for.
        repo: String,
        /// As asked for.
        revision: String,
        /// Where it was looked for.
        place: PathBuf,
    },
    /// Too little space for a pack and the shards that it is made of.
    #[error(
        "{place} has {free} free, and {need} are needed: {what}; free some space, set HF_HUB_CACHE or --out to another drive, or take fewer --shards-in-flight or --bits"
    )]
    NoRoom {
        /// A folder of the drive.
        place: PathBuf,
        /// Free space.
        free: String,
        /// All that it must hold.
        need: String,
        /// What that is.
        what: String,
    },
    /// GGUF files are not packed while they come.
    #[error("{repo} holds GGUF files, which run as they are and are packed when they are whole: mach pull {repo}, then mach artifacts build {repo} --out DIR")]
    PackGguf {
        /// The repository.
        repo: String,
    },
    /// A repository that holds a pack.
    #[error("{repo} holds a pack already, which is downloaded without --pack: mach pull {repo}")]
    IsPack {
        /// The repository.
        repo: String,
    },
    /// The folder for a pack holds another model.
    #[error("{place} holds something else than this pack of {repo} ({there}); choose another folder with --out, or remove it")]
    OtherPack {
        /// The folder.
        place: PathBuf,
        /// The repository.
        repo: String,
        /// What it says of itself.
        there: String,
    },
    /// Several models in one repository.
    #[error("{repo} holds several models: choose with --include, for example --include '{example}'; they are {names}")]
    Choose {
        /// The repository.
        repo: String,
        /// One of them.
        example: String,
        /// All of them.
        names: String,
    },
    /// Nothing to run.
    #[error("{repo} has no weights that mach reads{including}: neither .safetensors nor .gguf files")]
    NoWeights {
        /// The repository.
        repo: String,
        /// ` among those asked for`, where some were.
        including: &'static str,
    },
    /// Another program downloads the same file.
    #[error("another program is downloading {file}; wait for it")]
    Busy {
        /// The file in the cache.
        file: PathBuf,
    },
    /// A build without TLS.
    #[error("this build of mach has no TLS and cannot reach {endpoint}; build it with the feature `tls`, or download with: hf download {repo}")]
    NoTls {
        /// The server.
        endpoint: String,
        /// The repository.
        repo: String,
    },
    /// A disk that filled up on the way.
    #[error(
        "cannot {action}: no space is left on the drive; free some and run the command again, it goes on where it ended (HF_HUB_CACHE and --out name other drives)"
    )]
    Full {
        /// What was tried, with the path.
        action: String,
    },
    /// The system refused.
    #[error("cannot {action}: {source}")]
    Io {
        /// What was tried, with the path.
        action: String,
        /// Cause.
        source: std::io::Error,
    },
    /// Another file failed first.
    #[error("stopped, because another file failed")]
    Stopped,
}

impl HubError {
    /// A stable kebab-case code.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Offline { .. } => "pull-offline",
            Self::NotFound { .. } => "pull-not-found",
            Self::Refused { .. } => "pull-refused",
            Self::Status { .. } => "pull-status",
            Self::Connection { .. } => "pull-connection",
            Self::Answer { .. } => "pull-answer",
            Self::Checksum { .. } => "pull-checksum",
            Self::DiskFull { .. } => "disk-full",
            Self::OfflinePack { .. } => "pull-offline",
            Self::NoRoom { .. } => "disk-full",
            Self::Full { .. } => "disk-full",
            Self::PackGguf { .. } => "pull-pack-gguf",
            Self::IsPack { .. } => "pull-is-pack",
            Self::OtherPack { .. } => "output-exists",
            Self::Choose { .. } => "pull-choose",
            Self::NoWeights { .. } => "pull-no-weights",
            Self::Busy { .. } => "pull-busy",
            Self::NoTls { .. } => "pull-no-tls",
            Self::Io { .. } => "io",
            Self::Stopped => "pull-stopped",
        }
    }

    /// For `map_err` on system calls.
    pub(super) fn io(action: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let action = action.into();
        |source| match source.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => Self::Full { action },
            _ => Self::Io { action, source },
        }
    }

    /// Whether the same request may succeed a moment later.
    pub(super) fn is_passing(&self) -> bool {
        matches!(self, Self::Connection { .. } | Self::Status { status: 408 | 429 | 500..=599, .. })
    }
}
