//! Layers with a window keep their window: with the same bytes as if they kept everything, and no more than they should.

mod support;

use std::sync::Arc;

use mach_backend::Reference;
use mach_cpu::{Cpu, CpuOptions};
use mach_models::plan::UNDO_TOKENS;
use mach_models::{Model, Row, Sequence, Want};
use support::{Run, golden, load};

/// Sets with windows of 8, 37 and 8 tokens.
const SETS: [&str; 3] = ["gpt_oss-mxfp4", "gpt_oss-uneven", "gemma4-base"];

fn cpu() -> Arc<Cpu> {
    Arc::new(Cpu::new(CpuOptions { threads: Some(2), ..CpuOptions::default() }).unwrap())
}

fn tokens(n: usize) -> Vec<u32> {
    (0..n as u32).map(|i| 3 + (i * 41 + i * i % 13) % 200).collect()
}

/// Computes rows after the end of a sequence and commits them; bytes of all logits.
fn feed<B: mach_backend::Backend>(model: &mut Model<B>, seq: &mut Sequence<B>, tokens: &[u32]) -> Vec<u32> {
    let out = look(model, seq, tokens);
    seq.commit(tokens.len());
    out
}

/// The same without committing.
fn look<B: mach_backend::Backend>(model: &mut Model<B>, seq: &mut Sequence<B>, tokens: &[u32]) -> Vec<u32> {
    let start = seq.len();
    let rows = tokens.iter().enumerate().map(|(i, &token)| Row { seq: 0, pos: start + i, token, want: Want::Logits }).collect();
    let mut out = Vec::new();
    model.forward(&mut [seq], rows, None, &|| false, &mut |_, row| out.extend(row.iter().map(|l| l.to_bits()))).unwrap();
    out
}

/// Bytes of blocks in use beyond those of full layers.
fn windowed_bytes<B: mach_backend::Backend>(model: &Model<B>, len: usize) -> u64 {
    let full: u64 = model.plan().kv_pools.iter().filter(|p| p.window.is_none()).map(|p| len.div_ceil(32) as u64 * p.block_bytes).sum();
    model.kv_bytes() - full
}

/// Protects exactness where a window has moved on many times: one pass, which keeps everything to its end, and any chunks of it
/// give the same logits. And what makes it worth it: the blocks of windowed layers stay few while the context grows.
#[test]
fn chunks_of_long_prompts_give_the_same_bytes_in_bounded_memory() {
    let tokens = tokens(420);
    for name in SETS {
        let mut model = load(cpu(), &golden(name), Run::default());
        let mut seq = model.sequence();
        let expected = feed(&mut model, &mut seq, &tokens);
        model.release(seq);
        assert_eq!(model.kv_bytes(), 0, "{name}: all blocks came back");
        let windowed: Vec<_> = model.plan().kv_pools.iter().filter_map(|p| Some((p.window?, p.block_bytes))).collect();
        assert_eq!(windowed.len(), 1, "{name}");
        for chunk in [1, 7, 64] {
            let mut seq = model.sequence();
            let mut got = Vec::new();
            for piece in tokens.chunks(chunk) {
                got.extend(feed(&mut model, &mut seq, piece));
                let most = ((windowed[0].0 + UNDO_TOKENS + chunk).div_ceil(32) as u64 + 1) * windowed[0].1;
                let held = windowed_bytes(&model, seq.len());
                assert!(held <= most, "{name}: {held} of {most} bytes at {} tokens in chunks of {chunk}", seq.len());
            }
            assert!(got == expected, "{name}: chunks of {chunk}");
            model.release(seq);
        }
    }
}

/// Protects the plain backend as an oracle: it works on the same tables.
#[test]
fn the_plain_backend_keeps_windows_too() {
    let tokens = tokens(150);
    let mut model = load(Arc::new(Reference), &golden("gemma4-base"), Run::default());
    let (mut whole, mut pieces) = (model.sequence(), model.sequence());
    let expected = feed(&mut model, &mut whole, &tokens);
    let got: Vec<u32> = tokens.chunks(11).flat_map(|piece| feed(&mut model, &mut pieces, piece)).collect();
    assert!(got == expected);
}

/// Protects every way back: rejected rows, a cut within what is kept, snapshots far behind the window. What cannot be served is
/// refused and leaves the sequence as it was.
#[test]
fn ways_back_give_the_same_bytes_or_are_refused() {
    let tokens = tokens(400);
    let backend = cpu();
    for name in SETS {
        let mut model = load(backend.clone(), &golden(name), Run::default());
        let mut plain = model.sequence();
        feed(&mut model, &mut plain, &tokens[..150]);
        let at_150 = look(&mut model, &mut plain, &tokens[150..170]);
        plain.commit(0);
        feed(&mut model, &mut plain, &tokens[150..330]);
        let at_330 = look(&mut model, &mut plain, &tokens[330..350]);
        model.release(plain);

        let mut seq = model.sequence();
        for piece in tokens[..150].chunks(64) {
            feed(&mut model, &mut seq, piece);
        }
        let snapshot = seq.snapshot(&backend);
        for piece in tokens[150..330].chunks(16) {
            // Rows that are rejected: all of them, then the last ones, as with drafts.
            seq.begin(&backend);
            look(&mut model, &mut seq, &[9; 5]);
            assert!(seq.rollback());
            look(&mut model, &mut seq, &[piece, &[7, 7, 7]].concat());
            seq.commit(piece.len());
        }
        assert_eq!(seq.len(), 330);
        assert!(look(&mut model, &mut seq, &tokens[330..350]) == at_330, "{name}: after rejected rows");
        seq.commit(20);
        // Back by a little less than what is kept for it.
        assert_eq!(seq.resumable(330), 330, "{name}");
        assert!(seq.truncate(330));
        assert!(look(&mut model, &mut seq, &tokens[330..350]) == at_330, "{name}: after a cut");
        seq.commit(0);
        // The window of 200 is gone; with the snapshot that of 150 is there, to the end of its last block.
        assert_eq!(seq.resumable(200), 160, "{name}");
        assert!(!seq.truncate(200) && seq.len() == 330);
        assert!(look(&mut model, &mut seq, &tokens[330..350]) == at_330, "{name}: after a cut that was refused");
        seq.commit(0);
        let later = seq.snapshot(&backend);
        assert!(seq.restore(&backend, &snapshot) && seq.len() == 150);
        assert!(look(&mut model, &mut seq, &tokens[150..170]) == at_150, "{name}: after a restore");
        seq.commit(0);
        // A snapshot beyond the end belongs to other tokens by now, and one of another sequence always did.
        assert!(!seq.restore(&backend, &later) && seq.len() == 150);
        let mut other = model.sequence();
        assert!(!other.restore(&backend, &snapshot) && other.is_empty());
        // Far on again, the snapshot gone: nothing but the last window is kept.
        drop(snapshot);
        for piece in tokens[150..330].chunks(16) {
            feed(&mut model, &mut seq, piece);
        }
        assert!(look(&mut model, &mut seq, &tokens[330..350]) == at_330, "{name}: the same way again");
        seq.commit(0);
        model.settle(&mut seq);
        assert_eq!(seq.resumable(200), 0, "{name}");
        model.release(seq);
        assert_eq!(model.kv_bytes(), 0, "{name}: all blocks came back");
    }
}

/// Protects passes of several sequences whose windows stand at different places.
#[test]
fn windows_of_two_sequences_do_not_mix() {
    for name in SETS {
        let mut model = load(cpu(), &golden(name), Run::default());
        let (a, b) = (tokens(260), tokens(200)[17..].to_vec());
        let (last_a, last_b) = (&a[250..], &b[170..]);
        let alone = [(&a[..250], last_a), (&b[..170], last_b)].map(|(before, last)| {
            let mut seq = model.sequence();
            feed(&mut model, &mut seq, before);
            let out = feed(&mut model, &mut seq, last);
            model.release(seq);
            out
        });
        let (mut one, mut two) = (model.sequence(), model.sequence());
        // In turns, so that blocks that one gives back go to the other.
        for i in 0..25 {
            feed(&mut model, &mut one, &a[i * 10..(i + 1) * 10]);
            if i < 17 {
                feed(&mut model, &mut two, &b[i * 10..(i + 1) * 10]);
            }
        }
        let row = |seq, pos: usize, token| Row { seq, pos, token, want: Want::Logits };
        let rows = last_a.iter().enumerate().map(|(i, &t)| row(0, 250 + i, t)).chain(last_b.iter().enumerate().map(|(i, &t)| row(1, 170 + i, t))).collect();
        let mut both = Vec::new();
        model.forward(&mut [&mut one, &mut two], rows, None, &|| false, &mut |_, r| both.extend(r.iter().map(|l| l.to_bits()))).unwrap();
        assert!(both == alone.concat(), "{name}");
    }
}
