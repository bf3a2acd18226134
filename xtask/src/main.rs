//! Developer commands: `cargo xtask goldens`, `cargo xtask compare`.

mod compare;
mod goldens;

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Developer commands of mach")]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Make the tiny checkpoints and reference outputs that tests compare with (needs Python with transformers,
    /// installed into .cache/venv on the first run; MACH_PYTHON names another interpreter).
    Goldens(goldens::Args),
    /// Measure mach and llama.cpp in turns on one GGUF file of random weights.
    Compare(compare::Args),
}

fn main() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("xtask lies in the workspace")?;
    match Cli::parse().command {
        Task::Goldens(args) => goldens::goldens(root, args),
        Task::Compare(args) => compare::compare(root, &args),
    }
}

fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot start {command:?}"))?;
    if !status.success() {
        bail!("{command:?} ended with {status}");
    }
    Ok(())
}
