//! Latent attention with compressed entries, as DeepSeek-V4 has it: one vector per token is key and value of all heads, a
//! query sees a window of them and entries that stand for whole runs of older tokens.

use crate::spec::{KV_BLOCK, KvType};

/// The operation of one layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LatentSpec {
    /// Query heads; all of them read the same keys.
    pub heads: usize,
    /// Values per head.
    pub dim: usize,
    /// Channels at the end of a head that rotate, in pairs `(2j, 2j + 1)`. The output is rotated back.
    pub rotary: usize,
    /// Single tokens that a query sees, itself included.
    pub window: usize,
    /// Factor on q·k.
    pub scale: f32,
    /// Epsilon of all norms.
    pub eps: f32,
    /// Type that tokens and entries are rounded to before any use.
    pub ty: KvType,
    /// Entries of older tokens, where the layer has them.
    pub compress: Option<CompressSpec>,
}

/// How tokens become entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompressSpec {
    /// Tokens of one entry: divides [`KV_BLOCK`], or is a multiple of it.
    pub ratio: usize,
    /// An entry also pools the run before its own. Projections then have two halves: what the next run's entry takes, and
    /// what this run's takes.
    pub overlap: bool,
    /// A choice among the entries; without it a query sees all that are complete.
    pub index: Option<IndexSpec>,
}

/// Scores that choose entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexSpec {
    /// Index query heads.
    pub heads: usize,
    /// Values per head and per index key.
    pub dim: usize,
    /// Entries that a query sees.
    pub top_k: usize,
}

impl CompressSpec {
    /// Columns of the key and gate projections of entries of `dim` values.
    pub const fn width(&self, dim: usize) -> usize {
        if self.overlap { 2 * dim } else { dim }
    }

    /// Entries that are complete when the sequence has `tokens` tokens.
    pub const fn complete(&self, tokens: usize) -> usize {
        tokens / self.ratio
    }

    /// Values that an open run of entries of `dim` values keeps: keys and gates of its tokens, and of the run before.
    pub const fn open_values(&self, dim: usize) -> usize {
        2 * self.ratio * (self.width(dim) + if self.overlap { dim } else { 0 })
    }
}

impl LatentSpec {
    /// Bytes of one sequence's state in one layer.
    pub const fn state_bytes(&self) -> usize {
        let open = match &self.compress {
            Some(c) => c.open_values(self.dim) + if let Some(i) = &c.index { c.open_values(i.dim) } else { 0 },
            None => 0,
        };
        4 * (self.window.next_multiple_of(KV_BLOCK) + KV_BLOCK) * self.dim * 2 + 4 * open
    }
}

/// Paged store of entries: a block of [`KV_BLOCK`] positions holds those whose first token lies in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntrySpec {
    /// Tokens of one entry.
    pub ratio: usize,
    /// Values of one entry.
    pub width: usize,
    /// Their type.
    pub ty: KvType,
}

impl EntrySpec {
    /// Entries of one block.
    pub const fn per_block(&self) -> usize {
        if self.ratio < KV_BLOCK { KV_BLOCK / self.ratio } else { 1 }
    }

    /// Bytes of one block.
    pub const fn block_bytes(&self) -> usize {
        self.per_block() * self.width * self.ty.bytes()
    }

    /// Place of entry `n`: index into the sequence's block table, and entry within the block.
    pub const fn place(&self, n: usize) -> (usize, usize) {
        let first = n * self.ratio;
        (first / KV_BLOCK, first % KV_BLOCK / self.ratio)
    }
}

/// Weights that make entries of `dim` values.
pub struct PoolWeights<'a, T> {
    /// Added to the gates by place in the run, `[ratio, width]`.
    pub position_bias: &'a T,
    /// RMS weight of an entry, `[1, dim]`.
    pub norm: &'a T,
}

/// Small weights of a layer.
pub struct LatentWeights<'a, T> {
    /// RMS weight of a token's vector, `[1, dim]`.
    pub kv_norm: &'a T,
    /// One logit per head that takes part in the softmax and has no value, `[1, heads]`.
    pub sinks: &'a T,
    /// For entries.
    pub entries: Option<PoolWeights<'a, T>>,
    /// For index keys.
    pub index: Option<PoolWeights<'a, T>>,
}

/// Projected keys and gates that become entries, `[rows, width]` each.
pub struct PoolRows<'a, T> {
    /// Keys.
    pub kv: &'a T,
    /// Gates: a softmax over the run, channel by channel, weighs the keys.
    pub gate: &'a T,
}

/// Projected rows of a call.
pub struct LatentRows<'a, T> {
    /// `[rows, heads·dim]`; normed and rotated in place.
    pub q: &'a mut T,
    /// `[rows, dim]`; normed and rotated in place.
    pub kv: &'a mut T,
    /// For entries.
    pub entries: Option<PoolRows<'a, T>>,
    /// For index keys.
    pub index: Option<IndexRows<'a, T>>,
    /// cos then sin of `rotary / 2` frequencies, one row per batch row.
    pub rope: &'a T,
    /// The same for entries, at the position of their first tokens: a row for every entry that the call completes.
    pub entry_rope: &'a T,
}

/// Projected rows of the index.
pub struct IndexRows<'a, T> {
    /// `[rows, index heads·index dim]`; rotated in place.
    pub q: &'a mut T,
    /// Keys and gates.
    pub pool: PoolRows<'a, T>,
    /// Weight of each head, factors included, `[rows, index heads]`.
    pub weights: &'a T,
}

/// Consecutive rows of one sequence in a batch.
pub struct LatentSegment<'a, S> {
    /// First row in the batch.
    pub row: usize,
    /// Number of rows.
    pub rows: usize,
    /// Absolute position of the first row.
    pub pos: usize,
    /// First row of `entry_rope` that belongs to this sequence.
    pub entry_row: usize,
    /// The sequence's block table.
    pub blocks: &'a [u32],
    /// Window and open runs; advanced by `rows` tokens.
    pub state: &'a mut S,
}

/// Stores of a layer's entries and index keys.
pub struct LatentStores<'a, E> {
    /// Entries.
    pub entries: Option<&'a mut E>,
    /// Index keys.
    pub index: Option<&'a mut E>,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Protects entries from overwriting each other: places are distinct, and lie in blocks that exist when the entry closes.
    #[test]
    fn every_entry_has_a_place_of_its_own() {
        for ratio in [1, 4, 8, 32, 64, 128] {
            let spec = EntrySpec { ratio, width: 8, ty: KvType::F32 };
            let mut seen = std::collections::HashSet::new();
            for n in 0..100 {
                let (block, slot) = spec.place(n);
                assert!(slot < spec.per_block() && block * KV_BLOCK < (n + 1) * ratio, "entry {n} of ratio {ratio}");
                assert!(seen.insert((block, slot)), "entry {n} of ratio {ratio}");
            }
        }
    }
}
