//! HTTP: the OpenAI API over a [`mach_session::Session`], with statistics and health.
//!
//! ```no_run
//! # fn example(session: mach_session::Session) -> Result<(), mach_server::ServerError> {
//! let server = mach_server::Server::bind(mach_server::ServerConfig::new("tiny"), session)?;
//! println!("listening on {}", server.url());
//! server.run()?;
//! # Ok(()) }
//! ```

mod chat;
mod completions;
mod error;
mod facts;
mod fields;
mod generate;
mod guards;
mod server;
mod sse;
mod wire;

pub use server::{Ended, Server, ServerConfig, ServerError, ShutdownHandle};
