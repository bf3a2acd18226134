//! The state of one sequence: its block tables and recurrent states, with undo and snapshots.

use std::sync::{Arc, Weak};

use mach_backend::{Backend, StateSpec};

use crate::kv::Table;

/// Everything that a sequence needs to go on. KV blocks belong to the model's pool: give a sequence back with
/// [`Model::release`](crate::Model::release).
pub struct Sequence<B: Backend> {
    /// One for each pool of blocks.
    pub(crate) tables: Vec<Table>,
    /// Recurrent state per layer (`None` for attention layers).
    pub(crate) states: Vec<Option<B::State>>,
    specs: Vec<Option<StateSpec>>,
    len: usize,
    mark: Option<Mark<B>>,
    /// Positions of the snapshots that are still there: what rows after them see is kept.
    snapshots: Vec<Weak<usize>>,
    /// Rows were computed that are neither committed nor taken back.
    pub(crate) pending: bool,
}

struct Mark<B: Backend> {
    len: usize,
    states: Vec<Option<B::State>>,
}

/// A sequence's recurrent state at one position. Its KV stays in the sequence's blocks, for as long as the snapshot lives.
pub struct Snapshot<B: Backend> {
    pos: Arc<usize>,
    states: Vec<Option<B::State>>,
}

impl<B: Backend> Snapshot<B> {
    /// Tokens seen.
    pub fn pos(&self) -> usize {
        *self.pos
    }
}

impl<B: Backend> Sequence<B> {
    pub(crate) fn new(backend: &B, specs: Vec<Option<StateSpec>>, tables: Vec<Table>) -> Self {
        let states = specs.iter().map(|s| s.as_ref().map(|s| backend.state(s))).collect();
        Self { tables, states, specs, len: 0, mark: None, snapshots: Vec::new(), pending: false }
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

    /// The state as it is now.
    pub fn snapshot(&mut self, backend: &B) -> Snapshot<B> {
        let pos = Arc::new(self.len);
        self.snapshots.retain(|s| s.strong_count() > 0);
        self.snapshots.push(Arc::downgrade(&pos));
        Snapshot { pos, states: self.copy_states(backend) }
    }

    /// Positions of the snapshots that are still there.
    pub(crate) fn snapshots(&self) -> Vec<usize> {
        self.snapshots.iter().filter_map(Weak::upgrade).map(|pos| *pos).collect()
    }

    /// Goes back to a snapshot of this sequence; positions beyond it are forgotten, and so are snapshots there. `false`, and nothing
    /// is changed, when the snapshot is of another sequence or was forgotten.
    #[must_use]
    pub fn restore(&mut self, backend: &B, snapshot: &Snapshot<B>) -> bool {
        if !self.snapshots.iter().any(|s| s.as_ptr() == Arc::as_ptr(&snapshot.pos)) {
            return false;
        }
        for (dst, src) in self.states.iter_mut().zip(&snapshot.states) {
            if let (Some(dst), Some(src)) = (dst, src) {
                backend.copy_state(src, dst);
            }
        }
        self.cut(snapshot.pos());
        self.pending = false;
        true
    }

    /// The largest length up to `most` that needs no snapshot to go on from: any with full attention alone, with windows those whose
    /// window is still there, with recurrent layers the length it has or none.
    pub fn resumable(&self, most: usize) -> usize {
        if most >= self.len { self.len } else { (0..=most).rev().find(|&pos| self.can_cut(pos)).unwrap_or(0) }
    }

    /// Forgets positions from `pos` on. `false`, and nothing is changed, where that needs a snapshot: see [`Sequence::resumable`].
    #[must_use]
    pub fn truncate(&mut self, pos: usize) -> bool {
        let possible = pos >= self.len || self.can_cut(pos);
        if possible && pos < self.len {
            self.cut(pos);
        }
        possible
    }

    fn can_cut(&self, pos: usize) -> bool {
        self.specs.iter().all(Option::is_none) && self.tables.iter().all(|t| t.holds(pos))
    }

    fn cut(&mut self, pos: usize) {
        self.len = pos;
        self.mark = None;
        self.snapshots.retain(|s| s.upgrade().is_some_and(|at| *at <= pos));
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
