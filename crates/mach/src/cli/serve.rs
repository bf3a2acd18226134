//! `mach serve`: the HTTP server.

use mach_server::{Server, ServerConfig, ServerError};
use serde_json::json;

use super::args::{EngineArgs, TraceArgs, on_interrupt};
use super::output;
use crate::Error;

#[derive(clap::Args)]
pub(super) struct Args {
    /// Model directory, or org/name in the Hugging Face cache [default: the built-in demonstration model]
    #[arg(env = "MACH_MODEL")]
    model: Option<String>,
    /// Name or address to listen on
    #[arg(long, default_value = "127.0.0.1", env = "MACH_HOST")]
    host: String,
    /// Port to listen on; 0 picks a free one
    #[arg(long, default_value_t = 8080, env = "MACH_PORT")]
    port: u16,
    /// Ask clients for this key (may be given several times) [default: any key is accepted]
    #[arg(long, value_name = "KEY", env = "MACH_API_KEY", hide_env_values = true)]
    api_key: Vec<String>,
    /// Name of the model in the API [default: its own]
    #[arg(long, value_name = "NAME", env = "MACH_ALIAS")]
    alias: Option<String>,
    /// Print a line of JSON on stdout when it listens
    #[arg(long)]
    ready_json: bool,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    trace: TraceArgs,
}

pub(super) fn run(args: Args) -> Result<(), Error> {
    // A port that is taken is said before a large model is loaded.
    if let Err(source) = std::net::TcpListener::bind((args.host.as_str(), args.port)) {
        return Err(server_error(ServerError::Bind { host: args.host, port: args.port, source }));
    }
    let trace = args.trace.start()?;
    let loaded = args.engine.load_traced(args.model.as_deref(), trace.as_ref())?;
    let mut config = ServerConfig::new(loaded.path.name.clone());
    config.alias = args.alias;
    config.host = args.host;
    config.port = args.port;
    config.api_keys = args.api_key;
    let server = Server::bind(config, loaded.session()?).map_err(server_error)?;
    let url = server.url();
    // Before anybody is told that it listens: the first signal lets running requests finish, the second ends at once.
    let shutdown = server.shutdown_handle();
    on_interrupt(move || shutdown.drain())?;
    eprintln!("listening on {url} (OpenAI API at {url}/v1)");
    if args.ready_json {
        output::json_line(&json!({"event": "ready", "url": url}));
    }
    server.run().map_err(server_error)?;
    Ok(trace.map_or(Ok(()), |t| t.finish())?)
}

fn server_error(e: ServerError) -> Error {
    Error::Input { code: e.code(), message: e.to_string() }
}
