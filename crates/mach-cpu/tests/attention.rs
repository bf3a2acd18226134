//! Attention: right against the reference backend, and the same bytes for every kernel set, chunking and batch.

mod common;

use common::*;
use mach_backend::reference::Reference;
use mach_backend::{AttentionSpec, Backend, KvSpec, KvType, NO_BLOCK, QkNormRope, Segment};
use mach_cpu::{Cpu, KernelSet};

#[derive(Clone, Copy, Debug)]
struct Case {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    half: usize,
    window: Option<usize>,
    gate: bool,
    norm: bool,
    /// Sinks, normed values, and values that are the raw keys.
    sinks: bool,
    v_norm: bool,
    v_is_k: bool,
    ty: KvType,
}

impl Case {
    fn spec(&self) -> AttentionSpec {
        AttentionSpec {
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            scale: 1.0 / (self.head_dim as f32).sqrt(),
            window: self.window,
            gate: self.gate,
        }
    }
    fn q_cols(&self) -> usize {
        self.heads * self.head_dim * if self.gate { 2 } else { 1 }
    }
}

const PLAIN: Case =
    Case { heads: 4, kv_heads: 2, head_dim: 16, half: 4, window: None, gate: true, norm: true, sinks: false, v_norm: false, v_is_k: false, ty: KvType::F32 };

const CASES: [Case; 8] = [
    PLAIN,
    Case { heads: 6, kv_heads: 1, head_dim: 24, half: 12, window: Some(40), gate: false, norm: true, ty: KvType::F16, ..PLAIN },
    Case { heads: 3, kv_heads: 3, head_dim: 10, half: 2, window: None, gate: false, norm: false, ty: KvType::F32, ..PLAIN },
    Case { heads: 8, kv_heads: 1, head_dim: 64, half: 32, window: None, gate: true, norm: true, ty: KvType::F16, ..PLAIN },
    Case { heads: 2, kv_heads: 2, head_dim: 32, half: 16, window: Some(300), gate: true, norm: false, ty: KvType::F16, ..PLAIN },
    Case { heads: 4, head_dim: 20, half: 10, window: Some(8), gate: false, norm: false, sinks: true, ..PLAIN },
    Case { gate: false, sinks: true, ..PLAIN },
    Case { head_dim: 48, half: 24, gate: false, v_norm: true, v_is_k: true, ..PLAIN },
];

struct Inputs {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    rope: Vec<f32>,
    q_norm: Vec<f32>,
    k_norm: Vec<f32>,
    sinks: Vec<f32>,
}

fn inputs(case: &Case, tokens: usize) -> Inputs {
    let mut rng = Rng::new(case.head_dim as u64);
    let kv = tokens * case.kv_heads * case.head_dim;
    let angles = rng.normals(tokens * case.half);
    Inputs {
        q: rng.normals(tokens * case.q_cols()),
        k: rng.normals(kv),
        v: rng.normals(kv),
        rope: angles.chunks_exact(case.half).flat_map(|a| a.iter().map(|x| x.cos()).chain(a.iter().map(|x| x.sin()))).collect(),
        q_norm: rng.normals(case.head_dim),
        k_norm: rng.normals(case.head_dim),
        sinks: rng.normals(case.heads).iter().map(|x| 2.0 * x).collect(),
    }
}

/// Runs the tokens in chunks, blocks handed out backwards. Of layers with a window only the blocks that a chunk sees are there.
fn run<B: Backend>(b: &B, case: &Case, x: &Inputs, tokens: usize, chunk: usize) -> Vec<f32> {
    let mut blocks: Vec<u32> = (0..tokens.div_ceil(32) as u32).rev().collect();
    let mut kv = b.kv(KvSpec { kv_heads: case.kv_heads, head_dim: case.head_dim, ty: case.ty });
    let (q_norm, k_norm) = (tensor(b, case.head_dim, &x.q_norm), tensor(b, case.head_dim, &x.k_norm));
    let sinks = tensor(b, case.heads, &x.sinks);
    let (q_cols, kv_cols, out_cols) = (case.q_cols(), case.kv_heads * case.head_dim, case.heads * case.head_dim);
    let mut result = Vec::new();
    for pos in (0..tokens).step_by(chunk) {
        let rows = chunk.min(tokens - pos);
        let part = |x: &[f32], cols: usize| x[pos * cols..(pos + rows) * cols].to_vec();
        let (mut q, mut k) = (tensor(b, q_cols, &part(&x.q, q_cols)), tensor(b, kv_cols, &part(&x.k, kv_cols)));
        let v = tensor(b, kv_cols, &part(&x.v, kv_cols));
        let rope = tensor(b, 2 * case.half, &part(&x.rope, 2 * case.half));
        let (q_norm, k_norm) = (case.norm.then_some(&q_norm), case.norm.then_some(&k_norm));
        let prep = QkNormRope { eps: 1e-6, q_norm, k_norm, v_norm: case.v_norm, rope: &rope, half: case.half };
        b.kv_grow(&mut kv, blocks.len());
        blocks[..case.window.map_or(0, |w| (pos + 1).saturating_sub(w) / 32)].fill(NO_BLOCK);
        let segments = [Segment { row: 0, rows, pos, blocks: &blocks }];
        b.qkv_store(&case.spec(), &prep, &mut q, &mut k, (!case.v_is_k).then_some(&v), &segments, &mut kv);
        let mut out = b.tensor(rows, out_cols);
        b.attention(&case.spec(), &q, case.sinks.then_some(&sinks), &segments, &kv, &mut out);
        result.extend(values(b, &out, rows * out_cols));
    }
    result
}

#[test]
fn agrees_with_the_reference_backend() {
    for case in CASES {
        let x = inputs(&case, 70);
        let want = run(&Reference, &case, &x, 70, 70);
        let e = error(&run(&cpu(KernelSet::automatic(), 2), &case, &x, 70, 70), &want);
        // Keys and values may round to the other of two neighbours of f16 where q/k norms differ in the last bit.
        assert!(e < if case.ty == KvType::F16 { 1e-3 } else { 5e-6 }, "{case:?}: error {e}");
    }
}

#[test]
fn long_contexts_agree_with_the_reference_backend() {
    for case in [CASES[0], CASES[4], CASES[5], CASES[6]] {
        let x = inputs(&case, 600);
        let e = error(&run(&cpu(KernelSet::automatic(), 2), &case, &x, 600, 600), &run(&Reference, &case, &x, 600, 600));
        assert!(e < if case.ty == KvType::F16 { 1e-3 } else { 5e-6 }, "{case:?}: error {e}");
    }
}

#[test]
fn chunks_threads_and_kernel_sets_give_the_same_bytes() {
    let first = cpu(KernelSet::Scalar, 1);
    for case in CASES {
        // Past the first merge segment where heads are small; emulated runs are slow.
        let tokens = if case.heads * case.head_dim > 100 { 75 } else { 270 };
        let x = inputs(&case, tokens);
        let want = run(&first, &case, &x, tokens, tokens);
        for cpu in cpus() {
            for chunk in [1, 7, 64] {
                assert_bytes(&run(&cpu, &case, &x, tokens, chunk), &want, &format!("{case:?}, chunks of {chunk}, {}", label(&cpu)));
            }
        }
    }
}

/// Protects bounded windows: far behind the first merge segments, with the blocks before the window gone, a window over several
/// segments and one inside a segment give the bytes of one pass that has every block.
#[test]
fn a_window_that_has_moved_far_gives_the_same_bytes() {
    for case in [CASES[4], CASES[5]] {
        let x = inputs(&case, 900);
        let cpu = cpu(KernelSet::automatic(), 2);
        let want = run(&cpu, &case, &x, 900, 900);
        for chunk in [1, 7, 64] {
            assert_bytes(&run(&cpu, &case, &x, 900, chunk), &want, &format!("{case:?}, chunks of {chunk}"));
        }
    }
}

/// Two sequences in one batch give what each gives alone.
#[test]
fn sequences_do_not_see_each_other() {
    let case = CASES[0];
    let (spec, dim, q_cols) = (case.spec(), case.heads * case.head_dim, case.q_cols());
    let kv_cols = case.kv_heads * case.head_dim;
    let x = inputs(&case, 50);
    let cpu = cpu(KernelSet::automatic(), 2);
    let run = |cpu: &Cpu, segments: &[Segment<'_>]| {
        let mut kv = cpu.kv(KvSpec { kv_heads: case.kv_heads, head_dim: case.head_dim, ty: case.ty });
        cpu.kv_grow(&mut kv, 4);
        let (mut q, mut k, v) = (tensor(cpu, q_cols, &x.q), tensor(cpu, kv_cols, &x.k), tensor(cpu, kv_cols, &x.v));
        let rope = tensor(cpu, 2 * case.half, &x.rope);
        let prep = QkNormRope { eps: 1e-6, q_norm: None, k_norm: None, v_norm: false, rope: &rope, half: case.half };
        cpu.qkv_store(&spec, &prep, &mut q, &mut k, Some(&v), segments, &mut kv);
        let mut out = cpu.tensor(50, dim);
        cpu.attention(&spec, &q, None, segments, &kv, &mut out);
        values(cpu, &out, 50 * dim)
    };
    let (a, b) = (Segment { row: 0, rows: 20, pos: 0, blocks: &[3] }, Segment { row: 20, rows: 30, pos: 0, blocks: &[1] });
    let both = run(&cpu, &[a, b]);
    assert_bytes(&both[..20 * dim], &run(&cpu, &[a])[..20 * dim], "first sequence");
    assert_bytes(&both[20 * dim..], &run(&cpu, &[b])[20 * dim..], "second sequence");
}
