//! `mach bench`: speed of decode and prefill, beside what the machine's ceilings measured in the same run would allow.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mach_backend::{Backend, KV_BLOCK, Reference};
use mach_experts::{ExpertStats, Residency};
use mach_models::{Model, RouteLog, Row, Sequence, Want};
use serde_json::{Value, json};

use super::args::{EngineArgs, LoadBar, positive, signal_line};
use super::output::{self, ProgressLine, size};
use crate::limits::{Bound, Ceilings, LayerUse, active_weights, decode_seconds, prefill_seconds, sequence_bytes, spread};
use crate::rates::{Xorshift, disk_rate, memory_rate};
use crate::synthetic::{self, Shape};
use crate::{BackendKind, Error, Prepared, system};

/// Memory that one thread reads to find the ceiling.
const MEMORY_EACH: u64 = 256 << 20;
/// Reads under way that the drive is probed with, the probes at each and the time of one; the best counts.
const DEPTHS: [usize; 4] = [1, 2, 4, 8];
const PROBES: usize = 3;
const PROBE: Duration = Duration::from_millis(120);
/// Tokens before a decode is timed: at least, and at most where the bank is not full before.
const WARM_UP: [usize; 2] = [8, 256];

#[derive(clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// One token at a time
    Decode(Run),
    /// A prompt
    Prefill(Run),
}

#[derive(clap::Args)]
struct Run {
    /// Model directory, or org/name in the Hugging Face cache [default: the built-in demonstration model]
    #[arg(long)]
    model: Option<String>,
    /// Random weights in this shape, written on first use and kept
    #[arg(long, value_name = "SHAPE", conflicts_with = "model", value_parser = clap::builder::PossibleValuesParser::new(synthetic::SHAPES))]
    synthetic: Option<String>,
    /// Only the first N layers of the shape
    #[arg(long, value_name = "N", requires = "synthetic")]
    layers: Option<usize>,
    /// Bits per weight of the shape
    #[arg(long, value_name = "BITS", default_value = "4", value_parser = ["4", "8"], requires = "synthetic")]
    bits: String,
    /// Where synthetic models are kept [default: mach in $XDG_CACHE_HOME or ~/.cache]
    #[arg(long, value_name = "DIR", env = "MACH_CACHE_DIR")]
    cache_dir: Option<PathBuf>,
    /// Tokens of one run [default: 32 in decode, 512 in prefill]
    #[arg(long, value_name = "N", value_parser = positive)]
    tokens: Option<usize>,
    /// Runs
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = positive)]
    repeat: usize,
    /// Tokens that the sequence has before
    #[arg(long, value_name = "N", default_value_t = 0)]
    depth: usize,
    #[command(flatten)]
    engine: EngineArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

impl Args {
    pub(super) fn json(&self) -> bool {
        match &self.command {
            Command::Decode(run) | Command::Prefill(run) => run.json,
        }
    }
}

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Decode,
    Prefill,
}

pub(super) fn run(args: &Args) -> Result<(), Error> {
    let (phase, run) = match &args.command {
        Command::Decode(run) => (Phase::Decode, run),
        Command::Prefill(run) => (Phase::Prefill, run),
    };
    let model = match &run.synthetic {
        Some(name) => Some(synthetic_dir(run, name)?),
        None => run.model.clone(),
    };
    let prepared = run.engine.prepare(model.as_deref())?;
    let tokens = run.tokens.unwrap_or(if phase == Phase::Decode { 32 } else { 512 });
    let needed = run.depth + tokens + if phase == Phase::Decode { WARM_UP[0] } else { 0 };
    if needed > prepared.plan.context {
        let message = format!("{needed} tokens exceed the context of {}: raise --ctx-size, or take fewer tokens", prepared.plan.context);
        return Err(Error::Input { code: "context-overflow", message });
    }
    match prepared.backend() {
        BackendKind::Cpu => {
            let cpu = prepared.cpu()?;
            let int8 = quantised(&prepared).then(|| mach_cpu::peak_gops(cpu.kernel_set(), cpu.threads())).flatten();
            measure(&prepared, cpu, phase, run, tokens, int8.map(|gops| gops * 1e9))
        }
        BackendKind::Reference => measure(&prepared, Arc::new(Reference), phase, run, tokens, None),
    }
}

/// Whether products are of int8 activations: the int8 ceiling applies.
fn quantised(prepared: &Prepared) -> bool {
    prepared.source.as_ref().is_some_and(|s| s.layout(0).down.format.is_quantised())
}

fn synthetic_dir(run: &Run, name: &str) -> Result<String, Error> {
    let mut shape = Shape::named(name).ok_or_else(|| Error::Usage(format!("there is no shape {name}")))?;
    if let Some(layers) = run.layers {
        shape = shape.cut(layers)?;
    }
    let cache = run.cache_dir.clone().unwrap_or_else(synthetic::default_cache);
    let bar = super::artifacts::bar();
    let dir = synthetic::pack(&shape, if run.bits == "8" { 8 } else { 4 }, &cache, &mut |done, all| {
        bar.set_length(all);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    Ok(dir?.to_string_lossy().into_owned())
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
struct Sample {
    seconds: f64,
    stats: ExpertStats,
    /// What every MoE layer of every pass found and missed.
    layers: Vec<LayerUse>,
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

fn measure<B: Backend>(prepared: &Prepared, backend: Arc<B>, phase: Phase, run: &Run, tokens: usize, int8: Option<f64>) -> Result<(), Error> {
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
    bench.feed(run.depth, bench.model.max_rows(), false, None)?;
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
    let samples = bench.runs(phase, tokens, run.repeat)?;
    let (slots, peak_rss) = (bench.model.slots(), system::peak_rss());
    drop(bench);
    // Ceilings are those of an undisturbed machine: the better of before and after, with the model out of the way.
    let after = ceilings(prepared, int8);
    let disk = match (before.disk, after.disk) {
        (Some(a), Some(b)) => Some(a.max(b)),
        (a, b) => a.or(b),
    };
    let ceilings = Ceilings { memory: before.memory.max(after.memory), disk, int8 };
    let report = Report { prepared, phase, run, tokens, samples, distinct, ceilings, slots, peak_rss, kernels };
    if run.json {
        output::json_line(&report.json())
    } else {
        output::print(&report.table())
    }
    Ok(())
}

/// Everything that was measured.
struct Report<'a> {
    prepared: &'a Prepared,
    phase: Phase,
    run: &'a Run,
    tokens: usize,
    samples: Vec<Sample>,
    distinct: Option<u64>,
    ceilings: Ceilings,
    slots: usize,
    peak_rss: Option<u64>,
    kernels: &'static str,
}

impl Report<'_> {
    fn streaming(&self) -> bool {
        self.prepared.plan.residency == Residency::Streaming
    }

    fn median(&self, of: impl Fn(&Sample) -> f64) -> f64 {
        spread(&self.samples.iter().map(of).collect::<Vec<_>>()).0
    }

    fn hit_rate(&self) -> Option<f64> {
        let (hits, misses) = self.samples.iter().fold((0, 0), |(h, m), s| (h + s.stats.hits, m + s.stats.misses));
        (self.streaming() && hits + misses > 0).then(|| hits as f64 / (hits + misses) as f64)
    }

    /// Bytes that one token takes from memory or drive: weights, recurrent states, keys and values.
    fn bytes_per_token(&self) -> f64 {
        let plan = &self.prepared.plan;
        match (self.phase, self.distinct) {
            (Phase::Prefill, distinct) => (plan.resident as f64 + distinct.unwrap_or(0) as f64 * plan.slot_bytes as f64) / self.tokens as f64,
            (Phase::Decode, _) => self.always() + plan.working_set as f64 * plan.slot_bytes as f64,
        }
    }

    /// Bytes of a decoded token beside the experts.
    fn always(&self) -> f64 {
        let plan = &self.prepared.plan;
        let depth = self.run.depth as f64 + self.tokens as f64 / 2.0;
        plan.resident as f64 + sequence_bytes(self.prepared.files.spec(), plan.kv_block as f64 / KV_BLOCK as f64, depth)
    }

    /// Tokens per second that the ceilings allow at this hit rate.
    fn limit(&self) -> (f64, Bound) {
        let (plan, spec) = (&self.prepared.plan, self.prepared.files.spec());
        let slot = plan.slot_bytes as f64;
        let runs = self.samples.len() as f64;
        let (seconds, bound) = match self.phase {
            Phase::Decode if self.streaming() => {
                let layers: Vec<LayerUse> = self.samples.iter().flat_map(|s| s.layers.iter().copied()).collect();
                let (seconds, bound) = decode_seconds(&self.ceilings, self.always() * runs * self.tokens as f64, slot, &layers);
                (seconds / runs, bound)
            }
            Phase::Decode => decode_seconds(&self.ceilings, self.bytes_per_token() * self.tokens as f64, slot, &[]),
            Phase::Prefill => {
                let operations = 2.0 * active_weights(spec, self.prepared.files.parameters()) as f64 * self.tokens as f64;
                prefill_seconds(&self.ceilings, operations, self.bytes_per_token() * self.tokens as f64, self.median(|s| s.stats.bytes_read as f64))
            }
        };
        (self.tokens as f64 / seconds, bound)
    }

    fn json(&self) -> Value {
        let (tok_s, spread) = spread(&self.samples.iter().map(|s| self.tokens as f64 / s.seconds).collect::<Vec<_>>());
        let (limit, bound) = self.limit();
        let plan = &self.prepared.plan;
        json!({
            "tok_s": tok_s, "spread": spread, "limit_tok_s": limit, "share_of_limit": tok_s / limit, "bound": bound.name(),
            "ceilings": {
                "memory_gb_s": self.ceilings.memory / 1e9, "disk_gb_s": self.ceilings.disk.map(|d| d / 1e9), "int8_gop_s": self.ceilings.int8.map(|i| i / 1e9),
            },
            "hit_rate": self.hit_rate(), "bytes_per_token": self.bytes_per_token().round(),
            "disk_bytes_per_token": (self.median(|s| s.stats.bytes_read as f64) / self.tokens as f64).round(),
            "disk_gb_s": self.median(|s| s.stats.bytes_read as f64 / s.seconds) / 1e9, "stall_share": self.median(|s| s.stats.stall.as_secs_f64() / s.seconds),
            "distinct_experts": self.distinct, "peak_rss": self.peak_rss, "cpu": system::cpu_name(), "kernels": self.kernels, "threads": self.prepared.threads(),
            "model": self.prepared.path.name, "mode": self.prepared.mode(), "slots": self.slots, "experts": plan.experts, "resident_bytes": plan.resident,
            "tokens": self.tokens, "repeat": self.samples.len(), "depth": self.run.depth,
        })
    }

    fn table(&self) -> String {
        let facts = self.json();
        let number = |key: &str| facts[key].as_f64().unwrap_or(0.0);
        let gb = |bytes: f64| bytes / 1e9;
        let what = if self.phase == Phase::Decode { "decode" } else { "prefill" };
        let Ceilings { memory, disk, int8 } = self.ceilings;
        let plan = &self.prepared.plan;
        let mut lines = vec![
            ("model", format!("{}, {}", self.prepared.path.name, self.prepared.mode())),
            (what, format!("{} tokens at a depth of {}, {} runs", self.tokens, self.run.depth, self.samples.len())),
            (
                "speed",
                format!(
                    "{:.2} tok/s ({:.2} to {:.2})",
                    number("tok_s"),
                    facts["spread"][0].as_f64().unwrap_or(0.0),
                    facts["spread"][1].as_f64().unwrap_or(0.0)
                ),
            ),
            ("limit", format!("{:.2} tok/s by {}: {:.0} % reached", number("limit_tok_s"), self.limit().1.name(), 100.0 * number("share_of_limit"))),
            ("ceilings", {
                let disk = disk.map(|d| format!(", drive {:.2} GB/s", gb(d))).unwrap_or_default();
                format!("memory {:.1} GB/s{disk}{}", gb(memory), int8.map(|i| format!(", int8 {:.0} Gop/s", i / 1e9)).unwrap_or_default())
            }),
            ("bytes per token", format!("{}, {} of them from the drive", size(number("bytes_per_token") as u64), size(number("disk_bytes_per_token") as u64))),
        ];
        if let Some(rate) = self.hit_rate() {
            let drive = format!("drive {:.2} GB/s, stalled {:.0} % of the time", number("disk_gb_s"), 100.0 * number("stall_share"));
            lines.push(("experts", format!("{} of {} in the bank, hit rate {:.1} %, {drive}", self.slots, plan.experts, 100.0 * rate)));
        }
        if let Some(distinct) = self.distinct {
            lines.push(("distinct", format!("{distinct} of {} experts", plan.experts)));
        }
        lines.push(("peak memory", self.peak_rss.map_or_else(|| "unknown".to_owned(), size)));
        lines.push(("processor", format!("{}, {} threads, {}", system::cpu_name(), self.prepared.threads(), self.kernels)));
        lines.into_iter().map(|(name, value)| format!("{name:<16} {value}\n")).collect()
    }
}
