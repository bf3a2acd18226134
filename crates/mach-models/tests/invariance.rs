//! Promise 1 on the CPU backend: bank, mode, chunking, kernel set and threads do not change a byte of the logits, and
//! plain weights agree with transformers through the fast kernels too.

mod support;

use std::sync::Arc;

use mach_cpu::{Cpu, CpuOptions, KernelSet};
use mach_models::{Row, Sequence, Want};
use support::{Run, SETS, golden, load, logits};

fn cpu(kernels: KernelSet, threads: usize) -> Arc<Cpu> {
    Arc::new(Cpu::new(CpuOptions { threads: Some(threads), kernels: Some(kernels), ..CpuOptions::default() }).unwrap())
}

fn tokens(n: usize) -> Vec<u32> {
    (0..n as u32).map(|i| 3 + (i * 37 + i * i % 11) % 200).collect()
}

fn bytes(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|l| l.to_bits()).collect()
}

#[test]
fn bank_chunk_kernels_and_threads_do_not_change_a_byte() {
    let tokens = tokens(90);
    for name in SETS {
        let run = |kernels, threads, run: Run| bytes(&logits(&mut load(cpu(kernels, threads), &golden(name), run), &tokens).0);
        let expected = run(KernelSet::automatic(), 2, Run::default());
        for bank in [0.0, 0.5, 0.75, 1.0] {
            let streamed = run(KernelSet::automatic(), 2, Run { bank: Some(bank), resident: false, chunk: None });
            assert!(streamed == expected, "{name}: a bank of {bank} changes the logits");
        }
        for chunk in [1, 7, 64] {
            let chunked = run(KernelSet::automatic(), 1, Run { chunk: Some(chunk), ..Run::default() });
            assert!(chunked == expected, "{name}: chunks of {chunk} change the logits");
        }
        for kernels in KernelSet::available() {
            assert!(run(kernels, 1, Run::default()) == expected, "{name}: {} changes the logits", kernels.name());
        }
    }
}

fn feed<B: mach_backend::Backend>(model: &mut mach_models::Model<B>, seq: &mut Sequence<B>, tokens: &[u32]) -> Vec<u32> {
    let start = seq.len();
    let rows = tokens.iter().enumerate().map(|(i, &token)| Row { seq: 0, pos: start + i, token, want: Want::Logits }).collect();
    let mut out = Vec::new();
    model.forward(&mut [seq], rows, None, &|| false, &mut |_, row| out.extend(row.iter().map(|l| l.to_bits()))).unwrap();
    out
}

/// Protects every later use of sequence state: rolled back, snapshotted and restored sequences continue as if nothing
/// had happened, and a cancelled pass leaves no trace.
#[test]
fn undo_and_snapshots_leave_no_trace() {
    let tokens = tokens(60);
    for name in ["qwen3_5-base", "qwen3-base", "gpt_oss-mxfp4", "gemma4-base", "deepseek_v4-base"] {
        let backend = cpu(KernelSet::automatic(), 2);
        let mut model = load(backend.clone(), &golden(name), Run::default());
        let mut plain = model.sequence();
        feed(&mut model, &mut plain, &tokens[..40]);
        plain.commit(40);
        let expected = feed(&mut model, &mut plain, &tokens[40..]);
        plain.commit(20);

        let mut seq = model.sequence();
        feed(&mut model, &mut seq, &tokens[..40]);
        seq.commit(40);
        let snapshot = seq.snapshot(&backend);
        // Wrong rows, taken back.
        seq.begin(&backend);
        feed(&mut model, &mut seq, &[9, 9, 9]);
        assert!(seq.rollback() && seq.len() == 40);
        assert!(feed(&mut model, &mut seq, &tokens[40..]) == expected, "{name}: after a rollback");
        seq.commit(20);
        // Far ahead, then back to the snapshot.
        feed(&mut model, &mut seq, &[5; 30]);
        seq.commit(30);
        assert!(seq.restore(&backend, &snapshot));
        assert!(feed(&mut model, &mut seq, &tokens[40..]) == expected, "{name}: after a restore");
        seq.commit(20);
        // A pass that is cancelled in the middle.
        assert!(seq.restore(&backend, &snapshot));
        seq.begin(&backend);
        let asked = std::cell::Cell::new(0);
        let cancel_later = || {
            asked.set(asked.get() + 1);
            asked.get() > 6
        };
        let rows = (40..60).map(|pos| Row { seq: 0, pos, token: 7, want: Want::Nothing }).collect();
        let error = model.forward(&mut [&mut seq], rows, None, &cancel_later, &mut |_, _| {}).unwrap_err();
        assert!(error.is_cancelled() && seq.rollback());
        assert!(feed(&mut model, &mut seq, &tokens[40..]) == expected, "{name}: after a cancelled pass");
    }
}

/// Protects batching to come: two sequences in one pass give what each gives alone.
#[test]
fn sequences_in_one_pass_do_not_mix() {
    for name in ["qwen3_5-uneven", "qwen3-dense-layers", "gpt_oss-uneven", "gemma4-base", "deepseek_v4-base"] {
        let mut model = load(cpu(KernelSet::automatic(), 2), &golden(name), Run::default());
        let (a, b) = (tokens(12), tokens(30)[13..].to_vec());
        let (mut one, mut two) = (model.sequence(), model.sequence());
        let alone = [feed(&mut model, &mut one, &a), feed(&mut model, &mut two, &b)];
        let (mut one, mut two) = (model.sequence(), model.sequence());
        let row = |seq, pos: usize, token| Row { seq, pos, token, want: Want::Logits };
        let rows = a.iter().enumerate().map(|(i, &t)| row(0, i, t)).chain(b.iter().enumerate().map(|(i, &t)| row(1, i, t))).collect();
        let mut both = Vec::new();
        model.forward(&mut [&mut one, &mut two], rows, None, &|| false, &mut |_, r| both.extend(r.iter().map(|l| l.to_bits()))).unwrap();
        assert!(both == alone.concat(), "{name}");
    }
}
