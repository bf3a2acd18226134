//! `mach check`: whether and how a model would run here. Reads headers only.

use mach_backend::KV_BLOCK;
use mach_experts::Residency;
use mach_models::plan::{Verdict, default_budget};
use mach_models::{MemoryPlan, ModelError};
use serde_json::{Value, json};

use super::args::EngineArgs;
use super::output::{self, size};
use crate::load::Found;
use crate::{Error, Prepared, locate, system};

#[derive(clap::Args)]
pub(super) struct Args {
    /// Model directory, or org/name in the Hugging Face cache [default: the built-in demonstration model]
    #[arg(env = "MACH_MODEL")]
    model: Option<String>,
    #[command(flatten)]
    engine: EngineArgs,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Context that is assumed where none is given.
const CONTEXT: usize = 8192;

pub(super) fn run(args: &Args) -> Result<(), Error> {
    let path = locate(args.model.as_deref())?;
    let available = system::available_memory();
    let mut options = args.engine.options();
    let found = Found::open(path.clone(), options.sidecar.as_deref())?;
    let limit = found.files.spec().max_positions;
    options.context = Some(options.context.unwrap_or(CONTEXT.min(limit)));
    // A way of running: what it is asked for, and what comes of it.
    let attempt = |streaming: Option<bool>| {
        let mut options = options.clone();
        options.streaming = streaming;
        if streaming == Some(false) {
            options.bank = None;
        }
        found.plan(&options, available)
    };
    let asked = options.streaming;
    let chosen = match attempt(asked) {
        Err(e) if !matches!(e, Error::Model(ModelError::Budget { .. })) => return Err(e),
        other => other,
    };
    let ways: Vec<(&str, Result<Prepared, Error>)> =
        [("resident", Some(false)), ("streaming", Some(true))].map(|(name, streaming)| (name, attempt(streaming))).into();
    let verdict = chosen.as_ref().map_or(Verdict::WontFit, |p| p.plan.verdict());
    let paths: Vec<Value> = ways.iter().map(|(name, way)| describe_way(name, way)).collect();
    let sidecar_dir = options.sidecar.clone().unwrap_or_else(|| path.dir.join(mach_format::SIDECAR_DIR));
    let any = chosen.as_ref().ok().or_else(|| ways.iter().find_map(|w| w.1.as_ref().ok()));
    let valid = any.and_then(|p| p.source.as_deref()).map(|s| s.kind() == "sidecar");
    let artifacts = json!({
        "sidecar": {"path": sidecar_dir, "present": sidecar_dir.join("manifest.json").exists(), "valid": valid},
        "advice": any.and_then(Prepared::sidecar_advice),
    });
    let budget = options.memory_budget.unwrap_or_else(|| default_budget(available));
    let memory = match &chosen {
        Ok(p) => memory_json(&p.plan),
        Err(e) => json!({"budget": budget, "problem": e.to_string()}),
    };
    let unused = any.map_or(0, |p| p.files.unused().len());
    if args.json {
        output::json_line(&json!({
            "verdict": verdict.name(), "model": path.name, "path": path.dir, "arch": any.map(|p| p.files.arch().model_type),
            "parameters": any.map(|p| p.files.parameters()), "paths": paths, "artifacts": artifacts, "available": available, "memory": memory,
            "unused_tensors": unused,
        }));
        return Ok(());
    }
    output::line(&format!("{}: {}", path.name, verdict.name()));
    match &chosen {
        Ok(p) => print_plan(&p.plan, available),
        Err(e) => output::line(&format!("  {e}")),
    }
    output::line("ways to run");
    for way in &paths {
        let detail = way["reason"].as_str().map(str::to_owned).unwrap_or_else(|| format!("{} of {} experts in memory", way["slots"], way["experts"]));
        output::line(&format!("  {:<16} {:<8} {detail}", way["name"].as_str().unwrap_or_default(), way["verdict"].as_str().unwrap_or_default()));
    }
    let state = match (sidecar_dir.join("manifest.json").exists(), valid) {
        (true, Some(true)) => "valid",
        (true, _) => "present",
        _ => "missing",
    };
    output::line(&format!("expert sidecar     {state} ({})", sidecar_dir.display()));
    if let Some(advice) = any.and_then(Prepared::sidecar_advice) {
        output::line(&advice);
    }
    if unused > 0 {
        output::line(&format!("{unused} tensors are recognised and not used (vision, multi-token prediction)"));
    }
    Ok(())
}

fn describe_way(name: &str, way: &Result<Prepared, Error>) -> Value {
    match way {
        Ok(p) => {
            json!({"name": p.mode(), "runnable": true, "verdict": p.plan.verdict().name(), "slots": p.plan.slots, "experts": p.plan.experts, "budget": p.plan.budget})
        }
        Err(e) => json!({"name": name, "runnable": false, "verdict": Verdict::WontFit.name(), "reason": e.to_string()}),
    }
}

fn memory_json(p: &MemoryPlan) -> Value {
    let pools: Vec<Value> = p.kv_pools.iter().map(|p| json!({"window": p.window, "block_bytes": p.block_bytes, "blocks": p.blocks})).collect();
    json!({
        "budget": p.budget, "budget_source": p.budget_source, "base": p.base, "tokenizer": p.tokenizer, "resident": p.resident, "scratch": p.scratch,
        "states": p.states, "kv": p.kv, "kv_pools": pools, "kv_free_before_bank_shrinks": p.kv_free, "context": p.context, "bank": p.slots as u64 * p.slot_bytes, "slots": p.slots,
        "slot_bytes": p.slot_bytes, "experts": p.experts, "experts_bytes": p.experts as u64 * p.slot_bytes, "floor_slots": p.floor_slots,
        "working_set_slots": p.working_set, "residency": if p.residency == Residency::Resident { "resident" } else { "streaming" }, "warnings": p.warnings,
    })
}

fn print_plan(p: &MemoryPlan, available: u64) {
    let row = |name: &str, bytes: u64, note: &str| output::line(&format!("  {name:<22} {:>10}  {note}", size(bytes)));
    row("available", available, "");
    row("budget", p.budget, &format!("from {}", p.budget_source));
    row("always-active weights", p.resident, "");
    row("scratch", p.scratch, &format!("{} rows at once", p.chunks.moe));
    row("recurrent states", p.states, "");
    row("tokenizer, program", p.tokenizer + p.base, "");
    let windows = p.kv_pools.iter().filter_map(|pool| Some(format!(", in layers with a window of {} at most {}", pool.window?, pool.blocks * KV_BLOCK)));
    row("keys and values", p.kv, &format!("{} tokens{}; the bank gives up slots as they grow", p.context, windows.collect::<String>()));
    let note = match p.residency {
        Residency::Resident => format!("all {} experts of {}", p.experts, size(p.slot_bytes)),
        Residency::Streaming => {
            format!("{} of {} experts of {}; one token uses {}, the floor is {}", p.slots, p.experts, size(p.slot_bytes), p.working_set, p.floor_slots)
        }
    };
    row("expert bank", p.slots as u64 * p.slot_bytes, &note);
    p.warnings.iter().for_each(|w| output::line(&format!("  warning: {w}")));
}
