//! Rates of the machine, measured: what memory and the drive can give.

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use mach_backend::Part;
use mach_experts::{Key, RecordSource};
use mach_format::{AlignedBytes, READ_ALIGN};

/// Streams that one thread reads at a time: one alone waits for the prefetcher of the processor.
const STREAMS: usize = 4;
/// Windows that a buffer is read in, and the times that all of it is read. The best window counts: on a busy machine some
/// of them are not interrupted.
const WINDOWS: usize = 8;
const PASSES: usize = 4;

/// Bytes per second that `threads` can read from memory together, each from its own `bytes_each`.
pub(crate) fn memory_rate(threads: usize, bytes_each: usize) -> f64 {
    let threads = threads.max(1);
    let arrived = AtomicUsize::new(0);
    let windows = |arrived: &AtomicUsize| -> Vec<(Instant, Instant)> {
        // In huge pages where there are any, as weights are.
        let mut data = AlignedBytes::zeroed(bytes_each);
        data.fill(1);
        let data = lines(&data);
        let window = (data.len() / WINDOWS).max(1);
        let mut times = Vec::with_capacity(PASSES * WINDOWS);
        for part in (0..PASSES).flat_map(|_| data.chunks_exact(window).take(WINDOWS)) {
            meet(arrived, threads * (times.len() + 1));
            let began = Instant::now();
            black_box(sum(black_box(part)));
            times.push((began, Instant::now()));
        }
        times
    };
    let times: Vec<Vec<(Instant, Instant)>> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(|| windows(&arrived))).collect();
        workers.into_iter().filter_map(|w| w.join().ok()).collect()
    });
    let rate = |window: usize| {
        let spans = times.iter().filter_map(|t| t.get(window));
        let (first, last) = (spans.clone().map(|s| s.0).min(), spans.map(|s| s.1).max());
        let seconds = first.zip(last).map_or(f64::INFINITY, |(first, last)| (last - first).as_secs_f64());
        (times.len() * (bytes_each / WINDOWS)) as f64 / seconds.max(1e-9)
    };
    (0..PASSES * WINDOWS).map(rate).fold(0.0, f64::max)
}

/// Waits until `all` arrivals, awake: a window is shorter than it takes to wake a thread up.
fn meet(arrived: &AtomicUsize, all: usize) {
    arrived.fetch_add(1, Ordering::Relaxed);
    let mut spins = 0u32;
    while arrived.load(Ordering::Relaxed) < all {
        spins += 1;
        if spins < 10_000 { std::hint::spin_loop() } else { std::thread::yield_now() }
    }
}

/// Bytes per second that `threads` read together, each from its own `bytes_each` that stay in its cache: the sum of each
/// thread's best.
pub(crate) fn cache_rate(threads: usize, bytes_each: usize) -> f64 {
    const ROUNDS: usize = 100;
    const REPEATS: usize = 20;
    let best = || {
        let mut data = AlignedBytes::zeroed(bytes_each);
        data.fill(1);
        let times = (0..ROUNDS).map(|_| {
            let began = Instant::now();
            for _ in 0..REPEATS {
                black_box(sum(black_box(lines(&data))));
            }
            began.elapsed().as_secs_f64()
        });
        (REPEATS * bytes_each) as f64 / times.fold(f64::INFINITY, f64::min).max(1e-9)
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads.max(1)).map(|_| scope.spawn(best)).collect();
        workers.into_iter().filter_map(|w| w.join().ok()).sum()
    })
}

/// A cache line as words.
type Line = [[u8; 8]; 8];

fn lines(bytes: &[u8]) -> &[Line] {
    bytes.as_chunks().0.as_chunks().0
}

/// The sum of words, over several streams with several sums each, so that neither the latency of an addition nor that of
/// a memory access is waited for.
fn sum(data: &[Line]) -> u64 {
    let part = data.len() / STREAMS;
    let streams: [&[Line]; STREAMS] = std::array::from_fn(|s| &data[s * part..(s + 1) * part]);
    let mut sums = [[0u64; 8]; STREAMS];
    for line in 0..part {
        for (sums, stream) in sums.iter_mut().zip(&streams) {
            for (sum, word) in sums.iter_mut().zip(&stream[line]) {
                *sum = sum.wrapping_add(u64::from_le_bytes(*word));
            }
        }
    }
    sums.iter().flatten().fold(0, |all, sum| all.wrapping_add(*sum))
}

/// Bytes per second of random records with `depth` reads under way; `None` when a read fails.
pub(crate) fn disk_rate(source: &dyn RecordSource, depth: usize, time: Duration) -> Option<f64> {
    let [a, b] = source.part_bytes();
    read_rate(depth, time, a + b, |random, memory| {
        let (first, second) = memory.split_at_mut(a);
        let key = Key { layer: random.below(source.layers()), expert: random.below(source.experts()) };
        source.read(key, Part::Both, [first, second]).ok()
    })
}

/// Bytes per second that `depth` threads read together. `read` makes one read into its thread's `bytes` of memory, and gives
/// the bytes; `None` when one fails.
pub(crate) fn read_rate(depth: usize, time: Duration, bytes: usize, read: impl Fn(&mut Xorshift, &mut [u8]) -> Option<u64> + Sync) -> Option<f64> {
    let (total, failed) = (AtomicU64::new(0), AtomicBool::new(false));
    let began = Instant::now();
    let reader = |seed: usize| {
        let mut memory = vec![0u8; bytes + READ_ALIGN];
        let start = memory.as_ptr().align_offset(READ_ALIGN);
        let mut random = Xorshift::new(seed as u64);
        // At least one, however late a thread starts on a busy machine.
        loop {
            match read(&mut random, &mut memory[start..start + bytes]) {
                Some(read) => total.fetch_add(read, Ordering::Relaxed),
                None => return failed.store(true, Ordering::Relaxed),
            };
            if began.elapsed() >= time {
                return;
            }
        }
    };
    let reader = &reader;
    std::thread::scope(|scope| (0..depth.max(1)).for_each(|seed| drop(scope.spawn(move || reader(seed)))));
    let seconds = began.elapsed().as_secs_f64();
    (!failed.into_inner()).then(|| total.into_inner() as f64 / seconds.max(1e-9))
}

/// A fast generator of numbers that only have to look random.
pub(crate) struct Xorshift(u64);

impl Xorshift {
    /// Different numbers for every seed.
    pub(crate) fn new(seed: u64) -> Self {
        // Neighbouring seeds far apart, and never 0.
        let x = seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        Self((x ^ x >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// 0 up to `n`, exclusive.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        (((self.next() >> 32) * n as u64) >> 32) as usize
    }

    /// 0 up to 1.
    pub(crate) fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u32 << 24) as f32
    }

    /// Mean 0, variance 1, by the sum of twelve.
    pub(crate) fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.unit()).sum::<f32>() - 6.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Protects the ceilings from reads that are left out: every word counts once.
    #[test]
    fn every_word_is_read() {
        assert_eq!(sum(&vec![[3u64.to_le_bytes(); 8]; 1 << 9]), 3 << 12);
        assert!(cache_rate(1, 1 << 12).is_finite());
        assert!(memory_rate(2, 1 << 20).is_finite());
    }

    /// Protects synthetic weights and probes from a generator that is stuck or biased.
    #[test]
    fn numbers_look_random() {
        let mut random = Xorshift::new(7);
        let values: Vec<f32> = (0..20_000).map(|_| random.normal()).collect();
        let mean = values.iter().sum::<f32>() / values.len() as f32;
        let variance = values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32;
        assert!(mean.abs() < 0.03 && (variance - 1.0).abs() < 0.05, "{mean} {variance}");
        let counts = (0..8000).fold([0; 8], |mut counts, _| {
            counts[random.below(8)] += 1;
            counts
        });
        assert!(counts.iter().all(|c| (850..1150).contains(c)), "{counts:?}");
        assert_ne!(Xorshift::new(0).next(), Xorshift::new(1).next());
    }
}
