//! Every family against `transformers`: logits, routes and greedy continuations of the committed tiny checkpoints.
//! `cargo xtask goldens` makes them.

mod support;

use std::path::Path;
use std::sync::Arc;

use mach_backend::{Backend, Reference};
use mach_cpu::{Cpu, CpuOptions};
use mach_models::{Row, Want};
use safetensors::SafeTensors;
use support::{Run, SETS, golden, load, logits};

struct Golden {
    input: Vec<u32>,
    logits: Vec<f32>,
    routes: Vec<u32>,
    greedy: Vec<u32>,
}

fn read(name: &str) -> Golden {
    let bytes = std::fs::read(golden(name).join("golden.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let words = |key: &str| -> Vec<[u8; 4]> {
        let t = file.tensor(key).unwrap();
        let width = t.data().len() / t.shape().iter().product::<usize>();
        t.data().chunks_exact(width).map(|b| [b[0], b[1], b[2], b[3]]).collect()
    };
    let ids = |key: &str| words(key).into_iter().map(u32::from_le_bytes).collect::<Vec<_>>();
    Golden {
        input: ids("input_ids"),
        logits: words("logits").into_iter().map(f32::from_le_bytes).collect(),
        routes: ids("router_ids"),
        greedy: ids("greedy_tokens"),
    }
}

/// Max |Δ| over the range of the reference logits.
fn relative_error(ours: &[f32], theirs: &[f32]) -> f32 {
    assert_eq!(ours.len(), theirs.len());
    let (low, high) = theirs.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(l, h), &x| (l.min(x), h.max(x)));
    ours.iter().zip(theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / (high - low)
}

fn arg_max(row: &[f32]) -> u32 {
    (0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best }) as u32
}

/// Logits within `tolerance` of their range, routes and 32 greedy tokens identical.
fn check<B: Backend>(backend: Arc<B>, name: &str, tolerance: f32) {
    check_file(backend, name, &golden(name), Run::default(), tolerance);
}

/// The same for a copy of the checkpoint in another form.
fn check_file<B: Backend>(backend: Arc<B>, name: &str, path: &Path, run: Run, tolerance: f32) {
    let g = read(name);
    let mut model = load(backend, path, run);
    let (ours, log) = logits(&mut model, &g.input);
    // As sets: two of the chosen may weigh nearly the same, the last one chosen and the first one left out never do.
    let sets = |ids: &[u32]| -> Vec<Vec<u32>> {
        let sorted = |row: &[u32]| {
            let mut row = row.to_vec();
            row.sort_unstable();
            row
        };
        ids.chunks_exact(model.spec().top_k()).map(sorted).collect()
    };
    let routes: Vec<u32> = log.layers.iter().flat_map(|l| l.0.iter().copied()).collect();
    assert!(sets(&routes) == sets(&g.routes), "{name}: routes");
    let error = relative_error(&ours, &g.logits);
    assert!(error <= tolerance, "{name}: logits are off by {error} of their range");

    let mut seq = model.sequence();
    let (mut tokens, mut out) = (g.input.clone(), Vec::new());
    for _ in 0..g.greedy.len() {
        let start = seq.len();
        let n = tokens.len() - start;
        let rows =
            (start..tokens.len()).map(|pos| Row { seq: 0, pos, token: tokens[pos], want: if pos + 1 == tokens.len() { Want::Logits } else { Want::Nothing } });
        model.forward(&mut [&mut seq], rows.collect(), None, &|| false, &mut |_, row| out = row.to_vec()).unwrap();
        seq.commit(n);
        tokens.push(arg_max(&out));
    }
    assert_eq!(tokens[g.input.len()..], g.greedy, "{name}: greedy continuation");
}

#[test]
fn the_cpu_backend_agrees_with_transformers() {
    for name in SETS {
        // On quantised weights activations have 16 bits, and keys and values are halves.
        let tolerance = if name.contains("mlx") || name.contains("fp4") { 1e-3 } else { 2e-4 };
        check(Arc::new(Cpu::new(CpuOptions::default()).unwrap()), name, tolerance);
    }
}

#[test]
fn the_plain_backend_agrees_with_transformers() {
    for name in SETS {
        check(Arc::new(Reference), name, if name.contains("mlx") { 1e-3 } else { 2e-4 });
    }
}

/// Protects GGUF files: names, stacked experts, norms with their one added, decays and the order of value heads as the
/// converter of llama.cpp writes them; resident, and streaming from the file itself.
#[test]
fn ggufs_of_the_converter_agree_with_transformers() {
    for name in ["qwen3-base", "qwen3_5-base", "gpt_oss-mxfp4", "gemma4-base", "deepseek_v4-fp8fp4"] {
        let file = golden(name).with_extension("gguf");
        check_file(Arc::new(Reference), name, &file, Run::default(), 2e-4);
        for run in [Run::default(), Run { bank: Some(0.3), resident: false, chunk: None }] {
            check_file(Arc::new(Cpu::new(CpuOptions::default()).unwrap()), name, &file, run, 2e-4);
        }
    }
}
