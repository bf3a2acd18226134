//! What the engine offers to the outside: requests in, events out, numbers to read. Token ids only, no text.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Sampling of one request. Token choices are keyed by (seed, position, id): they do not depend on batch, cache or drafts.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0 is arg-max; penalties and `logit_bias` that were asked for still apply.
    pub temperature: f32,
    /// Keep the k most likely (0 = all).
    pub top_k: usize,
    /// Keep the smallest set of at least this mass (1 = all).
    pub top_p: f32,
    /// Keep ids of at least this share of the largest probability (0 = all).
    pub min_p: f32,
    /// Positive logits are divided, negative ones multiplied (1 = off); counts prompt and generated tokens.
    pub repetition_penalty: f32,
    /// Subtracted per occurrence among generated tokens.
    pub frequency_penalty: f32,
    /// Subtracted once for generated tokens.
    pub presence_penalty: f32,
    /// Added to logits, by id.
    pub logit_bias: Vec<(u32, f32)>,
    /// Key of the random draws.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

/// What a policy says of an accepted token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Go on.
    Continue,
    /// The row is finished with this token (a stop string was completed, a grammar ended).
    Stop,
}

/// Acts on a row by text: stop strings now, grammars later. Called on the engine thread.
pub trait RowPolicy: Send {
    /// Forbids ids before sampling by setting their logits to −∞. Does nothing by default.
    fn mask(&mut self, _logits: &mut [f32]) {}
    /// A token was chosen.
    fn accept(&mut self, token: u32) -> Verdict;
    /// The last `n` accepted tokens are taken back.
    fn rollback(&mut self, n: usize);
}

/// One generation.
pub struct Request {
    /// Prompt ids, at least one.
    pub prompt: Vec<u32>,
    /// Sampling.
    pub sampling: Sampling,
    /// Most tokens to generate; clamped to what the context leaves. `None`: up to the context.
    pub max_tokens: Option<usize>,
    /// Ids that end the turn (never emitted as tokens). Empty to ignore the end of turn.
    pub stop_ids: Vec<u32>,
    /// Text-side policy.
    pub policy: Option<Box<dyn RowPolicy>>,
    /// Prompt positions at which a state snapshot is worth keeping (start of the last user turn), ascending.
    pub snapshot_at: Vec<usize>,
    /// Send the logits row of every generated token.
    pub want_logits: bool,
}

/// Cancels a request: seen after the current token of a decode, within one expert of a prefill.
#[derive(Clone, Debug, Default)]
pub struct CancelToken(Arc<AtomicBool>);

impl CancelToken {
    /// A token that is not cancelled.
    pub fn new() -> Self {
        Self::default()
    }
    /// Asks the engine to stop.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
    /// Whether it was asked to.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Cancels on drop: keep it where the interest in the result lives (an HTTP handler, a stream).
pub struct CancelGuard(pub CancelToken);

impl Drop for CancelGuard {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop id or the policy.
    Stop,
    /// `max_tokens` or the context limit.
    Length,
    /// The caller went away.
    Cancelled,
}

/// The receipt of a generation.
#[derive(Clone, Debug, Default)]
pub struct Receipt {
    /// Prompt tokens.
    pub prompt_tokens: usize,
    /// Prompt tokens whose state was reused.
    pub cached_tokens: usize,
    /// Generated tokens, a final stop id not counted.
    pub completion_tokens: usize,
    /// Time in the queue.
    pub queue_ms: f64,
    /// Prefill of the tokens that were not cached.
    pub prefill_ms: f64,
    /// From the first generated token on.
    pub decode_ms: f64,
    /// Forward passes of decode.
    pub decode_steps: usize,
    /// Expert bytes read.
    pub bytes_read: u64,
    /// Expert accesses found in the bank.
    pub hits: u64,
    /// Expert accesses that had to be read.
    pub misses: u64,
    /// Time the compute thread waited for reads.
    pub stall_ms: f64,
}

/// What happens to a request, in order: `Prefill*`, `Token*`, then one of `Finished`, `Failed`.
#[derive(Clone, Debug)]
pub enum Event {
    /// Prompt tokens done, of all (`cached` of them reused). The first comes when the request starts to run.
    Prefill {
        /// Done so far, cached ones included.
        done: usize,
        /// Of the whole prompt.
        total: usize,
        /// Reused.
        cached: usize,
    },
    /// A generated token.
    Token {
        /// Its id.
        id: u32,
        /// The logits row it was chosen from, before any processing, when asked for.
        logits: Option<Vec<f32>>,
    },
    /// The end.
    Finished {
        /// Why.
        reason: FinishReason,
        /// What it took.
        receipt: Receipt,
    },
    /// The request failed; the engine lives on.
    Failed {
        /// Stable kebab-case code.
        code: &'static str,
        /// What happened, where, what to do.
        message: String,
    },
}

/// Receives events on the engine thread: must not block.
pub type EventSink = Box<dyn FnMut(Event) + Send>;

/// Why a request was not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// The queue has its 64 requests.
    #[error("the queue is full ({0} requests wait); try again later")]
    QueueFull(usize),
    /// The prompt leaves no room for a token.
    #[error("the prompt has {prompt} tokens, the context holds {context}: shorten it or raise --ctx-size")]
    ContextOverflow {
        /// Prompt tokens.
        prompt: usize,
        /// Context size.
        context: usize,
    },
    /// No prompt.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// An id outside the vocabulary.
    #[error("token id {id} is outside the vocabulary of {vocab}")]
    TokenOutOfRange {
        /// The id.
        id: u32,
        /// Rows of the vocabulary.
        vocab: usize,
    },
    /// The engine is shutting down.
    #[error("the engine is shutting down")]
    Closed,
}

/// Static facts of a running engine.
#[derive(Clone, Debug)]
pub struct EngineInfo {
    /// Family, `qwen3_5_moe`.
    pub arch: String,
    /// Context size in tokens.
    pub context: usize,
    /// The model's own limit.
    pub context_train: usize,
    /// Rows of the vocabulary.
    pub vocab: usize,
    /// All parameters.
    pub parameters: u64,
    /// Bytes of weights on disk.
    pub weight_bytes: u64,
    /// The signal line as ordered key/value pairs.
    pub signals: Vec<(String, String)>,
}

/// Counters and gauges, read at any time.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    /// Requests being computed.
    pub running: u64,
    /// Requests waiting.
    pub queued: u64,
    /// Requests that ended by themselves.
    pub finished: u64,
    /// Requests whose caller went away.
    pub cancelled: u64,
    /// Requests that failed.
    pub failed: u64,
    /// Prompt tokens computed or reused.
    pub prompt_tokens: u64,
    /// Prompt tokens reused.
    pub cached_tokens: u64,
    /// Tokens generated.
    pub generated_tokens: u64,
    /// Slots of the bank (0 when resident).
    pub slots: u64,
    /// Bytes of one slot.
    pub slot_bytes: u64,
    /// Routed experts of the model.
    pub experts: u64,
    /// Expert accesses found in the bank.
    pub hits: u64,
    /// Expert accesses that had to be read.
    pub misses: u64,
    /// Experts put out of the bank.
    pub evictions: u64,
    /// Expert bytes read.
    pub bytes_read: u64,
    /// Reads that failed or whose checksum was wrong.
    pub io_errors: u64,
    /// Time the compute thread waited for reads, in milliseconds.
    pub stall_ms: f64,
    /// Bytes of KV blocks in use.
    pub kv_bytes: u64,
}
