//! Where text meets the engine: chat requests become prompts, tokens become text, stop strings end a row, replies come
//! in parts.

mod error;
mod history;
mod model;
mod policy;
mod reply;
mod sampling;
mod session;

pub use error::SessionError;
pub use model::{ChatInput, Prompt, TextModel};
pub use reply::{ReplyReader, ReplyUpdate};
pub use sampling::{GenerationDefaults, SamplingOverrides, choice_seed, random_seed};
pub use session::{GenerateRequest, Reply, Session, TextEvent, TextStream};
