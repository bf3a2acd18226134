//! The tokenizer of a GGUF file, written as the `tokenizer.json` that it was made from.

use serde_json::{Map, Value, json};

/// The kind of the token for what the vocabulary lacks.
const UNKNOWN: i64 = 2;
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
    /// The token that begins a text, where the tokenizer adds one: `tokenizer.ggml.add_bos_token`.
    pub bos: Option<usize>,
}

/// How texts are split before pairs are joined, one pattern after another, and whether they are normalised (NFC) before.
fn patterns(pre: &str) -> Option<(bool, &'static [&'static str])> {
    match pre {
        "qwen2" => Some((true, &[r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"])),
        // The same with combining marks in words.
        "qwen35" => {
            Some((true, &[r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"]))
        }
        // o200k: words end where an upper-case letter follows a lower-case one.
        "gpt-4o" => Some((
            false,
            &[concat!(
                r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|",
                r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|",
                r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            )],
        )),
        // Digits in threes, runs of Chinese and Japanese, then words.
        "deepseek-v3" | "joyai-llm" => Some((
            false,
            &[
                r"\p{N}{1,3}",
                "[一-龥\u{3040}-ゟ゠-ヿ]+",
                concat!(
                    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"##,
                    r"\s*[\r\n]+|\s+(?!\S)|\s+"
                ),
            ],
        )),
        _ => None,
    }
}

/// The tokenizer as the `tokenizers` crate reads it.
///
/// # Errors
/// Why it cannot be: another model than BPE over bytes or over SentencePiece's alphabet, a way of splitting that is not known.
pub fn tokenizer_json(v: &GgufVocab<'_>) -> Result<Value, String> {
    let vocab: Map<String, Value> = v.tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
    if vocab.len() != v.tokens.len() {
        return Err("tokenizer.ggml.tokens has a token twice".to_owned());
    }
    let mut parts = match v.model {
        "gpt2" => byte_level(v.pre)?,
        "gemma4" => sentence_piece(v)?,
        model => return Err(format!("tokenizer.ggml.model is {model}; gpt2 (byte-level BPE) and gemma4 are supported")),
    };
    parts["model"]["vocab"] = Value::Object(vocab);
    parts["model"]["merges"] = json!(v.merges);
    let added = v.tokens.iter().zip(v.kinds).enumerate().filter(|(_, (_, kind))| matches!(**kind, CONTROL | USER_DEFINED | UNKNOWN));
    let added: Vec<Value> = added
        .map(|(id, (token, kind))| {
            let special = *kind != USER_DEFINED;
            json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": special})
        })
        .collect();
    let bos = v.bos.map(|id| v.tokens.get(id).map(|token| (id, token)).ok_or("tokenizer.ggml.bos_token_id is not in the vocabulary")).transpose()?;
    let post_processor = bos.map(|(id, token)| {
        let one = json!({"SpecialToken": {"id": token, "type_id": 0}});
        let text = |id: &str| json!({"Sequence": {"id": id, "type_id": 0}});
        json!({"type": "TemplateProcessing", "single": [one, text("A")], "pair": [one, text("A"), text("B")],
            "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}}})
    });
    let mut file = json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "post_processor": post_processor});
    if let (Some(file), Value::Object(parts)) = (file.as_object_mut(), parts) {
        file.extend(parts);
    }
    Ok(file)
}

/// BPE over GPT-2's alphabet of bytes.
fn byte_level(pre: &str) -> Result<Value, String> {
    let (nfc, patterns) =
        patterns(pre).ok_or_else(|| format!("tokenizer.ggml.pre is {pre}; qwen2, qwen35, gpt-4o, deepseek-v3 and joyai-llm are supported"))?;
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
    let split = |pattern: &&str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
    let steps: Vec<Value> = patterns.iter().map(split).chain([bytes.clone()]).collect();
    Ok(json!({
        "normalizer": nfc.then(|| json!({"type": "NFC"})), "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}, "decoder": bytes,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": false,
            "byte_fallback": false},
    }))
}

/// BPE over text whose spaces became `▁`; what the vocabulary lacks is written in bytes (`<0x0A>`).
fn sentence_piece(v: &GgufVocab<'_>) -> Result<Value, String> {
    let unknown = v.kinds.iter().position(|kind| *kind == UNKNOWN).and_then(|id| v.tokens.get(id));
    Ok(json!({
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}, "pre_tokenizer": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        ]},
        "model": {"type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": true, "byte_fallback": true},
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::Tokenizer;

    /// Every way of splitting is understood, loses nothing, and cuts where it should: at a change of case, in groups of three digits.
    #[test]
    fn ways_of_splitting() {
        // GPT-2's letters of all bytes, then pairs that only some ways of splitting allow.
        let letters = (0u32..324).filter_map(char::from_u32).filter(|c| matches!(*c as u32, 33..=126 | 161..=172 | 174..=323));
        let mut tokens: Vec<String> = letters.map(String::from).collect();
        assert_eq!(tokens.len(), 256);
        tokens.extend(["oW", "12", "34", "<s>"].map(str::to_owned));
        let merges = ["o W", "1 2", "3 4"].map(str::to_owned);
        let mut kinds = vec![1; 259];
        kinds.push(CONTROL);
        let pieces = |pre: &str, text: &str| {
            let vocab = GgufVocab { model: "gpt2", pre, tokens: &tokens, kinds: &kinds, merges: &merges, bos: Some(259) };
            let json = tokenizer_json(&vocab).unwrap().to_string();
            let tokenizer = Tokenizer::from_json(json.as_bytes(), Map::new(), std::path::Path::new("x")).unwrap();
            let ids = tokenizer.encode(text, false).unwrap();
            assert_eq!(tokenizer.decode(&ids), text.trim_end_matches("<s>"), "{pre}");
            assert_eq!(tokenizer.encode("a", true).unwrap()[0], 259);
            ids.into_iter().filter(|id| *id >= 256).map(|id| tokens[id as usize].clone()).collect::<Vec<_>>()
        };
        let text = "hello HelloWorld, 1234 東京 ですé\n\n  x's <s>";
        assert_eq!(pieces("qwen2", text), ["oW", "<s>"]);
        assert_eq!(pieces("qwen35", text), ["oW", "<s>"]);
        assert_eq!(pieces("gpt-4o", text), ["12", "<s>"]);
        assert_eq!(pieces("deepseek-v3", text), ["oW", "12", "<s>"]);
        let unknown = GgufVocab { model: "gpt2", pre: "chameleon", tokens: &tokens, kinds: &kinds, merges: &merges, bos: None };
        assert!(tokenizer_json(&unknown).unwrap_err().contains("chameleon"));
        assert!(tokenizer_json(&GgufVocab { model: "llama", ..unknown }).unwrap_err().contains("llama"));
    }
}
