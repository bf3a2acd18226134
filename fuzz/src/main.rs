//! `cargo run --release -p mach-fuzz -- TARGET SECONDS [SEED]`: damaged inputs until the time is over; one that fails is kept as a file.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use mach_fuzz::{Random, TARGETS, mutated};

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let names = TARGETS.map(|t| t.name).join(", ");
    let usage = format!("usage: mach-fuzz TARGET SECONDS [SEED]; targets: {names}");
    let (name, seconds) = args.first().zip(args.get(1)).context(usage.clone())?;
    let target = TARGETS.iter().find(|t| t.name == name).context(usage)?;
    let limit = Duration::from_secs(seconds.parse().context("SECONDS is a number")?);
    let seed = args.get(2).map_or(Ok(1), |seed| seed.parse()).context("SEED is a number")?;
    let corpus = (target.corpus)();
    let dir = tempfile::tempdir()?;
    let (mut random, began, mut runs, mut slowest) = (Random(seed), Instant::now(), 0u64, Duration::ZERO);
    while began.elapsed() < limit {
        let input = mutated(&corpus, &mut random);
        let start = Instant::now();
        if catch_unwind(AssertUnwindSafe(|| (target.run)(&input, dir.path()))).is_err() {
            let kept = std::env::temp_dir().join(format!("mach-fuzz-{name}-{runs}"));
            std::fs::write(&kept, &input)?;
            bail!("{name} failed on input {runs} of seed {seed}, kept as {}", kept.display());
        }
        slowest = slowest.max(start.elapsed());
        runs += 1;
    }
    println!("{name}: {runs} inputs in {:.0} s, the slowest took {:.0} ms", began.elapsed().as_secs_f64(), slowest.as_secs_f64() * 1e3);
    Ok(())
}
