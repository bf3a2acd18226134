//! Experts, router and bank memory.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};

use common::*;
use mach_backend::reference::Reference;
use mach_backend::{Activation, Backend, ExpertBias, ExpertJob, ExpertLayout, ExpertMemory, Experts, Part, RouterBias, RouterScore, RouterSpec, RouterWeights};
use mach_cpu::{Cpu, KernelSet};
use mach_format::{AlignedBytes, GateUpLayout, PackedLayout, ScaleType, WeightFormat};

/// Experts of a layer, packed.
struct Layer {
    layout: ExpertLayout,
    data: Vec<[AlignedBytes; 2]>,
    /// Of gate, up and down.
    bias: Option<[Vec<f32>; 3]>,
}

const ACTIVATIONS: [Activation; 4] =
    [Activation::SwiGlu, Activation::SwiGluClamped { limit: 0.5 }, Activation::SwiGluOai { alpha: 1.702, limit: 0.6 }, Activation::GeGlu];

impl Layer {
    fn random(rng: &mut Rng, n: usize, hidden: usize, inner: usize, format: WeightFormat) -> Self {
        let gate_up = GateUpLayout { half: PackedLayout::new(inner, hidden, format) };
        let down = PackedLayout::new(hidden, inner, format);
        let data = (0..n).map(|_| [random_tiles(rng, &gate_up.half, 2), random_tiles(rng, &down, 1)]).collect();
        Self { layout: ExpertLayout { gate_up, down, activation: Activation::SwiGlu }, data, bias: None }
    }

    /// The same with biases.
    fn biased(mut self, rng: &mut Rng) -> Self {
        let (n, down) = (self.data.len(), &self.layout.down);
        self.bias = Some([down.cols, down.cols, down.rows].map(|width| rng.normals(n * width)));
        self
    }

    /// Calls `f` with the operand that operations take.
    fn with<B: Backend, R>(&self, b: &B, memory: &B::Memory, f: impl FnOnce(&Experts<'_, B::Memory, B::Tensor>) -> R) -> R {
        let n = self.data.len();
        let bias = self.bias.as_ref().map(|all| all.each_ref().map(|values| tensor(b, values.len() / n, values)));
        let bias = bias.as_ref().map(|[gate, up, down]| ExpertBias { gate, up, down });
        f(&Experts { layout: &self.layout, memory, bias })
    }

    fn bank<B: Backend>(&self, b: &B) -> B::Memory {
        let up = |n: usize| n.next_multiple_of(4096);
        let mem = b.alloc_bank(self.data.len(), [up(self.layout.gate_up.bytes()), up(self.layout.down.bytes())]).unwrap();
        for (slot, parts) in self.data.iter().enumerate() {
            mem.fill(slot, Part::Both, &mut |to| {
                for (to, from) in to.into_iter().zip(parts) {
                    to[..from.len()].copy_from_slice(from);
                }
            });
        }
        mem
    }
}

struct Routing {
    k: usize,
    /// `[rows·k]`, ascending within a row.
    ids: Vec<u32>,
    weights: Vec<f32>,
}

fn routing(rng: &mut Rng, rows: usize, k: usize, experts: usize) -> Routing {
    let mut ids = Vec::new();
    for _ in 0..rows {
        let mut row: Vec<u32> = Vec::new();
        while row.len() < k {
            let id = rng.below(experts) as u32;
            if !row.contains(&id) {
                row.push(id);
            }
        }
        row.sort();
        ids.extend(row);
    }
    Routing { k, weights: ids.iter().map(|_| 0.1 + rng.unit().abs()).collect(), ids }
}

/// Rows and buffer rows of every expert that is used.
fn jobs(r: &Routing, experts: usize) -> Vec<(usize, Vec<u32>, Vec<u32>)> {
    (0..experts)
        .map(|e| {
            let at: Vec<u32> = (0..r.ids.len() as u32).filter(|&i| r.ids[i as usize] == e as u32).collect();
            (e, at.iter().map(|i| i / r.k as u32).collect(), at)
        })
        .filter(|(_, _, at): &(usize, Vec<u32>, Vec<u32>)| !at.is_empty())
        .collect()
}

/// The buffered form (decode).
fn buffered<B: Backend>(b: &B, mem: &B::Memory, e: &Layer, x: &[f32], r: &Routing) -> Vec<f32> {
    let (hidden, inner) = (e.layout.down.rows, e.layout.down.cols);
    let x = tensor(b, hidden, x);
    let rows = r.ids.len() / r.k;
    let (mut act, mut y, mut out) = (b.tensor(r.ids.len(), inner), b.tensor(r.ids.len(), hidden), b.tensor(rows, hidden));
    let jobs = jobs(r, e.data.len());
    let jobs: Vec<_> = jobs.iter().map(|(slot, rows, outs)| ExpertJob { slot: *slot, expert: *slot, rows, outs }).collect();
    e.with(b, mem, |experts| {
        b.experts_gate_up(experts, &jobs, &x, &mut act);
        b.experts_down(experts, &jobs, &act, &mut y);
    });
    let order: Vec<u32> = (0..r.ids.len() as u32).collect();
    b.experts_reduce(&y, rows, &order, &r.weights, &mut out);
    values(b, &out, rows * hidden)
}

/// The accumulating form (prefill): one expert at a time, in ascending order.
fn accumulated<B: Backend>(b: &B, mem: &B::Memory, e: &Layer, x: &[f32], r: &Routing) -> Vec<f32> {
    let (hidden, inner) = (e.layout.down.rows, e.layout.down.cols);
    let x = tensor(b, hidden, x);
    let rows = r.ids.len() / r.k;
    let mut out = b.tensor(rows, hidden);
    for (slot, rows, at) in jobs(r, e.data.len()) {
        let outs: Vec<u32> = (0..rows.len() as u32).collect();
        let mut act = b.tensor(rows.len(), inner);
        let job = ExpertJob { slot, expert: slot, rows: &rows, outs: &outs };
        let weights: Vec<f32> = at.iter().map(|&i| r.weights[i as usize]).collect();
        e.with(b, mem, |experts| {
            b.experts_gate_up(experts, &[job], &x, &mut act);
            b.expert_down_add(experts, &job, &weights, &act, &mut out);
        });
    }
    values(b, &out, rows * hidden)
}

fn part(r: &Routing, first: usize, rows: usize) -> Routing {
    let range = first * r.k..(first + rows) * r.k;
    Routing { k: r.k, ids: r.ids[range.clone()].to_vec(), weights: r.weights[range].to_vec() }
}

#[test]
fn experts_agree_with_the_reference_backend() {
    let mut rng = Rng::new(1);
    for format in FORMATS {
        let e = Layer::random(&mut rng, 6, 256, 256, format);
        let (x, r) = (rng.normals(9 * 256), routing(&mut rng, 9, 3, 6));
        let want = buffered(&Reference, &e.bank(&Reference), &e, &x, &r);
        let cpu = cpu(KernelSet::automatic(), 2);
        let err = error(&buffered(&cpu, &e.bank(&cpu), &e, &x, &r), &want);
        assert!(err < if format.is_quantised() { 2e-2 } else { 2e-6 }, "{format}: error {err}");
    }
}

#[test]
fn activations_and_biases_agree_with_the_reference_backend() {
    let mut rng = Rng::new(11);
    for activation in ACTIVATIONS {
        let mut e = Layer::random(&mut rng, 4, 72, 40, WeightFormat::BF16).biased(&mut rng);
        e.layout.activation = activation;
        let (x, r) = (rng.normals(20 * 72), routing(&mut rng, 20, 2, 4));
        let want = buffered(&Reference, &e.bank(&Reference), &e, &x, &r);
        assert!(error(&accumulated(&Reference, &e.bank(&Reference), &e, &x, &r), &want) < 1e-6, "{activation:?}");
        let first = cpu(KernelSet::Scalar, 1);
        let bytes = buffered(&first, &e.bank(&first), &e, &x, &r);
        assert!(error(&bytes, &want) < 2e-6, "{activation:?}: {}", error(&bytes, &want));
        for cpu in cpus() {
            let mem = e.bank(&cpu);
            assert_bytes(&buffered(&cpu, &mem, &e, &x, &r), &bytes, &format!("{activation:?} {}", label(&cpu)));
            assert_bytes(&accumulated(&cpu, &mem, &e, &x, &r), &bytes, &format!("{activation:?} added, {}", label(&cpu)));
        }
    }
}

#[test]
fn buffered_and_accumulated_experts_give_the_same_bytes_everywhere() {
    let mut rng = Rng::new(2);
    for format in [WeightFormat::BF16, affine(4, 32, ScaleType::F16), affine(8, 64, ScaleType::F32)] {
        let e = Layer::random(&mut rng, 5, 192, 64, format);
        let (x, r) = (rng.normals(70 * 192), routing(&mut rng, 70, 2, 5));
        let first = cpu(KernelSet::Scalar, 1);
        let want = buffered(&first, &e.bank(&first), &e, &x, &r);
        for cpu in cpus() {
            let mem = e.bank(&cpu);
            assert_bytes(&buffered(&cpu, &mem, &e, &x, &r), &want, &format!("{format}, buffered, {}", label(&cpu)));
            assert_bytes(&accumulated(&cpu, &mem, &e, &x, &r), &want, &format!("{format}, accumulated, {}", label(&cpu)));
        }
    }
}

/// One MoE block at the width of a real model: the same bytes at widths 1 to 64.
#[test]
fn real_width_gives_the_same_bytes_at_every_batch_width() {
    let (hidden, inner, kept) = (2048, 512, 10);
    let format = affine(4, 64, ScaleType::BF16);
    let mut rng = Rng::new(3);
    let e = Layer::random(&mut rng, kept, hidden, inner, format);
    let router = random_matrix(&mut rng, 256, hidden, WeightFormat::F32);
    let x: Vec<f32> = (0..64 * hidden).map(|i| rng.normal() * if i % hidden == 77 { 100.0 } else { 1.0 }).collect();
    let r = routing(&mut rng, 64, 8, kept);
    let shared = (random_tiles(&mut rng, &e.layout.gate_up.half, 2), random_matrix(&mut rng, hidden, inner, format));
    let gate = random_matrix(&mut rng, 1, hidden, affine(8, 64, ScaleType::BF16));
    let run = |cpu: &Cpu, first: usize, rows: usize| {
        let x = &x[first * hidden..(first + rows) * hidden];
        let mem = e.bank(cpu);
        let mut out = tensor(cpu, hidden, &buffered(cpu, &mem, &e, x, &part(&r, first, rows)));
        let x = tensor(cpu, hidden, x);
        let gate_up = cpu.gate_up(e.layout.gate_up.half, shared.0.clone());
        let (down, gate) = (cpu.weight(shared.1.clone()), cpu.weight(gate.clone()));
        cpu.ffn_add(Activation::SwiGlu, &x, rows, &gate_up, &down, Some(&gate), &mut cpu.tensor(rows, inner), &mut out);
        let mut routes = cpu.routes();
        let router = cpu.weight(router.clone());
        let w = RouterWeights { project: &router, bias: None, expert_scale: None };
        cpu.route(&RouterSpec::softmax(256, 8, true), &w, &x, rows, None, &mut routes);
        let (mut ids, mut weights) = (Vec::new(), Vec::new());
        cpu.read_routes(&routes, &mut ids, &mut weights);
        (values(cpu, &out, rows * hidden), ids, weights)
    };
    let fast = cpu(KernelSet::automatic(), 2);
    let (all, ids, weights) = run(&fast, 0, 64);
    for (first, width) in [(0, 1), (63, 1), (5, 2), (9, 4), (30, 8), (40, 16)] {
        let got = run(&fast, first, width);
        assert_bytes(&got.0, &all[first * hidden..(first + width) * hidden], &format!("width {width}"));
        assert_eq!(got.1, ids[first * 8..(first + width) * 8], "ids at width {width}");
        assert_bytes(&got.2, &weights[first * 8..(first + width) * 8], &format!("weights at width {width}"));
    }
    for cpu in cpus() {
        let got = run(&cpu, 62, 2);
        assert_bytes(&got.0, &all[62 * hidden..], &label(&cpu));
        assert_eq!(got.1, ids[62 * 8..]);
    }
}

#[test]
fn router_agrees_with_the_reference_backend() {
    let mut rng = Rng::new(4);
    for format in [WeightFormat::BF16, affine(8, 64, ScaleType::F16)] {
        let m = random_matrix(&mut rng, 40, 128, format);
        let x: Vec<f32> = rng.normals(20 * 128).iter().map(|x| x * 2.0).collect();
        let [bias, scale] = [0, 1].map(|_| rng.normals(40));
        for score in [RouterScore::Softmax, RouterScore::SoftmaxOfChosen, RouterScore::SqrtSoftplus] {
            for (kind, renormalise, factor) in
                [(RouterBias::None, false, 1.0), (RouterBias::None, true, 1.0), (RouterBias::Logits, true, 2.5), (RouterBias::Choice, true, 1.5)]
            {
                let spec = RouterSpec { experts: 40, top_k: 6, score, bias: kind, renormalise, factor };
                let scale = (factor == 2.5).then_some(&scale[..]);
                for given in [None, Some((0..120).map(|i| i % 40).collect::<Vec<u32>>())] {
                    let run = (&spec, &m, &x[..], &bias[..], scale, given.as_deref());
                    let (want_ids, want) = route(&Reference, run);
                    for cpu in cpus() {
                        let (ids, weights) = route(&cpu, run);
                        assert_eq!(ids, want_ids, "{format}, {spec:?}, {}", label(&cpu));
                        assert!(error(&weights, &want) < 5e-6, "{format}, {spec:?}, {}", label(&cpu));
                    }
                }
            }
        }
    }
}

type RouteCall<'a> = (&'a RouterSpec, &'a mach_format::PackedMatrix, &'a [f32], &'a [f32], Option<&'a [f32]>, Option<&'a [u32]>);

fn route<B: Backend>(b: &B, (spec, m, x, bias, scale, given): RouteCall<'_>) -> (Vec<u32>, Vec<f32>) {
    let rows = x.len() / m.layout.cols;
    let mut routes = b.routes();
    let (project, bias, scale) = (b.weight(m.clone()), tensor(b, bias.len(), bias), scale.map(|s| tensor(b, s.len(), s)));
    let w = RouterWeights { project: &project, bias: Some(&bias), expert_scale: scale.as_ref() };
    b.route(spec, &w, &tensor(b, m.layout.cols, x), rows, given, &mut routes);
    let (mut ids, mut weights) = (Vec::new(), Vec::new());
    b.read_routes(&routes, &mut ids, &mut weights);
    (ids, weights)
}

#[test]
fn norms_and_sums_agree_with_the_reference_backend() {
    fn run<B: Backend>(b: &B, x: &[f32], w: &[f32]) -> Vec<f32> {
        let cols = w.len();
        let mut x = tensor(b, cols, x);
        let mut out = b.tensor(3, cols);
        b.rms_norm(&x, 2, 3, &tensor(b, cols, w), 1e-6, &mut out);
        b.add(&mut x, 1, 3, &out);
        b.add_bias(&mut out, 2, &tensor(b, cols, w));
        b.scale(&mut x, 2, 2, 0.3);
        b.soft_cap(&mut x, 4, 1.5);
        let mut all = values(b, &out, 3 * cols);
        all.extend(values(b, &x, 5 * cols));
        all
    }
    let mut rng = Rng::new(5);
    for cols in [5, 16, 100, 2048] {
        let (x, w) = (rng.normals(5 * cols), rng.normals(cols));
        let cpus = cpus();
        let want = run(&cpus[0], &x, &w);
        assert!(error(&want, &run(&Reference, &x, &w)) < 2e-6);
        for cpu in &cpus[1..] {
            assert_bytes(&run(cpu, &x, &w), &want, &format!("{cols} columns, {}", label(cpu)));
        }
    }
}

/// Readers fill some slots while operations read others, and one part of a slot while the other is read.
#[test]
fn bank_is_filled_while_experts_run() {
    let mut rng = Rng::new(6);
    let e = Layer::random(&mut rng, 4, 128, 64, affine(4, 64, ScaleType::F16));
    let (x, r) = (rng.normals(4 * 128), routing(&mut rng, 4, 2, 2));
    let cpu = cpu(KernelSet::automatic(), 2);
    let mem = e.bank(&cpu);
    let want = buffered(&cpu, &mem, &e, &x, &r);
    let stop = AtomicBool::new(false);
    std::thread::scope(|s| {
        for slot in [2, 3] {
            let (mem, e, stop) = (&mem, &e, &stop);
            s.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    mem.release(slot);
                    mem.fill(slot, Part::Down, &mut |[gate_up, down]| {
                        assert!(gate_up.is_empty() && down.as_ptr().addr().is_multiple_of(4096));
                        down[..e.data[slot][1].len()].copy_from_slice(&e.data[slot][1]);
                    });
                    // Slots in use are refilled with what they hold, as a repair would.
                    mem.fill(slot - 2, Part::GateUp, &mut |[gate_up, down]| {
                        assert!(down.is_empty() && gate_up.as_ptr().addr().is_multiple_of(4096));
                        gate_up.fill(0);
                        gate_up[..e.data[slot - 2][0].len()].copy_from_slice(&e.data[slot - 2][0]);
                    });
                }
            });
        }
        for _ in 0..200 {
            assert_bytes(&buffered(&cpu, &mem, &e, &x, &r), &want, "while readers write");
        }
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn a_reader_that_panics_leaves_the_bank_usable() {
    let mut rng = Rng::new(7);
    let e = Layer::random(&mut rng, 1, 128, 64, affine(4, 64, ScaleType::F16));
    let cpu = cpu(KernelSet::automatic(), 1);
    let mem = e.bank(&cpu);
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| mem.fill(0, Part::Both, &mut |_| panic!("disk on fire"))));
    assert!(caught.is_err());
    let (x, r) = (rng.normals(128), routing(&mut rng, 1, 1, 1));
    assert!(buffered(&cpu, &mem, &e, &x, &r).iter().all(|y| y.is_finite()));
}
