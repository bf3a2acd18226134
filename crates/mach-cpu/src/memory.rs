//! Memory of the expert bank: one anonymous mapping, cut into equal slots of two parts.

use std::io;
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use mach_backend::{ExpertMemory, Part};

const HUGE_PAGE: usize = 2 << 20;

/// Memory that the system has reserved but not yet backed: no page is touched before its first use.
struct Mapping {
    base: *mut u8,
    mapped: usize,
    start: *mut u8,
}

// SAFETY: plain memory; who may access which bytes is decided by the locks of `Bank`.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(len: usize) -> io::Result<Self> {
        let too_big = || io::Error::new(io::ErrorKind::OutOfMemory, "the expert bank exceeds the address space");
        let mapped = len.max(1).checked_next_multiple_of(HUGE_PAGE).and_then(|n| n.checked_add(HUGE_PAGE)).ok_or_else(too_big)?;
        // SAFETY: a fresh private anonymous mapping at an address of the system's choice.
        let base = unsafe {
            libc::mmap(std::ptr::null_mut(), mapped, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANON | libc::MAP_NORESERVE, -1, 0)
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = base.cast::<u8>();
        let skip = base.addr().next_multiple_of(HUGE_PAGE) - base.addr();
        // SAFETY: one huge page of slack was mapped for the alignment.
        let start = unsafe { base.add(skip) };
        #[cfg(target_os = "linux")]
        // SAFETY: the range lies inside the mapping. Advice only: a system without huge pages says no, which is fine.
        unsafe {
            libc::madvise(start.cast(), mapped - HUGE_PAGE, libc::MADV_HUGEPAGE);
        }
        Ok(Self { base, mapped, start })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: our own mapping; the borrows of the bank have ended.
        unsafe {
            libc::munmap(self.base.cast(), self.mapped);
        }
    }
}

/// The CPU's expert bank, 2 MiB-aligned.
pub struct Bank {
    mapping: Mapping,
    part_bytes: [usize; 2],
    /// One lock per slot and part: `fill` writes, operations read.
    locks: Vec<[RwLock<()>; 2]>,
}

/// Shared access to one part of a slot.
pub(crate) struct PartGuard<'a> {
    _lock: RwLockReadGuard<'a, ()>,
}

impl Bank {
    /// Reserves memory for `slots` slots.
    ///
    /// # Errors
    /// When the system does not give the address space.
    pub(crate) fn new(slots: usize, part_bytes: [usize; 2]) -> io::Result<Self> {
        assert!(part_bytes.iter().all(|b| b % 4096 == 0), "part capacities are multiples of 4096");
        let stride = part_bytes[0] + part_bytes[1];
        let len = slots.checked_mul(stride).ok_or_else(|| io::Error::new(io::ErrorKind::OutOfMemory, "the expert bank exceeds the address space"))?;
        Ok(Self { mapping: Mapping::new(len)?, part_bytes, locks: std::iter::repeat_with(Default::default).take(slots).collect() })
    }

    /// First byte of a part.
    fn at(&self, slot: usize, part: usize) -> *mut u8 {
        assert!(slot < self.locks.len(), "slot {slot} of {}", self.locks.len());
        let offset = slot * (self.part_bytes[0] + self.part_bytes[1]) + part * self.part_bytes[0];
        // SAFETY: inside the mapping by the assertion and the size computed in `new`.
        unsafe { self.mapping.start.add(offset) }
    }

    /// Locks a part for reading and returns its first byte, which stays valid as long as the guard.
    pub(crate) fn read(&self, slot: usize, part: usize) -> (PartGuard<'_>, *const u8) {
        let at = self.at(slot, part);
        let lock = self.locks[slot][part].read().unwrap_or_else(PoisonError::into_inner);
        (PartGuard { _lock: lock }, at)
    }
}

impl ExpertMemory for Bank {
    fn slots(&self) -> usize {
        self.locks.len()
    }

    fn part_bytes(&self) -> [usize; 2] {
        self.part_bytes
    }

    fn fill(&self, slot: usize, parts: Part, f: &mut dyn FnMut([&mut [u8]; 2])) {
        let wanted = [parts != Part::Down, parts != Part::GateUp];
        // Always in part order, so that two fillers of one slot cannot wait for each other.
        let _guards = [0, 1].map(|p| wanted[p].then(|| self.locks[slot][p].write().unwrap_or_else(PoisonError::into_inner)));
        f([0, 1].map(|p| {
            let len = if wanted[p] { self.part_bytes[p] } else { 0 };
            // SAFETY: the part lies inside the mapping and its write lock is held while `f` runs; parts do not overlap.
            unsafe { std::slice::from_raw_parts_mut(self.at(slot, p), len) }
        }));
    }

    fn release(&self, slot: usize) {
        let _guards = [0, 1].map(|p| self.locks[slot][p].write().unwrap_or_else(PoisonError::into_inner));
        let len = self.part_bytes[0] + self.part_bytes[1];
        #[cfg(target_os = "linux")]
        let advice = libc::MADV_DONTNEED;
        #[cfg(not(target_os = "linux"))]
        let advice = libc::MADV_FREE;
        // SAFETY: whole pages of the mapping (parts are multiples of 4096), exclusively locked. Where pages are larger
        // the call fails and the memory stays, which is allowed: the content is undefined either way.
        unsafe {
            libc::madvise(self.at(slot, 0).cast(), len, advice);
        }
    }
}
