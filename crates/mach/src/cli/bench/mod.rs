//! `mach bench`: speed, beside what the machine's ceilings measured in the same run would allow.

mod io;
mod kernels;
mod load;
mod model;
mod replay;
mod report;
mod run;
mod stream;

use std::time::Duration;

use clap::ValueEnum;
use mach_experts::trace::Recorder;

use super::args::{EngineArgs, TraceArgs, positive};
use crate::{Error, LoadOptions};
use model::ModelArgs;
use report::Report;
use run::{Phase, Work};

#[derive(clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// One token at a time
    Decode(OneArgs),
    /// A prompt
    Prefill(OneArgs),
    /// Decoding at several memory budgets, the model loaded anew for each
    Stream(stream::Args),
    /// Time from start to the first token, the model's files not in the page cache
    Load(load::Args),
    /// The drive: random reads of the expert files by size, reads under way, and mode
    Io(io::Args),
    /// Products of every kernel set and weight format, against bare loops
    Kernels(kernels::Args),
    /// What a recorded run would have been with other banks and policies
    Replay(replay::Args),
}

/// On what, and how often, for the benches that compute tokens.
#[derive(clap::Args)]
struct Setup {
    #[command(flatten)]
    model: ModelArgs,
    /// Runs
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = positive)]
    repeat: usize,
    #[command(flatten)]
    routing: RoutingArgs,
    #[command(flatten)]
    probe: ProbeArgs,
    #[command(flatten)]
    engine: EngineArgs,
}

/// What is run of a loaded model.
#[derive(clap::Args)]
struct RunArgs {
    #[command(flatten)]
    setup: Setup,
    /// Tokens of one run [default: 32 in decode, 512 in prefill]
    #[arg(long, value_name = "N", value_parser = positive)]
    tokens: Option<usize>,
    /// Tokens that the sequence has before
    #[arg(long, value_name = "N", default_value_t = 0)]
    depth: usize,
    /// Tokens decoded before a decode is timed [default: 8, and until the bank is full, at most 256]
    #[arg(long, value_name = "N")]
    warm_up: Option<usize>,
}

impl RunArgs {
    fn work(&self, phase: Phase) -> Work {
        let tokens = self.tokens.unwrap_or(phase.default_tokens());
        let Setup { repeat, routing, probe, .. } = &self.setup;
        Work { phase, tokens, repeat: *repeat, depth: self.depth, warm_up: self.warm_up, routing: routing.routing, probe: probe.time() }
    }
}

/// How the drive is measured.
#[derive(clap::Args, Clone, Copy)]
struct ProbeArgs {
    /// Milliseconds that every way of reading the drive is measured
    #[arg(long, value_name = "MS", default_value_t = 200, value_parser = clap::value_parser!(u64).range(1..))]
    time: u64,
}

impl ProbeArgs {
    const fn time(self) -> Duration {
        Duration::from_millis(self.time)
    }
}

#[derive(clap::Args)]
struct RoutingArgs {
    /// Which experts tokens take: what the router says (near uniform for random weights), or choices as trained models make them
    #[arg(long, value_enum, default_value_t)]
    routing: Routing,
}

/// Where a bench's expert choices come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Routing {
    /// The model's router
    #[default]
    Uniform,
    /// A fixed sequence with popular experts, and experts that the next token uses again
    Realistic,
}

impl Routing {
    const fn name(self) -> &'static str {
        match self {
            Self::Uniform => "uniform",
            Self::Realistic => "realistic",
        }
    }
}

#[derive(clap::Args)]
struct OneArgs {
    #[command(flatten)]
    run: RunArgs,
    #[command(flatten)]
    trace: TraceArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

impl Args {
    pub(super) fn json(&self) -> bool {
        match &self.command {
            Command::Decode(a) | Command::Prefill(a) => a.json,
            Command::Stream(a) => a.json,
            Command::Load(a) => a.json,
            Command::Io(a) => a.json,
            Command::Kernels(a) => a.json,
            Command::Replay(a) => a.json,
        }
    }
}

pub(super) fn run(args: &Args) -> Result<(), Error> {
    match &args.command {
        Command::Decode(args) => one(args, Phase::Decode),
        Command::Prefill(args) => one(args, Phase::Prefill),
        Command::Stream(args) => stream::run(args),
        Command::Load(args) => load::run(args),
        Command::Io(args) => io::run(args),
        Command::Kernels(args) => kernels::run(args),
        Command::Replay(args) => replay::run(args),
    }
}

/// One model, one phase.
fn one(args: &OneArgs, phase: Phase) -> Result<(), Error> {
    let trace = args.trace.start()?;
    let model = args.run.setup.model.dir()?;
    let prepared = EngineArgs::prepare_with(model.as_deref(), &LoadOptions { trace: trace.clone(), ..args.run.setup.engine.options() })?;
    let work = args.run.work(phase);
    let measured = run::measure(&prepared, &work, None)?;
    trace.as_ref().map_or(Ok(()), Recorder::finish)?;
    Report { prepared: &prepared, work, measured }.print(args.json);
    Ok(())
}
