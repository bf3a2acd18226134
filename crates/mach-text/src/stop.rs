//! Stop strings in a stream of text, over any borders, never emitted.

use std::sync::Arc;

/// What a push found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scanned {
    /// Safe to emit.
    pub text: String,
    /// The stop string that was completed; the text before it is in `text`, nothing follows.
    pub stop: Option<String>,
}

/// Finds the first completed stop string. Text that may still become one is held back.
///
/// The match that completes first wins (of those, the longest), so the result does not depend on how the text was cut into pieces.
/// Cheap to clone: a copy is a point to come back to.
#[derive(Clone, Debug)]
pub struct StopMatcher {
    stops: Arc<[Stop]>,
    /// Bytes matched so far, per stop string.
    matched: Vec<usize>,
    held: String,
    done: bool,
}

/// One stop string as a Knuth-Morris-Pratt automaton.
#[derive(Debug)]
struct Stop {
    text: String,
    fallback: Vec<usize>,
}

impl Stop {
    fn new(text: &str) -> Self {
        let bytes = text.as_bytes();
        let mut fallback = vec![0; bytes.len()];
        let mut k = 0;
        for i in 1..bytes.len() {
            while k > 0 && bytes[i] != bytes[k] {
                k = fallback[k - 1];
            }
            if bytes[i] == bytes[k] {
                k += 1;
            }
            fallback[i] = k;
        }
        Self { text: text.to_owned(), fallback }
    }

    /// Bytes matched after one more byte; `matched` is not the whole string.
    fn step(&self, mut matched: usize, byte: u8) -> usize {
        let bytes = self.text.as_bytes();
        while matched > 0 && byte != bytes[matched] {
            matched = self.fallback[matched - 1];
        }
        matched + usize::from(byte == bytes[matched])
    }
}

impl StopMatcher {
    /// A matcher at the start of a text. Empty strings are left out.
    pub fn new<S: AsRef<str>>(stops: &[S]) -> Self {
        let stops: Arc<[Stop]> = stops.iter().map(AsRef::as_ref).filter(|s| !s.is_empty()).map(Stop::new).collect();
        Self { matched: vec![0; stops.len()], stops, held: String::new(), done: false }
    }

    /// Takes the next text. After a stop string everything is swallowed.
    pub fn push(&mut self, text: &str) -> Scanned {
        if self.done {
            return Scanned::default();
        }
        let before = self.held.len();
        self.held.push_str(text);
        for (i, byte) in text.bytes().enumerate() {
            let mut complete: Option<&Stop> = None;
            for (stop, matched) in self.stops.iter().zip(&mut self.matched) {
                *matched = stop.step(*matched, byte);
                if *matched == stop.text.len() && complete.is_none_or(|c| c.text.len() < stop.text.len()) {
                    complete = Some(stop);
                }
            }
            if let Some(stop) = complete {
                self.held.truncate(before + i + 1 - stop.text.len());
                self.done = true;
                return Scanned { text: std::mem::take(&mut self.held), stop: Some(stop.text.clone()) };
            }
        }
        let keep = self.matched.iter().copied().max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        Scanned { text: std::mem::replace(&mut self.held, rest), stop: None }
    }

    /// What was held back, when the text ends without a match. Nothing may be pushed after that.
    pub fn finish(&mut self) -> String {
        self.done = true;
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (String, Option<String>) {
        let mut matcher = StopMatcher::new(stops);
        let mut out = String::new();
        for piece in pieces {
            let scanned = matcher.push(piece);
            out.push_str(&scanned.text);
            if scanned.stop.is_some() {
                return (out, scanned.stop);
            }
        }
        out.push_str(&matcher.finish());
        (out, None)
    }

    /// Whatever the cut, the result is that of the whole text: nothing of a stop string leaks, nothing else is lost.
    #[test]
    fn every_cut_gives_the_same_text() {
        let cases: [(&[&str], &str, &str, Option<&str>); 9] = [
            (&["END"], "one END two", "one ", Some("END")),
            (&["END"], "one EN two EN", "one EN two EN", None),
            (&["aab"], "aaaab", "aa", Some("aab")),
            (&["abab c"], "ababab c!", "ab", Some("abab c")),
            (&["\n\n", "bc", "abcd"], "xabcd", "xa", Some("bc")),
            (&["c", "abc"], "xabc", "x", Some("abc")),
            (&["é🙂"], "aé🙁é🙂b", "aé🙁", Some("é🙂")),
            (&[], "free", "free", None),
            (&[""], "free", "free", None),
        ];
        for (stops, text, want, stop) in cases {
            let chars: Vec<(usize, char)> = text.char_indices().collect();
            for cuts in 0..1u32 << (chars.len() - 1).min(12) {
                let mut pieces = Vec::new();
                let mut start = 0;
                for (i, &(at, _)) in chars.iter().enumerate().skip(1) {
                    if cuts & (1 << (i - 1)) != 0 {
                        pieces.push(&text[start..at]);
                        start = at;
                    }
                }
                pieces.push(&text[start..]);
                assert_eq!(run(stops, &pieces), (want.to_owned(), stop.map(str::to_owned)), "{stops:?} {pieces:?}");
            }
        }
    }

    /// Text that cannot become a stop string is not held back.
    #[test]
    fn only_possible_beginnings_are_held() {
        let mut matcher = StopMatcher::new(&["###"]);
        assert_eq!(matcher.push("abc").text, "abc");
        assert_eq!(matcher.push("d#").text, "d");
        assert_eq!(matcher.push("x").text, "#x");
    }
}
