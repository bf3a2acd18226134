//! Everything that can go wrong, with a stable code.

use std::path::PathBuf;

/// Errors of loading and running a model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Files, config, memory.
    #[error(transparent)]
    Model(#[from] mach_models::ModelError),
    /// Tokenizer and template.
    #[error(transparent)]
    Text(#[from] mach_text::TextError),
    /// A generation.
    #[error(transparent)]
    Session(#[from] mach_session::SessionError),
    /// A request that was not taken.
    #[error(transparent)]
    Submit(#[from] mach_engine::SubmitError),
    /// Kernels and threads.
    #[error(transparent)]
    Cpu(#[from] mach_cpu::CpuError),
    /// A trace file.
    #[error(transparent)]
    Trace(#[from] mach_experts::trace::TraceError),
    /// A download.
    #[error(transparent)]
    Hub(#[from] crate::hub::HubError),
    /// A model that is not on this machine.
    #[error("{name} is neither a directory nor in the Hugging Face cache ({cache}); to get it: mach pull {name}")]
    ModelNotFound {
        /// As given.
        name: String,
        /// Where it was looked for.
        cache: PathBuf,
    },
    /// A path that is not a model.
    #[error("{path} does not exist; give a model directory, or org/name of a checkpoint in the Hugging Face cache")]
    NoSuchPath {
        /// As given.
        path: String,
    },
    /// The built-in model is missing.
    #[error("the built-in model was not found ({tried}); give --model DIR, or set MACH_TINY to its folder")]
    NoBuiltin {
        /// Places.
        tried: String,
    },
    /// The system refused.
    #[error("cannot {action}: {source}")]
    Io {
        /// What was tried, with the path.
        action: String,
        /// Cause.
        source: std::io::Error,
    },
    /// A value that makes no sense, found after parsing the command line.
    #[error("{0}")]
    Usage(String),
    /// An input that cannot be used.
    #[error("{message}")]
    Input {
        /// Stable kebab-case code.
        code: &'static str,
        /// What, where, what to do.
        message: String,
    },
}

impl Error {
    /// Stable kebab-case code.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Model(e) => e.code(),
            Self::Text(e) => e.code(),
            Self::Session(e) => e.code(),
            Self::Submit(e) => match e {
                mach_engine::SubmitError::ContextOverflow { .. } => "context-overflow",
                mach_engine::SubmitError::QueueFull(_) => "queue-full",
                mach_engine::SubmitError::EmptyPrompt => "empty-prompt",
                mach_engine::SubmitError::TokenOutOfRange { .. } => "token-out-of-range",
                mach_engine::SubmitError::Closed => "engine-closed",
            },
            Self::Cpu(e) => e.code(),
            Self::Trace(e) => e.code(),
            Self::Hub(e) => e.code(),
            Self::ModelNotFound { .. } => "model-not-found",
            Self::NoSuchPath { .. } => "no-such-path",
            Self::NoBuiltin { .. } => "no-builtin-model",
            Self::Io { .. } => "io",
            Self::Usage(_) => "usage",
            Self::Input { code, .. } => code,
        }
    }

    /// Exit code of the command: 2 for wrong usage, 1 for the rest.
    pub fn exit_code(&self) -> u8 {
        if matches!(self, Self::Usage(_)) { 2 } else { 1 }
    }

    /// For `map_err` on system calls.
    pub fn io(action: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let action = action.into();
        |source| Self::Io { action, source }
    }
}

impl From<mach_format::FormatError> for Error {
    fn from(e: mach_format::FormatError) -> Self {
        Self::Model(e.into())
    }
}
