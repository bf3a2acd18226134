//! The speed that the machine's ceilings allow, as arithmetic on bytes and operations.

use mach_models::spec::{MixerSpec, ModelSpec};

/// What the machine can give at most. `None`: does not apply, or could not be measured.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Ceilings {
    /// Bytes per second read from memory by all threads.
    pub memory: f64,
    /// Bytes per second of records.
    pub disk: Option<f64>,
    /// int8 operations per second, a multiply and an add are two.
    pub int8: Option<f64>,
}

/// What holds a run back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bound {
    Memory,
    Compute,
    Disk,
}

impl Bound {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Compute => "compute",
            Self::Disk => "disk",
        }
    }
}

/// Experts that one layer of one forward pass found in the bank and had to read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct LayerUse {
    pub hits: u64,
    pub misses: u64,
}

/// Least seconds of some decode steps: `always` bytes from memory, then layer by layer what was hit from memory while what
/// was missed comes from the drive. `layers` are the MoE layers of all steps, `always` the bytes of all steps.
pub(crate) fn decode_seconds(ceilings: &Ceilings, always: f64, slot: f64, layers: &[LayerUse]) -> (f64, Bound) {
    let (mut memory, mut disk) = (always / ceilings.memory, 0.0);
    for layer in layers {
        let hit = layer.hits as f64 * slot / ceilings.memory;
        match ceilings.disk.map(|disk| layer.misses as f64 * slot / disk) {
            Some(read) if read > hit => disk += read,
            _ => memory += hit,
        }
    }
    (memory + disk, if disk > memory { Bound::Disk } else { Bound::Memory })
}

/// Least seconds of a prefill: the largest of the operations, one sweep of the weights through memory, and what was read
/// from the drive.
pub(crate) fn prefill_seconds(ceilings: &Ceilings, operations: f64, sweep: f64, read: f64) -> (f64, Bound) {
    let terms = [
        (sweep / ceilings.memory, Bound::Memory),
        (ceilings.int8.map_or(0.0, |int8| operations / int8), Bound::Compute),
        (ceilings.disk.map_or(0.0, |disk| read / disk), Bound::Disk),
    ];
    terms.into_iter().fold(terms[0], |most, term| if term.0 > most.0 { term } else { most })
}

/// Weights that take part in a token, without embedding and head, of a model with so many parameters in all.
pub(crate) fn active_weights(spec: &ModelSpec, parameters: u64) -> u64 {
    let expert = |inner: usize| 3 * (inner * spec.hidden) as u64;
    let idle: u64 = spec.moe_layers().map(|(_, m)| (m.router.experts - m.router.top_k) as u64 * expert(m.inner)).sum();
    let ends = (spec.vocab * spec.hidden) as u64 * if spec.tied { 1 } else { 2 };
    parameters.saturating_sub(idle + ends)
}

/// Bytes of a sequence's memory that one more token moves: recurrent states read and written, and the keys and values that it reads.
pub(crate) fn sequence_bytes(spec: &ModelSpec, kv_read: f64) -> f64 {
    let state = |m: &MixerSpec| match m {
        MixerSpec::Gdn(g) => g.state_bytes(),
        MixerSpec::Latent(l) => l.attention.state_bytes(),
        MixerSpec::Attention(_) => 0,
    };
    let states: usize = spec.layers.iter().map(|l| state(&l.mixer)).sum();
    2.0 * states as f64 + kv_read
}

/// The middle value, and the ends.
pub(crate) fn spread(values: &[f64]) -> (f64, [f64; 2]) {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let n = sorted.len();
    match sorted[..] {
        [] => (0.0, [0.0; 2]),
        [first, .., last] if n.is_multiple_of(2) => ((sorted[n / 2 - 1] + sorted[n / 2]) / 2.0, [first, last]),
        _ => (sorted[n / 2], [sorted[0], sorted[n - 1]]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const CEILINGS: Ceilings = Ceilings { memory: 10.0, disk: Some(1.0), int8: Some(100.0) };

    /// Protects the limit of decode: bytes over bandwidth, the slower of hits and misses layer by layer.
    #[test]
    fn decode_takes_the_slower_side_of_each_layer() {
        let at = |hits, misses| LayerUse { hits, misses };
        assert_eq!(decode_seconds(&CEILINGS, 50.0, 10.0, &[at(4, 0), at(4, 0)]), (5.0 + 8.0, Bound::Memory));
        // 30 bytes hit (3 s) against 10 bytes missed (10 s), then 40 hit (4 s).
        assert_eq!(decode_seconds(&CEILINGS, 10.0, 10.0, &[at(3, 1), at(4, 0)]), (1.0 + 10.0 + 4.0, Bound::Disk));
        // Few misses hide behind the hits.
        assert_eq!(decode_seconds(&CEILINGS, 0.0, 1.0, &[at(20, 1)]), (2.0, Bound::Memory));
    }

    /// Protects the limit of prefill: whichever of compute, memory and drive is slowest.
    #[test]
    fn prefill_takes_the_slowest() {
        assert_eq!(prefill_seconds(&CEILINGS, 1000.0, 10.0, 5.0), (10.0, Bound::Compute));
        assert_eq!(prefill_seconds(&CEILINGS, 10.0, 100.0, 5.0), (10.0, Bound::Memory));
        assert_eq!(prefill_seconds(&CEILINGS, 10.0, 10.0, 5.0), (5.0, Bound::Disk));
        // Where no int8 ceiling applies, memory is what is left.
        assert_eq!(prefill_seconds(&Ceilings { int8: None, disk: None, ..CEILINGS }, 1e9, 10.0, 5.0), (1.0, Bound::Memory));
    }

    /// Protects the count of active weights and of sequence bytes with the published sizes of the 35B shape: 3 G active
    /// of 35 G, 2 MiB of state in each of 30 layers, 20 KiB of keys and values a position.
    #[test]
    fn published_sizes() {
        let shape = crate::synthetic::Shape::named("qwen3.6-35b-a3b").unwrap();
        let (_, spec) = mach_models::spec_of(shape.config()).unwrap();
        let experts = 40 * 256 * 3 * 512 * 2048u64;
        let ends = 2 * 248_320 * 2048;
        let active = active_weights(&spec, experts + ends + 1_000_000_000);
        assert_eq!(active, 1_000_000_000 + experts / 32);
        let tail = 3 * 8192 * 4;
        assert_eq!(sequence_bytes(&spec, 2_048_000.0), 2.0 * 30.0 * f64::from((2 << 20) + tail) + 2_048_000.0);
        let tied = json!({"model_type": "qwen3_moe", "hidden_size": 64, "vocab_size": 100, "num_attention_heads": 4, "num_experts": 4,
            "num_experts_per_tok": 4, "tie_word_embeddings": true, "num_hidden_layers": 1});
        let (_, spec) = mach_models::spec_of(&tied).unwrap();
        assert_eq!(active_weights(&spec, 10_000), 10_000 - 6400);
    }

    /// Protects the reported figure from outliers.
    #[test]
    fn medians() {
        assert_eq!(spread(&[3.0, 1.0, 2.0]), (2.0, [1.0, 3.0]));
        assert_eq!(spread(&[4.0, 1.0]), (2.5, [1.0, 4.0]));
        assert_eq!(spread(&[5.0]), (5.0, [5.0, 5.0]));
    }
}
