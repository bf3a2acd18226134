//! Replies to chats: the text of a generation in parts.

use std::sync::Arc;

use mach_engine::{FinishReason, Receipt};
use mach_text::{ReplyEvent, ReplyParser, ToolSchemas};
use serde_json::Value;

use crate::model::{Prompt, TextModel};
use crate::session::TextEvent;

/// What happens to a chat, in order: `Prefill*`, `Parts*`, then one of `Finished`, `Failed`.
#[derive(Clone, Debug)]
pub enum ReplyUpdate {
    /// Prompt tokens done, of all.
    Prefill {
        /// Done so far, cached ones included.
        done: usize,
        /// Of the whole prompt.
        total: usize,
        /// Reused from an earlier request.
        cached: usize,
    },
    /// What the last token made certain; may be empty.
    Parts(Vec<ReplyEvent>),
    /// The end.
    Finished {
        /// What the end of the text made certain.
        parts: Vec<ReplyEvent>,
        /// Why.
        reason: FinishReason,
        /// Complete calls.
        calls: usize,
        /// Tokens that went into reasoning.
        reasoning_tokens: usize,
        /// What it took.
        receipt: Receipt,
    },
    /// The request failed.
    Failed {
        /// Stable kebab-case code.
        code: &'static str,
        /// What happened, where, what to do.
        message: String,
    },
}

/// Turns the text events of one generation into parts of a reply.
pub struct ReplyReader {
    parser: ReplyParser,
    one_call: bool,
    calls: usize,
    reasoning_tokens: usize,
}

impl ReplyReader {
    /// For the reply to a rendered conversation. `tools` are those that it offered; without them calls stay text.
    pub fn new(model: &TextModel, prompt: &Prompt, tools: Option<&Value>) -> Self {
        let tools = tools.map(|tools| Arc::new(ToolSchemas::from_tools(tools)));
        Self::with(ReplyParser::new(model.reply_format(), &prompt.text, tools))
    }

    /// For the continuation of a text: all of it is content.
    pub fn plain() -> Self {
        Self::with(ReplyParser::plain())
    }

    fn with(parser: ReplyParser) -> Self {
        Self { parser, one_call: false, calls: 0, reasoning_tokens: 0 }
    }

    /// The reply ends behind its first call: what follows is left out.
    #[must_use]
    pub fn one_call(mut self, one_call: bool) -> Self {
        self.one_call = one_call;
        self
    }

    /// Whether nothing that follows will be told, so that the generation may be cancelled.
    pub fn is_done(&self) -> bool {
        self.one_call && self.calls > 0
    }

    /// Takes the next event.
    pub fn read(&mut self, event: TextEvent) -> ReplyUpdate {
        match event {
            TextEvent::Prefill { done, total, cached } => ReplyUpdate::Prefill { done, total, cached },
            TextEvent::Delta { text, token, .. } => {
                if token.is_some() && self.parser.in_reasoning() {
                    self.reasoning_tokens += 1;
                }
                let parts = if self.is_done() { Vec::new() } else { self.parser.push(&text) };
                ReplyUpdate::Parts(self.count(parts))
            }
            TextEvent::Finished { reason, receipt, .. } => {
                let parts = if self.is_done() { Vec::new() } else { self.parser.finish() };
                let parts = self.count(parts);
                ReplyUpdate::Finished { parts, reason, calls: self.calls, reasoning_tokens: self.reasoning_tokens, receipt }
            }
            TextEvent::Failed { code, message } => ReplyUpdate::Failed { code, message },
        }
    }

    fn count(&mut self, mut parts: Vec<ReplyEvent>) -> Vec<ReplyEvent> {
        let is_end = |part: &ReplyEvent| matches!(part, ReplyEvent::CallEnd { .. });
        if let (true, Some(first)) = (self.one_call, parts.iter().position(is_end)) {
            parts.truncate(first + 1);
        }
        self.calls += parts.iter().filter(|part| is_end(part)).count();
        parts
    }
}
