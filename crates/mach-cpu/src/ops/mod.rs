//! Operations: how kernels are spread over rows, tiles, heads and threads. Threads never share a reduction.

pub(crate) mod attention;
pub(crate) mod experts;
pub(crate) mod gdn;
pub(crate) mod hyper;
pub(crate) mod latent;
pub(crate) mod linear;
pub(crate) mod norm;
pub(crate) mod quant;
pub(crate) mod router;

use std::cell::RefCell;

use mach_backend::StateSpec;

use crate::kernels::Kernels;
use crate::pool::Pool;

/// What one layer of one sequence carries from token to token.
pub enum State {
    /// Of a gated delta net.
    Gdn(gdn::GdnState),
    /// Of latent attention.
    Latent(Box<latent::LatentState>),
}

impl State {
    pub(crate) fn new(spec: &StateSpec) -> Self {
        match spec {
            StateSpec::Gdn(g) => Self::Gdn(gdn::GdnState::new(g)),
            StateSpec::Latent(l) => Self::Latent(Box::new(latent::LatentState::new(l))),
        }
    }

    pub(crate) fn copy_from(&mut self, src: &Self) {
        match (self, src) {
            (Self::Gdn(to), Self::Gdn(from)) => to.copy_from(from),
            (Self::Latent(to), Self::Latent(from)) => to.copy_from(from),
            _ => panic!("states of two kinds of layers"),
        }
    }
}

/// What every operation needs.
#[derive(Clone, Copy)]
pub(crate) struct Context<'a> {
    pub pool: &'a Pool,
    pub k: &'static Kernels,
    /// Planes of int8 that activations are quantised to.
    pub planes: usize,
}

/// Values below which a region is not worth waking anybody.
const SMALL: usize = 16 << 10;

impl Context<'_> {
    /// Calls `f` for rows `0..rows` of `cost` values each, in parallel where it pays.
    pub fn rows(&self, rows: usize, cost: usize, f: &(dyn Fn(usize) + Sync)) {
        if rows * cost < SMALL {
            (0..rows).for_each(f);
        } else {
            let size = rows.div_ceil(self.pool.threads() * 4);
            self.pool.ranges(rows, size, &|range| range.for_each(f));
        }
    }
}

/// A pointer that may cross threads; whoever uses it says why that is sound.
pub(crate) struct Shared<T>(*mut T);

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Shared<T> {}
// SAFETY: only moves an address; every dereference carries its own argument.
unsafe impl<T> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub fn new(data: &mut [T]) -> Self {
        Self(data.as_mut_ptr())
    }

    /// Address of element `i`.
    ///
    /// # Safety
    /// `i` must lie within the slice that this was made of.
    pub unsafe fn at(self, i: usize) -> *mut T {
        // SAFETY: the caller's promise.
        unsafe { self.0.add(i) }
    }
}

/// Calls `f` with `n` values of this thread's scratch, whatever they hold.
pub(crate) fn with_scratch<R>(n: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    thread_local!(static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) });
    SCRATCH.with_borrow_mut(|s| {
        if s.len() < n {
            s.resize(n, 0.0);
        }
        f(&mut s[..n])
    })
}

/// The first `n` values of a buffer that only grows.
pub(crate) fn grown<T: Copy + Default>(buffer: &mut Vec<T>, n: usize) -> &mut [T] {
    if buffer.len() < n {
        buffer.resize(n, T::default());
    }
    &mut buffer[..n]
}
