//! Calls as one JSON object: `{"name": …, "arguments": {…}}`.

use serde_json::Value;

use super::{CallPart, CallSyntax, Step, ToolSchemas};

/// Follows the object's structure as it arrives, so that the arguments can be told while they are written, and checks the whole at its
/// end.
#[derive(Default)]
pub(super) struct Hermes {
    object: String,
    /// Open braces and brackets, `{` as true.
    open: Vec<bool>,
    in_string: bool,
    escape: bool,
    /// Where the last string at the top level began, and that string once it is complete.
    string_at: usize,
    last_string: String,
    /// The key whose value is being read.
    key: Option<String>,
    name: Option<String>,
    arguments: Arguments,
}

/// How far the arguments were told.
#[derive(Default, PartialEq)]
enum Arguments {
    #[default]
    Untold,
    /// Up to this byte of the object.
    Telling(usize),
    Told,
}

/// Objects in objects that a call may hold.
const MAX_DEPTH: usize = 100;

impl CallSyntax for Hermes {
    fn step(&mut self, text: &str, _: &ToolSchemas, parts: &mut Vec<CallPart>) -> Step {
        if text.is_empty() {
            return Step::More;
        }
        for (i, c) in text.char_indices() {
            if self.open.is_empty() {
                match c {
                    '{' => {}
                    c if c.is_whitespace() => continue,
                    _ => return Step::Bad(i),
                }
            }
            self.object.push(c);
            if !self.take(c, parts) {
                return Step::Bad(i);
            }
            if self.open.is_empty() {
                let n = i + c.len_utf8();
                return if self.end(parts) { Step::End(n) } else { Step::Bad(n) };
            }
        }
        if let Arguments::Telling(told) = &mut self.arguments {
            parts.push(CallPart::Arguments(self.object[*told..].to_owned()));
            *told = self.object.len();
        }
        Step::Took(text.len())
    }
}

impl Hermes {
    /// Takes one character; `false` where no JSON can have it.
    fn take(&mut self, c: char, parts: &mut Vec<CallPart>) -> bool {
        let top = self.open.len() == 1;
        if self.in_string {
            match c {
                _ if self.escape => self.escape = false,
                '\\' => self.escape = true,
                '"' => {
                    self.in_string = false;
                    if top {
                        self.last_string = serde_json::from_str(&self.object[self.string_at..]).unwrap_or_default();
                        if self.key.as_deref() == Some("name") && self.name.is_none() {
                            self.name = Some(self.last_string.clone());
                        }
                    }
                }
                c => return c >= ' ',
            }
            return true;
        }
        match c {
            '"' => {
                self.in_string = true;
                self.string_at = self.object.len() - 1;
            }
            ':' if top => {
                let key = std::mem::take(&mut self.last_string);
                // A second one would win when the whole is read, after the first was told.
                if (key == "name" && self.name.is_some()) || (key == "arguments" && self.arguments != Arguments::Untold) {
                    return false;
                }
                self.key = Some(key);
            }
            ',' if top => self.key = None,
            '{' | '[' => {
                if self.open.len() == MAX_DEPTH {
                    return false;
                }
                if top
                    && c == '{'
                    && self.key.as_deref() == Some("arguments")
                    && let Some(name) = self.name.as_ref().filter(|name| valid_name(name))
                {
                    parts.push(CallPart::Name(name.clone()));
                    self.arguments = Arguments::Telling(self.object.len() - 1);
                }
                self.open.push(c == '{');
            }
            '}' | ']' => {
                if self.open.pop() != Some(c == '}') {
                    return false;
                }
                if let (Arguments::Telling(told), 1) = (&self.arguments, self.open.len()) {
                    parts.push(CallPart::Arguments(self.object[*told..].to_owned()));
                    self.arguments = Arguments::Told;
                }
            }
            // Outside of strings these are a sign that the object ended badly.
            '<' | '>' => return false,
            _ => {}
        }
        true
    }

    /// The object is complete: whether it is a call. Arguments that were not told yet are told now.
    fn end(&self, parts: &mut Vec<CallPart>) -> bool {
        let Ok(object) = serde_json::from_str::<Value>(&self.object) else { return false };
        let Some(name) = object["name"].as_str().filter(|name| valid_name(name)) else { return false };
        if self.arguments != Arguments::Untold {
            return self.name.as_deref() == Some(name) && object["arguments"].is_object();
        }
        let arguments = match &object["arguments"] {
            Value::Null => "{}".to_owned(),
            Value::Object(_) => object["arguments"].to_string(),
            // Written as JSON in a string.
            Value::String(text) if serde_json::from_str::<Value>(text).is_ok_and(|v| v.is_object()) => text.trim().to_owned(),
            _ => return false,
        };
        parts.push(CallPart::Name(name.to_owned()));
        parts.push(CallPart::Arguments(arguments));
        true
    }
}

fn valid_name(name: &str) -> bool {
    !name.trim().is_empty()
}
