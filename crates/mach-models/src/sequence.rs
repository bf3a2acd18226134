//! The state of one sequence: its block table and recurrent states, with undo and snapshots.

use mach_backend::{Backend, StateSpec};

/// Everything that a sequence needs to go on. KV blocks belong to the model's pool: give a sequence back with
/// [`Model::release`](crate::Model::release).
pub struct Sequence<B: Backend> {
    /// Block ids by position / 32.
    pub(crate) blocks: Vec<u32>,
    /// Recurrent state per layer (`None` for attention layers).
    pub(crate) states: Vec<Option<B::State>>,
    specs: Vec<Option<StateSpec>>,
    len: usize,
    mark: Option<Mark<B>>,
    /// Rows were computed that are neither committed nor taken back.
    pub(crate) pending: bool,
}

struct Mark<B: Backend> {
    len: usize,
    states: Vec<Option<B::State>>,
}

/// A sequence's recurrent state at one position. Its KV stays in the sequence's blocks.
pub struct Snapshot<B: Backend> {
    /// Tokens seen.
    pub pos: usize,
    states: Vec<Option<B::State>>,
}

impl<B: Backend> Sequence<B> {
    pub(crate) fn new(backend: &B, specs: Vec<Option<StateSpec>>) -> Self {
        let states = specs.iter().map(|s| s.as_ref().map(|s| backend.state(s))).collect();
        Self { blocks: Vec::new(), states, specs, len: 0, mark: None, pending: false }
    }

    /// Committed tokens.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing was committed.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Remembers the state, so that rows computed from here on can be taken back.
    pub fn begin(&mut self, backend: &B) {
        let states = self.copy_states(backend);
        self.mark = Some(Mark { len: self.len, states });
    }

    /// Keeps `n` computed rows.
    pub fn commit(&mut self, n: usize) {
        self.len += n;
        self.mark = None;
        self.pending = false;
    }

    /// Takes back rows that were computed since the last `begin` and not committed. `false` when there are such rows but
    /// no `begin`: the sequence must then be dropped.
    pub fn rollback(&mut self) -> bool {
        if let (true, Some(mark)) = (self.pending, self.mark.take()) {
            self.len = mark.len;
            self.states = mark.states;
            self.pending = false;
        }
        !self.pending
    }

    /// The recurrent state as it is now.
    pub fn snapshot(&self, backend: &B) -> Snapshot<B> {
        Snapshot { pos: self.len, states: self.copy_states(backend) }
    }

    /// Goes back to a snapshot of this sequence; positions beyond it are forgotten.
    pub fn restore(&mut self, backend: &B, snapshot: &Snapshot<B>) {
        for (dst, src) in self.states.iter_mut().zip(&snapshot.states) {
            if let (Some(dst), Some(src)) = (dst, src) {
                backend.copy_state(src, dst);
            }
        }
        self.len = snapshot.pos;
        self.mark = None;
        self.pending = false;
    }

    /// Forgets positions from `pos` on. Only for sequences without recurrent layers, where every position can be
    /// returned to; `false` otherwise.
    pub fn truncate(&mut self, pos: usize) -> bool {
        let possible = pos == self.len || self.specs.iter().all(Option::is_none);
        if possible {
            self.len = pos.min(self.len);
        }
        possible
    }

    fn copy_states(&self, backend: &B) -> Vec<Option<B::State>> {
        let copy = |(spec, src): (&Option<StateSpec>, &Option<B::State>)| {
            let (spec, src) = (spec.as_ref()?, src.as_ref()?);
            let mut dst = backend.state(spec);
            backend.copy_state(src, &mut dst);
            Some(dst)
        };
        self.specs.iter().zip(&self.states).map(copy).collect()
    }
}
