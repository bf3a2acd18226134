//! Stop strings in a stream of text, over any borders, never emitted.

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
#[derive(Clone, Debug)]
pub struct StopMatcher {
    stops: Vec<Stop>,
    held: String,
    done: bool,
}

/// One stop string as a Knuth-Morris-Pratt automaton.
#[derive(Clone, Debug)]
struct Stop {
    bytes: Vec<u8>,
    fallback: Vec<usize>,
    matched: usize,
}

impl Stop {
    fn new(text: &str) -> Self {
        let bytes = text.as_bytes().to_vec();
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
        Self { bytes, fallback, matched: 0 }
    }

    fn is_complete(&self) -> bool {
        self.matched == self.bytes.len()
    }

    /// Takes one byte.
    fn step(&mut self, byte: u8) {
        while self.matched > 0 && byte != self.bytes[self.matched] {
            self.matched = self.fallback[self.matched - 1];
        }
        if byte == self.bytes[self.matched] {
            self.matched += 1;
        }
    }
}

impl StopMatcher {
    /// A matcher at the start of a text. Empty strings are left out.
    pub fn new<S: AsRef<str>>(stops: &[S]) -> Self {
        Self {
            stops: stops.iter().map(|s| s.as_ref()).filter(|s| !s.is_empty()).map(Stop::new).collect(),
            held: String::new(),
            done: false,
        }
    }

    /// Takes the next text. After a stop string everything is swallowed.
    pub fn push(&mut self, text: &str) -> Scanned {
        if self.done {
            return Scanned::default();
        }
        if self.stops.is_empty() {
            return Scanned {
                text: text.to_owned(),
                stop: None,
            };
        }
        let before = self.held.len();
        self.held.push_str(text);
        for (i, byte) in text.bytes().enumerate() {
            for stop in &mut self.stops {
                stop.step(byte);
            }
            if let Some(stop) = self.stops.iter().filter(|s| s.is_complete()).max_by_key(|s| s.bytes.len()) {
                let stop = String::from_utf8_lossy(&stop.bytes).into_owned();
                self.held.truncate(before + i + 1 - stop.len());
                self.done = true;
                return Scanned {
                    text: std::mem::take(&mut self.held),
                    stop: Some(stop),
                };
            }
        }
        let keep = self.stops.iter().map(|s| s.matched).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        Scanned {
            text: std::mem::replace(&mut self.held, rest),
            stop: None,
        }
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
