//! A plain HTTP/1.1 client for tests: what is on the wire, nothing hidden.
#![allow(dead_code, reason = "every test binary uses its own part")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::Value;

/// A connection; reads that take longer than any answer should fail the test.
pub fn connect(addr: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(addr).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    stream
}

/// Sends a request. `Host` is the peer's address unless the headers say otherwise; an empty body announces its length too.
pub fn send(stream: &mut TcpStream, method: &str, path: &str, headers: &[(&str, &str)], body: &str) {
    let mut head = format!("{method} {path} HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: {}\r\n", body.len());
    if !headers.iter().any(|(k, _)| k.eq_ignore_ascii_case("host")) {
        head.push_str(&format!("Host: {}\r\n", stream.peer_addr().unwrap()));
    }
    for (key, value) in headers {
        head.push_str(&format!("{key}: {value}\r\n"));
    }
    stream.write_all(format!("{head}\r\n{body}").as_bytes()).unwrap();
}

/// A whole HTTP answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl Answer {
    /// Reads one answer and leaves the connection where the next one starts.
    pub fn read(reader: &mut BufReader<TcpStream>) -> Self {
        let (status, headers) = read_head(reader);
        let mut answer = Self { status, headers, body: String::new() };
        let mut bytes = Vec::new();
        if answer.header("transfer-encoding") == Some("chunked") {
            while let Some(chunk) = read_chunk(reader) {
                bytes.extend(chunk);
            }
        } else if let Some(length) = answer.header("content-length") {
            bytes.resize(length.parse().unwrap(), 0);
            reader.read_exact(&mut bytes).unwrap();
        } else {
            reader.read_to_end(&mut bytes).unwrap();
        }
        answer.body = String::from_utf8(bytes).unwrap();
        answer
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

/// Status and headers, names in lower case.
pub fn read_head(reader: &mut BufReader<TcpStream>) -> (u16, Vec<(String, String)>) {
    let line = read_line(reader);
    let status = line.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or_else(|| panic!("no status in {line:?}"));
    let mut headers = Vec::new();
    loop {
        match read_line(reader).split_once(": ") {
            Some((key, value)) => headers.push((key.to_lowercase(), value.to_owned())),
            None => return (status, headers),
        }
    }
}

/// One chunk of a chunked body as it arrives; `None` after the last.
pub fn read_chunk(reader: &mut BufReader<TcpStream>) -> Option<Vec<u8>> {
    let line = read_line(reader);
    let size = usize::from_str_radix(&line, 16).unwrap_or_else(|_| panic!("{line:?} is no chunk size: the body was cut off"));
    let mut chunk = vec![0; size + 2];
    reader.read_exact(&mut chunk).unwrap();
    assert_eq!(&chunk[size..], b"\r\n");
    chunk.truncate(size);
    (size > 0).then_some(chunk)
}

fn read_line(reader: &mut BufReader<TcpStream>) -> String {
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    line.trim_end().to_owned()
}
