//! What can go wrong with text.

use std::path::PathBuf;

/// Errors of tokenizers and templates.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// A file could not be read.
    #[error("cannot read {path}: {source}; is this a checkpoint directory with its tokenizer files?")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file is not what its name says.
    #[error("{path} is not valid: {reason}; download it again")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The tokenizer's decoder is of a kind whose text cannot be produced piece by piece.
    #[error("{path} uses a decoder that is not supported ({decoder}); byte-level and byte-fallback decoders are")]
    UnsupportedDecoder {
        /// tokenizer.json.
        path: PathBuf,
        /// The part that is not known.
        decoder: String,
    },
    /// The tokenizer refused a text.
    #[error("the tokenizer failed: {0}")]
    Encode(String),
    /// The checkpoint has no chat template.
    #[error("{0} has no chat template (chat_template.jinja or tokenizer_config.json): use the raw prompt or completions instead")]
    NoTemplate(PathBuf),
    /// The template does not compile.
    #[error("the chat template does not compile: {0}")]
    TemplateSyntax(String),
    /// The template called `raise_exception`.
    #[error("the chat template refuses the conversation: {0}")]
    TemplateRaised(String),
    /// The template failed while rendering.
    #[error("the chat template failed: {0}")]
    TemplateFailed(String),
    /// Thinking was asked for or against, and the template does the same either way.
    #[error("the chat template cannot turn thinking on or off: {}", if *.effort { "it takes a reasoning effort (low, medium or high) instead" } else { "the model does as it was trained" })]
    NoThinkingSwitch {
        /// Whether the template has degrees of thinking instead.
        effort: bool,
    },
    /// A degree of thinking was asked for, and the template has none.
    #[error("the chat template takes no reasoning effort{}", if *.switch { "; thinking can only be turned on or off" } else { "" })]
    NoReasoningEffort {
        /// Whether the template can turn thinking on and off.
        switch: bool,
    },
    /// Messages or tools are not of the shape that templates take.
    #[error("{0}")]
    BadMessages(String),
}

impl TextError {
    /// A stable kebab-case code.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Read { .. } => "tokenizer-unreadable",
            Self::Invalid { .. } => "tokenizer-invalid",
            Self::UnsupportedDecoder { .. } => "tokenizer-unsupported",
            Self::Encode(_) => "tokenizer-failed",
            Self::NoTemplate(_) => "template-missing",
            Self::TemplateSyntax(_) => "template-syntax",
            Self::TemplateRaised(_) => "template-raised",
            Self::TemplateFailed(_) => "template-failed",
            Self::NoThinkingSwitch { .. } => "no-thinking-switch",
            Self::NoReasoningEffort { .. } => "no-reasoning-effort",
            Self::BadMessages(_) => "bad-messages",
        }
    }
}
