//! Sequences of token ids: sampling, scheduling, warm sequences. Knows no text.

mod api;
mod handle;

pub use api::*;
pub use handle::{EngineHandle, Submission};
