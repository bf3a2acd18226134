//! The kernel set that a processor does best with. Processors with the same instructions differ in how fast they are (and in
//! how far wide ones slow the clock down), so those that there are get timed. All give the same bytes: only speed depends on it.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use mach_backend::Backend;
use mach_format::{AlignedBytes, PackedLayout, PackedMatrix, ScaleType, WeightFormat};

use crate::kernels::LANES;
use crate::{Cpu, CpuOptions, KernelSet};

/// Rows of activations that are multiplied: a token's, and an expert's share of a prompt.
const ROWS: [usize; 2] = [1, 32];
/// Seconds of a product of each of [`ROWS`].
type Times = [f64; ROWS.len()];
/// 4-bit weights as experts have them, small enough for L2: as many output rows as share what is done once for a run of tiles.
const FORMAT: WeightFormat = WeightFormat::Affine { bits: 4, group: 64, scales: ScaleType::F16 };
const SHAPE: [usize; 2] = [16 * LANES, 2048];
/// All sets in turn so many times, so that the first has not the only slow start.
const ROUNDS: usize = 2;
/// A set runs for so long before it is timed: clocks take this long to follow wide instructions, and to come back.
const WARM: Duration = Duration::from_micros(800);
/// Products of each of [`ROWS`] are repeated for so long; the fastest counts.
const TIMED: Duration = Duration::from_micros(400);
/// A set takes the place of a plainer one when it needs less than this share of its time: what is closer may be chance.
const GAIN: f64 = 0.95;

impl KernelSet {
    /// The set to use when none is asked for: the fastest of those that this processor has, timed once for some 30 ms where
    /// there are several. A set whose bytes are not those of the plainest is left out.
    pub fn automatic() -> Self {
        static CHOSEN: OnceLock<KernelSet> = OnceLock::new();
        *CHOSEN.get_or_init(|| {
            let sets: Vec<_> = Self::available().into_iter().filter(|&set| set != Self::Scalar).collect();
            match sets[..] {
                [] => Self::Scalar,
                [only] => only,
                _ => fastest(&measure(&sets)).unwrap_or(sets[0]),
            }
        })
    }
}

/// Of sets, the plainest first. One row and many count alike.
fn fastest(sets: &[(KernelSet, Times)]) -> Option<KernelSet> {
    let score = |times: Times| times.iter().product::<f64>();
    let faster = |best: (KernelSet, Times), next: (KernelSet, Times)| {
        if score(next.1) < score(best.1) * GAIN.powi(ROWS.len() as i32) { next } else { best }
    };
    sets.iter().copied().reduce(faster).map(|(set, _)| set)
}

/// One set at work.
struct Trial {
    set: KernelSet,
    cpu: Cpu,
    weight: crate::Weight,
    x: crate::Tensor,
    out: crate::Tensor,
    times: Times,
}

impl Trial {
    /// The time of `rows` rows, if it is the best.
    fn time(&mut self, case: usize) {
        let began = Instant::now();
        while began.elapsed() < TIMED {
            let one = Instant::now();
            self.multiply(ROWS[case]);
            self.times[case] = self.times[case].min(one.elapsed().as_secs_f64());
        }
    }

    fn multiply(&mut self, rows: usize) {
        self.cpu.linear(&self.x, rows, &mut [(&self.weight, &mut self.out)]);
    }

    /// Bits of the products of each of [`ROWS`].
    fn bits(&mut self) -> Vec<u32> {
        let mut bits = Vec::new();
        for rows in ROWS {
            self.multiply(rows);
            let mut values = vec![0.0; rows * SHAPE[0]];
            self.cpu.read(&self.out, 0, &mut values);
            bits.extend(values.into_iter().map(f32::to_bits));
        }
        bits
    }
}

/// Times of all sets whose bytes are those of the first.
fn measure(sets: &[KernelSet]) -> Vec<(KernelSet, Times)> {
    let [outputs, cols] = SHAPE;
    let layout = PackedLayout::new(outputs, cols, FORMAT);
    let mut data = AlignedBytes::zeroed(layout.bytes());
    for (i, byte) in data.iter_mut().enumerate() {
        // Any numbers; scales and biases are halves near 0.02.
        *byte = if i % layout.block_bytes() < layout.line_bytes() { (i.wrapping_mul(0x9e37_79b9) >> 13) as u8 } else { 0x24 };
    }
    let matrix = PackedMatrix { layout, data };
    let most = ROWS[ROWS.len() - 1];
    let values: Vec<f32> = (0..most * cols).map(|i| (i.wrapping_mul(0x85eb_ca6b) >> 7 & 1023) as f32 / 512.0 - 1.0).collect();
    let start = |&set: &KernelSet| {
        let cpu = Cpu::new(CpuOptions { threads: Some(1), kernels: Some(set), ..CpuOptions::default() }).ok()?;
        let (weight, mut x, out) = (cpu.weight(matrix.clone()), cpu.tensor(most, cols), cpu.tensor(most, outputs));
        cpu.upload(&mut x, 0, &values);
        Some(Trial { set, cpu, weight, x, out, times: [f64::INFINITY; ROWS.len()] })
    };
    let mut trials: Vec<Trial> = sets.iter().filter_map(start).collect();
    let mut expected = None;
    trials.retain_mut(|trial| {
        let bits = trial.bits();
        *expected.get_or_insert_with(|| bits.clone()) == bits
    });
    for _ in 0..ROUNDS {
        for trial in &mut trials {
            let began = Instant::now();
            while began.elapsed() < WARM {
                trial.multiply(most);
            }
            (0..ROWS.len()).for_each(|case| trial.time(case));
        }
    }
    trials.iter().map(|trial| (trial.set, trial.times)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use KernelSet::{Amx, Avx2, Avx512, Vnni};

    /// Protects the choice: what one row gains may not be lost by many, and a plainer set stays where the gain may be chance.
    #[test]
    fn the_fastest_set_is_chosen() {
        let avx2 = (Avx2, [1.0, 20.0]);
        let choose = |others: &[(KernelSet, Times)]| fastest(&[&[avx2], others].concat());
        assert_eq!(choose(&[]), Some(Avx2));
        assert_eq!(choose(&[(Avx512, [1.1, 19.0])]), Some(Avx2), "slower with one row");
        assert_eq!(choose(&[(Avx512, [0.98, 19.5])]), Some(Avx2), "chance");
        assert_eq!(choose(&[(Avx512, [1.0, 16.0]), (Vnni, [0.7, 10.0])]), Some(Vnni));
        assert_eq!(choose(&[(Avx512, [1.0, 16.0]), (Vnni, [0.7, 10.0]), (Amx, [0.7, 4.0])]), Some(Amx));
        assert_eq!(choose(&[(Avx512, [1.0, 16.0]), (Vnni, [0.7, 10.0]), (Amx, [1.5, 6.0])]), Some(Vnni), "slower with one row");
        assert_eq!(fastest(&[]), None);
    }

    /// Protects the measurement: every set of this processor is timed, and has the bytes of the plainest.
    #[test]
    fn every_set_is_measured() {
        let sets = KernelSet::available();
        let times = measure(&sets);
        assert_eq!(times.iter().map(|t| t.0).collect::<Vec<_>>(), sets);
        assert!(times.iter().all(|t| t.1.iter().all(|&s| s > 0.0 && s.is_finite())));
    }
}
