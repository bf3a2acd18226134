//! A guess at the decode speed before anything ran: measured memory and disk rates, uniform routing.

use std::sync::Arc;
use std::time::{Duration, Instant};

use mach_backend::Part;
use mach_experts::{Key, RecordSource, Residency};
use mach_models::MemoryPlan;

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

/// Longest time that the disk is probed.
const PROBE: Duration = Duration::from_millis(60);

/// Measures for about a tenth of a second and computes.
pub fn estimate(plan: &MemoryPlan, source: Option<&Arc<dyn RecordSource>>, threads: usize) -> Estimate {
    let memory = memory_rate(threads);
    let active = plan.working_set as f64 * plan.slot_bytes as f64;
    let always = plan.resident as f64;
    let missing = match plan.residency {
        Residency::Resident => 0.0,
        Residency::Streaming => active * (1.0 - plan.slots as f64 / plan.experts.max(1) as f64),
    };
    let disk = source.filter(|_| missing > 0.0).and_then(|s| disk_rate(&**s));
    let read = disk.map_or(0.0, |d| missing / d);
    // Misses are read while hits are computed.
    let seconds = always / memory + ((active - missing) / memory).max(read);
    Estimate { memory_gb_s: memory / 1e9, disk_gb_s: disk.map(|d| d / 1e9), tok_s: 1.0 / seconds.max(1e-6) }
}

/// Bytes per second that `threads` can read together.
fn memory_rate(threads: usize) -> f64 {
    const WORDS: usize = 4 << 20;
    let began = Instant::now();
    let bytes: usize = std::thread::scope(|scope| {
        let sum = || {
            let data = vec![1u64; WORDS];
            let began = Instant::now();
            let total: u64 = std::hint::black_box(&data).iter().fold(0, |a, b| a.wrapping_add(*b));
            std::hint::black_box(total);
            (WORDS * 8, began.elapsed())
        };
        let workers: Vec<_> = (0..threads.max(1)).map(|_| scope.spawn(sum)).collect();
        let done: Vec<_> = workers.into_iter().filter_map(|w| w.join().ok()).collect();
        let slowest = done.iter().map(|d| d.1).max().unwrap_or_else(|| began.elapsed());
        (done.iter().map(|d| d.0).sum::<usize>() as f64 / slowest.as_secs_f64().max(1e-9)) as usize
    });
    bytes as f64
}

/// Bytes per second of records spread over the model.
fn disk_rate(source: &dyn RecordSource) -> Option<f64> {
    let [a, b] = source.part_bytes();
    let mut memory = vec![0u8; a + b + 8192];
    let start = memory.as_ptr().align_offset(4096);
    let (first, second) = memory[start..start + a + b].split_at_mut(a);
    let (began, mut bytes) = (Instant::now(), 0);
    for i in 0..8 {
        let key = Key { layer: i * source.layers() / 8, expert: i * source.experts() / 8 };
        bytes += source.read(key, Part::Both, [first, second]).ok()?;
        if began.elapsed() > PROBE {
            break;
        }
    }
    Some(bytes as f64 / began.elapsed().as_secs_f64().max(1e-9))
}
