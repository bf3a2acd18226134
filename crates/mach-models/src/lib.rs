//! The architecture registry, shared layers, one file per family.

mod block_tensors;
pub mod config;
mod error;
mod experts;
pub mod families;
pub mod gguf;
mod kv;
mod latent_tensors;
pub mod layers;
mod model;
pub mod plan;
pub mod registry;
pub mod rope;
mod sequence;
pub mod spec;
pub mod tensors;
mod workspace;

pub use error::ModelError;
pub use experts::open_experts;
pub use gguf::{gguf_file, gguf_files, open_checkpoint};
pub use layers::moe::{ForcedRoutes, RouteLog};
pub use model::{Forward, Model, ModelOptions, Row, Want};
pub use plan::{MemoryPlan, PlanOptions, ResidencyChoice};
pub use registry::{MoeArchAdapter, REGISTRY, detect_arch, spec_of};
pub use sequence::{Sequence, Snapshot};
pub use tensors::Resolved;
pub use workspace::Chunks;
