//! The memory plan at published sizes: what windowed layers keep, and that it goes to the bank.

use mach_backend::KvType;
use mach_models::plan::{KvPool, Sizes, UNDO_TOKENS};
use mach_models::{MemoryPlan, PlanOptions, ResidencyChoice, spec_of};
use serde_json::{Value, json};

const GIB: u64 = 1 << 30;
const CONTEXT: usize = 131_072;

/// 24 layers, every other one with a window of 128.
fn gpt_oss_20b() -> Value {
    json!({"model_type": "gpt_oss", "hidden_size": 2880, "num_hidden_layers": 24, "vocab_size": 201_088, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128, "num_local_experts": 32, "num_experts_per_tok": 4, "intermediate_size": 2880,
        "tie_word_embeddings": false, "max_position_embeddings": 131_072})
}

/// 30 layers, 25 of them with a window of 1024.
fn gemma_4_26b_a4b() -> Value {
    json!({"model_type": "gemma4_text", "hidden_size": 2816, "num_hidden_layers": 30, "vocab_size": 262_144, "num_attention_heads": 16,
        "num_key_value_heads": 8, "num_global_key_value_heads": 2, "head_dim": 256, "global_head_dim": 512, "attention_k_eq_v": true,
        "sliding_window": 1024, "enable_moe_block": true, "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704,
        "intermediate_size": 2112, "hidden_size_per_layer_input": 0, "max_position_embeddings": 262_144})
}

fn plan(config: &Value, budget: u64, context: Option<usize>) -> MemoryPlan {
    let (_, spec) = spec_of(config).unwrap();
    let options = PlanOptions {
        budget: Some(budget),
        bank: None,
        residency: ResidencyChoice::Streaming,
        context,
        kv: Some(KvType::F16),
        chunk: None,
        tokenizer_bytes: 0,
        available: budget,
    };
    MemoryPlan::new(&Sizes { spec: &spec, resident_bytes: GIB, slot_bytes: 13 << 20, quantised: true }, &options).unwrap()
}

/// Protects the promise that layers with a window keep their window: at a context of 131072 tokens the plan counts a full context
/// for the other layers alone, and for these the running sequence with its longest pass, and a few windows of others and snapshots.
#[test]
fn windows_are_counted_as_windows() {
    let before = |block_bytes: u64| CONTEXT as u64 / 32 * block_bytes;
    for (config, window, [full_block, windowed_block], ceiling) in [
        (gpt_oss_20b(), 128, [12 * (64 << 10), 12 * (64 << 10)], 3 * GIB + GIB / 12),
        (gemma_4_26b_a4b(), 1024, [5 * (128 << 10), 25 * (256 << 10)], 4 * GIB + GIB / 4),
    ] {
        let p = plan(&config, 16 * GIB, Some(CONTEXT));
        let full = KvPool { window: None, block_bytes: full_block, blocks: CONTEXT / 32 };
        let windowed = *p.kv_pools.iter().find(|p| p.window.is_some()).unwrap();
        assert_eq!((windowed.window, windowed.block_bytes), (Some(window), windowed_block));
        assert!(p.kv_pools.contains(&full) && p.kv_pools.len() == 2, "{:?}", p.kv_pools);
        assert_eq!(p.kv, before(full_block) + windowed.blocks as u64 * windowed_block);
        // One pass of the running sequence fits, before anything of its window goes.
        assert!(windowed.blocks * 32 > window + UNDO_TOKENS + p.chunks.moe);
        assert!(p.kv < ceiling && ceiling < before(full_block + windowed_block), "{} of {}", p.kv, before(full_block + windowed_block));
        // A short context is never counted with more than all of it.
        assert!(plan(&config, 16 * GIB, Some(256)).kv_pools.iter().all(|p| p.blocks == 8));
        // Whatever the budget, passes and spare windows take at most their share of it.
        for budget in [4, 6, 8, 12] {
            let p = plan(&config, budget * GIB, None);
            let windowed = p.kv_pools.iter().find(|p| p.window.is_some()).unwrap();
            let least = (window + UNDO_TOKENS).div_ceil(32) as u64 + 2;
            assert!(windowed.blocks as u64 * windowed_block <= budget * GIB / 4 + least * windowed_block, "{budget} GiB: {windowed:?}");
            assert!(p.kv <= p.budget && p.context > 0);
        }
    }
}

/// Protects figures made of the plan: a row of a windowed layer reads its window, not the context.
#[test]
fn a_row_reads_what_it_sees() {
    let p = plan(&gpt_oss_20b(), 16 * GIB, Some(CONTEXT));
    assert_eq!(p.kv_read(100.0), 100.0 * f64::from(48 << 10));
    assert_eq!(p.kv_read(10_000.0), (10_000.0 + 128.0) * f64::from(24 << 10));
    assert_eq!(p.kv_bytes(1), 2 * 12 * (64 << 10));
    assert_eq!(p.kv_bytes(CONTEXT), p.kv);
}
