//! Ceilings of arithmetic: bare multiply-adds on registers, with the instructions that a kernel set uses.

use std::arch::asm;
use std::time::{Duration, Instant};

use crate::KernelSet;
#[cfg(target_arch = "x86_64")]
use crate::kernels::TileConfig;

/// One round: long against reading the clock, short against the time slices of a busy system.
const ROUND: Duration = Duration::from_millis(2);
const ROUNDS: usize = 50;
/// Passes through a loop between looks at the clock, some 50 µs.
const PASSES: u64 = 4096;

/// A loop that runs so many passes, and the multiply-adds of one pass.
type Loop = (unsafe fn(u64), u64);

/// Most int8 operations per second in 10⁹ (a multiply and an add are two) that `threads` threads reach together with
/// the instructions of `set`: the sum of each thread's best of several short rounds. `None` when the processor lacks
/// the set, or where the set has no such instructions or no loop was written.
pub fn peak_gops(set: KernelSet, threads: usize) -> Option<f64> {
    set.table()?;
    bare(set).map(|bare| together(bare, threads))
}

/// The same for multiply-adds of f32.
pub fn peak_gflops(set: KernelSet, threads: usize) -> Option<f64> {
    set.table()?;
    bare_f32(set).map(|bare| together(bare, threads))
}

/// 10⁹ operations per second; the loop must be one that this processor can run.
fn together((run, macs): Loop, threads: usize) -> f64 {
    let best = move || {
        let mut best = 0.0f64;
        for _ in 0..ROUNDS {
            let (began, mut passes) = (Instant::now(), 0);
            while began.elapsed() < ROUND {
                // SAFETY: callers looked for the set's table, so the processor has the instructions; the loops touch registers only.
                unsafe { run(PASSES) };
                passes += PASSES;
            }
            best = best.max((passes * macs * 2) as f64 / began.elapsed().as_secs_f64());
        }
        best
    };
    let total: f64 = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads.max(1)).map(|_| scope.spawn(best)).collect();
        workers.into_iter().filter_map(|w| w.join().ok()).sum()
    });
    total / 1e9
}

fn bare_f32(set: KernelSet) -> Option<Loop> {
    match set {
        #[cfg(target_arch = "x86_64")]
        KernelSet::Avx2 | KernelSet::AvxVnni => Some((fma_avx2, 12 * 8)),
        #[cfg(target_arch = "x86_64")]
        KernelSet::Avx512 | KernelSet::Vnni | KernelSet::Amx => Some((fma_avx512, 12 * 16)),
        #[cfg(target_arch = "aarch64")]
        KernelSet::Neon | KernelSet::NeonDot | KernelSet::NeonI8mm => Some((fmla, 12 * 4)),
        _ => None,
    }
}

fn bare(set: KernelSet) -> Option<Loop> {
    match set {
        #[cfg(target_arch = "x86_64")]
        KernelSet::Avx2 => Some((avx2, 16 * 32)),
        #[cfg(target_arch = "x86_64")]
        KernelSet::AvxVnni => Some((avx_vnni, 12 * 32)),
        #[cfg(target_arch = "x86_64")]
        KernelSet::Avx512 => Some((avx512, 16 * 64)),
        #[cfg(target_arch = "x86_64")]
        KernelSet::Vnni => Some((vnni, 12 * 64)),
        #[cfg(target_arch = "x86_64")]
        KernelSet::Amx => Some((amx, 4 * 16 * 16 * 64)),
        #[cfg(target_arch = "aarch64")]
        KernelSet::NeonDot => Some((sdot, 12 * 16)),
        #[cfg(target_arch = "aarch64")]
        KernelSet::NeonI8mm => Some((smmla, 12 * 32)),
        _ => None,
    }
}

/// Defines a loop: its counter's instructions, the instructions of one pass, the registers that they write.
macro_rules! define_loop {
    ($name:ident, $feature:literal, $next:literal, [$($line:expr),* $(,)?], [$($register:tt),*]) => {
        #[target_feature(enable = $feature)]
        unsafe fn $name(passes: u64) {
            // SAFETY: arithmetic on registers that are all declared as written; no memory is touched.
            unsafe { asm!("2:", $($line,)* $next, n = inout(reg) passes => _, $(out($register) _,)* options(nomem, nostack)) }
        }
    };
}

/// Bytes multiplied and added pairwise, then added to an accumulator of i16.
#[cfg(target_arch = "x86_64")]
macro_rules! bytes {
    ($r:literal, $acc:literal) => {
        concat!("vpmaddubsw ", $r, "2, ", $r, "0, ", $r, "1\nvpaddw ", $r, $acc, ", ", $r, $acc, ", ", $r, "2")
    };
}

/// An accumulator of i16 widened and added to one of i32.
#[cfg(target_arch = "x86_64")]
macro_rules! widen {
    ($r:literal, $from:literal, $to:literal) => {
        concat!("vpmaddwd ", $r, "2, ", $r, $from, ", ", $r, "1\nvpaddd ", $r, $to, ", ", $r, $to, ", ", $r, "2")
    };
}

/// Sixteen products of bytes for every two that widen their sums, as the 4-bit kernels have them.
#[cfg(target_arch = "x86_64")]
macro_rules! sixteen {
    ($name:ident, $feature:literal, $r:literal, $registers:tt) => {
        define_loop!(
            $name,
            $feature,
            "dec {n}\njnz 2b",
            [
                bytes!($r, "3"),
                bytes!($r, "4"),
                bytes!($r, "5"),
                bytes!($r, "6"),
                bytes!($r, "7"),
                bytes!($r, "8"),
                bytes!($r, "9"),
                bytes!($r, "10"),
                widen!($r, "3", "11"),
                bytes!($r, "3"),
                bytes!($r, "4"),
                bytes!($r, "5"),
                bytes!($r, "6"),
                bytes!($r, "7"),
                bytes!($r, "8"),
                bytes!($r, "9"),
                bytes!($r, "10"),
                widen!($r, "4", "12"),
            ],
            $registers
        );
    };
}

#[cfg(target_arch = "x86_64")]
sixteen!(avx2, "avx2", "ymm", ["ymm0", "ymm1", "ymm2", "ymm3", "ymm4", "ymm5", "ymm6", "ymm7", "ymm8", "ymm9", "ymm10", "ymm11", "ymm12"]);
#[cfg(target_arch = "x86_64")]
sixteen!(avx512, "avx512f,avx512bw", "zmm", ["zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", "zmm9", "zmm10", "zmm11", "zmm12"]);

/// One instruction on each of 12 accumulators, more than its latency times its throughput anywhere.
macro_rules! twelve {
    ($name:ident, $feature:literal, $next:literal, $op:literal, $r:literal, $of:literal, $args:literal, $registers:tt) => {
        define_loop!(
            $name,
            $feature,
            $next,
            [
                concat!($op, " ", $r, "2", $of, $args),
                concat!($op, " ", $r, "3", $of, $args),
                concat!($op, " ", $r, "4", $of, $args),
                concat!($op, " ", $r, "5", $of, $args),
                concat!($op, " ", $r, "6", $of, $args),
                concat!($op, " ", $r, "7", $of, $args),
                concat!($op, " ", $r, "16", $of, $args),
                concat!($op, " ", $r, "17", $of, $args),
                concat!($op, " ", $r, "18", $of, $args),
                concat!($op, " ", $r, "19", $of, $args),
                concat!($op, " ", $r, "20", $of, $args),
                concat!($op, " ", $r, "21", $of, $args),
            ],
            $registers
        );
    };
}

#[cfg(target_arch = "x86_64")]
twelve!(
    vnni,
    "avx512f,avx512vnni",
    "dec {n}\njnz 2b",
    "vpdpbusd",
    "zmm",
    "",
    ", zmm0, zmm1",
    ["zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm16", "zmm17", "zmm18", "zmm19", "zmm20", "zmm21"]
);
#[cfg(target_arch = "x86_64")]
twelve!(
    fma_avx512,
    "avx512f",
    "dec {n}\njnz 2b",
    "vfmadd231ps",
    "zmm",
    "",
    ", zmm0, zmm1",
    ["zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm16", "zmm17", "zmm18", "zmm19", "zmm20", "zmm21"]
);
/// Two tiles of activations times two of weights.
#[cfg(target_arch = "x86_64")]
unsafe fn amx(passes: u64) {
    let config = TileConfig::full();
    // SAFETY: the configuration is read, and arithmetic is on tiles, which nothing else uses.
    unsafe {
        asm!(
            "ldtilecfg [{config}]",
            "2:",
            "tdpbsud tmm0, tmm4, tmm6",
            "tdpbsud tmm1, tmm4, tmm7",
            "tdpbsud tmm2, tmm5, tmm6",
            "tdpbsud tmm3, tmm5, tmm7",
            "dec {n}",
            "jnz 2b",
            "tilerelease",
            config = in(reg) &raw const config,
            n = inout(reg) passes => _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, readonly),
        );
    }
}
/// The same without registers 16 and up, which these sets lack.
#[cfg(target_arch = "x86_64")]
macro_rules! twelve_low {
    ($name:ident, $feature:literal, $op:literal) => {
        define_loop!(
            $name,
            $feature,
            "dec {n}\njnz 2b",
            [
                concat!($op, " ymm2, ymm0, ymm1"),
                concat!($op, " ymm3, ymm0, ymm1"),
                concat!($op, " ymm4, ymm0, ymm1"),
                concat!($op, " ymm5, ymm0, ymm1"),
                concat!($op, " ymm6, ymm0, ymm1"),
                concat!($op, " ymm7, ymm0, ymm1"),
                concat!($op, " ymm8, ymm0, ymm1"),
                concat!($op, " ymm9, ymm0, ymm1"),
                concat!($op, " ymm10, ymm0, ymm1"),
                concat!($op, " ymm11, ymm0, ymm1"),
                concat!($op, " ymm12, ymm0, ymm1"),
                concat!($op, " ymm13, ymm0, ymm1"),
            ],
            ["ymm2", "ymm3", "ymm4", "ymm5", "ymm6", "ymm7", "ymm8", "ymm9", "ymm10", "ymm11", "ymm12", "ymm13"]
        );
    };
}
#[cfg(target_arch = "x86_64")]
twelve_low!(fma_avx2, "avx2,fma", "vfmadd231ps");
// Without the prefix the instruction of AVX-512 would be meant.
#[cfg(target_arch = "x86_64")]
twelve_low!(avx_vnni, "avxvnni", "{{vex}} vpdpbusd");
#[cfg(target_arch = "aarch64")]
twelve!(
    fmla,
    "neon",
    "subs {n}, {n}, #1\nb.ne 2b",
    "fmla",
    "v",
    ".4s",
    ", v0.4s, v1.4s",
    ["v2", "v3", "v4", "v5", "v6", "v7", "v16", "v17", "v18", "v19", "v20", "v21"]
);
#[cfg(target_arch = "aarch64")]
twelve!(
    sdot,
    "neon,dotprod",
    "subs {n}, {n}, #1\nb.ne 2b",
    "sdot",
    "v",
    ".4s",
    ", v0.16b, v1.16b",
    ["v2", "v3", "v4", "v5", "v6", "v7", "v16", "v17", "v18", "v19", "v20", "v21"]
);
#[cfg(target_arch = "aarch64")]
twelve!(
    smmla,
    "neon,i8mm",
    "subs {n}, {n}, #1\nb.ne 2b",
    "smmla",
    "v",
    ".4s",
    ", v0.16b, v1.16b",
    ["v2", "v3", "v4", "v5", "v6", "v7", "v16", "v17", "v18", "v19", "v20", "v21"]
);

#[cfg(test)]
mod tests {
    use super::*;

    /// Protects the ceiling from being none for the set that is chosen by itself, and from losing threads.
    #[test]
    fn the_chosen_set_has_a_ceiling() {
        let set = KernelSet::automatic();
        if bare(set).is_some() {
            assert!(peak_gops(set, 1).is_some_and(|peak| peak > 0.0 && peak.is_finite()));
        }
        assert_eq!((peak_gops(KernelSet::Scalar, 1), peak_gflops(KernelSet::Scalar, 1)), (None, None));
        assert!(bare_f32(set).is_none() || peak_gflops(set, 1).is_some_and(|peak| peak > 0.0 && peak.is_finite()));
    }
}
