//! The tokenizer of a GGUF file, written as the `tokenizer.json` that it was made from.

use serde_json::{Map, Value, json};

/// Kinds of tokens in GGUF files that are cut out of a text before it is split.
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// What a GGUF file says of its tokens.
#[derive(Clone, Copy, Debug)]
pub struct GgufVocab<'a> {
    /// `tokenizer.ggml.model`.
    pub model: &'a str,
    /// `tokenizer.ggml.pre`: how a text is split.
    pub pre: &'a str,
    /// Written forms by id.
    pub tokens: &'a [String],
    /// Kinds by id; empty for all normal.
    pub kinds: &'a [i64],
    /// Pairs, the most frequent first.
    pub merges: &'a [String],
}

/// How texts are split: that of Qwen2 with and without combining marks in words.
fn pattern(pre: &str) -> Option<&'static str> {
    match pre {
        "qwen2" => Some(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
        "qwen35" => Some(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
        _ => None,
    }
}

/// The tokenizer as the `tokenizers` crate reads it.
///
/// # Errors
/// Why it cannot be: another model than byte-level BPE, a way of splitting that is not known.
pub fn tokenizer_json(v: &GgufVocab<'_>) -> Result<Value, String> {
    if v.model != "gpt2" {
        return Err(format!("tokenizer.ggml.model is {}; only gpt2 (byte-level BPE) is supported", v.model));
    }
    let pattern = pattern(v.pre).ok_or_else(|| format!("tokenizer.ggml.pre is {}; qwen2 and qwen35 are supported", v.pre))?;
    let vocab: Map<String, Value> = v.tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
    if vocab.len() != v.tokens.len() {
        return Err("tokenizer.ggml.tokens has a token twice".to_owned());
    }
    let added = v.tokens.iter().zip(v.kinds).enumerate().filter(|(_, (_, kind))| matches!(**kind, CONTROL | USER_DEFINED));
    let added: Vec<Value> = added
        .map(|(id, (token, kind))| {
            json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": *kind == CONTROL})
        })
        .collect();
    let byte_level = |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": regex});
    Ok(json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false}, byte_level(false),
        ]},
        "post_processor": null, "decoder": byte_level(false),
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": false,
            "byte_fallback": false, "vocab": vocab, "merges": v.merges},
    }))
}
