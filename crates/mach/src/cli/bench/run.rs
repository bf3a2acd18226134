//! Running a model and timing it.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mach_backend::{Backend, Reference};
use mach_cpu::Cpu;
use mach_experts::trace::Phase as Mark;
use mach_experts::{AheadStats, ExpertStats, Residency};
use mach_models::{Model, RouteLog, Row, Sequence, Snapshot, Want};

use super::Routing;
use crate::cli::args::{LoadBar, signal_line};
use crate::cli::output::ProgressLine;
use crate::drive::Drive;
use crate::limits::{Ceilings, LayerUse};
use crate::rates::{Xorshift, memory_rate};
use crate::routing::Realistic;
use crate::{BackendKind, Error, Prepared, system};

/// Memory that one thread reads to find the ceiling.
const MEMORY_EACH: u64 = 256 << 20;
/// Tokens before a decode is timed: at least, and at most where the bank is not full before.
const WARM_UP: [usize; 2] = [8, 256];

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    Decode,
    Prefill,
    /// From start to the first token.
    Load,
}

impl Phase {
    pub(super) const fn default_tokens(self) -> usize {
        match self {
            Self::Decode => 32,
            Self::Prefill => 512,
            Self::Load => 16,
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
    /// Tokens decoded before a decode is timed; `None`: until the bank is full.
    pub warm_up: Option<usize>,
    pub routing: Routing,
    /// Time of one point of the sweep that finds the drive's ceiling.
    pub probe: Duration,
}

/// What came of it.
pub(super) struct Measured {
    pub samples: Vec<Sample>,
    /// Accesses of the tokens before, and of the warm-up.
    pub earlier: [ExpertStats; 2],
    /// Distinct experts of a prompt, over all layers.
    pub distinct: Option<u64>,
    pub ceilings: Ceilings,
    /// Guesses of the next layer's experts, from the start.
    pub ahead: AheadStats,
    /// Slots of the bank at the end.
    pub slots: usize,
    pub peak_rss: Option<u64>,
    pub kernels: &'static str,
}

/// Loads the model on its backend and runs `work`. `known` are ceilings that were measured just before.
pub(super) fn measure(prepared: &Prepared, work: &Work, known: Option<&Ceilings>) -> Result<Measured, Error> {
    let needed = work.depth + work.tokens + if work.phase == Phase::Decode { WARM_UP[0] } else { 0 };
    fits(prepared, needed)?;
    match prepared.backend() {
        BackendKind::Cpu => {
            let cpu = prepared.cpu()?;
            let int8 = int8_peak(prepared, &cpu);
            measure_on(prepared, cpu, work, int8, known)
        }
        BackendKind::Reference => measure_on(prepared, Arc::new(Reference), work, None, known),
    }
}

/// Whether the context holds so many tokens.
pub(super) fn fits(prepared: &Prepared, tokens: usize) -> Result<(), Error> {
    if tokens <= prepared.plan.context {
        return Ok(());
    }
    let message = format!("{tokens} tokens exceed the context of {}: raise --ctx-size, or take fewer tokens", prepared.plan.context);
    Err(Error::Input { code: "context-overflow", message })
}

/// int8 operations per second, where products are of int8 activations.
pub(super) fn int8_peak(prepared: &Prepared, cpu: &Cpu) -> Option<f64> {
    let quantised = prepared.source.as_ref().is_some_and(|s| s.layout(0).down.format.is_quantised());
    quantised.then(|| mach_cpu::peak_gops(cpu.kernel_set(), cpu.threads())).flatten().map(|gops| gops * 1e9)
}

/// Memory and drive as fast as they go now.
pub(super) fn ceilings(prepared: &Prepared, int8: Option<f64>, probe: Duration) -> Result<Ceilings, Error> {
    let threads = prepared.threads();
    let each = MEMORY_EACH.min(system::available_memory() / 8 / threads.max(1) as u64);
    let disk = Drive::open(prepared)?.and_then(|drive| drive.ceiling(probe));
    Ok(Ceilings { memory: memory_rate(threads, each as usize), disk, int8 })
}

/// The better of two measurements: ceilings are those of an undisturbed machine.
pub(super) fn better(a: &Ceilings, b: &Ceilings) -> Ceilings {
    let max = |a: Option<f64>, b: Option<f64>| a.into_iter().chain(b).max_by(f64::total_cmp);
    Ceilings { memory: a.memory.max(b.memory), disk: max(a.disk, b.disk), int8: max(a.int8, b.int8) }
}

/// One timed run.
pub(super) struct Sample {
    pub seconds: f64,
    pub stats: ExpertStats,
    /// What every MoE layer of every pass found and missed.
    pub layers: Vec<LayerUse>,
}

/// A loaded model with its sequence, and the tokens to feed it.
pub(super) struct Bench<B: Backend> {
    pub model: Model<B>,
    seq: Sequence<B>,
    random: Xorshift,
}

impl<B: Backend> Bench<B> {
    pub(super) fn new(mut model: Model<B>, routing: Routing) -> Self {
        let spec = model.spec();
        let experts = spec.moe_layers().map(|(_, m)| m.router.experts).max().unwrap_or(0);
        let (layers, top_k) = (spec.moe_layers().count(), spec.top_k());
        if routing == Routing::Realistic && layers > 0 {
            model.force_routes(&Realistic::new(layers, experts, top_k).forced());
        }
        let seq = model.sequence();
        Self { model, seq, random: Xorshift::new(0) }
    }

    /// Computes `n` random tokens in passes of `width`, and commits them.
    pub(super) fn feed(&mut self, n: usize, width: usize, want_last: bool, mut log: Option<&mut RouteLog>) -> Result<Sample, Error> {
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
                let used = self.model.expert_stats().since(&was);
                layers.push(LayerUse { hits: used.hits, misses: used.misses });
                if done {
                    break;
                }
            }
            self.model.finish(pass, &mut |_, logits| {
                std::hint::black_box(logits);
            });
            self.seq.commit(ids.len());
        }
        Ok(Sample { seconds: began.elapsed().as_secs_f64(), stats: self.model.expert_stats().since(&before), layers })
    }

    /// A run from where the sequence stands, as often as asked; each starts from the same state.
    fn runs(&mut self, work: &Work, mark: &dyn Fn(Mark)) -> Result<Vec<Sample>, Error> {
        let Work { phase, tokens, repeat, .. } = *work;
        let start = self.seq.snapshot(self.model.backend());
        let mut progress = ProgressLine::new();
        let mut samples = Vec::with_capacity(repeat);
        for i in 0..repeat {
            self.back_to(&start);
            mark(Mark::Measured);
            let sample = match phase {
                Phase::Decode => self.decode(tokens)?,
                Phase::Prefill | Phase::Load => self.feed(tokens, self.model.max_rows(), true, None)?,
            };
            progress.show(|| format!("run {} of {repeat}: {:.2} tok/s", i + 1, tokens as f64 / sample.seconds));
            samples.push(sample);
        }
        progress.end(None);
        Ok(samples)
    }

    /// Single rows, each with its logits.
    fn decode(&mut self, tokens: usize) -> Result<Sample, Error> {
        let (before, mut seconds, mut layers) = (self.model.expert_stats(), 0.0, Vec::new());
        for _ in 0..tokens {
            let one = self.feed(1, 1, true, None)?;
            seconds += one.seconds;
            layers.extend(one.layers);
        }
        Ok(Sample { seconds, stats: self.model.expert_stats().since(&before), layers })
    }

    /// Decodes until caches are warm: a few tokens, and until the bank is full where there is one that does not hold all.
    fn warm_up(&mut self, streaming: bool, tokens: Option<usize>) -> Result<ExpertStats, Error> {
        let before = self.model.expert_stats();
        let start = self.seq.snapshot(self.model.backend());
        for i in 0..tokens.unwrap_or(WARM_UP[1]) {
            if tokens.is_none() && i >= WARM_UP[0] && (!streaming || self.model.expert_stats().evictions > 0) {
                break;
            }
            // The sequence does not grow with the time that this takes.
            if i % WARM_UP[0] == 0 {
                self.back_to(&start);
            }
            self.feed(1, 1, true, None)?;
        }
        self.back_to(&start);
        Ok(self.model.expert_stats().since(&before))
    }

    fn back_to(&mut self, start: &Snapshot<B>) {
        assert!(self.seq.restore(self.model.backend(), start), "a snapshot of this sequence, which was never cut before it");
    }

    /// A prompt that is not timed; distinct experts over all layers, and its accesses.
    fn first_prompt(&mut self, tokens: usize) -> Result<(u64, ExpertStats), Error> {
        let (start, mut log) = (self.seq.snapshot(self.model.backend()), RouteLog::default());
        let sample = self.feed(tokens, self.model.max_rows(), true, Some(&mut log))?;
        self.back_to(&start);
        Ok((distinct(&log), sample.stats))
    }
}

/// Distinct experts over all layers.
pub(super) fn distinct(log: &RouteLog) -> u64 {
    log.layers.iter().map(|(ids, _)| ids.iter().collect::<HashSet<_>>().len() as u64).sum()
}

fn measure_on<B: Backend>(prepared: &Prepared, backend: Arc<B>, work: &Work, int8: Option<f64>, known: Option<&Ceilings>) -> Result<Measured, Error> {
    eprintln!("{}", signal_line(&prepared.signals(&*backend)));
    let kernels = backend.kernels();
    let before = known.map_or_else(|| ceilings(prepared, int8, work.probe), |&known| Ok(known))?;
    system::forget_peak();
    let mut bar = LoadBar::new();
    let model: Model<B> = prepared.load(backend, &mut |what, done, all| bar.show(what, done, all))?;
    bar.0.end(None);
    let mark = |phase: Mark| prepared.recorder().into_iter().for_each(|r| r.mark(phase));
    let streaming = prepared.plan.residency == Residency::Streaming;
    let mut bench = Bench::new(model, work.routing);
    let depth = bench.feed(work.depth, bench.model.max_rows(), false, None)?.stats;
    mark(Mark::WarmUp);
    let (distinct, warm_up) = match work.phase {
        Phase::Decode => (None, bench.warm_up(streaming, work.warm_up)?),
        Phase::Prefill | Phase::Load => bench.first_prompt(work.tokens).map(|(distinct, stats)| (Some(distinct), stats))?,
    };
    let samples = bench.runs(work, &mark)?;
    let (ahead, slots, peak_rss) = (bench.model.ahead_stats(), bench.model.slots(), system::peak_rss());
    // The model is out of the way when the machine is measured again.
    drop(bench);
    let ceilings = better(&before, &ceilings(prepared, int8, work.probe)?);
    Ok(Measured { samples, earlier: [depth, warm_up], distinct, ceilings, ahead, slots, peak_rss, kernels })
}
