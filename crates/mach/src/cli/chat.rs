//! `mach chat`: a conversation on the terminal.

use std::collections::VecDeque;
use std::io::{BufRead, IsTerminal};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use mach_engine::{CancelToken, FinishReason, Receipt};
use mach_session::{ChatInput, GenerateRequest, ReplyReader, ReplyUpdate, Session};
use mach_text::{ReplyEvent, ReplyMessage, ToolCall};
use serde_json::{Map, Value, json};

use super::args::{EngineArgs, SamplingArgs, ThinkArgs};
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
    /// JSON file with an array of tools to offer; what their calls give is typed in
    #[arg(long, value_name = "FILE")]
    tools: Option<std::path::PathBuf>,
    #[command(flatten)]
    think: ThinkArgs,
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
    tools: Option<Value>,
    /// Variables of the template.
    kwargs: Map<String, Value>,
    /// Calls whose results are still to be typed in: ids and functions.
    waiting: VecDeque<(String, String)>,
    last: Option<Receipt>,
    running: Arc<Mutex<Option<CancelToken>>>,
}

pub(super) fn run(mut args: Args) -> Result<(), Error> {
    let tools = args.tools.as_deref().map(read_tools).transpose()?;
    let loaded = args.engine.load(args.model.as_deref())?;
    let running: Arc<Mutex<Option<CancelToken>>> = Arc::default();
    let to_stop = running.clone();
    on_interrupt_while_running(to_stop)?;
    let session = loaded.session()?;
    let kwargs = args.think.variables(session.text())?;
    let system = args.system.take();
    let mut chat = Chat { session, system, messages: Vec::new(), tools, kwargs, waiting: VecDeque::new(), last: None, running, args };
    let interactive = std::io::stdin().is_terminal();
    if interactive {
        eprintln!("{}: type a message. {HELP}", loaded.path.name);
    }
    let mut lines = std::io::stdin().lock().lines();
    loop {
        if interactive {
            output::print(&chat.waiting.front().map_or("> ".to_owned(), |(_, name)| format!("result of {name}> ")));
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
        self.waiting.clear();
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

    /// Takes what the user says, or the result of a call that waits for it.
    fn turn(&mut self, text: &str) -> Result<(), Error> {
        if let Some((id, _)) = self.waiting.pop_front() {
            self.messages.push(json!({"role": "tool", "tool_call_id": id, "content": text}));
            if !self.waiting.is_empty() {
                return Ok(());
            }
        } else {
            self.messages.push(json!({"role": "user", "content": text}));
        }
        let reply = self.reply();
        match &reply {
            Ok(reply) => self.messages.push(assistant(reply)),
            Err(_) => {
                // Back to before the user's turn, with the calls and results since then.
                let user = self.messages.iter().rposition(|m| m["role"] == "user");
                self.messages.truncate(user.unwrap_or(0));
            }
        }
        self.waiting = reply.iter().flat_map(|reply| &reply.calls).enumerate().map(|(i, call)| (call_id(i), call.name.clone())).collect();
        reply.map(|_| ())
    }

    fn reply(&mut self) -> Result<ReplyMessage, Error> {
        let mut messages: Vec<Value> = self.system.iter().map(|s| json!({"role": "system", "content": s})).collect();
        messages.extend(self.messages.iter().cloned());
        let messages = Value::Array(messages);
        let input = ChatInput { messages: &messages, tools: self.tools.as_ref(), kwargs: &self.kwargs, add_generation_prompt: true };
        let prompt = self.session.text().chat_prompt(input)?;
        let mut reader = ReplyReader::new(self.session.text(), &prompt, self.tools.as_ref());
        let request =
            GenerateRequest { prompt, sampling: self.args.sampling.overrides(), max_tokens: self.args.max_tokens, markup: true, ..Default::default() };
        let stream = self.session.generate(request)?;
        let running = self.running.clone();
        let set_running = move |token: Option<CancelToken>| *running.lock().unwrap_or_else(PoisonError::into_inner) = token;
        set_running(Some(stream.cancel_token()));
        let dim = output::fancy() && std::io::stdout().is_terminal();
        let mut shown = Shown { dim, message: ReplyMessage::default(), thought: false };
        let (mut progress, began) = (ProgressLine::new(), Instant::now());
        let mut result = Err(mach_engine::SubmitError::Closed.into());
        for event in stream {
            match reader.read(event) {
                ReplyUpdate::Prefill { done, total, cached } => progress.show(|| prefill_line(done, total, cached, began)),
                ReplyUpdate::Parts(parts) => {
                    progress.end(None);
                    parts.into_iter().for_each(|part| shown.take(part));
                }
                ReplyUpdate::Finished { parts, reason, receipt, .. } => {
                    progress.end(None);
                    parts.into_iter().for_each(|part| shown.take(part));
                    output::line("");
                    if reason == FinishReason::Cancelled {
                        eprintln!("(stopped)");
                    }
                    self.last = Some(receipt);
                    result = Ok(());
                }
                ReplyUpdate::Failed { code, message } => result = Err(mach_session::SessionError::Failed { code, message }.into()),
            }
        }
        set_running(None);
        result.map(|()| shown.message)
    }
}

fn read_tools(path: &std::path::Path) -> Result<Value, Error> {
    let wrong = |why: String| Error::Input { code: "tools-invalid", message: format!("{}: {why}; it must hold a JSON array of tools", path.display()) };
    let text = std::fs::read_to_string(path).map_err(|e| wrong(e.to_string()))?;
    let tools: Value = serde_json::from_str(&text).map_err(|e| wrong(e.to_string()))?;
    if tools.is_array() { Ok(tools) } else { Err(wrong("this is no array".to_owned())) }
}

/// What a result names its call by; templates look only at the calls of the message before it.
fn call_id(index: usize) -> String {
    format!("call_{index}")
}

/// A reply as the template takes it back.
fn assistant(reply: &ReplyMessage) -> Value {
    let mut message = json!({"role": "assistant", "content": reply.content, "reasoning_content": reply.reasoning});
    if !reply.calls.is_empty() {
        let call = |(i, call): (usize, &ToolCall)| {
            let arguments: Value = serde_json::from_str(&call.arguments).unwrap_or_default();
            json!({"id": call_id(i), "type": "function", "function": {"name": call.name, "arguments": arguments}})
        };
        message["tool_calls"] = reply.calls.iter().enumerate().map(call).collect();
    }
    message
}

/// Prints a reply while it comes: reasoning dimmed and apart from what is said, calls as `name {arguments}` on lines of their own.
struct Shown {
    dim: bool,
    message: ReplyMessage,
    /// The last thing printed was reasoning.
    thought: bool,
}

impl Shown {
    fn take(&mut self, part: ReplyEvent) {
        if self.thought && !matches!(part, ReplyEvent::Reasoning(_)) {
            output::print("\n\n");
            self.thought = false;
        }
        match &part {
            ReplyEvent::Reasoning(text) => {
                self.thought = true;
                output::print(&if self.dim { format!("\x1b[2m{text}\x1b[0m") } else { text.clone() });
            }
            ReplyEvent::Content(text) | ReplyEvent::CallArguments { json: text, .. } => output::print(text),
            ReplyEvent::CallStart { index, name } => {
                let apart = *index > 0 || !self.message.content.is_empty();
                output::print(&format!("{}call {name} ", if apart { "\n" } else { "" }));
            }
            ReplyEvent::CallEnd { .. } => {}
            ReplyEvent::CallDropped { .. } => output::print(" (not a complete call; as it was written:)\n"),
        }
        self.message.push(part);
    }
}
