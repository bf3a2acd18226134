//! Replies of gpt-oss: messages on channels. `analysis` is reasoning, `final` is content, `commentary` holds calls (with a recipient) and
//! what is said before them.

use serde_json::Value;

use super::{Machine, ReplyEvent, content, partial_suffix, reasoning, take};

pub(super) const CHANNEL: &str = "<|channel|>";
pub(super) const MESSAGE: &str = "<|message|>";
const START: &str = "<|start|>";
const END: &str = "<|end|>";
const CALL: &str = "<|call|>";
const RETURN: &str = "<|return|>";
const CONSTRAIN: &str = "<|constrain|>";
/// What the parser must see.
pub(super) const MARKUP: [&str; 7] = [CHANNEL, MESSAGE, START, END, CALL, RETURN, CONSTRAIN];
/// What ends a message. The last two begin the next one: its own end was left out.
const ENDS: [&str; 5] = [END, CALL, RETURN, START, CHANNEL];
const FUNCTIONS: &str = "functions.";
/// Most bytes of a header.
const MAX_HEADER: usize = 512;

/// Reads a reply of channels.
pub(super) struct Harmony {
    tools: bool,
    /// A message has begun.
    begun: bool,
    state: State,
    /// Undecided text.
    held: String,
    next_index: usize,
}

enum State {
    /// Before `<|message|>`.
    Header,
    Analysis,
    Content,
    Call {
        index: usize,
        raw: String,
        arguments: String,
    },
}

/// Who a message is for, read off its header.
enum Kind {
    Analysis,
    Content,
    Call(String),
}

impl Harmony {
    /// `tools`: calls are looked for.
    pub(super) fn new(tools: bool) -> Self {
        Self { tools, begun: false, state: State::Header, held: String::new(), next_index: 0 }
    }

    /// One step; `false` when only more text can help.
    fn advance(&mut self, events: &mut Vec<ReplyEvent>) -> bool {
        if matches!(self.state, State::Header) {
            return self.header(events);
        }
        let end = ENDS.iter().filter_map(|end| Some((self.held.find(end)?, *end))).min_by_key(|&(at, _)| at);
        let n = end.map_or_else(|| self.held.len() - ENDS.iter().filter_map(|end| partial_suffix(&self.held, end)).max().unwrap_or(0), |(at, _)| at);
        let text = take(&mut self.held, n);
        match &mut self.state {
            State::Header => {}
            State::Analysis => reasoning(events, &text),
            State::Content => content(events, &text),
            State::Call { index, raw, arguments } => {
                raw.push_str(&text);
                // White space before the object is left out.
                let json = if arguments.trim().is_empty() { text.trim_start() } else { &text };
                if !json.is_empty() {
                    events.push(ReplyEvent::CallArguments { index: *index, json: json.to_owned() });
                }
                arguments.push_str(&text);
            }
        }
        let Some((_, end)) = end else { return false };
        let ended = if matches!(end, START | CHANNEL) { "" } else { end };
        self.held.drain(..ended.len());
        self.end_message(events, ended);
        true
    }

    /// Behind a message, whose end marker was `end`.
    fn end_message(&mut self, events: &mut Vec<ReplyEvent>, end: &str) {
        if let State::Call { index, mut raw, arguments } = std::mem::replace(&mut self.state, State::Header) {
            if serde_json::from_str::<Value>(&arguments).is_ok_and(|v| v.is_object()) {
                events.push(ReplyEvent::CallEnd { index });
            } else if arguments.trim().is_empty() && end == CALL {
                events.push(ReplyEvent::CallArguments { index, json: "{}".to_owned() });
                events.push(ReplyEvent::CallEnd { index });
            } else {
                raw.push_str(end);
                events.push(ReplyEvent::CallDropped { index });
                content(events, &raw);
            }
        }
    }

    /// Reads the header of a message. Text that is none is content.
    fn header(&mut self, events: &mut Vec<ReplyEvent>) -> bool {
        let text = self.held.trim_start();
        let begins = [START, CHANNEL, MESSAGE, "to="];
        if text.is_empty() || begins.iter().any(|begin| begin.len() > text.len() && begin.starts_with(text)) {
            return false;
        }
        if !begins.iter().any(|begin| text.starts_with(begin)) {
            self.state = State::Content;
            return true;
        }
        let end = [MESSAGE, END, CALL, RETURN].iter().filter_map(|end| Some((self.held.find(end)?, *end))).min_by_key(|&(at, _)| at);
        match end {
            Some((at, MESSAGE)) if at <= MAX_HEADER => {
                let kind = self.kind(&self.held[..at]);
                self.begun = true;
                let raw = take(&mut self.held, at + MESSAGE.len());
                self.state = match kind {
                    Kind::Analysis => State::Analysis,
                    Kind::Content => State::Content,
                    Kind::Call(name) => {
                        let index = self.next_index;
                        self.next_index += 1;
                        events.push(ReplyEvent::CallStart { index, name });
                        State::Call { index, raw, arguments: String::new() }
                    }
                };
                true
            }
            None if self.held.len() <= MAX_HEADER + MESSAGE.len() => false,
            // A message without text is kept as it was written.
            Some((at, end)) if at <= MAX_HEADER => {
                let text = take(&mut self.held, at + end.len());
                content(events, &text);
                true
            }
            // No header after all.
            _ => {
                self.state = State::Content;
                let n = self.held.floor_char_boundary(MAX_HEADER);
                let text = take(&mut self.held, n);
                content(events, &text);
                true
            }
        }
    }

    fn kind(&self, header: &str) -> Kind {
        let channel = header.split_once(CHANNEL).map_or("", |(_, rest)| rest);
        let channel = channel.split(|c: char| c.is_whitespace() || c == '<').next().unwrap_or_default();
        let recipient = header.split_once("to=").map_or("", |(_, rest)| rest);
        let recipient = recipient.split(|c: char| c.is_whitespace() || c == '<').next().unwrap_or_default();
        let name = recipient.strip_prefix(FUNCTIONS).unwrap_or(recipient);
        match channel {
            _ if self.tools && !name.is_empty() => Kind::Call(name.to_owned()),
            "analysis" => Kind::Analysis,
            _ => Kind::Content,
        }
    }
}

impl Machine for Harmony {
    fn in_reasoning(&self) -> bool {
        matches!(self.state, State::Analysis)
    }

    fn push(&mut self, text: &str, events: &mut Vec<ReplyEvent>) {
        self.held.push_str(text);
        while self.advance(events) {}
    }

    fn finish(&mut self, events: &mut Vec<ReplyEvent>) {
        let rest = std::mem::take(&mut self.held);
        match &mut self.state {
            State::Header if self.begun && rest.trim().is_empty() => {}
            State::Header | State::Content => content(events, &rest),
            State::Analysis => reasoning(events, &rest),
            State::Call { raw, arguments, .. } => {
                raw.push_str(&rest);
                arguments.push_str(&rest);
            }
        }
        // `<|call|>` ends the generation and is no part of its text.
        self.end_message(events, "");
    }
}
