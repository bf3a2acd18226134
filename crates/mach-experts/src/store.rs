//! The store: slots, readers and leases of experts for one layer of one forward pass.

use std::sync::Arc;
use std::time::{Duration, Instant};

use mach_backend::{ExpertMemory, Part};
use mach_format::RecordLayout;

use crate::ExpertError;
use crate::bank::{Bank, State};
use crate::readers::{Completion, Priority, ReadJob, Readers};
use crate::source::{Key, RecordSource};
use crate::trace::Recorder;

/// Whether experts come and go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Residency {
    /// The bank is smaller than the model; misses are read.
    Streaming,
    /// Every expert was read at load.
    Resident,
}

/// How to build a store.
#[derive(Clone, Copy, Debug)]
pub struct StoreOptions {
    /// Slots of the bank, scratch of the prefill included. Ignored when resident.
    pub slots: usize,
    /// Reader threads.
    pub readers: usize,
    /// Experts per token, for the floor.
    pub top_k: usize,
    /// Mode.
    pub residency: Residency,
}

/// Counters since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ExpertStats {
    /// Accesses found in the bank.
    pub hits: u64,
    /// Accesses that had to be read.
    pub misses: u64,
    /// Experts put out.
    pub evictions: u64,
    /// Bytes read from the drive, while running (not at load).
    pub bytes_read: u64,
    /// Failed reads and wrong checksums.
    pub errors: u64,
    /// Time the compute thread waited for reads.
    pub stall: Duration,
}

/// The least slots a bank works with: the top-k of two layers, one computes while the next loads.
pub const fn floor_slots(top_k: usize) -> usize {
    2 * top_k
}

/// The experts of a model and the slots that hold some of them.
pub struct ExpertStore<M: ExpertMemory> {
    memory: Arc<M>,
    source: Arc<dyn RecordSource>,
    readers: Option<Readers>,
    bank: Bank,
    /// Free slots of the transient prefill, beyond the bank's own.
    scratch: Vec<usize>,
    residency: Residency,
    top_k: usize,
    stats: ExpertStats,
    recorder: Option<Recorder>,
}

impl<M: ExpertMemory> ExpertStore<M> {
    /// Slots and part capacities that [`Backend::alloc_bank`](mach_backend::Backend::alloc_bank) should be asked for.
    ///
    /// # Errors
    /// [`ExpertError::BelowFloor`] for too small a bank.
    pub fn slots_wanted(source: &dyn RecordSource, options: &StoreOptions) -> Result<usize, ExpertError> {
        let all = source.layers() * source.experts();
        let floor = floor_slots(options.top_k).min(all);
        match options.residency {
            Residency::Resident => Ok(all),
            Residency::Streaming if options.slots < floor => Err(ExpertError::BelowFloor { slots: options.slots, floor, top_k: options.top_k }),
            Residency::Streaming => Ok(options.slots.min(all)),
        }
    }

    /// A store over `memory`, whose slots come from [`ExpertStore::slots_wanted`]. Reads nothing yet.
    ///
    /// # Errors
    /// When reader threads cannot be started.
    pub fn new(memory: M, source: Arc<dyn RecordSource>, options: &StoreOptions) -> Result<Self, ExpertError> {
        let (layers, experts, total) = (source.layers(), source.experts(), memory.slots());
        // With room for every expert nothing is transient.
        let scratch = if total >= layers * experts { 0 } else { (total / 8).clamp(1, 16) };
        let memory = Arc::new(memory);
        let readers = Readers::start(options.readers, &memory, &source).map_err(|_| ExpertError::ReadersGone)?;
        Ok(Self {
            bank: Bank::new(total - scratch, layers, experts, options.top_k),
            scratch: (total - scratch..total).collect(),
            readers: Some(readers),
            memory,
            source,
            residency: options.residency,
            top_k: options.top_k,
            stats: ExpertStats::default(),
            recorder: None,
        })
    }

    /// Reads every expert, for resident mode. `progress` gets (done, all).
    ///
    /// # Errors
    /// The first failed read.
    pub fn load_all(&mut self, progress: &mut dyn FnMut(usize, usize)) -> Result<(), ExpertError> {
        let (layers, experts) = (self.source.layers(), self.source.experts());
        let all = layers * experts;
        let Some(readers) = self.readers.take() else { return Ok(()) };
        for layer in 0..layers {
            for expert in 0..experts {
                let key = Key { layer, expert };
                let slot = self.bank.admit(key).ok_or(ExpertError::BelowFloor { slots: self.memory.slots(), floor: all, top_k: self.top_k })?;
                readers.submit([ReadJob { key, slot, part: Part::Both }], Priority::Demand);
            }
        }
        for done in 1..=all {
            let Completion { job, result } = readers.wait()?;
            result?;
            self.bank.set_state(job.slot, State::Ready);
            self.bank.unpin(job.slot);
            progress(done, all);
        }
        Ok(())
    }

    /// The memory that operations read.
    pub fn memory(&self) -> &Arc<M> {
        &self.memory
    }

    /// How experts of MoE layer `layer` lie in a slot.
    pub fn layout(&self, layer: usize) -> &RecordLayout {
        self.source.layout(layer)
    }

    /// Mode.
    pub fn residency(&self) -> Residency {
        self.residency
    }

    /// Counters.
    pub fn stats(&self) -> ExpertStats {
        ExpertStats { evictions: self.bank.evictions, ..self.stats }
    }

    /// Slots in service, scratch included.
    pub fn slots(&self) -> usize {
        self.bank.in_service() + self.memory.slots() - self.bank.len()
    }

    /// Slots that keep experts: without the scratch.
    pub(crate) fn bank_slots(&self) -> usize {
        self.bank.in_service()
    }

    /// Bytes of one slot.
    pub fn slot_bytes(&self) -> u64 {
        self.memory.part_bytes().iter().map(|&b| b as u64).sum()
    }

    /// Gives slots back to the system, down to the floor, until `bytes` are free; returns the bytes freed. Called when
    /// the KV cache grows.
    pub fn give_up(&mut self, bytes: u64) -> u64 {
        let (mut freed, before) = (0, self.slots());
        while freed < bytes && self.residency == Residency::Streaming && self.slots() > floor_slots(self.top_k) {
            let Some(slot) = self.bank.retire() else { break };
            self.memory.release(slot);
            freed += self.slot_bytes();
        }
        if let Some(recorder) = &self.recorder {
            recorder.retired(before - self.slots());
        }
        freed
    }

    /// Writes a trace from now on.
    pub fn record(&mut self, recorder: Recorder) {
        self.recorder = Some(recorder);
    }

    /// Begins the next forward pass, of so many rows: uses age.
    pub fn next_pass(&mut self, rows: usize) {
        if let Some(recorder) = &self.recorder {
            recorder.pass(rows);
        }
        self.bank.step += 1;
    }

    /// Leases `experts` (ascending, distinct) of MoE layer `layer` for a decode step: hits first, then misses as they
    /// arrive, gate|up of the last miss ahead of its down.
    pub fn step(&mut self, layer: usize, experts: &[u32]) -> Lease<'_, M> {
        Lease::new(self, layer, experts, false)
    }

    /// Leases `experts` for a prefill: one at a time in ascending order, misses through free or scratch slots, nothing
    /// evicted from the bank while those last.
    pub fn stream(&mut self, layer: usize, experts: &[u32]) -> Lease<'_, M> {
        Lease::new(self, layer, experts, true)
    }
}

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

/// Experts of one layer in use. Dropping it waits for reads under way and unpins everything.
pub struct Lease<'a, M: ExpertMemory> {
    store: &'a mut ExpertStore<M>,
    layer: usize,
    entries: Vec<Entry>,
    ordered: bool,
    in_flight: usize,
    batch: Vec<Ready>,
}

impl<'a, M: ExpertMemory> Lease<'a, M> {
    fn new(store: &'a mut ExpertStore<M>, layer: usize, experts: &[u32], ordered: bool) -> Self {
        let mut entries = Vec::with_capacity(experts.len());
        for &expert in experts {
            let expert = expert as usize;
            let (slot, stage) = match store.bank.lookup(Key { layer, expert }) {
                Some(slot) => {
                    store.bank.pin(slot);
                    if !ordered {
                        store.bank.touch(slot);
                    }
                    (slot, Stage::Held { arrived: [true; 2], given: [false; 2] })
                }
                None => (usize::MAX, Stage::Waiting),
            };
            match stage {
                Stage::Waiting => store.stats.misses += 1,
                _ if store.residency == Residency::Streaming => store.stats.hits += 1,
                _ => {}
            }
            entries.push(Entry { expert, slot, scratch: false, stage });
        }
        if let Some(recorder) = &store.recorder {
            let misses = entries.iter().filter(|e| e.stage == Stage::Waiting).count();
            recorder.lease(layer, experts, ordered, misses, store.stats.stall);
        }
        Self { store, layer, entries, ordered, in_flight: 0, batch: Vec::new() }
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
                return match self.entries.iter().any(|e| e.stage == Stage::Waiting) {
                    // Nothing is held and still no slot can be had.
                    true => Err(ExpertError::BelowFloor { slots: self.store.slots(), floor: floor_slots(self.store.top_k), top_k: self.store.top_k }),
                    false => Ok(None),
                };
            }
            let began = Instant::now();
            let done = self.store.readers.as_ref().ok_or(ExpertError::ReadersGone)?.wait()?;
            self.store.stats.stall += began.elapsed();
            self.take(done)?;
        }
    }

    /// Finds slots for waiting misses and queues their reads.
    fn issue(&mut self) {
        let last = self.entries.iter().rposition(|e| e.stage == Stage::Waiting);
        let mut jobs = Vec::new();
        for i in 0..self.entries.len() {
            if self.entries[i].stage != Stage::Waiting {
                continue;
            }
            let key = Key { layer: self.layer, expert: self.entries[i].expert };
            let bank = &mut self.store.bank;
            let (slot, scratch) = if !self.ordered || bank.has_free() {
                (bank.admit(key), false)
            } else if let Some(slot) = self.store.scratch.pop() {
                (Some(slot), true)
            } else if self.in_flight == 0 && jobs.is_empty() && self.entries[..i].iter().all(|e| e.stage == Stage::Released) {
                (bank.admit(key), false)
            } else {
                (None, false)
            };
            let Some(slot) = slot else { break };
            self.entries[i] = Entry { expert: key.expert, slot, scratch, stage: Stage::Held { arrived: [false; 2], given: [false; 2] } };
            if !self.ordered && Some(i) == last {
                jobs.extend([Part::GateUp, Part::Down].map(|part| ReadJob { key, slot, part }));
            } else {
                jobs.push(ReadJob { key, slot, part: Part::Both });
            }
        }
        if let (false, Some(readers)) = (jobs.is_empty(), &self.store.readers) {
            self.in_flight += jobs.len();
            readers.submit(jobs, if self.ordered { Priority::PrefillAhead } else { Priority::Demand });
        }
    }

    fn take(&mut self, done: Completion) -> Result<(), ExpertError> {
        self.in_flight -= 1;
        let entry = self.entries.iter_mut().find(|e| e.slot == done.job.slot && e.expert == done.job.key.expert);
        let Some(Entry { stage: Stage::Held { arrived, .. }, scratch, slot, .. }) = entry else { return Ok(()) };
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
        for (index, entry) in self.entries.iter_mut().enumerate() {
            let slot = entry.slot;
            match &mut entry.stage {
                Stage::Released => {}
                Stage::Held { arrived, given } => {
                    let part = match (*arrived, *given) {
                        ([true, true], [false, false]) => Part::Both,
                        ([true, _], [false, _]) if !self.ordered => Part::GateUp,
                        ([_, true], [true, false]) => Part::Down,
                        _ if self.ordered => return,
                        _ => continue,
                    };
                    match part {
                        Part::Both => *given = [true; 2],
                        Part::GateUp => given[0] = true,
                        Part::Down => given[1] = true,
                    }
                    self.batch.push(Ready { index, slot, part });
                    if self.ordered {
                        return;
                    }
                }
                Stage::Waiting if self.ordered => return,
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
        let Some(readers) = &self.store.readers else { return };
        // Jobs nobody has begun are taken back, the others are waited for: a slot must not be filled behind our back.
        self.in_flight -= readers.cancel_queued().len().min(self.in_flight);
        while self.in_flight > 0 {
            let Ok(done) = self.store.readers.as_ref().map_or(Err(ExpertError::ReadersGone), Readers::wait) else { break };
            if let Err(error) = self.take(done) {
                drop(error);
            }
        }
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
