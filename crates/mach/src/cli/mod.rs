//! The `mach` command. Facts go to stdout, progress and diagnostics to stderr.

mod archs;
mod args;
mod artifacts;
mod bench;
mod chat;
mod check;
mod completions;
mod eval;
mod generate;
mod list;
mod output;
mod pull;
mod serve;
mod tokenize;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::Error;

/// Runs Mixture-of-Experts models that are larger than memory.
#[derive(Parser)]
#[command(name = "mach", version, propagate_version = true, max_term_width = 110, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "Examples:
  mach generate \"What is the capital of France?\"       the built-in model answers
  mach chat --model ~/models/Qwen3.6-35B-A3B-4bit        talk to a model
  mach serve ~/models/Qwen3.6-35B-A3B-4bit --port 8080   OpenAI API on http://127.0.0.1:8080/v1
  mach pull Qwen/Qwen3.6-35B-A3B                         download a checkpoint
  mach pull Qwen/Qwen3.6-35B-A3B --pack --bits 4         make a pack of it while it comes, where the disk is too small for both
  mach check Qwen/Qwen3.6-35B-A3B                        does it fit, and how would it run
  mach artifacts build ~/models/Qwen3.6-35B-A3B --bits 4 --out ~/models/qwen-pack";

#[derive(Subcommand)]
enum Command {
    /// Answer one prompt
    Generate(generate::Args),
    /// Talk to a model
    Chat(chat::Args),
    /// Serve the OpenAI API over HTTP
    Serve(serve::Args),
    /// Say whether and how a model would run here
    Check(check::Args),
    /// List the families that mach runs
    Archs(archs::Args),
    /// List the checkpoints on this machine
    Models(list::Args),
    /// Download a checkpoint from the Hugging Face hub into its cache
    Pull(pull::Args),
    /// Build, verify and describe expert sidecars and packs
    Artifacts(artifacts::Args),
    /// Measure speed
    Bench(bench::Args),
    /// Perplexity of a token sequence, and agreement with reference logits
    Eval(eval::Args),
    /// Show the prompt and token ids of a text or a conversation
    Tokenize(tokenize::Args),
    /// Print shell completions
    Completions(completions::Args),
}

impl Command {
    fn json(&self) -> bool {
        match self {
            Self::Generate(a) => a.json,
            Self::Chat(_) | Self::Completions(_) | Self::Serve(_) => false,
            Self::Check(a) => a.json,
            Self::Archs(a) => a.json,
            Self::Models(a) => a.json,
            Self::Pull(a) => a.json,
            Self::Artifacts(a) => a.json(),
            Self::Bench(a) => a.json(),
            Self::Eval(a) => a.json,
            Self::Tokenize(a) => a.json,
        }
    }

    fn run(self) -> Result<(), Error> {
        match self {
            Self::Generate(a) => generate::run(a),
            Self::Chat(a) => chat::run(a),
            Self::Serve(a) => serve::run(a),
            Self::Check(a) => check::run(&a),
            Self::Archs(a) => archs::run(&a),
            Self::Models(a) => list::run(&a),
            Self::Pull(a) => pull::run(&a),
            Self::Artifacts(a) => artifacts::run(a),
            Self::Bench(a) => bench::run(&a),
            Self::Eval(a) => eval::run(&a),
            Self::Tokenize(a) => tokenize::run(&a),
            Self::Completions(a) => completions::run(&a),
        }
    }
}

/// The command line as clap knows it.
pub fn command() -> clap::Command {
    <Cli as clap::CommandFactory>::command()
}

/// Runs the command; `command` is the subcommand that the program's own name stands for.
pub fn main(command: Option<&str>) -> ExitCode {
    let mut words: Vec<std::ffi::OsString> = std::env::args_os().collect();
    if let Some(command) = command {
        words.insert(1, command.into());
    }
    let cli = match Cli::try_parse_from(words) {
        Ok(cli) => cli,
        Err(e) => return output::usage(&e),
    };
    let json = cli.command.json();
    // A bug must not look like a crash: one line, and the place for those who report it.
    std::panic::set_hook(Box::new(|info| {
        let place = info.location().map(|l| format!("{}:{}", l.file(), l.line())).unwrap_or_default();
        eprintln!("error[internal]: a bug in mach at {place}; please report it with the command that you ran");
    }));
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| cli.command.run())) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) => output::fail(&error, json),
        Err(_) => ExitCode::FAILURE,
    }
}

#[cfg(test)]
mod tests {
    /// Protects the command line from contradictory definitions, which clap finds only when it runs.
    #[test]
    fn the_command_line_is_consistent() {
        super::command().debug_assert();
    }
}
