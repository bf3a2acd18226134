//! The CPU backend: SIMD kernels behind one dispatch table, a fork-join pool, bank memory and paged KV.
//!
//! **Batch and kernel-set invariance**: a row's result depends neither on the rows computed with it, nor on the number
//! of threads, nor on the kernel set. Float operations have one order and one rounding (fused multiply-adds, 16
//! virtual lanes, one tree, our own `exp`), integer sums are exact, and threads never share a reduction.
#![allow(unsafe_code)] // Kernels, bank memory and the pool; every block says why it is sound.

mod choice;
mod entries;
mod kernels;
mod kv;
mod memory;
mod ops;
mod peak;
mod pool;
mod tensor;

use std::sync::{Mutex, MutexGuard, PoisonError};

use mach_backend::{
    Activation, AttentionSpec, Backend, EntrySpec, ExpertJob, Experts, GdnSegment, GdnSpec, GdnWeights, HyperSpec, HyperWeights, KvSpec, LatentRows,
    LatentSegment, LatentSpec, LatentStores, LatentWeights, QkNormRope, RouterSpec, RouterWeights, Segment, StateSpec,
};
use mach_format::{AlignedBytes, PackedLayout, PackedMatrix};

pub use entries::Entries;
pub use kernels::KernelSet;
pub use kv::Kv;
pub use memory::Bank;
pub use ops::State;
pub use ops::gdn::GdnState;
pub use ops::latent::LatentState;
pub use ops::linear::{GateUp, Weight};
pub use ops::router::Routes;
pub use peak::{peak_gflops, peak_gops};
pub use pool::Pool;
pub use tensor::Tensor;

use ops::Context;
use ops::linear::Scratch;

/// Why the CPU backend could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CpuError {
    /// `MACH_KERNELS` names no kernel set.
    #[error("MACH_KERNELS={0:?} is no kernel set; use one of {names}", names = names(&KernelSet::ALL))]
    UnknownKernels(String),
    /// The processor lacks what the kernel set needs.
    #[error("this processor cannot run kernel set {name}; it has {names}", name = .0.name(), names = names(&KernelSet::available()))]
    Unsupported(KernelSet),
    /// No threads were asked for.
    #[error("0 threads were asked for; use at least 1")]
    NoThreads,
    /// The system gave no threads.
    #[error("cannot start compute threads: {0}; use fewer threads")]
    Threads(#[from] std::io::Error),
}

impl CpuError {
    /// Stable kebab-case code.
    pub fn code(&self) -> &'static str {
        match self {
            Self::UnknownKernels(_) => "unknown-kernels",
            Self::Unsupported(_) => "unsupported-kernels",
            Self::NoThreads => "no-threads",
            Self::Threads(_) => "thread-start-failed",
        }
    }
}

fn names(sets: &[KernelSet]) -> String {
    sets.iter().map(|s| s.name()).collect::<Vec<_>>().join(", ")
}

impl KernelSet {
    /// What `MACH_KERNELS` asks for, if it is set and not empty.
    ///
    /// # Errors
    /// An unknown name, or a set that this processor lacks.
    pub fn from_env() -> Result<Option<Self>, CpuError> {
        match std::env::var_os("MACH_KERNELS") {
            None => Ok(None),
            Some(name) if name.is_empty() => Ok(None),
            Some(name) => Self::checked(&name.to_string_lossy()).map(Some),
        }
    }

    fn checked(name: &str) -> Result<Self, CpuError> {
        let set = Self::parse(name).ok_or_else(|| CpuError::UnknownKernels(name.to_owned()))?;
        set.table().map(|_| set).ok_or(CpuError::Unsupported(set))
    }
}

/// Bits of the integers that activations are rounded to where they meet quantised weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ActivationBits {
    /// Half the work of a prefill, at the precision that llama.cpp has.
    Eight,
    /// Routes and tokens as with f32 activations, but for one in some thousands.
    #[default]
    Sixteen,
}

/// How to make a [`Cpu`].
#[derive(Clone, Copy, Debug, Default)]
pub struct CpuOptions {
    /// Compute threads, the caller included; all that the system grants when `None`.
    pub threads: Option<usize>,
    /// Kernel set; when `None`, `MACH_KERNELS`, else [`KernelSet::automatic`].
    pub kernels: Option<KernelSet>,
    /// Precision of activations.
    pub activation_bits: ActivationBits,
}

/// The CPU backend.
pub struct Cpu {
    pool: Pool,
    kernels: &'static kernels::Kernels,
    activation_bits: ActivationBits,
    scratch: Mutex<Scratch>,
}

impl Cpu {
    /// Starts the threads and picks the kernels.
    ///
    /// # Errors
    /// See [`CpuError`].
    pub fn new(options: CpuOptions) -> Result<Self, CpuError> {
        let set = match options.kernels {
            Some(set) => set,
            None => KernelSet::from_env()?.unwrap_or_else(KernelSet::automatic),
        };
        let kernels = set.table().ok_or(CpuError::Unsupported(set))?;
        let threads = match options.threads {
            Some(0) => return Err(CpuError::NoThreads),
            Some(n) => n,
            None => std::thread::available_parallelism().map_or(1, |n| n.get()),
        };
        Ok(Self { pool: Pool::new(threads)?, kernels, activation_bits: options.activation_bits, scratch: Mutex::default() })
    }

    /// The kernel set in use.
    pub fn kernel_set(&self) -> KernelSet {
        self.kernels.set
    }

    /// Compute threads, the caller included.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    fn cx(&self) -> Context<'_> {
        let planes = match self.activation_bits {
            ActivationBits::Eight => 1,
            ActivationBits::Sixteen => 2,
        };
        Context { pool: &self.pool, k: self.kernels, planes }
    }

    /// What scratch holds between operations it forgets before it changes, so one that a panic left behind is as good as new.
    fn scratch(&self) -> MutexGuard<'_, Scratch> {
        self.scratch.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Backend for Cpu {
    type Tensor = Tensor;
    type Weight = Weight;
    type GateUp = GateUp;
    type Memory = Bank;
    type Kv = Kv;
    type State = State;
    type Entries = Entries;
    type Routes = Routes;

    fn name(&self) -> &'static str {
        "cpu"
    }

    fn kernels(&self) -> &'static str {
        self.kernels.set.name()
    }

    fn tensor(&self, rows: usize, cols: usize) -> Tensor {
        Tensor::zeroed(rows, cols)
    }

    fn reshape(&self, t: &mut Tensor, rows: usize, cols: usize) {
        t.reshape(rows, cols);
    }

    fn upload(&self, t: &mut Tensor, row: usize, data: &[f32]) {
        assert!(data.len().is_multiple_of(t.cols()), "{} values are not rows of {}", data.len(), t.cols());
        let rows = data.len() / t.cols();
        t.part_mut(row, rows).copy_from_slice(data);
    }

    fn read(&self, t: &Tensor, row: usize, out: &mut [f32]) {
        let at = row * t.cols();
        out.copy_from_slice(&t.values()[at..at + out.len()]);
    }

    fn zero(&self, t: &mut Tensor, rows: usize) {
        t.part_mut(0, rows).fill(0.0);
    }

    fn weight(&self, m: PackedMatrix) -> Weight {
        Weight::new(m)
    }

    fn gate_up(&self, half: PackedLayout, data: AlignedBytes) -> GateUp {
        GateUp::new(half, data)
    }

    fn alloc_bank(&self, slots: usize, part_bytes: [usize; 2]) -> std::io::Result<Bank> {
        Bank::new(slots, part_bytes)
    }

    fn kv(&self, spec: KvSpec) -> Kv {
        Kv::new(spec)
    }

    fn kv_grow(&self, kv: &mut Kv, blocks: usize) {
        kv.grow(blocks);
    }

    fn entries(&self, spec: EntrySpec) -> Entries {
        Entries::new(spec)
    }

    fn entries_grow(&self, entries: &mut Entries, blocks: usize) {
        entries.grow(blocks);
    }

    fn state(&self, spec: &StateSpec) -> State {
        State::new(spec)
    }

    fn copy_state(&self, src: &State, dst: &mut State) {
        dst.copy_from(src);
    }

    fn routes(&self) -> Routes {
        Routes::default()
    }

    fn rms_norm(&self, x: &Tensor, x_row: usize, rows: usize, w: &Tensor, eps: f32, out: &mut Tensor) {
        ops::norm::rms_norm(self.cx(), x, x_row, rows, w, eps, out);
    }

    fn add(&self, x: &mut Tensor, x_row: usize, rows: usize, y: &Tensor) {
        ops::norm::add(self.cx(), x, x_row, rows, y);
    }

    fn add_bias(&self, x: &mut Tensor, rows: usize, bias: &Tensor) {
        ops::norm::add_bias(self.cx(), x, rows, bias);
    }

    fn scale(&self, x: &mut Tensor, x_row: usize, rows: usize, by: f32) {
        // SAFETY: a row of `cols` values.
        ops::norm::each(self.cx(), x, x_row, rows, &|row, cols| unsafe { (self.kernels.scale)(row, cols, by) });
    }

    fn soft_cap(&self, x: &mut Tensor, rows: usize, cap: f32) {
        // SAFETY: a row of `cols` values.
        ops::norm::each(self.cx(), x, 0, rows, &|row, cols| unsafe { (self.kernels.soft_cap)(row, cols, cap) });
    }

    fn linear(&self, x: &Tensor, rows: usize, outs: &mut [(&Weight, &mut Tensor)]) {
        ops::linear::linear(self.cx(), &mut self.scratch(), x, rows, outs);
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
        ops::attention::qkv_store(self.cx(), spec, prep, q, k, v, segments, kv);
    }

    fn attention(&self, spec: &AttentionSpec, q: &Tensor, sinks: Option<&Tensor>, segments: &[Segment<'_>], kv: &Kv, out: &mut Tensor) {
        ops::attention::attention(self.cx(), &mut self.scratch(), spec, q, sinks, segments, kv, out);
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
        ops::gdn::gdn(self.cx(), &mut self.scratch(), spec, w, qkv, z, b, a, segments, out);
    }

    fn route(&self, spec: &RouterSpec, w: &RouterWeights<'_, Tensor, Weight>, x: &Tensor, rows: usize, given: Option<&[u32]>, routes: &mut Routes) {
        ops::router::route(self.cx(), &mut self.scratch(), spec, w, x, rows, given, routes);
    }

    fn read_routes(&self, routes: &Routes, ids: &mut Vec<u32>, weights: &mut Vec<f32>) {
        ids.clone_from(&routes.ids);
        weights.clone_from(&routes.weights);
    }

    fn experts_gate_up(&self, experts: &Experts<'_, Bank, Tensor>, jobs: &[ExpertJob<'_>], x: &Tensor, act: &mut Tensor) {
        ops::experts::gate_up(self.cx(), &mut self.scratch(), experts, jobs, x, act);
    }

    fn experts_down(&self, experts: &Experts<'_, Bank, Tensor>, jobs: &[ExpertJob<'_>], act: &Tensor, y: &mut Tensor) {
        ops::experts::down(self.cx(), &mut self.scratch(), experts, jobs, act, y);
    }

    fn expert_down_add(&self, experts: &Experts<'_, Bank, Tensor>, job: &ExpertJob<'_>, weights: &[f32], act: &Tensor, out: &mut Tensor) {
        ops::experts::down_add(self.cx(), &mut self.scratch(), experts, job, weights, act, out);
    }

    fn experts_reduce(&self, y: &Tensor, rows: usize, order: &[u32], weights: &[f32], out: &mut Tensor) {
        ops::experts::reduce(self.cx(), y, rows, order, weights, out);
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
        ops::linear::ffn_add(self.cx(), &mut self.scratch(), activation, x, rows, gate_up, down, gate, act, out);
    }

    fn linear_grouped(&self, x: &Tensor, rows: usize, weights: &[Weight], out: &mut Tensor) {
        ops::linear::linear_grouped(self.cx(), &mut self.scratch(), x, rows, weights, out);
    }

    fn latent_attention(
        &self,
        spec: &LatentSpec,
        w: &LatentWeights<'_, Tensor>,
        rows: LatentRows<'_, Tensor>,
        segments: &mut [LatentSegment<'_, State>],
        stores: LatentStores<'_, Entries>,
        out: &mut Tensor,
    ) {
        ops::latent::latent_attention(self.cx(), &mut self.scratch(), spec, w, rows, segments, stores, out);
    }

    fn hyper_mix(&self, spec: &HyperSpec, w: &HyperWeights<'_, Tensor, Weight>, x: &Tensor, x_row: usize, rows: usize, h: &mut Tensor, mix: &mut Tensor) {
        ops::hyper::mix(self.cx(), &mut self.scratch(), spec, w, x, x_row, rows, h, mix);
    }

    fn hyper_add(&self, spec: &HyperSpec, x: &mut Tensor, x_row: usize, rows: usize, y: &Tensor, mix: &Tensor) {
        ops::hyper::add(self.cx(), spec, x, x_row, rows, y, mix);
    }

    fn hyper_head(&self, spec: &HyperSpec, w: &HyperWeights<'_, Tensor, Weight>, x: &Tensor, x_row: usize, rows: usize, out: &mut Tensor) {
        ops::hyper::head(self.cx(), &mut self.scratch(), spec, w, x, x_row, rows, out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_kernel_set_is_named() {
        let error = KernelSet::checked("sse9").unwrap_err();
        assert_eq!(error.code(), "unknown-kernels");
        assert!(error.to_string().contains("sse9") && error.to_string().contains("neon-dot"), "{error}");
        assert_eq!(KernelSet::checked("scalar").unwrap(), KernelSet::Scalar);
    }
}
