//! `mach generate`: one prompt, one answer.

use std::io::{IsTerminal, Read};
use std::path::PathBuf;
use std::time::Instant;

use mach_engine::{CancelToken, Event, FinishReason, Receipt, Request};
use mach_session::{ChatInput, GenerateRequest, GenerationDefaults, Prompt, SamplingOverrides, Session, TextEvent};
use serde_json::{Map, Value, json};

use super::args::{EngineArgs, SamplingArgs, ThinkArgs, TraceArgs, on_interrupt, read_tokens};
use super::output::{self, ProgressLine};
use crate::{Error, Loaded, system};

#[derive(clap::Args)]
pub(super) struct Args {
    /// The prompt [default: read from stdin]
    prompt: Option<String>,
    /// Model directory, or org/name in the Hugging Face cache [default: the built-in demonstration model]
    #[arg(long, env = "MACH_MODEL")]
    model: Option<String>,
    /// System message
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["raw", "tokens"])]
    system: Option<String>,
    /// Continue the text as it is, without the chat template
    #[arg(long, conflicts_with_all = ["think", "no_think", "reasoning_effort"])]
    raw: bool,
    /// Continue a JSON array of token ids
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompt", "think", "no_think", "reasoning_effort"])]
    tokens: Option<PathBuf>,
    /// Most tokens to generate [default: to the end of the turn or of the context]
    #[arg(long, short = 'n', value_name = "N")]
    max_tokens: Option<usize>,
    /// Stop before this string (may be given several times)
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Go on after the end of the turn
    #[arg(long)]
    ignore_eos: bool,
    #[command(flatten)]
    think: ThinkArgs,
    /// Write the logits row of every generated token (safetensors: `logits` f32 [N, vocabulary], `tokens` i32 [N])
    #[arg(long, value_name = "FILE")]
    logits: Option<PathBuf>,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    trace: TraceArgs,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

pub(super) fn run(args: Args) -> Result<(), Error> {
    let tokens = args.tokens.as_deref().map(read_tokens).transpose()?;
    let text = match (&args.prompt, &tokens) {
        (_, Some(_)) => None,
        (Some(prompt), None) => Some(prompt.clone()),
        (None, None) => Some(read_stdin()?),
    };
    let trace = args.trace.start()?;
    let loaded = args.engine.load_traced(args.model.as_deref(), trace.as_ref())?;
    let (events, cancel) = match (tokens, &loaded.text) {
        (Some(tokens), None) => bare_events(&args, &loaded, tokens)?,
        (tokens, _) => text_events(&args, &loaded.session()?, tokens, text.unwrap_or_default())?,
    };
    on_interrupt(move || cancel.cancel())?;
    let mut out = Output { args: &args, text: String::new(), tokens: Vec::new(), logits: Vec::new() };
    let (mut progress, began) = (ProgressLine::new(), Instant::now());
    let mut ttft_ms = None;
    for event in events {
        match event {
            TextEvent::Prefill { done, total, cached } => progress.show(|| prefill_line(done, total, cached, began)),
            TextEvent::Delta { text, token, logits } => {
                if ttft_ms.is_none() {
                    ttft_ms = Some(began.elapsed().as_secs_f64() * 1e3);
                    progress.end(None);
                }
                out.take(&text, token, logits);
            }
            TextEvent::Finished { reason, receipt, .. } => {
                progress.end(None);
                let ttft_ms = ttft_ms.unwrap_or_else(|| began.elapsed().as_secs_f64() * 1e3);
                out.finish(reason, &receipt, &loaded, ttft_ms)?;
                return Ok(trace.map_or(Ok(()), |t| t.finish())?);
            }
            TextEvent::Failed { code, message } => {
                progress.end(None);
                return Err(mach_session::SessionError::Failed { code, message }.into());
            }
        }
    }
    Err(mach_engine::SubmitError::Closed.into())
}

type Events = (Box<dyn Iterator<Item = TextEvent>>, CancelToken);

fn text_events(args: &Args, session: &Session, tokens: Option<Vec<u32>>, text: String) -> Result<Events, Error> {
    let markup = tokens.is_none() && !args.raw;
    let prompt = match tokens {
        Some(tokens) => Prompt::from_tokens(tokens),
        None if args.raw => session.text().raw_prompt(&text)?,
        None => chat_prompt(session, &text, args.system.as_deref(), &args.think.variables(session.text())?)?,
    };
    let stream = session.generate(GenerateRequest {
        prompt,
        sampling: args.sampling.overrides(),
        ignore_generation_config: args.raw || args.tokens.is_some(),
        max_tokens: args.max_tokens,
        stop: args.stop.clone(),
        ignore_eos: args.ignore_eos,
        want_logits: args.logits.is_some(),
        markup,
    })?;
    let cancel = stream.cancel_token();
    Ok((Box::new(stream), cancel))
}

/// Ids in, ids out, for a checkpoint without a tokenizer.
fn bare_events(args: &Args, loaded: &Loaded, prompt: Vec<u32>) -> Result<Events, Error> {
    let bare = args.ignore_eos || loaded.path.dir.is_file();
    let stop_ids = if bare { Vec::new() } else { GenerationDefaults::read(&loaded.path.dir)?.eos };
    let (cancel, events) = loaded.engine.submit_channel(Request {
        prompt,
        sampling: args.sampling.overrides().resolve(&SamplingOverrides::default()),
        max_tokens: args.max_tokens,
        stop_ids,
        policy: None,
        snapshot_at: Vec::new(),
        want_logits: args.logits.is_some(),
    })?;
    let events = events.into_iter().map(|event| match event {
        Event::Prefill { done, total, cached } => TextEvent::Prefill { done, total, cached },
        Event::Token { id, logits } => TextEvent::Delta { text: String::new(), token: Some(id), logits },
        Event::Finished { reason, receipt } => TextEvent::Finished { reason, stop: None, receipt },
        Event::Failed { code, message } => TextEvent::Failed { code, message },
    });
    Ok((Box::new(events), cancel))
}

fn read_stdin() -> Result<String, Error> {
    if std::io::stdin().is_terminal() {
        return Err(Error::Usage("no prompt: give it as an argument, or through stdin".to_owned()));
    }
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text).map_err(Error::io("read the prompt from stdin"))?;
    let text = text.trim_end_matches(['\n', '\r']).to_owned();
    if text.is_empty() { Err(Error::Usage("the prompt on stdin is empty".to_owned())) } else { Ok(text) }
}

fn chat_prompt(session: &Session, text: &str, system: Option<&str>, kwargs: &Map<String, Value>) -> Result<Prompt, Error> {
    let mut messages = Vec::new();
    messages.extend(system.map(|s| json!({"role": "system", "content": s})));
    messages.push(json!({"role": "user", "content": text}));
    Ok(session.text().chat_prompt(ChatInput { messages: &messages.into(), tools: None, kwargs, add_generation_prompt: true })?)
}

/// `prompt: 512 of 2048 tokens, 85.1 tok/s, 18.0 s left`.
pub(super) fn prefill_line(done: usize, total: usize, cached: usize, began: Instant) -> String {
    let rate = (done - cached) as f64 / began.elapsed().as_secs_f64().max(1e-6);
    let left = if rate > 0.0 { format!(", {rate:.1} tok/s, {} left", output::seconds((total - done) as f64 / rate)) } else { String::new() };
    let reused = if cached > 0 { format!(" ({cached} reused)") } else { String::new() };
    format!("prompt: {done} of {total} tokens{reused}{left}")
}

struct Output<'a> {
    args: &'a Args,
    text: String,
    tokens: Vec<u32>,
    logits: Vec<f32>,
}

impl Output<'_> {
    fn take(&mut self, text: &str, token: Option<u32>, logits: Option<Vec<f32>>) {
        self.tokens.extend(token);
        self.logits.extend(logits.into_iter().flatten());
        if self.args.json {
            self.text.push_str(text);
        } else if !text.is_empty() {
            output::print(text);
        }
    }

    fn finish(self, reason: FinishReason, r: &Receipt, loaded: &Loaded, ttft_ms: f64) -> Result<(), Error> {
        let resident = loaded.plan.residency == mach_experts::Residency::Resident;
        if !self.args.json {
            output::line("");
        }
        if let Some(path) = &self.args.logits {
            write_logits(path, &self.tokens, &self.logits)?;
        }
        let rate = |n: usize, ms: f64| if n > 0 && ms > 0.0 { n as f64 / ms * 1e3 } else { 0.0 };
        let prefill = rate(r.prompt_tokens - r.cached_tokens, r.prefill_ms);
        let decode = rate(r.decode_steps, r.decode_ms);
        let hit_rate = (!resident && r.hits + r.misses > 0).then(|| r.hits as f64 / (r.hits + r.misses) as f64);
        let peak = system::peak_rss();
        if self.args.json {
            output::json_line(&json!({
                "text": self.text,
                "tokens": self.tokens,
                "finish_reason": finish_name(reason),
                "usage": {"prompt_tokens": r.prompt_tokens, "completion_tokens": r.completion_tokens, "cached_tokens": r.cached_tokens},
                "stats": {
                    "load_ms": loaded.load_ms, "ttft_ms": ttft_ms, "prefill_tok_s": prefill, "decode_tok_s": decode, "hit_rate": hit_rate,
                    "slots": loaded.engine.stats().slots, "experts": loaded.plan.experts, "hits": r.hits, "misses": r.misses, "bytes_read": r.bytes_read, "stall_ms": r.stall_ms, "peak_rss": peak,
                },
            }));
        }
        let hits = hit_rate.map_or("resident".to_owned(), |h| format!("hit rate {:.1} %", h * 100.0));
        let peak = peak.map_or(String::new(), |p| format!(", peak memory {}", output::size(p)));
        let cancelled = if reason == FinishReason::Cancelled { " (interrupted)" } else { "" };
        eprintln!(
            "{} prompt tokens at {prefill:.1} tok/s, {} generated at {decode:.1} tok/s, {hits}, {} read, {:.0} ms waited{peak}{cancelled}",
            r.prompt_tokens,
            r.completion_tokens,
            output::size(r.bytes_read),
            r.stall_ms,
        );
        Ok(())
    }
}

fn finish_name(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
        FinishReason::Cancelled => "cancelled",
    }
}

fn write_logits(path: &std::path::Path, tokens: &[u32], logits: &[f32]) -> Result<(), Error> {
    let rows = tokens.len();
    let vocab = logits.len().checked_div(rows).unwrap_or(0);
    let ids: Vec<u8> = tokens.iter().flat_map(|t| (*t as i32).to_le_bytes()).collect();
    super::eval::write_tensors(
        path,
        &[("logits", safetensors::Dtype::F32, vec![rows, vocab], super::eval::f32_bytes(logits)), ("tokens", safetensors::Dtype::I32, vec![rows], ids)],
    )
}
