//! Reads that begin before a lease asks for them: a sweep reads the next layer's experts, a decode step those that a guess
//! names. They go to scratch slots and change nothing but time.

use mach_backend::{ExpertMemory, Part};

use crate::readers::{Completion, Priority, ReadJob, Readers};
use crate::source::Key;
use crate::store::ExpertStore;

/// Guesses by which it is judged whether they pay.
const JUDGED: u32 = 64;
/// Least share of them that must be used. A wrong one costs at most what a right one saves: the time of a read.
const PAYS: f32 = 0.5;
/// Decode steps of a layer without guesses before it is tried again.
const REST: u32 = 2048;

/// Counters of reads ahead.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AheadStats {
    /// Guesses that were read or queued.
    pub guessed: u64,
    /// Of them used by the next lease.
    pub used: u64,
}

/// A read that was begun ahead.
pub(crate) struct Early {
    key: Key,
    pub slot: usize,
    pub arrived: bool,
    /// Which of its row's choices a guess was, the most likely being the first.
    guess: Option<usize>,
    /// No lease wanted it; its slot is free once the read ends.
    forgotten: bool,
}

/// How often guesses have been right lately.
#[derive(Clone, Copy, Default)]
struct Gauge {
    judged: u32,
    right: u32,
    resting: u32,
}

impl Gauge {
    fn judge(&mut self, used: bool) {
        self.judged += 1;
        self.right += u32::from(used);
        if self.judged == JUDGED {
            self.resting = if (self.right as f32) < PAYS * JUDGED as f32 { REST } else { 0 };
            (self.judged, self.right) = (0, 0);
        }
    }
}

/// Reads ahead, and whether guesses pay.
pub(crate) struct Ahead {
    reads: Vec<Early>,
    pub stats: AheadStats,
    /// By which of a row's choices it was: the first are right more often than the last.
    gauges: Vec<Gauge>,
}

impl Ahead {
    pub fn new(top_k: usize) -> Self {
        Self { reads: Vec::new(), stats: AheadStats::default(), gauges: vec![Gauge::default(); top_k.max(1)] }
    }

    /// Whether any read has not come back.
    pub fn in_flight(&self) -> bool {
        self.reads.iter().any(|r| !r.arrived)
    }

    /// Counts a decode step; whether any guess is worth it.
    fn rested(&mut self) -> bool {
        self.gauges.iter_mut().for_each(|g| g.resting = g.resting.saturating_sub(1));
        self.gauges.iter().any(|g| g.resting == 0)
    }
}

impl<M: ExpertMemory> ExpertStore<M> {
    pub(crate) fn wants_guess(&mut self) -> bool {
        self.ahead.rested() && self.readers.is_some() && !self.scratch.is_empty()
    }

    pub(crate) fn guess(&mut self, layer: usize, experts: &[u32], top_k: usize) {
        let mut jobs = Vec::new();
        for (i, &expert) in experts.iter().enumerate() {
            let (key, rank) = (Key { layer, expert: expert as usize }, i % top_k);
            let worth = self.ahead.gauges.get(rank).is_some_and(|g| g.resting == 0);
            if worth && self.bank.lookup(key).is_none() && self.ahead.reads.iter().all(|r| r.key != key) {
                let Some(slot) = self.scratch.pop() else { break };
                jobs.push(self.begin(key, slot, Some(rank)));
            }
        }
        self.ahead.stats.guessed += jobs.len() as u64;
        if let Some(readers) = &self.readers {
            readers.submit(jobs, Priority::Guess);
        }
    }

    /// Reads experts of `layer` from `first` on as far as slots last; returns the first that is left.
    pub(crate) fn sweep_ahead(&mut self, layer: usize, first: usize) -> usize {
        let (mut jobs, mut next) = (Vec::new(), first);
        let experts = if layer < self.source.layers() { self.source.experts() } else { 0 };
        while next < experts {
            let key = Key { layer, expert: next };
            if self.bank.lookup(key).is_none() {
                let Some(slot) = self.transient_slot(true) else { break };
                jobs.push(self.begin(key, slot, None));
            }
            next += 1;
        }
        if let (false, Some(readers)) = (jobs.is_empty(), &self.readers) {
            readers.submit(jobs, Priority::PrefillAhead);
        }
        next
    }

    fn begin(&mut self, key: Key, slot: usize, guess: Option<usize>) -> ReadJob {
        self.ahead.reads.push(Early { key, slot, arrived: false, guess, forgotten: false });
        ReadJob { key, slot, part: Part::Both }
    }

    /// The read ahead of `key`, if there is one. It is the caller's from now on.
    pub(crate) fn claim(&mut self, key: Key) -> Option<Early> {
        let at = self.ahead.reads.iter().position(|r| r.key == key && !r.forgotten)?;
        let read = self.ahead.reads.swap_remove(at);
        if let Some(rank) = read.guess {
            self.ahead.stats.used += 1;
            self.ahead.gauges[rank].judge(true);
        }
        if let (false, Some(readers)) = (read.arrived, &self.readers) {
            readers.hurry(read.slot);
        }
        Some(read)
    }

    /// Enters the reads that have come back.
    pub(crate) fn receive(&mut self) {
        while let Some(done) = self.readers.as_ref().and_then(Readers::poll) {
            self.finish_early(done);
        }
    }

    /// Forgets the reads ahead that are not wanted now.
    pub(crate) fn forget_early(&mut self, wanted: impl Fn(Key) -> bool) {
        let (scratch, Ahead { reads, gauges, .. }) = (&mut self.scratch, &mut self.ahead);
        reads.retain_mut(|read| {
            if !read.forgotten && wanted(read.key) {
                return true;
            }
            if let (Some(rank), false) = (read.guess, read.forgotten) {
                gauges[rank].judge(false);
            }
            read.forgotten = true;
            let over = read.arrived || self.readers.as_ref().is_none_or(|r| r.cancel(read.slot));
            if over {
                scratch.push(read.slot);
            }
            !over
        });
    }

    /// Forgets all reads ahead; whether that made a scratch slot free.
    pub(crate) fn free_early(&mut self) -> bool {
        self.forget_early(|_| false);
        !self.scratch.is_empty()
    }

    /// A read ahead came back. One that failed is as if it had not been: whoever needs the record reads it again.
    pub(crate) fn finish_early(&mut self, done: Completion) {
        let Some(at) = self.ahead.reads.iter().position(|r| r.slot == done.job.slot) else { return };
        match done.result {
            Ok(bytes) => {
                self.stats.bytes_read += bytes;
                self.ahead.reads[at].arrived = true;
            }
            Err(_) => self.stats.errors += 1,
        }
        let read = &self.ahead.reads[at];
        if read.forgotten || !read.arrived {
            self.scratch.push(self.ahead.reads.swap_remove(at).slot);
        }
    }

    /// Whether `job`, which was taken back, was a read ahead; its slot is then free.
    pub(crate) fn cancelled_early(&mut self, job: ReadJob) -> bool {
        let at = self.ahead.reads.iter().position(|r| r.slot == job.slot && r.key == job.key);
        if let Some(at) = at {
            self.scratch.push(self.ahead.reads.swap_remove(at).slot);
        }
        at.is_some()
    }
}
