//! `mach artifacts`: expert sidecars and packs.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use indicatif::{ProgressBar, ProgressStyle};
use mach_format::{BuildProgress, BuildReport, SIDECAR_DIR, free_space, sidecar, write_pack, write_sidecar};
use mach_models::{Resolved, open_checkpoint};
use serde_json::json;

use super::output::{self, size};
use crate::text::write_text_files;
use crate::{Error, locate};

#[derive(clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Write the expert sidecar beside a checkpoint, or with --out a self-contained pack
    Build(Build),
    /// Read everything and check it against its checksums
    Verify(Target),
    /// Describe a sidecar or pack
    Info(Target),
}

#[derive(clap::Args)]
struct Build {
    /// Model directory, or org/name in the Hugging Face cache
    model: String,
    /// Write a pack (config, tokenizer, weights, sidecar) into this folder instead
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    #[command(flatten)]
    quantise: Quantise,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What experts and large linears are quantised to.
#[derive(clap::Args)]
pub(super) struct Quantise {
    /// Quantise to this many bits [default: keep the source's format]
    #[arg(long, value_name = "4|8", value_parser = clap::value_parser!(u8).range(4..=8))]
    bits: Option<u8>,
    /// Values that share a scale: 32, 64 or 128
    #[arg(long, value_name = "N", default_value_t = 64, requires = "bits")]
    group_size: u16,
}

impl Quantise {
    /// Bits and values of a group.
    pub(super) fn bits(&self) -> Result<Option<(u8, u16)>, Error> {
        if !matches!(self.bits, None | Some(4 | 8)) || ![32, 64, 128].contains(&self.group_size) {
            return Err(Error::Usage("--bits is 4 or 8, --group-size 32, 64 or 128".to_owned()));
        }
        Ok(self.bits.map(|bits| (bits, self.group_size)))
    }
}

#[derive(clap::Args)]
struct Target {
    /// Model directory with a sidecar, pack, or sidecar folder
    model: String,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

impl Args {
    pub(super) fn json(&self) -> bool {
        match &self.command {
            Command::Build(b) => b.json,
            Command::Verify(t) | Command::Info(t) => t.json,
        }
    }
}

pub(super) fn run(args: Args) -> Result<(), Error> {
    match args.command {
        Command::Build(b) => build(&b),
        Command::Verify(t) => verify(&t),
        Command::Info(t) => info(&t),
    }
}

fn build(args: &Build) -> Result<(), Error> {
    let bits = args.quantise.bits()?;
    let path = locate(Some(&args.model))?;
    let files = Resolved::open(Arc::new(open_checkpoint(&path.dir)?))?;
    let plan = files.pack_plan(bits)?;
    let target = args.out.clone().unwrap_or_else(|| files.checkpoint().sidecar_dir());
    let bar = bar();
    let began = std::time::Instant::now();
    let progress = &mut |p: BuildProgress| {
        bar.set_length(p.total);
        bar.set_position(p.done);
    };
    let built: Result<BuildReport, _> = match &args.out {
        Some(out) => write_pack(files.checkpoint(), out, &plan, progress),
        None => write_sidecar(files.checkpoint(), &target, &plan, progress),
    };
    bar.finish_and_clear();
    let report = built?;
    if let (Some(out), true) = (&args.out, path.dir.is_file()) {
        write_text_files(&path.dir, out)?;
    }
    let experts = report.manifest.bytes();
    let seconds = began.elapsed().as_secs_f64();
    if args.json {
        output::json_line(&json!({
            "path": target, "kind": if args.out.is_some() { "pack" } else { "sidecar" }, "layers_written": report.written, "layers_kept": report.kept,
            "experts_bytes": experts, "resident_bytes": report.resident_bytes, "seconds": seconds,
        }));
    } else {
        let kept = if report.kept > 0 { format!(", {} layers kept from an earlier build", report.kept) } else { String::new() };
        output::line(&format!(
            "{}: {} of experts, {} of other weights, in {}{kept}",
            target.display(),
            size(experts),
            size(report.resident_bytes),
            output::seconds(seconds)
        ));
    }
    Ok(())
}

/// Progress in bytes.
pub(super) fn bar() -> ProgressBar {
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template("{prefix}{wide_bar} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left") {
        bar.set_style(style);
    }
    bar
}

/// The sidecar of a model, or the directory itself.
fn sidecar_dir(model: &str) -> Result<PathBuf, Error> {
    if Path::new(model).join("manifest.json").is_file() {
        return Ok(PathBuf::from(model));
    }
    Ok(open_checkpoint(&locate(Some(model))?.dir)?.sidecar_dir())
}

fn verify(args: &Target) -> Result<(), Error> {
    let dir = sidecar_dir(&args.model)?;
    let bar = bar();
    let report = sidecar::verify(&dir, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    let report = report?;
    // A sidecar beside a checkpoint must also be that checkpoint's own.
    let gguf = dir.with_extension("gguf");
    let beside = [
        dir.parent().filter(|p| p.join("config.json").is_file()),
        Some(gguf.as_path()).filter(|p| dir.extension().is_some_and(|e| e == SIDECAR_DIR) && p.is_file()),
    ];
    for model in beside.into_iter().flatten() {
        mach_format::Sidecar::open(&dir, &mach_format::fingerprint(&open_checkpoint(model)?)?)?;
    }
    if args.json {
        output::json_line(&json!({"path": dir, "valid": true, "layers": report.layers, "records": report.records, "bytes": report.bytes}));
    } else {
        output::line(&format!("{}: valid, {} experts in {} layers, {} read", dir.display(), report.records, report.layers, size(report.bytes)));
    }
    Ok(())
}

fn info(args: &Target) -> Result<(), Error> {
    let dir = sidecar_dir(&args.model)?;
    let manifest = sidecar::info(&dir)?;
    let bytes: u64 = manifest.layers.iter().map(|l| l.bytes).sum();
    let mut formats: Vec<String> = manifest.layers.iter().map(|l| l.gate_up.format.to_string()).collect();
    formats.dedup();
    if args.json {
        output::json_line(&json!({
            "path": dir, "version": manifest.version, "model_type": manifest.model_type, "experts": manifest.experts, "layers": manifest.layers.len(),
            "bytes": bytes, "formats": formats, "fingerprint": manifest.fingerprint, "record_bytes": manifest.layers.first().map(|l| l.part_bytes.iter().sum::<usize>()),
            "free_disk": free_space(&dir).ok(),
        }));
        return Ok(());
    }
    output::line(&format!("{}: sidecar of a {} model", dir.display(), manifest.model_type));
    output::line(&format!("  {} layers of {} experts, {}, {}", manifest.layers.len(), manifest.experts, formats.join(", "), size(bytes)));
    Ok(())
}
