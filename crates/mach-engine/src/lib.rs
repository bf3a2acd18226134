//! Sequences of token ids: sampling, scheduling, warm sequences. Knows no text.

mod api;
mod engine;
mod handle;
mod rng;
mod sampler;
mod warm;

pub use api::*;
pub use engine::start;
pub use handle::{EngineHandle, QUEUE_LIMIT, SharedStats, Submission};
