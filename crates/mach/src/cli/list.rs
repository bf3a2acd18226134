//! `mach models`: checkpoints on this machine.

use std::path::PathBuf;

use mach_format::Checkpoint;
use serde_json::{Value, json};

use super::output;
use crate::{Error, ModelPath, installed};

#[derive(clap::Args)]
pub(super) struct Args {
    /// Look here too: folders with a config.json and GGUF files, one or two levels deep
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
        eprintln!("no checkpoints found in {}; get one with: mach pull ORG/NAME", crate::hub_cache().display());
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
    let gguf = mach_models::gguf_file(&model.dir).and_then(|file| mach_models::open_checkpoint(&file).ok());
    let config: Option<Value> = match &gguf {
        Some(ck) => Some(ck.config().clone()),
        None => std::fs::read(model.dir.join("config.json")).ok().and_then(|b| serde_json::from_slice(&b).ok()),
    };
    let arch = config.as_ref().and_then(|c| mach_models::detect_arch(c).ok());
    let model_type = config.as_ref().and_then(|c| c.get("model_type")).cloned().unwrap_or(Value::Null);
    let sidecar = gguf.as_ref().map_or_else(|| model.dir.join(mach_format::SIDECAR_DIR), Checkpoint::sidecar_dir);
    let gguf_bytes = || gguf.as_ref().map_or(0, |ck| ck.weight_files().filter_map(|f| std::fs::metadata(f).ok()).map(|m| m.len()).sum::<u64>());
    json!({
        "name": model.name,
        "path": model.dir,
        "model_type": model_type,
        "supported": arch.is_some(),
        "bytes": gguf_bytes() + bytes_of(&model.dir, ".safetensors") + bytes_of(&sidecar, ".experts"),
        "sidecar": sidecar.join("manifest.json").exists(),
    })
}

/// Bytes of the files of a folder with this ending, links followed.
fn bytes_of(dir: &std::path::Path, ending: &str) -> u64 {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let files = entries.filter(|e| e.file_name().to_string_lossy().ends_with(ending));
    files.filter_map(|e| std::fs::metadata(e.path()).ok()).map(|m| m.len()).sum()
}
