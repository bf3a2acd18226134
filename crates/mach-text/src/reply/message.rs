//! A reply put together from its events.

use super::ReplyEvent;

/// A complete call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ToolCall {
    /// The function.
    pub name: String,
    /// One JSON object.
    pub arguments: String,
}

/// A reply as a whole.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReplyMessage {
    /// What was thought.
    pub reasoning: String,
    /// What was said.
    pub content: String,
    /// The calls that are complete.
    pub calls: Vec<ToolCall>,
    open: Option<ToolCall>,
}

impl ReplyMessage {
    /// Takes the next event.
    pub fn push(&mut self, event: ReplyEvent) {
        match event {
            ReplyEvent::Reasoning(text) => self.reasoning.push_str(&text),
            ReplyEvent::Content(text) => self.content.push_str(&text),
            ReplyEvent::CallStart { name, .. } => self.open = Some(ToolCall { name, arguments: String::new() }),
            ReplyEvent::CallArguments { json, .. } => {
                if let Some(call) = &mut self.open {
                    call.arguments.push_str(&json);
                }
            }
            ReplyEvent::CallEnd { .. } => self.calls.extend(self.open.take()),
            ReplyEvent::CallDropped { .. } => self.open = None,
        }
    }
}
