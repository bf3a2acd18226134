//! Running a model and timing it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use mach_backend::{Backend, Reference};
use mach_experts::{ExpertStats, Residency};
use mach_models::{Model, RouteLog, Row, Sequence, Want};

use crate::cli::args::{LoadBar, signal_line};
use crate::cli::output::ProgressLine;
use crate::limits::{Ceilings, LayerUse};
use crate::rates::{Xorshift, disk_rate, memory_rate};
use crate::{BackendKind, Error, Prepared, system};

/// Memory that one thread reads to find the ceiling.
const MEMORY_EACH: u64 = 256 << 20;
/// Reads under way that the drive is probed with, the probes at each and the time of one; the best counts.
const DEPTHS: [usize; 4] = [1, 2, 4, 8];
const PROBES: usize = 3;
const PROBE: Duration = Duration::from_millis(120);
/// Tokens before a decode is timed: at least, and at most where the bank is not full before.
const WARM_UP: [usize; 2] = [8, 256];

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    Decode,
    Prefill,
}

impl Phase {
    pub(super) const fn default_tokens(self) -> usize {
        match self {
            Self::Decode => 32,
            Self::Prefill => 512,
        }
    }
}

/// What to run.
#[derive(Clone, Copy)]
pub(super) struct Work {
    pub phase: Phase,
    /// Tokens of one run.
    pub tokens: usize,
    /// Runs.
    pub repeat: usize,
    /// Tokens before.
    pub depth: usize,
}

/// What came of it.
pub(super) struct Measured {
    pub samples: Vec<Sample>,
    /// Distinct experts of a prefill, over all layers.
    pub distinct: Option<u64>,
    pub ceilings: Ceilings,
    /// Slots of the bank at the end.
    pub slots: usize,
    pub peak_rss: Option<u64>,
    pub kernels: &'static str,
}

/// Loads the model on its backend and runs `work`.
pub(super) fn measure(prepared: &Prepared, work: &Work) -> Result<Measured, Error> {
    let needed = work.depth + work.tokens + if work.phase == Phase::Decode { WARM_UP[0] } else { 0 };
    if needed > prepared.plan.context {
        let message = format!("{needed} tokens exceed the context of {}: raise --ctx-size, or take fewer tokens", prepared.plan.context);
        return Err(Error::Input { code: "context-overflow", message });
    }
    match prepared.backend() {
        BackendKind::Cpu => {
            let cpu = prepared.cpu()?;
            let int8 = quantised(prepared).then(|| mach_cpu::peak_gops(cpu.kernel_set(), cpu.threads())).flatten();
            measure_on(prepared, cpu, work, int8.map(|gops| gops * 1e9))
        }
        BackendKind::Reference => measure_on(prepared, Arc::new(Reference), work, None),
    }
}

/// Whether products are of int8 activations: the int8 ceiling applies.
fn quantised(prepared: &Prepared) -> bool {
    prepared.source.as_ref().is_some_and(|s| s.layout(0).down.format.is_quantised())
}

/// Memory and drive as fast as they go now.
fn ceilings(prepared: &Prepared, int8: Option<f64>) -> Ceilings {
    let threads = prepared.threads();
    let each = MEMORY_EACH.min(system::available_memory() / 8 / threads.max(1) as u64);
    let probe = |depth: &usize| prepared.source.as_ref().and_then(|s| disk_rate(&**s, *depth, PROBE));
    let disk = (0..PROBES).flat_map(|_| &DEPTHS).filter_map(probe).fold(None, |best: Option<f64>, rate| Some(best.map_or(rate, |b| b.max(rate))));
    Ceilings { memory: memory_rate(threads, each as usize), disk, int8 }
}

/// One timed run.
pub(super) struct Sample {
    pub seconds: f64,
    pub stats: ExpertStats,
    /// What every MoE layer of every pass found and missed.
    pub layers: Vec<LayerUse>,
}

/// A loaded model with its sequence, and the tokens to feed it.
struct Bench<B: Backend> {
    model: Model<B>,
    seq: Sequence<B>,
    random: Xorshift,
}

impl<B: Backend> Bench<B> {
    /// Computes `n` random tokens in passes of `width`, and commits them.
    fn feed(&mut self, n: usize, width: usize, want_last: bool, mut log: Option<&mut RouteLog>) -> Result<Sample, Error> {
        let (vocab, before, mut layers) = (self.model.spec().vocab, self.model.expert_stats(), Vec::new());
        let ids: Vec<u32> = (0..n).map(|_| self.random.below(vocab) as u32).collect();
        let began = Instant::now();
        for (piece, ids) in ids.chunks(width).enumerate() {
            let last = want_last && (piece + 1) * width >= n;
            let pos = self.seq.len();
            let want = |i: usize| if last && i + 1 == ids.len() { Want::Logits } else { Want::Nothing };
            let rows = ids.iter().enumerate().map(|(i, &token)| Row { seq: 0, pos: pos + i, token, want: want(i) }).collect();
            let mut pass = self.model.start(&mut [&mut self.seq], rows)?;
            loop {
                let was = self.model.expert_stats();
                let done = self.model.step(&mut pass, &mut [&mut self.seq], log.as_deref_mut(), &|| false)?;
                let is = self.model.expert_stats();
                layers.push(LayerUse { hits: is.hits - was.hits, misses: is.misses - was.misses });
                if done {
                    break;
                }
            }
            self.model.finish(pass, &mut |_, logits| {
                std::hint::black_box(logits);
            });
            self.seq.commit(ids.len());
        }
        Ok(Sample { seconds: began.elapsed().as_secs_f64(), stats: since(&self.model.expert_stats(), &before), layers })
    }

    /// A run from where the sequence stands, as often as asked; each starts from the same state.
    fn runs(&mut self, phase: Phase, tokens: usize, repeat: usize) -> Result<Vec<Sample>, Error> {
        let backend = self.model.backend().clone();
        let start = self.seq.snapshot(&backend);
        let mut progress = ProgressLine::new();
        let mut samples = Vec::with_capacity(repeat);
        for i in 0..repeat {
            self.seq.restore(&backend, &start);
            let sample = match phase {
                Phase::Decode => self.decode(tokens)?,
                Phase::Prefill => self.feed(tokens, self.model.max_rows(), true, None)?,
            };
            progress.show(|| format!("run {} of {repeat}: {:.2} tok/s", i + 1, tokens as f64 / sample.seconds));
            samples.push(sample);
        }
        progress.end(None);
        Ok(samples)
    }

    /// Single rows, each with its logits.
    fn decode(&mut self, tokens: usize) -> Result<Sample, Error> {
        let mut all = Sample { seconds: 0.0, stats: ExpertStats::default(), layers: Vec::new() };
        for _ in 0..tokens {
            let one = self.feed(1, 1, true, None)?;
            all.seconds += one.seconds;
            add(&mut all.stats, &one.stats);
            all.layers.extend(one.layers);
        }
        Ok(all)
    }

    /// Decodes until caches are warm: a few tokens, and until the bank is full where there is one that does not hold all.
    fn warm_up(&mut self, streaming: bool) -> Result<(), Error> {
        let backend = self.model.backend().clone();
        let start = self.seq.snapshot(&backend);
        for i in 0..WARM_UP[1] {
            if i >= WARM_UP[0] && (!streaming || self.model.expert_stats().evictions > 0) {
                break;
            }
            // The sequence does not grow with the time that this takes.
            if i % WARM_UP[0] == 0 {
                self.seq.restore(&backend, &start);
            }
            self.feed(1, 1, true, None)?;
        }
        self.seq.restore(&backend, &start);
        Ok(())
    }
}

fn since(now: &ExpertStats, then: &ExpertStats) -> ExpertStats {
    ExpertStats {
        hits: now.hits - then.hits,
        misses: now.misses - then.misses,
        evictions: now.evictions - then.evictions,
        bytes_read: now.bytes_read - then.bytes_read,
        errors: now.errors - then.errors,
        stall: now.stall.saturating_sub(then.stall),
    }
}

fn add(all: &mut ExpertStats, one: &ExpertStats) {
    all.hits += one.hits;
    all.misses += one.misses;
    all.evictions += one.evictions;
    all.bytes_read += one.bytes_read;
    all.errors += one.errors;
    all.stall += one.stall;
}

fn measure_on<B: Backend>(prepared: &Prepared, backend: Arc<B>, work: &Work, int8: Option<f64>) -> Result<Measured, Error> {
    let Work { phase, tokens, repeat, depth } = *work;
    eprintln!("{}", signal_line(&prepared.signals(&*backend)));
    let kernels = backend.kernels();
    let before = ceilings(prepared, int8);
    // Linux forgets the peak that this took; elsewhere it stays in the figure.
    let _ = std::fs::write("/proc/self/clear_refs", "5");
    let mut bar = LoadBar::new();
    let model: Model<B> = prepared.load(backend, &mut |what, done, all| bar.show(what, done, all))?;
    bar.0.end(None);
    let streaming = prepared.plan.residency == Residency::Streaming;
    let seq = model.sequence();
    let mut bench = Bench { model, seq, random: Xorshift::new(0) };
    bench.feed(depth, bench.model.max_rows(), false, None)?;
    let mut distinct = None;
    match phase {
        Phase::Decode => bench.warm_up(streaming)?,
        Phase::Prefill => {
            let backend = bench.model.backend().clone();
            let (start, mut log) = (bench.seq.snapshot(&backend), RouteLog::default());
            bench.feed(tokens, bench.model.max_rows(), true, Some(&mut log))?;
            bench.seq.restore(&backend, &start);
            distinct = Some(log.layers.iter().map(|(ids, _)| ids.iter().collect::<std::collections::HashSet<_>>().len() as u64).sum());
        }
    }
    let samples = bench.runs(phase, tokens, repeat)?;
    let (slots, peak_rss) = (bench.model.slots(), system::peak_rss());
    drop(bench);
    // Ceilings are those of an undisturbed machine: the better of before and after, with the model out of the way.
    let after = ceilings(prepared, int8);
    let disk = match (before.disk, after.disk) {
        (Some(a), Some(b)) => Some(a.max(b)),
        (a, b) => a.or(b),
    };
    let ceilings = Ceilings { memory: before.memory.max(after.memory), disk, int8 };
    Ok(Measured { samples, distinct, ceilings, slots, peak_rss, kernels })
}
