//! `mach pull`: a checkpoint from the Hugging Face hub.

use serde_json::json;

use super::artifacts::bar;
use super::output::{self, size};
use crate::hub::{Hub, PullEvent, PullRequest};
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
    let (bar, began) = (bar(), std::time::Instant::now());
    let pulled = Hub::from_env().pull(&request, &|event| match event {
        PullEvent::Total(bytes) => bar.set_length(bytes),
        PullEvent::Done(bytes) if bytes < 0 => bar.dec(bytes.unsigned_abs()),
        PullEvent::Done(bytes) => bar.inc(bytes.unsigned_abs()),
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
    // The short name does for what its lookup finds.
    let name = if locate(Some(repo)).is_ok_and(|found| found.dir == pulled.path) { repo.to_owned() } else { pulled.path.display().to_string() };
    eprintln!("to see how it would run here: mach check {name}");
    Ok(())
}

fn is_revision(text: &str) -> bool {
    let word = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    !text.is_empty() && text.split('/').all(|part| !matches!(part, "" | "." | "..") && part.chars().all(word))
}
