//! Replies with tags: reasoning in a block, calls between markers, everything else content.

use std::sync::Arc;

use super::{CallFormat, CallPart, CallSyntax, Machine, ReasoningFormat, ReplyEvent, Step, ToolSchemas, content, partial_suffix, reasoning, take};

pub(super) const THINK: &str = "<think>";
pub(super) const THINK_END: &str = "</think>";

/// Reads a reply with tags.
pub(super) struct Tagged {
    reasoning: Option<ReasoningFormat>,
    calls: Option<CallFormat>,
    tools: Option<Arc<ToolSchemas>>,
    /// What is looked for in content.
    openers: Vec<&'static str>,
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
    /// Behind a call: one of these, or the next call, may follow.
    AfterCall {
        closers: &'static [&'static str],
    },
}

struct Call {
    syntax: Box<dyn CallSyntax>,
    closers: &'static [&'static str],
    /// Its text so far, white space before it included, to give back when it is no call.
    raw: String,
    /// Its index, once it was told.
    index: Option<usize>,
}

impl Tagged {
    pub(super) fn new(reasoning: Option<ReasoningFormat>, calls: Option<CallFormat>, prompt: &str, tools: Option<Arc<ToolSchemas>>) -> Self {
        let state = match reasoning {
            Some(format) if prompt.trim_end().ends_with(format.opener()) => State::Reasoning { begun: false },
            Some(_) => State::Start,
            None => State::Content,
        };
        let mut openers: Vec<&'static str> = reasoning.filter(|format| *format == ReasoningFormat::Channel).map(ReasoningFormat::opener).into_iter().collect();
        if let (Some(calls), Some(_)) = (calls, &tools) {
            openers.extend(calls.openers());
        }
        Self { reasoning, calls, tools, openers, state, held: String::new(), next_index: 0 }
    }

    /// One step; `false` when only more text can help.
    fn advance(&mut self, events: &mut Vec<ReplyEvent>) -> bool {
        match &mut self.state {
            State::Start => self.advance_start(),
            State::Reasoning { begun } => {
                if !*begun {
                    let space = self.held.len() - self.held.trim_start().len();
                    self.held.drain(..space);
                    *begun = !self.held.is_empty();
                }
                let (at, found) = find_marker(&self.held, self.reasoning.map(ReasoningFormat::closer).as_slice());
                let text = take(&mut self.held, at);
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
                let (at, found) = find_marker(&self.held, &self.openers);
                let text = take(&mut self.held, at);
                content(events, &text);
                let Some((opener, n)) = found else { return false };
                let raw = take(&mut self.held, n);
                self.state = match self.calls.filter(|calls| calls.openers().contains(&opener)) {
                    Some(calls) => State::Call(Call { syntax: calls.syntax(opener), closers: calls.closers(), raw, index: None }),
                    None => State::Reasoning { begun: false },
                };
                true
            }
            State::Call(_) => self.advance_call(events),
            State::AfterCall { closers } => {
                let text = self.held.trim_start();
                if let Some(i) = closers.iter().position(|closer| text.starts_with(closer)) {
                    let n = self.held.len() - text.len() + closers[i].len();
                    self.held.drain(..n);
                    *closers = &closers[i + 1..];
                    return true;
                }
                if text.is_empty() || closers.iter().any(|closer| closer.starts_with(text)) {
                    return false;
                }
                self.state = State::Content;
                true
            }
        }
    }

    fn advance_start(&mut self) -> bool {
        let text = self.held.trim_start();
        let space = self.held.len() - text.len();
        let Some(format) = self.reasoning else {
            self.state = State::Content;
            return true;
        };
        if text.starts_with(format.opener()) {
            self.held.drain(..space + format.opener().len());
            self.state = State::Reasoning { begun: false };
        } else if text.starts_with(format.closer()) {
            // A closing tag alone says that there is no reasoning.
            self.held.drain(..space + format.closer().len());
            self.state = State::AfterReasoning;
        } else if format.opener().starts_with(text) || format.closer().starts_with(text) {
            return false;
        } else {
            self.state = State::Content;
        }
        true
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
                self.state = State::AfterCall { closers: call.closers };
                true
            }
            Step::Bad(n) => {
                let text = take(&mut self.held, n);
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

impl Machine for Tagged {
    fn in_reasoning(&self) -> bool {
        matches!(self.state, State::Reasoning { .. })
    }

    fn push(&mut self, text: &str, events: &mut Vec<ReplyEvent>) {
        self.held.push_str(text);
        while self.advance(events) {}
    }

    fn finish(&mut self, events: &mut Vec<ReplyEvent>) {
        let rest = std::mem::take(&mut self.held);
        match std::mem::replace(&mut self.state, State::Content) {
            State::Start | State::Content => content(events, &rest),
            State::AfterReasoning => content(events, rest.trim_start()),
            State::AfterCall { .. } => content(events, if rest.trim().is_empty() { "" } else { &rest }),
            State::Reasoning { begun } => reasoning(events, if begun { &rest } else { rest.trim_start() }),
            State::Call(mut call) => {
                call.raw.push_str(&rest);
                give_back(events, call);
            }
        }
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
