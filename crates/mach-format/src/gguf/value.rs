//! Metadata of a GGUF file.

use indexmap::IndexMap;

use crate::error::FormatError;

/// A value. Integers of 8 and 16 bits are kept in 32.
#[derive(Clone, Debug, PartialEq)]
pub enum MetaValue {
    /// Unsigned, up to 32 bits.
    U32(u32),
    /// Signed, up to 32 bits.
    I32(i32),
    /// Single.
    F32(f32),
    /// Unsigned 64 bits.
    U64(u64),
    /// Signed 64 bits.
    I64(i64),
    /// Double.
    F64(f64),
    /// Flag.
    Bool(bool),
    /// UTF-8.
    Text(String),
    /// Values of one type.
    List(MetaList),
}

/// A list of one type; lists of lists are not read.
#[derive(Clone, Debug, PartialEq)]
pub enum MetaList {
    /// Whole numbers of any width.
    Int(Vec<i64>),
    /// Singles and doubles.
    Float(Vec<f64>),
    /// Flags.
    Bool(Vec<bool>),
    /// Strings.
    Text(Vec<String>),
}

impl MetaList {
    /// Number of values.
    pub fn len(&self) -> usize {
        match self {
            Self::Int(v) => v.len(),
            Self::Float(v) => v.len(),
            Self::Bool(v) => v.len(),
            Self::Text(v) => v.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl MetaValue {
    fn kind(&self) -> &'static str {
        match self {
            Self::U32(_) | Self::I32(_) | Self::U64(_) | Self::I64(_) => "a whole number",
            Self::F32(_) | Self::F64(_) => "a fraction",
            Self::Bool(_) => "a flag",
            Self::Text(_) => "text",
            Self::List(_) => "a list",
        }
    }

    pub(crate) fn int(&self) -> Option<i64> {
        match *self {
            Self::U32(n) => Some(n.into()),
            Self::I32(n) => Some(n.into()),
            Self::U64(n) => n.try_into().ok(),
            Self::I64(n) => Some(n),
            _ => None,
        }
    }
}

/// Keys and values in the order of the file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metadata(pub(crate) IndexMap<String, MetaValue>);

impl Metadata {
    /// Adds or replaces a value.
    pub fn set(&mut self, key: impl Into<String>, value: MetaValue) {
        self.0.insert(key.into(), value);
    }

    /// A value.
    pub fn get(&self, key: &str) -> Option<&MetaValue> {
        self.0.get(key)
    }

    /// All keys and values.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &MetaValue)> {
        self.0.iter().map(|(k, v)| (k.as_str(), v))
    }

    /// Bytes of all lists of texts, with what JSON needs around each.
    pub(crate) fn text_bytes(&self) -> u64 {
        const AROUND: u64 = 16;
        let of = |v: &MetaValue| match v {
            MetaValue::List(MetaList::Text(texts)) => texts.iter().map(|t| t.len() as u64 + AROUND).sum(),
            _ => 0,
        };
        self.0.values().map(of).sum()
    }

    fn typed<'a, T>(&'a self, key: &str, what: &str, read: impl Fn(&'a MetaValue) -> Option<T>) -> Result<Option<T>, FormatError> {
        let wrong = |v: &MetaValue| FormatError::GgufMetadata { key: key.to_owned(), problem: format!("is {}, not {what}", v.kind()) };
        self.get(key).map(|v| read(v).ok_or_else(|| wrong(v))).transpose()
    }

    /// A size, if present.
    ///
    /// # Errors
    /// A value of another type or below 0.
    pub fn size(&self, key: &str) -> Result<Option<u64>, FormatError> {
        self.typed(key, "a size", |v| v.int()?.try_into().ok())
    }

    /// A number, if present.
    ///
    /// # Errors
    /// A value of another type.
    pub fn number(&self, key: &str) -> Result<Option<f64>, FormatError> {
        self.typed(key, "a number", |v| match *v {
            MetaValue::F32(x) => Some(x.into()),
            MetaValue::F64(x) => Some(x),
            ref other => other.int().map(|n| n as f64),
        })
    }

    /// A flag, if present.
    ///
    /// # Errors
    /// A value of another type.
    pub fn flag(&self, key: &str) -> Result<Option<bool>, FormatError> {
        self.typed(key, "a flag", |v| if let MetaValue::Bool(b) = v { Some(*b) } else { None })
    }

    /// Text, if present.
    ///
    /// # Errors
    /// A value of another type.
    pub fn text(&self, key: &str) -> Result<Option<&str>, FormatError> {
        self.typed(key, "text", |v| if let MetaValue::Text(t) = v { Some(t.as_str()) } else { None })
    }

    /// A list, if present.
    ///
    /// # Errors
    /// A value of another type.
    pub fn list(&self, key: &str) -> Result<Option<&MetaList>, FormatError> {
        self.typed(key, "a list", |v| if let MetaValue::List(l) = v { Some(l) } else { None })
    }

    /// A list of strings, if present.
    ///
    /// # Errors
    /// A value of another type.
    pub fn texts(&self, key: &str) -> Result<Option<&[String]>, FormatError> {
        self.typed(key, "a list of texts", |v| if let MetaValue::List(MetaList::Text(t)) = v { Some(t.as_slice()) } else { None })
    }
}
