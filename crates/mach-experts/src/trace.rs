//! Traces: which experts every step of a run used, with what it cost, written compactly while the run goes on.
//!
//! A file is `MACHTRC1`, the header, events, and an end that carries a hash of everything before it. Numbers are LEB128
//! varints, times are microseconds:
//!
//! ```text
//! header  layers experts top_k slots slot_bytes other_bytes, then the model's name: length, UTF-8
//! 1 pass    rows                                  a forward pass begins
//! 2 step    layer n ids gap lease stall misses    experts of a decode step; ids ascending: the first, then differences less 1
//! 3 stream  like step                             experts of a prefill
//! 4 retired n                                     slots that the bank gave up
//! 5 mark    0 other, 1 warm-up, 2 a measured run  what the passes that follow belong to
//! 0 end     FNV-1a 64 of all bytes before, 8 bytes little-endian
//! ```

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

const MAGIC: &[u8; 8] = b"MACHTRC1";
/// Bytes gathered before they are written.
const BUFFER: usize = 1 << 18;

/// Errors of trace files.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TraceError {
    /// The system refused.
    #[error("cannot {action} the trace {path}: {source}")]
    Io {
        /// `create`, `write`, `read`.
        action: &'static str,
        /// File.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// Not a trace, or not one that this version reads.
    #[error("{path} is not a trace of this version of mach; record one with `mach generate --trace {path}`")]
    NotATrace {
        /// File.
        path: PathBuf,
    },
    /// The end is missing: the run was killed, or the file was cut.
    #[error("the trace {path} ends at byte {at} without an end mark: the run that wrote it did not finish, or the file was cut; record it again")]
    Truncated {
        /// File.
        path: PathBuf,
        /// Bytes that are there.
        at: usize,
    },
    /// The bytes are not those that were written.
    #[error("the trace {path} is damaged ({reason}); record it again")]
    Damaged {
        /// File.
        path: PathBuf,
        /// What does not fit.
        reason: String,
    },
}

impl TraceError {
    /// Stable kebab-case code.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Io { .. } => "trace-io",
            Self::NotATrace { .. } => "trace-unknown",
            Self::Truncated { .. } => "trace-truncated",
            Self::Damaged { .. } => "trace-damaged",
        }
    }
}

/// The model and the bank of a recorded run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TraceHeader {
    /// MoE layers.
    pub layers: usize,
    /// Experts of a layer.
    pub experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// Slots, scratch included.
    pub slots: usize,
    /// Bytes of a slot.
    pub slot_bytes: u64,
    /// Bytes that the plan gave to everything but the bank.
    pub other_bytes: u64,
    /// Model.
    pub model: String,
}

/// What passes belong to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Phase {
    /// Prompts, or a run without phases.
    #[default]
    Other,
    /// Before the measured runs.
    WarmUp,
    /// The next measured run.
    Measured,
}

/// One lease of experts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// Index among the MoE layers.
    pub layer: usize,
    /// Ascending, distinct.
    pub experts: Vec<u32>,
    /// Of a prefill: in ascending order through scratch slots.
    pub ordered: bool,
    /// Time since the lease before.
    pub gap: Duration,
    /// Time from the lease to its end.
    pub lease: Duration,
    /// Of it waiting for reads.
    pub stall: Duration,
    /// Experts that were not in the bank.
    pub misses: usize,
}

/// What happened, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TraceEvent {
    /// A forward pass of so many rows begins.
    Pass(usize),
    /// Experts of one layer.
    Access(Access),
    /// Slots that the bank gave up.
    Retired(usize),
    /// What follows.
    Mark(Phase),
}

/// A trace that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    /// Model and bank.
    pub header: TraceHeader,
    /// Events.
    pub events: Vec<TraceEvent>,
}

/// Writes a trace. Clones write the same file.
#[derive(Clone, Debug)]
pub struct Recorder(Arc<Mutex<Writer>>);

#[derive(Debug)]
struct Writer {
    file: File,
    path: PathBuf,
    buffer: Vec<u8>,
    hash: u64,
    failed: Option<io::Error>,
    /// The lease under way: its experts as they will be written, when it began, stall at that time, misses.
    open: Vec<u8>,
    began: Instant,
    ended: Instant,
    stall: Duration,
    misses: usize,
}

impl Recorder {
    /// Creates the file, so that a wrong path is told before a model is loaded.
    ///
    /// # Errors
    /// [`TraceError::Io`].
    pub fn create(path: &Path) -> Result<Self, TraceError> {
        let file = File::create(path).map_err(|source| TraceError::Io { action: "create", path: path.to_owned(), source })?;
        let now = Instant::now();
        Ok(Self(Arc::new(Mutex::new(Writer {
            file,
            path: path.to_owned(),
            buffer: MAGIC.to_vec(),
            hash: FNV_START,
            failed: None,
            open: Vec::new(),
            began: now,
            ended: now,
            stall: Duration::ZERO,
            misses: 0,
        }))))
    }

    /// Writes the header; comes before every event.
    pub fn begin(&self, header: &TraceHeader) {
        self.with(|w| {
            let h = header;
            for n in [h.layers as u64, h.experts as u64, h.top_k as u64, h.slots as u64, h.slot_bytes, h.other_bytes, h.model.len() as u64] {
                put(&mut w.buffer, n);
            }
            w.buffer.extend_from_slice(h.model.as_bytes());
        });
    }

    /// The passes that follow belong to `phase`.
    pub fn mark(&self, phase: Phase) {
        self.with(|w| w.buffer.extend([5, phase as u8]));
    }

    /// A forward pass begins.
    pub(crate) fn pass(&self, rows: usize) {
        self.with(|w| {
            w.buffer.push(1);
            put(&mut w.buffer, rows as u64);
        });
    }

    /// Slots were given up.
    pub(crate) fn retired(&self, slots: usize) {
        self.with(|w| {
            w.buffer.push(4);
            put(&mut w.buffer, slots as u64);
        });
    }

    /// A lease begins. `stall` is the store's counter.
    pub(crate) fn lease(&self, layer: usize, experts: &[u32], ordered: bool, misses: usize, stall: Duration) {
        self.with(|w| {
            w.open.clear();
            w.open.push(if ordered { 3 } else { 2 });
            put(&mut w.open, layer as u64);
            put(&mut w.open, experts.len() as u64);
            let mut next = 0;
            for &id in experts {
                put(&mut w.open, u64::from(id) - next);
                next = u64::from(id) + 1;
            }
            (w.began, w.stall, w.misses) = (Instant::now(), stall, misses);
        });
    }

    /// The lease is over.
    pub(crate) fn released(&self, stall: Duration) {
        self.with(|w| {
            let now = Instant::now();
            let times = [w.began - w.ended, now - w.began, stall.saturating_sub(w.stall)];
            w.buffer.append(&mut w.open);
            times.iter().for_each(|t| put(&mut w.buffer, t.as_micros() as u64));
            put(&mut w.buffer, w.misses as u64);
            w.ended = now;
        });
    }

    /// Writes what is left and the end mark.
    ///
    /// # Errors
    /// The first write that failed.
    pub fn finish(&self) -> Result<(), TraceError> {
        self.with(|w| {
            w.buffer.push(0);
            w.flush();
            let hash = w.hash.to_le_bytes();
            let written = w.failed.take().map_or_else(|| w.file.write_all(&hash), Err);
            written.map_err(|source| TraceError::Io { action: "write", path: w.path.clone(), source })
        })
    }

    fn with<T>(&self, f: impl FnOnce(&mut Writer) -> T) -> T {
        let mut writer = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let out = f(&mut writer);
        if writer.buffer.len() >= BUFFER {
            writer.flush();
        }
        out
    }
}

impl Writer {
    /// A failure is kept for [`Recorder::finish`]: a run does not end because of its trace.
    fn flush(&mut self) {
        self.hash = fnv(self.hash, &self.buffer);
        if self.failed.is_none() {
            self.failed = self.file.write_all(&self.buffer).err();
        }
        self.buffer.clear();
    }
}

const FNV_START: u64 = 0xcbf2_9ce4_8422_2325;

fn fnv(start: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(start, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

fn put(out: &mut Vec<u8>, mut n: u64) {
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
}

/// Numbers from the front of what is left.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Cursor<'_> {
    fn byte(&mut self) -> Option<u8> {
        let byte = *self.bytes.get(self.at)?;
        self.at += 1;
        Some(byte)
    }

    fn number(&mut self) -> Option<u64> {
        let mut n = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            n |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(n);
            }
        }
        None
    }

    fn size(&mut self) -> Option<usize> {
        self.number().and_then(|n| usize::try_from(n).ok())
    }

    fn micros(&mut self) -> Option<Duration> {
        self.number().map(Duration::from_micros)
    }
}

impl Trace {
    /// Reads and checks a trace.
    ///
    /// # Errors
    /// A file that cannot be read, is no trace, was cut or damaged.
    pub fn read(path: &Path) -> Result<Self, TraceError> {
        let bytes = fs::read(path).map_err(|source| TraceError::Io { action: "read", path: path.to_owned(), source })?;
        Self::parse(path, &bytes)
    }

    fn parse(path: &Path, bytes: &[u8]) -> Result<Self, TraceError> {
        if !bytes.starts_with(MAGIC) {
            return Err(TraceError::NotATrace { path: path.to_owned() });
        }
        let mut cursor = Cursor { bytes, at: MAGIC.len() };
        let truncated = || TraceError::Truncated { path: path.to_owned(), at: bytes.len() };
        let damaged = |reason: String| TraceError::Damaged { path: path.to_owned(), reason };
        let header = header(&mut cursor).ok_or_else(truncated)?.map_err(damaged)?;
        let mut events = Vec::new();
        loop {
            let at = cursor.at;
            let wrong = |what: &str| damaged(format!("{what} at byte {at}"));
            let event = match cursor.byte().ok_or_else(truncated)? {
                0 => break,
                1 => TraceEvent::Pass(cursor.size().ok_or_else(truncated)?),
                tag @ (2 | 3) => TraceEvent::Access(access(&mut cursor, &header, tag == 3).ok_or_else(truncated)?.map_err(wrong)?),
                4 => TraceEvent::Retired(cursor.size().ok_or_else(truncated)?),
                5 => TraceEvent::Mark(match cursor.byte().ok_or_else(truncated)? {
                    0 => Phase::Other,
                    1 => Phase::WarmUp,
                    2 => Phase::Measured,
                    _ => return Err(wrong("an unknown phase")),
                }),
                _ => return Err(wrong("an unknown event")),
            };
            events.push(event);
        }
        let (before, hash) = bytes.split_at(cursor.at);
        if hash.len() < 8 {
            return Err(truncated());
        }
        if hash != fnv(FNV_START, before).to_le_bytes() {
            return Err(damaged("its checksum is wrong".to_owned()));
        }
        Ok(Self { header, events })
    }

    /// The accesses alone.
    pub fn accesses(&self) -> impl Iterator<Item = &Access> {
        self.events.iter().filter_map(|e| if let TraceEvent::Access(a) = e { Some(a) } else { None })
    }
}

/// `None`: the file ends before; an inner error: it makes no sense.
fn header(c: &mut Cursor<'_>) -> Option<Result<TraceHeader, String>> {
    let (layers, experts, top_k, slots) = (c.size()?, c.size()?, c.size()?, c.size()?);
    let (slot_bytes, other_bytes, length) = (c.number()?, c.number()?, c.size()?);
    let name = c.bytes.get(c.at..c.at.checked_add(length)?)?;
    c.at += length;
    // Sizes far beyond any model would only exhaust memory later.
    if layers > 1 << 16 || experts > 1 << 16 || slots > layers * experts || top_k > experts {
        return Some(Err(format!("{layers} layers of {experts} experts, top-{top_k}, {slots} slots")));
    }
    let model = String::from_utf8_lossy(name).into_owned();
    Some(Ok(TraceHeader { layers, experts, top_k, slots, slot_bytes, other_bytes, model }))
}

fn access(c: &mut Cursor<'_>, header: &TraceHeader, ordered: bool) -> Option<Result<Access, &'static str>> {
    let (layer, n) = (c.size()?, c.size()?);
    if layer >= header.layers || n > header.experts {
        return Some(Err("a layer or a number of experts that the model does not have"));
    }
    let mut experts = Vec::with_capacity(n);
    let mut next = 0u64;
    for _ in 0..n {
        let id = next.saturating_add(c.number()?);
        if id >= header.experts as u64 {
            return Some(Err("an expert that the model does not have"));
        }
        experts.push(id as u32);
        next = id + 1;
    }
    let (gap, lease, stall, misses) = (c.micros()?, c.micros()?, c.micros()?, c.size()?);
    if misses > n {
        return Some(Err("more misses than experts"));
    }
    Some(Ok(Access { layer, experts, ordered, gap, lease, stall, misses }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> TraceHeader {
        TraceHeader { layers: 3, experts: 300, top_k: 8, slots: 100, slot_bytes: 1 << 21, other_bytes: 5 << 30, model: "größe".to_owned() }
    }

    fn recorded(path: &Path) -> Vec<u8> {
        let recorder = Recorder::create(path).unwrap();
        recorder.begin(&header());
        recorder.mark(Phase::Measured);
        recorder.pass(1);
        recorder.lease(2, &[0, 7, 8, 299], false, 3, Duration::from_millis(5));
        recorder.released(Duration::from_millis(9));
        recorder.retired(2);
        recorder.lease(0, &[], true, 0, Duration::ZERO);
        recorder.released(Duration::ZERO);
        recorder.finish().unwrap();
        fs::read(path).unwrap()
    }

    fn scratch(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("mach-trace-{}-{name}", std::process::id()))
    }

    /// Protects the format: what is written is read back.
    #[test]
    fn a_trace_comes_back() {
        let path = scratch("back");
        recorded(&path);
        let trace = Trace::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        assert_eq!(trace.header, header());
        assert_eq!([&trace.events[0], &trace.events[1], &trace.events[3]], [&TraceEvent::Mark(Phase::Measured), &TraceEvent::Pass(1), &TraceEvent::Retired(2)]);
        let accesses: Vec<&Access> = trace.accesses().collect();
        assert_eq!((accesses[0].layer, accesses[0].ordered, accesses[0].misses), (2, false, 3));
        assert_eq!((&accesses[0].experts[..], accesses[0].stall), (&[0, 7, 8, 299][..], Duration::from_millis(4)));
        assert!(accesses[1].ordered && accesses[1].experts.is_empty());
    }

    /// Protects replays from nonsense: every cut and every flipped bit is a named error, never a panic or a wrong trace.
    #[test]
    fn cuts_and_flips_are_named() {
        let path = scratch("bad");
        let whole = recorded(&path);
        for end in 0..whole.len() {
            let code = Trace::parse(&path, &whole[..end]).unwrap_err().code();
            assert_eq!(code, if end < 8 { "trace-unknown" } else { "trace-truncated" }, "cut at {end}");
        }
        for at in 0..whole.len() {
            for bit in 0..8 {
                let mut bytes = whole.clone();
                bytes[at] ^= 1 << bit;
                assert!(Trace::parse(&path, &bytes).is_err(), "bit {bit} of byte {at}");
            }
        }
        fs::remove_file(&path).unwrap();
        assert_eq!(Trace::read(&path).unwrap_err().code(), "trace-io");
    }
}
