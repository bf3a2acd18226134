//! `mach models`: checkpoints on this machine.

use std::path::PathBuf;

use serde_json::{Value, json};

use super::output;
use crate::{Error, ModelPath, installed};

#[derive(clap::Args)]
pub(super) struct Args {
    /// Look here too: folders with a config.json, one or two levels deep
    #[arg(long, value_name = "DIR", env = "MACH_MODELS_DIR")]
    models_dir: Option<PathBuf>,
    /// Print one JSON array
    #[arg(long)]
    pub json: bool,
}

pub(super) fn run(args: &Args) -> Result<(), Error> {
    if let Some(dir) = args.models_dir.as_ref().filter(|d| !d.is_dir()) {
        return Err(Error::NoSuchPath { path: dir.display().to_string() });
    }
    let found: Vec<Value> = installed(args.models_dir.as_deref()).iter().map(describe).collect();
    if args.json {
        output::json_line(&Value::Array(found));
        return Ok(());
    }
    if found.is_empty() {
        eprintln!("no checkpoints found in {}; get one with: hf download ORG/NAME", crate::hub_cache().display());
    }
    for m in &found {
        let text = |key: &str| m[key].as_str().unwrap_or("-").to_owned();
        let runs = if m["supported"] == true { "runs" } else { "not supported" };
        output::line(&format!(
            "{:<48} {:<14} {:>10}  {:<13} {}",
            text("name"),
            text("model_type"),
            output::size(m["bytes"].as_u64().unwrap_or(0)),
            runs,
            text("path")
        ));
    }
    Ok(())
}

fn describe(model: &ModelPath) -> Value {
    let config: Option<Value> = std::fs::read(model.dir.join("config.json")).ok().and_then(|b| serde_json::from_slice(&b).ok());
    let arch = config.as_ref().and_then(|c| mach_models::detect_arch(c).ok());
    let model_type = config.as_ref().and_then(|c| c.get("model_type")).cloned().unwrap_or(Value::Null);
    json!({
        "name": model.name,
        "path": model.dir,
        "model_type": model_type,
        "supported": arch.is_some(),
        "bytes": weight_bytes(&model.dir),
        "sidecar": model.dir.join(mach_format::SIDECAR_DIR).join("manifest.json").exists(),
    })
}

/// Bytes of weight files, links followed.
fn weight_bytes(dir: &std::path::Path) -> u64 {
    let sum = |dir: &std::path::Path, ending: &str| -> u64 {
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
        let files = entries.filter(|e| e.file_name().to_string_lossy().ends_with(ending));
        files.filter_map(|e| std::fs::metadata(e.path()).ok()).map(|m| m.len()).sum()
    };
    sum(dir, ".safetensors") + sum(&dir.join(mach_format::SIDECAR_DIR), ".experts")
}
