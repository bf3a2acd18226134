//! Leases: the experts that one layer of one forward pass uses, handed out as they become ready.

use std::time::Instant;

use mach_backend::{ExpertMemory, Part};

use crate::ExpertError;
use crate::ahead::Early;
use crate::bank::State;
use crate::readers::{Completion, Priority, ReadJob, Readers};
use crate::source::Key;
use crate::store::{ExpertStore, Residency, floor_slots};

/// An expert (or a part of it) that can be computed now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ready {
    /// Index into the leased list.
    pub index: usize,
    /// Where it is.
    pub slot: usize,
    /// What may be read: both parts, or gate|up first and down later.
    pub part: Part,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// No slot yet.
    Waiting,
    /// Parts that have arrived and that were handed out (gate|up, down).
    Held {
        arrived: [bool; 2],
        given: [bool; 2],
    },
    Released,
}

struct Entry {
    expert: usize,
    slot: usize,
    scratch: bool,
    stage: Stage,
}

/// How experts are handed out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Manner {
    /// Decode: as they are ready.
    Step,
    /// Prefill: ascending, one at a time.
    Stream,
    /// Prefill of so many rows that the experts of the next layer are read ahead.
    Sweep,
}

/// Experts of one layer in use. Dropping it waits for its reads under way and unpins everything.
pub struct Lease<'a, M: ExpertMemory> {
    store: &'a mut ExpertStore<M>,
    layer: usize,
    entries: Vec<Entry>,
    manner: Manner,
    /// Reads of this lease that have not come back.
    in_flight: usize,
    /// The next expert of the next layer that a sweep reads ahead.
    next_ahead: usize,
    batch: Vec<Ready>,
}

impl<'a, M: ExpertMemory> Lease<'a, M> {
    pub(crate) fn new(store: &'a mut ExpertStore<M>, layer: usize, experts: &[u32], manner: Manner) -> Self {
        let ordered = manner != Manner::Step;
        if !ordered {
            store.return_borrowed();
        }
        let mut entries = Vec::with_capacity(experts.len());
        // Hits are pinned before anything is put out for a miss.
        for &expert in experts {
            let expert = expert as usize;
            let mut entry = Entry { expert, slot: usize::MAX, scratch: false, stage: Stage::Waiting };
            if let Some(slot) = store.bank.lookup(Key { layer, expert }) {
                store.bank.pin(slot);
                if !ordered {
                    store.bank.touch(slot);
                }
                (entry.slot, entry.stage) = (slot, Stage::Held { arrived: [true; 2], given: [false; 2] });
            }
            entries.push(entry);
        }
        store.receive();
        store.forget_early(|key| key.layer == layer && experts.binary_search(&(key.expert as u32)).is_ok());
        let misses = entries.iter().filter(|e| e.stage == Stage::Waiting).count() as u64;
        store.stats.misses += misses;
        if store.residency == Residency::Streaming {
            store.stats.hits += entries.len() as u64 - misses;
        }
        if let Some(recorder) = &store.recorder {
            recorder.lease(layer, experts, ordered, misses as usize, store.stats.stall);
        }
        let mut lease = Self { store, layer, entries, manner, in_flight: 0, next_ahead: 0, batch: Vec::new() };
        lease.issue();
        lease
    }

    fn ordered(&self) -> bool {
        self.manner != Manner::Step
    }

    /// Whether a guess for the next layer may win time: experts are read from the drive, slots are free, and guesses have been right.
    pub fn wants_guess(&mut self) -> bool {
        self.store.wants_guess()
    }

    /// Begins to read `experts` `[rows, top_k]` of layer `layer`, a guess of what its lease will ask for, the most likely of
    /// a row first, as far as scratch slots last and once nothing more urgent is to be read. Results do not depend on it.
    pub fn guess(&mut self, layer: usize, experts: &[u32], top_k: usize) {
        self.store.guess(layer, experts, top_k);
    }

    /// The next experts to compute; what the previous call handed out is released. `None` when all were. Empty
    /// batches do not occur. `cancelled` is asked before waiting.
    ///
    /// # Errors
    /// A failed read or checksum, or [`ExpertError::Cancelled`]; the lease is then over.
    pub fn next(&mut self, cancelled: &dyn Fn() -> bool) -> Result<Option<&[Ready]>, ExpertError> {
        self.release_given();
        self.batch.clear();
        loop {
            if cancelled() {
                return Err(ExpertError::Cancelled);
            }
            self.issue();
            while let Some(done) = self.store.readers.as_ref().and_then(Readers::poll) {
                self.take(done)?;
            }
            self.collect();
            if !self.batch.is_empty() {
                return Ok(Some(&self.batch));
            }
            if self.in_flight == 0 {
                match self.entries.iter().any(|e| e.stage == Stage::Waiting) {
                    false => return Ok(None),
                    // Later experts were read ahead into the slots that this one needs.
                    true if self.ordered() && self.store.free_early() => continue,
                    // A slot comes back when a read ahead ends.
                    true if self.store.ahead.in_flight() => {}
                    // Nothing is held and still no slot can be had.
                    true => return Err(ExpertError::BelowFloor { slots: self.store.slots(), floor: floor_slots(self.store.top_k), top_k: self.store.top_k }),
                }
            }
            let began = Instant::now();
            let done = self.store.readers.as_ref().ok_or(ExpertError::ReadersGone)?.wait()?;
            self.store.stats.stall += began.elapsed();
            self.take(done)?;
        }
    }

    /// Finds slots for waiting misses and queues their reads.
    fn issue(&mut self) {
        let (ordered, sweep) = (self.ordered(), self.manner == Manner::Sweep);
        let last = self.entries.iter().rposition(|e| e.stage == Stage::Waiting);
        let mut jobs = Vec::new();
        let mut short = false;
        for i in 0..self.entries.len() {
            if self.entries[i].stage != Stage::Waiting {
                continue;
            }
            let key = Key { layer: self.layer, expert: self.entries[i].expert };
            // What decode uses belongs in the bank, wherever it was read to.
            let early = if ordered { self.store.claim(key) } else { None };
            let (slot, scratch) = if let Some(early) = &early {
                (Some(early.slot), true)
            } else if !ordered || self.store.bank.has_free() {
                (self.store.bank.admit(key), false)
            } else if let Some(slot) = self.store.transient_slot(sweep) {
                (Some(slot), true)
            } else if self.in_flight == 0 && jobs.is_empty() && self.entries[..i].iter().all(|e| e.stage == Stage::Released) {
                (self.store.bank.admit(key), false)
            } else {
                (None, false)
            };
            let Some(mut slot) = slot else {
                short = true;
                break;
            };
            let early = if ordered { early } else { self.store.claim(key) };
            if let Some(Early { slot: read_to, arrived, .. }) = early {
                if !ordered {
                    self.store.bank.exchange(slot, read_to);
                    self.store.scratch.push(slot);
                    slot = read_to;
                }
                self.in_flight += usize::from(!arrived);
                self.entries[i] = Entry { expert: key.expert, slot, scratch, stage: Stage::Held { arrived: [arrived; 2], given: [false; 2] } };
                if arrived && !scratch {
                    self.store.bank.set_state(slot, State::Ready);
                }
                continue;
            }
            self.entries[i] = Entry { expert: key.expert, slot, scratch, stage: Stage::Held { arrived: [false; 2], given: [false; 2] } };
            if !ordered && Some(i) == last {
                jobs.extend([Part::GateUp, Part::Down].map(|part| ReadJob { key, slot, part }));
            } else {
                jobs.push(ReadJob { key, slot, part: Part::Both });
            }
        }
        if let (false, Some(readers)) = (jobs.is_empty(), &self.store.readers) {
            self.in_flight += jobs.len();
            readers.submit(jobs, if ordered { Priority::PrefillAhead } else { Priority::Demand });
        }
        if sweep && !short {
            self.next_ahead = self.store.sweep_ahead(self.layer + 1, self.next_ahead);
        }
    }

    fn take(&mut self, done: Completion) -> Result<(), ExpertError> {
        let key = done.job.key;
        let entry = self.entries.iter_mut().find(|e| key.layer == self.layer && e.slot == done.job.slot && e.expert == key.expert);
        let Some(Entry { stage: Stage::Held { arrived, .. }, scratch, slot, .. }) = entry else {
            self.store.finish_early(done);
            return Ok(());
        };
        self.in_flight -= 1;
        match done.result {
            Ok(bytes) => {
                self.store.stats.bytes_read += bytes;
                match done.job.part {
                    Part::GateUp => arrived[0] = true,
                    Part::Down => arrived[1] = true,
                    Part::Both => *arrived = [true; 2],
                }
                if *arrived == [true; 2] && !*scratch {
                    self.store.bank.set_state(*slot, State::Ready);
                }
                Ok(())
            }
            Err(error) => {
                self.store.stats.errors += 1;
                Err(error)
            }
        }
    }

    fn collect(&mut self) {
        let ordered = self.ordered();
        for (index, entry) in self.entries.iter_mut().enumerate() {
            let slot = entry.slot;
            match &mut entry.stage {
                Stage::Released => {}
                Stage::Held { arrived, given } => {
                    let part = match (*arrived, *given) {
                        ([true, true], [false, false]) => Part::Both,
                        ([true, _], [false, _]) if !ordered => Part::GateUp,
                        ([_, true], [true, false]) => Part::Down,
                        _ if ordered => return,
                        _ => continue,
                    };
                    match part {
                        Part::Both => *given = [true; 2],
                        Part::GateUp => given[0] = true,
                        Part::Down => given[1] = true,
                    }
                    self.batch.push(Ready { index, slot, part });
                    if ordered {
                        return;
                    }
                }
                Stage::Waiting if ordered => return,
                Stage::Waiting => {}
            }
        }
    }

    fn release_given(&mut self) {
        for entry in &mut self.entries {
            if matches!(entry.stage, Stage::Held { given: [true, true], .. }) {
                entry.stage = Stage::Released;
                if entry.scratch {
                    self.store.scratch.push(entry.slot);
                } else {
                    self.store.bank.unpin(entry.slot);
                }
            }
        }
    }
}

impl<M: ExpertMemory> Drop for Lease<'_, M> {
    fn drop(&mut self) {
        self.release_given();
        if let Some(recorder) = &self.store.recorder {
            recorder.released(self.store.stats.stall);
        }
        if self.in_flight == 0 {
            self.release_held();
            return;
        }
        let Some(readers) = &self.store.readers else { return };
        // The lease was given up: jobs nobody has begun are taken back, those of reads ahead too; the others are waited
        // for, as a slot must not be filled behind our back.
        for job in readers.cancel_queued() {
            if !self.store.cancelled_early(job) {
                self.in_flight -= 1;
            }
        }
        while self.in_flight > 0 {
            let Ok(done) = self.store.readers.as_ref().map_or(Err(ExpertError::ReadersGone), Readers::wait) else { break };
            if let Err(error) = self.take(done) {
                drop(error);
            }
        }
        self.release_held();
    }
}

impl<M: ExpertMemory> Lease<'_, M> {
    /// Releases what was not handed out whole.
    fn release_held(&mut self) {
        for entry in &self.entries {
            let Stage::Held { arrived, .. } = entry.stage else { continue };
            if entry.scratch {
                self.store.scratch.push(entry.slot);
            } else if arrived == [true; 2] {
                self.store.bank.unpin(entry.slot);
            } else {
                self.store.bank.discard(entry.slot);
            }
        }
    }
}
