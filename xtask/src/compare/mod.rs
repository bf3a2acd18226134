//! `cargo xtask compare`: mach and llama.cpp (or a fork of it) in turns on the same GGUF file, as ratios.

mod build;
mod limit;
mod peer;
mod report;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use limit::{MemoryLimit, ReadAhead};
use peer::{Peer, Setting};
use report::{Report, Row};

#[derive(clap::Args)]
pub struct Args {
    /// Shape of the random weights, as `mach bench --synthetic` takes it.
    #[arg(long, required_unless_present = "gguf")]
    shape: Option<String>,
    /// Only the first N layers of the shape.
    #[arg(long)]
    layers: Option<usize>,
    /// Block type of its weights, as `mach bench --quant` takes it.
    #[arg(long, default_value = "q4_k")]
    quant: String,
    /// A GGUF file instead of a shape.
    #[arg(long, conflicts_with_all = ["shape", "layers", "quant"])]
    gguf: Option<PathBuf>,
    /// Memory that either program may use, the page cache it fills included: 8GiB, 1300MiB. In a cgroup where one can be
    /// made, else by locking the rest of the memory.
    #[arg(long, value_parser = limit::parse_size)]
    memory_budget: Option<u64>,
    /// A llama-bench to compare with; may be given several times. Without it llama.cpp is built from the source package of
    /// llama-cpp-python.
    #[arg(long)]
    llama_bench: Vec<PathBuf>,
    /// Read-ahead of all drives while the peers run, in KiB; put back afterwards.
    #[arg(long)]
    read_ahead_kb: Option<u32>,
    /// Bits of mach's activations; its peers have 8
    #[arg(long, default_value = "16", value_parser = ["8", "16"])]
    activation_bits: String,
    /// Rounds; in each, every program runs once.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Tokens of a decode.
    #[arg(long, default_value_t = 64)]
    tokens: usize,
    /// What is compared.
    #[arg(long, value_delimiter = ',', default_values_t = ["decode".to_owned(), "prefill_512".to_owned(), "prefill_2048".to_owned()], value_parser = ["decode", "prefill_512", "prefill_2048"])]
    phases: Vec<String>,
    /// Where models and peers are kept [default: compare in the target folder].
    #[arg(long)]
    cache_dir: Option<PathBuf>,
    /// The program [default: built by cargo].
    #[arg(long)]
    mach: Option<PathBuf>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Tokens of one measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Decode(usize),
    Prefill(usize),
}

impl Phase {
    fn named(name: &str, decode: usize) -> Self {
        match name {
            "prefill_512" => Self::Prefill(512),
            "prefill_2048" => Self::Prefill(2048),
            _ => Self::Decode(decode),
        }
    }
}

pub fn compare(root: &Path, args: &Args) -> Result<()> {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    let cache = args.cache_dir.clone().unwrap_or_else(|| target.join("compare"));
    let mach = match &args.mach {
        Some(path) => path.clone(),
        None => {
            crate::run(Command::new("cargo").current_dir(root).args(["build", "--release", "--package", "mach", "--bin", "mach"]))?;
            target.join("release/mach")
        }
    };
    let benches = if args.llama_bench.is_empty() { build::llama_cpp(&cache)? } else { args.llama_bench.clone() };
    let peers: Vec<Peer> = benches.into_iter().map(Peer::open).collect::<Result<_>>()?;
    let model = model(&mach, args, &cache)?;
    let _read_ahead = args.read_ahead_kb.map(ReadAhead::set).transpose()?;
    let limit = args.memory_budget.map(MemoryLimit::new).transpose()?;
    let run = Runner { mach: &mach, model: &model, limit: limit.as_ref(), budget: args.memory_budget, activation_bits: &args.activation_bits };

    let mut report = Report::new(&model, limit.as_ref().map(MemoryLimit::kind));
    for name in &args.phases {
        let phase = Phase::named(name, args.tokens);
        let settings: Vec<(&Peer, Setting)> = peers.iter().filter_map(|p| run.fastest(p, phase).map(|s| (p, s))).collect();
        if settings.is_empty() {
            bail!("no peer completes {name}");
        }
        let mut row = Row::new(name, settings.iter().map(|(p, s)| (p.path().display().to_string(), s.to_string())).collect());
        for round in 0..args.rounds {
            row.mach.push(run.mach(phase)?);
            for (i, (peer, setting)) in settings.iter().enumerate() {
                row.peers[i].rates.extend(run.peer(peer, setting, phase));
            }
            eprintln!("{name}, round {} of {}: {row}", round + 1, args.rounds);
        }
        report.rows.push(row);
    }
    if args.json {
        println!("{}", report.json()?)
    } else {
        print!("{}", report.table()?)
    }
    Ok(())
}

/// The GGUF file; a synthetic one is written by mach where it is not there yet.
fn model(mach: &Path, args: &Args, cache: &Path) -> Result<PathBuf> {
    if let Some(path) = &args.gguf {
        return Ok(path.clone());
    }
    let mut make = Command::new(mach);
    make.args(["bench", "decode", "--format", "gguf", "--tokens", "1", "--repeat", "1", "--json", "--cache-dir"]).arg(cache);
    make.args(args.shape.iter().flat_map(|s| ["--synthetic", s]));
    make.args(["--quant", &args.quant]);
    make.args(args.layers.iter().flat_map(|n| ["--layers".to_owned(), n.to_string()]));
    let facts: Value = serde_json::from_slice(&output(&mut make)?).context("mach bench printed no JSON")?;
    let name = facts["model"].as_str().context("mach bench named no model")?;
    let path = cache.join("synthetic").join(format!("{name}.gguf"));
    if !path.is_file() {
        bail!("mach bench wrote no {}", path.display());
    }
    Ok(path)
}

/// What every run has in common.
struct Runner<'a> {
    mach: &'a Path,
    model: &'a Path,
    limit: Option<&'a MemoryLimit>,
    budget: Option<u64>,
    activation_bits: &'a str,
}

impl Runner<'_> {
    fn command(&self, program: &Path) -> Result<Command> {
        Ok(match self.limit {
            Some(limit) => {
                limit::forget(self.model)?;
                limit.command(program)
            }
            None => Command::new(program),
        })
    }

    /// Tokens per second of one run of mach.
    fn mach(&self, phase: Phase) -> Result<f64> {
        let mut run = self.command(self.mach)?;
        let (name, tokens) = match phase {
            Phase::Decode(n) => ("decode", n),
            Phase::Prefill(n) => ("prefill", n),
        };
        run.args(["bench", name, "--json", "--repeat", "1", "--tokens", &tokens.to_string(), "--activation-bits", self.activation_bits, "--model"])
            .arg(self.model);
        run.args(self.budget.iter().flat_map(|b| ["--memory-budget".to_owned(), b.to_string()]));
        report::mach_rate(&output(&mut run)?)
    }

    /// Tokens per second of one run of a peer; `None` when it does not complete.
    fn peer(&self, peer: &Peer, setting: &Setting, phase: Phase) -> Option<f64> {
        let rate = self.command(peer.path()).and_then(|mut run| {
            run.args(peer.arguments(setting, self.model, phase));
            peer::rate(&output(&mut run)?)
        });
        match rate {
            Ok(rate) => Some(rate),
            Err(error) => {
                eprintln!("{} {setting}: {error:#}", peer.path().display());
                None
            }
        }
    }

    /// The peer's fastest setting that completes.
    fn fastest(&self, peer: &Peer, phase: Phase) -> Option<Setting> {
        let tried = peer.settings(phase).into_iter().filter_map(|s| {
            let rate = self.peer(peer, &s, phase)?;
            eprintln!("{} {s}: {rate:.2} tok/s", peer.path().display());
            Some((s, rate))
        });
        tried.max_by(|a, b| a.1.total_cmp(&b.1)).map(|(s, _)| s)
    }
}

/// What a program prints; an error when it fails.
fn output(command: &mut Command) -> Result<Vec<u8>> {
    let out = command.stdin(Stdio::null()).output().with_context(|| format!("cannot start {command:?}"))?;
    if !out.status.success() {
        let lines = String::from_utf8_lossy(&out.stderr);
        bail!("{command:?} ended with {}: {}", out.status, lines.lines().last().unwrap_or_default());
    }
    Ok(out.stdout)
}
