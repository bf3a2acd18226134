//! From a model directory to a running engine.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use mach_backend::{Backend, KvType, Reference};
use mach_cpu::{ActivationBits, Cpu, CpuOptions};
use mach_engine::{EngineHandle, EngineInfo};
use mach_experts::trace::{Recorder, TraceHeader};
use mach_experts::{RecordSource, Residency};
use mach_models::plan::{BankSize, Sizes};
use mach_models::{MemoryPlan, Model, ModelOptions, PlanOptions, ResidencyChoice, Resolved, open_checkpoint, open_experts};
use mach_session::{Session, TextModel};

use crate::estimate::{Estimate, estimate};
use crate::locate::{ModelPath, locate};
use crate::text::open_text;
use crate::units::{seconds, size};
use crate::{Error, system};

/// What computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BackendKind {
    /// SIMD kernels.
    #[default]
    Cpu,
    /// The plain f32 oracle: slow, never quantises activations.
    Reference,
}

/// How to load a model.
#[derive(Clone, Debug, Default)]
pub struct LoadOptions {
    /// Streaming or resident; `None` chooses by fit.
    pub streaming: Option<bool>,
    /// Size of the bank.
    pub bank: Option<BankSize>,
    /// Bytes that the process may use.
    pub memory_budget: Option<u64>,
    /// Context in tokens.
    pub context: Option<usize>,
    /// KV element type.
    pub kv: Option<KvType>,
    /// Compute threads.
    pub threads: Option<usize>,
    /// Rows of a prefill chunk.
    pub prefill_chunk: Option<usize>,
    /// Precision of activations against quantised weights.
    pub activation_bits: ActivationBits,
    /// What computes.
    pub backend: BackendKind,
    /// An expert sidecar elsewhere than beside the checkpoint.
    pub sidecar: Option<PathBuf>,
    /// Writes which experts are used.
    pub trace: Option<Recorder>,
}

/// A model that was found and planned, its weights not yet read.
pub struct Prepared {
    /// Where.
    pub path: ModelPath,
    /// Tensors.
    pub files: Arc<Resolved>,
    /// Experts.
    pub source: Option<Arc<dyn RecordSource>>,
    /// Memory.
    pub plan: MemoryPlan,
    options: LoadOptions,
}

/// A model that answers.
pub struct Loaded {
    /// Token ids in, token ids out.
    pub engine: EngineHandle,
    /// Tokenizer and template; `None` for a checkpoint without a tokenizer.
    pub text: Option<Arc<TextModel>>,
    /// What was decided.
    pub plan: MemoryPlan,
    /// Time it took.
    pub load_ms: f64,
    /// Expected decode speed.
    pub estimate: Estimate,
    /// Where it came from.
    pub path: ModelPath,
}

/// Progress of loading: (what, done, all).
pub type Progress<'a> = &'a mut dyn FnMut(&'static str, usize, usize);

/// Size in memory of a tokenizer per byte of its `tokenizer.json` (vocabulary, merges and their maps).
const TOKENIZER_FACTOR: u64 = 10;
/// Reader threads: enough to keep a drive's queue full, few enough to leave the cores alone.
const READERS: usize = 4;

/// Finds, resolves and plans a model. Reads headers only.
///
/// # Errors
/// Everything that is wrong with the checkpoint, its sidecar, or the budget.
pub fn prepare(model: Option<&str>, options: &LoadOptions) -> Result<Prepared, Error> {
    prepare_at(locate(model)?, options, system::available_memory())
}

/// [`prepare`] for a found model and a given amount of memory.
///
/// # Errors
/// As [`prepare`].
pub fn prepare_at(path: ModelPath, options: &LoadOptions, available: u64) -> Result<Prepared, Error> {
    Found::open(path, options.sidecar.as_deref())?.plan(options, available)
}

/// A model whose tensors and experts were found. One can be planned in several ways.
pub(crate) struct Found {
    pub path: ModelPath,
    pub files: Arc<Resolved>,
    pub source: Option<Arc<dyn RecordSource>>,
}

impl Found {
    pub fn open(path: ModelPath, sidecar: Option<&Path>) -> Result<Self, Error> {
        let files = Resolved::open(Arc::new(open_checkpoint(&path.dir)?))?;
        let source = open_experts(&files, sidecar)?;
        Ok(Self { path, files: Arc::new(files), source })
    }

    pub fn plan(&self, options: &LoadOptions, available: u64) -> Result<Prepared, Error> {
        let (path, files, source) = (self.path.clone(), self.files.clone(), self.source.clone());
        let mut options = options.clone();
        if path.builtin && options.streaming.is_none() && options.bank.is_none() && options.memory_budget.is_none() {
            // The demonstration shows every part of the machine: a quarter of its experts in memory, the rest streams.
            options.streaming = Some(true);
            options.bank = Some(BankSize::Share(0.25));
        }
        let quantised = source.as_ref().is_some_and(|s| s.layout(0).down.format.is_quantised()) || files.head_format().is_quantised();
        let sizes = Sizes {
            spec: files.spec(),
            resident_bytes: files.resident_bytes(),
            slot_bytes: source.as_ref().map_or(0, |s| s.part_bytes().iter().map(|&b| b as u64).sum()),
            quantised,
        };
        let in_file = || std::fs::metadata(path.dir.join("tokenizer.json")).map_or(0, |m| m.len());
        let tokenizer_bytes = files.checkpoint().vocabulary_bytes().unwrap_or_else(in_file) * TOKENIZER_FACTOR;
        let wanted = PlanOptions {
            budget: options.memory_budget,
            bank: options.bank,
            residency: match options.streaming {
                None => ResidencyChoice::Auto,
                Some(true) => ResidencyChoice::Streaming,
                Some(false) => ResidencyChoice::Resident,
            },
            context: options.context,
            kv: options.kv,
            chunk: options.prefill_chunk,
            tokenizer_bytes,
            available,
        };
        let plan = MemoryPlan::new(&sizes, &wanted)?;
        let published = source.as_ref().is_some_and(|s| s.kind() == "checkpoint") && !files.checkpoint().is_gguf();
        if plan.residency == Residency::Streaming && published && !files.arch().streams_checkpoint {
            let (dir, arch) = (path.dir.display(), files.arch().model_type);
            let message = format!(
                "{dir} has its experts as published, and {arch} streams only from the engine layout: run `mach artifacts build {dir}` first, or use --no-streaming where everything fits"
            );
            return Err(Error::Input { code: "engine-layout-required", message });
        }
        Ok(Prepared { path, files, source, plan, options })
    }
}

impl Prepared {
    /// The CPU backend as asked for.
    ///
    /// # Errors
    /// Kernels that the processor lacks.
    pub fn cpu(&self) -> Result<Arc<Cpu>, Error> {
        Ok(Arc::new(Cpu::new(CpuOptions {
            threads: self.options.threads,
            kernels: mach_cpu::KernelSet::from_env()?,
            activation_bits: self.options.activation_bits,
        })?))
    }

    /// Which backend was asked for.
    pub fn backend(&self) -> BackendKind {
        self.options.backend
    }

    /// Bits of activations against quantised weights; 32 on the reference backend, which does not round them.
    pub fn activation_bits(&self) -> u8 {
        match (self.options.backend, self.options.activation_bits) {
            (BackendKind::Reference, _) => 32,
            (_, ActivationBits::Eight) => 8,
            (_, ActivationBits::Sixteen) => 16,
        }
    }

    /// Compute threads.
    pub fn threads(&self) -> usize {
        self.options.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, Into::into))
    }

    /// Reads the weights.
    ///
    /// # Errors
    /// Read errors, bad checksums, memory.
    pub fn load<B: Backend>(&self, backend: Arc<B>, progress: Progress<'_>) -> Result<Model<B>, Error> {
        let options = ModelOptions { plan: self.plan.clone(), readers: READERS, progress };
        let mut model = Model::load(backend, &self.files, self.source.clone(), options)?;
        if let (Some(recorder), Some(source)) = (&self.options.trace, &self.source) {
            let (spec, plan) = (self.files.spec(), &self.plan);
            recorder.begin(&TraceHeader {
                layers: source.layers(),
                experts: source.experts(),
                top_k: spec.top_k(),
                slots: model.slots(),
                slot_bytes: plan.slot_bytes,
                other_bytes: plan.beside_bank(),
                model: self.path.name.clone(),
            });
            model.record(recorder.clone());
        }
        Ok(model)
    }

    /// The trace that is written.
    pub(crate) fn recorder(&self) -> Option<&Recorder> {
        self.options.trace.as_ref()
    }

    /// Where the sidecar is, if there is one.
    pub(crate) fn sidecar_dir(&self) -> PathBuf {
        self.options.sidecar.clone().unwrap_or_else(|| self.files.checkpoint().sidecar_dir())
    }

    /// Expected decode speed, from rates measured now.
    pub fn estimate(&self) -> Estimate {
        estimate(&self.plan, self.source.as_ref(), self.threads())
    }

    /// `streaming`, `bf16_streaming` or `resident`.
    pub fn mode(&self) -> &'static str {
        let plain = self.source.as_ref().is_some_and(|s| s.kind() == "checkpoint") && self.files.plain_experts();
        match self.plan.residency {
            Residency::Resident => "resident",
            Residency::Streaming if plain => "bf16_streaming",
            Residency::Streaming => "streaming",
        }
    }

    /// What a sidecar would win for a checkpoint that streams from its own tensors, and what it would take.
    pub fn sidecar_advice(&self) -> Option<String> {
        let source = self.source.as_ref().filter(|s| s.kind() == "checkpoint")?;
        if self.plan.residency == Residency::Resident {
            return None;
        }
        let dir = &self.path.dir;
        let now = source.part_bytes().iter().map(|&b| b as u64).sum::<u64>() * self.plan.experts as u64;
        let plain = self.files.plain_experts();
        let (flags, bytes) = if plain {
            let spec = self.files.spec();
            // 4 bits a value and two f16 per group of 64.
            (" --bits 4", spec.moe_layers().map(|(_, m)| (m.router.experts * 3 * m.inner * spec.hidden) as u64).sum::<u64>() * 9 / 16)
        } else {
            ("", now)
        };
        let wins = if plain {
            format!("every miss reads {:.1} times fewer bytes, in one read instead of three", now as f64 / bytes as f64)
        } else {
            "every miss is one read instead of three or more, with nothing to repack".to_owned()
        };
        // Reading the source and writing the result at about half a gigabyte a second.
        let time = seconds((now + bytes) as f64 / 0.5e9);
        let room = match mach_format::free_space(dir) {
            Ok(free) if free < bytes => format!("; only {} are free there, so give --out a folder on another drive", size(free)),
            _ => String::new(),
        };
        let model = dir.display();
        Some(format!(
            "experts stream from the checkpoint itself; `mach artifacts build {model}{flags}` writes a sidecar: {wins}. It takes {} of disk and about {time}{room}",
            size(bytes)
        ))
    }

    /// The signal line as ordered pairs.
    pub fn signals<B: Backend>(&self, backend: &B) -> Vec<(String, String)> {
        let (plan, source) = (&self.plan, self.source.as_deref());
        let flag = |b: bool| String::from(if b { "1" } else { "0" });
        let pairs = [
            ("arch", self.files.arch().model_type.to_owned()),
            ("backend", backend.name().to_owned()),
            ("kernels", backend.kernels().to_owned()),
            ("threads", self.threads().to_string()),
            ("activation_bits", self.activation_bits().to_string()),
            ("expert_residency", self.mode().to_owned()),
            ("expert_source", source.map_or("none", RecordSource::kind).to_owned()),
            ("direct_pread", flag(source.is_some_and(RecordSource::direct))),
            ("sidecar_valid", flag(source.is_some_and(|s| s.kind() == "sidecar"))),
            ("transient_prefill", flag(plan.residency == Residency::Streaming)),
            ("bank", format!("{}/{}", plan.slots, plan.experts)),
            ("decode_path", "plain".to_owned()),
            ("prefix_cache", format!("warm{}", mach_models::plan::WARM_SEQUENCES)),
            ("kv", if plan.kv_type == KvType::F16 { "f16" } else { "f32" }.to_owned()),
            ("ctx", plan.context.to_string()),
            ("fallback_policy", "fail-fast".to_owned()),
        ];
        // Vision towers and draft heads that the checkpoint carries.
        let unused = self.files.unused().len();
        let unused = (unused > 0).then(|| ("unused_tensors", unused.to_string()));
        pairs.into_iter().chain(unused).map(|(k, v)| (k.to_owned(), v)).collect()
    }

    /// Reads the weights and starts the engine thread on the backend that was asked for.
    ///
    /// # Errors
    /// As [`Prepared::load`].
    pub fn start(&self, progress: Progress<'_>) -> Result<EngineHandle, Error> {
        match self.options.backend {
            BackendKind::Cpu => self.start_on(self.cpu()?, progress),
            BackendKind::Reference => self.start_on(Arc::new(Reference), progress),
        }
    }

    fn start_on<B: Backend>(&self, backend: Arc<B>, progress: Progress<'_>) -> Result<EngineHandle, Error> {
        let info = EngineInfo {
            arch: self.files.arch().model_type.to_owned(),
            context: self.plan.context,
            context_train: self.files.spec().max_positions,
            vocab: self.files.spec().vocab,
            parameters: self.files.parameters(),
            weight_bytes: self.files.checkpoint().total_bytes()
                + if self.files.experts().is_none() { self.plan.experts as u64 * self.plan.slot_bytes } else { 0 },
            signals: self.signals(&*backend),
        };
        let model = self.load(backend, progress)?;
        mach_engine::start(model, info).map_err(Error::io("start the engine thread"))
    }
}

impl Loaded {
    /// Text in, text out.
    ///
    /// # Errors
    /// A checkpoint without a tokenizer.
    pub fn session(&self) -> Result<Session, Error> {
        let text = self.text.clone().ok_or_else(|| Error::Input {
            code: "no-tokenizer",
            message: format!("{} has no tokenizer (tokenizer.json): copy it there, or give token ids with --tokens", self.path.dir.display()),
        })?;
        Ok(Session::new(self.engine.clone(), text))
    }
}

/// Loads a model with its tokenizer and template; without a name the built-in one.
///
/// # Errors
/// Everything that can be wrong with it, each with a code.
///
/// ```
/// # fn main() -> Result<(), mach::Error> {
/// use mach::session::GenerateRequest;
/// let model = mach::load(None, &mach::LoadOptions::default())?;
/// let session = model.session()?;
/// let prompt = session.text().raw_prompt("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")?;
/// let mut request = GenerateRequest { prompt, max_tokens: Some(16), ..Default::default() };
/// request.sampling.temperature = Some(0.0);
/// let reply = session.generate(request)?.wait()?;
/// assert_eq!(reply.text, "The capital of France is Paris.");
/// # Ok(())
/// # }
/// ```
pub fn load(model: Option<&str>, options: &LoadOptions) -> Result<Loaded, Error> {
    load_with(&prepare(model, options)?, &mut |_, _, _| {})
}

/// [`load`] of a prepared model, with progress.
///
/// # Errors
/// As [`load`].
pub fn load_with(prepared: &Prepared, progress: Progress<'_>) -> Result<Loaded, Error> {
    let began = std::time::Instant::now();
    let text = open_text(&prepared.path.dir)?.map(Arc::new);
    let estimate = prepared.estimate();
    let engine = prepared.start(progress)?;
    Ok(Loaded { engine, text, plan: prepared.plan.clone(), load_ms: began.elapsed().as_secs_f64() * 1e3, estimate, path: prepared.path.clone() })
}

/// Loads a model without its text side: token ids in, token ids out.
///
/// # Errors
/// As [`load`].
///
/// ```
/// # fn main() -> Result<(), mach::Error> {
/// use mach::engine::{Event, Request, Sampling};
/// let dir = mach::locate(None)?.dir;
/// let engine = mach::load_moe(&dir, &mach::LoadOptions::default())?;
/// let request = Request {
///     prompt: vec![1, 2, 3],
///     sampling: Sampling { temperature: 0.0, ..Sampling::default() },
///     max_tokens: Some(4),
///     stop_ids: Vec::new(),
///     policy: None,
///     snapshot_at: Vec::new(),
///     want_logits: false,
/// };
/// let (_cancel, events) = engine.submit_channel(request)?;
/// let tokens = events.iter().filter(|e| matches!(e, Event::Token { .. })).count();
/// assert_eq!(tokens, 4);
/// # Ok(())
/// # }
/// ```
pub fn load_moe(dir: &Path, options: &LoadOptions) -> Result<EngineHandle, Error> {
    prepare(dir.to_str(), options)?.start(&mut |_, _, _| {})
}
