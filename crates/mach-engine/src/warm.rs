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
        if self.snapshots.iter().any(|s| s.pos == self.seq.len()) {
            return;
        }
        if self.snapshots.len() == SNAPSHOTS {
            self.snapshots.remove(0);
        }
        self.snapshots.push(self.seq.snapshot(backend));
    }

    /// How many tokens of `prompt` this sequence could save, leaving at least one to compute.
    fn reusable(&self, prompt: &[u32], cut_anywhere: bool) -> usize {
        let common = self.tokens.iter().zip(prompt).take_while(|(a, b)| a == b).count();
        let most = common.min(prompt.len() - 1);
        if common == self.tokens.len() && common < prompt.len() {
            return common;
        }
        if cut_anywhere {
            return most;
        }
        self.snapshots.iter().map(|s| s.pos).filter(|&p| p <= most).max().unwrap_or(0)
    }

    /// Goes back to `pos`, which [`Warm::reusable`] gave.
    fn cut(&mut self, backend: &B, pos: usize) {
        if !self.seq.truncate(pos)
            && let Some(s) = self.snapshots.iter().find(|s| s.pos == pos)
        {
            self.seq.restore(backend, s);
        }
        self.tokens.truncate(self.seq.len());
        self.snapshots.retain(|s| s.pos <= pos);
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
    pub fn take(&mut self, model: &Model<B>, prompt: &[u32]) -> Warm<B> {
        let cut_anywhere = model.spec().layers.iter().all(|l| matches!(l.mixer, mach_models::spec::MixerSpec::Attention(_)));
        let best = (0..self.kept.len()).map(|i| (self.kept[i].reusable(prompt, cut_anywhere), i)).max();
        match best {
            Some((pos, i)) if pos > 0 => {
                let mut warm = self.kept.remove(i);
                warm.cut(model.backend(), pos);
                warm
            }
            _ => Warm::new(model),
        }
    }

    /// Keeps a sequence; the least recently used one goes when there are too many.
    pub fn put(&mut self, model: &mut Model<B>, warm: Warm<B>) {
        if warm.tokens.is_empty() {
            model.release(warm.seq);
            return;
        }
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
