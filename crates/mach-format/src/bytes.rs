//! Buffers of weights on their way from files to tiles. A thread uses the same ones again: the system's zeroing of fresh memory takes
//! longer than a read from its cache.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut, Range};

/// Buffers that a thread keeps: data, scales and biases of rows, and of those picked from them.
const KEPT: usize = 6;
/// Larger ones are given back to the system.
const LARGEST: usize = 4 << 20;

thread_local! {
    static KEPT_BUFFERS: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// Bytes in a buffer that the thread uses again.
#[derive(Default)]
pub(crate) struct Bytes {
    buffer: Vec<u8>,
    range: Range<usize>,
}

impl Bytes {
    /// `len` bytes with anything in them, the first at a multiple of `align`.
    pub(crate) fn with_len(len: usize, align: usize) -> Self {
        let mut buffer = KEPT_BUFFERS.try_with(|kept| kept.borrow_mut().pop()).ok().flatten().unwrap_or_default();
        let needed = len + align - 1;
        if buffer.len() < needed {
            // Nothing is copied, and what the system gives is zero already.
            buffer = vec![0; needed];
        }
        let start = (buffer.as_ptr() as usize).wrapping_neg() % align;
        Self { buffer, range: start..start + len }
    }

    /// Only the bytes of `range` from here on.
    pub(crate) fn narrow(&mut self, range: Range<usize>) {
        assert!(range.start <= range.end && range.end <= self.range.len(), "{range:?} of {} bytes", self.range.len());
        self.range = self.range.start + range.start..self.range.start + range.end;
    }
}

impl Drop for Bytes {
    fn drop(&mut self) {
        if (1..=LARGEST).contains(&self.buffer.len()) {
            let buffer = std::mem::take(&mut self.buffer);
            // A thread that ends keeps nothing.
            let _ = KEPT_BUFFERS.try_with(|kept| {
                let mut kept = kept.borrow_mut();
                if kept.len() < KEPT {
                    kept.push(buffer);
                }
            });
        }
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(buffer: Vec<u8>) -> Self {
        let range = 0..buffer.len();
        Self { buffer, range }
    }
}

impl Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.buffer[self.range.clone()]
    }
}

impl DerefMut for Bytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.buffer[self.range.clone()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Protects reads from what an earlier one left behind: length and alignment are those asked for, whatever the buffer was.
    #[test]
    fn buffers_are_as_long_and_aligned_as_asked() {
        for (len, align) in [(10, 1), (5000, 4096), (3, 1), (0, 4096), (LARGEST + 1, 64), (7, 4096)] {
            let mut bytes = Bytes::with_len(len, align);
            assert_eq!((bytes.len(), bytes.as_ptr() as usize % align), (len, 0));
            bytes.fill(len as u8);
            bytes.narrow(len / 2..len);
            assert!(bytes.len() == len - len / 2 && bytes.iter().all(|&b| b == len as u8));
        }
        assert_eq!(&*Bytes::from(vec![1, 2]), [1, 2]);
        assert!(KEPT_BUFFERS.with(|kept| kept.borrow().iter().all(|b| b.len() <= LARGEST)));
    }
}
