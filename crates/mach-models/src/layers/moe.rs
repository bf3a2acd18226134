//! The shared MoE step, host-routed: ids are read, experts leased from the store, outputs added in ascending expert id.

use std::sync::{Arc, Mutex, PoisonError};

use mach_backend::{Backend, ExpertBias, ExpertJob, ExpertLayout, Experts, Part, RouterWeights};
use mach_experts::{ExpertStore, SWEEP_ROWS};

use super::{FeedForward, vector, weight_f32};
use crate::ModelError;
use crate::block_tensors::{GateUpBias, MoeTensors};
use crate::spec::MoeSpec;
use crate::tensors::{NormForm, Resolved};
use crate::workspace::{DECODE_ROWS, Workspace};

/// What of a layer's MoE part is always in memory; routed experts live in the store.
pub struct Moe<B: Backend> {
    spec: MoeSpec,
    router: B::Weight,
    router_bias: Option<B::Tensor>,
    /// `[vocabulary, top_k]`, where the experts are those of the token.
    token_experts: Option<Vec<u32>>,
    expert_scale: Option<B::Tensor>,
    /// Of gate, up and down.
    expert_bias: Option<[B::Tensor; 3]>,
    apart: Option<Apart<B>>,
    shared: Option<FeedForward<B>>,
    /// Index among the MoE layers.
    index: usize,
    pub(crate) forced: Option<ForcedRoutes>,
}

/// Norms of a MoE part whose branches stand apart.
struct Apart<B: Backend> {
    /// Of the router's input.
    router: B::Tensor,
    /// Of the experts' input.
    input: B::Tensor,
    /// Of what the experts give.
    routed: B::Tensor,
    /// Of what the shared block gives.
    shared: B::Tensor,
}

/// The residual that a MoE part reads.
pub(crate) struct Residual<'a, B: Backend> {
    pub x: &'a B::Tensor,
    pub hidden: usize,
    pub eps: f32,
}

/// Replaces the choices of a MoE layer's router, the weights stay: gets the layer's index and the ids `[rows, k]`, which it
/// may change as long as those of a row differ.
pub type ForcedRoutes = Arc<Mutex<dyn FnMut(usize, &mut [u32]) + Send>>;

/// Router choices of a forward pass, for `mach eval`: per MoE layer `[rows, k]`, largest weight first where a router chose.
#[derive(Default)]
pub struct RouteLog {
    /// Per layer.
    pub layers: Vec<(Vec<u32>, Vec<f32>)>,
}

impl<B: Backend> Moe<B> {
    pub(crate) fn load(backend: &B, files: &Resolved, t: &MoeTensors, spec: MoeSpec, index: usize) -> Result<Self, ModelError> {
        let shared = t.shared.as_ref().map(|s| FeedForward::load(backend, &s.gate, &s.up, &s.down, s.scalar.as_ref(), spec.activation)).transpose()?;
        let plain = |name: &String| files.norm(name, NormForm::Plain).map(|w| vector(backend, &w));
        let apart = match &t.apart {
            Some([router, input, routed, shared]) => {
                let mut scale = files.norm(router, NormForm::Plain)?;
                let factor = (files.spec.hidden as f32).powf(-0.5);
                scale.iter_mut().for_each(|w| *w *= factor);
                Some(Apart { router: vector(backend, &scale), input: plain(input)?, routed: plain(routed)?, shared: plain(shared)? })
            }
            None => None,
        };
        let expert_bias = match &t.expert_bias {
            Some(names) => {
                let rows = |values: &[f32]| {
                    let mut t = backend.tensor(spec.router.experts, values.len() / spec.router.experts);
                    backend.upload(&mut t, 0, values);
                    t
                };
                let [gate, up] = match &names.gate_up {
                    GateUpBias::Apart(both) => [files.ck.read_f32(&both[0])?, files.ck.read_f32(&both[1])?],
                    GateUpBias::Interleaved(name) => {
                        let both = files.ck.read_f32(name)?;
                        [0, 1].map(|first| both.iter().skip(first).step_by(2).copied().collect::<Vec<f32>>())
                    }
                };
                Some([rows(&gate), rows(&up), rows(&files.ck.read_f32(&names.down)?)])
            }
            None => None,
        };
        Ok(Self {
            spec,
            router: weight_f32(backend, &t.router)?,
            router_bias: t.router_bias.as_ref().map(plain).transpose()?,
            token_experts: t.token_experts.as_ref().map(|name| token_experts(files, name, &spec)).transpose()?,
            expert_scale: t.expert_scale.as_ref().map(plain).transpose()?,
            expert_bias,
            apart,
            shared,
            index,
            forced: None,
        })
    }

    /// The experts of these tokens, `[rows, k]`, where no router chooses them.
    pub(crate) fn given(&self, tokens: impl Iterator<Item = u32>) -> Option<Vec<u32>> {
        let (table, k) = (self.token_experts.as_ref()?, self.spec.router.top_k);
        Some(tokens.flat_map(|t| &table[t as usize * k..(t as usize + 1) * k]).copied().collect())
    }

    /// `ws.h` rows (of the residual by the layer's norm) → `ws.out` rows.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn forward(
        &self,
        backend: &B,
        ws: &mut Workspace<B>,
        rows: usize,
        residual: &Residual<'_, B>,
        given: Option<&[u32]>,
        store: &mut ExpertStore<B::Memory>,
        next: Option<Next<'_, B>>,
        log: Option<&mut RouteLog>,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<(), ModelError> {
        if let (Some(apart), Some(shared)) = (&self.apart, &self.shared) {
            backend.zero(&mut ws.out, rows);
            shared.add(backend, &ws.h, rows, &mut ws.act, &mut ws.out);
            backend.reshape(&mut ws.apart, rows, residual.hidden);
            backend.rms_norm(&ws.out, 0, rows, &apart.shared, residual.eps, &mut ws.apart);
            backend.rms_norm(residual.x, 0, rows, &apart.router, residual.eps, &mut ws.h);
        }
        backend.route(&self.spec.router, &self.router_weights(), &ws.h, rows, given, &mut ws.routes);
        backend.read_routes(&ws.routes, &mut ws.ids, &mut ws.weights);
        if let Some(routes) = &self.forced {
            routes.lock().unwrap_or_else(PoisonError::into_inner)(self.index, &mut ws.ids);
        }
        if let Some(log) = log {
            log.layers.resize_with(log.layers.len().max(self.index + 1), Default::default);
            log.layers[self.index].0.extend_from_slice(&ws.ids);
            log.layers[self.index].1.extend_from_slice(&ws.weights);
        }
        if let Some(apart) = &self.apart {
            backend.rms_norm(residual.x, 0, rows, &apart.input, residual.eps, &mut ws.h);
        }
        let record = store.layout(self.index);
        let step = Step {
            backend,
            rows,
            groups: Groups::new(&ws.ids, self.spec.router.top_k, self.spec.router.experts),
            layout: ExpertLayout { gate_up: record.gate_up, down: record.down, activation: self.spec.activation },
            cancelled,
        };
        if rows <= DECODE_ROWS {
            self.decode(&step, ws, store, next)?
        } else {
            self.prefill(&step, ws, store)?
        }
        match (&self.apart, &self.shared) {
            (Some(apart), _) => {
                backend.rms_norm(&ws.out, 0, rows, &apart.routed, residual.eps, &mut ws.h);
                backend.add(&mut ws.apart, 0, rows, &ws.h);
                std::mem::swap(&mut ws.apart, &mut ws.out);
            }
            (None, Some(shared)) => shared.add(backend, &ws.h, rows, &mut ws.act, &mut ws.out),
            (None, None) => {}
        }
        Ok(())
    }

    fn router_weights(&self) -> RouterWeights<'_, B::Tensor, B::Weight> {
        RouterWeights { project: &self.router, bias: self.router_bias.as_ref(), expert_scale: self.expert_scale.as_ref() }
    }

    fn operand<'a>(&'a self, layout: &'a ExpertLayout, memory: &'a B::Memory) -> Experts<'a, B::Memory, B::Tensor> {
        let bias = self.expert_bias.as_ref().map(|[gate, up, down]| ExpertBias { gate, up, down });
        Experts { layout, memory, bias }
    }

    /// Few rows: hits first, misses as they arrive, outputs buffered so that the order of arrival does not matter.
    fn decode(&self, step: &Step<'_, B>, ws: &mut Workspace<B>, store: &mut ExpertStore<B::Memory>, next: Option<Next<'_, B>>) -> Result<(), ModelError> {
        let Step { backend, rows, groups, layout, cancelled } = step;
        let k = self.spec.router.top_k;
        backend.reshape(&mut ws.act, rows * k, self.spec.inner);
        let memory = store.memory().clone();
        let operand = self.operand(layout, &memory);
        let mut lease = store.step(self.index, &groups.experts);
        if let Some(next) = next.filter(|n| n.moe.forced.is_none() && lease.wants_guess()) {
            next.route(backend, ws, *rows);
            lease.guess(next.moe.index, &ws.guess, next.moe.spec.router.top_k);
        }
        while let Some(batch) = lease.next(cancelled)? {
            let jobs = |parts: [Part; 2]| -> Vec<ExpertJob<'_>> {
                let wanted = batch.iter().filter(|r| parts.contains(&r.part));
                wanted.map(|r| ExpertJob { slot: r.slot, expert: groups.expert(r.index), rows: groups.rows(r.index), outs: groups.outs(r.index) }).collect()
            };
            let (gate_up, down) = (jobs([Part::Both, Part::GateUp]), jobs([Part::Both, Part::Down]));
            if !gate_up.is_empty() {
                backend.experts_gate_up(&operand, &gate_up, &ws.h, &mut ws.act);
            }
            if !down.is_empty() {
                backend.experts_down(&operand, &down, &ws.act, &mut ws.y);
            }
        }
        drop(lease);
        // Ascending expert id within each row, the order in which a prefill adds.
        let mut order: Vec<u32> = (0..(rows * k) as u32).collect();
        order.chunks_exact_mut(k).for_each(|row| row.sort_unstable_by_key(|&at| ws.ids[at as usize]));
        let weights: Vec<f32> = order.iter().map(|&at| ws.weights[at as usize]).collect();
        backend.experts_reduce(&ws.y, *rows, &order, &weights, &mut ws.out);
        Ok(())
    }

    /// Many rows: expert by expert in ascending id, added in place.
    fn prefill(&self, step: &Step<'_, B>, ws: &mut Workspace<B>, store: &mut ExpertStore<B::Memory>) -> Result<(), ModelError> {
        let Step { backend, rows, groups, layout, cancelled } = step;
        backend.zero(&mut ws.out, *rows);
        backend.reshape(&mut ws.act, *rows, self.spec.inner);
        let memory = store.memory().clone();
        let operand = self.operand(layout, &memory);
        let local: Vec<u32> = (0..*rows as u32).collect();
        let mut lease = if *rows >= SWEEP_ROWS { store.sweep(self.index, &groups.experts) } else { store.stream(self.index, &groups.experts) };
        while let Some(batch) = lease.next(cancelled)? {
            for ready in batch {
                let (rows, outs) = (groups.rows(ready.index), groups.outs(ready.index));
                let job = ExpertJob { slot: ready.slot, expert: groups.expert(ready.index), rows, outs: &local[..rows.len()] };
                let weights: Vec<f32> = outs.iter().map(|&at| ws.weights[at as usize]).collect();
                backend.experts_gate_up(&operand, &[job], &ws.h, &mut ws.act);
                backend.expert_down_add(&operand, &job, &weights, &ws.act, &mut ws.out);
            }
        }
        Ok(())
    }
}

/// The MoE layer that comes next, to guess which experts it will want: its router on the rows as they are now, before this
/// layer's experts and the next mixer have added to them.
pub(crate) struct Next<'a, B: Backend> {
    pub moe: &'a Moe<B>,
    pub norm: &'a B::Tensor,
    pub x: &'a B::Tensor,
    pub eps: f32,
    /// Its experts, where they are known.
    pub given: Option<Vec<u32>>,
}

impl<B: Backend> Next<'_, B> {
    /// Ids → `ws.guess`; `ws.out` and `ws.routes` are scratch for it.
    fn route(&self, backend: &B, ws: &mut Workspace<B>, rows: usize) {
        if let Some(ids) = &self.given {
            ws.guess.clone_from(ids);
            return;
        }
        let norm = self.moe.apart.as_ref().map_or(self.norm, |apart| &apart.router);
        backend.rms_norm(self.x, 0, rows, norm, self.eps, &mut ws.out);
        backend.route(&self.moe.spec.router, &self.moe.router_weights(), &ws.out, rows, None, &mut ws.routes);
        backend.read_routes(&ws.routes, &mut ws.guess, &mut ws.guess_weights);
    }
}

/// Reads a table of experts by token and checks it.
fn token_experts(files: &Resolved, name: &str, spec: &MoeSpec) -> Result<Vec<u32>, ModelError> {
    let table = files.ck.read_ids(name)?;
    let k = spec.router.top_k;
    let bad = |row: &[u32]| row.iter().enumerate().any(|(i, &id)| id as usize >= spec.router.experts || row[..i].contains(&id));
    match table.chunks_exact(k).position(bad) {
        Some(token) => Err(ModelError::Shape {
            name: name.to_owned(),
            expected: format!("{k} different experts of {} for every token", spec.router.experts),
            got: format!("{:?} for token {token}", &table[token * k..(token + 1) * k]),
        }),
        None => Ok(table),
    }
}

/// What both ways through a layer's experts need.
struct Step<'a, B: Backend> {
    backend: &'a B,
    rows: usize,
    groups: Groups,
    layout: ExpertLayout,
    cancelled: &'a dyn Fn() -> bool,
}

/// Rows of a step by expert.
struct Groups {
    /// Distinct experts, ascending.
    experts: Vec<u32>,
    starts: Vec<usize>,
    rows: Vec<u32>,
    /// `row · k + rank`.
    outs: Vec<u32>,
}

impl Groups {
    /// Counting sort of `ids` `[rows, k]`.
    fn new(ids: &[u32], k: usize, experts: usize) -> Self {
        let mut next = vec![0usize; experts + 1];
        ids.iter().for_each(|&id| next[id as usize + 1] += 1);
        (0..experts).for_each(|e| next[e + 1] += next[e]);
        let used: Vec<u32> = (0..experts as u32).filter(|&e| next[e as usize + 1] > next[e as usize]).collect();
        let starts = used.iter().map(|&e| next[e as usize]).chain([ids.len()]).collect();
        let mut outs = vec![0u32; ids.len()];
        for (at, &id) in ids.iter().enumerate() {
            outs[next[id as usize]] = at as u32;
            next[id as usize] += 1;
        }
        Self { experts: used, starts, rows: outs.iter().map(|&at| at / k as u32).collect(), outs }
    }

    fn expert(&self, index: usize) -> usize {
        self.experts[index] as usize
    }

    fn rows(&self, index: usize) -> &[u32] {
        &self.rows[self.starts[index]..self.starts[index + 1]]
    }

    fn outs(&self, index: usize) -> &[u32] {
        &self.outs[self.starts[index]..self.starts[index + 1]]
    }
}

#[cfg(test)]
mod tests {
    use super::Groups;

    /// Protects routing: every (row, rank) lands in its expert's group, experts ascending.
    #[test]
    fn groups_are_a_counting_sort() {
        let g = Groups::new(&[3, 1, 0, 3, 1, 3], 2, 5);
        assert_eq!(g.experts, [0, 1, 3]);
        assert_eq!((g.rows(0), g.outs(0)), (&[1][..], &[2][..]));
        assert_eq!((g.rows(1), g.outs(1)), (&[0, 2][..], &[1, 4][..]));
        assert_eq!((g.rows(2), g.outs(2)), (&[0, 1, 2][..], &[0, 3, 5][..]));
    }
}
