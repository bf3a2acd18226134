//! Replies in parts: reasoning, content and tool calls, told apart in a stream of text.
//!
//! [`ReplyFormat::detect`] reads off a chat template how its model replies, [`ReplyParser`] takes the text in pieces of any size. A call
//! syntax is one file that implements [`CallSyntax`]; replies that are made of channels have a parser of their own.

mod dsml;
mod gemma;
mod harmony;
mod hermes;
mod message;
mod qwen_xml;
mod schema;
mod tagged;

use std::sync::Arc;

pub use message::{ReplyMessage, ToolCall};
pub use schema::ToolSchemas;

const CALL: &str = "<tool_call>";
const CALL_END: &str = "</tool_call>";

/// How a model marks up its replies, a fact of its chat template.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyFormat {
    /// Text with tags around reasoning and calls.
    Tagged {
        /// How reasoning is marked.
        reasoning: Option<ReasoningFormat>,
        /// How calls are written.
        calls: Option<CallFormat>,
    },
    /// Messages on channels, `<|channel|>NAME<|message|>…<|end|>`: gpt-oss.
    Harmony,
}

impl Default for ReplyFormat {
    fn default() -> Self {
        Self::Tagged { reasoning: None, calls: None }
    }
}

/// How reasoning is marked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReasoningFormat {
    /// `<think>` … `</think>` at the beginning of a reply: Qwen, DeepSeek.
    Think,
    /// `<|channel>thought` … `<channel|>`, anywhere: Gemma 4.
    Channel,
}

/// How calls are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallFormat {
    /// `<tool_call>{"name": …, "arguments": {…}}</tool_call>`: Qwen3.
    Hermes,
    /// `<tool_call><function=NAME><parameter=KEY>\nVALUE\n</parameter></function></tool_call>`: Qwen3-Coder, Qwen3.5.
    QwenXml,
    /// `<|tool_call>call:NAME{KEY:VALUE,…}<tool_call|>`: Gemma 4.
    Gemma,
    /// `<｜DSML｜tool_calls>` around `<｜DSML｜invoke name="NAME">` … `</｜DSML｜invoke>`: DeepSeek-V4.
    Dsml,
}

impl ReplyFormat {
    /// Reads the format off the source of a template.
    pub fn detect(template: &str) -> Self {
        if template.contains(harmony::CHANNEL) && template.contains(harmony::MESSAGE) {
            return Self::Harmony;
        }
        let calls = if template.contains(gemma::CALL) {
            Some(CallFormat::Gemma)
        } else if template.contains(dsml::TOKEN) {
            Some(CallFormat::Dsml)
        } else if template.contains(CALL) {
            Some(if template.contains(qwen_xml::FUNCTION) { CallFormat::QwenXml } else { CallFormat::Hermes })
        } else {
            None
        };
        let marked = |format: &ReasoningFormat| template.contains(format.opener()) || template.contains(format.closer());
        Self::Tagged { reasoning: [ReasoningFormat::Channel, ReasoningFormat::Think].into_iter().find(marked), calls }
    }

    /// Whether replies may hold reasoning.
    pub fn has_reasoning(self) -> bool {
        !matches!(self, Self::Tagged { reasoning: None, .. })
    }

    /// Whether calls can be read.
    pub fn has_calls(self) -> bool {
        !matches!(self, Self::Tagged { calls: None, .. })
    }

    /// Tokens that end the model's turn. `<|end|>` of the channels is none: it ends one message of several.
    pub fn end_tokens(self) -> &'static [&'static str] {
        match self {
            Self::Harmony => &["<|return|>", "<|call|>"],
            Self::Tagged { calls: Some(CallFormat::Gemma), .. } => &["<turn|>", "<|tool_response>"],
            Self::Tagged { .. } => &[],
        }
    }

    /// Tokens that a tokenizer may keep out of its text, but that the parser must see.
    pub fn markup(self) -> Vec<&'static str> {
        match self {
            Self::Harmony => harmony::MARKUP.to_vec(),
            Self::Tagged { reasoning, calls } => {
                let reasoning = reasoning.map_or(&[] as &[_], |format| match format {
                    ReasoningFormat::Think => &[tagged::THINK, tagged::THINK_END],
                    ReasoningFormat::Channel => &["<|channel>", "<channel|>"],
                });
                let calls = calls.map_or(&[] as &[_], |format| match format {
                    CallFormat::Hermes | CallFormat::QwenXml => &[CALL, CALL_END],
                    CallFormat::Gemma => &gemma::MARKUP,
                    CallFormat::Dsml => &[dsml::TOKEN],
                });
                [reasoning, calls].concat()
            }
        }
    }
}

impl ReasoningFormat {
    fn opener(self) -> &'static str {
        match self {
            Self::Think => tagged::THINK,
            Self::Channel => "<|channel>thought",
        }
    }

    fn closer(self) -> &'static str {
        match self {
            Self::Think => tagged::THINK_END,
            Self::Channel => "<channel|>",
        }
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
            Self::Gemma => &[gemma::CALL],
            Self::Dsml => &[dsml::CALLS, dsml::INVOKE],
        }
    }

    /// What may follow a call and belongs to its markup, in order.
    fn closers(self) -> &'static [&'static str] {
        match self {
            Self::Hermes | Self::QwenXml => &[CALL_END],
            Self::Gemma => &gemma::CLOSERS,
            Self::Dsml => &[dsml::CALLS_END],
        }
    }

    fn syntax(self, opener: &str) -> Box<dyn CallSyntax> {
        match self {
            Self::Hermes => Box::new(hermes::Hermes::default()),
            Self::QwenXml => Box::new(qwen_xml::QwenXml::new(opener == qwen_xml::FUNCTION)),
            Self::Gemma => Box::new(gemma::Gemma::default()),
            Self::Dsml => Box::new(dsml::Dsml::new(opener == dsml::INVOKE)),
        }
    }
}

/// Splits a reply into its parts. What it is told as content, reasoning and calls does not depend on how the text was cut into pieces.
///
/// White space between the parts belongs to the markup. Text that is no reasoning and no call comes out as it went in.
pub struct ReplyParser(Box<dyn Machine>);

/// A parser of one kind of reply.
trait Machine: Send {
    /// Whether the text is inside reasoning at the moment.
    fn in_reasoning(&self) -> bool;
    /// Takes the next text.
    fn push(&mut self, text: &str, events: &mut Vec<ReplyEvent>);
    /// The end of the text.
    fn finish(&mut self, events: &mut Vec<ReplyEvent>);
}

impl ReplyParser {
    /// A parser for the reply to `prompt`, whose end says whether the reply starts inside a reasoning block. Calls are looked for only
    /// where tools were offered.
    pub fn new(format: ReplyFormat, prompt: &str, tools: Option<Arc<ToolSchemas>>) -> Self {
        match format {
            ReplyFormat::Harmony => Self(Box::new(harmony::Harmony::new(tools.is_some()))),
            ReplyFormat::Tagged { reasoning, calls } => Self(Box::new(tagged::Tagged::new(reasoning, calls, prompt, tools))),
        }
    }

    /// Takes everything as content.
    pub fn plain() -> Self {
        Self::new(ReplyFormat::default(), "", None)
    }

    /// Whether the text is inside a reasoning block at the moment.
    pub fn in_reasoning(&self) -> bool {
        self.0.in_reasoning()
    }

    /// Takes the next text.
    pub fn push(&mut self, text: &str) -> Vec<ReplyEvent> {
        let mut events = Vec::new();
        self.0.push(text, &mut events);
        events
    }

    /// The end of the text: what was undecided is decided.
    pub fn finish(&mut self) -> Vec<ReplyEvent> {
        let mut events = Vec::new();
        self.0.finish(&mut events);
        events
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

/// Removes the first `n` bytes and returns them.
fn take(held: &mut String, n: usize) -> String {
    let rest = held.split_off(n);
    std::mem::replace(held, rest)
}

/// Bytes at the end of `text` that may become `marker`.
fn partial_suffix(text: &str, marker: &str) -> Option<usize> {
    (1..marker.len()).rev().find(|&n| marker.is_char_boundary(n) && text.ends_with(&marker[..n]))
}

enum Next {
    Found(&'static str),
    Undecided,
    Other,
}

/// Which of the tags the text begins with.
fn next_of(text: &str, tags: &[&'static str]) -> Next {
    match tags.iter().find(|tag| text.starts_with(**tag)) {
        Some(tag) => Next::Found(tag),
        None if tags.iter().any(|tag| tag.starts_with(text)) => Next::Undecided,
        None => Next::Other,
    }
}

#[cfg(test)]
mod tests;
