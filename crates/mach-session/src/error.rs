//! What can go wrong between text and engine.

use mach_engine::SubmitError;
use mach_text::TextError;

/// Errors of a session.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// Tokenizer or template.
    #[error(transparent)]
    Text(#[from] TextError),
    /// The engine did not take the request.
    #[error(transparent)]
    Submit(#[from] SubmitError),
    /// A request that was taken failed.
    #[error("{message}")]
    Failed {
        /// The engine's code.
        code: &'static str,
        /// The engine's words.
        message: String,
    },
}

impl SessionError {
    /// A stable kebab-case code.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Text(e) => e.code(),
            Self::Submit(SubmitError::QueueFull(_)) => "queue-full",
            Self::Submit(SubmitError::ContextOverflow { .. }) => "context-overflow",
            Self::Submit(SubmitError::EmptyPrompt) => "empty-prompt",
            Self::Submit(SubmitError::TokenOutOfRange { .. }) => "token-out-of-range",
            Self::Submit(SubmitError::Closed) => "engine-closed",
            Self::Failed { code, .. } => code,
        }
    }
}
