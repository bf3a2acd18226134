//! Paged keys and values of one attention layer.
//!
//! A block holds 32 positions. Per kv head it has the keys transposed, `[head_dim][32]`, so that 16 lanes are 16 keys and
//! a score needs no sum across lanes, and then the values in chunks of 16 channels, `[chunk][32][16]` (the last chunk
//! padded), so that a chunk of a block is one stream.

use mach_backend::{KV_BLOCK, KvSpec, KvType};
use mach_format::AlignedBytes;

use crate::kernels::LANES;

/// KV blocks of all sequences. A block never moves once it exists.
pub struct Kv {
    pub(crate) spec: KvSpec,
    blocks: Vec<AlignedBytes>,
    /// First byte of each block.
    base: Vec<*mut u8>,
}

// SAFETY: `base` points into `blocks`; access follows the borrow of the whole store.
unsafe impl Send for Kv {}
// SAFETY: as above: shared borrows only read.
unsafe impl Sync for Kv {}

/// Where things lie inside a block, in elements.
#[derive(Clone, Copy)]
pub(crate) struct BlockShape {
    /// Keys of one head.
    pub keys: usize,
    /// Keys and values of one head.
    pub head: usize,
}

impl Kv {
    pub(crate) fn new(spec: KvSpec) -> Self {
        Self { spec, blocks: Vec::new(), base: Vec::new() }
    }

    pub(crate) fn shape(&self) -> BlockShape {
        let keys = self.spec.head_dim * KV_BLOCK;
        BlockShape { keys, head: keys + self.spec.head_dim.next_multiple_of(LANES) * KV_BLOCK }
    }

    pub(crate) fn grow(&mut self, blocks: usize) {
        let bytes = self.shape().head * self.spec.kv_heads * self.spec.ty.bytes();
        while self.blocks.len() < blocks {
            let mut block = AlignedBytes::zeroed(bytes);
            self.base.push(block.as_mut_ptr());
            self.blocks.push(block);
        }
    }

    /// Takes over the content of a store of the same shape.
    pub(crate) fn copy_from(&mut self, src: &Self) {
        assert!(self.spec == src.spec && self.blocks.len() == src.blocks.len(), "stores of two shapes");
        self.blocks.iter_mut().zip(&src.blocks).for_each(|(to, from)| to.copy_from_slice(from));
    }

    /// First byte of a head's keys in a block; its values follow `shape().keys` elements later.
    pub(crate) fn head(&self, block: u32, head: usize) -> *mut u8 {
        let Some(&base) = self.base.get(block as usize) else { panic!("KV block {block} of {}", self.blocks.len()) };
        assert!(head < self.spec.kv_heads, "kv head {head} of {}", self.spec.kv_heads);
        // SAFETY: every block holds `kv_heads` heads.
        unsafe { base.add(head * self.shape().head * self.spec.ty.bytes()) }
    }

    /// Stores one position of one head, rounded to the store's type.
    ///
    /// # Safety
    /// The store must be borrowed exclusively, and nobody else may access this position of this head meanwhile.
    pub(crate) unsafe fn store(&self, block: u32, slot: usize, head: usize, k: &[f32], v: &[f32]) {
        assert!(slot < KV_BLOCK && k.len() == self.spec.head_dim && v.len() == k.len());
        let (at, keys) = (self.head(block, head), self.shape().keys);
        // SAFETY: the head's part of the block is valid, and this position is ours.
        unsafe {
            match self.spec.ty {
                KvType::F32 => scatter::<f32>(at.cast(), keys, slot, k, v, |x| x),
                KvType::F16 => scatter::<half::f16>(at.cast(), keys, slot, k, v, half::f16::from_f32),
            }
        }
    }
}

unsafe fn scatter<T>(head: *mut T, keys: usize, slot: usize, k: &[f32], v: &[f32], round: impl Fn(f32) -> T) {
    for (d, (&k, &v)) in k.iter().zip(v).enumerate() {
        // SAFETY: `[head_dim][32]` keys, then chunks of `[32][16]` values, as the caller vouches.
        unsafe {
            head.add(d * KV_BLOCK + slot).write(round(k));
            head.add(keys + (d / LANES * KV_BLOCK + slot) * LANES + d % LANES).write(round(v));
        }
    }
}
