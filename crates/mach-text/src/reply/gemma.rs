//! Gemma's calls: `call:NAME{KEY:VALUE,…}`, strings between `<|"|>`, keys bare.

use super::schema::escaped;
use super::{CallPart, CallSyntax, Next, Step, ToolSchemas, next_of, partial_suffix};

/// Begins a call.
pub(super) const CALL: &str = "<|tool_call>";
/// Ends a call; the second asks for its result.
pub(super) const CLOSERS: [&str; 2] = ["<tool_call|>", "<|tool_response>"];
pub(super) const MARKUP: [&str; 4] = [CALL, CLOSERS[0], CLOSERS[1], QUOTE];
const QUOTE: &str = "<|\"|>";
const PREFIX: &str = "call:";
/// Most bytes of a name, a key or a bare value.
const MAX_WORD: usize = 256;
/// Objects in objects that a call may hold.
const MAX_DEPTH: usize = 100;

/// Turns the arguments into JSON as they arrive.
#[derive(Default)]
pub(super) struct Gemma {
    state: State,
    /// Open braces and brackets, `{` as true.
    open: Vec<bool>,
}

#[derive(Clone, Copy, Default)]
enum State {
    /// Before `call:`.
    #[default]
    Open,
    /// In the function's name.
    Name,
    /// Before a key; `first`: the object may end instead.
    Key { first: bool },
    /// Before a value; `first`: the array may end instead.
    Value { first: bool },
    /// In a string between quote tokens.
    Text,
    /// Behind a value.
    After,
}

/// What one state made of the text before it.
enum Move {
    /// So many bytes, then this state.
    To(usize, State),
    More,
    Bad,
    /// The outermost object ends after so many bytes.
    End(usize),
}

impl CallSyntax for Gemma {
    fn step(&mut self, text: &str, _: &ToolSchemas, parts: &mut Vec<CallPart>) -> Step {
        let (mut at, mut json) = (0, String::new());
        loop {
            let before = at;
            let step = match self.advance(&text[at..], &mut json, parts) {
                Move::To(n, state) => {
                    self.state = state;
                    at += n;
                    // A state that took nothing and changed nothing would turn in circles.
                    if at > before || !matches!(state, State::Text) { None } else { Some(Step::More) }
                }
                Move::More => Some(Step::More),
                Move::Bad => Some(Step::Bad(at)),
                Move::End(n) => Some(Step::End(at + n)),
            };
            let Some(step) = step else { continue };
            if !json.is_empty() {
                parts.push(CallPart::Arguments(json));
            }
            return match step {
                Step::More if at > 0 => Step::Took(at),
                step => step,
            };
        }
    }
}

impl Gemma {
    fn advance(&mut self, text: &str, json: &mut String, parts: &mut Vec<CallPart>) -> Move {
        let inner = text.trim_start();
        let space = text.len() - inner.len();
        match self.state {
            State::Open => match next_of(inner, &[PREFIX]) {
                Next::Found(_) => Move::To(space + PREFIX.len(), State::Name),
                Next::Undecided => Move::More,
                Next::Other => Move::Bad,
            },
            State::Name => match word(text, &['{']) {
                Word::Whole(name, n) if !name.is_empty() => {
                    parts.push(CallPart::Name(name.to_owned()));
                    json.push('{');
                    self.open.push(true);
                    Move::To(n + 1, State::Key { first: true })
                }
                Word::Undecided => Move::More,
                _ => Move::Bad,
            },
            State::Key { first } => {
                if first && inner.starts_with('}') {
                    return self.close(space + 1, true, json);
                }
                // Keys may be quoted like strings.
                match quoted(inner) {
                    Quoted::Whole(key, n) => match inner[n..].trim_start().chars().next() {
                        Some(':') => {
                            let colon = n + inner[n..].find(':').unwrap_or(0);
                            self.key(key, json);
                            Move::To(space + colon + 1, State::Value { first: false })
                        }
                        None => Move::More,
                        Some(_) => Move::Bad,
                    },
                    Quoted::Undecided => Move::More,
                    Quoted::None => match word(inner, &[':']) {
                        Word::Whole(key, n) if !key.is_empty() => {
                            let bare = key.strip_prefix('"').and_then(|key| key.strip_suffix('"')).unwrap_or(key);
                            self.key(bare, json);
                            Move::To(space + n + 1, State::Value { first: false })
                        }
                        Word::Undecided => Move::More,
                        _ => Move::Bad,
                    },
                }
            }
            State::Value { first } => match inner.chars().next() {
                None => Move::More,
                Some(']') if first => self.close(space + 1, false, json),
                Some(open @ ('{' | '[')) => {
                    if self.open.len() == MAX_DEPTH {
                        return Move::Bad;
                    }
                    json.push(open);
                    self.open.push(open == '{');
                    Move::To(space + 1, if open == '{' { State::Key { first: true } } else { State::Value { first: true } })
                }
                _ => match next_of(inner, &[QUOTE]) {
                    Next::Found(_) => {
                        json.push('"');
                        Move::To(space + QUOTE.len(), State::Text)
                    }
                    Next::Undecided => Move::More,
                    Next::Other => self.bare(inner, space, json),
                },
            },
            State::Text => match text.find(QUOTE) {
                Some(at) => {
                    json.push_str(&escaped(&text[..at]));
                    json.push('"');
                    Move::To(at + QUOTE.len(), State::After)
                }
                None => {
                    let n = text.len() - partial_suffix(text, QUOTE).unwrap_or(0);
                    json.push_str(&escaped(&text[..n]));
                    Move::To(n, State::Text)
                }
            },
            State::After => match (inner.chars().next(), self.open.last()) {
                (None, _) => Move::More,
                (Some(','), Some(true)) => Move::To(space + 1, State::Key { first: false }),
                (Some(','), Some(false)) => {
                    json.push_str(", ");
                    Move::To(space + 1, State::Value { first: false })
                }
                (Some('}'), Some(true)) => self.close(space + 1, true, json),
                (Some(']'), Some(false)) => self.close(space + 1, false, json),
                _ => Move::Bad,
            },
        }
    }

    fn key(&mut self, key: &str, json: &mut String) {
        // Behind a value of the same object.
        if matches!(self.state, State::Key { first: false }) {
            json.push_str(", ");
        }
        json.push_str(&format!("\"{}\": ", escaped(key)));
    }

    fn close(&mut self, n: usize, object: bool, json: &mut String) -> Move {
        json.push(if object { '}' } else { ']' });
        self.open.pop();
        if self.open.is_empty() { Move::End(n) } else { Move::To(n, State::After) }
    }

    /// A number, a word, or text that was written without its quotes.
    fn bare(&self, inner: &str, space: usize, json: &mut String) -> Move {
        if inner.starts_with('"') {
            return match json_string(inner) {
                Some(n) => {
                    json.push_str(&inner[..n]);
                    if serde_json::from_str::<String>(&inner[..n]).is_ok() { Move::To(space + n, State::After) } else { Move::Bad }
                }
                None => Move::More,
            };
        }
        match word(inner, &[',', '}', ']']) {
            Word::Whole("", _) | Word::Bad => Move::Bad,
            Word::Whole(value, n) => {
                match serde_json::from_str::<serde_json::Value>(value) {
                    Ok(_) => json.push_str(value),
                    Err(_) => json.push_str(&format!("\"{}\"", escaped(value))),
                }
                Move::To(space + n, State::After)
            }
            Word::Undecided => Move::More,
        }
    }
}

enum Word<'a> {
    /// Trimmed, and the bytes before what ends it.
    Whole(&'a str, usize),
    Undecided,
    Bad,
}

/// A word up to one of the ends. It holds no markup and no line break.
fn word<'a>(text: &'a str, ends: &[char]) -> Word<'a> {
    match text.find(|c: char| ends.contains(&c) || "<\n".contains(c) || (c == '{' && !ends.contains(&'{'))) {
        Some(at) if at <= MAX_WORD && text[at..].starts_with(ends) => Word::Whole(text[..at].trim(), at),
        None if text.len() <= MAX_WORD => Word::Undecided,
        _ => Word::Bad,
    }
}

enum Quoted<'a> {
    Whole(&'a str, usize),
    Undecided,
    None,
}

/// A string between quote tokens that the text begins with.
fn quoted(text: &str) -> Quoted<'_> {
    match next_of(text, &[QUOTE]) {
        Next::Found(_) => match text[QUOTE.len()..].find(QUOTE) {
            Some(at) => Quoted::Whole(&text[QUOTE.len()..QUOTE.len() + at], at + 2 * QUOTE.len()),
            None => Quoted::Undecided,
        },
        Next::Undecided => Quoted::Undecided,
        Next::Other => Quoted::None,
    }
}

/// Bytes of the JSON string that the text begins with.
fn json_string(text: &str) -> Option<usize> {
    let mut escape = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escape => escape = false,
            '\\' => escape = true,
            '"' => return Some(at + 1),
            _ => {}
        }
    }
    None
}
