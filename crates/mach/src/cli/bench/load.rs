//! `mach bench load`: from a model's name to the first token of a short prompt, everything read from the drive.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use mach_backend::{Backend, Reference};
use mach_experts::AheadStats;
use mach_models::RouteLog;

use super::report::Report;
use super::run::{Bench, Measured, Phase, Sample, Work, better, ceilings, distinct, fits, int8_peak};
use super::{Routing, Setup};
use crate::cli::args::positive;
use crate::cli::output::ProgressLine;
use crate::load::prepare_at;
use crate::text::open_text;
use crate::{BackendKind, Error, Prepared, locate, system};

#[derive(clap::Args)]
pub(super) struct Args {
    /// Tokens of the prompt
    #[arg(long, value_name = "N", default_value_t = Phase::Load.default_tokens(), value_parser = positive)]
    tokens: usize,
    #[command(flatten)]
    setup: Setup,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

pub(super) fn run(args: &Args) -> Result<(), Error> {
    let model = args.setup.model.dir()?;
    let prepared = args.setup.engine.prepare(model.as_deref())?;
    fits(&prepared, args.tokens)?;
    let int8 = match prepared.backend() {
        BackendKind::Cpu => int8_peak(&prepared, &*prepared.cpu()?),
        BackendKind::Reference => None,
    };
    let probe = args.setup.probe.time();
    let before = ceilings(&prepared, int8, probe)?;
    system::forget_peak();
    let mut starts = Vec::with_capacity(args.setup.repeat);
    let mut progress = ProgressLine::new();
    for i in 0..args.setup.repeat {
        forget(&prepared.path.dir);
        forget(&prepared.sidecar_dir());
        starts.push(start(args, model.as_deref())?);
        progress.show(|| format!("start {} of {}: {:.2} s", i + 1, args.setup.repeat, starts[i].sample.seconds));
    }
    progress.end(None);
    let peak_rss = system::peak_rss();
    let ceilings = better(&before, &ceilings(&prepared, int8, probe)?);
    let work = Work { phase: Phase::Load, tokens: args.tokens, repeat: args.setup.repeat, depth: 0, warm_up: None, routing: args.setup.routing.routing, probe };
    let Some(last) = starts.last() else { return Ok(()) };
    let (distinct, ahead, slots, kernels) = (Some(last.distinct), last.ahead, last.slots, last.kernels);
    let samples = starts.into_iter().map(|s| s.sample).collect();
    let measured = Measured { samples, earlier: Default::default(), distinct, ceilings, ahead, slots, peak_rss, kernels };
    Report { prepared: &prepared, work, measured }.print(args.json);
    Ok(())
}

/// Drops a file, or a folder's files, from the page cache.
fn forget(path: &Path) {
    if path.is_dir() {
        return std::fs::read_dir(path).into_iter().flatten().flatten().for_each(|entry| forget(&entry.path()));
    }
    // A file that cannot be opened now is told by name when the model is loaded.
    if let Ok(file) = std::fs::File::open(path) {
        mach_format::forget_pages(&file, 0, None);
    }
}

/// One start.
struct Start {
    sample: Sample,
    distinct: u64,
    ahead: AheadStats,
    slots: usize,
    kernels: &'static str,
}

/// What `mach generate` does from its start to the first token.
fn start(args: &Args, model: Option<&str>) -> Result<Start, Error> {
    let began = Instant::now();
    let prepared = prepare_at(locate(model)?, &args.setup.engine.options(), system::available_memory())?;
    open_text(&prepared.path.dir)?;
    prepared.estimate();
    match prepared.backend() {
        BackendKind::Cpu => first_token(&prepared, prepared.cpu()?, args.tokens, args.setup.routing.routing, began),
        BackendKind::Reference => first_token(&prepared, Arc::new(Reference), args.tokens, args.setup.routing.routing, began),
    }
}

fn first_token<B: Backend>(prepared: &Prepared, backend: Arc<B>, tokens: usize, routing: Routing, began: Instant) -> Result<Start, Error> {
    let kernels = backend.kernels();
    let mut bench = Bench::new(prepared.load(backend, &mut |_, _, _| {})?, routing);
    let mut log = RouteLog::default();
    let prompt = bench.feed(tokens, bench.model.max_rows(), true, Some(&mut log))?;
    let sample = Sample { seconds: began.elapsed().as_secs_f64(), ..prompt };
    Ok(Start { sample, distinct: distinct(&log), ahead: bench.model.ahead_stats(), slots: bench.model.slots(), kernels })
}
