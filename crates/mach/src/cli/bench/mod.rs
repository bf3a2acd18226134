//! `mach bench`: speed, beside what the machine's ceilings measured in the same run would allow.

mod model;
mod report;
mod run;

use super::args::positive;
use crate::Error;
use model::ModelArgs;
use run::Phase;

#[derive(clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// One token at a time
    Decode(RunArgs),
    /// A prompt
    Prefill(RunArgs),
}

/// What is run, for the benches that compute tokens.
#[derive(clap::Args)]
struct RunArgs {
    #[command(flatten)]
    model: ModelArgs,
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
    engine: super::args::EngineArgs,
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

pub(super) fn run(args: &Args) -> Result<(), Error> {
    match &args.command {
        Command::Decode(args) => one(args, Phase::Decode),
        Command::Prefill(args) => one(args, Phase::Prefill),
    }
}

/// One model, one phase.
fn one(args: &RunArgs, phase: Phase) -> Result<(), Error> {
    let model = args.model.dir()?;
    let prepared = args.engine.prepare(model.as_deref())?;
    let work = run::Work { phase, tokens: args.tokens.unwrap_or(phase.default_tokens()), repeat: args.repeat, depth: args.depth };
    let report = report::Report { prepared: &prepared, work, measured: run::measure(&prepared, &work)? };
    if args.json {
        super::output::json_line(&report.json());
    } else {
        super::output::print(&report.table());
    }
    Ok(())
}
