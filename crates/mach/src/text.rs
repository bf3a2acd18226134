//! The text side of a model: that of its directory, or what the metadata of its GGUF file says.

use std::path::Path;

use mach_format::gguf::{Gguf, MetaList, Metadata};
use mach_session::{GenerationDefaults, TextModel};
use mach_text::{ChatTemplate, GgufVocab, TextError, Tokenizer, tokenizer_json};
use serde_json::{Map, Value, json};

use crate::Error;

/// The text side of a model; `None` for one without a tokenizer.
///
/// # Errors
/// Files that are malformed, tokenizers of a kind that is not supported.
pub(crate) fn open_text(path: &Path) -> Result<Option<TextModel>, Error> {
    if path.is_file() {
        return of_metadata(path, Gguf::open(path).map_err(mach_models::ModelError::from)?.metadata());
    }
    Ok(path.join("tokenizer.json").exists().then(|| TextModel::open(path)).transpose()?)
}

/// The text side of a model that must have one.
///
/// # Errors
/// As [`open_text`], and a model without a tokenizer.
pub(crate) fn text_of(path: &Path) -> Result<TextModel, Error> {
    if !path.is_file() {
        return Ok(TextModel::open(path)?);
    }
    open_text(path)?.ok_or_else(|| Error::Input { code: "no-tokenizer", message: format!("{} has no tokenizer", path.display()) })
}

/// What the text files of a checkpoint would hold.
struct Parts {
    tokenizer: Value,
    /// `eos_token` and the like.
    named: Map<String, Value>,
    template: Option<String>,
    generation: Value,
}

fn of_metadata(path: &Path, m: &Metadata) -> Result<Option<TextModel>, Error> {
    let Some(parts) = parts(path, m)? else { return Ok(None) };
    let tokenizer = Tokenizer::from_json(parts.tokenizer.to_string().as_bytes(), parts.named.clone(), path)?;
    let template = match &parts.template {
        Some(source) => ChatTemplate::new(source, parts.named),
        None => {
            let arch = m.text("general.architecture").map_err(mach_models::ModelError::from)?;
            let model_type = if arch == Some("deepseek4") { "deepseek_v4" } else { "" };
            ChatTemplate::built_in(model_type).ok_or_else(|| TextError::NoTemplate(path.to_owned()))
        }
    };
    Ok(Some(TextModel::new(tokenizer, template, GenerationDefaults::from_json(&parts.generation, &Value::Null), path)))
}

/// Writes the text side of a GGUF file as the files of a checkpoint, for a pack built from it.
///
/// # Errors
/// As [`open_text`], a folder that cannot be written.
pub(crate) fn write_text_files(gguf: &Path, out: &Path) -> Result<(), Error> {
    let file = Gguf::open(gguf).map_err(mach_models::ModelError::from)?;
    let Some(parts) = parts(gguf, file.metadata())? else { return Ok(()) };
    let mut files = vec![
        ("tokenizer.json", parts.tokenizer.to_string()),
        ("tokenizer_config.json", Value::Object(parts.named).to_string()),
        ("generation_config.json", parts.generation.to_string()),
    ];
    files.extend(parts.template.map(|template| ("chat_template.jinja", template)));
    for (name, text) in files {
        let path = out.join(name);
        std::fs::write(&path, text).map_err(Error::io(format!("write {}", path.display())))?;
    }
    Ok(())
}

fn parts(path: &Path, m: &Metadata) -> Result<Option<Parts>, Error> {
    let format = |e| Error::from(mach_models::ModelError::from(e));
    let model = m.text("tokenizer.ggml.model").map_err(format)?.unwrap_or("none");
    let Some(tokens) = m.texts("tokenizer.ggml.tokens").map_err(format)?.filter(|_| !matches!(model, "none" | "no_vocab")) else { return Ok(None) };
    let kinds: &[i64] = match m.list("tokenizer.ggml.token_type").map_err(format)? {
        Some(MetaList::Int(kinds)) => kinds,
        _ => &[],
    };
    // Gemma's models are lost without it, and converters that do not say so mean it.
    let adds_bos = m.flag("tokenizer.ggml.add_bos_token").map_err(format)?.unwrap_or(model == "gemma4");
    let bos = m.size("tokenizer.ggml.bos_token_id").map_err(format)?.filter(|_| adds_bos).and_then(|id| usize::try_from(id).ok());
    let vocab = GgufVocab {
        model,
        pre: m.text("tokenizer.ggml.pre").map_err(format)?.unwrap_or("default"),
        tokens,
        kinds,
        merges: m.texts("tokenizer.ggml.merges").map_err(format)?.unwrap_or_default(),
        bos,
    };
    let tokenizer = tokenizer_json(&vocab).map_err(|reason| TextError::Invalid { path: path.to_owned(), reason })?;
    let mut named = Map::new();
    let mut eos = Vec::new();
    for (name, key) in [("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"), ("eot_token", "eot")] {
        let id = m.size(&format!("tokenizer.ggml.{key}_token_id")).map_err(format)?;
        if let Some((id, token)) = id.and_then(|id| Some((id, tokens.get(usize::try_from(id).ok()?)?))) {
            named.insert(name.to_owned(), json!(token));
            if matches!(key, "eos" | "eot") {
                eos.push(id);
            }
        }
    }
    // Turns of ChatML end with either; files name one of them.
    eos.extend(["<|im_end|>", "<|endoftext|>"].iter().filter_map(|end| tokens.iter().position(|t| t == end)).map(|id| id as u64));
    let sampling = |key: &str| m.number(&format!("general.sampling.{key}")).map_err(format);
    let mut generation = json!({ "eos_token_id": eos });
    for (field, key) in [("temperature", "temp"), ("top_p", "top_p"), ("min_p", "min_p")] {
        if let Some(x) = sampling(key)? {
            generation[field] = json!(x);
        }
    }
    if let Some(k) = sampling("top_k")? {
        generation["top_k"] = json!(k as i64);
    }
    let template = m.text("tokenizer.chat_template").map_err(format)?.map(str::to_owned);
    Ok(Some(Parts { tokenizer, named, template, generation }))
}
