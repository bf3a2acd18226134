//! What a run says: as a table, and as one JSON object.

use mach_experts::{ExpertStats, Residency};
use serde_json::{Value, json};

use super::run::{Measured, Phase, Sample, Work};
use crate::cli::output::{self, seconds, size};
use crate::limits::{Bound, Ceilings, LayerUse, active_weights, decode_seconds, prefill_seconds, sequence_bytes, spread};
use crate::{Prepared, system};

/// Everything that was measured.
pub(super) struct Report<'a> {
    pub prepared: &'a Prepared,
    pub work: Work,
    pub measured: Measured,
}

impl Report<'_> {
    fn streaming(&self) -> bool {
        self.prepared.plan.residency == Residency::Streaming
    }

    fn median(&self, of: impl Fn(&Sample) -> f64) -> f64 {
        spread(&self.measured.samples.iter().map(of).collect::<Vec<_>>()).0
    }

    fn hit_rate(&self) -> Option<f64> {
        let mut all = ExpertStats::default();
        self.measured.samples.iter().for_each(|s| (all.hits, all.misses) = (all.hits + s.stats.hits, all.misses + s.stats.misses));
        rate(&all).filter(|_| self.streaming())
    }

    /// Bytes that one token takes from memory or drive: weights, recurrent states, keys and values.
    fn bytes_per_token(&self) -> f64 {
        let plan = &self.prepared.plan;
        match (self.work.phase, self.measured.distinct) {
            (Phase::Prefill | Phase::Load, distinct) => {
                (plan.resident as f64 + distinct.unwrap_or(0) as f64 * plan.slot_bytes as f64) / self.work.tokens as f64
            }
            (Phase::Decode, _) => self.always() + plan.working_set as f64 * plan.slot_bytes as f64,
        }
    }

    /// Bytes of a decoded token beside the experts.
    fn always(&self) -> f64 {
        let plan = &self.prepared.plan;
        let depth = self.work.depth as f64 + self.work.tokens as f64 / 2.0;
        plan.resident as f64 + sequence_bytes(self.prepared.files.spec(), plan.kv_read(depth))
    }

    /// Tokens per second that the ceilings allow at this hit rate.
    fn limit(&self) -> (f64, Bound) {
        let (plan, spec) = (&self.prepared.plan, self.prepared.files.spec());
        let slot = plan.slot_bytes as f64;
        let runs = self.measured.samples.len() as f64;
        let (seconds, bound) = match self.work.phase {
            Phase::Decode if self.streaming() => {
                let layers: Vec<LayerUse> = self.measured.samples.iter().flat_map(|s| s.layers.iter().copied()).collect();
                let (seconds, bound) = decode_seconds(&self.measured.ceilings, self.always() * runs * self.work.tokens as f64, slot, &layers);
                (seconds / runs, bound)
            }
            Phase::Decode => decode_seconds(&self.measured.ceilings, self.bytes_per_token() * self.work.tokens as f64, slot, &[]),
            // Everything that has to be read before the first token, once.
            Phase::Load => {
                let experts = if self.streaming() { self.measured.distinct.unwrap_or(0) } else { plan.experts as u64 };
                let bytes = plan.resident as f64 + experts as f64 * slot;
                (bytes / self.measured.ceilings.disk.unwrap_or(f64::INFINITY), Bound::Disk)
            }
            Phase::Prefill => {
                let operations = 2.0 * active_weights(spec, self.prepared.files.parameters()) as f64 * self.work.tokens as f64;
                prefill_seconds(
                    &self.measured.ceilings,
                    operations,
                    self.bytes_per_token() * self.work.tokens as f64,
                    self.median(|s| s.stats.bytes_read as f64),
                )
            }
        };
        (self.work.tokens as f64 / seconds, bound)
    }

    /// Time of one sweep of all routed experts at the drive's ceiling, and of the computation alone: what a streamed
    /// prefill cannot be faster than.
    fn sweep(&self) -> Option<[f64; 2]> {
        let plan = &self.prepared.plan;
        let disk = self.measured.ceilings.disk.filter(|_| self.streaming() && self.work.phase == Phase::Prefill)?;
        let computing = self.median(|s| s.seconds - s.stats.stall.as_secs_f64());
        Some([plan.experts as f64 * plan.slot_bytes as f64 / disk, computing])
    }

    /// Prints the table, or one JSON object.
    pub(super) fn print(&self, json: bool) {
        if json { output::json_line(&self.json()) } else { output::print(&self.table()) }
    }

    pub(super) fn json(&self) -> Value {
        let (tok_s, spread) = spread(&self.measured.samples.iter().map(|s| self.work.tokens as f64 / s.seconds).collect::<Vec<_>>());
        let (limit, bound) = self.limit();
        let plan = &self.prepared.plan;
        let [before, warm_up] = self.measured.earlier.map(|s| rate(&s).filter(|_| self.streaming()));
        let mut facts = json!({
            "tok_s": tok_s, "spread": spread, "limit_tok_s": limit, "share_of_limit": tok_s / limit, "bound": bound.name(),
            "ceilings": {
                "memory_gb_s": self.measured.ceilings.memory / 1e9, "disk_gb_s": self.measured.ceilings.disk.map(|d| d / 1e9), "int8_gop_s": self.measured.ceilings.int8.map(|i| i / 1e9),
            },
            "hit_rate": self.hit_rate(), "bytes_per_token": self.bytes_per_token().round(),
            "disk_bytes_per_token": (self.median(|s| s.stats.bytes_read as f64) / self.work.tokens as f64).round(),
            "disk_gb_s": self.median(|s| s.stats.bytes_read as f64 / s.seconds) / 1e9, "stall_share": self.median(|s| s.stats.stall.as_secs_f64() / s.seconds),
            "distinct_experts": self.measured.distinct, "peak_rss": self.measured.peak_rss, "cpu": system::cpu_name(), "kernels": self.measured.kernels, "threads": self.prepared.threads(),
            "model": self.prepared.path.name, "mode": self.prepared.mode(), "slots": self.measured.slots, "experts": plan.experts, "resident_bytes": plan.resident,
            "tokens": self.work.tokens, "repeat": self.measured.samples.len(), "depth": self.work.depth, "budget": plan.budget,
            "hit_rates": {"before": before, "warm_up": warm_up, "run": self.hit_rate()}, "routing": self.work.routing.name(),
            "guesses": {"read": self.measured.ahead.guessed, "used": self.measured.ahead.used}, "activation_bits": self.prepared.activation_bits(),
        });
        let mut more = |key: &str, value: Value| facts[key] = value;
        if let Some([sweep, computing]) = self.sweep() {
            more("sweep_s", json!(sweep));
            more("compute_s", json!(computing));
            more("wall_s", json!(self.median(|s| s.seconds)));
        }
        if self.work.phase == Phase::Load {
            more("ttft_s", json!(self.median(|s| s.seconds)));
            more("limit_ttft_s", json!(self.work.tokens as f64 / limit));
            more("cold", json!(true));
        }
        facts
    }

    pub(super) fn table(&self) -> String {
        let facts = self.json();
        let number = |key: &str| facts[key].as_f64().unwrap_or(0.0);
        let gb = |bytes: f64| bytes / 1e9;
        let what = match self.work.phase {
            Phase::Decode => "decode",
            Phase::Prefill => "prefill",
            Phase::Load => "cold start",
        };
        let Ceilings { memory, disk, int8 } = self.measured.ceilings;
        let plan = &self.prepared.plan;
        let mut lines = vec![
            ("model", format!("{}, {}", self.prepared.path.name, self.prepared.mode())),
            (what, format!("{} tokens at a depth of {}, {} runs", self.work.tokens, self.work.depth, self.measured.samples.len())),
            (
                "speed",
                format!(
                    "{:.2} tok/s ({:.2} to {:.2})",
                    number("tok_s"),
                    facts["spread"][0].as_f64().unwrap_or(0.0),
                    facts["spread"][1].as_f64().unwrap_or(0.0)
                ),
            ),
            ("limit", format!("{:.2} tok/s by {}: {:.0} % reached", number("limit_tok_s"), self.limit().1.name(), 100.0 * number("share_of_limit"))),
            ("ceilings", {
                let disk = disk.map(|d| format!(", drive {:.2} GB/s", gb(d))).unwrap_or_default();
                format!("memory {:.1} GB/s{disk}{}", gb(memory), int8.map(|i| format!(", int8 {:.0} Gop/s", i / 1e9)).unwrap_or_default())
            }),
            ("bytes per token", format!("{}, {} of them from the drive", size(number("bytes_per_token") as u64), size(number("disk_bytes_per_token") as u64))),
        ];
        if let Some(rate) = self.hit_rate() {
            let drive = format!("drive {:.2} GB/s, stalled {:.0} % of the time", number("disk_gb_s"), 100.0 * number("stall_share"));
            lines.push(("experts", format!("{} of {} in the bank, hit rate {:.1} %, {drive}", self.measured.slots, plan.experts, 100.0 * rate)));
        }
        let ahead = self.measured.ahead;
        if ahead.guessed > 0 {
            let share = 100.0 * ahead.used as f64 / ahead.guessed as f64;
            lines.push(("guesses", format!("{} experts read before the router asked for them, {share:.0} % of them used", ahead.guessed)));
        }
        if let Some(distinct) = self.measured.distinct {
            lines.push(("distinct", format!("{distinct} of {} experts", plan.experts)));
        }
        if let Some([sweep, computing]) = self.sweep() {
            let wall = self.median(|s| s.seconds);
            let share = wall / sweep.max(computing);
            lines.push((
                "time",
                format!("{}: {share:.2} times the larger of one sweep of the experts {}, computing {}", seconds(wall), seconds(sweep), seconds(computing)),
            ));
        }
        if self.work.phase == Phase::Load {
            let limit = self.work.tokens as f64 / number("limit_tok_s");
            lines.push(("first token", format!("after {}, files not in the page cache; reading alone takes {}", seconds(number("ttft_s")), seconds(limit))));
        }
        lines.push(("peak memory", self.measured.peak_rss.map_or_else(|| "unknown".to_owned(), size)));
        lines.push(("processor", format!("{}, {} threads, {}", system::cpu_name(), self.prepared.threads(), self.measured.kernels)));
        lines.into_iter().map(|(name, value)| format!("{name:<16} {value}\n")).collect()
    }
}

fn rate(stats: &ExpertStats) -> Option<f64> {
    let all = stats.hits + stats.misses;
    (all > 0).then(|| stats.hits as f64 / all as f64)
}
