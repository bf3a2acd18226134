//! `mach chat`: a conversation on the terminal.

use std::io::{BufRead, IsTerminal};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use mach_engine::{CancelToken, FinishReason, Receipt};
use mach_session::{ChatInput, GenerateRequest, Session, TextEvent, ThinkSplitter, prompt_opens_thinking};
use serde_json::{Map, Value, json};

use super::args::{EngineArgs, SamplingArgs};
use super::generate::prefill_line;
use super::output::{self, ProgressLine};
use crate::Error;

#[derive(clap::Args)]
pub(super) struct Args {
    /// Model directory, or org/name in the Hugging Face cache [default: the built-in demonstration model]
    #[arg(long, env = "MACH_MODEL")]
    model: Option<String>,
    /// System message
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Ask the template not to let the model think
    #[arg(long)]
    no_think: bool,
    /// Most tokens of a reply
    #[arg(long, short = 'n', value_name = "N")]
    max_tokens: Option<usize>,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    engine: EngineArgs,
}

const HELP: &str =
    "/reset forgets the conversation, /system TEXT sets the system message (and resets), /stats shows numbers, /quit leaves; Ctrl-C stops a reply";

struct Chat {
    session: Session,
    args: Args,
    system: Option<String>,
    messages: Vec<Value>,
    last: Option<Receipt>,
    running: Arc<Mutex<Option<CancelToken>>>,
}

pub(super) fn run(mut args: Args) -> Result<(), Error> {
    let loaded = args.engine.load(args.model.as_deref())?;
    let running: Arc<Mutex<Option<CancelToken>>> = Arc::default();
    let to_stop = running.clone();
    on_interrupt_while_running(to_stop)?;
    let system = args.system.take();
    let mut chat = Chat { session: loaded.session()?, system, messages: Vec::new(), last: None, running, args };
    let interactive = std::io::stdin().is_terminal();
    if interactive {
        eprintln!("{}: type a message. {HELP}", loaded.path.name);
    }
    let mut lines = std::io::stdin().lock().lines();
    loop {
        if interactive {
            output::print("> ");
        }
        let Some(line) = lines.next() else { break };
        let line = line.map_err(Error::io("read from stdin"))?;
        let (word, rest) = line.trim().split_once(' ').unwrap_or((line.trim(), ""));
        match word {
            "" => {}
            "/quit" | "/exit" => break,
            "/help" => eprintln!("{HELP}"),
            "/reset" => chat.reset(),
            "/system" => {
                chat.system = Some(rest.trim().to_owned()).filter(|s| !s.is_empty());
                chat.reset();
            }
            "/stats" => chat.stats(),
            _ if word.starts_with('/') && !word[1..].contains('/') => eprintln!("{word} is not a command. {HELP}"),
            _ => match chat.turn(line.trim()) {
                // The conversation goes on after a failed turn; the turn itself is forgotten.
                Err(e) if interactive => eprintln!("error[{}]: {e}", e.code()),
                other => other?,
            },
        }
    }
    if interactive {
        output::line("");
    }
    Ok(())
}

/// Ctrl-C stops the reply that is being written; without one it ends the program.
fn on_interrupt_while_running(running: Arc<Mutex<Option<CancelToken>>>) -> Result<(), Error> {
    let handler = move || match &*running.lock().unwrap_or_else(PoisonError::into_inner) {
        Some(cancel) => cancel.cancel(),
        None => std::process::exit(130),
    };
    ctrlc::set_handler(handler).map_err(|e| Error::Input { code: "signals", message: format!("cannot catch Ctrl-C: {e}") })
}

impl Chat {
    fn reset(&mut self) {
        self.messages.clear();
        eprintln!("the conversation starts anew");
    }

    fn stats(&self) {
        let s = self.session.engine().stats();
        eprintln!(
            "{} requests, {} prompt tokens ({} reused), {} generated; bank {} of {} experts, {} hits, {} misses, {} read, {} of keys and values",
            s.finished,
            s.prompt_tokens,
            s.cached_tokens,
            s.generated_tokens,
            s.slots,
            s.experts,
            s.hits,
            s.misses,
            output::size(s.bytes_read),
            output::size(s.kv_bytes)
        );
        if let Some(r) = &self.last {
            eprintln!(
                "last reply: {} prompt tokens, {} reused, {} generated, {:.0} ms waited for the drive",
                r.prompt_tokens, r.cached_tokens, r.completion_tokens, r.stall_ms
            );
        }
    }

    fn turn(&mut self, text: &str) -> Result<(), Error> {
        self.messages.push(json!({"role": "user", "content": text}));
        let reply = self.reply();
        match &reply {
            Ok(reply) => self.messages.push(json!({"role": "assistant", "content": reply.content, "reasoning_content": reply.thinking})),
            Err(_) => drop(self.messages.pop()),
        }
        reply.map(|_| ())
    }

    fn reply(&mut self) -> Result<Reply, Error> {
        let mut messages: Vec<Value> = self.system.iter().map(|s| json!({"role": "system", "content": s})).collect();
        messages.extend(self.messages.iter().cloned());
        let mut kwargs = Map::new();
        if self.args.no_think {
            kwargs.insert("enable_thinking".into(), json!(false));
        }
        let messages = Value::Array(messages);
        let prompt = self.session.text().chat_prompt(ChatInput { messages: &messages, tools: None, kwargs: &kwargs, add_generation_prompt: true })?;
        let mut split = ThinkSplitter::new(prompt_opens_thinking(&prompt.text));
        let request = GenerateRequest { prompt, sampling: self.args.sampling.overrides(), max_tokens: self.args.max_tokens, ..Default::default() };
        let stream = self.session.generate(request)?;
        let running = self.running.clone();
        let set_running = move |token: Option<CancelToken>| *running.lock().unwrap_or_else(PoisonError::into_inner) = token;
        set_running(Some(stream.cancel_token()));
        let dim = output::fancy() && std::io::stdout().is_terminal();
        let (mut reply, mut progress, began) = (Reply::default(), ProgressLine::new(), Instant::now());
        let mut result = Err(mach_engine::SubmitError::Closed.into());
        for event in stream {
            match event {
                TextEvent::Prefill { done, total, cached } => progress.show(|| prefill_line(done, total, cached, began)),
                TextEvent::Delta { text, .. } => {
                    progress.end(None);
                    split.push(&text).into_iter().for_each(|p| reply.take(&p, dim));
                }
                TextEvent::Finished { reason, receipt, .. } => {
                    progress.end(None);
                    split.finish().into_iter().for_each(|p| reply.take(&p, dim));
                    output::line("");
                    if reason == FinishReason::Cancelled {
                        eprintln!("(stopped)");
                    }
                    self.last = Some(receipt);
                    result = Ok(());
                }
                TextEvent::Failed { code, message } => result = Err(mach_session::SessionError::Failed { code, message }.into()),
            }
        }
        set_running(None);
        result.map(|()| reply)
    }
}

#[derive(Default)]
struct Reply {
    content: String,
    thinking: String,
}

impl Reply {
    fn take(&mut self, part: &mach_session::Part, dim: bool) {
        let into = if part.thinking { &mut self.thinking } else { &mut self.content };
        into.push_str(&part.text);
        match (part.thinking, dim) {
            (true, true) => output::print(&format!("\x1b[2m{}\x1b[0m", part.text)),
            _ => output::print(&part.text),
        }
    }
}
