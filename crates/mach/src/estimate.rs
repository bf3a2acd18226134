//! A guess at the decode speed before anything ran: measured memory and disk rates, uniform routing.

use std::sync::Arc;
use std::time::Duration;

use mach_experts::{RecordSource, Residency};
use mach_models::MemoryPlan;

use crate::rates::{disk_rate, memory_rate};

/// Rates measured at start, and what they let expect.
#[derive(Clone, Copy, Debug)]
pub struct Estimate {
    /// Memory read rate of all threads, GB/s.
    pub memory_gb_s: f64,
    /// Record read rate, GB/s; `None` when resident.
    pub disk_gb_s: Option<f64>,
    /// Decode, tokens per second, an upper guess.
    pub tok_s: f64,
}

/// Time that the drive is probed, and the reads under way meanwhile.
const PROBE: Duration = Duration::from_millis(20);
const DEPTH: usize = 4;
/// Memory that all threads together read, and the most for one of them: beyond the caches, and a small part of any budget.
const MEMORY: usize = 128 << 20;
const MEMORY_EACH: usize = 32 << 20;

/// Measures for less than a tenth of a second and computes.
pub fn estimate(plan: &MemoryPlan, source: Option<&Arc<dyn RecordSource>>, threads: usize) -> Estimate {
    let memory = memory_rate(threads, (MEMORY / threads.max(1)).min(MEMORY_EACH));
    let active = plan.working_set as f64 * plan.slot_bytes as f64;
    let always = plan.resident as f64;
    let missing = match plan.residency {
        Residency::Resident => 0.0,
        Residency::Streaming => active * (1.0 - plan.slots as f64 / plan.experts.max(1) as f64),
    };
    let disk = source.filter(|_| missing > 0.0).and_then(|s| disk_rate(&**s, DEPTH, PROBE));
    let read = disk.map_or(0.0, |d| missing / d);
    // Misses are read while hits are computed.
    let seconds = always / memory + ((active - missing) / memory).max(read);
    Estimate { memory_gb_s: memory / 1e9, disk_gb_s: disk.map(|d| d / 1e9), tok_s: 1.0 / seconds.max(1e-6) }
}
