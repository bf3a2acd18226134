//! A server in this process whose engine is a script, and a plain HTTP client.
#![allow(dead_code)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mach_engine::{EngineHandle, EngineInfo, Event, FinishReason, Receipt, SharedStats, Submission, Verdict};
use mach_server::{Ended, Server, ServerConfig, ServerError, ShutdownHandle};
use mach_session::{Session, TextModel};
use serde_json::Value;

pub const CONTEXT: usize = 512;

/// What the scripted engine says at temperature 0. Above, words are drawn by seed.
pub const REPLY: &str = "The capital of France is Paris.";

pub fn tiny() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny")
}

/// Obeys the engine's contract without a model. Words in the prompt steer it: `FAIL` fails after two tokens, `LONG` talks until it is
/// stopped, `PREFILL` computes its prompt for ten seconds.
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
    let script = text.tokenizer().encode(REPLY, false).unwrap();
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
        config.handle_signals = false;
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
        let mut stream = TcpStream::connect(self.addr).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut head = format!("{method} {path} HTTP/1.1\r\nConnection: close\r\nContent-Length: {}\r\n", body.len());
        if !headers.iter().any(|(k, _)| k.eq_ignore_ascii_case("host")) {
            head.push_str(&format!("Host: {}\r\n", self.addr));
        }
        for (key, value) in headers {
            head.push_str(&format!("{key}: {value}\r\n"));
        }
        stream.write_all(format!("{head}\r\n{body}").as_bytes()).unwrap();
        stream
    }

    pub fn request(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Answer {
        Answer::read(self.send(method, path, headers, body))
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

/// A whole HTTP answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl Answer {
    pub fn read(stream: TcpStream) -> Self {
        let mut reader = BufReader::new(stream);
        let (status, headers) = read_head(&mut reader);
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).unwrap();
        let chunked = headers.iter().any(|(k, v)| k == "transfer-encoding" && v == "chunked");
        let body = if chunked { unchunk(&bytes) } else { bytes };
        Self { status, headers, body: String::from_utf8(body).unwrap() }
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(k, _)| k == name).map(|(_, v)| v.as_str())
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    /// The events of a stream; the closing mark is a string.
    pub fn events(&self) -> Vec<Value> {
        let data = self.body.split("\n\n").filter_map(|event| event.strip_prefix("data: "));
        data.map(|d| if d == "[DONE]" { Value::from(d) } else { serde_json::from_str(d).unwrap() }).collect()
    }
}

pub fn read_head(reader: &mut BufReader<TcpStream>) -> (u16, Vec<(String, String)>) {
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let status = line.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or_else(|| panic!("no status in {line:?}"));
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        match line.trim_end().split_once(": ") {
            Some((key, value)) => headers.push((key.to_lowercase(), value.to_owned())),
            None => return (status, headers),
        }
    }
}

fn unchunk(mut bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    while let Some(at) = bytes.windows(2).position(|w| w == b"\r\n") {
        let size = usize::from_str_radix(std::str::from_utf8(&bytes[..at]).unwrap(), 16).unwrap();
        out.extend_from_slice(&bytes[at + 2..at + 2 + size]);
        bytes = &bytes[at + 4 + size..];
    }
    out
}
