//! The tokenizer against transformers (goldens/make_token_goldens.py), and what the engine needs to know of it.

mod common;

use std::sync::Arc;
use std::time::Instant;

use common::{golden, here};
use mach_text::{TextDecoder, TextError, Tokenizer};

fn tiny() -> Arc<Tokenizer> {
    Arc::new(Tokenizer::open(&here("../../models/tiny")).unwrap())
}

/// Texts and ids translate as transformers translates them, broken UTF-8, special and unknown ids included, at once and in a stream.
#[test]
fn tokens_are_those_of_transformers() {
    common::compare_tokens(&golden("tokens.json"), &tiny());
}

/// Special tokens are parsed in text and left out of it; added ones that are not special stay visible.
#[test]
fn special_and_added_tokens() {
    let tokenizer = tiny();
    let id = |t: &str| tokenizer.token_id(t).unwrap();
    assert_eq!(tokenizer.encode("<|im_end|>", false).unwrap(), [id("<|im_end|>")]);
    assert_eq!((tokenizer.eos_id(), tokenizer.vocab_size()), (Some(id("<|im_end|>")), 4096));
    assert!(tokenizer.is_special(id("<|im_end|>")) && !tokenizer.is_special(id("<think>")));
    let ids = tokenizer.encode("<think>a</think><|im_end|><tool_call>", false).unwrap();
    assert_eq!(tokenizer.decode(&ids), "<think>a</think><tool_call>");
    assert_eq!(tokenizer.token_bytes(id("<|im_end|>")), Some(&b"<|im_end|>"[..]));
    assert_eq!(tokenizer.token_bytes(99_999), None);
    let bytes: Vec<u8> = tokenizer.encode("é 🙂", false).unwrap().iter().flat_map(|&t| tokenizer.token_bytes(t).unwrap().to_vec()).collect();
    assert_eq!(bytes, "é 🙂".as_bytes());
}

/// A position in the text is found in the tokens, rounded down to a border; changed text (NFC) stops the search.
#[test]
fn text_positions_are_found_in_tokens() {
    let tokenizer = tiny();
    let text = "<|im_start|>user\nHello there<|im_end|>\n";
    let ids = tokenizer.encode(text, false).unwrap();
    let start = text.find("<|im_end|>").unwrap();
    let at = tokenizer.position_of(&ids, text, start);
    assert_eq!(ids[at], tokenizer.token_id("<|im_end|>").unwrap());
    assert_eq!(tokenizer.position_of(&ids, text, start + 3), at);
    assert_eq!(tokenizer.position_of(&ids, text, usize::MAX), ids.len());
    let decomposed = "e\u{301}x";
    assert_eq!(tokenizer.position_of(&tokenizer.encode(decomposed, false).unwrap(), decomposed, 4), 0);
}

/// Decoding costs the same per token at the end of a long text as at its start.
#[test]
fn streams_are_not_quadratic() {
    let tokenizer = tiny();
    let ids: Vec<u32> = (0..400_000).map(|i| 256 + i % 3000).collect();
    let started = Instant::now();
    let mut decoder = TextDecoder::new(tokenizer.clone());
    let text: String = ids.iter().map(|&id| decoder.push(id)).collect();
    assert_eq!(text + &decoder.finish(), tokenizer.decode(&ids));
    // Linear takes some 20 ms, quadratic minutes.
    assert!(started.elapsed().as_secs() < 5);
}

/// What is missing or broken is named.
#[test]
fn bad_files_are_named_errors() {
    let dir = tempfile::tempdir().unwrap();
    let open = || Tokenizer::open(dir.path()).err().map(|e| e.code());
    assert_eq!(open(), Some("tokenizer-unreadable"));
    std::fs::write(dir.path().join("tokenizer.json"), "{").unwrap();
    assert_eq!(open(), Some("tokenizer-invalid"));
    let bytes = std::fs::read(here("../../models/tiny/tokenizer.json")).unwrap();
    let mut json: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
    json["decoder"] = serde_json::json!({"type": "WordPiece", "prefix": "##", "cleanup": true});
    std::fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
    assert!(matches!(Tokenizer::open(dir.path()), Err(TextError::UnsupportedDecoder { decoder, .. }) if decoder == "WordPiece"));
    std::fs::write(dir.path().join("tokenizer.json"), &bytes).unwrap();
    std::fs::write(dir.path().join("tokenizer_config.json"), "nonsense").unwrap();
    assert_eq!(open(), Some("tokenizer-invalid"));
}
