//! Text generation: a prompt goes to the engine, text events come back.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use mach_engine::{CancelGuard, CancelToken, EngineHandle, Event, FinishReason, Receipt, Request, RowPolicy};

use crate::error::SessionError;
use crate::model::{Prompt, TextModel};
use crate::policy::{TextPolicy, TextScan};
use crate::sampling::SamplingOverrides;

/// One generation in terms of text.
#[derive(Clone, Debug, Default)]
pub struct GenerateRequest {
    /// What to continue.
    pub prompt: Prompt,
    /// Sampling as far as the caller says it.
    pub sampling: SamplingOverrides,
    /// Do not take the checkpoint's sampling for what the caller leaves open.
    pub ignore_generation_config: bool,
    /// Most tokens; `None` runs to the end of the turn or of the context.
    pub max_tokens: Option<usize>,
    /// Strings that end the text and are not part of it.
    pub stop: Vec<String>,
    /// Go on after the end of the turn.
    pub ignore_eos: bool,
    /// Send the logits row of every token.
    pub want_logits: bool,
    /// The text goes to a [`crate::ReplyReader`]: special tokens that mark up replies are part of it.
    pub markup: bool,
}

/// What happens to a request, in order: `Prefill*`, `Delta*`, then one of `Finished`, `Failed`.
#[derive(Clone, Debug)]
pub enum TextEvent {
    /// Prompt tokens done, of all.
    Prefill {
        /// Done so far, cached ones included.
        done: usize,
        /// Of the whole prompt.
        total: usize,
        /// Reused from an earlier request.
        cached: usize,
    },
    /// A token, with the text that it made certain (which may be empty), or a rest of text without a token before the end.
    Delta {
        /// New text.
        text: String,
        /// The token.
        token: Option<u32>,
        /// Its logits row, when asked for.
        logits: Option<Vec<f32>>,
    },
    /// The end.
    Finished {
        /// Why.
        reason: FinishReason,
        /// The stop string that was completed.
        stop: Option<String>,
        /// What it took.
        receipt: Receipt,
    },
    /// The request failed.
    Failed {
        /// Stable kebab-case code.
        code: &'static str,
        /// What happened, where, what to do.
        message: String,
    },
}

/// A whole generation.
#[derive(Clone, Debug)]
pub struct Reply {
    /// The text, without special tokens and stop strings.
    pub text: String,
    /// All generated ids, the end token not among them.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub reason: FinishReason,
    /// The stop string that was completed.
    pub stop: Option<String>,
    /// What it took.
    pub receipt: Receipt,
}

/// An engine with the text side of its checkpoint. Cheap to clone.
#[derive(Clone)]
pub struct Session {
    engine: EngineHandle,
    text: Arc<TextModel>,
}

impl Session {
    /// Joins both sides.
    pub fn new(engine: EngineHandle, text: Arc<TextModel>) -> Self {
        Self { engine, text }
    }

    /// The engine: facts and counters.
    pub fn engine(&self) -> &EngineHandle {
        &self.engine
    }

    /// Tokenizer, template, defaults.
    pub fn text(&self) -> &Arc<TextModel> {
        &self.text
    }

    /// Starts a generation; `sink` gets its events on the engine thread and must not block. If the engine ends before the request,
    /// `sink` is dropped without a last event.
    ///
    /// # Errors
    /// [`SessionError::Submit`]; `sink` is then never called.
    pub fn generate_with(&self, request: GenerateRequest, mut sink: impl FnMut(TextEvent) + Send + 'static) -> Result<CancelToken, SessionError> {
        let defaults = self.text.defaults();
        let sampling = if request.ignore_generation_config {
            request.sampling.resolve(&SamplingOverrides::default())
        } else {
            request.sampling.resolve(&defaults.sampling)
        };
        let visible = if request.markup { self.text.markup().clone() } else { Arc::default() };
        let scan = TextScan::new(self.text.tokenizer().clone(), visible, &request.stop);
        let vocab = self.text.tokenizer().vocab_size();
        // Rows beyond the tokenizer are padding: a draw must not land there. Arg-max stays that of the bare logits.
        let mask_from = (sampling.temperature > 0.0 && self.engine.info().vocab > vocab).then_some(vocab);
        let has_stops = request.stop.iter().any(|s| !s.is_empty());
        let policy = TextPolicy::new(scan.clone(), has_stops, mask_from);
        let engine_request = Request {
            prompt: request.prompt.tokens,
            sampling,
            max_tokens: request.max_tokens,
            stop_ids: if request.ignore_eos { Vec::new() } else { defaults.eos.clone() },
            policy: policy.map(|p| Box::new(p) as Box<dyn RowPolicy>),
            snapshot_at: request.prompt.snapshot_at,
            want_logits: request.want_logits,
        };
        let mut emitter = Emitter { scan, stop: None };
        let cancel = self.engine.submit(engine_request, Box::new(move |event| emitter.event(event, &mut sink)))?;
        Ok(cancel)
    }

    /// Starts a generation and returns its events as a blocking iterator. Dropping it cancels the request.
    ///
    /// # Errors
    /// [`SessionError::Submit`].
    pub fn generate(&self, request: GenerateRequest) -> Result<TextStream, SessionError> {
        let (tx, events) = channel();
        // A receiver that is gone is no error: the stream's guard has cancelled the request.
        let cancel = self.generate_with(request, move |event| drop(tx.send(event)))?;
        Ok(TextStream { events, guard: CancelGuard(cancel), ended: false })
    }
}

/// Turns engine events into text events.
struct Emitter {
    scan: TextScan,
    stop: Option<String>,
}

impl Emitter {
    fn event(&mut self, event: Event, sink: &mut impl FnMut(TextEvent)) {
        match event {
            Event::Prefill { done, total, cached } => sink(TextEvent::Prefill { done, total, cached }),
            Event::Token { id, logits } => {
                let scanned = self.scan.push(id);
                self.stop = self.stop.take().or(scanned.stop);
                sink(TextEvent::Delta { text: scanned.text, token: Some(id), logits });
            }
            Event::Finished { mut reason, receipt } => {
                let rest = self.scan.finish();
                self.stop = self.stop.take().or(rest.stop);
                if !rest.text.is_empty() {
                    sink(TextEvent::Delta { text: rest.text, token: None, logits: None });
                }
                if self.stop.is_some() && reason == FinishReason::Length {
                    reason = FinishReason::Stop;
                }
                let stop = self.stop.take();
                sink(TextEvent::Finished { reason, stop, receipt });
            }
            Event::Failed { code, message } => sink(TextEvent::Failed { code, message }),
        }
    }
}

/// Events of one generation, blocking. Cancels the request when dropped.
pub struct TextStream {
    events: Receiver<TextEvent>,
    guard: CancelGuard,
    ended: bool,
}

impl TextStream {
    /// Cancels from elsewhere (a signal handler); the stream then ends with `Finished`.
    pub fn cancel_token(&self) -> CancelToken {
        self.guard.0.clone()
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// [`SessionError::Failed`].
    pub fn wait(self) -> Result<Reply, SessionError> {
        let (mut text, mut tokens) = (String::new(), Vec::new());
        for event in self {
            match event {
                TextEvent::Prefill { .. } => {}
                TextEvent::Delta { text: piece, token, .. } => {
                    text.push_str(&piece);
                    tokens.extend(token);
                }
                TextEvent::Finished { reason, stop, receipt } => {
                    return Ok(Reply { text, tokens, reason, stop, receipt });
                }
                TextEvent::Failed { code, message } => return Err(SessionError::Failed { code, message }),
            }
        }
        Err(SessionError::Failed { code: ENGINE_GONE, message: GONE_MESSAGE.to_owned() })
    }
}

const ENGINE_GONE: &str = "engine-gone";
const GONE_MESSAGE: &str = "the engine ended before the request did";

impl Iterator for TextStream {
    type Item = TextEvent;

    fn next(&mut self) -> Option<TextEvent> {
        if self.ended {
            return None;
        }
        let event = self.events.recv().unwrap_or_else(|_| TextEvent::Failed { code: ENGINE_GONE, message: GONE_MESSAGE.to_owned() });
        self.ended = matches!(event, TextEvent::Finished { .. } | TextEvent::Failed { .. });
        Some(event)
    }
}
