//! Gated delta net: right against the reference backend, the same bytes for every kernel set and chunking.

mod common;

use common::*;
use mach_backend::reference::Reference;
use mach_backend::{Backend, GdnSegment, GdnSpec, GdnWeights, StateSpec};
use mach_cpu::KernelSet;

const SPECS: [GdnSpec; 5] = [
    GdnSpec { k_heads: 2, v_heads: 4, k_dim: 16, v_dim: 32, kernel: 4, eps: 1e-6, tiled: true },
    GdnSpec { k_heads: 2, v_heads: 6, k_dim: 24, v_dim: 20, kernel: 2, eps: 1e-5, tiled: false },
    GdnSpec { k_heads: 2, v_heads: 2, k_dim: 8, v_dim: 48, kernel: 8, eps: 1e-6, tiled: false },
    GdnSpec { k_heads: 1, v_heads: 2, k_dim: 128, v_dim: 128, kernel: 4, eps: 1e-6, tiled: false },
    GdnSpec { k_heads: 1, v_heads: 1, k_dim: 12, v_dim: 16, kernel: 3, eps: 1e-6, tiled: false },
];

const TOKENS: usize = 70;

struct Inputs {
    qkv: Vec<f32>,
    z: Vec<f32>,
    b: Vec<f32>,
    a: Vec<f32>,
    conv: Vec<f32>,
    neg_exp_a: Vec<f32>,
    dt_bias: Vec<f32>,
    norm: Vec<f32>,
}

fn inputs(spec: &GdnSpec) -> Inputs {
    let mut rng = Rng::new((spec.k_dim * spec.v_dim) as u64);
    Inputs {
        qkv: rng.normals(TOKENS * spec.channels()),
        z: rng.normals(TOKENS * spec.v_heads * spec.v_dim),
        b: rng.normals(TOKENS * spec.v_heads),
        // Far out too: softplus must not overflow.
        a: (0..TOKENS * spec.v_heads).map(|i| rng.normal() * if i % 11 == 0 { 100.0 } else { 1.0 }).collect(),
        conv: rng.normals(spec.kernel * spec.channels()),
        neg_exp_a: rng.normals(spec.v_heads).iter().map(|x| -x.exp() * 0.2).collect(),
        dt_bias: rng.normals(spec.v_heads),
        norm: rng.normals(spec.v_dim),
    }
}

/// Tokens in chunks; `copies` sequences of the same tokens beside each other in the batch.
fn run<B: Backend>(backend: &B, spec: &GdnSpec, x: &Inputs, chunk: usize, copies: usize) -> Vec<Vec<f32>> {
    let width = spec.v_heads * spec.v_dim;
    let (conv, norm) = (tensor(backend, spec.channels(), &x.conv), tensor(backend, spec.v_dim, &x.norm));
    let (neg_exp_a, dt_bias) = (tensor(backend, spec.v_heads, &x.neg_exp_a), tensor(backend, spec.v_heads, &x.dt_bias));
    let w = GdnWeights { conv: &conv, neg_exp_a: &neg_exp_a, dt_bias: &dt_bias, norm: &norm };
    let mut states: Vec<_> = (0..copies).map(|_| backend.state(&StateSpec::Gdn(*spec))).collect();
    let mut results = vec![Vec::new(); copies];
    for pos in (0..TOKENS).step_by(chunk) {
        let rows = chunk.min(TOKENS - pos);
        let part = |x: &[f32], cols: usize| tensor(backend, cols, &x[pos * cols..(pos + rows) * cols].repeat(copies));
        let mut segments: Vec<_> = states.iter_mut().enumerate().map(|(i, state)| GdnSegment { row: i * rows, rows, state }).collect();
        let mut out = backend.tensor(rows * copies, width);
        let (b, a) = (part(&x.b, spec.v_heads), part(&x.a, spec.v_heads));
        backend.gdn(spec, &w, &part(&x.qkv, spec.channels()), &part(&x.z, width), &b, &a, &mut segments, &mut out);
        for (result, rows) in results.iter_mut().zip(values(backend, &out, rows * copies * width).chunks_exact(rows * width)) {
            result.extend_from_slice(rows);
        }
    }
    results
}

#[test]
fn agrees_with_the_reference_backend() {
    for spec in SPECS {
        let x = inputs(&spec);
        let e = error(&run(&cpu(KernelSet::automatic(), 2), &spec, &x, TOKENS, 1)[0], &run(&Reference, &spec, &x, TOKENS, 1)[0]);
        assert!(e < 2e-5, "{spec:?}: error {e}");
    }
}

#[test]
fn chunks_threads_and_kernel_sets_give_the_same_bytes() {
    for spec in SPECS {
        let x = inputs(&spec);
        let want = &run(&cpu(KernelSet::Scalar, 1), &spec, &x, TOKENS, 1)[0];
        for cpu in cpus() {
            for (chunk, copies) in [(1, 1), (2, 2), (5, 1), (16, 3), (TOKENS, 2)] {
                for got in run(&cpu, &spec, &x, chunk, copies) {
                    assert_bytes(&got, want, &format!("{spec:?}, chunks of {chunk}, {copies} sequences, {}", label(&cpu)));
                }
            }
        }
    }
}

#[test]
fn a_copied_state_continues_alike() {
    let spec = SPECS[0];
    let x = inputs(&spec);
    let cpu = cpu(KernelSet::automatic(), 1);
    let width = spec.v_heads * spec.v_dim;
    let (conv, norm) = (tensor(&cpu, spec.channels(), &x.conv), tensor(&cpu, spec.v_dim, &x.norm));
    let (neg_exp_a, dt_bias) = (tensor(&cpu, spec.v_heads, &x.neg_exp_a), tensor(&cpu, spec.v_heads, &x.dt_bias));
    let w = GdnWeights { conv: &conv, neg_exp_a: &neg_exp_a, dt_bias: &dt_bias, norm: &norm };
    let step = |state: &mut mach_cpu::State| {
        let row = |x: &[f32], cols: usize| tensor(&cpu, cols, &x[..cols]);
        let mut out = cpu.tensor(1, width);
        let mut segments = [GdnSegment { row: 0, rows: 1, state }];
        let (b, a) = (row(&x.b, spec.v_heads), row(&x.a, spec.v_heads));
        cpu.gdn(&spec, &w, &row(&x.qkv, spec.channels()), &row(&x.z, width), &b, &a, &mut segments, &mut out);
        values(&cpu, &out, width)
    };
    let (mut one, mut two) = (cpu.state(&StateSpec::Gdn(spec)), cpu.state(&StateSpec::Gdn(spec)));
    step(&mut one);
    cpu.copy_state(&one, &mut two);
    let next = step(&mut one);
    assert_bytes(&step(&mut two), &next, "copied state");
}
