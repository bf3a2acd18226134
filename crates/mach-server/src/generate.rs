//! What chat and completions share: sampling parameters, running choices one after another, usage and timings.

use std::sync::{Arc, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};

use mach_engine::{CancelGuard, CancelToken, FinishReason, Receipt};
use mach_session::{GenerateRequest, Prompt, ReplyReader, ReplyUpdate, SamplingOverrides, Session, choice_seed, random_seed};
use mach_text::ReplyMessage;
use serde_json::{Value, json};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use crate::error::ApiError;
use crate::fields::Fields;

/// Most choices of one request, over all its prompts.
const MAX_CHOICES: usize = 128;

/// Which endpoint's shapes to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Chat,
    Completion,
}

impl Kind {
    /// The parameter that holds the prompt.
    pub(crate) fn prompt_param(self) -> &'static str {
        match self {
            Self::Chat => "messages",
            Self::Completion => "prompt",
        }
    }
}

/// Parameters that both endpoints take.
pub(crate) struct Common {
    pub(crate) model: String,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    n: usize,
    seed: u64,
    request: GenerateRequest,
}

impl Common {
    /// Reads and checks them.
    pub(crate) fn read(fields: &Fields, served: &str, vocab: usize) -> Result<Self, ApiError> {
        let seed = fields.integer("seed", i64::MIN..=i64::MAX)?;
        // Negative ids of JavaScript clients are keys too; random ones stay within what a JSON number keeps exactly.
        let seed = seed.map_or_else(|| random_seed() >> 11, |s| s as u64);
        let positive = |name| fields.integer(name, 1..=i64::MAX).map(|n| n.map(|n| n as usize));
        let max_tokens = positive("max_completion_tokens")?.or(positive("max_tokens")?);
        let include_usage = match fields.object("stream_options")?.and_then(|o| o.get("include_usage")) {
            None | Some(Value::Null) => false,
            Some(Value::Bool(b)) => *b,
            Some(_) => return Err(ApiError::invalid("stream_options.include_usage", "`stream_options.include_usage` must be a boolean")),
        };
        let sampling = SamplingOverrides {
            temperature: fields.number("temperature", 0.0..=2.0)?,
            top_k: fields.integer("top_k", -1..=i64::MAX)?.map(|k| usize::try_from(k).unwrap_or(0)),
            top_p: fields.number("top_p", 0.0..=1.0)?,
            min_p: fields.number("min_p", 0.0..=1.0)?,
            repetition_penalty: fields.number("repetition_penalty", 0.01..=10.0)?,
            frequency_penalty: fields.number("frequency_penalty", -2.0..=2.0)?,
            presence_penalty: fields.number("presence_penalty", -2.0..=2.0)?,
            logit_bias: logit_bias(fields, vocab)?,
            seed: Some(seed),
        };
        Ok(Self {
            model: fields.string("model")?.unwrap_or_else(|| served.to_owned()),
            stream: fields.boolean("stream")?.unwrap_or(false),
            include_usage,
            n: fields.integer("n", 1..=MAX_CHOICES as i64)?.unwrap_or(1) as usize,
            seed,
            request: GenerateRequest {
                sampling,
                max_tokens,
                stop: stops(fields)?,
                ignore_eos: fields.boolean("ignore_eos")?.unwrap_or(false),
                ..GenerateRequest::default()
            },
        })
    }

    /// Sets the length of requests that say none.
    pub(crate) fn default_max_tokens(&mut self, n: usize) {
        self.request.max_tokens.get_or_insert(n);
    }
}

fn stops(fields: &Fields) -> Result<Vec<String>, ApiError> {
    let wrong = || ApiError::invalid("stop", "`stop` must be a string or an array of strings");
    match fields.get("stop") {
        None => Ok(Vec::new()),
        Some(Value::String(stop)) => Ok(vec![stop.clone()]),
        Some(Value::Array(stops)) => stops.iter().map(|s| s.as_str().map(str::to_owned).ok_or_else(wrong)).collect(),
        Some(_) => Err(wrong()),
    }
}

fn logit_bias(fields: &Fields, vocab: usize) -> Result<Vec<(u32, f32)>, ApiError> {
    let Some(map) = fields.object("logit_bias")? else { return Ok(Vec::new()) };
    let entry = |(key, value): (&String, &Value)| {
        let id = key.parse::<u32>().ok().filter(|&id| (id as usize) < vocab);
        let bias = value.as_f64().filter(|b| (-100.0..=100.0).contains(b));
        id.zip(bias.map(|b| b as f32)).ok_or_else(|| {
            let message = format!("`logit_bias` maps token ids below {vocab} to numbers between -100 and 100; {key:?}: {value} is neither");
            ApiError::invalid("logit_bias", message)
        })
    };
    map.iter().map(entry).collect()
}

/// One HTTP request: its prompts, each continued `n` times, one generation after another.
pub(crate) struct Job {
    pub(crate) kind: Kind,
    pub(crate) id: String,
    pub(crate) created: u64,
    pub(crate) common: Common,
    prompts: Vec<Prompt>,
    offered: Offered,
    session: Session,
}

/// The tools that a conversation offered.
#[derive(Debug, Default)]
pub(crate) struct Offered {
    pub(crate) tools: Option<Value>,
    /// The reply ends behind its first call.
    pub(crate) one_call: bool,
}

/// A choice that is being generated. Dropping it cancels the computation.
pub(crate) struct Running {
    pub(crate) events: UnboundedReceiver<ReplyUpdate>,
    _guard: CancelGuard,
}

/// A finished choice.
pub(crate) struct Choice {
    pub(crate) message: ReplyMessage,
    pub(crate) finish_reason: &'static str,
}

impl Job {
    /// Checks what can be checked before anything is computed.
    pub(crate) fn new(kind: Kind, common: Common, prompts: Vec<Prompt>, session: Session) -> Result<Self, ApiError> {
        let context = session.engine().info().context;
        if let Some(long) = prompts.iter().find(|p| p.tokens.len() >= context) {
            return Err(ApiError::context_overflow(long.tokens.len(), context, kind.prompt_param()));
        }
        if prompts.len() * common.n > MAX_CHOICES {
            let message = format!("{} prompts times n = {} are more than {MAX_CHOICES} choices", prompts.len(), common.n);
            return Err(ApiError::invalid("n", message));
        }
        let prefix = match kind {
            Kind::Chat => "chatcmpl",
            Kind::Completion => "cmpl",
        };
        Ok(Self { kind, id: format!("{prefix}-{}", random_id()), created: unix_time(), common, prompts, offered: Offered::default(), session })
    }

    /// Looks for calls of these tools in the replies.
    pub(crate) fn offering(mut self, offered: Offered) -> Self {
        self.offered = offered;
        self
    }

    pub(crate) fn choices(&self) -> usize {
        self.prompts.len() * self.common.n
    }

    /// Queues choice `index`.
    pub(crate) fn start(&self, index: usize) -> Result<Running, ApiError> {
        let mut request = self.common.request.clone();
        request.prompt = self.prompts[index / self.common.n].clone();
        request.sampling.seed = Some(choice_seed(self.common.seed, index % self.common.n));
        request.markup = self.kind == Kind::Chat;
        let mut reader = match self.kind {
            Kind::Chat => ReplyReader::new(self.session.text(), &request.prompt, self.offered.tools.as_ref()).one_call(self.offered.one_call),
            Kind::Completion => ReplyReader::plain(),
        };
        let (tx, events) = unbounded_channel();
        let own_cancel: Arc<OnceLock<CancelToken>> = Arc::default();
        let to_end = own_cancel.clone();
        let sink = move |event| {
            // A receiver that is gone has cancelled the request already.
            drop(tx.send(reader.read(event)));
            if reader.is_done()
                && let Some(cancel) = to_end.get()
            {
                cancel.cancel();
            }
        };
        let cancel = self.session.generate_with(request, sink);
        let cancel = cancel.map_err(|e| ApiError::from_session(e, self.kind.prompt_param()))?;
        // Set once, here; a call takes several tokens, so the sink finds it.
        let _ = own_cancel.set(cancel.clone());
        Ok(Running { events, _guard: CancelGuard(cancel) })
    }

    /// Runs all choices to their ends.
    pub(crate) async fn run(&self) -> Result<(Vec<Choice>, Totals), ApiError> {
        let mut choices = Vec::with_capacity(self.choices());
        let mut totals = Totals::default();
        for index in 0..self.choices() {
            let mut running = self.start(index)?;
            let mut message = ReplyMessage::default();
            let choice = loop {
                match running.events.recv().await {
                    Some(ReplyUpdate::Prefill { .. }) => {}
                    Some(ReplyUpdate::Parts(parts)) => parts.into_iter().for_each(|part| message.push(part)),
                    Some(ReplyUpdate::Finished { parts, reason, calls, reasoning_tokens, receipt }) => {
                        parts.into_iter().for_each(|part| message.push(part));
                        totals.add(&receipt, reasoning_tokens, self.is_first(index));
                        break Choice { message, finish_reason: finish_reason(reason, calls) };
                    }
                    Some(ReplyUpdate::Failed { code, message }) => return Err(ApiError::failed(code, message)),
                    None => return Err(ApiError::closed()),
                }
            };
            choices.push(choice);
        }
        Ok((choices, totals))
    }

    /// Whether choice `index` is the first of its prompt, the one whose prompt tokens count.
    pub(crate) fn is_first(&self, index: usize) -> bool {
        index.is_multiple_of(self.common.n)
    }

    /// The seed of choice 0: sent again it gives the same text.
    pub(crate) fn seed(&self) -> i64 {
        self.common.seed as i64
    }
}

pub(crate) fn finish_reason(reason: FinishReason, calls: usize) -> &'static str {
    match reason {
        FinishReason::Length => "length",
        _ if calls > 0 => "tool_calls",
        FinishReason::Stop | FinishReason::Cancelled => "stop",
    }
}

/// Receipts of all choices of a request.
#[derive(Debug, Default)]
pub(crate) struct Totals {
    /// As billed: every prompt once.
    prompt_tokens: usize,
    cached_tokens: usize,
    reasoning_tokens: usize,
    sum: Receipt,
}

impl Totals {
    pub(crate) fn add(&mut self, receipt: &Receipt, reasoning_tokens: usize, first_of_prompt: bool) {
        self.reasoning_tokens += reasoning_tokens;
        if first_of_prompt {
            self.prompt_tokens += receipt.prompt_tokens;
            self.cached_tokens += receipt.cached_tokens;
        }
        let sum = &mut self.sum;
        sum.prompt_tokens += receipt.prompt_tokens;
        sum.cached_tokens += receipt.cached_tokens;
        sum.completion_tokens += receipt.completion_tokens;
        sum.queue_ms += receipt.queue_ms;
        sum.prefill_ms += receipt.prefill_ms;
        sum.decode_ms += receipt.decode_ms;
        sum.decode_steps += receipt.decode_steps;
        sum.bytes_read += receipt.bytes_read;
        sum.hits += receipt.hits;
        sum.misses += receipt.misses;
        sum.stall_ms += receipt.stall_ms;
    }

    pub(crate) fn usage(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.sum.completion_tokens,
            "total_tokens": self.prompt_tokens + self.sum.completion_tokens,
            "prompt_tokens_details": { "cached_tokens": self.cached_tokens },
            "completion_tokens_details": { "reasoning_tokens": self.reasoning_tokens },
        })
    }

    /// llama-server's object, with what streaming experts cost.
    pub(crate) fn timings(&self) -> Value {
        let sum = &self.sum;
        let prompt_n = sum.prompt_tokens.saturating_sub(sum.cached_tokens);
        let accesses = sum.hits + sum.misses;
        json!({
            "cache_n": sum.cached_tokens,
            "prompt_n": prompt_n,
            "prompt_ms": sum.prefill_ms,
            "prompt_per_token_ms": ratio(sum.prefill_ms, prompt_n as f64),
            "prompt_per_second": ratio(prompt_n as f64 * 1e3, sum.prefill_ms),
            "predicted_n": sum.completion_tokens,
            "predicted_ms": sum.decode_ms,
            "predicted_per_token_ms": ratio(sum.decode_ms, sum.completion_tokens as f64),
            "predicted_per_second": ratio(sum.completion_tokens as f64 * 1e3, sum.decode_ms),
            "queue_ms": sum.queue_ms,
            "stall_ms": sum.stall_ms,
            "bytes_read": sum.bytes_read,
            "hit_rate": (accesses > 0).then(|| ratio(sum.hits as f64, accesses as f64)),
        })
    }
}

/// `a / b`, 0 where nothing was done.
pub(crate) fn ratio(a: f64, b: f64) -> f64 {
    if b > 0.0 { a / b } else { 0.0 }
}

pub(crate) fn unix_time() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// 128 random bits in hexadecimal.
pub(crate) fn random_id() -> String {
    format!("{:016x}{:016x}", random_seed(), random_seed())
}
