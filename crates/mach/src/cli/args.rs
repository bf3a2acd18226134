//! Flags that several commands share, and their values.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use clap::{Args, ValueEnum};
use mach_backend::KvType;
use mach_cpu::ActivationBits;
use mach_experts::trace::Recorder;
use mach_models::plan::BankSize;
use mach_session::TextModel;
use serde_json::{Map, Value};

use super::output;
use crate::load::{load_with, prepare_at};
use crate::{BackendKind, Error, LoadOptions, Loaded, Prepared, locate, system};

/// Parses `500`, `1.5GiB`, `2GB`, `4G`: K, M and G are binary, KB, MB and GB decimal.
pub(super) fn parse_size(text: &str) -> Result<u64, String> {
    let at = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, unit) = text.split_at(at);
    let number: f64 = number.parse().map_err(|_| format!("`{text}` is not a size such as 6GiB, 500MB or 4G"))?;
    let factor = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kib" => 1024.0,
        "m" | "mib" => 1024f64.powi(2),
        "g" | "gib" => 1024f64.powi(3),
        "t" | "tib" => 1024f64.powi(4),
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "tb" => 1e12,
        _ => return Err(format!("`{unit}` is not a unit: use KiB, MiB, GiB, KB, MB, GB, K, M or G")),
    };
    Ok((number * factor) as u64)
}

fn parse_bank(text: &str) -> Result<BankSize, String> {
    match text.strip_suffix('%') {
        Some(percent) => match percent.trim().parse::<f64>() {
            Ok(p) if p > 0.0 && p <= 100.0 => Ok(BankSize::Share(p / 100.0)),
            _ => Err(format!("`{text}` is not a percentage of all routed experts, above 0 % and at most 100 %")),
        },
        None => parse_size(text).map(BankSize::Bytes),
    }
}

pub(super) fn positive(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|&n| n > 0).ok_or_else(|| format!("`{text}` is not a number of at least 1"))
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum Kv {
    F16,
    F32,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub(super) enum Backend {
    #[default]
    Cpu,
    Reference,
}

/// The engine's flags.
#[derive(Args, Clone, Debug, Default)]
pub(super) struct EngineArgs {
    /// Context in tokens [default: the largest that the budget allows, at most 32768 and the model's limit]
    #[arg(long, value_name = "N", value_parser = positive, env = "MACH_CTX_SIZE", help_heading = "Engine")]
    pub ctx_size: Option<usize>,
    /// Element type of keys and values [default: f16 for quantised checkpoints, f32 for others]
    #[arg(long, value_enum, env = "MACH_KV_CACHE", help_heading = "Engine")]
    pub kv_cache: Option<Kv>,
    /// Memory for routed experts: a size, or a share of all of them such as 25%
    #[arg(long, value_name = "SIZE|PERCENT", value_parser = parse_bank, env = "MACH_BANK", help_heading = "Engine")]
    pub bank: Option<BankSize>,
    /// Memory for everything: weights, experts, keys and values, scratch [default: most of what is free]
    #[arg(long, value_name = "SIZE", value_parser = parse_size, env = "MACH_MEMORY_BUDGET", help_heading = "Engine")]
    pub memory_budget: Option<u64>,
    /// Compute threads [default: all processors]
    #[arg(long, value_name = "N", value_parser = positive, env = "MACH_THREADS", help_heading = "Engine")]
    pub threads: Option<usize>,
    /// Prompt tokens computed at once (results do not depend on it)
    #[arg(long, value_name = "N", value_parser = positive, env = "MACH_PREFILL_CHUNK", help_heading = "Engine")]
    pub prefill_chunk: Option<usize>,
    /// Bits that activations are rounded to where they meet quantised weights: 8 takes half the time of a prefill, and changes some 4 % of expert choices
    #[arg(long, value_name = "BITS", default_value = "16", value_parser = ["8", "16"], env = "MACH_ACTIVATION_BITS", help_heading = "Engine")]
    pub activation_bits: String,
    /// What computes: fast kernels, or the plain f32 oracle
    #[arg(long, value_enum, default_value_t, env = "MACH_BACKEND", help_heading = "Engine")]
    pub backend: Backend,
    /// Read routed experts from disk as they are needed
    #[arg(long, conflicts_with = "no_streaming", help_heading = "Engine")]
    pub streaming: bool,
    /// Keep every expert in memory; an error when they do not fit
    #[arg(long, help_heading = "Engine")]
    pub no_streaming: bool,
    /// Expert sidecar elsewhere than beside the checkpoint
    #[arg(long, value_name = "DIR", env = "MACH_SIDECAR", help_heading = "Engine")]
    pub sidecar: Option<PathBuf>,
}

impl EngineArgs {
    pub(super) fn options(&self) -> LoadOptions {
        LoadOptions {
            streaming: match (self.streaming, self.no_streaming) {
                (true, _) => Some(true),
                (_, true) => Some(false),
                _ => None,
            },
            bank: self.bank,
            memory_budget: self.memory_budget,
            context: self.ctx_size,
            kv: self.kv_cache.map(|kv| match kv {
                Kv::F16 => KvType::F16,
                Kv::F32 => KvType::F32,
            }),
            threads: self.threads,
            prefill_chunk: self.prefill_chunk,
            activation_bits: if self.activation_bits == "8" { ActivationBits::Eight } else { ActivationBits::Sixteen },
            backend: match self.backend {
                Backend::Cpu => BackendKind::Cpu,
                Backend::Reference => BackendKind::Reference,
            },
            sidecar: self.sidecar.clone(),
            trace: None,
        }
    }

    /// Finds and plans a model, saying on stderr what should be known.
    pub(super) fn prepare(&self, model: Option<&str>) -> Result<Prepared, Error> {
        Self::prepare_with(model, &self.options())
    }

    /// [`EngineArgs::prepare`] with options that these flags do not set.
    pub(super) fn prepare_with(model: Option<&str>, options: &LoadOptions) -> Result<Prepared, Error> {
        let prepared = prepare_at(locate(model)?, options, system::available_memory())?;
        prepared.plan.warnings.iter().for_each(|w| eprintln!("warning: {w}"));
        if let Some(advice) = prepared.sidecar_advice() {
            eprintln!("note: {advice}");
        }
        Ok(prepared)
    }

    /// Loads a model with progress, and prints the signal line and the expected speed.
    pub(super) fn load(&self, model: Option<&str>) -> Result<Loaded, Error> {
        self.load_traced(model, None)
    }

    /// [`EngineArgs::load`] with a trace of the experts in use.
    pub(super) fn load_traced(&self, model: Option<&str>, trace: Option<&Recorder>) -> Result<Loaded, Error> {
        let prepared = Self::prepare_with(model, &LoadOptions { trace: trace.cloned(), ..self.options() })?;
        let mut bar = LoadBar::new();
        let loaded = load_with(&prepared, &mut |what, done, all| bar.show(what, done, all))?;
        bar.0.end(None);
        eprintln!("{}", signal_line(&loaded.engine.info().signals));
        let e = &loaded.estimate;
        let disk = e.disk_gb_s.map(|d| format!(", disk {d:.2} GB/s")).unwrap_or_default();
        eprintln!("loaded in {}; expect up to {:.1} tok/s in decode (memory {:.1} GB/s{disk})", output::seconds(loaded.load_ms / 1e3), e.tok_s, e.memory_gb_s);
        Ok(loaded)
    }
}

/// How much the model thinks before it answers.
#[derive(Args, Clone, Debug, Default)]
pub(super) struct ThinkArgs {
    /// Let the model think before it answers; Gemma 4 and DeepSeek-V4 do so only when asked [default: as the chat template has it]
    #[arg(long, conflicts_with = "no_think")]
    think: bool,
    /// Have the model answer at once; Qwen's reasoning models think unless told not to
    #[arg(long, conflicts_with = "reasoning_effort")]
    no_think: bool,
    /// How hard to think, where the chat template has degrees: low, medium and high for gpt-oss, max for DeepSeek-V4
    #[arg(long, value_name = "LEVEL", value_parser = ["low", "medium", "high", "max"])]
    reasoning_effort: Option<String>,
}

impl ThinkArgs {
    /// The template variables that ask for it; an error where the template cannot do it.
    pub(super) fn variables(&self, text: &TextModel) -> Result<Map<String, Value>, Error> {
        let on = (self.think || self.no_think).then_some(self.think);
        if on.is_none() && self.reasoning_effort.is_none() {
            return Ok(Map::new());
        }
        Ok(text.template()?.thinking(on, self.reasoning_effort.as_deref())?)
    }
}

/// Recording which experts a run uses.
#[derive(Args, Clone, Debug, Default)]
pub(super) struct TraceArgs {
    /// Write which experts every step uses, for `mach bench replay`
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
}

impl TraceArgs {
    /// Creates the file.
    pub(super) fn start(&self) -> Result<Option<Recorder>, Error> {
        Ok(self.trace.as_deref().map(Recorder::create).transpose()?)
    }
}

/// The signals as one line.
pub(super) fn signal_line(signals: &[(String, String)]) -> String {
    signals.iter().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>().join(" ")
}

/// Progress of loading.
pub(super) struct LoadBar(pub(super) output::ProgressLine);

impl LoadBar {
    pub(super) fn new() -> Self {
        Self(output::ProgressLine::new())
    }

    pub(super) fn show(&mut self, what: &str, done: usize, all: usize) {
        self.0.show(|| format!("loading {what}: {done} of {all}"));
    }
}

/// Sampling flags.
#[derive(Args, Clone, Debug, Default)]
pub(super) struct SamplingArgs {
    /// 0 always takes the most likely token [default: the checkpoint's generation_config, else 1]
    #[arg(long, value_name = "T", value_parser = non_negative, help_heading = "Sampling")]
    pub temperature: Option<f32>,
    /// Keep the K most likely tokens (0: all)
    #[arg(long, value_name = "K", help_heading = "Sampling")]
    pub top_k: Option<usize>,
    /// Keep the smallest set of this probability
    #[arg(long, value_name = "P", value_parser = unit, help_heading = "Sampling")]
    pub top_p: Option<f32>,
    /// Keep tokens of at least this share of the best one's probability
    #[arg(long, value_name = "P", value_parser = unit, help_heading = "Sampling")]
    pub min_p: Option<f32>,
    /// Divide the logits of tokens that occurred
    #[arg(long, value_name = "R", value_parser = above_zero, help_heading = "Sampling")]
    pub repetition_penalty: Option<f32>,
    /// The same seed gives the same text [default: random]
    #[arg(long, value_name = "N", help_heading = "Sampling")]
    pub seed: Option<u64>,
}

impl SamplingArgs {
    pub(super) fn overrides(&self) -> mach_session::SamplingOverrides {
        mach_session::SamplingOverrides {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            seed: self.seed,
            ..Default::default()
        }
    }
}

fn number(text: &str, valid: impl Fn(f32) -> bool, what: &str) -> Result<f32, String> {
    text.parse().ok().filter(|&x| valid(x)).ok_or_else(|| format!("`{text}` is not {what}"))
}

fn non_negative(text: &str) -> Result<f32, String> {
    number(text, |x| x >= 0.0 && x.is_finite(), "a number of at least 0")
}

fn above_zero(text: &str) -> Result<f32, String> {
    number(text, |x| x > 0.0 && x.is_finite(), "a number above 0")
}

fn unit(text: &str) -> Result<f32, String> {
    number(text, |x| (0.0..=1.0).contains(&x), "a number from 0 to 1")
}

/// Counts interrupts: the first asks for an orderly end, the second ends at once.
pub(super) fn on_interrupt(action: impl Fn() + Send + 'static) -> Result<(), Error> {
    static SEEN: AtomicUsize = AtomicUsize::new(0);
    let handler = move || {
        if SEEN.fetch_add(1, Ordering::Relaxed) > 0 {
            std::process::exit(130);
        }
        action();
    };
    ctrlc::set_handler(handler).map_err(|e| Error::Input { code: "signals", message: format!("cannot catch Ctrl-C: {e}") })
}

/// Reads a JSON file.
pub(super) fn read_json(path: &std::path::Path) -> Result<serde_json::Value, Error> {
    let bytes = std::fs::read(path).map_err(Error::io(format!("read {}", path.display())))?;
    serde_json::from_slice(&bytes).map_err(|e| Error::Input { code: "invalid-json", message: format!("{} is not valid JSON: {e}", path.display()) })
}

/// Reads a JSON array of token ids.
pub(super) fn read_tokens(path: &std::path::Path) -> Result<Vec<u32>, Error> {
    let value = read_json(path)?;
    let ids = value.as_array().and_then(|a| a.iter().map(|v| v.as_u64().and_then(|n| u32::try_from(n).ok())).collect::<Option<Vec<u32>>>());
    ids.ok_or_else(|| Error::Input { code: "invalid-tokens", message: format!("{} is not a JSON array of token ids", path.display()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Protects the meaning of sizes that scripts rely on.
    #[test]
    fn sizes() {
        let ok = |s: &str| parse_size(s).unwrap();
        assert_eq!([ok("10"), ok("1KiB"), ok("1K"), ok("1KB"), ok("1.5G"), ok("2GB")], [10, 1024, 1024, 1000, 3 << 29, 2_000_000_000]);
        assert!(parse_size("10 bananas").is_err() && parse_size("GiB").is_err() && parse_size("-1").is_err());
    }

    /// Protects the two forms of --bank.
    #[test]
    fn banks() {
        assert_eq!(parse_bank("25%"), Ok(BankSize::Share(0.25)));
        assert_eq!(parse_bank("1MiB"), Ok(BankSize::Bytes(1 << 20)));
        assert!(parse_bank("0%").is_err() && parse_bank("101%").is_err());
    }
}
