//! Pure functions of text: tokenizer, incremental decoding, chat templates, stop strings, replies in parts.

mod decode;
mod deepseek_v4;
mod error;
mod gguf;
mod python;
mod reply;
mod stop;
mod template;
mod tokenizer;

pub use decode::TextDecoder;
pub use error::TextError;
pub use gguf::{GgufVocab, tokenizer_json};
pub use reply::{CallFormat, ReasoningFormat, ReplyEvent, ReplyFormat, ReplyMessage, ReplyParser, ToolCall, ToolSchemas};
pub use stop::{Scanned, StopMatcher};
pub use template::ChatTemplate;
pub use tokenizer::{Tokenizer, read_json};
