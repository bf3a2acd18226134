//! Calls in tags: `<function=NAME><parameter=KEY>\nVALUE\n</parameter></function>`.

use super::schema::{ArgumentType, escaped};
use super::{CALL_END, CallPart, CallSyntax, Next, Step, ToolSchemas, next_of};

/// Begins a call.
pub(super) const FUNCTION: &str = "<function=";
const FUNCTION_END: &str = "</function>";
const PARAMETER: &str = "<parameter=";
const PARAMETER_END: &str = "</parameter>";
/// What may follow a value's end; elsewhere its closing tag is part of the value.
const AFTER_VALUE: [&str; 3] = [PARAMETER, FUNCTION_END, CALL_END];
/// Names are words, not paragraphs.
const MAX_NAME: usize = 256;

/// Turns the tags into a JSON object, value by value: text as it arrives, the rest when it is complete and its type can be seen.
pub(super) struct QwenXml {
    state: State,
    function: String,
    parameters: usize,
}

enum State {
    /// Before `<function=`.
    Open,
    /// In the function's name.
    Name,
    /// Between parameters.
    Between,
    /// In a parameter's name.
    Key,
    /// Behind a parameter's name: one line break belongs to the markup.
    ValueStart(ArgumentType),
    /// In a value; `bare` collects one that is not told as it comes.
    Value { kind: ArgumentType, bare: String },
}

impl QwenXml {
    /// `in_name`: the opening marker was the function's tag itself.
    pub(super) fn new(in_name: bool) -> Self {
        Self { state: if in_name { State::Name } else { State::Open }, function: String::new(), parameters: 0 }
    }

    fn arguments_end(&self) -> CallPart {
        CallPart::Arguments(if self.parameters == 0 { "{}" } else { "}" }.to_owned())
    }
}

impl CallSyntax for QwenXml {
    fn step(&mut self, text: &str, tools: &ToolSchemas, parts: &mut Vec<CallPart>) -> Step {
        let inner = text.trim_start();
        let space = text.len() - inner.len();
        match &mut self.state {
            State::Open => match next_of(inner, &[FUNCTION]) {
                Next::Found(tag) => {
                    self.state = State::Name;
                    Step::Took(space + tag.len())
                }
                Next::Undecided => Step::More,
                Next::Other => Step::Bad(0),
            },
            State::Name => match tag_name(text) {
                Tag::Named(name, n) => {
                    self.function = name.to_owned();
                    parts.push(CallPart::Name(name.to_owned()));
                    self.state = State::Between;
                    Step::Took(n)
                }
                Tag::Undecided => Step::More,
                Tag::Bad => Step::Bad(0),
            },
            State::Between => match next_of(inner, &AFTER_VALUE) {
                Next::Found(PARAMETER) => {
                    self.state = State::Key;
                    Step::Took(space + PARAMETER.len())
                }
                Next::Found(FUNCTION_END) => {
                    parts.push(self.arguments_end());
                    Step::End(space + FUNCTION_END.len())
                }
                // The function's closing tag was left out; the call's is left for who reads on.
                Next::Found(_) => {
                    parts.push(self.arguments_end());
                    Step::End(space)
                }
                Next::Undecided => Step::More,
                Next::Other => Step::Bad(0),
            },
            State::Key => match tag_name(text) {
                Tag::Named(name, n) => {
                    let kind = tools.argument(&self.function, name);
                    let open = if self.parameters == 0 { "{" } else { ", " };
                    let quote = if kind.is_text() { "\"" } else { "" };
                    parts.push(CallPart::Arguments(format!("{open}\"{}\": {quote}", escaped(name))));
                    self.parameters += 1;
                    self.state = State::ValueStart(kind);
                    Step::Took(n)
                }
                Tag::Undecided => Step::More,
                Tag::Bad => Step::Bad(0),
            },
            State::ValueStart(kind) => {
                let kind = *kind;
                if text.is_empty() {
                    return Step::More;
                }
                self.state = State::Value { kind, bare: String::new() };
                if text.starts_with('\n') { Step::Took(1) } else { self.step(text, tools, parts) }
            }
            State::Value { kind, bare } => {
                let (value, end) = value_end(text);
                if kind.is_text() {
                    parts.push(CallPart::Arguments(escaped(value)));
                } else {
                    bare.push_str(value);
                }
                if let Some(end) = end {
                    parts.push(CallPart::Arguments(if kind.is_text() { "\"".to_owned() } else { kind.json(bare) }));
                    self.state = State::Between;
                    Step::Took(end)
                } else if value.is_empty() {
                    Step::More
                } else {
                    Step::Took(value.len())
                }
            }
        }
    }
}

enum Tag<'a> {
    Named(&'a str, usize),
    Undecided,
    Bad,
}

/// The name up to the tag's end.
fn tag_name(text: &str) -> Tag<'_> {
    match text.find(['>', '<', '\n']) {
        Some(end) if text.as_bytes()[end] == b'>' && end <= MAX_NAME => match text[..end].trim() {
            "" => Tag::Bad,
            name => Tag::Named(name, end + 1),
        },
        None if text.len() <= MAX_NAME => Tag::Undecided,
        _ => Tag::Bad,
    }
}

/// The part of `text` that is certainly value, and where the text goes on when the value ends in it. One line break before the closing
/// tag belongs to the markup.
fn value_end(text: &str) -> (&str, Option<usize>) {
    let without_break = |end: usize| text[..end].strip_suffix('\n').unwrap_or(&text[..end]);
    for (at, tag) in text.match_indices(PARAMETER_END) {
        match next_of(text[at + tag.len()..].trim_start(), &AFTER_VALUE) {
            Next::Found(_) => return (without_break(at), Some(at + tag.len())),
            Next::Undecided => return (without_break(at), None),
            Next::Other => {}
        }
    }
    let partial = super::partial_suffix(text, PARAMETER_END).unwrap_or(0);
    (without_break(text.len() - partial), None)
}
