//! `cargo xtask goldens`: tiny checkpoints and reference outputs, made by Python scripts.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::run;

/// Name of the goldens of number formats.
const FORMATS: &str = "formats";

#[derive(clap::Args)]
pub struct Args {
    /// Where they go.
    #[arg(long, default_value = "crates/mach-models/tests/goldens")]
    out: PathBuf,
    /// One shape, or `formats`, instead of all.
    #[arg(long)]
    only: Option<String>,
    /// Folder with the tokenizer and chat template of the template goldens.
    #[arg(long, default_value = "models/tiny")]
    tiny: PathBuf,
}

pub fn goldens(root: &Path, args: Args) -> Result<()> {
    if args.only.as_deref().is_none_or(|only| only == FORMATS) {
        let mut make = Command::new(python(root)?);
        run(make.current_dir(root).args(["xtask/goldens/make_formats.py", "--out", "crates/mach-format/tests/goldens"]))?;
    }
    if args.only.as_deref() == Some(FORMATS) {
        return Ok(());
    }
    let mut make = Command::new(python(root)?);
    make.current_dir(root).arg("xtask/goldens/make_goldens.py").arg("--out").arg(args.out);
    match args.only {
        Some(name) => make.arg("--only").arg(name),
        None => make.arg("--tiny").arg(args.tiny),
    };
    run(&mut make)
}

/// An interpreter with what the scripts need.
fn python(root: &Path) -> Result<PathBuf> {
    if let Some(python) = std::env::var_os("MACH_PYTHON") {
        return Ok(python.into());
    }
    let venv = root.join(".cache/venv");
    let (python, ready) = (venv.join("bin/python"), venv.join("requirements.installed"));
    let requirements = root.join("xtask/goldens/requirements.txt");
    let wanted = std::fs::read(&requirements).with_context(|| requirements.display().to_string())?;
    // The stamp is a copy of what was installed: an interrupted or older installation is repeated.
    if std::fs::read(&ready).ok().as_ref() != Some(&wanted) {
        run(Command::new("python3").args(["-m", "venv"]).arg(&venv))?;
        run(Command::new(&python).args(["-m", "pip", "install", "--quiet", "--requirement"]).arg(&requirements))?;
        std::fs::write(&ready, wanted)?;
    }
    Ok(python)
}
