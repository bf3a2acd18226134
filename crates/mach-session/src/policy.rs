//! The text side of a row: tokens to text with stop strings, on the engine thread to stop it and at the sink to emit.

use std::collections::VecDeque;
use std::sync::Arc;

use mach_engine::{RowPolicy, Verdict};
use mach_text::{Scanned, StopMatcher, TextDecoder, Tokenizer};

/// Tokens in, text that is safe to emit out, until a stop string is complete.
#[derive(Clone)]
pub(crate) struct TextScan {
    decoder: TextDecoder,
    matcher: StopMatcher,
}

impl TextScan {
    /// `visible` are special tokens that are part of the text.
    pub(crate) fn new(tokenizer: Arc<Tokenizer>, visible: Arc<[u32]>, stops: &[String]) -> Self {
        Self { decoder: TextDecoder::showing(tokenizer, visible), matcher: StopMatcher::new(stops) }
    }

    pub(crate) fn push(&mut self, token: u32) -> Scanned {
        let text = self.decoder.push(token);
        self.matcher.push(&text)
    }

    /// The rest of the text, stop strings still honoured.
    pub(crate) fn finish(&mut self) -> Scanned {
        let tail = self.decoder.finish();
        let mut scanned = self.matcher.push(&tail);
        if scanned.stop.is_none() {
            scanned.text.push_str(&self.matcher.finish());
        }
        scanned
    }
}

/// States that are kept to go back to; going further back replays the row.
const HISTORY: usize = 64;

/// Ends a row when its text completes a stop string, and keeps sampling inside the vocabulary.
pub(crate) struct TextPolicy {
    start: TextScan,
    scan: TextScan,
    has_stops: bool,
    tokens: Vec<u32>,
    /// States before each of the last tokens.
    history: VecDeque<TextScan>,
    /// Rows from here on are padding of the vocabulary.
    mask_from: Option<usize>,
}

impl TextPolicy {
    /// `None` when there is nothing to do.
    pub(crate) fn new(scan: TextScan, has_stops: bool, mask_from: Option<usize>) -> Option<Self> {
        (has_stops || mask_from.is_some()).then(|| Self { start: scan.clone(), scan, has_stops, tokens: Vec::new(), history: VecDeque::new(), mask_from })
    }
}

impl RowPolicy for TextPolicy {
    fn mask(&mut self, logits: &mut [f32]) {
        if let Some(from) = self.mask_from
            && let Some(padding) = logits.get_mut(from..)
        {
            padding.fill(f32::NEG_INFINITY);
        }
    }

    fn accept(&mut self, token: u32) -> Verdict {
        if !self.has_stops {
            return Verdict::Continue;
        }
        if self.history.len() == HISTORY {
            self.history.pop_front();
        }
        self.history.push_back(self.scan.clone());
        self.tokens.push(token);
        if self.scan.push(token).stop.is_some() { Verdict::Stop } else { Verdict::Continue }
    }

    fn rollback(&mut self, n: usize) {
        if n == 0 || !self.has_stops {
            return;
        }
        self.tokens.truncate(self.tokens.len().saturating_sub(n));
        let kept = self.history.len().checked_sub(n).and_then(|at| self.history.drain(at..).next());
        self.scan = kept.unwrap_or_else(|| {
            self.history.clear();
            let mut scan = self.start.clone();
            for &token in &self.tokens {
                scan.push(token);
            }
            scan
        });
    }
}
