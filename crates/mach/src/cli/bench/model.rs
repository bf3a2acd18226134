//! Which model a bench runs on.

use std::path::PathBuf;

use mach_format::BlockFormat;

use crate::Error;
use crate::synthetic::{self, Shape};

/// A model that is there, or one of random weights.
#[derive(clap::Args)]
pub(super) struct ModelArgs {
    /// Model directory, or org/name in the Hugging Face cache [default: the built-in demonstration model]
    #[arg(long)]
    model: Option<String>,
    /// Random weights in this shape, written on first use and kept
    #[arg(long, value_name = "SHAPE", conflicts_with = "model", value_parser = clap::builder::PossibleValuesParser::new(synthetic::SHAPES))]
    synthetic: Option<String>,
    /// Only the first N layers of the shape
    #[arg(long, value_name = "N", requires = "synthetic")]
    layers: Option<usize>,
    /// Bits per weight of the shape; experts that are published in MXFP4 (gpt-oss-20b, deepseek-v4-flash) keep it
    #[arg(long, value_name = "BITS", default_value = "4", value_parser = ["4", "8"], requires = "synthetic")]
    bits: String,
    /// A pack, or a GGUF file (what llama.cpp reads too; not for deepseek-v4-flash)
    #[arg(long, value_name = "FORMAT", default_value = "pack", value_parser = ["pack", "gguf"], requires = "synthetic")]
    format: String,
    /// Block type of the linears and experts of a GGUF file
    #[arg(long, value_name = "TYPE", default_value = "q4_K", ignore_case = true, value_parser = clap::builder::PossibleValuesParser::new(synthetic::QUANTS.map(BlockFormat::name)), requires = "synthetic")]
    quant: String,
    /// Where synthetic models are kept [default: mach in $XDG_CACHE_HOME or ~/.cache]
    #[arg(long, value_name = "DIR", env = "MACH_CACHE_DIR")]
    cache_dir: Option<PathBuf>,
}

impl ModelArgs {
    /// The model as [`crate::locate`] takes it; a synthetic one is written first where it is not there yet.
    pub(super) fn dir(&self) -> Result<Option<String>, Error> {
        match &self.synthetic {
            Some(name) => self.synthetic_dir(name).map(Some),
            None => Ok(self.model.clone()),
        }
    }

    fn synthetic_dir(&self, name: &str) -> Result<String, Error> {
        let mut shape = Shape::named(name).ok_or_else(|| Error::Usage(format!("there is no shape {name}")))?;
        if let Some(layers) = self.layers {
            shape = shape.cut(layers)?;
        }
        let cache = self.cache_dir.clone().unwrap_or_else(synthetic::default_cache);
        let bar = crate::cli::artifacts::bar();
        let progress = &mut |done, all| {
            bar.set_length(all);
            bar.set_position(done);
        };
        let dir = match self.format.as_str() {
            "gguf" => {
                let quant = synthetic::QUANTS.into_iter().find(|q| q.name().eq_ignore_ascii_case(&self.quant));
                synthetic::gguf(&shape, quant.unwrap_or(BlockFormat::Q4K), &cache, progress)
            }
            _ => synthetic::pack(&shape, if self.bits == "8" { 8 } else { 4 }, &cache, progress),
        };
        bar.finish_and_clear();
        Ok(dir?.to_string_lossy().into_owned())
    }
}
