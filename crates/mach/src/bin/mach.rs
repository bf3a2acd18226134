//! The mach command.

fn main() -> std::process::ExitCode {
    mach::cli::main(None)
}
