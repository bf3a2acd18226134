//! What the machine has: memory that can be used, peak memory of this process, processor.

use std::fs;
use std::path::{Path, PathBuf};

/// Bytes that this process may use: free memory of the system, less where the cgroup allows less.
pub fn available_memory() -> u64 {
    let free = meminfo("MemAvailable").or_else(apple_memory).unwrap_or(4 << 30);
    cgroup_headroom().map_or(free, |limit| limit.min(free))
}

/// Peak resident set of this process, where the system tells.
pub fn peak_rss() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    kib_line(&status, "VmHWM")
}

/// Lets [`peak_rss`] count from now on. Linux can; elsewhere earlier peaks stay in the figure.
pub(crate) fn forget_peak() {
    // Without the permission the figure is only larger than it need be.
    let _ = fs::write("/proc/self/clear_refs", "5");
}

/// The processor's own name.
pub fn cpu_name() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|l| l.strip_prefix("model name").and_then(|r| r.split_once(':')));
    name.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned())
}

fn meminfo(key: &str) -> Option<u64> {
    kib_line(&fs::read_to_string("/proc/meminfo").ok()?, key)
}

fn kib_line(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find(|l| l.starts_with(key) && l[key.len()..].starts_with(':'))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
}

/// macOS gives no single figure for free memory; most of the physical memory can be had by pushing caches out.
fn apple_memory() -> Option<u64> {
    if !cfg!(target_vendor = "apple") {
        return None;
    }
    let out = std::process::Command::new("sysctl").args(["-n", "hw.memsize"]).output().ok()?;
    String::from_utf8(out.stdout).ok()?.trim().parse::<u64>().ok().map(|total| total / 10 * 7)
}

/// The smallest headroom of this process's cgroup and its parents (version 2, then 1). Page cache that can be dropped
/// counts as free.
fn cgroup_headroom() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let mut least: Option<u64> = None;
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':');
        let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
        let (root, limit, usage, v2) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.max", "memory.current", true),
            c if c.split(',').any(|c| c == "memory") => ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", false),
            _ => continue,
        };
        let mut dir = PathBuf::from(format!("{root}{path}"));
        loop {
            if let (Some(limit), Some(used)) = (number(&dir.join(limit)), number(&dir.join(usage))) {
                let stat = fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
                let key = if v2 { "inactive_file" } else { "total_inactive_file" };
                let cache = stat.lines().find_map(|l| l.strip_prefix(key)?.trim().parse::<u64>().ok()).unwrap_or(0);
                let headroom = limit.saturating_sub(used.saturating_sub(cache));
                least = Some(least.map_or(headroom, |l| l.min(headroom)));
            }
            if dir == Path::new(root) || !dir.pop() || !dir.starts_with(root) {
                break;
            }
        }
    }
    least
}

/// A number in a file; `max` and the near-2^63 of version 1 are no limit.
fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse::<u64>().ok().filter(|&n| n < 1 << 60)
}

#[cfg(test)]
mod tests {
    /// Protects the parser of /proc files: the right line, in bytes.
    #[test]
    fn kib_lines() {
        let text = "MemTotal: 10 kB\nMemAvailableX: 3 kB\nMemAvailable:   7 kB\n";
        assert_eq!(super::kib_line(text, "MemAvailable"), Some(7 * 1024));
        assert_eq!(super::kib_line(text, "Swap"), None);
    }
}
