//! Building llama.cpp from the source package of llama-cpp-python, once per cache folder.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::run;

/// What the AMX paths of llama.cpp are compiled out with: on some models they crash.
const NO_AMX: &str = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16";

/// llama-bench with the processor's own instructions; a second one without AMX where the processor has it.
pub fn llama_cpp(cache: &Path) -> Result<Vec<PathBuf>> {
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let variants: &[(&str, &str)] = if cpu.contains("amx_int8") { &[("native", ""), ("no-amx", NO_AMX)] } else { &[("native", "")] };
    let dir = std::path::absolute(cache.join("llama.cpp"))?;
    variants.iter().map(|(name, flags)| build(&dir, name, flags)).collect()
}

fn build(dir: &Path, name: &str, flags: &str) -> Result<PathBuf> {
    let out = dir.join(name);
    let bench = out.join("bin/llama-bench");
    if bench.is_file() {
        return Ok(bench);
    }
    let tools = tools(dir)?;
    let source = source(dir, &tools)?;
    let cmake = || {
        let mut cmake = Command::new(tools.join("cmake"));
        // Ninja comes from the same place.
        let path = std::env::var_os("PATH").unwrap_or_default();
        let paths = std::iter::once(tools.clone()).chain(std::env::split_paths(&path));
        cmake.env("PATH", std::env::join_paths(paths).unwrap_or(path.clone()));
        cmake
    };
    let off = [
        "LLAMA_CURL",
        "LLAMA_OPENSSL",
        "LLAMA_BUILD_SERVER",
        "LLAMA_BUILD_TESTS",
        "LLAMA_BUILD_EXAMPLES",
        "LLAMA_BUILD_UI",
        "LLAMA_BUILD_APP",
        "BUILD_SHARED_LIBS",
    ];
    let mut configure = cmake();
    configure.args(["-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_BUILD_TOOLS=ON", "-S"]).arg(source).arg("-B").arg(&out);
    configure.args(off.map(|option| format!("-D{option}=OFF")));
    configure.args([format!("-DCMAKE_C_FLAGS={flags}"), format!("-DCMAKE_CXX_FLAGS={flags}")]);
    quiet(&mut configure)?;
    quiet(cmake().arg("--build").arg(&out).args(["--target", "llama-bench"]))?;
    Ok(bench)
}

/// A folder with pip, cmake and ninja.
fn tools(dir: &Path) -> Result<PathBuf> {
    let (venv, bin) = (dir.join("venv"), dir.join("venv/bin"));
    if !bin.join("cmake").is_file() || !bin.join("ninja").is_file() {
        fs::create_dir_all(dir)?;
        quiet(Command::new("python3").args(["-m", "venv"]).arg(&venv))?;
        quiet(Command::new(bin.join("pip")).args(["install", "--quiet", "cmake", "ninja"]))?;
    }
    Ok(bin)
}

/// The tree of llama.cpp in the newest llama-cpp-python.
fn source(dir: &Path, tools: &Path) -> Result<PathBuf> {
    let unpacked = dir.join("source");
    if let Some(tree) = vendored(&unpacked) {
        return Ok(tree);
    }
    fs::create_dir_all(&unpacked)?;
    // Only this package from source: its build tools would be compiled too otherwise.
    quiet(Command::new(tools.join("pip")).args(["download", "--no-deps", "--no-binary", "llama-cpp-python", "llama-cpp-python", "--dest"]).arg(&unpacked))?;
    let archive = entries(&unpacked).into_iter().find(|p| p.to_string_lossy().ends_with(".tar.gz")).context("pip downloaded no source package")?;
    quiet(Command::new("tar").arg("xzf").arg(&archive).arg("-C").arg(&unpacked))?;
    vendored(&unpacked).context("the source package has no vendor/llama.cpp")
}

fn vendored(dir: &Path) -> Option<PathBuf> {
    entries(dir).into_iter().map(|p| p.join("vendor/llama.cpp")).find(|p| p.join("CMakeLists.txt").is_file())
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path()).collect()
}

/// Runs with its output on our standard error: standard output is for results.
fn quiet(command: &mut Command) -> Result<()> {
    run(command.stdout(std::io::stderr()))
}
