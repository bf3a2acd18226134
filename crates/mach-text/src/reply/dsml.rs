//! Calls in DeepSeek's tags: `<｜DSML｜invoke name="NAME"><｜DSML｜parameter name="KEY" string="true">VALUE</｜DSML｜parameter></｜DSML｜invoke>`.

use super::schema::{ArgumentType, escaped};
use super::{CallPart, CallSyntax, Next, Step, ToolSchemas, next_of, partial_suffix};

/// The token that every tag of this syntax holds.
pub(super) const TOKEN: &str = "｜DSML｜";
/// Around all calls.
pub(super) const CALLS: &str = "<｜DSML｜tool_calls>";
pub(super) const CALLS_END: &str = "</｜DSML｜tool_calls>";
/// Begins a call.
pub(super) const INVOKE: &str = "<｜DSML｜invoke";
const INVOKE_END: &str = "</｜DSML｜invoke>";
const PARAMETER: &str = "<｜DSML｜parameter";
const PARAMETER_END: &str = "</｜DSML｜parameter>";
/// Most bytes of a tag.
const MAX_TAG: usize = 512;

/// Turns the tags into a JSON object, value by value: text as it arrives, the rest when it is complete.
pub(super) struct Dsml {
    state: State,
    function: String,
    parameters: usize,
}

enum State {
    /// Before the tag of the call.
    Open,
    /// In the tag of the call.
    Invoke,
    /// Between parameters.
    Between,
    /// In the tag of a parameter.
    Parameter,
    /// In a value that is text.
    Text,
    /// In a value that is JSON, or whatever its schema says where the tag does not.
    Bare { kind: Option<ArgumentType>, value: String },
}

impl Dsml {
    /// `in_tag`: the opening marker was the call's own.
    pub(super) fn new(in_tag: bool) -> Self {
        Self { state: if in_tag { State::Invoke } else { State::Open }, function: String::new(), parameters: 0 }
    }
}

impl CallSyntax for Dsml {
    fn step(&mut self, text: &str, tools: &ToolSchemas, parts: &mut Vec<CallPart>) -> Step {
        let inner = text.trim_start();
        let space = text.len() - inner.len();
        match &mut self.state {
            State::Open => match next_of(inner, &[INVOKE]) {
                Next::Found(tag) => {
                    self.state = State::Invoke;
                    Step::Took(space + tag.len())
                }
                Next::Undecided => Step::More,
                Next::Other => Step::Bad(0),
            },
            State::Invoke => match tag_of(text) {
                Tag::Whole(tag, n) => match attribute(tag, "name").filter(|name| !name.trim().is_empty()) {
                    Some(name) => {
                        self.function = name.to_owned();
                        parts.push(CallPart::Name(name.to_owned()));
                        self.state = State::Between;
                        Step::Took(n)
                    }
                    None => Step::Bad(0),
                },
                Tag::Undecided => Step::More,
                Tag::Bad => Step::Bad(0),
            },
            State::Between => match next_of(inner, &[PARAMETER, INVOKE_END]) {
                Next::Found(PARAMETER) => {
                    self.state = State::Parameter;
                    Step::Took(space + PARAMETER.len())
                }
                Next::Found(_) => {
                    parts.push(CallPart::Arguments(if self.parameters == 0 { "{}" } else { "}" }.to_owned()));
                    Step::End(space + INVOKE_END.len())
                }
                Next::Undecided => Step::More,
                Next::Other => Step::Bad(0),
            },
            State::Parameter => match tag_of(text) {
                Tag::Whole(tag, n) => {
                    let Some(name) = attribute(tag, "name") else { return Step::Bad(0) };
                    let string = attribute(tag, "string");
                    let open = if self.parameters == 0 { "{" } else { ", " };
                    let quote = if string == Some("true") { "\"" } else { "" };
                    parts.push(CallPart::Arguments(format!("{open}\"{}\": {quote}", escaped(name))));
                    self.parameters += 1;
                    self.state = match string {
                        Some("true") => State::Text,
                        Some(_) => State::Bare { kind: None, value: String::new() },
                        None => State::Bare { kind: Some(tools.argument(&self.function, name)), value: String::new() },
                    };
                    Step::Took(n)
                }
                Tag::Undecided => Step::More,
                Tag::Bad => Step::Bad(0),
            },
            State::Text => {
                let (value, end) = value_end(text);
                parts.push(CallPart::Arguments(escaped(value)));
                if end.is_some() {
                    parts.push(CallPart::Arguments("\"".to_owned()));
                    self.state = State::Between;
                }
                end.map_or_else(|| if value.is_empty() { Step::More } else { Step::Took(value.len()) }, Step::Took)
            }
            State::Bare { kind, value } => {
                let (more, end) = value_end(text);
                value.push_str(more);
                if end.is_some() {
                    let json = match kind {
                        Some(kind) => kind.json(value),
                        None if serde_json::from_str::<serde_json::Value>(value).is_ok() => value.trim().to_owned(),
                        // No JSON, whatever the tag says.
                        None => format!("\"{}\"", escaped(value)),
                    };
                    parts.push(CallPart::Arguments(json));
                    self.state = State::Between;
                }
                end.map_or_else(|| if more.is_empty() { Step::More } else { Step::Took(more.len()) }, Step::Took)
            }
        }
    }
}

enum Tag<'a> {
    /// The attributes, and the bytes up to the tag's end.
    Whole(&'a str, usize),
    Undecided,
    Bad,
}

/// The rest of a tag, up to the `>` outside of quotes.
fn tag_of(text: &str) -> Tag<'_> {
    let mut quoted = false;
    for (at, c) in text.char_indices() {
        match c {
            _ if at > MAX_TAG => return Tag::Bad,
            '"' => quoted = !quoted,
            '>' if !quoted => return Tag::Whole(&text[..at], at + 1),
            '<' | '\n' => return Tag::Bad,
            _ => {}
        }
    }
    Tag::Undecided
}

/// The value of ` NAME="VALUE"`.
fn attribute<'a>(tag: &'a str, name: &str) -> Option<&'a str> {
    let mut rest = tag.trim_start();
    while let Some((key, after)) = rest.split_once("=\"") {
        let (value, after) = after.split_once('"')?;
        if key.trim() == name {
            return Some(value);
        }
        rest = after;
    }
    None
}

/// The part of `text` that is certainly value, and where the text goes on when the value ends in it.
fn value_end(text: &str) -> (&str, Option<usize>) {
    match text.find(PARAMETER_END) {
        Some(at) => (&text[..at], Some(at + PARAMETER_END.len())),
        None => (&text[..text.len() - partial_suffix(text, PARAMETER_END).unwrap_or(0)], None),
    }
}
