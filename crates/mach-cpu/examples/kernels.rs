//! Speed of the product kernels, for tuning: `cargo run --release -p mach-cpu --example kernels [SECONDS]`.
//!
//! Products: one row streams many matrices (GB/s of packed weights), more rows reuse them (Gop/s, a multiply and an add are two).
//! Then milliseconds of one layer's recurrence and attention at the shapes of Qwen3.5-35B-A3B, for one row and for 512.

#[path = "../tests/common/mod.rs"]
mod common;

use std::time::{Duration, Instant};

use common::{Rng, affine, random_matrix, tensor};
use mach_backend::{AttentionSpec, Backend, GdnSegment, GdnSpec, GdnWeights, KvSpec, KvType, QkNormRope, Segment};
use mach_cpu::{Cpu, CpuOptions, KernelSet, Tensor, Weight};
use mach_format::{ScaleType, WeightFormat};

const SIZE: usize = 2048;

fn main() {
    let seconds: f64 = std::env::args().nth(1).and_then(|s| s.parse().ok()).unwrap_or(0.5);
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let formats = [
        affine(4, 64, ScaleType::BF16),
        affine(4, 32, ScaleType::F16),
        affine(8, 64, ScaleType::BF16),
        WeightFormat::BF16,
        WeightFormat::F16,
        WeightFormat::F32,
    ];
    println!(
        "{:<10} {:>7} {:>18} {:>10} {:>10} {:>10} {:>10} {:>10}",
        "kernels", "threads", "format", "1: GB/s", "4: Gop/s", "16: Gop/s", "64: Gop/s", "512: Gop/s"
    );
    for set in KernelSet::available().into_iter().rev() {
        for threads in [1, threads] {
            let cpu = Cpu::new(CpuOptions { threads: Some(threads), kernels: Some(set), ..CpuOptions::default() }).expect("an available kernel set");
            for format in formats {
                let time = Duration::from_secs_f64(if set == KernelSet::Scalar { seconds / 4.0 } else { seconds });
                let mut rng = Rng::new(1);
                let one = random_matrix(&mut rng, SIZE, SIZE, format);
                let bytes = one.layout.bytes();
                // More than any cache holds.
                let weights: Vec<Weight> = (0..(128 << 20) / bytes).map(|_| cpu.weight(one.clone())).collect();
                let x = tensor(&cpu, SIZE, &rng.normals(512 * SIZE));
                let mut out = cpu.tensor(512, SIZE);
                print!("{:<10} {threads:>7} {:>18}", set.name(), format.to_string());
                for rows in [1, 4, 16, 64, 512] {
                    if set == KernelSet::Scalar && rows > 16 {
                        continue;
                    }
                    let per_matrix = measure(&cpu, &weights, &x, rows, &mut out, time);
                    let ops = (2 * SIZE * SIZE * rows) as f64;
                    print!(" {:>10.1}", if rows == 1 { bytes as f64 } else { ops } / per_matrix / 1e9);
                }
                println!();
            }
            if set != KernelSet::Scalar {
                mixers(&cpu);
            }
        }
    }
}

/// The best of five, in milliseconds.
fn best(mut f: impl FnMut()) -> f64 {
    let time = |f: &mut dyn FnMut()| {
        let start = Instant::now();
        f();
        start.elapsed().as_secs_f64() * 1e3
    };
    (0..5).map(|_| time(&mut f)).fold(f64::INFINITY, f64::min)
}

fn mixers(cpu: &Cpu) {
    let mut rng = Rng::new(2);
    let mut random = |rows: usize, cols: usize| tensor(cpu, cols, &rng.normals(rows * cols));
    let spec = GdnSpec { k_heads: 16, v_heads: 32, k_dim: 128, v_dim: 128, kernel: 4, eps: 1e-6, tiled: false };
    let (conv, norm, neg_exp_a, dt_bias) = (random(4, spec.channels()), random(1, 128), random(1, 32), random(1, 32));
    let w = GdnWeights { conv: &conv, neg_exp_a: &neg_exp_a, dt_bias: &dt_bias, norm: &norm };
    for rows in [1, 512] {
        let (qkv, z, b, a) = (random(rows, spec.channels()), random(rows, 4096), random(rows, 32), random(rows, 32));
        let (mut state, mut out) = (cpu.state(&spec), cpu.tensor(rows, 4096));
        let ms = best(|| cpu.gdn(&spec, &w, &qkv, &z, &b, &a, &mut [GdnSegment { row: 0, rows, state: &mut state }], &mut out));
        println!("{:<10} {:>7} recurrence, {rows} rows: {ms:.3} ms", cpu.kernel_set().name(), cpu.threads());
    }
    let spec = AttentionSpec { heads: 16, kv_heads: 2, head_dim: 256, scale: 1.0 / 16.0, window: None, gate: true };
    let mut kv = cpu.kv(KvSpec { kv_heads: 2, head_dim: 256, ty: KvType::F16 });
    let blocks: Vec<u32> = (0..160).collect();
    cpu.kv_grow(&mut kv, blocks.len());
    for (rows, pos) in [(512, 0), (512, 4096), (1, 4096)] {
        let (mut q, mut k, v, rope) = (random(rows, 8192), random(rows, 512), random(rows, 512), random(rows, 64));
        let prep = QkNormRope { eps: 1e-6, q_norm: None, k_norm: None, rope: &rope, half: 32 };
        let segments = [Segment { row: 0, rows, pos, blocks: &blocks }];
        let store = best(|| cpu.qkv_store(&spec, &prep, &mut q, &mut k, &v, &segments, &mut kv));
        let mut out = cpu.tensor(rows, 4096);
        let ms = best(|| cpu.attention(&spec, &q, &segments, &kv, &mut out));
        println!("{:<10} {:>7} attention, {rows} rows from {pos}: {ms:.3} ms, preparing {store:.3} ms", cpu.kernel_set().name(), cpu.threads());
    }
}

/// Seconds per matrix, the best of several rounds.
fn measure(cpu: &Cpu, weights: &[Weight], x: &Tensor, rows: usize, out: &mut Tensor, time: Duration) -> f64 {
    let (start, mut best, mut next) = (Instant::now(), f64::INFINITY, 0);
    // Short rounds, so that some are not interrupted on a busy machine.
    let round = if rows == 1 { 8.min(weights.len()) } else { (16 / rows).max(1) };
    while start.elapsed() < time || best == f64::INFINITY {
        let round_start = Instant::now();
        for _ in 0..round {
            cpu.linear(x, rows, &mut [(&weights[next % weights.len()], &mut *out)]);
            next += 1;
        }
        best = best.min(round_start.elapsed().as_secs_f64() / round as f64);
    }
    best
}
