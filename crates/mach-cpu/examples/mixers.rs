//! Speed of the mixers, for tuning: `cargo run --release -p mach-cpu --example mixers`. Milliseconds of one layer's
//! recurrence and attention at the shapes of Qwen3.5-35B-A3B, for one row and for 512. Products: `mach bench kernels`.

#[path = "../tests/common/mod.rs"]
mod common;

use std::time::Instant;

use common::{Rng, cpu, tensor};
use mach_backend::{AttentionSpec, Backend, GdnSegment, GdnSpec, GdnWeights, KvSpec, KvType, QkNormRope, Segment, StateSpec};
use mach_cpu::{Cpu, KernelSet};

fn main() {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    for set in KernelSet::available().into_iter().filter(|&set| set != KernelSet::Scalar) {
        [1, threads].into_iter().for_each(|threads| mixers(&cpu(set, threads)));
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
        let (mut state, mut out) = (cpu.state(&StateSpec::Gdn(spec)), cpu.tensor(rows, 4096));
        let ms = best(|| cpu.gdn(&spec, &w, &qkv, &z, &b, &a, &mut [GdnSegment { row: 0, rows, state: &mut state }], &mut out));
        println!("{:<10} {:>7} recurrence, {rows} rows: {ms:.3} ms", cpu.kernel_set().name(), cpu.threads());
    }
    let spec = AttentionSpec { heads: 16, kv_heads: 2, head_dim: 256, scale: 1.0 / 16.0, window: None, gate: true };
    let mut kv = cpu.kv(KvSpec { kv_heads: 2, head_dim: 256, ty: KvType::F16 });
    let blocks: Vec<u32> = (0..160).collect();
    cpu.kv_grow(&mut kv, blocks.len());
    for (rows, pos) in [(512, 0), (512, 4096), (1, 4096)] {
        let (mut q, mut k, v, rope) = (random(rows, 8192), random(rows, 512), random(rows, 512), random(rows, 64));
        let prep = QkNormRope { eps: 1e-6, q_norm: None, k_norm: None, v_norm: false, rope: &rope, half: 32 };
        let segments = [Segment { row: 0, rows, pos, blocks: &blocks }];
        let store = best(|| cpu.qkv_store(&spec, &prep, &mut q, &mut k, Some(&v), &segments, &mut kv));
        let mut out = cpu.tensor(rows, 4096);
        let ms = best(|| cpu.attention(&spec, &q, None, &segments, &kv, &mut out));
        println!("{:<10} {:>7} attention, {rows} rows from {pos}: {ms:.3} ms, preparing {store:.3} ms", cpu.kernel_set().name(), cpu.threads());
    }
}
