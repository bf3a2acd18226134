//! One file per family.

pub mod qwen3_5_moe;
pub mod qwen3_moe;
