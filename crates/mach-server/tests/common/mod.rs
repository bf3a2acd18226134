//! A server in this process whose engine is a script.
#![allow(dead_code)]

pub mod http;
pub mod sdk;

use std::io::BufReader;
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mach_engine::{EngineHandle, EngineInfo, Event, FinishReason, Receipt, SharedStats, Submission, Verdict};
use mach_server::{Ended, Server, ServerConfig, ServerError, ShutdownHandle};
use mach_session::{Session, TextModel};
use serde_json::Value;

pub use http::Answer;

pub const CONTEXT: usize = 512;

/// What the scripted engine says at temperature 0. Above, words are drawn by seed.
pub const REPLY: &str = "The capital of France is Paris.";

pub fn tiny() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny")
}

/// Obeys the engine's contract without a model. Words in the prompt steer it: `FAIL` fails after two tokens, `LONG` talks until it is
/// stopped, `PREFILL` computes its prompt for ten seconds, and what stands between
/// `SAY(` and `)SAY` is said until a tool has answered.
fn engine(stats: SharedStats, submissions: std::sync::mpsc::Receiver<Submission>, text: Arc<TextModel>) {
    for mut submission in submissions {
        stats.with(|s| {
            s.queued -= 1;
            s.running += 1;
        });
        let outcome = run(&mut submission, &text, &stats);
        stats.with(|s| {
            s.running -= 1;
            match outcome {
                None => s.failed += 1,
                Some(FinishReason::Cancelled) => s.cancelled += 1,
                Some(_) => s.finished += 1,
            }
        });
    }
}

fn run(submission: &mut Submission, text: &TextModel, stats: &SharedStats) -> Option<FinishReason> {
    let request = &mut submission.request;
    let (sink, total, queue_ms) = (&mut submission.sink, request.prompt.len(), submission.at.elapsed().as_secs_f64() * 1e3);
    let prompt = text.tokenizer().decode(&request.prompt);
    let finish = |sink: &mut mach_engine::EventSink, reason, tokens| {
        let receipt = Receipt {
            prompt_tokens: total,
            cached_tokens: total / 2,
            completion_tokens: tokens,
            queue_ms,
            prefill_ms: 2.0,
            decode_ms: 4.0,
            ..Receipt::default()
        };
        stats.with(|s| s.prompt_tokens += total as u64);
        sink(Event::Finished { reason, receipt });
        Some(reason)
    };
    let slow = if prompt.contains("PREFILL") { 1000 } else { 1 };
    for step in 1..=slow {
        if submission.cancel.is_cancelled() {
            return finish(sink, FinishReason::Cancelled, 0);
        }
        sink(Event::Prefill { done: total * step / slow, total, cached: 0 });
        if slow > 1 {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    let asked = prompt.split_once("SAY(").and_then(|(_, rest)| rest.split_once(")SAY"));
    let said = asked.filter(|(_, rest)| !rest.contains("<tool_response>")).map(|(said, _)| said);
    let script = text.tokenizer().encode(said.unwrap_or(REPLY), false).unwrap();
    let limit = request.max_tokens.unwrap_or(usize::MAX).min(CONTEXT - total);
    let mut tokens = 0;
    loop {
        if submission.cancel.is_cancelled() {
            return finish(sink, FinishReason::Cancelled, tokens);
        }
        if tokens == limit {
            return finish(sink, FinishReason::Length, tokens);
        }
        if prompt.contains("FAIL") && tokens == 2 {
            sink(Event::Failed { code: "checksum-mismatch", message: "expert 3 of layer 1 is damaged".into() });
            return None;
        }
        let id = if prompt.contains("LONG") {
            std::thread::sleep(Duration::from_millis(5));
            script[tokens % script.len()]
        } else if request.sampling.temperature > 0.0 {
            // Any spread of the key will do; 300.. are words of the tiny vocabulary.
            let mixed = (request.sampling.seed ^ tokens as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33;
            if tokens == 12 { 4088 } else { 300 + (mixed % 3000) as u32 }
        } else {
            *script.get(tokens).unwrap_or(&4088)
        };
        if request.stop_ids.contains(&id) {
            return finish(sink, FinishReason::Stop, tokens);
        }
        let verdict = request.policy.as_mut().map_or(Verdict::Continue, |p| p.accept(id));
        tokens += 1;
        stats.with(|s| s.generated_tokens += 1);
        sink(Event::Token { id, logits: None });
        if verdict == Verdict::Stop {
            return finish(sink, FinishReason::Stop, tokens);
        }
    }
}

/// A running server, drained when dropped.
pub struct Fixture {
    pub addr: SocketAddr,
    pub session: Session,
    pub shutdown: ShutdownHandle,
    thread: Option<JoinHandle<Result<Ended, ServerError>>>,
}

impl Fixture {
    pub fn start() -> Self {
        Self::with(|_| {})
    }

    pub fn with(configure: impl FnOnce(&mut ServerConfig)) -> Self {
        let text = Arc::new(TextModel::open(&tiny()).unwrap());
        let (handle, submissions) = EngineHandle::new(EngineInfo {
            arch: "scripted".into(),
            context: CONTEXT,
            context_train: 8192,
            vocab: 4096,
            parameters: 30,
            weight_bytes: 60,
            signals: vec![("expert_residency".into(), "streaming".into()), ("arch".into(), "scripted".into())],
        });
        let (stats, engine_text) = (handle.shared_stats(), text.clone());
        std::thread::spawn(move || engine(stats, submissions, engine_text));
        Self::serve(Session::new(handle, text), configure)
    }

    pub fn serve(session: Session, configure: impl FnOnce(&mut ServerConfig)) -> Self {
        let mut config = ServerConfig::new("org/tiny");
        config.port = 0;
        configure(&mut config);
        let server = Server::bind(config, session.clone()).unwrap();
        let (addr, shutdown) = (server.local_addr(), server.shutdown_handle());
        Self { addr, session, shutdown, thread: Some(std::thread::spawn(move || server.run())) }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// Waits for the end.
    pub fn join(mut self) -> Ended {
        self.thread.take().unwrap().join().unwrap().unwrap()
    }

    /// Opens a connection and sends a request.
    pub fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> TcpStream {
        let mut stream = http::connect(self.addr);
        http::send(&mut stream, method, path, &[&[("Connection", "close")], headers].concat(), body);
        stream
    }

    pub fn request(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Answer {
        Answer::read(&mut BufReader::new(self.send(method, path, headers, body)))
    }

    pub fn get(&self, path: &str) -> Answer {
        self.request("GET", path, &[], "")
    }

    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.request("POST", path, &[], &body.to_string())
    }

    /// Waits until the statistics satisfy a condition.
    pub fn wait_for(&self, what: &str, condition: impl Fn(&mach_engine::Stats) -> bool) {
        let start = Instant::now();
        while !condition(&self.session.engine().stats()) {
            assert!(start.elapsed() < Duration::from_secs(10), "{what}: {:?}", self.session.engine().stats());
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.shutdown.abort();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
