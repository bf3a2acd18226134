//! mach runs Mixture-of-Experts language models that do not fit in memory: routed experts stream from the SSD into a
//! bounded bank. This crate is the door to it from Rust.
//!
//! [`load`] gives a [`Session`](session::Session) of text, [`load_moe`] an [`EngineHandle`](engine::EngineHandle) of token
//! ids; both have examples that run on the built-in model.

pub mod cli;
mod drive;
mod error;
mod estimate;
pub mod hub;
mod limits;
mod load;
mod locate;
mod rates;
mod routing;
pub mod synthetic;
pub mod system;
mod text;
mod units;

pub use error::Error;
pub use load::{BackendKind, LoadOptions, Loaded, Prepared, Progress, load, load_moe, load_with, prepare};
pub use locate::{ModelPath, hub_cache, installed, locate};
pub use mach_engine as engine;
pub use mach_models as models;
pub use mach_models::plan::BankSize;
pub use mach_session as session;
