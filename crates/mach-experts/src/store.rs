//! The store: slots, readers and counters; [`Lease`]s are made here.

use std::sync::Arc;
use std::time::Duration;

use mach_backend::{ExpertMemory, Part};
use mach_format::RecordLayout;

use crate::ExpertError;
use crate::ahead::{Ahead, AheadStats};
use crate::bank::{Bank, State};
use crate::lease::{Lease, Manner};
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

impl ExpertStats {
    /// What was counted since `earlier`.
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            hits: self.hits - earlier.hits,
            misses: self.misses - earlier.misses,
            evictions: self.evictions - earlier.evictions,
            bytes_read: self.bytes_read - earlier.bytes_read,
            errors: self.errors - earlier.errors,
            stall: self.stall.saturating_sub(earlier.stall),
        }
    }
}

/// Rows from which nearly every expert of a layer is used: of 256 with 8 active, 128 rows use 98 %.
pub const SWEEP_ROWS: usize = 128;
/// One in so many slots of the bank serves a sweep as scratch. The drive reads ahead as far while mixers compute, and what
/// is put out for it is little beside what a sweep reads.
const BORROWED_SHARE: usize = 8;

/// The least slots a bank works with: the top-k of two layers, one computes while the next loads.
pub const fn floor_slots(top_k: usize) -> usize {
    2 * top_k
}

/// The experts of a model and the slots that hold some of them.
pub struct ExpertStore<M: ExpertMemory> {
    memory: Arc<M>,
    pub(crate) source: Arc<dyn RecordSource>,
    pub(crate) readers: Option<Readers>,
    pub(crate) bank: Bank,
    /// Free slots of transient reads, lent by the bank.
    pub(crate) scratch: Vec<usize>,
    /// Slots lent for the prefill under way, beyond those that always are.
    borrowed: usize,
    pub(crate) ahead: Ahead,
    pub(crate) residency: Residency,
    pub(crate) top_k: usize,
    pub(crate) stats: ExpertStats,
    pub(crate) recorder: Option<Recorder>,
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
        let mut bank = Bank::new(total, layers, experts, options.top_k);
        Ok(Self {
            scratch: (0..scratch).filter_map(|_| bank.lend()).collect(),
            bank,
            borrowed: 0,
            ahead: Ahead::new(options.top_k),
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

    /// Counters of reads that were begun before they were asked for.
    pub fn ahead_stats(&self) -> AheadStats {
        self.ahead.stats
    }

    /// Slots in service, scratch included.
    pub fn slots(&self) -> usize {
        self.bank.in_service()
    }

    /// Slots that keep experts: without the scratch.
    pub(crate) fn bank_slots(&self) -> usize {
        self.bank.keeping()
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
        Lease::new(self, layer, experts, Manner::Step)
    }

    /// Leases `experts` for a prefill: one at a time in ascending order, misses through free or scratch slots, nothing
    /// evicted from the bank while those last.
    pub fn stream(&mut self, layer: usize, experts: &[u32]) -> Lease<'_, M> {
        Lease::new(self, layer, experts, Manner::Stream)
    }

    /// As [`ExpertStore::stream`], for [`SWEEP_ROWS`] rows or more, which use nearly every expert of every layer: as soon as
    /// the last of this layer is under way, those of the next one are read, and the least valuable slots of the bank are
    /// scratch until the next decode step.
    pub fn sweep(&mut self, layer: usize, experts: &[u32]) -> Lease<'_, M> {
        Lease::new(self, layer, experts, Manner::Sweep)
    }

    /// A slot for a transient read. A sweep may take some from the bank.
    pub(crate) fn transient_slot(&mut self, sweep: bool) -> Option<usize> {
        if self.scratch.is_empty() && sweep && self.borrowed < (self.bank.len() / BORROWED_SHARE).min(self.source.experts()) {
            let slot = self.bank.lend()?;
            self.borrowed += 1;
            return Some(slot);
        }
        self.scratch.pop()
    }

    /// Gives the bank back what a sweep borrowed.
    pub(crate) fn return_borrowed(&mut self) {
        while self.borrowed > 0 {
            let Some(slot) = self.scratch.pop() else { return };
            self.bank.give_back(slot);
            self.borrowed -= 1;
        }
    }
}
