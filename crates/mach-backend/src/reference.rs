//! The plain f32 backend: slow, obvious, the oracle of every kernel test. Never quantises activations, keeps its
//! values where no model code can reach them, and so proves that the trait hides host pointers.

mod hyper;
mod latent;
mod memory;

use mach_format::{AlignedBytes, GateUpLayout, PackedLayout, PackedMatrix, TILE_ROWS};

pub use memory::Memory;

use crate::spec::*;
use crate::{Backend, EntrySpec, HyperSpec, HyperWeights, LatentRows, LatentSegment, LatentSpec, LatentStores, LatentWeights};

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

    fn apply(&self, activation: Activation, x: &[f32], bias: [&[f32]; 2]) -> Vec<f32> {
        let [gate, up] = [(&self.gate, bias[0]), (&self.up, bias[1])].map(|(w, bias)| plus(w.apply(x), bias));
        gate.into_iter().zip(up).map(|(g, u)| activate(activation, g, u)).collect()
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

fn softmax(x: &mut [f32]) {
    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    x.iter_mut().for_each(|x| *x = (*x - max).exp());
    let sum: f32 = x.iter().sum();
    x.iter_mut().for_each(|x| *x /= sum);
}

fn activate(activation: Activation, gate: f32, up: f32) -> f32 {
    match activation {
        Activation::SwiGlu => silu(gate) * up,
        Activation::SwiGluClamped { limit } => silu(gate.min(limit)) * up.clamp(-limit, limit),
        Activation::SwiGluOai { alpha, limit } => {
            let gate = gate.min(limit);
            gate * sigmoid(alpha * gate) * (up.clamp(-limit, limit) + 1.0)
        }
        Activation::GeGlu => 0.5 * gate * (1.0 + ((2.0 / std::f32::consts::PI).sqrt() * (gate + 0.044_715 * gate * gate * gate)).tanh()) * up,
    }
}

/// Adds a bias, which may be empty.
fn plus(mut x: Vec<f32>, bias: &[f32]) -> Vec<f32> {
    x.iter_mut().zip(bias).for_each(|(x, b)| *x += b);
    x
}

/// The down projection in a job's slot.
fn down(experts: &Experts<'_, Memory, Tensor>, job: &ExpertJob<'_>) -> Weight {
    let layout = &experts.layout.down;
    experts.memory.with(job.slot, 1, |bytes| Weight::unpack(layout, bytes, layout.tile_bytes()))
}

/// An expert's biases of gate, up and down, empty where there are none.
fn biases<'a>(experts: &Experts<'a, Memory, Tensor>, expert: usize) -> [&'a [f32]; 3] {
    experts.bias.as_ref().map_or([&[]; 3], |b| [b.gate, b.up, b.down].map(|t| t.row(expert)))
}

fn softplus(x: f32) -> f32 {
    if x > 20.0 { x } else { x.exp().ln_1p() }
}

fn rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt()
}

fn norm_plain(x: &mut [f32], eps: f32) {
    let inv = rms(x, eps);
    x.iter_mut().for_each(|x| *x *= inv);
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
        Ok(Memory::new(slots, part_bytes))
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

    fn add_bias(&self, x: &mut Tensor, rows: usize, bias: &Tensor) {
        for r in 0..rows {
            x.row_mut(r).iter_mut().zip(bias.row(0)).for_each(|(x, b)| *x += b);
        }
    }

    fn scale(&self, x: &mut Tensor, x_row: usize, rows: usize, by: f32) {
        for r in x_row..x_row + rows {
            x.row_mut(r).iter_mut().for_each(|x| *x *= by);
        }
    }

    fn soft_cap(&self, x: &mut Tensor, rows: usize, cap: f32) {
        for r in 0..rows {
            x.row_mut(r).iter_mut().for_each(|x| *x = cap * (*x / cap).tanh());
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
        v: Option<&Tensor>,
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
                let mut v = v.map_or_else(|| k.row(r).to_vec(), |v| v.row(r).to_vec());
                if prep.v_norm {
                    v.chunks_exact_mut(d).for_each(|head| norm_plain(head, prep.eps));
                }
                for head in k.row_mut(r).chunks_exact_mut(d) {
                    norm_into(head, prep.k_norm, prep.eps);
                    rotate(head, cos_sin, prep.half);
                }
                let pos = s.pos + r - s.row;
                let at = pos % KV_BLOCK * spec.kv_heads * d;
                let [keys, values] = &mut kv.blocks[s.blocks[pos / KV_BLOCK] as usize];
                keys[at..].iter_mut().zip(k.row(r)).for_each(|(o, &x)| *o = round(ty, x));
                values[at..].iter_mut().zip(&v).for_each(|(o, &x)| *o = round(ty, x));
            }
        }
    }

    fn attention(&self, spec: &AttentionSpec, q: &Tensor, sinks: Option<&Tensor>, segments: &[Segment<'_>], kv: &Kv, out: &mut Tensor) {
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
                    let sink = sinks.map_or(f32::NEG_INFINITY, |s| s.row(0)[h]);
                    let max = scores.iter().copied().fold(sink, f32::max);
                    let exp: Vec<f32> = scores.iter().map(|s| (s - max).exp()).collect();
                    let sum: f32 = exp.iter().sum::<f32>() + (sink - max).exp();
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

    fn route(&self, spec: &RouterSpec, w: &RouterWeights<'_, Tensor, Weight>, x: &Tensor, rows: usize, given: Option<&[u32]>, routes: &mut Routes) {
        routes.ids.clear();
        routes.weights.clear();
        for r in 0..rows {
            let bias = |kind| w.bias.filter(|_| spec.bias == kind).map_or(&[][..], |b| b.row(0));
            let mut scores = plus(w.project.apply(x.row(r)), bias(RouterBias::Logits));
            match spec.score {
                RouterScore::Softmax => softmax(&mut scores),
                RouterScore::SoftmaxOfChosen => {}
                RouterScore::SqrtSoftplus => scores.iter_mut().for_each(|s| *s = softplus(*s).sqrt()),
            }
            let order: Vec<u32> = match given {
                Some(ids) => ids[r * spec.top_k..(r + 1) * spec.top_k].to_vec(),
                None => {
                    let choice = plus(scores.clone(), bias(RouterBias::Choice));
                    let mut order: Vec<u32> = (0..spec.experts as u32).collect();
                    order.sort_by(|&i, &j| choice[j as usize].total_cmp(&choice[i as usize]).then(i.cmp(&j)));
                    order.truncate(spec.top_k);
                    order
                }
            };
            let mut weights: Vec<f32> = order.iter().map(|&e| scores[e as usize]).collect();
            if spec.score == RouterScore::SoftmaxOfChosen {
                softmax(&mut weights);
            }
            if spec.renormalise {
                let sum = weights.iter().sum::<f32>() + if spec.score == RouterScore::SqrtSoftplus { 1e-20 } else { 0.0 };
                weights.iter_mut().for_each(|w| *w /= sum);
            }
            let own = |e: u32| w.expert_scale.map_or(1.0, |s| s.row(0)[e as usize]);
            routes.weights.extend(weights.iter().zip(&order).map(|(w, &e)| w * spec.factor * own(e)));
            routes.ids.extend(order);
        }
    }

    fn read_routes(&self, routes: &Routes, ids: &mut Vec<u32>, weights: &mut Vec<f32>) {
        ids.clone_from(&routes.ids);
        weights.clone_from(&routes.weights);
    }

    fn experts_gate_up(&self, experts: &Experts<'_, Memory, Tensor>, jobs: &[ExpertJob<'_>], x: &Tensor, act: &mut Tensor) {
        for job in jobs {
            let w = experts.memory.with(job.slot, 0, |bytes| GateUp::unpack(&experts.layout.gate_up, bytes));
            let [gate, up, _] = biases(experts, job.expert);
            for (&row, &out) in job.rows.iter().zip(job.outs) {
                let y = w.apply(experts.layout.activation, x.row(row as usize), [gate, up]);
                act.row_mut(out as usize).copy_from_slice(&y);
            }
        }
    }

    fn experts_down(&self, experts: &Experts<'_, Memory, Tensor>, jobs: &[ExpertJob<'_>], act: &Tensor, y: &mut Tensor) {
        for job in jobs {
            let w = down(experts, job);
            let [_, _, bias] = biases(experts, job.expert);
            for &out in job.outs {
                y.row_mut(out as usize).copy_from_slice(&plus(w.apply(act.row(out as usize)), bias));
            }
        }
    }

    fn expert_down_add(&self, experts: &Experts<'_, Memory, Tensor>, job: &ExpertJob<'_>, weights: &[f32], act: &Tensor, out: &mut Tensor) {
        let w = down(experts, job);
        let [_, _, bias] = biases(experts, job.expert);
        for ((&row, &a), &weight) in job.rows.iter().zip(job.outs).zip(weights) {
            let y = plus(w.apply(act.row(a as usize)), bias);
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
            act.row_mut(r).copy_from_slice(&gate_up.apply(activation, x.row(r), [&[]; 2]));
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
