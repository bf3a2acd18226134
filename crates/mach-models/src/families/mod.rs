//! One file per family.

pub mod deepseek_v4;
pub mod gemma4;
pub mod gpt_oss;
pub mod qwen3_5_moe;
pub mod qwen3_moe;
