//! Leases over a source that can be slow or fail, with the reference backend's memory.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use mach_backend::{Backend, ExpertMemory, Part, Reference, reference::Memory};
use mach_experts::{AheadStats, ExpertError, ExpertStore, Key, Lease, RecordSource, Residency, StoreOptions};
use mach_format::{PackedLayout, RecordLayout, WeightFormat};

const LAYERS: usize = 2;
const EXPERTS: usize = 16;

/// Every record is filled with its layer's and expert's number.
struct Source {
    layout: RecordLayout,
    fail: AtomicBool,
    slow: AtomicBool,
    reads: AtomicUsize,
}

impl RecordSource for Source {
    fn layers(&self) -> usize {
        LAYERS
    }
    fn experts(&self) -> usize {
        EXPERTS
    }
    fn layout(&self, _: usize) -> &RecordLayout {
        &self.layout
    }
    fn read(&self, key: Key, _: Part, buffers: [&mut [u8]; 2]) -> Result<u64, ExpertError> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        if self.slow.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(50));
        }
        if self.fail.load(Ordering::Relaxed) && key.expert == 7 {
            return Err(ExpertError::Checksum { layer: key.layer, expert: key.expert, part: "down", path: PathBuf::from("x") });
        }
        buffers.into_iter().for_each(|b| b.fill((key.layer * EXPERTS + key.expert) as u8));
        Ok(4096)
    }
    fn kind(&self) -> &'static str {
        "test"
    }
    fn direct(&self) -> bool {
        false
    }
}

fn store(slots: usize) -> (Arc<Source>, ExpertStore<Memory>) {
    let half = PackedLayout::new(16, 16, WeightFormat::F32);
    let source = Arc::new(Source { layout: RecordLayout::new(half, half), fail: false.into(), slow: false.into(), reads: 0.into() });
    let options = StoreOptions { slots, readers: 3, top_k: 2, residency: Residency::Streaming };
    let as_dyn: Arc<dyn RecordSource> = source.clone();
    let n = ExpertStore::<Memory>::slots_wanted(&*as_dyn, &options).unwrap();
    let memory = Reference.alloc_bank(n, as_dyn.part_bytes()).unwrap();
    (source, ExpertStore::new(memory, as_dyn, &options).unwrap())
}

/// Runs a lease; what was handed out: (expert, part) in order.
fn run(store: &mut ExpertStore<Memory>, experts: &[u32], ordered: bool) -> Result<Vec<(u32, Part)>, ExpertError> {
    let mut lease = if ordered { store.stream(0, experts) } else { store.step(0, experts) };
    let mut seen = Vec::new();
    while let Some(batch) = lease.next(&|| false)? {
        assert!(!batch.is_empty());
        seen.extend(batch.iter().map(|r| (experts[r.index], r.part)));
    }
    Ok(seen)
}

/// Every expert's gate|up before its down, each exactly once.
fn complete(seen: &[(u32, Part)], experts: &[u32]) {
    for &e in experts {
        let parts: Vec<Part> = seen.iter().filter(|s| s.0 == e).map(|s| s.1).collect();
        assert!(parts == [Part::Both] || parts == [Part::GateUp, Part::Down], "expert {e}: {parts:?}");
    }
}

/// Protects decode: hits come first, a union larger than the bank goes through in turns, nothing twice.
#[test]
fn a_step_hands_out_every_expert_once_whatever_the_bank() {
    let all: Vec<u32> = (0..EXPERTS as u32).collect();
    for slots in [4, 5, 9, 32] {
        let (_, mut store) = store(slots);
        for _ in 0..3 {
            complete(&run(&mut store, &all, false).unwrap(), &all);
        }
        assert!(store.slots() <= slots);
    }
    let (_, mut store) = store(32);
    run(&mut store, &[1, 5], false).unwrap();
    let mut lease = store.step(0, &[0, 1, 4, 5]);
    let first: Vec<usize> = lease.next(&|| false).unwrap().unwrap().iter().map(|r| r.index).collect();
    assert!(first.contains(&1) && first.contains(&3), "hits come with the first batch, not after the misses: {first:?}");
    while lease.next(&|| false).unwrap().is_some() {}
    drop(lease);
    let s = store.stats();
    assert_eq!((s.hits, s.misses, s.bytes_read / 4096), (2, 4, 6), "the last miss of a step is read in two parts");
}

/// Protects the bank from prefill: experts in ascending order, and what decode keeps warm stays.
#[test]
fn a_stream_is_ordered_and_does_not_evict() {
    let (source, mut store) = store(8);
    let warm = [1, 2, 3, 4, 5, 6, 7];
    run(&mut store, &warm, false).unwrap();
    let all: Vec<u32> = (0..EXPERTS as u32).collect();
    let seen = run(&mut store, &all, true).unwrap();
    assert_eq!(seen.iter().map(|s| s.0).collect::<Vec<_>>(), all);
    let before = source.reads.load(Ordering::Relaxed);
    run(&mut store, &warm, false).unwrap();
    assert_eq!(source.reads.load(Ordering::Relaxed), before, "a prefill evicted experts of the bank");
}

/// Protects the engine from a bad record: the error is reported, counted, and the store works on.
#[test]
fn a_failed_read_fails_one_lease() {
    for ordered in [false, true] {
        let (source, mut store) = store(8);
        source.fail.store(true, Ordering::Relaxed);
        let error = run(&mut store, &[5, 6, 7, 8], ordered).unwrap_err();
        assert_eq!(error.code(), "expert-checksum");
        assert_eq!(store.stats().errors, 1);
        source.fail.store(false, Ordering::Relaxed);
        complete(&run(&mut store, &[5, 6, 7, 8], ordered).unwrap(), &[5, 6, 7, 8]);
    }
}

/// Protects cancellation: it is seen while reads are queued, those are taken back, and the store works on.
#[test]
fn a_cancelled_lease_leaves_a_working_store() {
    let (source, mut store) = store(16);
    source.slow.store(true, Ordering::Relaxed);
    let all: Vec<u32> = (0..EXPERTS as u32).collect();
    let mut lease = store.step(0, &all);
    let asked = std::cell::Cell::new(0);
    let cancelled = || asked.replace(asked.get() + 1) > 0;
    let outcome = loop {
        match lease.next(&cancelled) {
            Ok(Some(_)) => {}
            other => break other.map(|_| ()),
        }
    };
    assert!(matches!(outcome, Err(ExpertError::Cancelled)));
    drop(lease);
    assert!(source.reads.load(Ordering::Relaxed) < EXPERTS, "queued reads were not taken back");
    source.slow.store(false, Ordering::Relaxed);
    complete(&run(&mut store, &all, false).unwrap(), &all);
}

/// Protects the budget: slots are given up down to the floor, and leases go on with what is left.
#[test]
fn slots_are_given_up_down_to_the_floor() {
    let (_, mut store) = store(12);
    let all: Vec<u32> = (0..EXPERTS as u32).collect();
    run(&mut store, &all, false).unwrap();
    let freed = store.give_up(3 * store.slot_bytes());
    assert_eq!((freed / store.slot_bytes(), store.slots()), (3, 9));
    store.give_up(u64::MAX);
    assert_eq!(store.slots(), mach_experts::floor_slots(2));
    complete(&run(&mut store, &all, false).unwrap(), &all);
    complete(&run(&mut store, &all, true).unwrap(), &all);
}

/// Protects the floor itself.
#[test]
fn too_small_a_bank_is_refused() {
    let (source, _) = store(4);
    let options = StoreOptions { slots: 3, readers: 1, top_k: 2, residency: Residency::Streaming };
    assert_eq!(ExpertStore::<Memory>::slots_wanted(&*source, &options).unwrap_err().code(), "bank-below-floor");
}

/// Runs a lease to its end, and looks whether every slot holds what it is said to hold.
fn checked(mut lease: Lease<'_, Memory>, memory: &Memory, layer: usize, experts: &[u32]) -> Result<Vec<u32>, ExpertError> {
    let mut seen = Vec::new();
    while let Some(batch) = lease.next(&|| false)? {
        for ready in batch {
            let (part, expert) = (usize::from(ready.part == Part::Down), experts[ready.index]);
            memory.fill(ready.slot, ready.part, &mut |buffers| assert_eq!(buffers[part][0] as usize, layer * EXPERTS + expert as usize));
            if ready.part != Part::Down {
                seen.push(expert);
            }
        }
    }
    Ok(seen)
}

/// Protects the sweep: the next layer is read ahead, each expert once and in order, and afterwards the bank has all of its
/// slots again.
#[test]
fn a_sweep_reads_the_next_layer_ahead_and_nothing_twice() {
    let all: Vec<u32> = (0..EXPERTS as u32).collect();
    for slots in [4, 9, 16, 24] {
        let (source, mut store) = store(slots);
        let memory = store.memory().clone();
        for pass in 1..4 {
            let before = (source.reads.load(Ordering::Relaxed), store.stats().misses);
            for layer in 0..LAYERS {
                assert_eq!(checked(store.sweep(layer, &all), &memory, layer, &all).unwrap(), all);
            }
            let read = source.reads.load(Ordering::Relaxed) - before.0;
            assert_eq!(read as u64, store.stats().misses - before.1, "{slots} slots, pass {pass}: read twice or for nothing");
        }
        for layer in 0..LAYERS {
            let mut seen = checked(store.step(layer, &all), &memory, layer, &all).unwrap();
            seen.sort_unstable();
            assert_eq!((seen, store.slots()), (all.clone(), slots));
        }
    }
    // A bank full of hits of the layer, and scratch full of later experts: the first one still gets a slot.
    for slots in [4, 8, 16] {
        let (_, mut store) = store(slots);
        let memory = store.memory().clone();
        for _ in 0..3 {
            checked(store.step(1, &all[EXPERTS - slots..]), &memory, 1, &all[EXPERTS - slots..]).unwrap();
            checked(store.sweep(0, &all), &memory, 0, &all).unwrap();
            assert_eq!(checked(store.sweep(1, &all), &memory, 1, &all).unwrap(), all);
        }
    }
    let (source, mut store) = store(16);
    let memory = store.memory().clone();
    checked(store.sweep(0, &all), &memory, 0, &all).unwrap();
    while source.reads.load(Ordering::Relaxed) <= EXPERTS {
        std::thread::sleep(Duration::from_millis(1));
    }
    // Another layer than the one that was read ahead, and fewer experts: nothing of it may be taken for theirs.
    assert_eq!(checked(store.stream(0, &[3, 4]), &memory, 0, &[3, 4]).unwrap(), [3, 4]);
    checked(store.step(1, &all), &memory, 1, &all).unwrap();
}

/// Protects a sweep that is given up, or that meets a bad record: the store works on.
#[test]
fn a_sweep_that_ends_early_leaves_a_working_store() {
    let all: Vec<u32> = (0..EXPERTS as u32).collect();
    let (source, mut store) = store(16);
    let memory = store.memory().clone();
    let mut lease = store.sweep(0, &all);
    lease.next(&|| false).unwrap();
    assert!(matches!(lease.next(&|| true), Err(ExpertError::Cancelled)));
    drop(lease);
    checked(store.sweep(0, &all), &memory, 0, &all).unwrap();
    source.fail.store(true, Ordering::Relaxed);
    assert_eq!(checked(store.sweep(1, &all), &memory, 1, &all).unwrap_err().code(), "expert-checksum");
    source.fail.store(false, Ordering::Relaxed);
    for layer in 0..LAYERS {
        checked(store.sweep(layer, &all), &memory, layer, &all).unwrap();
    }
    assert_eq!(store.slots(), 16);
}

/// Protects guesses: right ones are used and stay in the bank, wrong ones cost no slot, failed ones no lease.
#[test]
fn guesses_move_reads_and_nothing_else() {
    let (source, mut store) = store(24);
    let memory = store.memory().clone();
    let guess = |store: &mut ExpertStore<Memory>, experts: &[u32]| {
        let mut lease = store.step(0, &[1, 2]);
        lease.guess(1, experts, 2);
        checked(lease, &memory, 0, &[1, 2]).unwrap();
    };
    guess(&mut store, &[9, 5]);
    checked(store.step(1, &[5, 9]), &memory, 1, &[5, 9]).unwrap();
    assert_eq!(store.ahead_stats(), AheadStats { guessed: 2, used: 2 });
    let before = source.reads.load(Ordering::Relaxed);
    checked(store.step(1, &[5, 9]), &memory, 1, &[5, 9]).unwrap();
    assert_eq!(source.reads.load(Ordering::Relaxed), before, "what was guessed right is in the bank");

    source.fail.store(true, Ordering::Relaxed);
    guess(&mut store, &[7]);
    // Told only if the read has not ended yet and is then the step's own.
    let _ = checked(store.step(1, &[7]), &memory, 1, &[7]);
    source.fail.store(false, Ordering::Relaxed);
    checked(store.step(1, &[7]), &memory, 1, &[7]).unwrap();

    for i in 0..400 {
        guess(&mut store, &[10 + i % 3, 13 + i % 3]);
        checked(store.step(1, &[5, 9]), &memory, 1, &[5, 9]).unwrap();
    }
    assert!(!store.step(0, &[1]).wants_guess(), "wrong guesses go on");
    let all: Vec<u32> = (0..EXPERTS as u32).collect();
    checked(store.step(1, &all), &memory, 1, &all).unwrap();
    assert_eq!(store.slots(), 24);
}
