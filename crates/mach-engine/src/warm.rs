//! Warm sequences: what recent requests left in memory, so that a prompt that goes on from one need not start over.

use mach_backend::Backend;
use mach_models::{Model, Sequence, Snapshot};

/// Sequences kept.
const KEPT: usize = mach_models::plan::WARM_SEQUENCES as usize;
/// Snapshots kept per sequence (the plan counts them).
const SNAPSHOTS: usize = 2;

/// A sequence, the tokens in it, and states to go back to.
pub struct Warm<B: Backend> {
    pub seq: Sequence<B>,
    /// Exactly the committed tokens.
    pub tokens: Vec<u32>,
    snapshots: Vec<Snapshot<B>>,
}

impl<B: Backend> Warm<B> {
    pub fn new(model: &Model<B>) -> Self {
        Self { seq: model.sequence(), tokens: Vec::new(), snapshots: Vec::new() }
    }

    /// Remembers the state at the current position; the oldest snapshot goes.
    pub fn snapshot(&mut self, backend: &B) {
        if self.snapshots.iter().any(|s| s.pos() == self.seq.len()) {
            return;
        }
        if self.snapshots.len() == SNAPSHOTS {
            self.snapshots.remove(0);
        }
        self.snapshots.push(self.seq.snapshot(backend));
    }

    /// Drops the oldest snapshot, and with it what layers with a window keep for it; `false` when there is none.
    pub fn forget_snapshot(&mut self) -> bool {
        let any = !self.snapshots.is_empty();
        if any {
            self.snapshots.remove(0);
        }
        any
    }

    /// How many tokens of `prompt` this sequence could save, leaving at least one to compute.
    fn reusable(&self, prompt: &[u32]) -> usize {
        let most = self.tokens.iter().zip(prompt).take_while(|(a, b)| a == b).count().min(prompt.len() - 1);
        let snapshots = self.snapshots.iter().map(Snapshot::pos).filter(|&p| p <= most);
        snapshots.chain([self.seq.resumable(most)]).max().unwrap_or(0)
    }

    /// Goes back to `pos`, which [`Warm::reusable`] gave.
    fn cut(&mut self, backend: &B, pos: usize) -> bool {
        let done = self.seq.truncate(pos) || self.snapshots.iter().find(|s| s.pos() == pos).is_some_and(|s| self.seq.restore(backend, s));
        self.tokens.truncate(self.seq.len());
        self.snapshots.retain(|s| s.pos() <= pos);
        done
    }
}

/// The pool, most recently used last.
pub struct WarmPool<B: Backend> {
    kept: Vec<Warm<B>>,
}

impl<B: Backend> WarmPool<B> {
    pub fn new() -> Self {
        Self { kept: Vec::new() }
    }

    /// The sequence to run `prompt` on, cut to what both share, or a fresh one.
    pub fn take(&mut self, model: &mut Model<B>, prompt: &[u32]) -> Warm<B> {
        let best = (0..self.kept.len()).map(|i| (self.kept[i].reusable(prompt), i)).max();
        if let Some((pos, i)) = best.filter(|b| b.0 > 0) {
            let mut warm = self.kept.remove(i);
            if warm.cut(model.backend(), pos) {
                return warm;
            }
            model.release(warm.seq);
        }
        Warm::new(model)
    }

    /// Keeps a sequence; the least recently used one goes when there are too many.
    pub fn put(&mut self, model: &mut Model<B>, mut warm: Warm<B>) {
        if warm.tokens.is_empty() {
            model.release(warm.seq);
            return;
        }
        model.settle(&mut warm.seq);
        self.kept.push(warm);
        while self.kept.len() > KEPT {
            self.evict(model);
        }
    }

    /// Drops the least recently used sequence; `false` when there is none.
    pub fn evict(&mut self, model: &mut Model<B>) -> bool {
        if self.kept.is_empty() {
            return false;
        }
        let gone = self.kept.remove(0);
        model.release(gone.seq);
        true
    }
}
