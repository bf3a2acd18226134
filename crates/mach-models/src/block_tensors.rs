//! Tensors of attention and of feed-forward blocks, dense and routed.

use mach_format::{ExpertSource, LayerPlan, Matrix, RowPick};

use crate::ModelError;
use crate::spec::{AttentionBlock, MoeSpec, SharedSpec};
use crate::tensors::{Resolver, WeightNames, check_shape};

/// Attention tensors.
pub struct AttentionTensors {
    pub(crate) q: Matrix,
    pub(crate) k: Matrix,
    /// `None` where values are made of keys.
    pub(crate) v: Option<Matrix>,
    pub(crate) o: Matrix,
    /// Of q, k, v and o.
    pub(crate) bias: Option<[String; 4]>,
    pub(crate) sinks: Option<String>,
    /// Of q and k.
    pub(crate) norms: Option<[String; 2]>,
}

impl AttentionTensors {
    /// The projections.
    pub(crate) fn matrices(&self) -> impl Iterator<Item = &Matrix> {
        [&self.q, &self.k].into_iter().chain(&self.v).chain([&self.o])
    }
}

/// A feed-forward block that is always active.
pub struct FeedForwardTensors {
    pub(crate) gate: Matrix,
    pub(crate) up: Matrix,
    pub(crate) down: Matrix,
    pub(crate) scalar: Option<Matrix>,
}

/// MoE tensors. `experts` is `None` in a pack, whose experts are in its sidecar.
pub struct MoeTensors {
    pub(crate) router: Matrix,
    pub(crate) router_bias: Option<String>,
    /// Table `[vocabulary, experts per token]`.
    pub(crate) token_experts: Option<String>,
    pub(crate) expert_scale: Option<String>,
    pub(crate) expert_bias: Option<ExpertBiasTensors>,
    /// See [`WeightNames::apart`].
    pub(crate) apart: Option<[String; 4]>,
    pub(crate) shared: Option<FeedForwardTensors>,
    pub(crate) experts: Option<LayerPlan>,
}

/// Biases of all experts.
pub struct ExpertBiasTensors {
    pub(crate) gate_up: GateUpBias,
    /// `[experts, hidden]`.
    pub(crate) down: String,
}

/// Biases of gate and up.
pub enum GateUpBias {
    /// `[experts, 2·inner]`, gate and up in turn.
    Interleaved(String),
    /// `[experts, inner]` each.
    Apart([String; 2]),
}

impl Resolver<'_> {
    pub(crate) fn attention(
        &mut self,
        names: &WeightNames,
        at: &dyn Fn(&str) -> String,
        hidden: usize,
        block: &AttentionBlock,
    ) -> Result<AttentionTensors, ModelError> {
        let [q, k, v, o, q_norm, k_norm] = names.attention.map(at);
        let a = &block.attention;
        let (heads, kv) = (a.heads * a.head_dim, a.kv_heads * a.head_dim);
        let q_rows = if a.gate { 2 * heads } else { heads };
        let bias = match block.bias {
            true => Some([
                self.vector(format!("{q}.bias"), q_rows)?,
                self.vector(format!("{k}.bias"), kv)?,
                self.vector(format!("{v}.bias"), kv)?,
                self.vector(format!("{o}.bias"), hidden)?,
            ]),
            false => None,
        };
        let norms = match block.qk_norm {
            true => Some([self.vector(q_norm + ".weight", a.head_dim)?, self.vector(k_norm + ".weight", a.head_dim)?]),
            false => None,
        };
        Ok(AttentionTensors {
            q: self.matrix(&q, q_rows, hidden)?,
            k: self.matrix(&k, kv, hidden)?,
            v: if block.v_from_k { None } else { Some(self.matrix(&v, kv, hidden)?) },
            o: self.matrix(&o, hidden, heads)?,
            bias,
            sinks: if block.sinks { Some(self.vector(at(names.sinks), a.heads)?) } else { None },
            norms,
        })
    }

    pub(crate) fn feed_forward(
        &mut self,
        names: [&str; 3],
        scalar: Option<&str>,
        at: &dyn Fn(&str) -> String,
        hidden: usize,
        inner: usize,
    ) -> Result<FeedForwardTensors, ModelError> {
        let [gate, up, down] = names.map(at);
        Ok(FeedForwardTensors {
            gate: self.matrix(&gate, inner, hidden)?,
            up: self.matrix(&up, inner, hidden)?,
            down: self.matrix(&down, hidden, inner)?,
            scalar: scalar.map(|s| self.matrix(&at(s), 1, hidden)).transpose()?,
        })
    }

    /// A table of `len` ids.
    fn ids(&mut self, name: String, len: usize) -> Result<String, ModelError> {
        let info = self.ck.require(&name)?;
        if info.shape.iter().product::<usize>() != len {
            return Err(ModelError::Shape { name, expected: format!("{len} ids"), got: format!("{:?} of {:?}", info.shape, info.dtype) });
        }
        self.used.insert(name.clone());
        Ok(name)
    }

    pub(crate) fn moe(
        &mut self,
        names: &WeightNames,
        at: &dyn Fn(&str) -> String,
        [hidden, vocab]: [usize; 2],
        m: &MoeSpec,
        layer: usize,
    ) -> Result<MoeTensors, ModelError> {
        let experts = m.router.experts;
        let router = self.matrix(&at(names.router), experts, hidden)?;
        // Where ids come from a table there is no bias to choose by.
        let bias = at(names.router) + ".bias";
        let wants_bias = m.router.bias != mach_backend::RouterBias::None;
        let [gate, up, down, scalar] = names.shared;
        let shared = m.shared.map(|SharedSpec { inner, gated }| self.feed_forward([gate, up, down], gated.then_some(scalar), at, hidden, inner)).transpose()?;
        let apart = match m.apart {
            true => {
                let mut of = |name: &str| self.vector(at(name), hidden);
                let [router, input, routed, shared] = names.apart;
                Some([of(router)?, of(input)?, of(routed)?, of(shared)?])
            }
            false => None,
        };
        Ok(MoeTensors {
            router,
            router_bias: if wants_bias { Some(self.vector(bias, experts)?) } else { None },
            token_experts: if m.by_token { Some(self.ids(at(names.router) + ".tid2eid", vocab * m.router.top_k)?) } else { None },
            expert_scale: if m.expert_scale { Some(self.vector(at(names.expert_scale), experts)?) } else { None },
            expert_bias: if m.expert_bias { Some(self.expert_bias(names, at, hidden, m)?) } else { None },
            apart,
            shared,
            experts: self.experts(names, at, hidden, m, layer)?,
        })
    }

    fn expert_bias(&mut self, names: &WeightNames, at: &dyn Fn(&str) -> String, hidden: usize, m: &MoeSpec) -> Result<ExpertBiasTensors, ModelError> {
        let experts = m.router.experts;
        let [gate_up, down] = names.fused.map(|n| at(n) + "_bias");
        if self.ck.tensor(&gate_up).is_some() {
            let gate_up = GateUpBias::Interleaved(self.vector(gate_up, experts * 2 * m.inner)?);
            return Ok(ExpertBiasTensors { gate_up, down: self.vector(down, experts * hidden)? });
        }
        let [gate, up, down] = names.switch.map(|n| at(n) + ".bias");
        let (gate, up) = (self.vector(gate, experts * m.inner)?, self.vector(up, experts * m.inner)?);
        Ok(ExpertBiasTensors { gate_up: GateUpBias::Apart([gate, up]), down: self.vector(down, experts * hidden)? })
    }

    /// A fused stack of experts, `[rows, cols]` each.
    fn fused(&mut self, names: &WeightNames, module: &str, experts: usize, rows: usize, cols: usize) -> Result<Matrix, ModelError> {
        let m = self.raw(module)?;
        let m = if names.interleaved && m.format().is_plain() { m.transposed()? } else { m };
        check_shape(&m, Some(experts), rows, cols)?;
        Ok(m)
    }

    fn experts(&mut self, names: &WeightNames, at: &dyn Fn(&str) -> String, hidden: usize, m: &MoeSpec, layer: usize) -> Result<Option<LayerPlan>, ModelError> {
        let (experts, inner) = (m.router.experts, m.inner);
        let has = |name: &str| self.ck.has_matrix(&at(name));
        let first = names.each.map(|n| n.replace("{}", "0"));
        let (gate, up, down) = if has(names.fused[0]) {
            let both_fused = has(names.fused[1]);
            let gate_up = self.fused(names, &at(names.fused[0]), experts, 2 * inner, hidden)?;
            // Some files fuse only gate and up.
            let down = match both_fused {
                true => self.fused(names, &at(names.fused[1]), experts, hidden, inner)?,
                false => self.stack(&at(names.switch[2]), experts, hidden, inner)?,
            };
            let part = |first, step| ExpertSource::StackedRows(gate_up.clone(), RowPick { first, step, rows: inner });
            let (gate, up) = if names.interleaved { (part(0, 2), part(1, 2)) } else { (part(0, 1), part(inner, 1)) };
            (gate, up, ExpertSource::Stacked(down))
        } else if has(names.switch[0]) {
            let [gate, up, down] = names.switch.map(at);
            (
                ExpertSource::Stacked(self.stack(&gate, experts, inner, hidden)?),
                ExpertSource::Stacked(self.stack(&up, experts, inner, hidden)?),
                ExpertSource::Stacked(self.stack(&down, experts, hidden, inner)?),
            )
        } else if has(&first[0]) {
            let mut each = |pattern: &str, rows, cols| -> Result<ExpertSource, ModelError> {
                let one = |e: usize| self.matrix(&at(&pattern.replace("{}", &e.to_string())), rows, cols);
                Ok(ExpertSource::Each((0..experts).map(one).collect::<Result<_, _>>()?))
            };
            (each(names.each[0], inner, hidden)?, each(names.each[1], inner, hidden)?, each(names.each[2], hidden, inner)?)
        } else {
            return Ok(None);
        };
        Ok(Some(LayerPlan { layer, gate, up, down }))
    }
}
