//! The text side of a checkpoint: tokenizer, template, generation defaults. Opened without weights.

use std::path::Path;
use std::sync::Arc;

use mach_text::{ChatTemplate, ReplyFormat, TextError, Tokenizer};
use serde_json::{Map, Value};

use crate::history::one_call_each;
use crate::sampling::GenerationDefaults;

/// Tokenizer, template and defaults of a checkpoint directory.
pub struct TextModel {
    tokenizer: Arc<Tokenizer>,
    /// Base models have none; a template that does not compile is reported when it is asked for.
    template: Result<ChatTemplate, TextError>,
    defaults: GenerationDefaults,
    /// Special tokens that mark up replies.
    markup: Arc<[u32]>,
    dir: std::path::PathBuf,
}

/// A conversation to render.
#[derive(Clone, Copy, Debug)]
pub struct ChatInput<'a> {
    /// Array of messages.
    pub messages: &'a Value,
    /// Array of tools.
    pub tools: Option<&'a Value>,
    /// Further template variables.
    pub kwargs: &'a Map<String, Value>,
    /// End with the header of the assistant's turn.
    pub add_generation_prompt: bool,
}

/// What the engine is asked to continue.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prompt {
    /// The text; empty when only ids were given.
    pub text: String,
    /// Its ids.
    pub tokens: Vec<u32>,
    /// Positions worth a state snapshot, ascending: where the last user turn starts and where it ends. What templates re-render
    /// differently in a later request (reasoning that is dropped) comes after them.
    pub snapshot_at: Vec<usize>,
}

impl Prompt {
    /// Ids without text.
    pub fn from_tokens(tokens: Vec<u32>) -> Self {
        Self { tokens, ..Self::default() }
    }
}

impl TextModel {
    /// Opens the text side of a checkpoint directory.
    ///
    /// # Errors
    /// [`TextError`] of the tokenizer or of a configuration file. A missing template is an error only when it is used.
    pub fn open(dir: &Path) -> Result<Self, TextError> {
        let tokenizer = Tokenizer::open(dir)?;
        let template = ChatTemplate::open(dir, &tokenizer);
        Ok(Self::new(tokenizer, template, GenerationDefaults::read(dir)?, dir))
    }

    /// The text side of a model whose parts come from elsewhere, for example a GGUF file. `path` is what errors call it.
    pub fn new(tokenizer: Tokenizer, template: Result<ChatTemplate, TextError>, mut defaults: GenerationDefaults, path: &Path) -> Self {
        if defaults.eos.is_empty() {
            defaults.eos.extend(tokenizer.eos_id());
        }
        let format = template.as_ref().map_or_else(|_| ReplyFormat::default(), ChatTemplate::reply_format);
        // What ends a turn of this format, whether or not the checkpoint's files say so.
        for id in format.end_tokens().iter().filter_map(|token| tokenizer.token_id(token)) {
            if !defaults.eos.contains(&id) {
                defaults.eos.push(id);
            }
        }
        let markup = format.markup().into_iter().filter_map(|token| tokenizer.token_id(token)).collect();
        Self { tokenizer: Arc::new(tokenizer), template, defaults, markup, dir: path.into() }
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.tokenizer
    }

    /// End tokens and sampling of the checkpoint.
    pub fn defaults(&self) -> &GenerationDefaults {
        &self.defaults
    }

    /// Whether conversations can be rendered.
    pub fn has_template(&self) -> bool {
        self.template.is_ok()
    }

    /// How replies to conversations are marked up; without a template they are not.
    pub fn reply_format(&self) -> ReplyFormat {
        self.template.as_ref().map_or_else(|_| ReplyFormat::default(), ChatTemplate::reply_format)
    }

    /// Special tokens that replies are marked up with.
    pub(crate) fn markup(&self) -> &Arc<[u32]> {
        &self.markup
    }

    /// Renders a conversation to text only.
    ///
    /// # Errors
    /// [`TextError::NoTemplate`] and those of [`ChatTemplate::render`].
    pub fn render(&self, input: ChatInput<'_>) -> Result<String, TextError> {
        let template = self.template()?;
        let fitted = match (template.reply_format(), input.messages) {
            (ReplyFormat::Harmony, Value::Array(messages)) => Some(Value::Array(one_call_each(messages))),
            _ => None,
        };
        template.render(fitted.as_ref().unwrap_or(input.messages), input.tools, input.kwargs, input.add_generation_prompt)
    }

    /// The conversations' template.
    ///
    /// # Errors
    /// [`TextError::NoTemplate`], or why it cannot be used.
    pub fn template(&self) -> Result<&ChatTemplate, TextError> {
        self.template.as_ref().map_err(|e| match e {
            TextError::TemplateSyntax(message) => TextError::TemplateSyntax(message.clone()),
            TextError::NoTemplate(dir) => TextError::NoTemplate(dir.clone()),
            e => TextError::Invalid { path: self.dir.join("chat_template.jinja"), reason: e.to_string() },
        })
    }

    /// Renders and tokenises a conversation.
    ///
    /// # Errors
    /// As [`TextModel::render`], and [`TextError::Encode`].
    pub fn chat_prompt(&self, input: ChatInput<'_>) -> Result<Prompt, TextError> {
        let text = self.render(input)?;
        // The template wrote every special token itself.
        let tokens = self.tokenizer.encode(&text, false)?;
        let snapshot_at = self.snapshot_positions(input, &text, &tokens);
        Ok(Prompt { text, tokens, snapshot_at })
    }

    /// Tokenises plain text: no template, the tokenizer's own BOS where it has one.
    ///
    /// # Errors
    /// [`TextError::Encode`].
    pub fn raw_prompt(&self, text: &str) -> Result<Prompt, TextError> {
        let tokens = self.tokenizer.encode(text, true)?;
        Ok(Prompt { text: text.to_owned(), tokens, snapshot_at: Vec::new() })
    }

    /// Where the last user turn starts and ends, in tokens. Both are found by rendering a conversation that differs from there on and
    /// seeing how far the text agrees, so no template needs to be understood; a template that refuses a variant costs only its position.
    fn snapshot_positions(&self, input: ChatInput<'_>, text: &str, tokens: &[u32]) -> Vec<usize> {
        let Some(messages) = input.messages.as_array() else { return Vec::new() };
        let Some(last_user) = messages.iter().rposition(|m| m["role"] == "user") else {
            return Vec::new();
        };
        let agreed = |messages: Vec<Value>, add_generation_prompt: bool| {
            let messages = Value::Array(messages);
            let variant = self.render(ChatInput { messages: &messages, add_generation_prompt, ..input });
            variant.map_or(0, |variant| common_prefix(&variant, text))
        };
        let mut other = messages.clone();
        // Differs in the first letter, whatever the first letter is.
        let first = messages[last_user]["content"].as_str().and_then(|s| s.trim_start().chars().next());
        other[last_user]["content"] = Value::from(if first == Some('x') { "y" } else { "x" });
        let start = agreed(other, input.add_generation_prompt);
        let end = agreed(messages[..=last_user].to_vec(), false);

        let mut positions: Vec<usize> = [start, end].into_iter().map(|byte| self.tokenizer.position_of(tokens, text, byte)).collect();
        positions.retain(|&p| p > 0 && p < tokens.len());
        positions.sort_unstable();
        positions.dedup();
        positions
    }
}

/// Bytes that two texts have in common from the start, to a character's border.
fn common_prefix(a: &str, b: &str) -> usize {
    let n = a.bytes().zip(b.bytes()).take_while(|(x, y)| x == y).count();
    (0..=n).rev().find(|&i| a.is_char_boundary(i)).unwrap_or(0)
}
