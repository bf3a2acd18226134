//! The engine thread on a tiny golden checkpoint: reuse, cancellation, order, limits.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::Receiver;

use mach_cpu::{Cpu, CpuOptions};
use mach_engine::{EngineHandle, EngineInfo, Event, FinishReason, Receipt, Request, RowPolicy, Sampling, SubmitError, Verdict};
use mach_format::Checkpoint;
use mach_models::plan::{Sizes, UNDO_TOKENS};
use mach_models::{MemoryPlan, Model, ModelOptions, PlanOptions, ResidencyChoice, Resolved, open_experts};

fn engine(set: &str, context: usize) -> EngineHandle {
    engine_with(set, context, |_| {})
}

fn engine_with(set: &str, context: usize, change: impl FnOnce(&mut MemoryPlan)) -> EngineHandle {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../mach-models/tests/goldens").join(set);
    let files = Resolved::open(Arc::new(Checkpoint::open(&dir).unwrap())).unwrap();
    let source = open_experts(&files, None).unwrap();
    let slot_bytes = source.as_ref().map_or(0, |s| s.part_bytes().iter().map(|&b| b as u64).sum());
    let sizes = Sizes { spec: files.spec(), resident_bytes: files.resident_bytes(), slot_bytes, quantised: false };
    let options = PlanOptions {
        budget: None,
        bank: None,
        residency: ResidencyChoice::Resident,
        context: Some(context),
        kv: None,
        chunk: Some(16),
        tokenizer_bytes: 0,
        available: 8 << 30,
    };
    let mut plan = MemoryPlan::new(&sizes, &options).unwrap();
    change(&mut plan);
    let info = EngineInfo {
        arch: files.arch().model_type.to_owned(),
        context,
        context_train: files.spec().max_positions,
        vocab: files.spec().vocab,
        parameters: 0,
        weight_bytes: 0,
        signals: Vec::new(),
    };
    let cpu = Arc::new(Cpu::new(CpuOptions { threads: Some(1), ..CpuOptions::default() }).unwrap());
    let model = Model::load(cpu, &files, source, ModelOptions { plan, readers: 1, progress: &mut |_, _, _| {} }).unwrap();
    mach_engine::start(model, info).unwrap()
}

fn request(prompt: &[u32], max_tokens: usize) -> Request {
    Request {
        prompt: prompt.to_vec(),
        sampling: Sampling { temperature: 0.0, ..Sampling::default() },
        max_tokens: Some(max_tokens),
        stop_ids: Vec::new(),
        policy: None,
        snapshot_at: Vec::new(),
        want_logits: false,
    }
}

/// Tokens, why it ended, and the receipt.
fn collect(events: &Receiver<Event>) -> (Vec<u32>, FinishReason, Receipt) {
    let mut tokens = Vec::new();
    for event in events {
        match event {
            Event::Token { id, .. } => tokens.push(id),
            Event::Finished { reason, receipt } => return (tokens, reason, receipt),
            Event::Failed { code, message } => panic!("{code}: {message}"),
            Event::Prefill { .. } => {}
        }
    }
    panic!("the engine ended without a last event");
}

fn run(engine: &EngineHandle, request: Request) -> (Vec<u32>, FinishReason, Receipt) {
    let (_cancel, events) = engine.submit_channel(request).unwrap();
    collect(&events)
}

fn prompt(n: u32) -> Vec<u32> {
    (0..n).map(|i| 5 + (i * 29 + i * i % 7) % 190).collect()
}

/// Protects "exact" across reuse: a conversation that goes on, one that goes back to a snapshot, and one that is cut
/// inside attention-only state all give what a fresh engine gives, and `cached_tokens` says what was reused.
#[test]
fn reused_state_gives_the_same_tokens() {
    for set in ["qwen3_5-base", "qwen3-base"] {
        let warm = engine(set, 400);
        let first = prompt(50);
        let with_snapshot = Request { snapshot_at: vec![30], ..request(&first, 12) };
        let (reply, _, receipt) = run(&warm, with_snapshot);
        assert_eq!(receipt.cached_tokens, 0);
        let longer = [first.clone(), reply.clone(), prompt(9)].concat();
        let branched = [&first[..30], &prompt(20)[7..]].concat();
        let attention_only = set == "qwen3-base";
        for (next, cached) in [(longer, first.len() + reply.len() - 1), (branched, 30)] {
            let (expected, ..) = run(&engine(set, 400), request(&next, 16));
            let (got, _, receipt) = run(&warm, request(&next, 16));
            assert_eq!(got, expected, "{set}");
            assert!(receipt.cached_tokens == cached || attention_only && receipt.cached_tokens > cached, "{set}: {}", receipt.cached_tokens);
        }
        // The very same prompt again.
        let again = Request { snapshot_at: vec![30], ..request(&first, 12) };
        assert_eq!(run(&warm, again).0, reply, "{set}");
    }
}

/// Protects reuse where layers keep a window: a conversation goes on, goes back to a snapshot far behind the window, and starts anew
/// where what it shares is gone; always with the tokens of a fresh engine.
#[test]
fn windowed_layers_serve_what_they_still_have() {
    for set in ["gpt_oss-mxfp4", "gemma4-base"] {
        let warm = engine(set, 400);
        let first = prompt(200);
        let (reply, ..) = run(&warm, Request { snapshot_at: vec![100, 150], ..request(&first, 12) });
        let longer = [first.clone(), reply.clone(), prompt(9)].concat();
        let branched = |at: usize| [&first[..at], &[3], &prompt(20)[7..]].concat();
        for (next, cached) in [(longer, first.len() + reply.len() - 1), (branched(150), 150), (branched(60), 0)] {
            let (expected, ..) = run(&engine(set, 400), request(&next, 16));
            let (got, _, receipt) = run(&warm, request(&next, 16));
            assert_eq!((got, receipt.cached_tokens), (expected, cached), "{set}");
        }
    }
}

/// Protects small budgets: with room for the window of the running sequence alone, snapshots and the other conversation give way,
/// and nothing fails or changes.
#[test]
fn windows_without_room_to_spare() {
    let tight = engine_with("gpt_oss-mxfp4", 400, |plan| {
        let windowed = plan.kv_pools.iter_mut().find(|p| p.window.is_some()).unwrap();
        windowed.blocks = (windowed.window.unwrap() + UNDO_TOKENS + plan.chunks.moe).div_ceil(32) + 1;
    });
    let first = prompt(200);
    let (reply, ..) = run(&tight, Request { snapshot_at: vec![40, 100, 150], ..request(&first, 12) });
    for next in [prompt(120), [first.clone(), reply].concat(), first[..150].to_vec(), first] {
        let (expected, ..) = run(&engine("gpt_oss-mxfp4", 400), request(&next, 16));
        assert_eq!(run(&tight, request(&next, 16)).0, expected, "{} tokens", next.len());
    }
    assert_eq!(tight.stats().failed, 0);
}

/// Protects limits: max_tokens, context, stop ids, and what they are called.
#[test]
fn generations_end_where_they_should() {
    let engine = engine("qwen3_5-base", 64);
    let p = prompt(40);
    let (all, reason, receipt) = run(&engine, request(&p, 10));
    assert_eq!((all.len(), reason, receipt.completion_tokens), (10, FinishReason::Length, 10));
    let (tokens, reason, _) = run(&engine, request(&p, 1000));
    assert_eq!((tokens.len(), reason), (24, FinishReason::Length), "the context ends it");
    let stop = all[4];
    let at = all.iter().position(|&t| t == stop).unwrap();
    let (tokens, reason, _) = run(&engine, Request { stop_ids: vec![stop], ..request(&p, 10) });
    assert_eq!((&tokens[..], reason), (&all[..at], FinishReason::Stop), "a stop id is not emitted");
    assert_eq!(run(&engine, request(&p, 0)).0, Vec::<u32>::new());
    let refused = |prompt: &[u32]| engine.submit_channel(request(prompt, 1)).map(|_| ()).unwrap_err();
    assert_eq!(refused(&prompt(64)), SubmitError::ContextOverflow { prompt: 64, context: 64 });
    assert_eq!(refused(&[]), SubmitError::EmptyPrompt);
    assert!(matches!(refused(&[1_000_000]), SubmitError::TokenOutOfRange { id: 1_000_000, .. }));
}

/// Protects policies: they mask, see every token, and can end the row.
#[test]
fn a_policy_masks_and_stops() {
    struct Odd(usize);
    impl RowPolicy for Odd {
        fn mask(&mut self, logits: &mut [f32]) {
            logits.iter_mut().step_by(2).for_each(|l| *l = f32::NEG_INFINITY);
        }
        fn accept(&mut self, token: u32) -> Verdict {
            assert_eq!(token % 2, 1);
            self.0 += 1;
            if self.0 == 3 { Verdict::Stop } else { Verdict::Continue }
        }
        fn rollback(&mut self, n: usize) {
            self.0 -= n;
        }
    }
    let engine = engine("qwen3_5-base", 128);
    let (tokens, reason, _) = run(&engine, Request { policy: Some(Box::new(Odd(0))), ..request(&prompt(10), 50) });
    assert_eq!((tokens.len(), reason), (3, FinishReason::Stop));
}

/// Protects cancellation: a running request stops, a waiting one never starts, and what follows is not disturbed.
#[test]
fn cancelled_requests_stop_and_leave_no_trace() {
    let engine = engine("qwen3_5-base", 4000);
    let (expected, ..) = run(&engine, request(&prompt(30), 8));
    let (running, events) = engine.submit_channel(request(&prompt(40), 3000)).unwrap();
    let (waiting, waiting_events) = engine.submit_channel(request(&prompt(20), 10)).unwrap();
    let (_keep, last_events) = engine.submit_channel(request(&prompt(30), 8)).unwrap();
    assert!(events.iter().any(|e| matches!(e, Event::Token { .. })));
    waiting.cancel();
    running.cancel();
    let (tokens, reason, _) = collect(&events);
    assert!(reason == FinishReason::Cancelled && tokens.len() < 2999);
    let (tokens, reason, _) = collect(&waiting_events);
    assert_eq!((tokens.len(), reason), (0, FinishReason::Cancelled));
    assert_eq!(collect(&last_events).0, expected);
    // What was computed before a cancellation stays warm.
    let (cancel, events) = engine.submit_channel(request(&prompt(50), 3000)).unwrap();
    let mut tokens: Vec<u32> = events.iter().filter_map(|e| if let Event::Token { id, .. } = e { Some(id) } else { None }).take(5).collect();
    cancel.cancel();
    tokens.extend(collect(&events).0);
    let (_, _, receipt) = run(&engine, request(&[prompt(50), tokens, vec![3]].concat(), 2));
    assert!(receipt.cached_tokens >= 50, "{}", receipt.cached_tokens);
    // In the middle of a long prefill.
    let (cancel, events) = engine.submit_channel(request(&prompt(3000), 5)).unwrap();
    assert!(events.iter().any(|e| matches!(e, Event::Prefill { done, .. } if done > 0)));
    cancel.cancel();
    assert_eq!(collect(&events).1, FinishReason::Cancelled);
    assert_eq!(run(&engine, request(&prompt(30), 8)).0, expected);
    let stats = engine.stats();
    assert_eq!((stats.running, stats.queued, stats.cancelled, stats.failed), (0, 0, 4, 0));
}

/// Protects the queue: first in, first out, and bounded.
#[test]
fn requests_are_served_in_turn_and_the_queue_is_bounded() {
    let engine = engine("qwen3_5-base", 4000);
    let (order_tx, order) = std::sync::mpsc::channel();
    let (cancel, _events) = engine.submit_channel(request(&prompt(10), 3900)).unwrap();
    while engine.stats().running == 0 {
        std::thread::yield_now();
    }
    let mut taken = 0;
    let refused = loop {
        let tx = order_tx.clone();
        let index = taken;
        let sink = Box::new(move |event: Event| {
            if matches!(event, Event::Finished { .. }) {
                let _ = tx.send(index);
            }
        });
        match engine.submit(request(&prompt(3), 1), sink) {
            Ok(_) => taken += 1,
            Err(e) => break e,
        }
    };
    assert_eq!((taken, refused), (mach_engine::QUEUE_LIMIT, SubmitError::QueueFull(mach_engine::QUEUE_LIMIT)));
    cancel.cancel();
    let served: Vec<usize> = order.iter().take(taken).collect();
    assert!(served.is_sorted(), "{served:?}");
}

/// Protects seeds: draws depend on seed and position only, also when state is reused.
#[test]
fn seeds_repeat_across_reuse() {
    let engine = engine("qwen3_5-base", 400);
    let sample = |seed| Request { sampling: Sampling { seed, ..Sampling::default() }, ..request(&prompt(25), 20) };
    let first = run(&engine, sample(1)).0;
    assert_ne!(run(&engine, sample(2)).0, first);
    assert_eq!(run(&engine, sample(1)).0, first);
}
