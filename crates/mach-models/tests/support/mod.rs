//! Loading golden checkpoints and running them, shared by the integration tests.
#![allow(dead_code)] // Each test file uses its own part.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use mach_backend::Backend;
use mach_models::plan::{BankSize, Sizes};
use mach_models::{MemoryPlan, Model, ModelOptions, PlanOptions, ResidencyChoice, Resolved, RouteLog, Row, Want, open_checkpoint, open_experts};

/// Folder of a golden set.
pub fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name)
}

/// The golden sets.
pub const SETS: &[&str] = &[
    "deepseek_v4-base",
    "deepseek_v4-fp8fp4",
    "gemma4-base",
    "gemma4-mlx4",
    "gpt_oss-bf16",
    "gpt_oss-mlx",
    "gpt_oss-mxfp4",
    "gpt_oss-uneven",
    "qwen3-base",
    "qwen3-dense-layers",
    "qwen3-mlx8",
    "qwen3_5-base",
    "qwen3_5-mlx4",
    "qwen3_5-uneven",
];

/// How to run.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// Share of the experts.
    pub bank: Option<f64>,
    pub resident: bool,
    pub chunk: Option<usize>,
}

impl Default for Run {
    fn default() -> Self {
        Self { bank: None, resident: true, chunk: None }
    }
}

/// Loads a checkpoint or a GGUF file.
pub fn load<B: Backend>(backend: Arc<B>, path: &Path, run: Run) -> Model<B> {
    let files = Resolved::open(Arc::new(open_checkpoint(path).unwrap())).unwrap();
    let source = open_experts(&files, None).unwrap();
    let slot_bytes = source.as_ref().map_or(0, |s| s.part_bytes().iter().map(|&b| b as u64).sum());
    let quantised = files.head_format().is_quantised();
    let sizes = Sizes { spec: files.spec(), resident_bytes: files.resident_bytes(), slot_bytes, quantised };
    // Tiny sets have so few experts that a small share is below the floor: the floor itself then.
    let floor = (2 * files.spec().top_k()) as f64 / files.spec().routed_experts() as f64;
    let options = PlanOptions {
        budget: None,
        bank: run.bank.map(|share| BankSize::Share(share.max(floor))),
        residency: if run.resident { ResidencyChoice::Resident } else { ResidencyChoice::Streaming },
        context: Some(512),
        kv: None,
        chunk: run.chunk,
        tokenizer_bytes: 0,
        available: 8 << 30,
    };
    let plan = MemoryPlan::new(&sizes, &options).unwrap();
    Model::load(backend, &files, source, ModelOptions { plan, readers: 2, progress: &mut |_, _, _| {} }).unwrap()
}

/// Logits of every row of one sequence, computed in pieces of at most `max_rows`, with the routes.
pub fn logits<B: Backend>(model: &mut Model<B>, tokens: &[u32]) -> (Vec<f32>, RouteLog) {
    let mut seq = model.sequence();
    let (mut out, mut log) = (Vec::new(), RouteLog::default());
    for piece in tokens.chunks(model.max_rows()) {
        let start = seq.len();
        let rows = piece.iter().enumerate().map(|(i, &token)| Row { seq: 0, pos: start + i, token, want: Want::Logits }).collect();
        model.forward(&mut [&mut seq], rows, Some(&mut log), &|| false, &mut |_, row| out.extend_from_slice(row)).unwrap();
        seq.commit(piece.len());
    }
    model.release(seq);
    (out, log)
}
