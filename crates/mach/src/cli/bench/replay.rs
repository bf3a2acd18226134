//! `mach bench replay`: what a recorded run would have been with other banks and policies.

use std::path::PathBuf;

use clap::ValueEnum;
use mach_experts::replay::{Costs, PassRange, Policy, decode_runs, misses};
use mach_experts::trace::{Trace, TraceHeader};
use serde_json::{Value, json};

use crate::Error;
use crate::cli::args::{parse_size, positive};
use crate::cli::output::{self, size};
use crate::limits::spread;

/// Shares of all experts in the bank when nothing else is asked for; the floor comes last.
const SHARES: [f64; 8] = [1.0, 0.75, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0];

#[derive(clap::Args)]
pub(super) struct Args {
    /// What `--trace` wrote
    #[arg(long, value_name = "FILE")]
    trace: PathBuf,
    /// Slots of the bank
    #[arg(long, value_name = "N,N", value_delimiter = ',', value_parser = positive, conflicts_with = "budgets")]
    slots: Vec<usize>,
    /// Memory budgets, the rest of the model taking what it took in the recorded run
    #[arg(long, value_name = "SIZE,SIZE", value_delimiter = ',', value_parser = parse_size)]
    budgets: Vec<u64>,
    /// Who has to go when the bank is full
    #[arg(long, value_enum, default_value_t)]
    policy: PolicyArg,
    /// Print a list with one JSON object a bank and policy
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum PolicyArg {
    /// Least recently used
    Lru,
    /// mach's own: least frequently used, uses decay
    LfuD,
    /// The one whose next use is farthest away: the least misses there can be
    Belady,
    /// All of them
    #[default]
    All,
}

impl PolicyArg {
    const fn policies(self) -> &'static [Policy] {
        match self {
            Self::Lru => &[Policy::Lru],
            Self::LfuD => &[Policy::LfuD],
            Self::Belady => &[Policy::Belady],
            Self::All => &[Policy::LfuD, Policy::Lru, Policy::Belady],
        }
    }
}

pub(super) fn run(args: &Args) -> Result<(), Error> {
    let replay = Replay::new(Trace::read(&args.trace)?)?;
    let h = &replay.trace.header;
    if !args.json {
        let recorded = replay.predict(h.slots, None, &replay.recorded());
        output::line(&format!(
            "{}: {} tokens decoded with {} of {} experts in the bank, hit rate {:.1} %, {} tok/s",
            h.model,
            replay.runs.iter().map(Vec::len).sum::<usize>(),
            h.slots,
            h.layers * h.experts,
            100.0 * recorded["hit_rate"].as_f64().unwrap_or(0.0),
            replay.recorded_speed().map_or("-".to_owned(), |s| format!("{s:.2}")),
        ));
        output::line(&format!("{:>8} {:>10} {:>8} {:>9} {:>11} {:>9}", "slots", "bank", "policy", "hit rate", "from drive", "tok/s"));
    }
    let mut all = Vec::new();
    for slots in banks(args, h) {
        for &policy in args.policy.policies() {
            let predicted = replay.predict(slots, Some(policy), &misses(&replay.trace, slots, policy).map_err(mach_models::ModelError::from)?);
            if !args.json {
                output::line(&row(&predicted));
            }
            all.push(predicted);
        }
    }
    if !args.json && all.iter().any(|p| p["filled_before"] == false) {
        output::line("* still filling when the first token was counted: a longer run hits more");
    }
    if args.json {
        output::json_line(&all.into());
    }
    Ok(())
}

/// Banks that are asked for, in slots.
fn banks(args: &Args, h: &TraceHeader) -> Vec<usize> {
    let all = h.layers * h.experts;
    let floor = mach_experts::floor_slots(h.top_k).min(all);
    if !args.slots.is_empty() {
        return args.slots.iter().map(|&n| n.min(all)).collect();
    }
    if !args.budgets.is_empty() {
        let of = |budget: u64| (budget.saturating_sub(h.other_bytes) / h.slot_bytes.max(1)) as usize;
        return args.budgets.iter().map(|&b| of(b).min(all)).collect();
    }
    let mut banks: Vec<usize> = SHARES.iter().map(|share| ((share * all as f64) as usize).max(floor)).collect();
    banks.dedup();
    banks
}

/// A trace, its decoding, and what that cost.
struct Replay {
    trace: Trace,
    /// MoE layer of every access.
    layers: Vec<usize>,
    runs: Vec<Vec<PassRange>>,
    costs: Option<Costs>,
}

impl Replay {
    fn new(trace: Trace) -> Result<Self, Error> {
        let runs = decode_runs(&trace);
        if runs.is_empty() {
            return Err(Error::Input { code: "trace-empty", message: "no token was decoded in this trace; record a run that decodes".to_owned() });
        }
        let layers = trace.accesses().map(|a| a.layer).collect();
        Ok(Self { layers, runs, costs: Costs::of(&trace), trace })
    }

    /// Misses as they were.
    fn recorded(&self) -> Vec<usize> {
        self.trace.accesses().map(|a| a.misses).collect()
    }

    fn recorded_speed(&self) -> Option<f64> {
        self.costs.as_ref().map(|costs| self.speed(costs, &self.recorded()))
    }

    /// Tokens per second: the middle one of the runs.
    fn speed(&self, costs: &Costs, misses: &[usize]) -> f64 {
        let pass = |pass: &PassRange| costs.seconds(pass.clone().map(|at| (self.layers[at], misses[at])));
        let runs: Vec<f64> = self.runs.iter().map(|run| run.len() as f64 / run.iter().map(pass).sum::<f64>()).collect();
        spread(&runs).0
    }

    fn predict(&self, slots: usize, policy: Option<Policy>, misses: &[usize]) -> Value {
        let h = &self.trace.header;
        let sizes: Vec<usize> = self.trace.accesses().map(|a| a.experts.len()).collect();
        let share = |used: usize, missed: usize| (used > 0).then(|| 1.0 - missed as f64 / used as f64);
        let decode: Vec<usize> = self.runs.iter().flatten().cloned().flatten().collect();
        let (used, missed) = decode.iter().fold((0, 0), |(u, m), &at| (u + sizes[at], m + misses[at]));
        let (all_used, all_missed) = (sizes.iter().sum::<usize>(), misses.iter().sum::<usize>());
        let tokens = self.runs.iter().map(Vec::len).sum::<usize>();
        // Where the bank still fills while tokens are counted, a longer run hits more.
        let filled = misses[..decode.first().copied().unwrap_or(0)].iter().sum::<usize>() >= slots;
        json!({
            "policy": policy.map(Policy::name), "slots": slots, "bank_bytes": slots as u64 * h.slot_bytes, "budget": h.other_bytes + slots as u64 * h.slot_bytes,
            "hit_rate": share(used, missed), "hits": all_used - all_missed, "misses": all_missed, "overall_hit_rate": share(all_used, all_missed),
            "disk_bytes_per_token": (missed as f64 * h.slot_bytes as f64 / tokens as f64).round(),
            "filled_before": filled, "tok_s": self.costs.as_ref().map(|c| self.speed(c, misses)), "tokens": tokens, "recorded_slots": h.slots, "model": h.model,
        })
    }
}

fn row(p: &Value) -> String {
    let number = |key: &str| p[key].as_f64().unwrap_or(0.0);
    format!(
        "{:>8} {:>10} {:>8} {:>7.1} % {:>11} {:>9}{}",
        number("slots"),
        size(number("bank_bytes") as u64),
        p["policy"].as_str().unwrap_or("-"),
        100.0 * number("hit_rate"),
        size(number("disk_bytes_per_token") as u64),
        p["tok_s"].as_f64().map_or("-".to_owned(), |s| format!("{s:.2}")),
        if p["filled_before"] == false { " *" } else { "" },
    )
}
