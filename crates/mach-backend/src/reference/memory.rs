//! Memory of the expert bank as locked vectors.

use std::sync::{PoisonError, RwLock};

use crate::{ExpertMemory, Part};

/// Slots as locked byte vectors.
pub struct Memory {
    parts: Vec<[RwLock<Pages>; 2]>,
    part_bytes: [usize; 2],
}

/// Bytes at a 4096-byte boundary inside an ordinary vector.
struct Pages {
    bytes: Vec<u8>,
    start: usize,
}

impl Pages {
    fn new(len: usize) -> Self {
        let bytes = vec![0; len + 4096];
        let start = bytes.as_ptr().align_offset(4096);
        Self { bytes, start }
    }
}

impl Memory {
    pub(super) fn new(slots: usize, part_bytes: [usize; 2]) -> Self {
        let parts = (0..slots).map(|_| part_bytes.map(|len| RwLock::new(Pages::new(len)))).collect();
        Self { parts, part_bytes }
    }

    pub(super) fn with<R>(&self, slot: usize, part: usize, f: impl FnOnce(&[u8]) -> R) -> R {
        let pages = self.parts[slot][part].read().unwrap_or_else(PoisonError::into_inner);
        f(&pages.bytes[pages.start..pages.start + self.part_bytes[part]])
    }
}

impl ExpertMemory for Memory {
    fn slots(&self) -> usize {
        self.parts.len()
    }

    fn part_bytes(&self) -> [usize; 2] {
        self.part_bytes
    }

    fn fill(&self, slot: usize, parts: Part, f: &mut dyn FnMut([&mut [u8]; 2])) {
        let [gate_up, down] = &self.parts[slot];
        let mut gate_up = (parts != Part::Down).then(|| gate_up.write().unwrap_or_else(PoisonError::into_inner));
        let mut down = (parts != Part::GateUp).then(|| down.write().unwrap_or_else(PoisonError::into_inner));
        let mut empty: [u8; 0] = [];
        let mut empty2: [u8; 0] = [];
        let a: &mut [u8] = match gate_up.as_deref_mut() {
            Some(p) => &mut p.bytes[p.start..][..self.part_bytes[0]],
            None => &mut empty,
        };
        let b: &mut [u8] = match down.as_deref_mut() {
            Some(p) => &mut p.bytes[p.start..][..self.part_bytes[1]],
            None => &mut empty2,
        };
        f([a, b]);
    }

    fn release(&self, slot: usize) {
        for (part, lock) in self.parts[slot].iter().enumerate() {
            *lock.write().unwrap_or_else(PoisonError::into_inner) = Pages::new(self.part_bytes[part]);
        }
    }
}
