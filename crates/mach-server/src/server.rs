//! Listening, routing and ending.

use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::routing::{get, post};
use axum::serve::ListenerExt;
use mach_session::Session;
use tokio::sync::watch;

use crate::generate::unix_time;
use crate::{chat, completions, facts, guards};

/// How a server listens and what it calls itself.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// Name or address to listen on.
    pub host: String,
    /// Port; 0 picks a free one.
    pub port: u16,
    /// Keys of which requests must carry one; empty accepts everybody.
    pub api_keys: Vec<String>,
    /// What the model is called in `/v1/models`.
    pub model_id: String,
    /// Another name for it, then shown instead.
    pub alias: Option<String>,
    /// Silence in a stream after which a comment is sent.
    pub keep_alive: Duration,
}

impl ServerConfig {
    /// Loopback, port 8080, no key.
    pub fn new(model_id: impl Into<String>) -> Self {
        Self { host: "127.0.0.1".to_owned(), port: 8080, api_keys: Vec::new(), model_id: model_id.into(), alias: None, keep_alive: Duration::from_secs(5) }
    }
}

/// Errors of the server itself.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The address cannot be listened on.
    #[error("cannot listen on {host}:{port}: {source}; choose another --port or --host")]
    Bind {
        /// As configured.
        host: String,
        /// As configured.
        port: u16,
        /// Why.
        source: std::io::Error,
    },
    /// The runtime or the listener failed.
    #[error("the server failed: {0}")]
    Io(#[from] std::io::Error),
}

impl ServerError {
    /// A stable kebab-case code.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Bind { .. } => "bind-failed",
            Self::Io(_) => "server-failed",
        }
    }
}

/// How a server ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Every request was answered.
    Drained,
    /// [`ShutdownHandle::abort`] cut requests off.
    Aborted,
}

/// Shared by all handlers.
#[derive(Clone)]
pub(crate) struct App(Arc<AppState>);

pub(crate) struct AppState {
    pub(crate) session: Session,
    pub(crate) config: ServerConfig,
    pub(crate) loopback: bool,
    pub(crate) started: Instant,
    pub(crate) started_unix: u64,
}

impl std::ops::Deref for App {
    type Target = AppState;

    fn deref(&self) -> &AppState {
        &self.0
    }
}

impl AppState {
    /// The name that is shown.
    pub(crate) fn model_id(&self) -> &str {
        self.config.alias.as_deref().unwrap_or(&self.config.model_id)
    }

    /// Whether `id` is one of the model's names.
    pub(crate) fn is_served(&self, id: &str) -> bool {
        id == self.config.model_id || self.config.alias.as_deref() == Some(id)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Serving,
    Draining,
    Aborting,
}

/// A server that listens already: connections wait until [`Server::run`] takes them.
pub struct Server {
    listener: TcpListener,
    addr: SocketAddr,
    router: Router,
    phase: watch::Sender<Phase>,
}

/// Ends a server from another thread, such as one that watches signals.
#[derive(Clone)]
pub struct ShutdownHandle(watch::Sender<Phase>);

impl ShutdownHandle {
    /// Takes no new connections and ends when the running requests are answered.
    pub fn drain(&self) {
        raise(&self.0, Phase::Draining);
    }

    /// Ends now.
    pub fn abort(&self) {
        raise(&self.0, Phase::Aborting);
    }
}

fn raise(phase: &watch::Sender<Phase>, to: Phase) {
    phase.send_if_modified(|now| {
        let later = to > *now;
        *now = to.max(*now);
        later
    });
}

async fn reached(mut phase: watch::Receiver<Phase>, least: Phase) {
    // An error means that the server itself is gone.
    let _ = phase.wait_for(|now| *now >= least).await;
}

impl Server {
    /// Binds the address. The engine behind `session` must be running.
    ///
    /// # Errors
    /// [`ServerError::Bind`].
    pub fn bind(config: ServerConfig, session: Session) -> Result<Self, ServerError> {
        let bind = || {
            let addrs: Vec<SocketAddr> = (config.host.as_str(), config.port).to_socket_addrs()?.collect();
            let listener = TcpListener::bind(addrs.as_slice())?;
            listener.set_nonblocking(true)?;
            Ok((listener.local_addr()?, listener))
        };
        let (addr, listener) = bind().map_err(|source| ServerError::Bind { host: config.host.clone(), port: config.port, source })?;
        let app = App(Arc::new(AppState { session, loopback: addr.ip().is_loopback(), started: Instant::now(), started_unix: unix_time(), config }));
        Ok(Self { listener, addr, router: router(app), phase: watch::Sender::new(Phase::Serving) })
    }

    /// The address, with the port that was picked.
    pub fn local_addr(&self) -> SocketAddr {
        self.addr
    }

    /// `http://ADDRESS`.
    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// Ends the server from elsewhere.
    pub fn shutdown_handle(&self) -> ShutdownHandle {
        ShutdownHandle(self.phase.clone())
    }

    /// Serves until a [`ShutdownHandle`] ends it. Owns its runtime; call it from a plain thread.
    ///
    /// # Errors
    /// [`ServerError::Io`].
    pub fn run(self) -> Result<Ended, ServerError> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).thread_name("mach-http").enable_all().build()?;
        let ended = runtime.block_on(self.serve());
        // Tasks of cut-off requests must not hold the process.
        runtime.shutdown_background();
        ended
    }

    async fn serve(self) -> Result<Ended, ServerError> {
        let Self { listener, router, phase, .. } = self;
        let listener = tokio::net::TcpListener::from_std(listener)?.tap_io(|stream| {
            // Tokens are small packets: without this they arrive in bursts.
            if let Err(e) = stream.set_nodelay(true) {
                tracing::debug!("TCP_NODELAY: {e}");
            }
        });
        let drain = reached(phase.subscribe(), Phase::Draining);
        let serving = axum::serve(listener, router).with_graceful_shutdown(drain).into_future();
        tokio::select! {
            served = serving => { served?; Ok(Ended::Drained) }
            () = reached(phase.subscribe(), Phase::Aborting) => Ok(Ended::Aborted),
        }
    }
}

fn router(app: App) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat::handle))
        .route("/v1/completions", post(completions::handle))
        .route("/v1/models", get(facts::models))
        .route("/v1/models/{*id}", get(facts::model))
        .route("/v1/capabilities", get(facts::capabilities))
        .route("/v1/stats", get(facts::stats))
        .route("/health", get(facts::health))
        .route("/v1/health", get(facts::health))
        .route("/healthz", get(facts::health))
        .fallback(guards::no_route)
        .method_not_allowed_fallback(guards::wrong_method)
        .layer(axum::middleware::from_fn_with_state(app.clone(), guards::check))
        .with_state(app)
}
