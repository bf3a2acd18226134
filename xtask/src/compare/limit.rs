//! Limits that both programs run under: memory, and how far the system reads ahead.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};

/// `8GiB`, `1300MiB`, or bytes.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let at = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(at);
    let unit: f64 = match unit.trim() {
        "" | "B" => 1.0,
        "KiB" => 1024.0,
        "MiB" | "M" => 1048576.0,
        "GiB" | "G" => 1073741824.0,
        "MB" => 1e6,
        "GB" => 1e9,
        other => return Err(format!("unknown unit {other}: write 8GiB or 1300MiB")),
    };
    number.parse().map(|n: f64| (n * unit) as u64).map_err(|_| format!("{text} is no size: write 8GiB or 1300MiB"))
}

/// Memory that a program and the page cache that it fills may take.
pub enum MemoryLimit {
    /// A group of our own.
    Cgroup(PathBuf),
    /// A process that holds on to the rest of the memory.
    Locked(Child),
}

/// Allocates and locks as many bytes as it is told, says so, and waits until its input ends.
const LOCKER: &str = "import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
if libc.mlockall(3): sys.exit('mlockall: error %d' % ctypes.get_errno())
held = bytearray(int(sys.argv[1]))
print('locked', flush=True)
sys.stdin.read()";

impl MemoryLimit {
    pub fn new(bytes: u64) -> Result<Self> {
        let name = format!("mach-compare-{}", std::process::id());
        for (base, file) in [("/sys/fs/cgroup", "memory.max"), ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")] {
            let group = Path::new(base).join(&name);
            if !Path::new(base).is_dir() || fs::create_dir(&group).is_err() {
                continue;
            }
            // A folder that the kernel has not filled is one of an ordinary file system: nothing would be limited.
            let filled = group.join("cgroup.procs").is_file() && group.join(file).is_file();
            if filled && fs::write(group.join(file), bytes.to_string()).is_ok() {
                // Swapping would be another way around the limit; not every kernel counts it.
                let _ = fs::write(group.join("memory.swap.max"), "0");
                return Ok(Self::Cgroup(group));
            }
            let _ = fs::remove_dir(&group);
        }
        let info = fs::read_to_string("/proc/meminfo").context("no cgroup can be made, and there is no /proc/meminfo")?;
        let free = available(&info).context("/proc/meminfo names no MemAvailable")?;
        let Some(rest) = free.checked_sub(bytes) else { bail!("{free} bytes of memory are available, {bytes} were asked for") };
        let mut locker = Command::new("python3").args(["-c", LOCKER, &rest.to_string()]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let mut said = String::new();
        BufReader::new(locker.stdout.take().context("no pipe")?).read_line(&mut said)?;
        if said.trim() != "locked" {
            bail!("no cgroup can be made, and memory cannot be locked: run as root, or raise `ulimit -l`");
        }
        Ok(Self::Locked(locker))
    }

    /// `cgroup`, `locked memory`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Cgroup(_) => "cgroup",
            Self::Locked(_) => "locked memory",
        }
    }

    /// A command that starts `program` under the limit; arguments can be added.
    pub fn command(&self, program: &Path) -> Command {
        match self {
            Self::Cgroup(group) => {
                let mut shell = Command::new("sh");
                shell.args(["-c", "echo $$ > \"$0\" && exec \"$@\""]).arg(group.join("cgroup.procs")).arg(program);
                shell
            }
            Self::Locked(_) => Command::new(program),
        }
    }
}

impl Drop for MemoryLimit {
    fn drop(&mut self) {
        match self {
            // What is left if this fails is an empty group.
            Self::Cgroup(group) => drop(fs::remove_dir(group)),
            Self::Locked(child) => {
                drop(child.stdin.take());
                let _ = child.wait();
            }
        }
    }
}

fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find(|l| l.starts_with("MemAvailable:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
}

/// Takes a file out of the page cache: what is there already is charged to nobody's limit.
#[cfg(target_os = "linux")]
pub fn forget(path: &Path) -> Result<()> {
    let file = fs::File::open(path).with_context(|| path.display().to_string())?;
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).with_context(|| format!("cannot take {} out of the page cache", path.display()))
}

/// There is no way to do it elsewhere.
#[cfg(not(target_os = "linux"))]
pub fn forget(_: &Path) -> Result<()> {
    bail!("memory can be limited on Linux only")
}

/// Read-ahead of all drives; put back when dropped.
pub struct ReadAhead(Vec<(PathBuf, String)>);

impl ReadAhead {
    pub fn set(kib: u32) -> Result<Self> {
        let mut before = Self(Vec::new());
        for entry in fs::read_dir("/sys/block").context("read-ahead can be set on Linux only")? {
            let path = entry?.path().join("queue/read_ahead_kb");
            let Ok(was) = fs::read_to_string(&path) else { continue };
            fs::write(&path, kib.to_string()).with_context(|| format!("cannot write {}: run as root", path.display()))?;
            before.0.push((path, was));
        }
        Ok(before)
    }
}

impl Drop for ReadAhead {
    fn drop(&mut self) {
        for (path, was) in &self.0 {
            if fs::write(path, was.trim()).is_err() {
                eprintln!("{} could not be set back to {}", path.display(), was.trim());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Protects the limit from being another one than was asked for.
    #[test]
    fn sizes_are_read_as_written() {
        assert_eq!(parse_size("8GiB"), Ok(8 << 30));
        assert_eq!(parse_size("1.5 GB"), Ok(1_500_000_000));
        assert_eq!(parse_size("4096"), Ok(4096));
        assert!(parse_size("8 apples").is_err() && parse_size("GiB").is_err());
        assert_eq!(available("MemTotal: 9 kB\nMemAvailable:       24 kB\n"), Some(24 * 1024));
    }
}
