//! Tests of mach-format against files made here, byte by byte.

mod checkpoint;
mod formats;
mod gguf;
mod matrix;
mod outline;
mod pack;
mod quantise;
mod sidecar;
mod support;
