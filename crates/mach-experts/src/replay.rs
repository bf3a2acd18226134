//! Replays a trace against banks of other sizes and other policies, and predicts the time that it would have taken.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use mach_backend::{ExpertMemory, Part};
use mach_format::{PackedLayout, RecordLayout, WeightFormat};

use crate::source::{Key, RecordSource};
use crate::store::{ExpertStore, Residency, SWEEP_ROWS, StoreOptions};
use crate::trace::{Access, Phase, Trace, TraceEvent};
use crate::{ExpertError, floor_slots};

/// What decides who has to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// Least recently used.
    Lru,
    /// mach's own: least frequently used, with uses that decay.
    LfuD,
    /// The expert whose next use is farthest away: no policy can have fewer misses.
    Belady,
}

impl Policy {
    /// `lru`, `lfu-d`, `belady`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Lru => "lru",
            Self::LfuD => "lfu-d",
            Self::Belady => "belady",
        }
    }
}

/// Misses of every access of a trace, in order, had the bank `slots` slots (scratch included).
///
/// # Errors
/// [`ExpertError::BelowFloor`] for too small a bank.
pub fn misses(trace: &Trace, slots: usize, policy: Policy) -> Result<Vec<usize>, ExpertError> {
    let h = &trace.header;
    let mut store = paper_store(trace, slots)?;
    match policy {
        // The store itself runs, on memory that holds nothing and reads that take no time: its books are exact.
        Policy::LfuD => {
            let (mut out, mut sweep) = (Vec::new(), false);
            for event in &trace.events {
                match event {
                    TraceEvent::Pass(rows) => {
                        sweep = *rows >= SWEEP_ROWS;
                        store.next_pass(*rows);
                    }
                    TraceEvent::Retired(n) => drop(store.give_up(*n as u64 * store.slot_bytes())),
                    TraceEvent::Mark(_) => {}
                    TraceEvent::Access(a) => {
                        let before = store.stats().misses;
                        let mut lease = match a.ordered {
                            true if sweep => store.sweep(a.layer, &a.experts),
                            true => store.stream(a.layer, &a.experts),
                            false => store.step(a.layer, &a.experts),
                        };
                        while lease.next(&|| false)?.is_some() {}
                        drop(lease);
                        out.push((store.stats().misses - before) as usize);
                    }
                }
            }
            Ok(out)
        }
        Policy::Lru | Policy::Belady => Ok(ideal(trace, store.bank_slots(), floor_slots(h.top_k), policy)),
    }
}

/// A store of the shape of a trace, without memory.
fn paper_store(trace: &Trace, slots: usize) -> Result<ExpertStore<Paper>, ExpertError> {
    let h = &trace.header;
    let half = PackedLayout::new(16, 16, WeightFormat::F32);
    let source: Arc<dyn RecordSource> = Arc::new(Nothing { layers: h.layers, experts: h.experts, layout: RecordLayout::new(half, half) });
    let options = StoreOptions { slots, readers: 1, top_k: h.top_k, residency: Residency::Streaming };
    let slots = ExpertStore::<Paper>::slots_wanted(&*source, &options)?;
    ExpertStore::new(Paper(slots), source, &options)
}

/// Slots without memory.
struct Paper(usize);

impl ExpertMemory for Paper {
    fn slots(&self) -> usize {
        self.0
    }
    fn part_bytes(&self) -> [usize; 2] {
        [1, 0]
    }
    fn fill(&self, _: usize, _: Part, f: &mut dyn FnMut([&mut [u8]; 2])) {
        f([&mut [], &mut []]);
    }
    fn release(&self, _: usize) {}
}

/// Records that are there at once.
struct Nothing {
    layers: usize,
    experts: usize,
    layout: RecordLayout,
}

impl RecordSource for Nothing {
    fn layers(&self) -> usize {
        self.layers
    }
    fn experts(&self) -> usize {
        self.experts
    }
    fn layout(&self, _: usize) -> &RecordLayout {
        &self.layout
    }
    fn read(&self, _: Key, _: Part, _: [&mut [u8]; 2]) -> Result<u64, ExpertError> {
        Ok(0)
    }
    fn kind(&self) -> &'static str {
        "replay"
    }
    fn direct(&self) -> bool {
        false
    }
}

/// LRU and Belady over one pool of `slots`. A prefill fills free slots and evicts nothing, as in the store.
fn ideal(trace: &Trace, mut slots: usize, floor: usize, policy: Policy) -> Vec<usize> {
    let experts = trace.header.experts;
    let id = |a: &Access, expert: u32| a.layer * experts + expert as usize;
    // When every use is followed by the next one, counted in accesses.
    let mut next_uses: Vec<Vec<u64>> = trace.accesses().map(|a| vec![u64::MAX; a.experts.len()]).collect();
    let mut seen: HashMap<usize, u64> = HashMap::new();
    for (at, (access, next)) in trace.accesses().zip(&mut next_uses).enumerate().collect::<Vec<_>>().into_iter().rev() {
        for (&expert, next) in access.experts.iter().zip(next) {
            *next = seen.insert(id(access, expert), at as u64).unwrap_or(u64::MAX);
        }
    }
    // What is in the bank, and the same by value: the least valuable first.
    let mut value: HashMap<usize, u64> = HashMap::new();
    let mut order: BTreeSet<(u64, usize)> = BTreeSet::new();
    let mut at = 0;
    let mut out = Vec::new();
    for event in &trace.events {
        let access = match event {
            TraceEvent::Access(access) => access,
            TraceEvent::Retired(n) => {
                slots = slots.saturating_sub(*n).max(floor.min(slots));
                while order.len() > slots
                    && let Some(gone) = order.pop_first()
                {
                    value.remove(&gone.1);
                }
                continue;
            }
            TraceEvent::Pass(_) | TraceEvent::Mark(_) => continue,
        };
        let missed: Vec<bool> = access.experts.iter().map(|&e| !value.contains_key(&id(access, e))).collect();
        for (i, &expert) in access.experts.iter().enumerate() {
            let key = id(access, expert);
            let worth = if policy == Policy::Lru { at as u64 } else { u64::MAX - next_uses[at][i] };
            match value.get(&key).copied() {
                // A prefill's hit is no use for LRU, as for the bank, but Belady must know the next one.
                Some(_) if access.ordered && policy == Policy::Lru => continue,
                Some(old) => drop(order.remove(&(old, key))),
                None if order.len() < slots => {}
                None if access.ordered => continue,
                // The experts of this access are pinned: theirs are the newest entries, and never the victim's place.
                None => {
                    let pinned = |k: usize| k / experts == access.layer && access.experts.binary_search(&((k % experts) as u32)).is_ok();
                    let Some(victim) = order.iter().copied().find(|&(_, k)| !pinned(k)) else { continue };
                    order.remove(&victim);
                    value.remove(&victim.1);
                }
            }
            value.insert(key, worth);
            order.insert((worth, key));
        }
        at += 1;
        out.push(missed.into_iter().filter(|&m| m).count());
    }
    out
}

/// The accesses of one pass, as indexes into [`Trace::accesses`].
pub type PassRange = std::ops::Range<usize>;

/// The decoding of a trace: passes of one row, those of measured runs where runs are marked.
pub fn decode_runs(trace: &Trace) -> Vec<Vec<PassRange>> {
    let marked = trace.events.contains(&TraceEvent::Mark(Phase::Measured));
    let mut runs: Vec<Vec<PassRange>> = vec![Vec::new()];
    let (mut at, mut wanted, mut row) = (0, !marked, false);
    for event in &trace.events {
        match event {
            TraceEvent::Mark(phase) => {
                wanted = *phase == Phase::Measured;
                row = false;
                runs.push(Vec::new());
            }
            TraceEvent::Pass(rows) => {
                row = *rows == 1 && wanted;
                if row && let Some(run) = runs.last_mut() {
                    run.push(at..at);
                }
            }
            TraceEvent::Access(_) => {
                at += 1;
                if row && let Some(pass) = runs.last_mut().and_then(|run| run.last_mut()) {
                    pass.end = at;
                }
            }
            TraceEvent::Retired(_) => {}
        }
    }
    runs.retain(|run| !run.is_empty());
    runs
}

/// What the steps of a recorded run cost.
#[derive(Clone, Debug)]
pub struct Costs {
    /// Seconds before each MoE layer's experts: mixer, router, and what comes between passes.
    gaps: Vec<f64>,
    /// Seconds of a layer's experts by the number of them that were missed.
    lease: Vec<f64>,
}

/// Leases with as many misses that make their mean trustworthy.
const ENOUGH: usize = 24;

impl Costs {
    /// Costs of the decoding of a trace; `None` where nothing was decoded, or nothing was read.
    pub fn of(trace: &Trace) -> Option<Self> {
        let accesses: Vec<&Access> = trace.accesses().collect();
        let runs = decode_runs(trace);
        let decoded: Vec<&Access> = runs.iter().flatten().cloned().flat_map(|pass| &accesses[pass]).copied().collect();
        let top = decoded.iter().map(|a| a.experts.len()).max()?;
        let seconds = |d: Duration| d.as_secs_f64();
        // What comes before the first pass of a run belongs to no token.
        let firsts: Vec<usize> = runs.iter().filter_map(|run| run.first()).map(|pass| pass.start).collect();
        let mut gaps = vec![Vec::new(); trace.header.layers];
        for at in runs.iter().flatten().cloned().flatten().filter(|at| !firsts.contains(at)) {
            gaps[accesses[at].layer].push(seconds(accesses[at].gap));
        }
        let mut by_misses: Vec<Vec<f64>> = vec![Vec::new(); top + 1];
        decoded.iter().for_each(|a| by_misses[a.misses].push(seconds(a.lease)));
        let computing = mean(&decoded.iter().map(|a| seconds(a.lease.saturating_sub(a.stall))).collect::<Vec<_>>());
        let (first, per_miss) = line(&by_misses, computing)?;
        let lease = by_misses.iter().enumerate().map(|(misses, times)| match misses {
            _ if times.len() >= ENOUGH => mean(times),
            0 => computing,
            _ => (first + per_miss * misses as f64).max(computing),
        });
        Some(Self { gaps: gaps.iter().map(|g| mean(g)).collect(), lease: lease.collect() })
    }

    /// Seconds of a pass whose accesses are (layer, misses).
    pub fn seconds(&self, pass: impl Iterator<Item = (usize, usize)>) -> f64 {
        pass.map(|(layer, misses)| self.gaps[layer] + self.lease[misses.min(self.lease.len() - 1)]).sum()
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// The straight line through the times of leases with misses: (at none, per miss).
fn line(by_misses: &[Vec<f64>], computing: f64) -> Option<(f64, f64)> {
    let points: Vec<(f64, f64, f64)> =
        by_misses.iter().enumerate().skip(1).filter(|(_, t)| !t.is_empty()).map(|(m, t)| (m as f64, mean(t), t.len() as f64)).collect();
    let weight: f64 = points.iter().map(|p| p.2).sum();
    let weighted = |of: &dyn Fn(&(f64, f64, f64)) -> f64| points.iter().map(|p| p.2 * of(p)).sum::<f64>() / weight;
    let (x, y) = (weighted(&|p| p.0), weighted(&|p| p.1));
    let (xx, xy) = (weighted(&|p| (p.0 - x) * (p.0 - x)), weighted(&|p| (p.0 - x) * (p.1 - y)));
    match points[..] {
        [] => None,
        // One number of misses only: reads add to the computing.
        _ if xx < 1e-9 => Some((computing, (y - computing).max(0.0) / x)),
        _ => Some((y - xy / xx * x, xy / xx)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::TraceHeader;

    const LAYERS: usize = 2;

    /// A run of single rows whose leases take 1 ms and 2 ms a miss, 3 ms after another; experts from a small generator.
    fn trace(passes: usize, misses: impl Fn(usize) -> usize) -> Trace {
        let header = TraceHeader { layers: LAYERS, experts: 16, top_k: 2, slots: 12, slot_bytes: 100, ..TraceHeader::default() };
        let mut events = vec![TraceEvent::Pass(3)];
        let access = |layer: usize, seed: usize, misses: usize| {
            let first = (seed * seed * 7 + seed / 3) % 15;
            let experts = vec![first as u32, (first + 1 + seed % (15 - first)).min(15) as u32];
            let stall = Duration::from_millis(2 * misses as u64);
            let ms = Duration::from_millis;
            TraceEvent::Access(Access { layer, experts, ordered: false, gap: ms(3), lease: ms(1) + stall, stall, misses })
        };
        events.extend((0..LAYERS).map(|layer| access(layer, layer, 2)));
        events.push(TraceEvent::Mark(Phase::Measured));
        for pass in 0..passes {
            events.push(TraceEvent::Pass(1));
            events.extend((0..LAYERS).map(|layer| access(layer, pass * 5 + layer, misses(pass))));
        }
        Trace { header, events }
    }

    /// Protects the policies: a bank of everything misses first uses only, no policy beats Belady, more slots never hurt it.
    #[test]
    fn belady_is_the_bound() {
        let trace = trace(300, |_| 0);
        let total = |slots: usize, policy: Policy| misses(&trace, slots, policy).unwrap().iter().sum::<usize>();
        let first = total(32, Policy::Belady);
        assert!(first <= 32 && total(32, Policy::LfuD) == first && total(32, Policy::Lru) == first);
        let mut last = first;
        for slots in [24, 16, 10, 6, 4] {
            let best = total(slots, Policy::Belady);
            assert!(best >= last, "{slots}");
            for policy in [Policy::LfuD, Policy::Lru] {
                let other = total(slots, policy);
                assert!(other >= best && other <= 2 * 302 * LAYERS, "{slots} {}: {other} against {best}", policy.name());
            }
            last = best;
        }
        assert!(last > first + 100, "{last}");
        assert_eq!(misses(&trace, 3, Policy::LfuD).unwrap_err().code(), "bank-below-floor");
    }

    /// Protects the books of LRU and Belady by a sequence done by hand: one layer, two slots beside the scratch slot.
    #[test]
    fn by_hand() {
        let one = |expert: u32| TraceEvent::Access(Access { experts: vec![expert], ..Access::default() });
        let header = TraceHeader { layers: 1, experts: 4, top_k: 1, ..TraceHeader::default() };
        let trace = Trace { header, events: [0, 1, 2, 0, 1, 2, 0].map(one).to_vec() };
        assert_eq!(misses(&trace, 3, Policy::Lru).unwrap(), [1, 1, 1, 1, 1, 1, 1]);
        // 2 takes the place of 1, then 1 that of 0.
        assert_eq!(misses(&trace, 3, Policy::Belady).unwrap(), [1, 1, 1, 0, 1, 0, 1]);
    }

    /// Protects the prediction of time: seen numbers of misses cost what they did, unseen ones lie on the line.
    #[test]
    fn times_follow_the_misses() {
        let measured = trace(60, |pass| pass % 2);
        let runs = decode_runs(&measured);
        assert_eq!((runs.len(), runs[0].len(), runs[0][0].clone()), (1, 60, 2..4));
        let costs = Costs::of(&measured).unwrap();
        let pass = |misses: usize| costs.seconds((0..LAYERS).map(|layer| (layer, misses)));
        for (misses, ms) in [(0, 8.0), (1, 12.0), (2, 16.0)] {
            assert!((pass(misses) * 1e3 - ms).abs() < 0.01, "{misses}: {}", pass(misses));
        }
        assert!(Costs::of(&trace(60, |_| 0)).is_none(), "nothing was read: nothing is known of reads");
    }
}
