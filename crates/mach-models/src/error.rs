//! What can go wrong between a checkpoint and a running model.

use mach_experts::ExpertError;
use mach_format::FormatError;

/// Errors of loading and running a model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// From the files.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// From expert streaming.
    #[error(transparent)]
    Expert(#[from] ExpertError),
    /// No family of this name.
    #[error("model_type `{model_type}` is not a family that mach runs ({known}); see `mach archs`")]
    UnknownArch {
        /// What the config says.
        model_type: String,
        /// Families there are.
        known: String,
    },
    /// A field is missing or of the wrong type.
    #[error("config.json: `{field}` {problem}")]
    ConfigField {
        /// Dotted path.
        field: String,
        /// What is wrong.
        problem: String,
    },
    /// A field that changes the maths in a way mach does not know.
    #[error("config.json: `{field}` = {value} changes the computation in a way this version does not understand; {hint}")]
    ConfigUnsupported {
        /// Dotted path.
        field: String,
        /// Its value.
        value: String,
        /// What would work.
        hint: String,
    },
    /// A tensor that the family should have.
    #[error("the checkpoint has no tensor `{name}`: {hint}")]
    MissingTensor {
        /// Name or pattern.
        name: String,
        /// What to do.
        hint: String,
    },
    /// A tensor of the wrong shape.
    #[error("tensor `{name}` has shape {got}, the config wants {expected}: config and weights do not belong together")]
    Shape {
        /// Name.
        name: String,
        /// From the config.
        expected: String,
        /// On disk.
        got: String,
    },
    /// A tensor that no part of the model uses.
    #[error("tensor `{name}` is not part of a {arch} model ({count} such tensors): the checkpoint is of another kind or has been changed")]
    UnknownTensor {
        /// The first of them.
        name: String,
        /// How many.
        count: usize,
        /// Family.
        arch: &'static str,
    },
    /// A pack whose experts are not beside it.
    #[error("{path} has no expert tensors and no valid sidecar: {reason}")]
    NoExperts {
        /// The checkpoint.
        path: String,
        /// Why.
        reason: String,
    },
    /// The budget cannot be kept.
    #[error("{what} needs {needed} bytes but {available} are available: {hint}")]
    Budget {
        /// What is asked for.
        what: String,
        /// Bytes it takes.
        needed: u64,
        /// Bytes there are.
        available: u64,
        /// What to do.
        hint: String,
    },
}

impl ModelError {
    /// Stable kebab-case code.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Format(e) => e.code(),
            Self::Expert(e) => e.code(),
            Self::UnknownArch { .. } => "unknown-arch",
            Self::ConfigField { .. } => "config-field",
            Self::ConfigUnsupported { .. } => "config-unsupported",
            Self::MissingTensor { .. } => "missing-tensor",
            Self::Shape { .. } => "wrong-shape",
            Self::UnknownTensor { .. } => "unknown-tensor",
            Self::NoExperts { .. } => "no-experts",
            Self::Budget { .. } => "budget",
        }
    }

    /// Whether the caller went away.
    pub fn is_cancelled(&self) -> bool {
        matches!(self, Self::Expert(ExpertError::Cancelled))
    }
}
