//! Fork-join pool of the forward pass.
//!
//! A *region* is a number of independent items that the caller and the workers take from one atomic counter. Workers
//! spin for a bounded time between regions and then park. The caller never waits for a worker that did not arrive:
//! it closes the region when the items are taken and waits only for those that entered.
//!
//! Which thread computes an item is left to chance, so items must not depend on each other; results then do not
//! depend on the number of threads.
#![allow(unexpected_cfgs)] // `--cfg loom` is set by the model test alone.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

#[cfg(loom)]
use loom::{
    cell::UnsafeCell,
    hint::spin_loop,
    sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence},
    sync::{Arc, Condvar, Mutex, MutexGuard},
    thread,
};
#[cfg(not(loom))]
use std::{
    hint::spin_loop,
    sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence},
    sync::{Arc, Condvar, Mutex, MutexGuard},
    thread,
};

/// Rounds of spinning before a thread parks, some 50 µs.
#[cfg(not(loom))]
const SPINS: u32 = 4000;
#[cfg(loom)]
const SPINS: u32 = 1;

/// `state` is `generation << 32 | CLOSED | workers inside`.
const CLOSED: u64 = 1 << 31;
const COUNT: u64 = CLOSED - 1;
const GENERATION: u64 = 1 << 32;

#[cfg(not(loom))]
struct UnsafeCell<T>(std::cell::UnsafeCell<T>);
#[cfg(not(loom))]
impl<T> UnsafeCell<T> {
    fn new(value: T) -> Self {
        Self(std::cell::UnsafeCell::new(value))
    }
    fn with<R>(&self, f: impl FnOnce(*const T) -> R) -> R {
        f(self.0.get())
    }
    fn with_mut<R>(&self, f: impl FnOnce(*mut T) -> R) -> R {
        f(self.0.get())
    }
}

type Task<'a> = dyn Fn(usize) + Sync + 'a;

/// The region in progress; the task's lifetime is erased, `Pool::run` outlives every use.
#[derive(Clone, Copy)]
struct Region {
    task: *const Task<'static>,
    items: usize,
}

struct Shared {
    state: AtomicU64,
    region: UnsafeCell<Region>,
    next: AtomicUsize,
    /// Threads that wait on `wake`.
    parked: AtomicUsize,
    lock: Mutex<()>,
    wake: Condvar,
    stop: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `region` is written by the one caller that holds `Pool::caller`, while the state is closed with nobody
// inside; workers read it only between entering and leaving. The task itself is `Sync`.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing is left half done under these locks, so a poisoned one is as good as any.
    m.lock().unwrap_or_else(|e| e.into_inner())
}

impl Shared {
    /// Waits until `ready`, spinning first, then parked.
    fn wait(&self, ready: impl Fn(&Self) -> bool) {
        for _ in 0..SPINS {
            if ready(self) {
                return;
            }
            spin_loop();
            #[cfg(loom)]
            thread::yield_now();
        }
        let mut guard = lock(&self.lock);
        self.parked.fetch_add(1, Ordering::Relaxed);
        // Pairs with the fence in `notify`: either we see the change or the notifier sees us parked.
        fence(Ordering::SeqCst);
        while !ready(self) {
            guard = self.wake.wait(guard).unwrap_or_else(|e| e.into_inner());
        }
        self.parked.fetch_sub(1, Ordering::Relaxed);
    }

    fn notify(&self) {
        fence(Ordering::SeqCst);
        if self.parked.load(Ordering::Relaxed) > 0 {
            let _guard = lock(&self.lock);
            self.wake.notify_all();
        }
    }

    /// Takes items until none is left. A panic ends the region early and is kept for the caller.
    fn work(&self, region: Region) {
        loop {
            let item = self.next.fetch_add(1, Ordering::Relaxed);
            if item >= region.items {
                return;
            }
            // SAFETY: the region is open or we are inside, so the caller is still in `run` and the task is alive.
            let task = unsafe { &*region.task };
            if let Err(payload) = catch_unwind(AssertUnwindSafe(|| task(item))) {
                lock(&self.panic).get_or_insert(payload);
                self.next.store(region.items, Ordering::Relaxed);
                return;
            }
        }
    }

    fn worker(&self) {
        let mut seen = 0;
        loop {
            self.wait(|s| s.stop.load(Ordering::Acquire) || s.open(seen).is_some());
            if self.stop.load(Ordering::Acquire) {
                return;
            }
            let Some(state) = self.open(seen) else { continue };
            if self.state.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed).is_err() {
                continue;
            }
            seen = state >> 32;
            self.work(self.region.with(|r| {
                // SAFETY: we are inside, so nobody writes.
                unsafe { *r }
            }));
            if self.state.fetch_sub(1, Ordering::AcqRel) & (CLOSED | COUNT) == CLOSED | 1 {
                self.notify();
            }
        }
    }

    /// The state, if it is an open region other than generation `seen`.
    fn open(&self, seen: u64) -> Option<u64> {
        let state = self.state.load(Ordering::Acquire);
        (state & CLOSED == 0 && state >> 32 != seen).then_some(state)
    }
}

/// A fixed set of threads, the caller included.
pub struct Pool {
    shared: Arc<Shared>,
    caller: Mutex<()>,
    workers: Vec<thread::JoinHandle<()>>,
}

impl Pool {
    /// A pool of `threads` threads (at least 1), of which `threads − 1` are started.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        fn idle(_: usize) {}
        let shared = Arc::new(Shared {
            state: AtomicU64::new(CLOSED),
            region: UnsafeCell::new(Region { task: &idle as &Task<'static> as *const _, items: 0 }),
            next: AtomicUsize::new(0),
            parked: AtomicUsize::new(0),
            lock: Mutex::new(()),
            wake: Condvar::new(),
            stop: AtomicBool::new(false),
            panic: Mutex::new(None),
        });
        let mut pool = Self { shared, caller: Mutex::new(()), workers: Vec::new() };
        for i in 1..threads {
            let shared = pool.shared.clone();
            pool.workers.push(thread::Builder::new().name(format!("mach-cpu-{i}")).spawn(move || shared.worker())?);
        }
        Ok(pool)
    }

    /// Threads, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task(i)` for every `i` in `0..items`, on any thread and in any order, and returns when all are done.
    ///
    /// A panic of a task is passed on to the caller after the region has ended; the pool stays usable.
    /// Must not be called from inside a task.
    pub fn run(&self, items: usize, task: &Task<'_>) {
        if items <= 1 || self.workers.is_empty() {
            (0..items).for_each(task);
            return;
        }
        let guard = lock(&self.caller);
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes; the task is not used after the wait below.
        let task: *const Task<'static> = unsafe { std::mem::transmute(std::ptr::from_ref(task)) };
        let region = Region { task, items };
        shared.region.with_mut(|r| {
            // SAFETY: the state is closed with nobody inside, and we hold `caller`.
            unsafe { *r = region }
        });
        shared.next.store(0, Ordering::Relaxed);
        let closed = shared.state.load(Ordering::Relaxed);
        shared.state.store((closed & !(CLOSED | COUNT)).wrapping_add(GENERATION), Ordering::Release);
        shared.notify();
        shared.work(region);
        shared.state.fetch_or(CLOSED, Ordering::AcqRel);
        shared.wait(|s| s.state.load(Ordering::Acquire) & COUNT == 0);
        let panic = lock(&shared.panic).take();
        drop(guard);
        if let Some(payload) = panic {
            resume_unwind(payload);
        }
    }

    /// Calls `task` for the ranges of `0..n` cut into pieces of `size`.
    pub fn ranges(&self, n: usize, size: usize, task: &(dyn Fn(std::ops::Range<usize>) + Sync)) {
        let size = size.max(1);
        self.run(n.div_ceil(size), &|i| task(i * size..((i + 1) * size).min(n)));
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.notify();
        for worker in self.workers.drain(..) {
            // A worker catches the panics of its tasks; there is nothing to report here.
            let _ = worker.join();
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn every_item_runs_once() {
        for threads in 1..=4 {
            let pool = Pool::new(threads).unwrap();
            for items in [0, 1, 2, 3, 100, 1000] {
                let counts: Vec<AtomicUsize> = (0..items).map(|_| AtomicUsize::new(0)).collect();
                for _ in 0..20 {
                    pool.run(items, &|i| {
                        counts[i].fetch_add(1, Ordering::Relaxed);
                    });
                }
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 20), "{threads} threads, {items} items");
            }
        }
    }

    #[test]
    fn parked_workers_wake() {
        let pool = Pool::new(2).unwrap();
        for _ in 0..5 {
            let n = AtomicUsize::new(0);
            pool.run(64, &|_| {
                n.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(n.load(Ordering::Relaxed), 64);
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
    }

    #[test]
    fn a_panicking_task_reaches_the_caller_and_leaves_the_pool_usable() {
        let pool = Pool::new(3).unwrap();
        for round in 0..20 {
            let caught = catch_unwind(AssertUnwindSafe(|| pool.run(50, &|i| assert_ne!(i, round, "boom"))));
            assert!(caught.is_err(), "the panic was lost in round {round}");
            let n = AtomicUsize::new(0);
            pool.run(50, &|_| {
                n.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(n.load(Ordering::Relaxed), 50);
        }
    }

    #[test]
    fn callers_on_several_threads_take_turns() {
        let pool = Pool::new(3).unwrap();
        std::thread::scope(|s| {
            for _ in 0..3 {
                s.spawn(|| {
                    for _ in 0..100 {
                        let n = AtomicUsize::new(0);
                        pool.run(7, &|_| {
                            n.fetch_add(1, Ordering::Relaxed);
                        });
                        assert_eq!(n.load(Ordering::Relaxed), 7);
                    }
                });
            }
        });
    }
}

/// `RUSTFLAGS="--cfg loom" cargo test --release -p mach-cpu pool`
#[cfg(all(test, loom))]
mod model {
    use super::*;

    fn check(regions: usize, items: usize) {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.check(move || {
            let pool = Pool::new(2).unwrap();
            for _ in 0..regions {
                let n = Arc::new(AtomicUsize::new(0));
                pool.run(items, &|_| {
                    n.fetch_add(1, Ordering::Relaxed);
                });
                assert_eq!(n.load(Ordering::Relaxed), items);
            }
        });
    }

    #[test]
    fn one_region() {
        check(1, 2);
    }

    #[test]
    fn two_regions() {
        check(2, 2);
    }
}
