//! The tools of a request, as far as reading calls needs them: which type each argument has.

use std::collections::HashMap;

use serde_json::Value;

/// Schemas of the arguments, by function.
#[derive(Clone, Debug, Default)]
pub struct ToolSchemas(HashMap<String, Value>);

/// References are followed so deep; schemas may refer to themselves.
const MAX_DEPTH: usize = 16;

impl ToolSchemas {
    /// From tools as OpenAI's API has them, `{"type": "function", "function": {"name": …, "parameters": {…}}}`.
    pub fn from_tools(tools: &Value) -> Self {
        let tools = tools.as_array().map(Vec::as_slice).unwrap_or_default();
        let entry = |tool: &Value| {
            let function = tool.get("function").unwrap_or(tool);
            Some((function["name"].as_str()?.to_owned(), function["parameters"].clone()))
        };
        Self(tools.iter().filter_map(entry).collect())
    }

    /// What the argument `key` of a function may be. Without a type in its schema it is text.
    pub(super) fn argument(&self, function: &str, key: &str) -> ArgumentType {
        let mut types = ArgumentType::default();
        if let Some(root) = self.0.get(function) {
            match &root["properties"][key] {
                Value::Null => {
                    // Maps of any keys say what their values are.
                    types.add(&root["additionalProperties"], root, 0);
                }
                schema => types.add(schema, root, 0),
            }
        }
        types
    }
}

/// The JSON types that an argument may have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct ArgumentType {
    string: bool,
    null: bool,
    boolean: bool,
    integer: bool,
    number: bool,
    array: bool,
    object: bool,
}

impl ArgumentType {
    fn add(&mut self, schema: &Value, root: &Value, depth: usize) {
        if depth > MAX_DEPTH {
            return;
        }
        match &schema["type"] {
            Value::String(name) => self.add_name(name),
            Value::Array(names) => names.iter().filter_map(Value::as_str).for_each(|name| self.add_name(name)),
            _ => {}
        }
        for key in ["anyOf", "oneOf", "allOf"] {
            for one in schema[key].as_array().into_iter().flatten() {
                self.add(one, root, depth + 1);
            }
        }
        let constants = schema["enum"].as_array().map(Vec::as_slice).unwrap_or_default().iter().chain(schema.get("const"));
        if schema["type"].is_null() {
            constants.for_each(|constant| self.add_name(name_of(constant)));
        }
        let target = schema["$ref"].as_str().and_then(|r| r.strip_prefix('#')).and_then(|pointer| root.pointer(pointer));
        if let Some(target) = target {
            self.add(target, root, depth + 1);
        }
    }

    fn add_name(&mut self, name: &str) {
        match name {
            "string" => self.string = true,
            "null" => self.null = true,
            "boolean" => self.boolean = true,
            "integer" => self.integer = true,
            "number" => self.number = true,
            "array" => self.array = true,
            "object" => self.object = true,
            _ => {}
        }
    }

    /// Whether every value is text: nothing else needs to be tried.
    pub(super) fn is_text(self) -> bool {
        self == Self::default() || self == Self { string: true, ..Self::default() }
    }

    fn admits(self, value: &Value) -> bool {
        match value {
            Value::Null => self.null,
            Value::Bool(_) => self.boolean,
            Value::Number(n) => self.number || (self.integer && (n.is_i64() || n.is_u64() || n.as_f64().is_some_and(|x| x.fract() == 0.0))),
            Value::String(_) => false,
            Value::Array(_) => self.array,
            Value::Object(_) => self.object,
        }
    }

    /// The JSON text of a value that was written bare: as its schema wants it, else as a string.
    pub(super) fn json(self, text: &str) -> String {
        let bare = text.trim();
        // Templates that print Python values teach them.
        let bare = match bare {
            "True" if self.boolean => "true",
            "False" if self.boolean => "false",
            "None" if self.null => "null",
            _ => bare,
        };
        match serde_json::from_str::<Value>(bare) {
            Ok(value) if self.admits(&value) => bare.to_owned(),
            _ => format!("\"{}\"", escaped(text)),
        }
    }
}

fn name_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

/// Text as it stands inside a JSON string, without the quotes.
pub(super) fn escaped(text: &str) -> String {
    let quoted = Value::from(text).to_string();
    quoted[1..quoted.len() - 1].to_owned()
}
