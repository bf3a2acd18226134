//! Where text meets the engine: chat requests become prompts, tokens become text, stop strings end a row.

mod error;
mod model;
mod policy;
mod sampling;
mod session;
mod think;

pub use error::SessionError;
pub use model::{ChatInput, Prompt, TextModel};
pub use sampling::{GenerationDefaults, SamplingOverrides, choice_seed, random_seed};
pub use session::{GenerateRequest, Reply, Session, TextEvent, TextStream};
pub use think::{Part, ThinkSplitter, prompt_opens_thinking};
