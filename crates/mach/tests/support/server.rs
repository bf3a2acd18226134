//! `mach serve` as a process, and clients on plain sockets.

use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

#[path = "../../../mach-server/tests/common/http.rs"]
pub mod http;

use http::Answer;

pub const CHAT: &str = "/v1/chat/completions";

/// A running server, killed when dropped.
pub struct Server {
    child: Child,
    pub addr: SocketAddr,
}

impl Server {
    /// Starts it on a free port, with these arguments more, and waits until it listens.
    pub fn start(args: &[&str]) -> Self {
        let all = [&["serve", "--port", "0", "--ready-json"][..], args].concat();
        let mut child = super::command(&all).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let ready: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(ready["event"], "ready");
        let addr = ready["url"].as_str().and_then(|url| url.strip_prefix("http://")).unwrap().parse().unwrap();
        Self { child, addr }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// Opens a connection and sends a request whose answer ends the connection.
    pub fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> TcpStream {
        let mut stream = http::connect(self.addr);
        http::send(&mut stream, method, path, &[&[("Connection", "close")], headers].concat(), body);
        stream
    }

    pub fn get(&self, path: &str) -> Answer {
        Answer::read(&mut BufReader::new(self.send("GET", path, &[], "")))
    }

    pub fn post(&self, path: &str, body: &Value) -> Answer {
        Answer::read(&mut BufReader::new(self.send("POST", path, &[], &body.to_string())))
    }

    /// A chat answer that must be one.
    pub fn chat(&self, body: &Value) -> Value {
        let answer = self.post(CHAT, body);
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.json()
    }

    /// Starts a stream and reads it up to its `n`th piece of text. The rest comes from what is returned.
    pub fn stream_until(&self, body: &Value, n: usize) -> BufReader<TcpStream> {
        let mut reader = BufReader::new(self.send("POST", CHAT, &[], &body.to_string()));
        assert_eq!(http::read_head(&mut reader).0, 200);
        for _ in 0..n {
            http::read_chunk(&mut reader).expect("the stream ended early");
        }
        reader
    }

    pub fn stats(&self) -> Value {
        self.get("/v1/stats").json()
    }

    /// Waits until a number of the statistics is `value`, and gives the time that it took.
    pub fn wait_for(&self, pointer: &str, value: u64) -> Duration {
        self.wait_until(&format!("{pointer} is {value}"), |stats| stats.pointer(pointer).and_then(Value::as_u64) == Some(value))
    }

    pub fn wait_until(&self, what: &str, condition: impl Fn(&Value) -> bool) -> Duration {
        let start = Instant::now();
        loop {
            let stats = self.stats();
            if condition(&stats) {
                return start.elapsed();
            }
            assert!(start.elapsed() < Duration::from_secs(30), "waited too long until {what}: {stats}");
            std::thread::sleep(Duration::from_millis(3));
        }
    }

    /// SIGTERM.
    pub fn terminate(&self) {
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
    }

    /// Waits for the end of the process.
    pub fn wait(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(start.elapsed() < Duration::from_secs(60), "the server does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
