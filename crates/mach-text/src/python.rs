//! The parts of Python that chat templates see: `str`, `repr`, `json.dumps` and string methods.

use std::fmt::Write as _;

use minijinja::value::{Kwargs, Rest, Tuple, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value};
use serde_json::Value as Json;

/// JSON to a template value, key order kept.
pub(crate) fn value_from_json(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(b) => Value::from(*b),
        Json::Number(n) => match (n.as_i64(), n.as_u64()) {
            (Some(i), _) => Value::from(i),
            (None, Some(u)) => Value::from(u),
            (None, None) => Value::from(n.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(s) => Value::from(s.as_str()),
        Json::Array(items) => Value::from(items.iter().map(value_from_json).collect::<Vec<_>>()),
        Json::Object(map) => Value::from_pairs(map.iter().map(|(k, v)| (k.as_str(), value_from_json(v)))),
    }
}

fn as_float(value: &Value) -> Option<f64> {
    if value.kind() == ValueKind::Number && !value.is_integer() { f64::try_from(value.clone()).ok() } else { None }
}

/// `repr` of a float: shortest digits, an exponent below 1e-4 and from 1e16 on.
fn float_repr(x: f64) -> String {
    if x.is_nan() {
        return "nan".to_owned();
    }
    if x.is_infinite() {
        return if x > 0.0 { "inf" } else { "-inf" }.to_owned();
    }
    let scientific = format!("{x:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if x != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    let plain = x.to_string();
    if plain.contains('.') { plain } else { plain + ".0" }
}

/// `str(value)`.
pub(crate) fn str_of(value: &Value) -> String {
    match value.kind() {
        ValueKind::Number | ValueKind::Seq | ValueKind::Map => {
            let mut out = String::new();
            write_repr(value, &mut out);
            out
        }
        _ => value.to_string(),
    }
}

fn write_repr(value: &Value, out: &mut String) {
    if let Some(x) = as_float(value) {
        out.push_str(&float_repr(x));
        return;
    }
    match value.kind() {
        ValueKind::Seq => {
            let tuple = value.is_tuple();
            out.push(if tuple { '(' } else { '[' });
            let mut n = 0;
            for item in value.try_iter().into_iter().flatten() {
                if n > 0 {
                    out.push_str(", ");
                }
                write_repr(&item, out);
                n += 1;
            }
            if tuple && n == 1 {
                out.push(',');
            }
            out.push(if tuple { ')' } else { ']' });
        }
        // Objects with a rendering of their own (functions, namespaces) are maps too, but have no pairs to show.
        ValueKind::Map if value.len().is_some() => {
            out.push('{');
            for (i, key) in value.try_iter().into_iter().flatten().enumerate() {
                if i > 0 {
                    out.push_str(", ");
                }
                write_repr(&key, out);
                out.push_str(": ");
                write_repr(&value.get_item(&key).unwrap_or_default(), out);
            }
            out.push('}');
        }
        // Debug of a string is Python's repr, of a number its digits.
        _ => {
            let _ = write!(out, "{value:?}");
        }
    }
}

/// An argument that was given by position, else by name.
fn named(given: Option<Value>, kwargs: &Kwargs, name: &str) -> Result<Option<Value>, Error> {
    match given {
        Some(value) => Ok(Some(value)),
        None if kwargs.has(name) => kwargs.get::<Value>(name).map(Some),
        None => Ok(None),
    }
}

/// Options of `json.dumps` that templates pass.
struct Dumps {
    ensure_ascii: bool,
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    sort_keys: bool,
}

/// The `tojson` filter: plain `json.dumps(ensure_ascii=False)`, no HTML escapes. Parameters in the order that `transformers` gives them.
pub(crate) fn tojson(value: &Value, positional: Rest<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    let mut positional = positional.0.into_iter();
    let mut option = |name: &str| -> Result<Option<Value>, Error> { Ok(named(positional.next(), &kwargs, name)?.filter(|v| !v.is_none())) };
    let ensure_ascii = option("ensure_ascii")?.is_some_and(|v| v.is_true());
    let indent = match option("indent")? {
        None => None,
        Some(v) => match v.as_str() {
            Some(s) => Some(s.to_owned()),
            None => Some(" ".repeat(i64::try_from(v)?.clamp(0, 64) as usize)),
        },
    };
    let (item_separator, key_separator) = match option("separators")? {
        Some(pair) => {
            let part = |i| pair.get_item_by_index(i).map(|v| v.to_string());
            (part(0)?, part(1)?)
        }
        None => ((if indent.is_some() { "," } else { ", " }).to_owned(), ": ".to_owned()),
    };
    let sort_keys = option("sort_keys")?.is_some_and(|v| v.is_true());
    kwargs.assert_all_used()?;
    let dumps = Dumps { ensure_ascii, indent, item_separator, key_separator, sort_keys };
    let mut out = String::new();
    dumps.write(value, 0, &mut out)?;
    Ok(Value::from(out))
}

/// `json.dumps(value, ensure_ascii=False)`.
pub(crate) fn dumps(json: &Json) -> String {
    let dumps = Dumps { ensure_ascii: false, indent: None, item_separator: ", ".to_owned(), key_separator: ": ".to_owned(), sort_keys: false };
    let mut out = String::new();
    // Every JSON value can be written.
    let _ = dumps.write(&value_from_json(json), 0, &mut out);
    out
}

/// The `from_json` filter of llama.cpp, which templates for GGUF files use.
pub(crate) fn from_json(text: &str) -> Result<Value, Error> {
    let json: Json = serde_json::from_str(text).map_err(|e| Error::new(ErrorKind::InvalidOperation, format!("from_json: {e}")))?;
    Ok(value_from_json(&json))
}

impl Dumps {
    fn write(&self, value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
        if let Some(x) = as_float(value) {
            out.push_str(&match x {
                x if x.is_nan() => "NaN".to_owned(),
                x if x.is_infinite() => (if x > 0.0 { "Infinity" } else { "-Infinity" }).to_owned(),
                x => float_repr(x),
            });
            return Ok(());
        }
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push_str(&value.to_string()),
            ValueKind::String => self.write_string(value.as_str().unwrap_or_default(), out),
            ValueKind::Seq | ValueKind::Iterable => {
                let items = value.try_iter()?.collect::<Vec<_>>();
                self.write_items(items, ['[', ']'], depth, out, |item, out| self.write(&item, depth + 1, out))?;
            }
            ValueKind::Map => {
                let mut keys = value.try_iter()?.collect::<Vec<_>>();
                if self.sort_keys {
                    keys.sort();
                }
                self.write_items(keys, ['{', '}'], depth, out, |key, out| {
                    match key.kind() {
                        ValueKind::String => self.write_string(key.as_str().unwrap_or_default(), out),
                        // Keys that are no strings become the string of their JSON form.
                        _ => {
                            out.push('"');
                            self.write(&key, depth + 1, out)?;
                            out.push('"');
                        }
                    }
                    out.push_str(&self.key_separator);
                    self.write(&value.get_item(&key)?, depth + 1, out)
                })?;
            }
            kind => {
                let message = format!("a value of type {kind} is not JSON serializable");
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        }
        Ok(())
    }

    fn write_items(
        &self,
        items: Vec<Value>,
        brackets: [char; 2],
        depth: usize,
        out: &mut String,
        mut write: impl FnMut(Value, &mut String) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let newline = |depth: usize, out: &mut String| {
            if let Some(indent) = &self.indent {
                out.push('\n');
                (0..depth).for_each(|_| out.push_str(indent));
            }
        };
        out.push(brackets[0]);
        let empty = items.is_empty();
        for (i, item) in items.into_iter().enumerate() {
            if i > 0 {
                out.push_str(&self.item_separator);
            }
            newline(depth + 1, out);
            write(item, out)?;
        }
        if !empty {
            newline(depth, out);
        }
        out.push(brackets[1]);
        Ok(())
    }

    fn write_string(&self, text: &str, out: &mut String) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && !(' '..='~').contains(&c)) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        let _ = write!(out, "\\u{unit:04x}");
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

/// `str.isspace` of one character.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

fn strip<'a>(text: &'a str, chars: Option<&str>, start: bool, end: bool) -> &'a str {
    let matches = |c: char| chars.map_or_else(|| is_space(c), |set| set.contains(c));
    let text = if start { text.trim_start_matches(matches) } else { text };
    if end { text.trim_end_matches(matches) } else { text }
}

/// The `trim` filter: `str(value).strip(chars)`.
pub(crate) fn trim(value: &Value, chars: Option<Value>) -> String {
    let chars = chars.as_ref().and_then(Value::as_str);
    strip(&str_of(value), chars, true, true).to_owned()
}

/// `str.split` and `str.rsplit`.
fn split(text: &str, sep: Option<&str>, limit: Option<usize>, from_right: bool) -> Vec<String> {
    let limit = limit.unwrap_or(usize::MAX);
    let mut parts = Vec::new();
    let mut rest = text;
    match (sep, from_right) {
        (Some(sep), false) => {
            while parts.len() < limit
                && let Some((head, tail)) = rest.split_once(sep)
            {
                parts.push(head);
                rest = tail;
            }
            parts.push(rest);
        }
        (Some(sep), true) => {
            while parts.len() < limit
                && let Some((head, tail)) = rest.rsplit_once(sep)
            {
                parts.push(tail);
                rest = head;
            }
            parts.push(rest);
        }
        // Without a separator runs of white space separate, and the ends do not count.
        (None, false) => {
            rest = rest.trim_start_matches(is_space);
            while parts.len() < limit
                && let Some(at) = rest.find(is_space)
            {
                parts.push(&rest[..at]);
                rest = rest[at..].trim_start_matches(is_space);
            }
            if !rest.is_empty() {
                parts.push(if parts.len() < limit { rest.trim_end_matches(is_space) } else { rest });
            }
        }
        (None, true) => {
            rest = rest.trim_end_matches(is_space);
            while parts.len() < limit
                && let Some((at, c)) = rest.char_indices().rfind(|&(_, c)| is_space(c))
            {
                parts.push(&rest[at + c.len_utf8()..]);
                rest = rest[..at].trim_end_matches(is_space);
            }
            if !rest.is_empty() {
                parts.push(rest);
            }
        }
    }
    if from_right {
        parts.reverse();
    }
    parts.into_iter().map(str::to_owned).collect()
}

fn splitlines(text: &str, keep_ends: bool) -> Vec<String> {
    let mut lines = Vec::new();
    let mut rest = text;
    let ends = |c: char| matches!(c, '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}');
    while let Some(at) = rest.find(ends) {
        let width = if rest[at..].starts_with("\r\n") { 2 } else { rest[at..].chars().next().map_or(1, char::len_utf8) };
        lines.push(rest[..if keep_ends { at + width } else { at }].to_owned());
        rest = &rest[at + width..];
    }
    if !rest.is_empty() {
        lines.push(rest.to_owned());
    }
    lines
}

/// Methods that pycompat lacks or does differently from Python; everything else is pycompat's.
pub(crate) fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    if let Some(text) = value.as_str() {
        match name {
            "strip" | "lstrip" | "rstrip" => {
                let (chars,): (Option<Value>,) = from_args(args)?;
                let chars = chars.as_ref().and_then(Value::as_str);
                return Ok(Value::from(strip(text, chars, name != "rstrip", name != "lstrip")));
            }
            "split" | "rsplit" => {
                let (sep, limit, kwargs): (Option<Value>, Option<Value>, Kwargs) = from_args(args)?;
                let (sep, limit) = (named(sep, &kwargs, "sep")?, named(limit, &kwargs, "maxsplit")?);
                kwargs.assert_all_used()?;
                let sep = sep.as_ref().and_then(Value::as_str);
                if sep == Some("") {
                    return Err(Error::new(ErrorKind::InvalidOperation, "empty separator"));
                }
                let limit = limit.map(i64::try_from).transpose()?.and_then(|n| usize::try_from(n).ok());
                return Ok(Value::from(split(text, sep, limit, name == "rsplit")));
            }
            "splitlines" => {
                let (keep_ends, kwargs): (Option<bool>, Kwargs) = from_args(args)?;
                let keep_ends = keep_ends.unwrap_or(kwargs.get::<Option<bool>>("keepends")?.unwrap_or(false));
                return Ok(Value::from(splitlines(text, keep_ends)));
            }
            "partition" | "rpartition" => {
                let (sep,): (&str,) = from_args(args)?;
                let found = if name == "partition" { text.split_once(sep) } else { text.rsplit_once(sep) };
                let parts = match found {
                    Some((head, tail)) => [head, sep, tail],
                    None if name == "partition" => [text, "", ""],
                    None => ["", "", text],
                };
                return Ok(Value::from(Tuple::from(parts.map(Value::from))));
            }
            "removeprefix" => {
                let (prefix,): (&str,) = from_args(args)?;
                return Ok(Value::from(text.strip_prefix(prefix).unwrap_or(text)));
            }
            "removesuffix" => {
                let (suffix,): (&str,) = from_args(args)?;
                return Ok(Value::from(text.strip_suffix(suffix).unwrap_or(text)));
            }
            _ => {}
        }
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)
}

/// The `sequence` test: in Python strings and mappings are sequences too.
pub(crate) fn is_sequence(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Seq | ValueKind::String | ValueKind::Map | ValueKind::Undefined)
}

/// The `iterable` test: null is not.
pub(crate) fn is_iterable(value: &Value) -> bool {
    is_sequence(value) || value.kind() == ValueKind::Iterable
}
