//! One file per family.

pub mod deepseek_v4;
pub mod qwen3_5_moe;
pub mod qwen3_moe;
