//! A small pool of reader threads behind one priority queue.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

use mach_backend::{ExpertMemory, Part};

use crate::ExpertError;
use crate::source::{Key, RecordSource};

/// What is wanted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ReadJob {
    pub key: Key,
    pub slot: usize,
    pub part: Part,
}

/// Urgency: decode waits for `Demand`, a prefill reads ahead, a guess comes last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Priority {
    Demand,
    PrefillAhead,
    Guess,
}

/// Guesses that are read at the same time: a wrong one must not keep a reader from what is needed.
const GUESSES: usize = 2;

/// What came of it.
pub(crate) struct Completion {
    pub job: ReadJob,
    /// Bytes read from the drive.
    pub result: Result<u64, ExpertError>,
}

#[derive(Default)]
struct Queue {
    jobs: [VecDeque<ReadJob>; 3],
    /// Guesses being read.
    guesses: usize,
    closed: bool,
}

impl Queue {
    fn pop(&mut self) -> Option<(ReadJob, Priority)> {
        for priority in [Priority::Demand, Priority::PrefillAhead, Priority::Guess] {
            if priority == Priority::Guess && self.guesses >= GUESSES {
                break;
            }
            if let Some(job) = self.jobs[priority as usize].pop_front() {
                self.guesses += usize::from(priority == Priority::Guess);
                return Some((job, priority));
            }
        }
        None
    }
}

struct Shared {
    queue: Mutex<Queue>,
    wake: Condvar,
}

/// The threads. Dropping it waits for reads under way.
pub(crate) struct Readers {
    shared: Arc<Shared>,
    completions: Receiver<Completion>,
    threads: Vec<JoinHandle<()>>,
}

impl Readers {
    pub fn start<M: ExpertMemory>(threads: usize, memory: &Arc<M>, source: &Arc<dyn RecordSource>) -> std::io::Result<Self> {
        let shared = Arc::new(Shared { queue: Mutex::default(), wake: Condvar::new() });
        let (tx, completions) = channel();
        let threads = (0..threads.max(1))
            .map(|i| {
                let (shared, memory, source, tx) = (shared.clone(), memory.clone(), source.clone(), tx.clone());
                std::thread::Builder::new().name(format!("mach-reader-{i}")).spawn(move || run(&shared, &*memory, &*source, &tx))
            })
            .collect::<std::io::Result<_>>()?;
        Ok(Self { shared, completions, threads })
    }

    pub fn submit(&self, jobs: impl IntoIterator<Item = ReadJob>, priority: Priority) {
        let mut queue = self.shared.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.jobs[priority as usize].extend(jobs);
        drop(queue);
        self.shared.wake.notify_all();
    }

    /// Takes back the jobs that no thread has begun.
    pub fn cancel_queued(&self) -> Vec<ReadJob> {
        let mut queue = self.shared.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.jobs.iter_mut().flat_map(std::mem::take).collect()
    }

    /// Takes back the job of `slot`; `false` when a thread has begun it.
    pub fn cancel(&self, slot: usize) -> bool {
        let mut queue = self.shared.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.jobs.iter_mut().any(|jobs| jobs.iter().position(|j| j.slot == slot).and_then(|at| jobs.remove(at)).is_some())
    }

    /// Makes the job of `slot` urgent, unless a thread has begun it.
    pub fn hurry(&self, slot: usize) {
        let mut queue = self.shared.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let [demand, rest @ ..] = &mut queue.jobs;
        if let Some(job) = rest.iter_mut().find_map(|jobs| jobs.iter().position(|j| j.slot == slot).and_then(|at| jobs.remove(at))) {
            demand.push_back(job);
        }
        drop(queue);
        self.shared.wake.notify_one();
    }

    pub fn wait(&self) -> Result<Completion, ExpertError> {
        self.completions.recv().map_err(|_| ExpertError::ReadersGone)
    }

    pub fn poll(&self) -> Option<Completion> {
        self.completions.try_recv().ok()
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        self.shared.queue.lock().unwrap_or_else(PoisonError::into_inner).closed = true;
        self.shared.wake.notify_all();
        for thread in self.threads.drain(..) {
            // A reader that panicked has nothing left to clean up.
            drop(thread.join());
        }
    }
}

fn run(shared: &Shared, memory: &dyn ExpertMemory, source: &dyn RecordSource, tx: &Sender<Completion>) {
    loop {
        let (job, priority) = {
            let mut queue = shared.queue.lock().unwrap_or_else(PoisonError::into_inner);
            loop {
                if queue.closed {
                    return;
                }
                if let Some(job) = queue.pop() {
                    break job;
                }
                queue = shared.wake.wait(queue).unwrap_or_else(PoisonError::into_inner);
            }
        };
        let mut result = Err(ExpertError::ReadersGone);
        // A panic in a source must not leave the engine waiting for this completion.
        let outcome = catch_unwind(AssertUnwindSafe(|| memory.fill(job.slot, job.part, &mut |buffers| result = source.read(job.key, job.part, buffers))));
        if outcome.is_err() {
            result = Err(ExpertError::ReadersGone);
        }
        if priority == Priority::Guess {
            // This thread looks at the queue again in a moment, so nobody has to be woken for the place that is free.
            shared.queue.lock().unwrap_or_else(PoisonError::into_inner).guesses -= 1;
        }
        if tx.send(Completion { job, result }).is_err() {
            return;
        }
    }
}
