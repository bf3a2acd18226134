//! `mach bench io`: what the drive gives for every way of reading experts.

use mach_format::ReadMode;
use serde_json::json;

use super::ProbeArgs;
use super::model::ModelArgs;
use crate::cli::args::EngineArgs;
use crate::cli::output::{self, ProgressLine, size};
use crate::drive::{DEPTHS, Drive, Point};
use crate::limits::spread;
use crate::{Error, LoadOptions, system};

#[derive(clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Times that every point is measured
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = crate::cli::args::positive)]
    repeat: usize,
    #[command(flatten)]
    probe: ProbeArgs,
    /// Expert sidecar elsewhere than beside the checkpoint
    #[arg(long, value_name = "DIR", env = "MACH_SIDECAR")]
    sidecar: Option<std::path::PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

const fn name(mode: ReadMode) -> &'static str {
    match mode {
        ReadMode::Direct => "direct",
        ReadMode::Buffered => "buffered",
    }
}

pub(super) fn run(args: &Args) -> Result<(), Error> {
    let model = args.model.dir()?;
    let prepared = EngineArgs::prepare_with(model.as_deref(), &LoadOptions { sidecar: args.sidecar.clone(), ..LoadOptions::default() })?;
    let no_experts = || Error::Input { code: "no-experts", message: format!("{} has no routed experts to read", prepared.path.name) };
    let drive = Drive::open(&prepared)?.ok_or_else(no_experts)?;
    let points = drive.points(&[ReadMode::Direct, ReadMode::Buffered]);
    let mut rates: Vec<Vec<f64>> = vec![Vec::new(); points.len()];
    let mut progress = ProgressLine::new();
    for round in 0..args.repeat {
        for (i, point) in points.iter().enumerate() {
            progress.show(|| format!("round {} of {}: {} at a depth of {}, {}", round + 1, args.repeat, point.name, point.depth, name(point.mode)));
            let read_failed = || Error::Input { code: "expert-read", message: format!("the expert files of {} cannot be read", prepared.path.dir.display()) };
            rates[i].push(drive.rate(point, args.probe.time()).ok_or_else(read_failed)? / 1e9);
        }
    }
    progress.end(None);
    drive.forget();
    let rows: Vec<(Point, f64, [f64; 2])> = points.iter().zip(&rates).map(|(&p, r)| (p, spread(r).0, spread(r).1)).collect();
    // As the ceilings elsewhere: past the page cache, where the file system can.
    let mode = rows.first().map_or(ReadMode::Direct, |r| r.0.mode);
    let best = rows.iter().filter(|r| r.0.mode == mode).max_by(|a, b| a.1.total_cmp(&b.1).then(b.0.depth.cmp(&a.0.depth)));
    if args.json {
        let row = |(p, gb_s, spread): &(Point, f64, [f64; 2])| {
            let ms = p.bytes as f64 * p.depth as f64 / (gb_s * 1e6).max(1e-9);
            json!({"read": p.name, "bytes": p.bytes, "depth": p.depth, "mode": name(p.mode), "gb_s": gb_s, "spread": spread, "latency_ms": ms})
        };
        output::json_line(&json!({
            "best": best.map(row), "points": rows.iter().map(row).collect::<Vec<_>>(), "model": prepared.path.name, "cpu": system::cpu_name(),
        }));
        return Ok(());
    }
    output::line(&format!("GB/s of random reads in the expert files of {}, reads under way across", prepared.path.name));
    output::line(&format!("{:<10} {:<10} {:>10} {}", "mode", "read", "bytes", DEPTHS.map(|d| format!("{d:>7}")).concat()));
    for line in rows.chunks(DEPTHS.len()) {
        let (first, cells) = (line[0].0, line.iter().map(|r| format!("{:>7.2}", r.1)).collect::<String>());
        output::line(&format!("{:<10} {:<10} {:>10} {cells}", name(first.mode), first.name, size(first.bytes as u64)));
    }
    if let Some((p, gb_s, _)) = best {
        output::line(&format!("best: {gb_s:.2} GB/s, {} reads of {} ({}) under way, {}", p.depth, size(p.bytes as u64), p.name, name(p.mode)));
    }
    Ok(())
}
