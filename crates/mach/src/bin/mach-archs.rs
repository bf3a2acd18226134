//! `mach archs` under its own name.

fn main() -> std::process::ExitCode {
    mach::cli::main(Some("archs"))
}
