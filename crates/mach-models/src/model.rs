//! A loaded model: weights, KV pool, expert store, and the forward pass over rows of tokens.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};

use mach_backend::{Backend, GdnSegment, LatentSegment, LatentSpec, Segment};
use mach_experts::trace::Recorder;
use mach_experts::{AheadStats, ExpertError, ExpertStats, ExpertStore, RecordSource, Residency, StoreOptions};
use mach_format::Matrix;

use crate::ModelError;
use crate::kv::{KvPools, blocks};
use crate::layers::attention::Attention;
use crate::layers::gdn::Gdn;
use crate::layers::hyper::Hyper;
use crate::layers::latent::Latent;
use crate::layers::moe::{ForcedRoutes, Moe, Next, Residual, RouteLog};
use crate::layers::{FeedForward, angles, vector};
use crate::plan::{MemoryPlan, state_specs};
use crate::sequence::Sequence;
use crate::spec::{FfnSpec, MixerSpec, ModelSpec, RopeTable};
use crate::tensors::{FfnTensors, LayerTensors, MixerTensors, Resolved};
use crate::workspace::{HEAD_ROWS, Workspace};

enum Mixer<B: Backend> {
    Attention(Attention<B>),
    Gdn(Gdn<B>),
    Latent(Box<Latent<B>>),
}

enum Ffn<B: Backend> {
    Moe(Moe<B>),
    Dense(FeedForward<B>),
}

struct Layer<B: Backend> {
    input_norm: B::Tensor,
    post_norm: B::Tensor,
    mixer: Mixer<B>,
    ffn: Ffn<B>,
    /// Around mixer and feed-forward part, where the residual has several streams.
    hyper: Option<[Hyper<B>; 2]>,
    /// Of what mixer and feed-forward part give.
    post_norms: Option<[B::Tensor; 2]>,
    /// On the residual, at the end.
    scale: Option<f32>,
}

/// The two parts of a layer.
#[derive(Clone, Copy)]
enum Part {
    Mixer,
    Ffn,
}

impl<B: Backend> Layer<B> {
    /// Normed input of a part for `rows` rows of the residual from `first` on → `ws.h`.
    #[allow(clippy::too_many_arguments)]
    fn read(&self, b: &B, spec: &ModelSpec, part: Part, x: &B::Tensor, first: usize, rows: usize, ws: &mut Workspace<B>) {
        b.reshape(&mut ws.h, rows, spec.hidden);
        b.reshape(&mut ws.out, rows, spec.hidden);
        let norm = match part {
            Part::Mixer => &self.input_norm,
            Part::Ffn => &self.post_norm,
        };
        match (&self.hyper, &spec.hyper) {
            (Some(hyper), Some(h)) => {
                hyper[part as usize].mix(b, h, x, first, rows, &mut ws.out, &mut ws.mix);
                b.rms_norm(&ws.out, 0, rows, norm, spec.eps, &mut ws.h);
            }
            _ => b.rms_norm(x, first, rows, norm, spec.eps, &mut ws.h),
        }
    }

    /// `ws.out`, the output of a part, → the residual.
    #[allow(clippy::too_many_arguments)]
    fn write(&self, b: &B, spec: &ModelSpec, part: Part, x: &mut B::Tensor, first: usize, rows: usize, ws: &mut Workspace<B>) {
        match (&spec.hyper, &self.post_norms) {
            (Some(h), _) => b.hyper_add(h, x, first, rows, &ws.out, &ws.mix),
            (None, Some(norms)) => {
                b.rms_norm(&ws.out, 0, rows, &norms[part as usize], spec.eps, &mut ws.h);
                b.add(x, first, rows, &ws.h);
            }
            (None, None) => b.add(x, first, rows, &ws.out),
        }
        if let (Part::Ffn, Some(scale)) = (part, self.scale) {
            b.scale(x, first, rows, scale);
        }
    }
}

/// How to load.
pub struct ModelOptions<'a> {
    /// Memory plan.
    pub plan: MemoryPlan,
    /// Reader threads.
    pub readers: usize,
    /// Gets (what, done, all) while loading.
    pub progress: Progress<'a>,
}

type Progress<'a> = &'a mut dyn FnMut(&'static str, usize, usize);

/// Layers that are read before they are packed.
const LAYERS_AHEAD: usize = 4;

impl LayerTensors {
    /// Weights in the order in which they are packed.
    fn matrices(&self) -> impl Iterator<Item = &Matrix> {
        let mixer: Vec<&Matrix> = match &self.mixer {
            MixerTensors::Attention(t) => t.matrices().collect(),
            MixerTensors::Gdn(t) => vec![&t.qkv, &t.z, &t.b, &t.a, &t.o],
            MixerTensors::Latent(t) => t.matrices().into_iter().map(|(m, _)| m).collect(),
        };
        let (router, dense) = match &self.ffn {
            FfnTensors::Moe(t) => (Some(&t.router), t.shared.as_ref()),
            FfnTensors::Dense(t) => (None, Some(&**t)),
        };
        mixer.into_iter().chain(dense.into_iter().flat_map(|t| [&t.gate, &t.up, &t.down])).chain(router)
    }
}

/// What is wanted back of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Want {
    /// Nothing: it only feeds the caches.
    Nothing,
    /// Its logits.
    Logits,
}

/// One token of a forward pass. Rows of a sequence stand together, in order of position.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// Index into the sequences of the call.
    pub seq: usize,
    /// Absolute position.
    pub pos: usize,
    /// Token id.
    pub token: u32,
    /// What is wanted back.
    pub want: Want,
}

/// Rows of one sequence within a pass.
struct Span {
    seq: usize,
    row: usize,
    rows: usize,
    pos: usize,
}

/// A forward pass under way: it yields between layers.
pub struct Forward<B: Backend> {
    rows: Vec<Row>,
    spans: Vec<Span>,
    x: B::Tensor,
    /// cos and sin per row, for each of the model's tables.
    ropes: Vec<Vec<f32>>,
    layer: usize,
}

impl<B: Backend> Forward<B> {
    /// Angles of `rows` rows from `first` on in one of the tables → `ws.rope`.
    fn upload_rope(&self, b: &B, spec: &ModelSpec, table: usize, first: usize, rows: usize, ws: &mut Workspace<B>) {
        let cols = spec.ropes[table].dims();
        b.reshape(&mut ws.rope, rows, cols);
        ws.rope_half = cols / 2;
        b.upload(&mut ws.rope, 0, &self.ropes[table][first * cols..(first + rows) * cols]);
    }

    /// Layers done.
    pub fn layers_done(&self) -> usize {
        self.layer
    }
}

/// A model in memory.
pub struct Model<B: Backend> {
    backend: Arc<B>,
    spec: ModelSpec,
    layers: Vec<Layer<B>>,
    final_norm: B::Tensor,
    /// Before the final norm, where the residual has several streams.
    head_hyper: Option<Hyper<B>>,
    head: B::Weight,
    embed: Matrix,
    kv: KvPools<B>,
    store: Option<ExpertStore<B::Memory>>,
    ws: Workspace<B>,
    plan: MemoryPlan,
}

impl<B: Backend> Model<B> {
    /// Reads the always-active weights, and the experts too when the plan is resident.
    ///
    /// # Errors
    /// Read errors, bad checksums, memory that cannot be had.
    pub fn load(backend: Arc<B>, files: &Resolved, source: Option<Arc<dyn RecordSource>>, options: ModelOptions<'_>) -> Result<Self, ModelError> {
        let b = &*backend;
        let (spec, plan) = (&files.spec, options.plan);
        let store = match source {
            Some(source) if spec.routed_experts() > 0 => {
                let store_options = StoreOptions { slots: plan.slots, readers: options.readers, top_k: spec.top_k(), residency: plan.residency };
                let slots = ExpertStore::<B::Memory>::slots_wanted(&*source, &store_options)?;
                let memory =
                    b.alloc_bank(slots, source.part_bytes()).map_err(|e| ExpertError::Memory { slots, bytes: slots as u64 * plan.slot_bytes, source: e })?;
                let mut store = ExpertStore::new(memory, source, &store_options)?;
                if plan.residency == Residency::Resident {
                    store.load_all(&mut |done, all| (options.progress)("experts", done, all))?;
                }
                Some(store)
            }
            _ => None,
        };
        let (layers, head) = std::thread::scope(|scope| {
            // A thread of its own keeps the drive busy while what it has read is packed, a few layers ahead of it.
            let (ahead, packed) = sync_channel(LAYERS_AHEAD);
            scope.spawn(move || {
                for tensors in &files.layers {
                    tensors.matrices().for_each(Matrix::expect);
                    if ahead.send(()).is_err() {
                        return;
                    }
                }
                files.head.expect();
            });
            let layers = Self::load_layers(b, files, &plan, &packed, options.progress)?;
            Ok::<_, ModelError>((layers, b.weight(files.head.pack()?)))
        })?;
        Ok(Self {
            layers,
            final_norm: vector(b, &files.norm(&files.final_norm, files.norm_form)?),
            head_hyper: files.head_hyper.as_ref().map(|t| Hyper::load(b, files, t)).transpose()?,
            head,
            embed: files.embed.clone(),
            kv: KvPools::new(b, spec, &plan),
            store,
            ws: Workspace::new(b, spec, plan.chunks),
            spec: spec.clone(),
            plan,
            backend,
        })
    }

    fn load_layers(b: &B, files: &Resolved, plan: &MemoryPlan, packed: &Receiver<()>, progress: Progress<'_>) -> Result<Vec<Layer<B>>, ModelError> {
        let (spec, mut layers) = (&files.spec, Vec::with_capacity(files.layers.len()));
        let (mut kv_index, mut entry_index, mut moe_index) = (0, 0, 0);
        for (i, (tensors, layer)) in files.layers.iter().zip(&spec.layers).enumerate() {
            let mixer = match (&tensors.mixer, &layer.mixer) {
                (MixerTensors::Attention(t), MixerSpec::Attention(s)) => {
                    kv_index += 1;
                    Mixer::Attention(Attention::load(b, files, t, *s, kv_index - 1, files.norm_form)?)
                }
                (MixerTensors::Gdn(t), MixerSpec::Gdn(s)) => Mixer::Gdn(Gdn::load(b, files, t, *s)?),
                (MixerTensors::Latent(t), MixerSpec::Latent(s)) => {
                    let attention = LatentSpec { ty: plan.kv_type, ..s.attention };
                    let store = entry_index;
                    entry_index += s.attention.compress.map_or(0, |c| 1 + usize::from(c.index.is_some()));
                    Mixer::Latent(Box::new(Latent::load(b, files, t, s, attention, store)?))
                }
                _ => unreachable!("tensors were resolved from this spec"),
            };
            let ffn = match (&tensors.ffn, &layer.ffn) {
                (FfnTensors::Moe(t), FfnSpec::Moe(s)) => {
                    moe_index += 1;
                    Ffn::Moe(Moe::load(b, files, t, *s, moe_index - 1)?)
                }
                (FfnTensors::Dense(t), FfnSpec::Dense { activation, .. }) => Ffn::Dense(FeedForward::load(b, &t.gate, &t.up, &t.down, None, *activation)?),
                _ => unreachable!("tensors were resolved from this spec"),
            };
            layers.push(Layer {
                input_norm: vector(b, &files.norm(&tensors.input_norm, files.norm_form)?),
                post_norm: vector(b, &files.norm(&tensors.post_norm, files.norm_form)?),
                mixer,
                ffn,
                hyper: match &tensors.hyper {
                    Some([a, f]) => Some([Hyper::load(b, files, a)?, Hyper::load(b, files, f)?]),
                    None => None,
                },
                post_norms: match &tensors.post_norms {
                    Some([a, f]) => Some([vector(b, &files.norm(a, files.norm_form)?), vector(b, &files.norm(f, files.norm_form)?)]),
                    None => None,
                },
                scale: tensors.scale.as_ref().map(|name| files.ck.read_f32(name).map(|v| v[0])).transpose()?,
            });
            progress("layers", i + 1, spec.layers.len());
            // Ended only when it has no layer left to read.
            let _ = packed.recv();
        }
        Ok(layers)
    }

    /// Shapes.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// The plan it was loaded by.
    pub fn plan(&self) -> &MemoryPlan {
        &self.plan
    }

    /// The backend.
    pub fn backend(&self) -> &Arc<B> {
        &self.backend
    }

    /// Counters of the expert store.
    pub fn expert_stats(&self) -> ExpertStats {
        self.store.as_ref().map(ExpertStore::stats).unwrap_or_default()
    }

    /// Counters of experts that were read before they were asked for.
    pub fn ahead_stats(&self) -> AheadStats {
        self.store.as_ref().map(ExpertStore::ahead_stats).unwrap_or_default()
    }

    /// Slots of the bank now.
    pub fn slots(&self) -> usize {
        self.store.as_ref().map_or(0, ExpertStore::slots)
    }

    /// Bytes of KV blocks in use.
    pub fn kv_bytes(&self) -> u64 {
        self.kv.used_bytes()
    }

    /// Writes a trace of the experts in use from now on.
    pub fn record(&mut self, recorder: Recorder) {
        if let Some(store) = &mut self.store {
            store.record(recorder);
        }
    }

    /// Lets `routes` replace what routers choose, for benches.
    pub fn force_routes(&mut self, routes: &ForcedRoutes) {
        for layer in &mut self.layers {
            if let Ffn::Moe(moe) = &mut layer.ffn {
                moe.forced = Some(routes.clone());
            }
        }
    }

    /// Most rows of one forward pass.
    pub fn max_rows(&self) -> usize {
        self.plan.chunks.moe
    }

    /// An empty sequence.
    pub fn sequence(&self) -> Sequence<B> {
        Sequence::new(&self.backend, state_specs(&self.spec, self.plan.kv_type), self.kv.tables())
    }

    /// Takes back a sequence's KV blocks.
    pub fn release(&mut self, seq: Sequence<B>) {
        self.kv.release(seq);
    }

    /// Takes back the KV blocks of layers with a window that no later row sees. Passes begin with it; it makes room at once when a
    /// sequence is put aside.
    pub fn settle(&mut self, seq: &mut Sequence<B>) {
        self.kv.settle(seq);
    }

    /// Whether a sequence can grow to `len` tokens within the planned KV blocks.
    pub fn can_grow(&mut self, seq: &mut Sequence<B>, len: usize) -> bool {
        self.kv.settle(seq);
        self.kv.fits(seq, len)
    }

    /// Starts a forward pass over at most [`Model::max_rows`] rows: reserves KV, reads the embeddings.
    ///
    /// # Errors
    /// KV beyond the plan, a failed embedding read.
    ///
    /// # Panics
    /// When the rows of a sequence do not stand together.
    pub fn start(&mut self, seqs: &mut [&mut Sequence<B>], rows: Vec<Row>) -> Result<Forward<B>, ModelError> {
        let mut spans: Vec<Span> = Vec::new();
        for (i, row) in rows.iter().enumerate() {
            match spans.last_mut() {
                Some(s) if s.seq == row.seq => {
                    assert_eq!(s.pos + s.rows, row.pos, "rows of a sequence are consecutive");
                    s.rows += 1;
                }
                _ => spans.push(Span { seq: row.seq, row: i, rows: 1, pos: row.pos }),
            }
        }
        for s in &spans {
            let seq = &mut *seqs[s.seq];
            self.kv.settle(seq);
            // The bank gives slots up where the budget asks for it.
            self.kv.reserve(&self.backend, seq, s.pos..s.pos + s.rows, &mut |bytes| {
                let over = bytes.saturating_sub(self.plan.kv_free);
                if let (true, Some(store)) = (over > 0, &mut self.store) {
                    self.plan.kv_free += store.give_up(over);
                }
            })?;
            seq.pending = true;
        }
        if let Some(store) = &mut self.store {
            store.next_pass(rows.len());
        }
        let (hidden, width) = (self.spec.hidden, self.spec.residual());
        let mut embedded = vec![0.0; rows.len() * width];
        for (row, out) in rows.iter().zip(embedded.chunks_exact_mut(width)) {
            let (first, others) = out.split_at_mut(hidden);
            self.embed.row_f32(row.token as usize, first)?;
            first.iter_mut().for_each(|x| *x *= self.spec.embed_scale);
            others.chunks_exact_mut(hidden).for_each(|stream| stream.copy_from_slice(first));
        }
        let mut x = self.backend.tensor(rows.len(), width);
        self.backend.upload(&mut x, 0, &embedded);
        let table = |t: &RopeTable| {
            let mut rope = vec![0.0; rows.len() * t.dims()];
            for (row, out) in rows.iter().zip(rope.chunks_exact_mut(t.dims().max(1))) {
                angles(&t.inv_freq, row.pos, out);
                out.iter_mut().for_each(|x| *x *= t.factor);
            }
            rope
        };
        let ropes = self.spec.ropes.iter().map(table).collect();
        Ok(Forward { rows, spans, x, ropes, layer: 0 })
    }

    /// Runs the next layer; `true` when it was the last. `cancelled` is asked between chunks and experts.
    ///
    /// # Errors
    /// Failed reads, cancellation: roll the sequences back or drop them.
    pub fn step(
        &mut self,
        f: &mut Forward<B>,
        seqs: &mut [&mut Sequence<B>],
        log: Option<&mut RouteLog>,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<bool, ModelError> {
        let (b, ws, eps) = (&*self.backend, &mut self.ws, self.spec.eps);
        let (layer, index, total) = (&self.layers[f.layer], f.layer, f.rows.len());
        for first in (0..total).step_by(self.plan.chunks.mixer) {
            if cancelled() {
                return Err(ExpertError::Cancelled.into());
            }
            let rows = self.plan.chunks.mixer.min(total - first);
            layer.read(b, &self.spec, Part::Mixer, &f.x, first, rows, ws);
            // The part of every span that lies in this chunk.
            let cut = f.spans.iter().filter_map(|s| {
                let (start, end) = (s.row.max(first), (s.row + s.rows).min(first + rows));
                (start < end).then(|| (s.seq, start - first, end - start, s.pos + start - s.row))
            });
            match &layer.mixer {
                Mixer::Attention(a) => {
                    f.upload_rope(b, &self.spec, a.block.rope, first, rows, ws);
                    let window = a.block.attention.window;
                    let segments: Vec<Segment<'_>> =
                        cut.map(|(seq, row, rows, pos)| Segment { row, rows, pos, blocks: blocks(&seqs[seq].tables, window) }).collect();
                    a.forward(b, ws, rows, eps, &segments, &mut self.kv.kv);
                }
                Mixer::Gdn(g) => {
                    let cut: Vec<_> = cut.collect();
                    let mut segments: Vec<GdnSegment<'_, B::State>> = Vec::with_capacity(cut.len());
                    for (i, seq) in seqs.iter_mut().enumerate() {
                        if let (Some(&(_, row, rows, _)), Some(state)) = (cut.iter().find(|c| c.0 == i), &mut seq.states[index]) {
                            segments.push(GdnSegment { row, rows, state });
                        }
                    }
                    g.forward(b, ws, rows, &mut segments);
                }
                Mixer::Latent(l) => {
                    f.upload_rope(b, &self.spec, l.block.rope, first, rows, ws);
                    let cut: Vec<_> = cut.collect();
                    let mut segments = Vec::with_capacity(cut.len());
                    for (i, seq) in seqs.iter_mut().enumerate() {
                        let seq = &mut **seq;
                        if let (Some(&(_, row, rows, pos)), Some(state)) = (cut.iter().find(|c| c.0 == i), &mut seq.states[index]) {
                            segments.push(LatentSegment { row, rows, pos, entry_row: 0, blocks: blocks(&seq.tables, None), state });
                        }
                    }
                    l.forward(b, ws, rows, &mut segments, &mut self.kv.entries);
                }
            }
            layer.write(b, &self.spec, Part::Mixer, &mut f.x, first, rows, ws);
        }
        layer.read(b, &self.spec, Part::Ffn, &f.x, 0, total, ws);
        match (&layer.ffn, &mut self.store) {
            (Ffn::Moe(m), Some(store)) => {
                let given = |moe: &Moe<B>| moe.given(f.rows.iter().map(|r| r.token));
                let next = match self.layers.get(f.layer + 1) {
                    Some(Layer { ffn: Ffn::Moe(moe), post_norm: norm, hyper, .. }) => {
                        let given = given(moe);
                        // What a router reads of several streams is not known before they are written.
                        (hyper.is_none() || given.is_some()).then_some(Next { moe, norm, x: &f.x, eps, given })
                    }
                    _ => None,
                };
                let residual = Residual { x: &f.x, hidden: self.spec.hidden, eps };
                m.forward(b, ws, total, &residual, given(m).as_deref(), store, next, log, cancelled)?;
            }
            (Ffn::Moe(_), None) => return Err(ModelError::NoExperts { path: "the model".to_owned(), reason: "it was loaded without experts".to_owned() }),
            (Ffn::Dense(d), _) => {
                b.zero(&mut ws.out, total);
                d.add(b, &ws.h, total, &mut ws.act, &mut ws.out);
            }
        }
        layer.write(b, &self.spec, Part::Ffn, &mut f.x, 0, total, ws);
        f.layer += 1;
        Ok(f.layer == self.layers.len())
    }

    /// Gives the logits of the rows that want them to `sink` (row index, logits), in order.
    pub fn finish(&mut self, f: Forward<B>, sink: &mut dyn FnMut(usize, &[f32])) {
        let b = &*self.backend;
        let mut logits = Vec::new();
        let mut row = 0;
        while row < f.rows.len() {
            if f.rows[row].want == Want::Nothing {
                row += 1;
                continue;
            }
            let n = f.rows[row..].iter().take(HEAD_ROWS).take_while(|r| r.want == Want::Logits).count();
            match (&self.head_hyper, &self.spec.hyper) {
                (Some(hyper), Some(h)) => {
                    b.reshape(&mut self.ws.out, n, self.spec.hidden);
                    hyper.head(b, h, &f.x, row, n, &mut self.ws.out);
                    b.rms_norm(&self.ws.out, 0, n, &self.final_norm, self.spec.eps, &mut self.ws.head_in);
                }
                _ => b.rms_norm(&f.x, row, n, &self.final_norm, self.spec.eps, &mut self.ws.head_in),
            }
            b.linear(&self.ws.head_in, n, &mut [(&self.head, &mut self.ws.logits)]);
            if let Some(cap) = self.spec.logit_cap {
                b.soft_cap(&mut self.ws.logits, n, cap);
            }
            logits.resize(n * self.spec.vocab, 0.0);
            b.read(&self.ws.logits, 0, &mut logits);
            for (i, logits) in logits.chunks_exact(self.spec.vocab).enumerate() {
                sink(row + i, logits);
            }
            row += n;
        }
    }

    /// A whole forward pass without yielding.
    ///
    /// # Errors
    /// As [`Model::start`] and [`Model::step`].
    pub fn forward(
        &mut self,
        seqs: &mut [&mut Sequence<B>],
        rows: Vec<Row>,
        mut log: Option<&mut RouteLog>,
        cancelled: &dyn Fn() -> bool,
        sink: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), ModelError> {
        let mut f = self.start(seqs, rows)?;
        while !self.step(&mut f, seqs, log.as_deref_mut(), cancelled)? {}
        self.finish(f, sink);
        Ok(())
    }
}
