//! The door of the engine thread: a clonable handle, a bounded first-in-first-out queue, shared statistics.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use crate::api::{CancelToken, EngineInfo, Event, EventSink, Request, Stats, SubmitError};

/// Requests that may wait.
pub const QUEUE_LIMIT: usize = 64;

/// A request on its way to the engine thread.
pub struct Submission {
    /// What to generate.
    pub request: Request,
    /// Where events go.
    pub sink: EventSink,
    /// Set when the caller lost interest.
    pub cancel: CancelToken,
    /// When it was submitted.
    pub at: Instant,
}

/// Submits requests and reads statistics. Cheap to clone; the engine ends when the last handle is dropped.
#[derive(Clone)]
pub struct EngineHandle {
    tx: Sender<Submission>,
    info: Arc<EngineInfo>,
    stats: SharedStats,
}

/// The counters, shared between handles and the engine thread.
#[derive(Clone, Default)]
pub struct SharedStats(Arc<Mutex<Stats>>);

impl SharedStats {
    /// Reads or changes them.
    pub fn with<R>(&self, f: impl FnOnce(&mut Stats) -> R) -> R {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl EngineHandle {
    /// A handle and the receiving end that an engine thread serves.
    pub fn new(info: EngineInfo) -> (Self, Receiver<Submission>) {
        let (tx, rx) = channel();
        (Self { tx, info: Arc::new(info), stats: SharedStats::default() }, rx)
    }

    /// Static facts.
    pub fn info(&self) -> &EngineInfo {
        &self.info
    }

    /// A copy of the counters.
    pub fn stats(&self) -> Stats {
        self.stats.with(|s| s.clone())
    }

    /// The counters themselves, for the engine thread (which must not keep a handle, or it would never end).
    pub fn shared_stats(&self) -> SharedStats {
        self.stats.clone()
    }

    /// Queues a request. Events arrive at `sink` on the engine thread until `Finished` or `Failed`.
    ///
    /// # Errors
    /// [`SubmitError`] before anything was computed; `sink` is then never called.
    pub fn submit(&self, request: Request, sink: EventSink) -> Result<CancelToken, SubmitError> {
        if request.prompt.is_empty() {
            return Err(SubmitError::EmptyPrompt);
        }
        if request.prompt.len() >= self.info.context {
            return Err(SubmitError::ContextOverflow { prompt: request.prompt.len(), context: self.info.context });
        }
        if let Some(&id) = request.prompt.iter().find(|&&id| id as usize >= self.info.vocab) {
            return Err(SubmitError::TokenOutOfRange { id, vocab: self.info.vocab });
        }
        self.stats.with(|s| {
            if s.queued as usize >= QUEUE_LIMIT {
                return Err(SubmitError::QueueFull(QUEUE_LIMIT));
            }
            s.queued += 1;
            Ok(())
        })?;
        let cancel = CancelToken::new();
        let submission = Submission { request, sink, cancel: cancel.clone(), at: Instant::now() };
        self.tx.send(submission).map_err(|_| {
            self.stats.with(|s| s.queued -= 1);
            SubmitError::Closed
        })?;
        Ok(cancel)
    }

    /// Queues a request and returns its events as a channel, for callers that have a thread to block.
    ///
    /// # Errors
    /// As [`EngineHandle::submit`].
    pub fn submit_channel(&self, request: Request) -> Result<(CancelToken, Receiver<Event>), SubmitError> {
        let (tx, rx) = channel();
        // A receiver that is gone is not an error here: the token's guard cancels the request.
        let cancel = self.submit(request, Box::new(move |event| drop(tx.send(event))))?;
        Ok((cancel, rx))
    }
}
