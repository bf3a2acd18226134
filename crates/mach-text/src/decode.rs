//! Ids to text, piece by piece, equal to decoding the whole sequence at once.

use std::sync::Arc;

use serde_json::Value;
use tokenizers::Tokenizer as HfTokenizer;

use crate::tokenizer::Tokenizer;

/// How a tokenizer turns pieces into text.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum DecoderKind {
    /// GPT-2's alphabet: every piece is bytes, the text is their lossy UTF-8.
    ByteLevel,
    /// SentencePiece-like: pieces are text after replacements, `<0xNN>` pieces are bytes.
    ByteFallback { replace: Vec<(String, String)>, strip_start: Option<(char, usize)> },
}

impl DecoderKind {
    /// From the `decoder` object of tokenizer.json.
    ///
    /// # Errors
    /// The name of the part that is not known.
    pub(crate) fn from_json(decoder: &Value) -> Result<Self, String> {
        let steps = match decoder["decoders"].as_array() {
            Some(steps) => steps.as_slice(),
            None => std::slice::from_ref(decoder),
        };
        let (mut byte_level, mut byte_fallback, mut replace, mut strip_start) = (false, false, Vec::new(), None);
        for step in steps {
            match step["type"].as_str() {
                Some("ByteLevel") => byte_level = true,
                Some("ByteFallback") => byte_fallback = true,
                Some("Fuse") => {}
                Some("Replace") => match (step["pattern"]["String"].as_str(), step["content"].as_str()) {
                    (Some(from), Some(to)) => replace.push((from.to_owned(), to.to_owned())),
                    _ => return Err("Replace by a regular expression".to_owned()),
                },
                Some("Strip") if step["stop"] == 0 => {
                    let content = step["content"].as_str().and_then(|c| c.chars().next());
                    strip_start = content.zip(step["start"].as_u64().map(|n| n as usize));
                }
                other => return Err(other.unwrap_or("none").to_owned()),
            }
        }
        match (byte_level, byte_fallback) {
            (true, false) if replace.is_empty() && strip_start.is_none() => Ok(Self::ByteLevel),
            (false, true) => Ok(Self::ByteFallback { replace, strip_start }),
            _ => Err("an unknown sequence".to_owned()),
        }
    }
}

const UNKNOWN: u8 = 0;
const PLAIN: u8 = 1;
const SPECIAL: u8 = 2;
/// A `<0xNN>` piece: one byte of a run.
const BYTE: u8 = 3;

/// The bytes of every id, in one block.
pub(crate) struct Pieces {
    kind: DecoderKind,
    bytes: Vec<u8>,
    ends: Vec<u32>,
    class: Vec<u8>,
}

/// What a decoder holds back.
#[derive(Clone, Debug, Default)]
pub(crate) struct DecodeState {
    held: Vec<u8>,
    started: bool,
}

impl Pieces {
    pub(crate) fn new(inner: &HfTokenizer, kind: DecoderKind) -> Self {
        let len = inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        let added = inner.get_added_tokens_decoder();
        let mut pieces = Self { kind, bytes: Vec::new(), ends: Vec::with_capacity(len), class: Vec::with_capacity(len) };
        let alphabet = byte_alphabet();
        for id in 0..len as u32 {
            let class = match inner.id_to_token(id) {
                None => UNKNOWN,
                Some(token) => {
                    let special = added.get(&id).is_some_and(|t| t.special);
                    pieces.append(&token, &alphabet, special)
                }
            };
            pieces.ends.push(pieces.bytes.len() as u32);
            pieces.class.push(class);
        }
        pieces
    }

    fn append(&mut self, token: &str, alphabet: &[Option<u8>; 324], special: bool) -> u8 {
        let mut class = PLAIN;
        match &self.kind {
            DecoderKind::ByteLevel => {
                let byte = |c: char| alphabet.get(c as usize).copied().flatten();
                // As the reference decoder does: a token with any letter outside the alphabet stands for its own UTF-8.
                if token.chars().all(|c| byte(c).is_some()) {
                    self.bytes.extend(token.chars().filter_map(byte));
                } else {
                    self.bytes.extend_from_slice(token.as_bytes());
                }
            }
            DecoderKind::ByteFallback { replace, .. } => match byte_piece(token) {
                Some(byte) => {
                    self.bytes.push(byte);
                    class = BYTE;
                }
                None => {
                    let text = replace.iter().fold(token.to_owned(), |t, (from, to)| t.replace(from, to));
                    self.bytes.extend_from_slice(text.as_bytes());
                }
            },
        }
        if special { SPECIAL } else { class }
    }

    pub(crate) fn len(&self) -> usize {
        self.ends.len()
    }

    pub(crate) fn bytes(&self, id: u32) -> Option<&[u8]> {
        let i = id as usize;
        if *self.class.get(i)? == UNKNOWN {
            return None;
        }
        let start = if i == 0 { 0 } else { self.ends[i - 1] as usize };
        Some(&self.bytes[start..self.ends[i] as usize])
    }

    fn class(&self, id: u32) -> u8 {
        self.class.get(id as usize).copied().unwrap_or(UNKNOWN)
    }

    pub(crate) fn is_special(&self, id: u32) -> bool {
        self.class(id) == SPECIAL
    }

    pub(crate) fn start(&self) -> DecodeState {
        DecodeState::default()
    }

    /// Appends what `id` makes certain; special tokens only where they are among the visible ones.
    pub(crate) fn push(&self, state: &mut DecodeState, id: u32, visible: &[u32], out: &mut String) {
        let class = self.class(id);
        if (class == SPECIAL && !visible.contains(&id)) || class == UNKNOWN {
            return;
        }
        let bytes = self.bytes(id).unwrap_or_default();
        match &self.kind {
            DecoderKind::ByteLevel => {
                state.held.extend_from_slice(bytes);
                drain_utf8(&mut state.held, out);
            }
            // A run of byte pieces is one string if it is valid as a whole, else one replacement per byte: it waits for its end.
            DecoderKind::ByteFallback { .. } if class == BYTE => state.held.extend_from_slice(bytes),
            DecoderKind::ByteFallback { .. } => {
                self.flush_run(state, out);
                self.emit(state, &String::from_utf8_lossy(bytes), out);
            }
        }
    }

    /// Appends what was held back.
    pub(crate) fn finish(&self, state: &mut DecodeState, out: &mut String) {
        match &self.kind {
            DecoderKind::ByteLevel => {
                if !state.held.is_empty() {
                    out.push(char::REPLACEMENT_CHARACTER);
                    state.held.clear();
                }
            }
            DecoderKind::ByteFallback { .. } => self.flush_run(state, out),
        }
    }

    fn flush_run(&self, state: &mut DecodeState, out: &mut String) {
        if state.held.is_empty() {
            return;
        }
        let run = std::mem::take(&mut state.held);
        match std::str::from_utf8(&run) {
            Ok(text) => self.emit(state, text, out),
            Err(_) => self.emit(state, &"\u{fffd}".repeat(run.len()), out),
        }
    }

    /// Emits text, stripping at the very start as the decoder asks.
    fn emit(&self, state: &mut DecodeState, text: &str, out: &mut String) {
        let mut text = text;
        if let DecoderKind::ByteFallback { strip_start: Some((c, n)), .. } = &self.kind
            && !state.started
        {
            for _ in 0..*n {
                text = text.strip_prefix(*c).unwrap_or(text);
            }
        }
        state.started = true;
        out.push_str(text);
    }
}

/// Moves the decodable part of `held` to `out`; invalid bytes become one replacement per maximal part, an incomplete end stays.
fn drain_utf8(held: &mut Vec<u8>, out: &mut String) {
    let mut at = 0;
    loop {
        match std::str::from_utf8(&held[at..]) {
            Ok(text) => {
                out.push_str(text);
                at = held.len();
                break;
            }
            Err(e) => {
                let valid = at + e.valid_up_to();
                out.push_str(&String::from_utf8_lossy(&held[at..valid]));
                at = valid;
                match e.error_len() {
                    Some(n) => {
                        out.push(char::REPLACEMENT_CHARACTER);
                        at += n;
                    }
                    None => break,
                }
            }
        }
    }
    held.drain(..at);
}

/// `<0x0A>` to its byte.
fn byte_piece(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if hex.len() == 2 { u8::from_str_radix(hex, 16).ok() } else { None }
}

/// GPT-2's table from letters to bytes: printable bytes stand for themselves, the other 68 follow from U+0100 on.
fn byte_alphabet() -> [Option<u8>; 324] {
    let mut table = [None; 324];
    let mut next = 256;
    for byte in 0..=255u8 {
        if matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff) {
            table[byte as usize] = Some(byte);
        } else {
            table[next] = Some(byte);
            next += 1;
        }
    }
    table
}

/// Decodes a stream of ids: text comes as soon as it is certain, and all of it together equals [`Tokenizer::decode`].
#[derive(Clone)]
pub struct TextDecoder {
    tokenizer: Arc<Tokenizer>,
    visible: Arc<[u32]>,
    state: DecodeState,
}

impl TextDecoder {
    /// A decoder at the start of a text.
    pub fn new(tokenizer: Arc<Tokenizer>) -> Self {
        Self::showing(tokenizer, Arc::default())
    }

    /// A decoder that also writes out these special tokens.
    pub fn showing(tokenizer: Arc<Tokenizer>, visible: Arc<[u32]>) -> Self {
        Self { state: tokenizer.pieces().start(), visible, tokenizer }
    }

    /// Text that the next id completes; empty for special tokens and within a character.
    pub fn push(&mut self, id: u32) -> String {
        let mut text = String::new();
        self.tokenizer.pieces().push(&mut self.state, id, &self.visible, &mut text);
        text
    }

    /// What was still held back (an incomplete character becomes U+FFFD). The decoder is at a start again.
    pub fn finish(&mut self) -> String {
        let mut text = String::new();
        self.tokenizer.pieces().finish(&mut self.state, &mut text);
        self.state = self.tokenizer.pieces().start();
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pushing bytes one by one gives what lossy decoding of the whole gives, with incomplete and invalid parts anywhere.
    #[test]
    fn drained_utf8_equals_lossy_decoding() {
        let cases: [&[u8]; 7] = [
            "héllo 🙂".as_bytes(),
            &[0xf0, 0x9f, 0x92],
            &[0xe2, 0x82, b'a'],
            &[0xff, 0xfe, b'x', 0xc3],
            &[0xf0, 0x9f, 0xf0, 0x9f, 0x99, 0x82],
            &[0xed, 0xa0, 0x80],
            &[0x80, 0x80, 0xc3, 0xa9],
        ];
        for bytes in cases {
            let (mut held, mut out) = (Vec::new(), String::new());
            for &b in bytes {
                held.push(b);
                drain_utf8(&mut held, &mut out);
            }
            if !held.is_empty() {
                out.push(char::REPLACEMENT_CHARACTER);
            }
            assert_eq!(out, String::from_utf8_lossy(bytes), "{bytes:x?}");
        }
    }

    /// Decoders are told apart by their parts, and an unknown part is named.
    #[test]
    fn decoder_kinds_are_recognised() {
        let gemma = serde_json::json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]});
        let kind = DecoderKind::from_json(&gemma).unwrap();
        assert!(matches!(kind, DecoderKind::ByteFallback { ref replace, strip_start: None } if replace.len() == 1));
        assert_eq!(DecoderKind::from_json(&serde_json::json!({"type": "WordPiece"})), Err("WordPiece".to_owned()));
        assert_eq!(DecoderKind::from_json(&Value::Null), Err("none".to_owned()));
    }

    /// The alphabet is a bijection on bytes.
    #[test]
    fn byte_alphabet_covers_every_byte_once() {
        let mut seen: Vec<u8> = byte_alphabet().into_iter().flatten().collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..=255).collect::<Vec<u8>>());
        assert_eq!(byte_alphabet()['Ġ' as usize], Some(b' '));
    }
}
