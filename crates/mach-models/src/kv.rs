//! Blocks of keys and values: which layers keep how much of a sequence, and which sequence has which blocks.
//!
//! Layers that keep equally many tokens share a pool of block ids, and a sequence has one table for each pool. Tables go by absolute
//! positions; blocks that no later row sees go back to the pool, and their place in the table stays empty.

use std::ops::Range;

use mach_backend::{Backend, KV_BLOCK, NO_BLOCK};

use crate::ModelError;
use crate::plan::{KvPool, MemoryPlan, UNDO_TOKENS, entry_specs, kv_specs};
use crate::sequence::Sequence;
use crate::spec::ModelSpec;

/// Block ids of one sequence in one pool, by position / 32.
pub(crate) struct Table {
    window: Option<usize>,
    pub blocks: Vec<u32>,
}

impl Table {
    /// Blocks with the tokens that the rows after the first `len` tokens see.
    fn seen(&self, len: usize) -> Range<usize> {
        let first = self.window.map_or(0, |w| (len + 1).saturating_sub(w));
        first / KV_BLOCK..len.div_ceil(KV_BLOCK)
    }

    fn has(&self, block: usize) -> bool {
        self.blocks.get(block).is_some_and(|&b| b != NO_BLOCK)
    }

    /// Whether a sequence that is cut to `len` tokens can go on.
    pub fn holds(&self, len: usize) -> bool {
        self.seen(len).rev().all(|block| self.has(block))
    }
}

/// A sequence's blocks for layers of this window.
pub(crate) fn blocks(tables: &[Table], window: Option<usize>) -> &[u32] {
    tables.iter().find(|t| t.window == window).map_or(&[], |t| &t.blocks)
}

struct Pool {
    plan: KvPool,
    /// Its stores of keys and values.
    kv: Vec<usize>,
    free: Vec<u32>,
    made: usize,
}

impl Pool {
    fn missing(&self, table: &Table, positions: Range<usize>) -> usize {
        (positions.start / KV_BLOCK..positions.end.div_ceil(KV_BLOCK)).filter(|&block| !table.has(block)).count()
    }
}

/// Keys, values and entries of all sequences.
pub(crate) struct KvPools<B: Backend> {
    pools: Vec<Pool>,
    /// One store for every attention layer.
    pub kv: Vec<B::Kv>,
    /// Stores of layers with compressed entries, in the pool of the whole context.
    pub entries: Vec<B::Entries>,
}

impl<B: Backend> KvPools<B> {
    pub fn new(backend: &B, spec: &ModelSpec, plan: &MemoryPlan) -> Self {
        let specs = kv_specs(spec, plan.kv_type);
        let stores = |window: Option<usize>| (0..specs.len()).filter(|&i| specs[i].0 == window).collect();
        Self {
            pools: plan.kv_pools.iter().map(|&plan| Pool { kv: stores(plan.window), plan, free: Vec::new(), made: 0 }).collect(),
            kv: specs.iter().map(|&(_, k)| backend.kv(k)).collect(),
            entries: entry_specs(spec, plan.kv_type).into_iter().map(|e| backend.entries(e)).collect(),
        }
    }

    /// The tables of an empty sequence.
    pub fn tables(&self) -> Vec<Table> {
        self.pools.iter().map(|p| Table { window: p.plan.window, blocks: Vec::new() }).collect()
    }

    /// Takes back blocks that neither rows from the end of the sequence on see, nor rows after its snapshots.
    pub fn settle(&mut self, seq: &mut Sequence<B>) {
        let (len, pending, snapshots) = (seq.len(), seq.pending, seq.snapshots());
        for (pool, table) in self.pools.iter_mut().zip(&mut seq.tables) {
            // Rows that were computed and not committed stay.
            let end = if pending { usize::MAX } else { len.div_ceil(KV_BLOCK) };
            let own = table.seen(len.saturating_sub(UNDO_TOKENS)).start..end;
            let kept: Vec<_> = snapshots.iter().map(|&pos| table.seen(pos)).chain([own]).collect();
            for (i, block) in table.blocks.iter_mut().enumerate() {
                if *block != NO_BLOCK && !kept.iter().any(|range| range.contains(&i)) {
                    pool.free.push(std::mem::replace(block, NO_BLOCK));
                }
            }
        }
    }

    /// Takes back all blocks of a sequence.
    pub fn release(&mut self, seq: Sequence<B>) {
        for (pool, table) in self.pools.iter_mut().zip(seq.tables) {
            pool.free.extend(table.blocks.into_iter().filter(|&b| b != NO_BLOCK));
        }
    }

    /// Whether there are blocks for positions up to `end` of a sequence.
    pub fn fits(&self, seq: &Sequence<B>, end: usize) -> bool {
        self.pools.iter().zip(&seq.tables).all(|(p, table)| p.missing(table, seq.len()..end) <= p.free.len() + p.plan.blocks.saturating_sub(p.made))
    }

    /// Gives a sequence blocks for `positions`. Before new memory is taken, `make_room` is told how many bytes it will be in all.
    pub fn reserve(&mut self, backend: &B, seq: &mut Sequence<B>, positions: Range<usize>, make_room: &mut dyn FnMut(u64)) -> Result<(), ModelError> {
        for i in 0..self.pools.len() {
            let (pool, table) = (&self.pools[i], &seq.tables[i]);
            let wanted = (pool.made + pool.missing(table, positions.clone())).saturating_sub(pool.free.len()).max(pool.made);
            if wanted > pool.plan.blocks {
                let bytes = pool.plan.block_bytes;
                return Err(ModelError::Budget {
                    what: format!("a sequence of {} tokens", positions.end),
                    needed: wanted as u64 * bytes,
                    available: pool.plan.blocks as u64 * bytes,
                    hint: "raise --ctx-size".to_owned(),
                });
            }
            if wanted > pool.made {
                make_room(self.made_bytes() + (wanted - self.pools[i].made) as u64 * self.pools[i].plan.block_bytes);
                self.grow(backend, i, wanted);
            }
            let (pool, table) = (&mut self.pools[i], &mut seq.tables[i]);
            let end = positions.end.div_ceil(KV_BLOCK);
            table.blocks.resize(table.blocks.len().max(end), NO_BLOCK);
            let missing = table.blocks[positions.start / KV_BLOCK..end].iter_mut().filter(|b| **b == NO_BLOCK);
            // The pool comes last: a zip that ends with the blocks takes no id too many.
            missing.zip(std::iter::from_fn(|| pool.free.pop())).for_each(|(block, id)| *block = id);
        }
        Ok(())
    }

    fn grow(&mut self, backend: &B, pool: usize, blocks: usize) {
        let pool = &mut self.pools[pool];
        for &store in &pool.kv {
            backend.kv_grow(&mut self.kv[store], blocks);
        }
        if pool.plan.window.is_none() {
            self.entries.iter_mut().for_each(|e| backend.entries_grow(e, blocks));
        }
        pool.free.extend((pool.made as u32..blocks as u32).rev());
        pool.made = blocks;
    }

    fn made_bytes(&self) -> u64 {
        self.pools.iter().map(|p| p.made as u64 * p.plan.block_bytes).sum()
    }

    /// Bytes of blocks that sequences have.
    pub fn used_bytes(&self) -> u64 {
        self.pools.iter().map(|p| (p.made - p.free.len()) as u64 * p.plan.block_bytes).sum()
    }
}
