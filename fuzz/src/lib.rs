//! Targets that must survive any bytes: no panic, no hang, and the properties that each of them checks. Inputs are made from small valid
//! ones by cutting, copying, flipping and joining, with a seed, so that a failure can be seen again.

use std::path::{Path, PathBuf};

use mach_format::Checkpoint;
use mach_format::gguf::Gguf;
use mach_text::{CallFormat, ReasoningFormat, ReplyEvent, ReplyFormat, ReplyParser, ToolSchemas};
use serde_json::{Value, json};

/// What is fuzzed: a name, what it starts from, what it does with an input.
pub struct Target {
    /// For the command line.
    pub name: &'static str,
    /// Valid inputs.
    pub corpus: fn() -> Vec<Vec<u8>>,
    /// Runs one input; `dir` is an empty folder of its own.
    pub run: fn(&[u8], dir: &Path),
}

/// All of them.
pub const TARGETS: [Target; 4] = [
    Target { name: "safetensors", corpus: || heads("safetensors"), run: safetensors },
    Target { name: "gguf", corpus: || heads("gguf"), run: gguf },
    Target { name: "config", corpus: configs, run: config },
    Target { name: "replies", corpus: replies, run: reply },
];

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/mach-models/tests/goldens")
}

/// Files of the golden checkpoints with this ending.
fn files(ending: &str) -> Vec<PathBuf> {
    let entries = |dir: &Path| std::fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path()).collect::<Vec<_>>();
    let mut found: Vec<PathBuf> = entries(&goldens());
    found.extend(found.clone().iter().flat_map(|dir| entries(dir)));
    found.retain(|path| path.to_string_lossy().ends_with(ending));
    found.sort();
    found
}

/// The smallest files of a kind, with the weights behind their headers.
fn heads(ending: &str) -> Vec<Vec<u8>> {
    let mut all: Vec<Vec<u8>> = files(ending).iter().filter_map(|path| std::fs::read(path).ok()).collect();
    all.sort_by_key(Vec::len);
    all.truncate(3);
    all
}

fn configs() -> Vec<Vec<u8>> {
    files("config.json").iter().filter_map(|path| std::fs::read(path).ok()).collect()
}

/// The header of a safetensors file, and tensors that it says are there.
fn safetensors(input: &[u8], dir: &Path) {
    let write = |name: &str, bytes: &[u8]| std::fs::write(dir.join(name), bytes).is_ok();
    if !write("config.json", b"{}") || !write("model.safetensors", input) {
        return;
    }
    if let Ok(checkpoint) = Checkpoint::open(dir) {
        for (name, info) in checkpoint.tensors() {
            if info.bytes < 1 << 20 {
                let _ = checkpoint.read_bytes(name);
                let _ = checkpoint.read_f32(name);
            }
        }
    }
}

/// The header of a GGUF file, and what its metadata says of the model.
fn gguf(input: &[u8], dir: &Path) {
    let path = dir.join("model.gguf");
    if std::fs::write(&path, input).is_err() {
        return;
    }
    if let Ok(file) = Gguf::open(&path) {
        for (key, _) in file.metadata().iter() {
            let _ = file.metadata().text(key);
            let _ = file.metadata().size(key);
        }
    }
    if let Ok(checkpoint) = mach_models::open_checkpoint(&path) {
        let _ = mach_models::spec_of(checkpoint.config());
    }
}

/// A `config.json`.
fn config(input: &[u8], _: &Path) {
    if let Ok(value) = serde_json::from_slice::<Value>(input) {
        let _ = mach_models::spec_of(&value);
    }
}

const CALLS: [&str; 5] = [
    "I look.\n</think>\n\nSo.\n\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": \"x\", \"n\": [1, {}]}}\n</tool_call>",
    "<think>\na\n</think>\n\n<tool_call>\n<function=f>\n<parameter=a>\nx\n</parameter>\n<parameter=n>\n3\n</parameter>\n</function>\n</tool_call>\nend",
    "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{\"a\": \"x\"}<|call|>",
    "<|channel>thought\nHm\n<channel|>So.<|tool_call>call:f{a:<|\"|>x<|\"|>,n:[1,{b:true}]}<tool_call|><|tool_response>",
    "Hm</think>So.\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"f\">\n<｜DSML｜parameter name=\"a\" string=\"true\">x</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>",
];

fn replies() -> Vec<Vec<u8>> {
    CALLS.iter().map(|text| text.as_bytes().to_vec()).collect()
}

/// A reply in every format: whole and in pieces it comes to the same, complete calls hold one JSON object, and their indices ascend.
fn reply(input: &[u8], _: &Path) {
    let text = String::from_utf8_lossy(input);
    let tagged = |reasoning, calls| ReplyFormat::Tagged { reasoning: Some(reasoning), calls: Some(calls) };
    let formats = [
        tagged(ReasoningFormat::Think, CallFormat::Hermes),
        tagged(ReasoningFormat::Think, CallFormat::QwenXml),
        tagged(ReasoningFormat::Think, CallFormat::Dsml),
        tagged(ReasoningFormat::Channel, CallFormat::Gemma),
        ReplyFormat::Harmony,
    ];
    for format in formats {
        for prompt in ["", "<think>\n"] {
            let whole = parts(format, prompt, [&*text]);
            let mut cut = text.len() / 2;
            while !text.is_char_boundary(cut) {
                cut -= 1;
            }
            assert_eq!(parts(format, prompt, [&text[..cut], &text[cut..]]), whole, "{format:?}");
            assert_eq!(parts(format, prompt, text.split_inclusive(|_: char| true)), whole, "{format:?}");
        }
    }
}

/// A reply put together: reasoning, content, calls.
fn parts<'a>(format: ReplyFormat, prompt: &str, pieces: impl IntoIterator<Item = &'a str>) -> (String, String, Vec<(String, String)>) {
    let tools = ToolSchemas::from_tools(&json!([{"function": {"name": "f", "parameters": {"properties": {"a": {"type": "string"}, "n": {"type": "array"}}}}}]));
    let mut parser = ReplyParser::new(format, prompt, Some(tools.into()));
    let mut events: Vec<ReplyEvent> = pieces.into_iter().flat_map(|piece| parser.push(piece)).collect();
    events.extend(parser.finish());
    let mut message = mach_text::ReplyMessage::default();
    let mut next = 0;
    for event in events {
        if let ReplyEvent::CallStart { index, .. } = &event {
            assert_eq!(*index, next);
            next += 1;
        }
        message.push(event);
    }
    for call in &message.calls {
        assert!(serde_json::from_str::<Value>(&call.arguments).is_ok_and(|v| v.is_object()), "{call:?}");
    }
    (message.reasoning, message.content, message.calls.into_iter().map(|call| (call.name, call.arguments)).collect())
}

/// A stream of random numbers (SplitMix64).
pub struct Random(pub u64);

impl Random {
    /// A number below `n`, 0 for none.
    pub fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) as usize) % n.max(1)
    }
}

/// Numbers that lengths and offsets go wrong at.
const EDGES: [u64; 8] = [0, 1, 0x7f, 0xff, 0xffff, 0x7fff_ffff, 0xffff_ffff, u64::MAX];

/// An input made from one of the corpus, or from two.
pub fn mutated(corpus: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let mut bytes = corpus[random.below(corpus.len())].clone();
    for _ in 0..=random.below(4) {
        // Headers stand at the beginning: most changes go there.
        let reach = if random.below(4) > 0 { bytes.len().min(4096) } else { bytes.len() };
        let at = random.below(reach);
        let end = (at + 1 + random.below(32)).min(bytes.len());
        match random.below(8) {
            _ if bytes.is_empty() => bytes.push(random.below(256) as u8),
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = random.below(256) as u8,
            2 => bytes.truncate(at),
            3 => drop(bytes.drain(at..end)),
            4 => {
                let copy = bytes[at..end].to_vec();
                let to = random.below(bytes.len());
                bytes.splice(to..to, copy);
            }
            5 => {
                let edge = EDGES[random.below(EDGES.len())].to_le_bytes();
                let n = [1, 2, 4, 8][random.below(4)].min(bytes.len() - at);
                bytes[at..at + n].copy_from_slice(&edge[..n]);
            }
            // Digits of text formats.
            6 => drop(bytes.splice(at..at, EDGES[random.below(EDGES.len())].to_string().into_bytes())),
            _ => {
                let other = &corpus[random.below(corpus.len())];
                let from = random.below(other.len());
                let to = (from + random.below(256)).min(other.len());
                bytes.splice(at..end, other[from..to].iter().copied());
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every target takes its corpus and some hundred damaged inputs. `cargo run --release -p mach-fuzz` goes on for as long as it is told.
    #[test]
    fn targets_survive() {
        for target in &TARGETS {
            let corpus = (target.corpus)();
            assert!(!corpus.is_empty(), "{} has a corpus", target.name);
            let dir = tempfile::tempdir().unwrap();
            corpus.iter().for_each(|input| (target.run)(input, dir.path()));
            let mut random = Random(1);
            for _ in 0..300 {
                (target.run)(&mutated(&corpus, &mut random), dir.path());
            }
        }
    }
}
