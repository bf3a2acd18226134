//! The tokenizer of a checkpoint: text to ids, ids to text, and the bytes behind every id.

use std::path::Path;

use serde_json::{Map, Value};
use tokenizers::Tokenizer as HfTokenizer;

use crate::decode::{DecoderKind, Pieces};
use crate::error::TextError;

/// Named special tokens that templates may read.
const NAMED_TOKENS: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// A tokenizer opened from `tokenizer.json` and `tokenizer_config.json`.
pub struct Tokenizer {
    inner: HfTokenizer,
    pieces: Pieces,
    named: Map<String, Value>,
    eos: Option<u32>,
}

impl Tokenizer {
    /// Opens the tokenizer of a checkpoint directory. `tokenizer_config.json` may be absent.
    ///
    /// # Errors
    /// [`TextError::Read`], [`TextError::Invalid`], [`TextError::UnsupportedDecoder`].
    pub fn open(dir: &Path) -> Result<Self, TextError> {
        let path = dir.join("tokenizer.json");
        let bytes = std::fs::read(&path).map_err(|source| TextError::Read { path: path.clone(), source })?;
        let mut named = Map::new();
        if let Some(config) = read_json(&dir.join("tokenizer_config.json"))? {
            for name in NAMED_TOKENS {
                // Either the text itself or an added-token object around it.
                let text = config.get(name).and_then(|v| v.as_str().or_else(|| v.get("content")?.as_str()));
                if let Some(text) = text {
                    named.insert(name.to_owned(), Value::from(text));
                }
            }
        }
        Self::from_json(&bytes, named, &path)
    }

    /// A tokenizer from the text of a `tokenizer.json` and its named tokens (`eos_token` …). `path` is what errors call it.
    ///
    /// # Errors
    /// [`TextError::Invalid`], [`TextError::UnsupportedDecoder`].
    pub fn from_json(json: &[u8], named: Map<String, Value>, path: &Path) -> Result<Self, TextError> {
        let invalid = |reason: String| TextError::Invalid { path: path.to_owned(), reason };
        let mut inner = HfTokenizer::from_bytes(json).map_err(|e| invalid(e.to_string()))?;
        // A prompt is never cut or padded, whatever the file was saved with.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| invalid(e.to_string()))?;
        let decoder = serde_json::to_value(inner.get_decoder()).map_err(|e| invalid(e.to_string()))?;
        let kind = DecoderKind::from_json(&decoder).map_err(|decoder| TextError::UnsupportedDecoder { path: path.to_owned(), decoder })?;
        let eos = named.get("eos_token").and_then(Value::as_str).and_then(|t| inner.token_to_id(t));
        let pieces = Pieces::new(&inner, kind);
        Ok(Self { inner, pieces, named, eos })
    }

    /// Ids of a text; special tokens written in it are parsed. With `add_special_tokens` the tokenizer's own template is applied
    /// (a BOS where the checkpoint wants one): right for plain text, wrong after a chat template, which writes them itself.
    ///
    /// # Errors
    /// [`TextError::Encode`].
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TextError> {
        let encoding = self.inner.encode_fast(text, add_special_tokens).map_err(|e| TextError::Encode(e.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of a whole sequence without the tokens flagged special; unknown ids are nothing.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut state = self.pieces.start();
        let mut text = String::new();
        for &id in ids {
            self.pieces.push(&mut state, id, &[], &mut text);
        }
        self.pieces.finish(&mut state, &mut text);
        text
    }

    /// Raw bytes of a token, special ones included; `None` for an id that the tokenizer does not know.
    pub fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        self.pieces.bytes(id)
    }

    /// The id of a token by its written form (`<|im_end|>`).
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Whether decoding leaves the token out.
    pub fn is_special(&self, id: u32) -> bool {
        self.pieces.is_special(id)
    }

    /// One more than the largest id. A model may have more rows (padding), never fewer.
    pub fn vocab_size(&self) -> usize {
        self.pieces.len()
    }

    /// The end token of `tokenizer_config.json`.
    pub fn eos_id(&self) -> Option<u32> {
        self.eos
    }

    /// `bos_token`, `eos_token` and the like, as templates see them.
    pub fn named_tokens(&self) -> &Map<String, Value> {
        &self.named
    }

    /// The largest token position whose text lies wholly within the first `byte` bytes of `text`, where `ids` are the tokens of `text`.
    /// Stops early where the tokenizer's normalisation changed the text.
    pub fn position_of(&self, ids: &[u32], text: &str, byte: usize) -> usize {
        let (text, mut at) = (&text.as_bytes()[..byte.min(text.len())], 0);
        for (i, &id) in ids.iter().enumerate() {
            match self.token_bytes(id) {
                Some(piece) if text[at..].starts_with(piece) => at += piece.len(),
                _ => return i,
            }
        }
        ids.len()
    }

    pub(crate) fn pieces(&self) -> &Pieces {
        &self.pieces
    }
}

/// Reads a JSON file; `None` when it does not exist.
///
/// # Errors
/// [`TextError::Read`], [`TextError::Invalid`].
pub fn read_json(path: &Path) -> Result<Option<Value>, TextError> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(TextError::Read { path: path.into(), source }),
    };
    let value = serde_json::from_slice(&bytes).map_err(|e| TextError::Invalid { path: path.into(), reason: e.to_string() })?;
    Ok(Some(value))
}
