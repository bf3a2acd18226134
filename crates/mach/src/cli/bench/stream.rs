//! `mach bench stream`: decoding at several memory budgets.

use mach_models::MemoryPlan;
use serde_json::Value;

use super::RunArgs;
use super::report::Report;
use super::run::{Phase, measure};
use crate::cli::args::{EngineArgs, parse_size};
use crate::cli::output::{self, size};
use crate::{Error, LoadOptions, system};

/// Shares of all experts in the bank when no budgets are given; the floor comes last.
const SHARES: [f64; 7] = [1.0, 0.75, 0.5, 0.35, 0.2, 0.1, 0.0];

#[derive(clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    run: RunArgs,
    /// Memory budgets, largest first [default: from all experts in memory down to the floor]
    #[arg(long, value_name = "SIZE,SIZE", value_delimiter = ',', value_parser = parse_size)]
    budgets: Vec<u64>,
    /// Print a list with one JSON object a budget
    #[arg(long)]
    pub json: bool,
}

pub(super) fn run(args: &Args) -> Result<(), Error> {
    let model = args.run.setup.model.dir()?;
    let options = LoadOptions { streaming: Some(!args.run.setup.engine.no_streaming), ..args.run.setup.engine.options() };
    let work = args.run.work(Phase::Decode);
    let budgets = if args.budgets.is_empty() {
        let prepared = EngineArgs::prepare_with(model.as_deref(), &options)?;
        sweep(&prepared.plan, work.depth + work.tokens + 32, options.memory_budget.unwrap_or_else(system::available_memory))
    } else {
        args.budgets.clone()
    };
    let mut reports: Vec<Value> = Vec::new();
    let mut ceilings = None;
    for (i, &budget) in budgets.iter().enumerate() {
        let prepared = EngineArgs::prepare_with(model.as_deref(), &LoadOptions { memory_budget: Some(budget), ..options.clone() })?;
        let measured = measure(&prepared, &work, ceilings.as_ref())?;
        ceilings = Some(measured.ceilings);
        let report = Report { prepared: &prepared, work, measured };
        if args.json {
            reports.push(report.json());
            continue;
        }
        if i == 0 {
            output::line(&Row::HEAD.join(" "));
        }
        output::line(&Row(report.json()).line());
    }
    if args.json {
        output::json_line(&reports.into());
    }
    Ok(())
}

/// Budgets for [`SHARES`] of the experts with a context of `tokens`, as far as `most` bytes allow.
fn sweep(plan: &MemoryPlan, tokens: usize, most: u64) -> Vec<u64> {
    let slots = SHARES.map(|share| ((share * plan.experts as f64) as usize).max(plan.floor_slots));
    let beside = plan.beside_bank() + plan.kv_bytes(tokens);
    let mut budgets: Vec<u64> = slots.iter().map(|&n| beside + n as u64 * plan.slot_bytes).filter(|&b| b <= most).collect();
    budgets.dedup();
    budgets
}

/// A line of the table.
struct Row(Value);

impl Row {
    const HEAD: [&str; 9] = ["    budget", "      bank", "    tok/s", "    limit", "reached", "hit rate", "from drive", "drive GB/s", "stalled"];

    fn line(&self) -> String {
        let number = |key: &str| self.0[key].as_f64().unwrap_or(0.0);
        let percent = |key: &str| format!("{:.0} %", 100.0 * number(key));
        let hits = self.0["hit_rate"].as_f64().map_or("-".to_owned(), |h| format!("{:.1} %", 100.0 * h));
        format!(
            "{:>10} {:>10} {:>9.2} {:>9.2} {:>7} {hits:>8} {:>10} {:>10.2} {:>7}",
            size(number("budget") as u64),
            format!("{}/{}", self.0["slots"], self.0["experts"]),
            number("tok_s"),
            number("limit_tok_s"),
            percent("share_of_limit"),
            size(number("disk_bytes_per_token") as u64),
            number("disk_gb_s"),
            percent("stall_share"),
        )
    }
}
