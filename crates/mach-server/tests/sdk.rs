//! The official openai Python SDK against a server in this process.

mod common;

/// Everything that clients built on the SDK do works: see openai_sdk.py.
#[test]
fn the_openai_sdk_is_served() {
    let server = common::Fixture::start();
    common::sdk::check(&server.url(), &["--scripted"]);
}
