//! `mach eval`: perplexity of a token sequence, its logits and routes, and how they compare with a reference.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use mach_backend::{Backend, Reference};
use mach_models::{Model, RouteLog, Row, Want};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value, json};

use super::args::{EngineArgs, LoadBar, read_tokens, signal_line};
use super::output::{self, ProgressLine};
use crate::{BackendKind, Error, Prepared};

#[derive(clap::Args)]
pub(super) struct Args {
    /// Model directory, or org/name in the Hugging Face cache [default: the built-in demonstration model]
    #[arg(long, env = "MACH_MODEL")]
    model: Option<String>,
    /// JSON array of token ids: one sequence
    #[arg(long, value_name = "FILE")]
    tokens: PathBuf,
    /// Compare with these logits and routes (safetensors with the keys that --logits writes)
    #[arg(long, value_name = "FILE")]
    reference: Option<PathBuf>,
    /// Write `logits` f32 [T, vocabulary], `router_ids` i32 and `router_weights` f32 [MoE layers, T, k]
    #[arg(long, value_name = "FILE")]
    logits: Option<PathBuf>,
    #[command(flatten)]
    engine: EngineArgs,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Everything that one pass over a sequence gives.
struct Pass {
    logits: Vec<f32>,
    routes: RouteLog,
    top_k: usize,
    vocab: usize,
}

pub(super) fn run(args: &Args) -> Result<(), Error> {
    let tokens = read_tokens(&args.tokens)?;
    let prepared = args.engine.prepare(args.model.as_deref())?;
    let (context, vocab) = (prepared.plan.context, prepared.files.spec().vocab);
    if tokens.len() > context {
        return Err(Error::Input { code: "context-overflow", message: format!("{} tokens exceed the context of {context}: raise --ctx-size", tokens.len()) });
    }
    if tokens.len() < 2 {
        return Err(Error::Input { code: "invalid-tokens", message: "a perplexity needs at least two tokens".to_owned() });
    }
    if let Some(&id) = tokens.iter().find(|&&id| id as usize >= vocab) {
        return Err(mach_engine::SubmitError::TokenOutOfRange { id, vocab }.into());
    }
    let pass = match prepared.backend() {
        BackendKind::Cpu => evaluate(&prepared, prepared.cpu()?, &tokens)?,
        BackendKind::Reference => evaluate(&prepared, Arc::new(Reference), &tokens)?,
    };
    if let Some(path) = &args.logits {
        let t = tokens.len();
        let ids = pass.routes.layers.iter().flat_map(|l| &l.0).flat_map(|&id| (id as i32).to_le_bytes()).collect();
        let weights: Vec<f32> = pass.routes.layers.iter().flat_map(|l| l.1.iter().copied()).collect();
        let shape = vec![pass.routes.layers.len(), t, pass.top_k];
        write_tensors(
            path,
            &[
                ("logits", Dtype::F32, vec![t, pass.vocab], f32_bytes(&pass.logits)),
                ("router_ids", Dtype::I32, shape.clone(), ids),
                ("router_weights", Dtype::F32, shape, f32_bytes(&weights)),
            ],
        )?;
    }
    let mut report = Map::new();
    report.insert("tokens".into(), json!(tokens.len()));
    report.insert("perplexity".into(), json!(perplexity(&pass, &tokens)));
    if let Some(path) = &args.reference {
        report.extend(compare(&pass, tokens.len(), path)?);
    }
    if args.json {
        output::json_line(&Value::Object(report));
    } else {
        report.iter().for_each(|(k, v)| output::line(&format!("{k:<16} {v}")));
    }
    Ok(())
}

fn evaluate<B: Backend>(prepared: &Prepared, backend: Arc<B>, tokens: &[u32]) -> Result<Pass, Error> {
    eprintln!("{}", signal_line(&prepared.signals(&*backend)));
    let mut bar = LoadBar::new();
    let mut model: Model<B> = prepared.load(backend, &mut |what, done, all| bar.show(what, done, all))?;
    bar.0.end(None);
    let mut seq = model.sequence();
    let vocab = model.spec().vocab;
    let mut pass = Pass { logits: Vec::with_capacity(tokens.len() * vocab), routes: RouteLog::default(), top_k: model.spec().top_k(), vocab };
    let mut progress = ProgressLine::new();
    for piece in tokens.chunks(model.max_rows()) {
        let start = seq.len();
        let rows = piece.iter().enumerate().map(|(i, &token)| Row { seq: 0, pos: start + i, token, want: Want::Logits }).collect();
        model.forward(&mut [&mut seq], rows, Some(&mut pass.routes), &|| false, &mut |_, row| pass.logits.extend_from_slice(row))?;
        seq.commit(piece.len());
        progress.show(|| format!("evaluated {} of {} tokens", start + piece.len(), tokens.len()));
    }
    progress.end(None);
    Ok(pass)
}

/// log-softmax of a row in f64.
fn log_softmax(row: &[f32]) -> impl Fn(usize) -> f64 + '_ {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let log_sum = row.iter().map(|&l| f64::from(l - max).exp()).sum::<f64>().ln();
    move |i| f64::from(row[i] - max) - log_sum
}

/// exp of the mean negative log-likelihood of tokens 2 to T.
fn perplexity(pass: &Pass, tokens: &[u32]) -> f64 {
    let nll: f64 = pass.logits.chunks_exact(pass.vocab).zip(&tokens[1..]).map(|(row, &next)| -log_softmax(row)(next as usize)).sum();
    (nll / (tokens.len() - 1) as f64).exp()
}

fn compare(pass: &Pass, t: usize, path: &Path) -> Result<Map<String, Value>, Error> {
    let wrong = |message: String| Error::Input { code: "invalid-reference", message: format!("{}: {message}", path.display()) };
    let bytes = std::fs::read(path).map_err(Error::io(format!("read {}", path.display())))?;
    let file = SafeTensors::deserialize(&bytes).map_err(|e| wrong(e.to_string()))?;
    let logits = file.tensor("logits").map_err(|e| wrong(e.to_string()))?;
    if logits.dtype() != Dtype::F32 || logits.shape() != [t, pass.vocab] {
        return Err(wrong(format!("`logits` is {:?} {:?}, not F32 [{t}, {}]", logits.dtype(), logits.shape(), pass.vocab)));
    }
    let reference: Vec<f32> = logits.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    let (mut low, mut high, mut max_abs, mut sum_abs) = (f32::INFINITY, f32::NEG_INFINITY, 0f32, 0f64);
    for (a, b) in pass.logits.iter().zip(&reference) {
        (low, high) = (low.min(*b), high.max(*b));
        max_abs = max_abs.max((a - b).abs());
        sum_abs += f64::from((a - b).abs());
    }
    let (mut kld, mut agree) = (0.0, 0);
    for (ours, theirs) in pass.logits.chunks_exact(pass.vocab).zip(reference.chunks_exact(pass.vocab)) {
        let (p, q) = (log_softmax(theirs), log_softmax(ours));
        kld += (0..pass.vocab).map(|i| p(i).exp() * (p(i) - q(i))).sum::<f64>();
        agree += usize::from(best(ours) == best(theirs));
    }
    let mut report = Map::new();
    report.insert("logit_range".into(), json!(high - low));
    report.insert("max_abs".into(), json!(max_abs));
    report.insert("mean_abs".into(), json!(sum_abs / reference.len() as f64));
    report.insert("kld".into(), json!(kld / t as f64));
    report.insert("top1_agreement".into(), json!(agree as f64 / t as f64));
    let routes = file.tensor("router_ids").ok().map(|ids| routes_equal(pass, t, &ids).map_err(wrong)).transpose()?;
    report.insert("routes_equal".into(), json!(routes));
    Ok(report)
}

fn best(row: &[f32]) -> usize {
    (0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best })
}

/// Share of (layer, token) pairs whose sets of experts are equal.
fn routes_equal(pass: &Pass, t: usize, ids: &TensorView<'_>) -> Result<f64, String> {
    let k = pass.top_k;
    let expected = [pass.routes.layers.len(), t, k];
    if ids.shape() != expected {
        return Err(format!("`router_ids` has shape {:?}, not {expected:?}", ids.shape()));
    }
    let reference: Vec<u32> = match ids.dtype() {
        Dtype::I32 => ids.data().chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        Dtype::I64 => ids.data().chunks_exact(8).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        other => return Err(format!("`router_ids` has type {other:?}, not I32 or I64")),
    };
    let sorted = |ids: &[u32]| {
        let mut ids = ids.to_vec();
        ids.sort_unstable();
        ids
    };
    let ours = pass.routes.layers.iter().flat_map(|l| l.0.chunks_exact(k));
    let equal = ours.zip(reference.chunks_exact(k)).filter(|(a, b)| sorted(a) == sorted(b)).count();
    Ok(equal as f64 / (expected[0] * t).max(1) as f64)
}

pub(super) fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Writes a safetensors file.
pub(super) fn write_tensors(path: &Path, tensors: &[(&str, Dtype, Vec<usize>, Vec<u8>)]) -> Result<(), Error> {
    let wrong = |e: safetensors::SafeTensorError| Error::Input { code: "write-failed", message: format!("cannot write {}: {e}", path.display()) };
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| TensorView::new(*dtype, shape.clone(), bytes).map(|v| (*name, v)));
    let views = views.collect::<Result<Vec<_>, _>>().map_err(wrong)?;
    safetensors::serialize_to_file(views, None, path).map_err(wrong)
}
