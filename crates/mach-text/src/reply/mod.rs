//! Replies in parts: reasoning, content and tool calls, told apart in a stream of text.
//!
//! [`ReplyFormat::detect`] reads off a chat template how its model replies, [`ReplyParser`] takes the text in pieces of any size. A call
//! syntax is one file that implements [`CallSyntax`].

mod hermes;
mod message;
mod qwen_xml;
mod schema;

use std::sync::Arc;

pub use message::{ReplyMessage, ToolCall};
pub use schema::ToolSchemas;

const THINK: &str = "<think>";
const THINK_END: &str = "</think>";
const CALL: &str = "<tool_call>";
const CALL_END: &str = "</tool_call>";

/// How a model marks reasoning and calls, a fact of its chat template.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReplyFormat {
    /// Replies may begin with `<think>` … `</think>`.
    pub reasoning: bool,
    /// How calls are written.
    pub calls: Option<CallFormat>,
}

/// How calls are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallFormat {
    /// `<tool_call>{"name": …, "arguments": {…}}</tool_call>`: Qwen3.
    Hermes,
    /// `<tool_call><function=NAME><parameter=KEY>\nVALUE\n</parameter></function></tool_call>`: Qwen3-Coder, Qwen3.5.
    QwenXml,
}

impl ReplyFormat {
    /// Reads the format off the source of a template.
    pub fn detect(template: &str) -> Self {
        let calls = template.contains(CALL).then(|| if template.contains(qwen_xml::FUNCTION) { CallFormat::QwenXml } else { CallFormat::Hermes });
        Self { reasoning: template.contains(THINK) || template.contains(THINK_END), calls }
    }
}

/// A piece of a reply. Calls come one after another; their indices ascend and are not used twice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReplyEvent {
    /// More reasoning.
    Reasoning(String),
    /// More of what is said to the user.
    Content(String),
    /// A call begins.
    CallStart {
        /// Which call.
        index: usize,
        /// The function.
        name: String,
    },
    /// More of the JSON text of a call's arguments.
    CallArguments {
        /// Which call.
        index: usize,
        /// JSON text.
        json: String,
    },
    /// A call is complete: its arguments are one JSON object.
    CallEnd {
        /// Which call.
        index: usize,
    },
    /// A call that had begun is none: it was malformed or cut off. Its whole text follows as content.
    CallDropped {
        /// Which call.
        index: usize,
    },
}

/// What a call syntax made of the text that it was shown.
enum Step {
    /// So many bytes are done with, at least one.
    Took(usize),
    /// Undecided: more text is needed.
    More,
    /// The call is complete after so many bytes.
    End(usize),
    /// This is no call; so many bytes cannot begin another.
    Bad(usize),
}

/// What a call syntax may tell while it reads.
enum CallPart {
    Name(String),
    Arguments(String),
}

/// Reads one call, from behind its opening marker to its end.
trait CallSyntax: Send {
    /// Looks at the text that is not done with yet.
    fn step(&mut self, text: &str, tools: &ToolSchemas, parts: &mut Vec<CallPart>) -> Step;
}

impl CallFormat {
    /// What begins a call, longest first where one begins another.
    fn openers(self) -> &'static [&'static str] {
        match self {
            Self::Hermes => &[CALL],
            // The opening tag is sometimes left out.
            Self::QwenXml => &[CALL, qwen_xml::FUNCTION],
        }
    }

    fn syntax(self, opener: &str) -> Box<dyn CallSyntax> {
        match self {
            Self::Hermes => Box::new(hermes::Hermes::default()),
            Self::QwenXml => Box::new(qwen_xml::QwenXml::new(opener == qwen_xml::FUNCTION)),
        }
    }
}

/// Splits a reply into its parts. What it is told as content, reasoning and calls does not depend on how the text was cut into pieces.
///
/// White space between the parts belongs to the markup. Text that is no reasoning and no call comes out as it went in.
pub struct ReplyParser {
    format: ReplyFormat,
    /// Calls are looked for only where tools were offered.
    tools: Option<Arc<ToolSchemas>>,
    state: State,
    /// Undecided text.
    held: String,
    next_index: usize,
}

enum State {
    /// Before anything was said: reasoning may begin.
    Start,
    /// `begun`: its leading white space is over.
    Reasoning {
        begun: bool,
    },
    /// Behind reasoning: white space up to the content is left out.
    AfterReasoning,
    Content,
    Call(Call),
    /// Behind a call: a closing tag or the next call may follow.
    AfterCall {
        closed: bool,
    },
}

struct Call {
    syntax: Box<dyn CallSyntax>,
    /// Its text so far, white space before it included, to give back when it is no call.
    raw: String,
    /// Its index, once it was told.
    index: Option<usize>,
}

impl ReplyParser {
    /// A parser for the reply to `prompt`, whose end says whether the reply starts inside a reasoning block.
    pub fn new(format: ReplyFormat, prompt: &str, tools: Option<Arc<ToolSchemas>>) -> Self {
        let state = match format.reasoning {
            true if prompt.trim_end().ends_with(THINK) => State::Reasoning { begun: false },
            true => State::Start,
            false => State::Content,
        };
        Self { format, tools, state, held: String::new(), next_index: 0 }
    }

    /// Takes everything as content.
    pub fn plain() -> Self {
        Self::new(ReplyFormat::default(), "", None)
    }

    /// Whether the text is inside a reasoning block at the moment.
    pub fn in_reasoning(&self) -> bool {
        matches!(self.state, State::Reasoning { .. })
    }

    /// Takes the next text.
    pub fn push(&mut self, text: &str) -> Vec<ReplyEvent> {
        let mut events = Vec::new();
        self.held.push_str(text);
        while self.advance(&mut events) {}
        events
    }

    /// The end of the text: what was undecided is decided.
    pub fn finish(&mut self) -> Vec<ReplyEvent> {
        let mut events = Vec::new();
        let rest = std::mem::take(&mut self.held);
        match std::mem::replace(&mut self.state, State::Content) {
            State::Start | State::Content => content(&mut events, &rest),
            State::AfterReasoning => content(&mut events, rest.trim_start()),
            State::AfterCall { .. } => content(&mut events, if rest.trim().is_empty() { "" } else { &rest }),
            State::Reasoning { begun } => reasoning(&mut events, if begun { &rest } else { rest.trim_start() }),
            State::Call(mut call) => {
                call.raw.push_str(&rest);
                give_back(&mut events, call);
            }
        }
        events
    }

    fn take(&mut self, n: usize) -> String {
        let rest = self.held.split_off(n);
        std::mem::replace(&mut self.held, rest)
    }

    /// One step; `false` when only more text can help.
    fn advance(&mut self, events: &mut Vec<ReplyEvent>) -> bool {
        match &mut self.state {
            State::Start => {
                let text = self.held.trim_start();
                let space = self.held.len() - text.len();
                if text.starts_with(THINK) {
                    self.held.drain(..space + THINK.len());
                    self.state = State::Reasoning { begun: false };
                } else if THINK.starts_with(text) {
                    return false;
                } else {
                    self.state = State::Content;
                }
                true
            }
            State::Reasoning { begun } => {
                if !*begun {
                    let space = self.held.len() - self.held.trim_start().len();
                    self.held.drain(..space);
                    *begun = !self.held.is_empty();
                }
                let (at, found) = find_marker(&self.held, &[THINK_END]);
                let text = self.take(at);
                reasoning(events, &text);
                if let Some(marker) = found {
                    self.held.drain(..marker.1);
                    self.state = State::AfterReasoning;
                }
                found.is_some()
            }
            State::AfterReasoning => {
                let space = self.held.len() - self.held.trim_start().len();
                self.held.drain(..space);
                if self.held.is_empty() {
                    return false;
                }
                self.state = State::Content;
                true
            }
            State::Content => {
                let openers = match (&self.tools, self.format.calls) {
                    (Some(_), Some(calls)) => calls.openers(),
                    _ => &[],
                };
                let (at, found) = find_marker(&self.held, openers);
                let text = self.take(at);
                content(events, &text);
                let (Some((opener, n)), Some(calls)) = (found, self.format.calls) else { return false };
                let raw = self.take(n);
                self.state = State::Call(Call { syntax: calls.syntax(opener), raw, index: None });
                true
            }
            State::Call(_) => self.advance_call(events),
            State::AfterCall { closed } => {
                let text = self.held.trim_start();
                if !*closed && text.starts_with(CALL_END) {
                    let n = self.held.len() - text.len() + CALL_END.len();
                    self.held.drain(..n);
                    *closed = true;
                    return true;
                }
                if text.is_empty() || (!*closed && CALL_END.starts_with(text)) {
                    return false;
                }
                self.state = State::Content;
                true
            }
        }
    }

    fn advance_call(&mut self, events: &mut Vec<ReplyEvent>) -> bool {
        let (State::Call(call), Some(tools)) = (&mut self.state, &self.tools) else { return false };
        let mut parts = Vec::new();
        let step = call.syntax.step(&self.held, tools, &mut parts);
        for part in parts {
            match (part, call.index) {
                (CallPart::Name(name), _) => {
                    events.push(ReplyEvent::CallStart { index: self.next_index, name });
                    call.index = Some(self.next_index);
                    self.next_index += 1;
                }
                (CallPart::Arguments(json), Some(index)) if !json.is_empty() => events.push(ReplyEvent::CallArguments { index, json }),
                _ => {}
            }
        }
        match step {
            Step::Took(n) => {
                call.raw.push_str(&self.held[..n]);
                self.held.drain(..n);
                true
            }
            Step::More => false,
            Step::End(n) => {
                if let Some(index) = call.index {
                    events.push(ReplyEvent::CallEnd { index });
                }
                self.held.drain(..n);
                self.state = State::AfterCall { closed: false };
                true
            }
            Step::Bad(n) => {
                let text = self.take(n);
                // What follows may still hold a call.
                if let State::Call(mut call) = std::mem::replace(&mut self.state, State::Content) {
                    call.raw.push_str(&text);
                    give_back(events, call);
                }
                true
            }
        }
    }
}

fn content(events: &mut Vec<ReplyEvent>, text: &str) {
    match events.last_mut() {
        _ if text.is_empty() => {}
        Some(ReplyEvent::Content(last)) => last.push_str(text),
        _ => events.push(ReplyEvent::Content(text.to_owned())),
    }
}

fn reasoning(events: &mut Vec<ReplyEvent>, text: &str) {
    if !text.is_empty() {
        events.push(ReplyEvent::Reasoning(text.to_owned()));
    }
}

fn give_back(events: &mut Vec<ReplyEvent>, call: Call) {
    if let Some(index) = call.index {
        events.push(ReplyEvent::CallDropped { index });
    }
    content(events, &call.raw);
}

/// The first of the markers, with the white space before it: where that begins, which marker it is and how many bytes both are. Without
/// one, where the text begins that may still become one.
fn find_marker<'m>(text: &str, markers: &[&'m str]) -> (usize, Option<(&'m str, usize)>) {
    if markers.is_empty() {
        return (text.len(), None);
    }
    let first = markers.iter().filter_map(|m| Some((text.find(m)?, *m))).min_by_key(|&(at, _)| at);
    let space_before = |at: usize| text[..at].trim_end().len();
    if let Some((at, marker)) = first {
        let begin = space_before(at);
        return (begin, Some((marker, at + marker.len() - begin)));
    }
    let partial = markers.iter().filter_map(|m| partial_suffix(text, m)).max().unwrap_or(0);
    (space_before(text.len() - partial), None)
}

/// Bytes at the end of `text` that may become `marker`.
fn partial_suffix(text: &str, marker: &str) -> Option<usize> {
    (1..marker.len()).rev().find(|&n| marker.is_char_boundary(n) && text.ends_with(&marker[..n]))
}

#[cfg(test)]
mod tests;
