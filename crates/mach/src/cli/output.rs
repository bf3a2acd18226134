//! Printing: stdout that may close at any time, errors with codes, sizes, progress lines.

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::Error;
pub(super) use crate::units::{seconds, size};

/// Writes to stdout and flushes. A reader that went away ends the program quietly.
pub(super) fn print(text: &str) {
    let mut out = io::stdout().lock();
    if let Err(e) = out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        std::process::exit(if e.kind() == io::ErrorKind::BrokenPipe { 0 } else { 1 });
    }
}

/// A line on stdout.
pub(super) fn line(text: &str) {
    print(&format!("{text}\n"));
}

/// A JSON document on stdout.
pub(super) fn json_line(value: &Value) {
    line(&value.to_string());
}

/// Reports an error and gives its exit code.
pub(super) fn fail(error: &Error, json: bool) -> ExitCode {
    let (code, message) = (error.code(), error.to_string());
    if json {
        json_line(&json!({"error": {"code": code, "message": message}}));
    }
    eprintln!("error[{code}]: {message}");
    ExitCode::from(error.exit_code())
}

/// Reports what clap found: help and version on stdout, wrong usage on stderr with exit code 2.
pub(super) fn usage(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        print(&error.render().to_string());
        return ExitCode::SUCCESS;
    }
    let message = error.render().to_string();
    let message = message.strip_prefix("error: ").unwrap_or(&message).trim_end();
    if std::env::args().any(|a| a == "--json") {
        let first = message.lines().next().unwrap_or_default();
        json_line(&json!({"error": {"code": "usage", "message": first}}));
    }
    eprintln!("error[usage]: {message}");
    ExitCode::from(2)
}

/// Whether stderr shows escape sequences: a terminal, and NO_COLOR not set.
pub(super) fn fancy() -> bool {
    io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
}

/// One line of progress on stderr: rewritten on a terminal, a new one every few seconds elsewhere.
pub(super) struct ProgressLine {
    last: Instant,
    shown: bool,
    terminal: bool,
}

impl ProgressLine {
    pub(super) fn new() -> Self {
        Self { last: Instant::now(), shown: false, terminal: io::stderr().is_terminal() }
    }

    pub(super) fn show(&mut self, text: impl FnOnce() -> String) {
        let pause = if self.terminal { Duration::from_millis(100) } else { Duration::from_secs(3) };
        if self.last.elapsed() < pause {
            return;
        }
        self.last = Instant::now();
        if self.terminal {
            self.shown = true;
            eprint!("\r\x1b[2K{}", text());
        } else {
            eprintln!("{}", text());
        }
    }

    /// Takes the line away, or replaces it with a last one.
    pub(super) fn end(&mut self, last: Option<&str>) {
        if self.shown {
            eprint!("\r\x1b[2K");
            self.shown = false;
        }
        if let Some(last) = last {
            eprintln!("{last}");
        }
    }
}
