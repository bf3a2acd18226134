//! The plain f32 backend: slow, obvious, the oracle of every kernel test. Never quantises activations, keeps its
//! values where no model code can reach them, and so proves that the trait hides host pointers.

mod hyper;
mod latent;

use std::sync::{PoisonError, RwLock};

use mach_format::{AlignedBytes, GateUpLayout, PackedLayout, PackedMatrix, TILE_ROWS};

use crate::spec::*;
use crate::{Backend, EntrySpec, ExpertMemory, HyperSpec, HyperWeights, LatentRows, LatentSegment, LatentSpec, LatentStores, LatentWeights};

pub use latent::{Entries, LatentState};

/// The backend. It has no state.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reference;

/// Rows of f32.
pub struct Tensor {
    cols: usize,
    data: Vec<f32>,
}

impl Tensor {
    fn row(&self, r: usize) -> &[f32] {
        &self.data[r * self.cols..(r + 1) * self.cols]
    }
    fn row_mut(&mut self, r: usize) -> &mut [f32] {
        &mut self.data[r * self.cols..(r + 1) * self.cols]
    }
}

/// A dequantised matrix.
pub struct Weight {
    rows: usize,
    cols: usize,
    data: Vec<f32>,
}

impl Weight {
    /// Reads a packed matrix whose tiles start `stride` bytes apart.
    fn unpack(layout: &PackedLayout, data: &[u8], stride: usize) -> Self {
        let mut out = Vec::with_capacity(layout.rows * layout.cols);
        for row in 0..layout.rows {
            let at = row / TILE_ROWS * stride;
            let tile = &data[at..at + layout.tile_bytes()];
            out.extend((0..layout.cols).map(|col| layout.element(tile, row % TILE_ROWS, col)));
        }
        Self { rows: layout.rows, cols: layout.cols, data: out }
    }

    fn apply(&self, x: &[f32]) -> Vec<f32> {
        assert_eq!(x.len(), self.cols, "input width");
        (0..self.rows).map(|r| dot(&self.data[r * self.cols..(r + 1) * self.cols], x)).collect()
    }
}

/// Gate and up.
pub struct GateUp {
    gate: Weight,
    up: Weight,
}

impl GateUp {
    fn unpack(layout: &GateUpLayout, data: &[u8]) -> Self {
        let (half, tile) = (&layout.half, layout.half.tile_bytes());
        Self { gate: Weight::unpack(half, data, 2 * tile), up: Weight::unpack(half, &data[tile..], 2 * tile) }
    }

    fn apply(&self, activation: Activation, x: &[f32]) -> Vec<f32> {
        let Activation::SwiGlu = activation;
        self.gate.apply(x).into_iter().zip(self.up.apply(x)).map(|(g, u)| silu(g) * u).collect()
    }
}

/// Slots as locked byte vectors.
pub struct Memory {
    parts: Vec<[RwLock<Pages>; 2]>,
    part_bytes: [usize; 2],
}

/// Bytes at a 4096-byte boundary inside an ordinary vector.
struct Pages {
    bytes: Vec<u8>,
    start: usize,
}

impl Pages {
    fn new(len: usize) -> Self {
        let bytes = vec![0; len + 4096];
        let start = bytes.as_ptr().align_offset(4096);
        Self { bytes, start }
    }
}

impl Memory {
    fn with<R>(&self, slot: usize, part: usize, f: impl FnOnce(&[u8]) -> R) -> R {
        let pages = self.parts[slot][part].read().unwrap_or_else(PoisonError::into_inner);
        f(&pages.bytes[pages.start..pages.start + self.part_bytes[part]])
    }
}

impl ExpertMemory for Memory {
    fn slots(&self) -> usize {
        self.parts.len()
    }

    fn part_bytes(&self) -> [usize; 2] {
        self.part_bytes
    }

    fn fill(&self, slot: usize, parts: Part, f: &mut dyn FnMut([&mut [u8]; 2])) {
        let [gate_up, down] = &self.parts[slot];
        let mut gate_up = (parts != Part::Down).then(|| gate_up.write().unwrap_or_else(PoisonError::into_inner));
        let mut down = (parts != Part::GateUp).then(|| down.write().unwrap_or_else(PoisonError::into_inner));
        let mut empty: [u8; 0] = [];
        let mut empty2: [u8; 0] = [];
        let a: &mut [u8] = match gate_up.as_deref_mut() {
            Some(p) => &mut p.bytes[p.start..][..self.part_bytes[0]],
            None => &mut empty,
        };
        let b: &mut [u8] = match down.as_deref_mut() {
            Some(p) => &mut p.bytes[p.start..][..self.part_bytes[1]],
            None => &mut empty2,
        };
        f([a, b]);
    }

    fn release(&self, slot: usize) {
        for (part, lock) in self.parts[slot].iter().enumerate() {
            *lock.write().unwrap_or_else(PoisonError::into_inner) = Pages::new(self.part_bytes[part]);
        }
    }
}

/// Keys and values per block: `[position in block][kv head][dim]`, K then V.
pub struct Kv {
    spec: KvSpec,
    blocks: Vec<[Vec<f32>; 2]>,
}

impl Kv {
    fn head(&self, which: usize, blocks: &[u32], pos: usize, head: usize) -> &[f32] {
        let d = self.spec.head_dim;
        let at = (pos % KV_BLOCK * self.spec.kv_heads + head) * d;
        &self.blocks[blocks[pos / KV_BLOCK] as usize][which][at..at + d]
    }
}

/// What a layer carries from token to token.
#[derive(Clone)]
pub enum State {
    /// Of a gated delta net.
    Gdn(GdnState),
    /// Of latent attention.
    Latent(LatentState),
}

/// Conv tail (rows of all channels, oldest first) and `[v_head][k_dim][v_dim]`.
#[derive(Clone)]
pub struct GdnState {
    tail: Vec<f32>,
    s: Vec<f32>,
}

/// Router choices.
#[derive(Default)]
pub struct Routes {
    ids: Vec<u32>,
    weights: Vec<f32>,
}

/// The value that a store of this type gives back.
fn round(ty: KvType, x: f32) -> f32 {
    match ty {
        KvType::F16 => half::f16::from_f32(x).to_f32(),
        KvType::F32 => x,
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

fn silu(x: f32) -> f32 {
    x * sigmoid(x)
}

fn softplus(x: f32) -> f32 {
    if x > 20.0 { x } else { x.exp().ln_1p() }
}

fn rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt()
}

fn norm_into(x: &mut [f32], w: Option<&Tensor>, eps: f32) {
    let Some(w) = w else { return };
    let inv = rms(x, eps);
    x.iter_mut().zip(w.row(0)).for_each(|(x, w)| *x = *x * inv * w);
}

fn rotate(x: &mut [f32], cos_sin: &[f32], half: usize) {
    for j in 0..half {
        let (c, s, a, b) = (cos_sin[j], cos_sin[half + j], x[j], x[half + j]);
        x[j] = a * c - b * s;
        x[half + j] = b * c + a * s;
    }
}

impl Backend for Reference {
    type Tensor = Tensor;
    type Weight = Weight;
    type GateUp = GateUp;
    type Memory = Memory;
    type Kv = Kv;
    type State = State;
    type Entries = Entries;
    type Routes = Routes;

    fn name(&self) -> &'static str {
        "reference"
    }

    fn kernels(&self) -> &'static str {
        "plain"
    }

    fn tensor(&self, rows: usize, cols: usize) -> Tensor {
        Tensor { cols, data: vec![0.0; rows * cols] }
    }

    fn reshape(&self, t: &mut Tensor, rows: usize, cols: usize) {
        assert!(rows * cols <= t.data.len(), "{rows} x {cols} exceeds the allocation");
        t.cols = cols;
    }

    fn upload(&self, t: &mut Tensor, row: usize, data: &[f32]) {
        t.data[row * t.cols..][..data.len()].copy_from_slice(data);
    }

    fn read(&self, t: &Tensor, row: usize, out: &mut [f32]) {
        out.copy_from_slice(&t.data[row * t.cols..][..out.len()]);
    }

    fn zero(&self, t: &mut Tensor, rows: usize) {
        t.data[..rows * t.cols].fill(0.0);
    }

    fn weight(&self, m: PackedMatrix) -> Weight {
        Weight::unpack(&m.layout, &m.data, m.layout.tile_bytes())
    }

    fn gate_up(&self, half: PackedLayout, data: AlignedBytes) -> GateUp {
        GateUp::unpack(&GateUpLayout { half }, &data)
    }

    fn alloc_bank(&self, slots: usize, part_bytes: [usize; 2]) -> std::io::Result<Memory> {
        let parts = (0..slots).map(|_| part_bytes.map(|len| RwLock::new(Pages::new(len)))).collect();
        Ok(Memory { parts, part_bytes })
    }

    fn kv(&self, spec: KvSpec) -> Kv {
        Kv { spec, blocks: Vec::new() }
    }

    fn kv_grow(&self, kv: &mut Kv, blocks: usize) {
        let len = KV_BLOCK * kv.spec.kv_heads * kv.spec.head_dim;
        while kv.blocks.len() < blocks {
            kv.blocks.push([vec![0.0; len], vec![0.0; len]]);
        }
    }

    fn entries(&self, spec: EntrySpec) -> Entries {
        Entries::new(spec)
    }

    fn entries_grow(&self, entries: &mut Entries, blocks: usize) {
        entries.grow(blocks);
    }

    fn state(&self, spec: &StateSpec) -> State {
        match spec {
            StateSpec::Gdn(g) => State::Gdn(GdnState { tail: vec![0.0; (g.kernel - 1) * g.channels()], s: vec![0.0; g.v_heads * g.k_dim * g.v_dim] }),
            StateSpec::Latent(_) => State::Latent(LatentState::default()),
        }
    }

    fn copy_state(&self, src: &State, dst: &mut State) {
        dst.clone_from(src);
    }

    fn routes(&self) -> Routes {
        Routes::default()
    }

    fn rms_norm(&self, x: &Tensor, x_row: usize, rows: usize, w: &Tensor, eps: f32, out: &mut Tensor) {
        for r in 0..rows {
            let row = x.row(x_row + r);
            let inv = rms(row, eps);
            for ((o, x), w) in out.row_mut(r).iter_mut().zip(row).zip(w.row(0)) {
                *o = x * inv * w;
            }
        }
    }

    fn add(&self, x: &mut Tensor, x_row: usize, rows: usize, y: &Tensor) {
        for r in 0..rows {
            x.row_mut(x_row + r).iter_mut().zip(y.row(r)).for_each(|(x, y)| *x += y);
        }
    }

    fn linear(&self, x: &Tensor, rows: usize, outs: &mut [(&Weight, &mut Tensor)]) {
        for (w, out) in outs {
            for r in 0..rows {
                out.row_mut(r).copy_from_slice(&w.apply(x.row(r)));
            }
        }
    }

    fn qkv_store(
        &self,
        spec: &AttentionSpec,
        prep: &QkNormRope<'_, Tensor>,
        q: &mut Tensor,
        k: &mut Tensor,
        v: &Tensor,
        segments: &[Segment<'_>],
        kv: &mut Kv,
    ) {
        let d = spec.head_dim;
        let q_stride = if spec.gate { 2 * d } else { d };
        let ty = kv.spec.ty;
        for s in segments {
            for r in s.row..s.row + s.rows {
                let cos_sin = prep.rope.row(r);
                for head in q.row_mut(r).chunks_exact_mut(q_stride) {
                    norm_into(&mut head[..d], prep.q_norm, prep.eps);
                    rotate(&mut head[..d], cos_sin, prep.half);
                }
                for head in k.row_mut(r).chunks_exact_mut(d) {
                    norm_into(head, prep.k_norm, prep.eps);
                    rotate(head, cos_sin, prep.half);
                }
                let pos = s.pos + r - s.row;
                let at = pos % KV_BLOCK * spec.kv_heads * d;
                let [keys, values] = &mut kv.blocks[s.blocks[pos / KV_BLOCK] as usize];
                keys[at..].iter_mut().zip(k.row(r)).for_each(|(o, &x)| *o = round(ty, x));
                values[at..].iter_mut().zip(v.row(r)).for_each(|(o, &x)| *o = round(ty, x));
            }
        }
    }

    fn attention(&self, spec: &AttentionSpec, q: &Tensor, segments: &[Segment<'_>], kv: &Kv, out: &mut Tensor) {
        let d = spec.head_dim;
        let q_stride = if spec.gate { 2 * d } else { d };
        for s in segments {
            for r in s.row..s.row + s.rows {
                let pos = s.pos + r - s.row;
                let first = spec.window.map_or(0, |w| (pos + 1).saturating_sub(w));
                for h in 0..spec.heads {
                    let kv_head = h / (spec.heads / spec.kv_heads);
                    let head = &q.row(r)[h * q_stride..(h + 1) * q_stride];
                    let scores: Vec<f32> = (first..=pos).map(|p| dot(&head[..d], kv.head(0, s.blocks, p, kv_head)) * spec.scale).collect();
                    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    let exp: Vec<f32> = scores.iter().map(|s| (s - max).exp()).collect();
                    let sum: f32 = exp.iter().sum();
                    let o = &mut out.row_mut(r)[h * d..(h + 1) * d];
                    o.fill(0.0);
                    for (p, e) in (first..=pos).zip(exp) {
                        o.iter_mut().zip(kv.head(1, s.blocks, p, kv_head)).for_each(|(o, v)| *o += e / sum * v);
                    }
                    if spec.gate {
                        o.iter_mut().zip(&head[d..]).for_each(|(o, g)| *o *= sigmoid(*g));
                    }
                }
            }
        }
    }

    fn gdn(
        &self,
        spec: &GdnSpec,
        w: &GdnWeights<'_, Tensor>,
        qkv: &Tensor,
        z: &Tensor,
        b: &Tensor,
        a: &Tensor,
        segments: &mut [GdnSegment<'_, State>],
        out: &mut Tensor,
    ) {
        let (dk, dv, channels) = (spec.k_dim, spec.v_dim, spec.channels());
        for seg in segments {
            let State::Gdn(state) = &mut *seg.state else { panic!("the state of another layer") };
            for r in seg.row..seg.row + seg.rows {
                // Causal conv over the tail and the current row, then silu.
                state.tail.extend_from_slice(qkv.row(r));
                let mixed: Vec<f32> = (0..channels).map(|c| silu((0..spec.kernel).map(|j| w.conv.row(j)[c] * state.tail[j * channels + c]).sum())).collect();
                state.tail.drain(..channels);
                let l2 = |x: &[f32]| {
                    let inv = 1.0 / (dot(x, x) + 1e-6).sqrt();
                    x.iter().map(|x| x * inv).collect::<Vec<_>>()
                };
                for h in 0..spec.v_heads {
                    let kh = spec.key_head(h);
                    let q: Vec<f32> = l2(&mixed[kh * dk..(kh + 1) * dk]).iter().map(|x| x / (dk as f32).sqrt()).collect();
                    let k = l2(&mixed[(spec.k_heads + kh) * dk..][..dk]);
                    let v = &mixed[2 * spec.k_heads * dk + h * dv..][..dv];
                    let beta = sigmoid(b.row(r)[h]);
                    let decay = (w.neg_exp_a.row(0)[h] * softplus(a.row(r)[h] + w.dt_bias.row(0)[h])).exp();
                    let s = &mut state.s[h * dk * dv..(h + 1) * dk * dv];
                    s.iter_mut().for_each(|s| *s *= decay);
                    let mut o = vec![0.0; dv];
                    for (c, o) in o.iter_mut().enumerate() {
                        let delta = beta * (v[c] - (0..dk).map(|i| s[i * dv + c] * k[i]).sum::<f32>());
                        for i in 0..dk {
                            s[i * dv + c] += k[i] * delta;
                            *o += s[i * dv + c] * q[i];
                        }
                    }
                    let inv = rms(&o, spec.eps);
                    for (c, o) in o.iter().enumerate() {
                        out.row_mut(r)[h * dv + c] = w.norm.row(0)[c] * o * inv * silu(z.row(r)[h * dv + c]);
                    }
                }
            }
        }
    }

    fn route(&self, spec: &RouterSpec, x: &Tensor, rows: usize, w: &Weight, routes: &mut Routes) {
        routes.ids.clear();
        routes.weights.clear();
        for r in 0..rows {
            let logits = w.apply(x.row(r));
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let exp: Vec<f32> = logits.iter().map(|l| (l - max).exp()).collect();
            let sum: f32 = exp.iter().sum();
            let mut order: Vec<u32> = (0..spec.experts as u32).collect();
            order.sort_by(|&i, &j| exp[j as usize].total_cmp(&exp[i as usize]).then(i.cmp(&j)));
            order.truncate(spec.top_k);
            let kept: f32 = order.iter().map(|&e| exp[e as usize] / sum).sum();
            let divisor = if spec.renormalise { kept } else { 1.0 };
            routes.weights.extend(order.iter().map(|&e| exp[e as usize] / sum / divisor));
            routes.ids.extend(order);
        }
    }

    fn read_routes(&self, routes: &Routes, ids: &mut Vec<u32>, weights: &mut Vec<f32>) {
        ids.clone_from(&routes.ids);
        weights.clone_from(&routes.weights);
    }

    fn experts_gate_up(&self, layout: &ExpertLayout, mem: &Memory, jobs: &[ExpertJob<'_>], x: &Tensor, act: &mut Tensor) {
        for job in jobs {
            let w = mem.with(job.slot, 0, |bytes| GateUp::unpack(&layout.gate_up, bytes));
            for (&row, &out) in job.rows.iter().zip(job.outs) {
                let y = w.apply(layout.activation, x.row(row as usize));
                act.row_mut(out as usize).copy_from_slice(&y);
            }
        }
    }

    fn experts_down(&self, layout: &ExpertLayout, mem: &Memory, jobs: &[ExpertJob<'_>], act: &Tensor, y: &mut Tensor) {
        for job in jobs {
            let w = mem.with(job.slot, 1, |bytes| Weight::unpack(&layout.down, bytes, layout.down.tile_bytes()));
            for &out in job.outs {
                y.row_mut(out as usize).copy_from_slice(&w.apply(act.row(out as usize)));
            }
        }
    }

    fn expert_down_add(&self, layout: &ExpertLayout, mem: &Memory, job: &ExpertJob<'_>, weights: &[f32], act: &Tensor, out: &mut Tensor) {
        let w = mem.with(job.slot, 1, |bytes| Weight::unpack(&layout.down, bytes, layout.down.tile_bytes()));
        for ((&row, &a), &weight) in job.rows.iter().zip(job.outs).zip(weights) {
            let y = w.apply(act.row(a as usize));
            out.row_mut(row as usize).iter_mut().zip(y).for_each(|(o, y)| *o = weight.mul_add(y, *o));
        }
    }

    fn experts_reduce(&self, y: &Tensor, rows: usize, order: &[u32], weights: &[f32], out: &mut Tensor) {
        let k = order.len() / rows.max(1);
        for r in 0..rows {
            let o = out.row_mut(r);
            o.fill(0.0);
            for (&from, &weight) in order[r * k..(r + 1) * k].iter().zip(&weights[r * k..]) {
                o.iter_mut().zip(y.row(from as usize)).for_each(|(o, y)| *o = weight.mul_add(*y, *o));
            }
        }
    }

    fn ffn_add(
        &self,
        activation: Activation,
        x: &Tensor,
        rows: usize,
        gate_up: &GateUp,
        down: &Weight,
        gate: Option<&Weight>,
        act: &mut Tensor,
        out: &mut Tensor,
    ) {
        for r in 0..rows {
            act.row_mut(r).copy_from_slice(&gate_up.apply(activation, x.row(r)));
            let g = gate.map_or(1.0, |g| sigmoid(g.apply(x.row(r))[0]));
            let y = down.apply(act.row(r));
            out.row_mut(r).iter_mut().zip(y).for_each(|(o, y)| *o = g.mul_add(y, *o));
        }
    }

    fn linear_grouped(&self, x: &Tensor, rows: usize, weights: &[Weight], out: &mut Tensor) {
        for r in 0..rows {
            let parts = weights.iter().zip(x.row(r).chunks_exact(x.cols / weights.len()));
            let y: Vec<f32> = parts.flat_map(|(w, x)| w.apply(x)).collect();
            out.row_mut(r).copy_from_slice(&y);
        }
    }

    fn latent_attention(
        &self,
        spec: &LatentSpec,
        w: &LatentWeights<'_, Tensor>,
        mut rows: LatentRows<'_, Tensor>,
        segments: &mut [LatentSegment<'_, State>],
        mut stores: LatentStores<'_, Entries>,
        out: &mut Tensor,
    ) {
        latent::attention(spec, w, &mut rows, segments, &mut stores, out);
    }

    fn hyper_mix(&self, spec: &HyperSpec, w: &HyperWeights<'_, Tensor, Weight>, x: &Tensor, x_row: usize, rows: usize, h: &mut Tensor, mix: &mut Tensor) {
        hyper::mix(spec, w, x, x_row, rows, h, mix);
    }

    fn hyper_add(&self, spec: &HyperSpec, x: &mut Tensor, x_row: usize, rows: usize, y: &Tensor, mix: &Tensor) {
        hyper::add(spec, x, x_row, rows, y, mix);
    }

    fn hyper_head(&self, spec: &HyperSpec, w: &HyperWeights<'_, Tensor, Weight>, x: &Tensor, x_row: usize, rows: usize, out: &mut Tensor) {
        hyper::head(spec, w, x, x_row, rows, out);
    }
}
