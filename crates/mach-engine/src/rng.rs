//! Counter-based randomness: Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011). A draw
//! is a function of (seed, position, purpose, id), so it does not depend on batch, order or retries.

/// What a draw is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Purpose {
    /// Gumbel noise of the target and of every drafter that shares it.
    SharedGumbel = 3,
}

/// Ten rounds on one counter.
fn philox(key: [u32; 2], counter: [u32; 4]) -> [u32; 4] {
    let [mut k0, mut k1] = key;
    let [mut c0, mut c1, mut c2, mut c3] = counter;
    for _ in 0..10 {
        let a = u64::from(c0) * 0xD251_1F53;
        let b = u64::from(c2) * 0xCD9E_8D57;
        (c0, c1, c2, c3) = ((b >> 32) as u32 ^ c1 ^ k0, b as u32, (a >> 32) as u32 ^ c3 ^ k1, a as u32);
        k0 = k0.wrapping_add(0x9E37_79B9);
        k1 = k1.wrapping_add(0xBB67_AE85);
    }
    [c0, c1, c2, c3]
}

/// Standard Gumbel noise for one candidate.
pub fn gumbel(seed: u64, position: u64, id: u32) -> f64 {
    let counter = [position as u32, (position >> 32) as u32, Purpose::SharedGumbel as u32, id];
    let [a, b, ..] = philox([seed as u32, (seed >> 32) as u32], counter);
    // 53 bits, never 0 or 1.
    let u = ((u64::from(a) << 21 | u64::from(b) >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
    -(-u.ln()).ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Protects seeds: the published test vectors of Philox4x32-10, so that a seed means the same next year.
    #[test]
    fn known_answers() {
        assert_eq!(philox([0; 2], [0; 4]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([u32::MAX; 2], [u32::MAX; 4]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let pi = philox([0xa409_3822, 0x299f_31d0], [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344]);
        assert_eq!(pi, [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }

    /// Protects the noise itself: mean and spread of the Gumbel distribution.
    #[test]
    fn gumbel_has_its_moments() {
        let n = 40_000;
        let draws: Vec<f64> = (0..n).map(|i| gumbel(7, i / 200, (i % 200) as u32)).collect();
        let mean = draws.iter().sum::<f64>() / n as f64;
        let variance = draws.iter().map(|d| (d - mean).powi(2)).sum::<f64>() / n as f64;
        assert!((mean - 0.5772).abs() < 0.03 && (variance - 1.6449).abs() < 0.06, "{mean} {variance}");
    }
}
