//! Expert residency: which routed experts are in memory, and how the others get there.
//!
//! A [`ExpertStore`] owns the slots of the bank. The engine thread leases experts for one layer of one forward pass
//! ([`ExpertStore::step`] in decode, [`ExpertStore::stream`] in prefill); reader threads fill slots; all bookkeeping
//! happens on the engine thread, which learns of finished reads through a queue.

mod ahead;
mod bank;
mod error;
mod lease;
mod readers;
pub mod replay;
mod source;
mod store;
pub mod trace;

pub use ahead::AheadStats;
pub use error::ExpertError;
pub use lease::{Lease, Ready};
pub use source::{CheckpointSource, Key, RecordSource, SidecarSource};
pub use store::{ExpertStats, ExpertStore, Residency, SWEEP_ROWS, StoreOptions, floor_slots};
