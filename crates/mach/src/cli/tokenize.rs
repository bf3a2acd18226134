//! `mach tokenize`: what the model would see.

use std::path::PathBuf;

use mach_session::ChatInput;
use serde_json::{Map, Value, json};

use super::args::read_json;
use super::output;
use crate::text::text_of;
use crate::{Error, locate};

#[derive(clap::Args)]
pub(super) struct Args {
    /// Text; special tokens in it are parsed
    #[arg(required_unless_present = "messages", conflicts_with = "messages")]
    text: Option<String>,
    /// Model directory, or org/name in the Hugging Face cache [default: the built-in demonstration model]
    #[arg(long, env = "MACH_MODEL")]
    model: Option<String>,
    /// JSON array of chat messages, rendered by the model's template
    #[arg(long, value_name = "FILE")]
    messages: Option<PathBuf>,
    /// JSON array of tools
    #[arg(long, value_name = "FILE", requires = "messages")]
    tools: Option<PathBuf>,
    /// Further template variables, a JSON object
    #[arg(long, value_name = "JSON", requires = "messages")]
    template_kwargs: Option<String>,
    /// Leave out the header of the assistant's turn
    #[arg(long, requires = "messages")]
    no_generation_prompt: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

pub(super) fn run(args: &Args) -> Result<(), Error> {
    let text = text_of(&locate(args.model.as_deref())?.dir)?;
    let prompt = match &args.messages {
        None => text.raw_prompt(args.text.as_deref().unwrap_or_default())?,
        Some(path) => {
            let messages = read_json(path)?;
            let tools = args.tools.as_deref().map(read_json).transpose()?;
            let kwargs = match args.template_kwargs.as_deref().map(serde_json::from_str) {
                None => Map::new(),
                Some(Ok(Value::Object(kwargs))) => kwargs,
                Some(_) => return Err(Error::Usage("--template-kwargs is not a JSON object".to_owned())),
            };
            text.chat_prompt(ChatInput { messages: &messages, tools: tools.as_ref(), kwargs: &kwargs, add_generation_prompt: !args.no_generation_prompt })?
        }
    };
    if args.json {
        output::json_line(&json!({"prompt": prompt.text, "tokens": prompt.tokens}));
    } else {
        output::line(&prompt.text);
        output::line(&format!("{:?}", prompt.tokens));
        eprintln!("{} tokens", prompt.tokens.len());
    }
    Ok(())
}
