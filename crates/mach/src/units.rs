//! Sizes and durations for people.

/// `17.3 GiB`.
pub(crate) fn size(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", units[unit]) }
}

/// `41.2 s`, `3 min 20 s`.
pub(crate) fn seconds(s: f64) -> String {
    if s < 90.0 { format!("{s:.1} s") } else { format!("{} min {:.0} s", (s / 60.0) as u64, s % 60.0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Protects what people read: binary units, one decimal.
    #[test]
    fn sizes_and_durations() {
        assert_eq!([size(512), size(1536), size(18_612_000_000)], ["512 B", "1.5 KiB", "17.3 GiB"]);
        assert_eq!([seconds(1.26), seconds(200.0)], ["1.3 s", "3 min 20 s"]);
    }
}
