//! `mach archs`: the registry, printed.

use mach_models::REGISTRY;
use serde_json::Value;

use super::output;
use crate::Error;

#[derive(clap::Args)]
pub(super) struct Args {
    /// Print one JSON array
    #[arg(long)]
    pub json: bool,
}

pub(super) fn run(args: &Args) -> Result<(), Error> {
    if args.json {
        output::json_line(&Value::Array(REGISTRY.iter().map(|a| a.to_json()).collect()));
        return Ok(());
    }
    let yes = |b: bool| if b { "yes" } else { "no" };
    let width = REGISTRY.iter().map(|a| a.activation.len()).max().unwrap_or(0);
    output::line(&format!("{:<14} {:<36} {:<width$} {:<8} {:<8} {:<6} layouts", "model_type", "reference", "activation", "stacked", "wrapped", "quant"));
    for a in REGISTRY {
        let quant = format!("{}/{}", a.bits, a.group_size);
        output::line(&format!(
            "{:<14} {:<36} {:<width$} {:<8} {:<8} {quant:<6} {}",
            a.model_type,
            a.reference,
            a.activation,
            yes(a.stacked),
            yes(a.wrapped),
            a.layouts.join(", ")
        ));
    }
    Ok(())
}
