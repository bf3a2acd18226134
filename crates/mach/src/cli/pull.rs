//! `mach pull`: a checkpoint from the Hugging Face hub, or the pack that is made of it while it comes.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use indicatif::MultiProgress;
use serde_json::json;

use super::artifacts::{Quantise, bar};
use super::output::{self, size};
use crate::hub::{Hub, PackRequest, PullEvent, PullRequest, PulledPack};
use crate::{Error, locate};

#[derive(clap::Args)]
pub(super) struct Args {
    /// org/name, or org/name@REVISION (a branch, a tag or a commit)
    #[arg(value_name = "REPO[@REV]")]
    repo: String,
    /// Only weight files that match this pattern (*, ?), for repositories with several models; may be given several times
    #[arg(long, value_name = "PATTERN")]
    include: Vec<String>,
    /// Files to download at a time
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=32))]
    jobs: u8,
    /// Write a pack while shards arrive, and remove each shard when it is used up: the disk holds the pack and a few shards
    #[arg(long, conflicts_with = "include")]
    pack: bool,
    /// With --pack: shards on the disk at a time; more where a layer lies in more
    #[arg(long, value_name = "N", default_value_t = 2, requires = "pack", value_parser = clap::value_parser!(u8).range(1..=64))]
    shards_in_flight: u8,
    /// With --pack: write it into this folder [default: one in the cache, which org/name then stands for]
    #[arg(long, value_name = "DIR", requires = "pack")]
    out: Option<PathBuf>,
    #[command(flatten)]
    quantise: Quantise,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

pub(super) fn run(args: &Args) -> Result<(), Error> {
    let (repo, revision) = args.repo.split_once('@').unwrap_or((&args.repo, "main"));
    if !crate::locate::is_repo_name(repo) || !is_revision(revision) {
        return Err(Error::Usage(format!("{:?} is no repository; it looks like Qwen/Qwen3.6-35B-A3B or Qwen/Qwen3.6-35B-A3B@main", args.repo)));
    }
    let request = PullRequest { repo: repo.to_owned(), revision: revision.to_owned(), include: args.include.clone(), jobs: usize::from(args.jobs) };
    let bits = args.quantise.bits()?;
    if args.pack {
        let pack = PackRequest { bits, shards_in_flight: usize::from(args.shards_in_flight), out: args.out.clone() };
        return run_pack(&request, &pack, args.json);
    }
    if bits.is_some() {
        return Err(Error::Usage("--bits quantises what is packed: add --pack".to_owned()));
    }
    let (bar, began) = (bar(), Instant::now());
    let pulled = Hub::from_env().pull(&request, &|event| match event {
        PullEvent::Total(bytes) => bar.set_length(bytes),
        PullEvent::Done(bytes) if bytes < 0 => bar.dec(bytes.unsigned_abs()),
        PullEvent::Done(bytes) => bar.inc(bytes.unsigned_abs()),
        PullEvent::PackTotal(_) | PullEvent::Packed(_) | PullEvent::Note(..) => {}
    });
    bar.finish_and_clear();
    let pulled = pulled?;
    let seconds = began.elapsed().as_secs_f64();
    if args.json {
        output::json_line(&json!({
            "repo": repo, "revision": revision, "commit": pulled.commit, "path": pulled.path, "files": pulled.files, "bytes": pulled.bytes,
            "downloaded_bytes": pulled.downloaded, "seconds": seconds,
        }));
        return Ok(());
    }
    let came = match pulled.downloaded {
        0 => "all of it was there".to_owned(),
        n => format!("{} of {} downloaded in {}", size(n), size(pulled.bytes), output::seconds(seconds)),
    };
    output::line(&format!("{}: {came}", pulled.path.display()));
    advise(repo, &pulled.path);
    Ok(())
}

fn run_pack(request: &PullRequest, pack: &PackRequest, as_json: bool) -> Result<(), Error> {
    let (bars, began, notes) = (MultiProgress::new(), Instant::now(), Mutex::new(Vec::new()));
    let [download, packed] = ["download ", "pack     "].map(|what| bars.add(bar().with_prefix(what)));
    let pulled = Hub::from_env().pull_pack(request, pack, &|event| match event {
        PullEvent::Total(bytes) => download.set_length(bytes),
        PullEvent::Done(bytes) if bytes < 0 => download.dec(bytes.unsigned_abs()),
        PullEvent::Done(bytes) => download.inc(bytes.unsigned_abs()),
        PullEvent::PackTotal(bytes) => packed.set_length(bytes),
        PullEvent::Packed(bytes) => packed.inc(bytes),
        PullEvent::Note(code, message) => {
            bars.suspend(|| eprintln!("note[{code}]: {message}"));
            notes.lock().unwrap_or_else(PoisonError::into_inner).push(json!({"code": code, "message": message}));
        }
    });
    [download, packed].iter().for_each(indicatif::ProgressBar::finish_and_clear);
    let PulledPack { path, commit, shards, in_flight, downloaded, report } = pulled?;
    let seconds = began.elapsed().as_secs_f64();
    let [experts, residents] = report.as_ref().map_or([None; 2], |r| [r.manifest.bytes(), r.resident_bytes].map(Some));
    if as_json {
        let (bits, group) = pack.bits.unzip();
        let layers = |count: fn(&mach_format::BuildReport) -> usize| report.as_ref().map_or(0, count);
        output::json_line(&json!({
            "repo": request.repo, "revision": request.revision, "commit": commit, "path": path, "kind": "pack", "bits": bits, "group_size": group,
            "layers_written": layers(|r| r.written), "layers_kept": layers(|r| r.kept), "experts_bytes": experts, "resident_bytes": residents,
            "downloaded_bytes": downloaded, "shards": shards, "shards_in_flight": in_flight,
            "notes": notes.into_inner().unwrap_or_else(PoisonError::into_inner), "seconds": seconds,
        }));
        return Ok(());
    }
    let what = match (experts, residents) {
        (Some(experts), Some(residents)) => {
            let [experts, residents, came] = [experts, residents, downloaded].map(size);
            format!("{experts} of experts, {residents} of other weights, of {came} downloaded in {}", output::seconds(seconds))
        }
        _ => "all of it was there".to_owned(),
    };
    output::line(&format!("{}: {what}", path.display()));
    advise(&request.repo, &path);
    Ok(())
}

/// The short name does for what its lookup finds.
fn advise(repo: &str, path: &Path) {
    let name = if locate(Some(repo)).is_ok_and(|found| found.dir == path) { repo.to_owned() } else { path.display().to_string() };
    eprintln!("to see how it would run here: mach check {name}");
}

fn is_revision(text: &str) -> bool {
    let word = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    !text.is_empty() && text.split('/').all(|part| !matches!(part, "" | "." | "..") && part.chars().all(word))
}
