//! Paged entries of one layer with latent attention, row by row.

use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use mach_backend::{EntrySpec, KvType};

/// Entries of all sequences.
pub struct Entries {
    pub(crate) spec: EntrySpec,
    blocks: Vec<Block>,
}

enum Block {
    F32(Box<[f32]>),
    F16(Box<[u16]>),
}

impl Entries {
    pub(crate) fn new(spec: EntrySpec) -> Self {
        Self { spec, blocks: Vec::new() }
    }

    pub(crate) fn grow(&mut self, blocks: usize) {
        let n = self.spec.per_block() * self.spec.width;
        while self.blocks.len() < blocks {
            self.blocks.push(match self.spec.ty {
                KvType::F32 => Block::F32(vec![0.0; n].into()),
                KvType::F16 => Block::F16(vec![0; n].into()),
            });
        }
    }

    fn place(&self, table: &[u32], n: usize) -> (usize, std::ops::Range<usize>) {
        let (block, slot) = self.spec.place(n);
        (table[block] as usize, slot * self.spec.width..(slot + 1) * self.spec.width)
    }

    /// Stores entry `n` of a sequence, rounded to the store's type.
    pub(crate) fn put(&mut self, table: &[u32], n: usize, values: &[f32]) {
        let (block, at) = self.place(table, n);
        match &mut self.blocks[block] {
            Block::F32(all) => all[at].copy_from_slice(values),
            Block::F16(all) => all[at].iter_mut().zip(values).for_each(|(o, &x)| *o = half::f16::from_f32(x).to_bits()),
        }
    }

    /// Entry `n` of a sequence.
    pub(crate) fn get(&self, table: &[u32], n: usize, out: &mut [f32]) {
        let (block, at) = self.place(table, n);
        match &self.blocks[block] {
            Block::F32(all) => out.copy_from_slice(&all[at]),
            Block::F16(all) => all[at].reinterpret_cast::<half::f16>().convert_to_f32_slice(out),
        }
    }
}
