//! mach runs Mixture-of-Experts language models that do not fit in memory: routed experts stream from the SSD into a
//! bounded bank. This crate is the door to it from Rust.
//!
//! ```no_run
//! # fn main() -> Result<(), mach::Error> {
//! let model = mach::load(None, &mach::LoadOptions::default())?;
//! let prompt = model.session.chat("What is the capital of France?")?;
//! # Ok(())
//! # }
//! ```

pub mod cli;
mod error;
mod estimate;
mod limits;
mod load;
mod locate;
mod rates;
pub mod synthetic;
pub mod system;

pub use error::Error;
pub use load::{BackendKind, LoadOptions, Loaded, Prepared, load, load_moe, prepare};
pub use locate::{ModelPath, hub_cache, installed, locate};
pub use mach_engine as engine;
pub use mach_models as models;
pub use mach_session as session;
