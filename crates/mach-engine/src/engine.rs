//! The engine thread: one request after the other, prefill in pieces, then token by token.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::Receiver;
use std::time::Instant;

use mach_backend::Backend;
use mach_experts::ExpertStats;
use mach_models::{Model, ModelError, Row, Want};

use crate::api::{CancelToken, EngineInfo, Event, FinishReason, Receipt, Request, Stats, Verdict};
use crate::handle::{EngineHandle, SharedStats, Submission};
use crate::sampler::Sampler;
use crate::warm::{Warm, WarmPool};

/// Starts the engine thread of a model. It ends when the last handle is gone.
///
/// # Errors
/// When no thread can be started.
pub fn start<B: Backend>(model: Model<B>, info: EngineInfo) -> std::io::Result<EngineHandle> {
    let (handle, rx) = EngineHandle::new(info);
    let stats = handle.shared_stats();
    std::thread::Builder::new().name("mach-engine".to_owned()).spawn(move || {
        let mut engine = Engine { context: model.plan().context, model, warm: WarmPool::new(), stats, rx, queue: VecDeque::new() };
        engine.publish();
        engine.serve();
    })?;
    Ok(handle)
}

struct Engine<B: Backend> {
    model: Model<B>,
    warm: WarmPool<B>,
    stats: SharedStats,
    rx: Receiver<Submission>,
    queue: VecDeque<Submission>,
    context: usize,
}

/// How a request ended, before it is reported.
type Outcome = Result<FinishReason, ModelError>;

impl<B: Backend> Engine<B> {
    fn serve(&mut self) {
        loop {
            self.sweep();
            let next = match self.queue.pop_front() {
                Some(s) => s,
                None => match self.rx.recv() {
                    Ok(s) => s,
                    Err(_) => return,
                },
            };
            self.run(next);
        }
    }

    /// Takes in what was submitted and drops what nobody waits for any more.
    fn sweep(&mut self) {
        while let Ok(s) = self.rx.try_recv() {
            self.queue.push_back(s);
        }
        let mut kept = VecDeque::with_capacity(self.queue.len());
        for mut s in self.queue.drain(..) {
            if s.cancel.is_cancelled() {
                self.stats.with(|t| {
                    t.queued -= 1;
                    t.cancelled += 1;
                });
                let receipt = Receipt { prompt_tokens: s.request.prompt.len(), ..Receipt::default() };
                (s.sink)(Event::Finished { reason: FinishReason::Cancelled, receipt });
            } else {
                kept.push_back(s);
            }
        }
        self.queue = kept;
    }

    fn run(&mut self, submission: Submission) {
        let Submission { request, mut sink, cancel, at } = submission;
        self.stats.with(|s| {
            s.queued -= 1;
            s.running += 1;
        });
        let mut receipt = Receipt { prompt_tokens: request.prompt.len(), queue_ms: ms(at), ..Receipt::default() };
        let before = self.model.expert_stats();
        let outcome = catch_unwind(AssertUnwindSafe(|| self.generate(request, &mut sink, &cancel, &mut receipt)));
        let after = self.model.expert_stats();
        add_expert_receipt(&mut receipt, &before, &after);
        self.publish();
        let event = match outcome {
            Ok(Ok(reason)) => {
                self.stats.with(|s| {
                    s.running -= 1;
                    if reason == FinishReason::Cancelled { s.cancelled += 1 } else { s.finished += 1 }
                });
                Event::Finished { reason, receipt }
            }
            Ok(Err(error)) => {
                self.stats.with(|s| {
                    s.running -= 1;
                    s.failed += 1;
                });
                Event::Failed { code: error.code(), message: error.to_string() }
            }
            Err(_) => {
                // The state of the sequence is unknown: nothing that it touched is used again.
                while self.warm.evict(&mut self.model) {}
                self.stats.with(|s| {
                    s.running -= 1;
                    s.failed += 1;
                });
                Event::Failed { code: "internal", message: "the engine met a bug while computing this request; please report it".to_owned() }
            }
        };
        sink(event);
    }

    fn generate(&mut self, mut request: Request, sink: &mut dyn FnMut(Event), cancel: &CancelToken, receipt: &mut Receipt) -> Outcome {
        let mut warm = self.warm.take(&mut self.model, &request.prompt);
        let cached = warm.seq.len();
        receipt.cached_tokens = cached;
        self.stats.with(|s| {
            s.prompt_tokens += request.prompt.len() as u64;
            s.cached_tokens += cached as u64;
        });
        let outcome = self.compute(&mut warm, &mut request, sink, cancel, receipt);
        // A failed or cancelled pass leaves rows that nobody may build on: back to the last piece, or drop it all.
        if warm.seq.rollback() {
            warm.tokens.truncate(warm.seq.len());
            self.warm.put(&mut self.model, warm);
        } else {
            self.model.release(warm.seq);
        }
        outcome
    }

    fn compute(&mut self, warm: &mut Warm<B>, request: &mut Request, sink: &mut dyn FnMut(Event), cancel: &CancelToken, receipt: &mut Receipt) -> Outcome {
        let began = Instant::now();
        let Some(mut logits) = self.prefill(warm, request, sink, cancel)? else { return Ok(FinishReason::Cancelled) };
        receipt.prefill_ms = ms(began);
        let began = Instant::now();
        let mut sampler = Sampler::new(request.sampling.clone(), &request.prompt);
        let room = self.context - request.prompt.len();
        let limit = request.max_tokens.map_or(room, |m| m.min(room));
        if limit == 0 {
            return Ok(FinishReason::Length);
        }
        loop {
            let raw = request.want_logits.then(|| logits.clone());
            sampler.bias(&mut logits);
            if let Some(policy) = &mut request.policy {
                policy.mask(&mut logits);
            }
            let position = request.prompt.len() + receipt.completion_tokens;
            let id = sampler.choose(&mut logits, position as u64);
            receipt.decode_ms = ms(began);
            if request.stop_ids.contains(&id) {
                return Ok(FinishReason::Stop);
            }
            sampler.accept(id);
            receipt.completion_tokens += 1;
            self.stats.with(|s| s.generated_tokens += 1);
            sink(Event::Token { id, logits: raw });
            let verdict = request.policy.as_mut().map_or(Verdict::Continue, |p| p.accept(id));
            if verdict == Verdict::Stop {
                return Ok(FinishReason::Stop);
            }
            if receipt.completion_tokens >= limit {
                return Ok(FinishReason::Length);
            }
            self.sweep();
            if cancel.is_cancelled() {
                return Ok(FinishReason::Cancelled);
            }
            let row = Row { seq: 0, pos: warm.seq.len(), token: id, want: Want::Logits };
            // A token that was begun is finished, so that the sequence stays whole and warm.
            logits = self.pass(warm, vec![row], &CancelToken::new(), &mut |_| {})?;
            warm.seq.commit(1);
            warm.tokens.push(id);
            receipt.decode_steps += 1;
            self.publish();
        }
    }

    /// Computes the prompt from where the sequence stands; `None` when cancelled. Gives the last row's logits.
    fn prefill(&mut self, warm: &mut Warm<B>, request: &Request, sink: &mut dyn FnMut(Event), cancel: &CancelToken) -> Result<Option<Vec<f32>>, ModelError> {
        let (total, cached) = (request.prompt.len(), warm.seq.len());
        let mut logits = Vec::new();
        sink(Event::Prefill { done: cached, total, cached });
        while warm.seq.len() < total {
            let start = warm.seq.len();
            let cut = request.snapshot_at.iter().copied().filter(|&at| at > start && at < total).min().unwrap_or(total);
            let end = cut.min(start + self.model.max_rows());
            let rows = (start..end).map(|pos| {
                let want = if pos + 1 == total { Want::Logits } else { Want::Nothing };
                Row { seq: 0, pos, token: request.prompt[pos], want }
            });
            warm.seq.begin(self.model.backend());
            let layers = self.model.spec().layers.len();
            let progress = &mut |layer: usize| sink(Event::Prefill { done: start + (end - start) * layer / layers, total, cached });
            match self.pass(warm, rows.collect(), cancel, progress) {
                Err(e) if e.is_cancelled() => return Ok(None),
                other => logits = other?,
            }
            warm.seq.commit(end - start);
            warm.tokens.extend_from_slice(&request.prompt[start..end]);
            if end == cut && cut < total {
                warm.snapshot(self.model.backend());
            }
            self.publish();
        }
        Ok(Some(logits))
    }

    /// One forward pass of one sequence; the logits of its last wanted row.
    fn pass(&mut self, warm: &mut Warm<B>, rows: Vec<Row>, cancel: &CancelToken, progress: &mut dyn FnMut(usize)) -> Result<Vec<f32>, ModelError> {
        let len = rows.last().map_or(0, |r| r.pos + 1);
        while !self.model.can_grow(&mut warm.seq, len) && (self.warm.evict(&mut self.model) || warm.forget_snapshot()) {}
        let cancelled = || cancel.is_cancelled();
        let mut seqs = [&mut warm.seq];
        let mut f = self.model.start(&mut seqs, rows)?;
        while !self.model.step(&mut f, &mut seqs, None, &cancelled)? {
            progress(f.layers_done());
        }
        let mut logits = Vec::new();
        self.model.finish(f, &mut |_, row| logits = row.to_vec());
        Ok(logits)
    }

    fn publish(&self) {
        let (e, m) = (self.model.expert_stats(), &self.model);
        self.stats.with(|s| {
            *s = Stats {
                slots: m.slots() as u64,
                slot_bytes: m.plan().slot_bytes,
                experts: m.plan().experts as u64,
                hits: e.hits,
                misses: e.misses,
                evictions: e.evictions,
                bytes_read: e.bytes_read,
                io_errors: e.errors,
                stall_ms: e.stall.as_secs_f64() * 1e3,
                kv_bytes: m.kv_bytes(),
                ..s.clone()
            };
        });
    }
}

fn add_expert_receipt(receipt: &mut Receipt, before: &ExpertStats, after: &ExpertStats) {
    let used = after.since(before);
    (receipt.bytes_read, receipt.hits, receipt.misses) = (used.bytes_read, used.hits, used.misses);
    receipt.stall_ms = used.stall.as_secs_f64() * 1e3;
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}
