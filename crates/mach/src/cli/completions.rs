//! `mach completions`: shell completions.

use clap_complete::Shell;

use super::output;
use crate::Error;

#[derive(clap::Args)]
pub(super) struct Args {
    /// bash, zsh, fish, elvish or powershell
    shell: Shell,
}

pub(super) fn run(args: &Args) -> Result<(), Error> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut super::command(), "mach", &mut script);
    output::print(&String::from_utf8_lossy(&script));
    Ok(())
}
