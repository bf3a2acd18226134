//! Latent attention and hyper-connections: right against the reference backend, the same bytes for every kernel set and chunking.

mod common;

use common::*;
use mach_backend::reference::Reference;
use mach_backend::{
    Backend, CompressSpec, EntrySpec, HyperSpec, HyperWeights, IndexRows, IndexSpec, KV_BLOCK, KvType, LatentRows, LatentSegment, LatentSpec, LatentStores,
    LatentWeights, PoolRows, PoolWeights, StateSpec,
};
use mach_cpu::KernelSet;
use mach_format::WeightFormat;

const TOKENS: usize = 150;

const fn spec(heads: usize, dim: usize, rotary: usize, window: usize, ty: KvType, compress: Option<CompressSpec>) -> LatentSpec {
    LatentSpec { heads, dim, rotary, window, scale: 0.2, eps: 1e-6, ty, compress }
}

const fn index(heads: usize, dim: usize, top_k: usize) -> Option<IndexSpec> {
    Some(IndexSpec { heads, dim, top_k })
}

/// Windows alone, sparse entries, dense entries, a window over several merge segments.
const SPECS: [LatentSpec; 5] = [
    spec(6, 24, 8, 16, KvType::F32, None),
    spec(4, 32, 8, 16, KvType::F32, Some(CompressSpec { ratio: 4, overlap: true, index: index(5, 16, 6) })),
    spec(5, 20, 4, 10, KvType::F16, Some(CompressSpec { ratio: 4, overlap: true, index: index(8, 24, 100) })),
    spec(4, 16, 16, 33, KvType::F32, Some(CompressSpec { ratio: 64, overlap: false, index: None })),
    spec(3, 16, 2, 5, KvType::F16, Some(CompressSpec { ratio: 1, overlap: false, index: None })),
];

/// Rows of one projection for all tokens.
struct Rows {
    cols: usize,
    data: Vec<f32>,
}

struct Inputs {
    q: Rows,
    kv: Rows,
    pools: [[Rows; 2]; 2],
    index_q: Rows,
    index_weights: Rows,
    rope: Rows,
    entry_rope: Rows,
    kv_norm: Vec<f32>,
    sinks: Vec<f32>,
    bias: [Vec<f32>; 2],
    norm: [Vec<f32>; 2],
}

fn angles(positions: impl Iterator<Item = usize>, half: usize) -> Rows {
    let angle = |pos: usize, j: usize| pos as f32 * 100_f32.powf(-(j as f32) / half as f32);
    let data = positions.flat_map(|p| [(0..half).map(|j| angle(p, j).cos()).collect::<Vec<_>>(), (0..half).map(|j| angle(p, j).sin()).collect()].concat());
    Rows { cols: 2 * half, data: data.collect() }
}

fn inputs(spec: &LatentSpec) -> Inputs {
    let mut rng = Rng::new((spec.heads * spec.dim + spec.window) as u64);
    let c = spec.compress.unwrap_or(CompressSpec { ratio: TOKENS, overlap: false, index: None });
    let i = c.index.unwrap_or(IndexSpec { heads: 1, dim: spec.dim, top_k: 1 });
    let rows = |rng: &mut Rng, cols: usize| Rows { cols, data: rng.normals(TOKENS * cols) };
    let widths = [c.width(spec.dim), c.width(i.dim)];
    Inputs {
        q: rows(&mut rng, spec.heads * spec.dim),
        kv: rows(&mut rng, spec.dim),
        pools: widths.map(|w| [rows(&mut rng, w), rows(&mut rng, w)]),
        index_q: rows(&mut rng, i.heads * i.dim),
        index_weights: rows(&mut rng, i.heads),
        rope: angles(0..TOKENS, spec.rotary / 2),
        entry_rope: angles((0..TOKENS.div_ceil(c.ratio)).map(|n| n * c.ratio), spec.rotary / 2),
        kv_norm: rng.normals(spec.dim),
        sinks: rng.normals(spec.heads),
        bias: widths.map(|w| rng.normals(c.ratio * w)),
        norm: [rng.normals(spec.dim), rng.normals(i.dim)],
    }
}

/// Tokens in chunks; `copies` sequences of the same tokens beside each other in the batch, their blocks interleaved.
fn run<B: Backend>(backend: &B, spec: &LatentSpec, x: &Inputs, chunk: usize, copies: usize) -> Vec<Vec<f32>> {
    let width = spec.heads * spec.dim;
    let (kv_norm, sinks) = (tensor(backend, spec.dim, &x.kv_norm), tensor(backend, spec.heads, &x.sinks));
    let index = spec.compress.and_then(|c| c.index);
    let dims = [spec.dim, index.map_or(spec.dim, |i| i.dim)];
    let small = [0, 1].map(|p| (tensor(backend, x.pools[p][0].cols, &x.bias[p]), tensor(backend, dims[p], &x.norm[p])));
    let pool = |p: usize| PoolWeights { position_bias: &small[p].0, norm: &small[p].1 };
    let w = LatentWeights { kv_norm: &kv_norm, sinks: &sinks, entries: spec.compress.map(|_| pool(0)), index: index.map(|_| pool(1)) };
    let store = |dim: usize| {
        spec.compress.map(|c| {
            let mut store = backend.entries(EntrySpec { ratio: c.ratio, width: dim, ty: spec.ty });
            backend.entries_grow(&mut store, copies * TOKENS.div_ceil(KV_BLOCK));
            store
        })
    };
    let (mut entries, mut keys) = (store(dims[0]), index.and_then(|i| store(i.dim)));
    let blocks: Vec<Vec<u32>> = (0..copies).map(|s| (0..TOKENS.div_ceil(KV_BLOCK)).map(|b| (b * copies + s) as u32).collect()).collect();
    let mut states: Vec<_> = (0..copies).map(|_| backend.state(&StateSpec::Latent(*spec))).collect();
    let mut results = vec![Vec::new(); copies];
    for pos in (0..TOKENS).step_by(chunk) {
        let rows = chunk.min(TOKENS - pos);
        let part = |x: &Rows| tensor(backend, x.cols, &x.data[pos * x.cols..(pos + rows) * x.cols].repeat(copies));
        let [[kv0, gate0], [kv1, gate1]] = [0, 1].map(|p| [part(&x.pools[p][0]), part(&x.pools[p][1])]);
        let closed = spec.compress.map_or(0..0, |c| c.complete(pos)..c.complete(pos + rows));
        // At least one row: a tensor has rows.
        let cols = x.entry_rope.cols;
        let entry_rope =
            tensor(backend, cols, &x.entry_rope.data[closed.start * cols..closed.end.max(closed.start + 1).min(x.entry_rope.data.len() / cols) * cols]);
        let (mut q, mut kv, mut index_q, index_weights) = (part(&x.q), part(&x.kv), part(&x.index_q), part(&x.index_weights));
        let mut segments: Vec<_> =
            states.iter_mut().enumerate().map(|(i, state)| LatentSegment { row: i * rows, rows, pos, entry_row: 0, blocks: &blocks[i], state }).collect();
        let mut out = backend.tensor(rows * copies, width);
        let rope = part(&x.rope);
        let latent = LatentRows {
            q: &mut q,
            kv: &mut kv,
            entries: spec.compress.map(|_| PoolRows { kv: &kv0, gate: &gate0 }),
            index: index.map(|_| IndexRows { q: &mut index_q, pool: PoolRows { kv: &kv1, gate: &gate1 }, weights: &index_weights }),
            rope: &rope,
            entry_rope: &entry_rope,
        };
        backend.latent_attention(spec, &w, latent, &mut segments, LatentStores { entries: entries.as_mut(), index: keys.as_mut() }, &mut out);
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
        // Halves may round to neighbours.
        let bound = if spec.ty == KvType::F16 { 1e-3 } else { 2e-5 };
        assert!(e < bound, "{spec:?}: error {e}");
    }
}

#[test]
fn chunks_threads_and_kernel_sets_give_the_same_bytes() {
    for spec in SPECS {
        let x = inputs(&spec);
        let want = &run(&cpu(KernelSet::Scalar, 1), &spec, &x, TOKENS, 1)[0];
        for cpu in cpus() {
            for (chunk, copies) in [(1, 1), (3, 2), (64, 1), (TOKENS, 2)] {
                for got in run(&cpu, &spec, &x, chunk, copies) {
                    assert_bytes(&got, want, &format!("{spec:?}, chunks of {chunk}, {copies} sequences, {}", label(&cpu)));
                }
            }
        }
    }
}

/// Mixes, adds a block's output and reads for the head: `[rows, hidden]` read, streams, `[rows, hidden]` of the head.
fn streams<B: Backend>(backend: &B, spec: &HyperSpec, hidden: usize, first: usize, rows: usize) -> [Vec<f32>; 3] {
    const ROWS: usize = 9;
    let mut rng = Rng::new(hidden as u64);
    let cols = spec.streams * hidden;
    let x = rng.normals(ROWS * cols);
    let y = rng.normals(ROWS * hidden);
    let project = random_matrix(&mut rng, spec.mixes(), cols, WeightFormat::F32);
    let head = random_matrix(&mut rng, spec.streams, cols, WeightFormat::F32);
    let (base, scale) = (rng.normals(spec.mixes()), rng.normals(3));
    let (project, head) = (backend.weight(project), backend.weight(head));
    let (base, head_base) = (tensor(backend, spec.mixes(), &base), tensor(backend, spec.streams, &base[..spec.streams]));
    let (scale, head_scale) = (tensor(backend, 3, &scale), tensor(backend, 1, &scale[..1]));
    let mut x = tensor(backend, cols, &x);
    let y = tensor(backend, hidden, &y[first * hidden..(first + rows) * hidden]);
    let (mut h, mut mix, mut out) = (backend.tensor(rows, hidden), backend.tensor(rows, spec.streams * (1 + spec.streams)), backend.tensor(rows, hidden));
    backend.hyper_mix(spec, &HyperWeights { project: &project, base: &base, scale: &scale }, &x, first, rows, &mut h, &mut mix);
    backend.hyper_add(spec, &mut x, first, rows, &y, &mix);
    backend.hyper_head(spec, &HyperWeights { project: &head, base: &head_base, scale: &head_scale }, &x, first, rows, &mut out);
    let all = values(backend, &x, ROWS * cols);
    [values(backend, &h, rows * hidden), all[first * cols..(first + rows) * cols].to_vec(), values(backend, &out, rows * hidden)]
}

/// Protects the streams of hyper-connections: right, and the same bytes for any batch and kernel set.
#[test]
fn hyper_connections_are_right_and_do_not_depend_on_the_batch() {
    for (streams_n, hidden) in [(4, 40), (2, 17), (4, 256)] {
        let spec = HyperSpec { streams: streams_n, rounds: 20, eps: 1e-6, norm_eps: 1e-6 };
        let want = streams(&cpu(KernelSet::Scalar, 1), &spec, hidden, 0, 9);
        for (got, exact) in want.iter().zip(streams(&Reference, &spec, hidden, 0, 9)) {
            assert!(error(got, &exact) < 2e-5, "{spec:?}: error {}", error(got, &exact));
        }
        for cpu in cpus() {
            for (first, rows) in [(0, 9), (3, 1), (2, 5)] {
                let got = streams(&cpu, &spec, hidden, first, rows);
                for (part, (got, want)) in got.iter().zip(&want).enumerate() {
                    let cols = want.len() / 9;
                    assert_bytes(got, &want[first * cols..(first + rows) * cols], &format!("{spec:?} part {part}, rows from {first}, {}", label(&cpu)));
                }
            }
        }
    }
}

/// Protects grouped products: each group sees its own columns, for plain and for quantised weights.
#[test]
fn grouped_products_take_their_own_columns() {
    let (groups, rows_of, cols, n) = (3, 72, 64, 5);
    for format in [WeightFormat::F32, WeightFormat::BF16, affine(4, 64, mach_format::ScaleType::F16)] {
        let mut rng = Rng::new(3);
        let weights: Vec<_> = (0..groups).map(|_| random_matrix(&mut rng, rows_of, cols, format)).collect();
        let x = rng.normals(n * groups * cols);
        let run = |rows: usize, cpu: &mach_cpu::Cpu| {
            let weights: Vec<_> = weights.iter().map(|m| cpu.weight(mach_format::PackedMatrix { layout: m.layout, data: m.data.clone() })).collect();
            let mut out = cpu.tensor(rows, groups * rows_of);
            cpu.linear_grouped(&tensor(cpu, groups * cols, &x[..rows * groups * cols]), rows, &weights, &mut out);
            values(cpu, &out, rows * groups * rows_of)
        };
        let want = run(n, &cpu(KernelSet::Scalar, 1));
        let exact: Vec<f32> = (0..n * groups * rows_of)
            .map(|i| {
                let (r, g, row) = (i / (groups * rows_of), i / rows_of % groups, i % rows_of);
                (0..cols).map(|c| element(&weights[g], row, c) * x[(r * groups + g) * cols + c]).sum()
            })
            .collect();
        assert!(error(&want, &exact) < 1e-4, "{format}: error {}", error(&want, &exact));
        for cpu in cpus() {
            assert_bytes(&run(2, &cpu), &want[..2 * groups * rows_of], &format!("{format}, {}", label(&cpu)));
        }
    }
}
