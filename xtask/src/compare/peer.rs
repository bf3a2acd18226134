//! A llama-bench: what it understands, how it is called, what it prints.

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::Phase;

/// How weights are rearranged at load, in the words of this llama-bench.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Repack {
    /// ik_llama.cpp: off unless asked for.
    Rtr,
    /// llama.cpp: on unless told otherwise.
    Switch,
    /// Older ones have no choice.
    None,
}

/// A llama-bench and what its help says of its options.
pub struct Peer {
    path: PathBuf,
    repack: Repack,
    /// `-fa on|off` instead of 0 and 1.
    fa_words: bool,
}

/// One way to run it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    repack: Option<bool>,
    fa: bool,
    ub: usize,
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let on = |b: bool| if b { "on" } else { "off" };
        if let Some(repack) = self.repack {
            write!(f, "repack {}, ", on(repack))?;
        }
        write!(f, "flash attention {}, ub {}", on(self.fa), self.ub)
    }
}

impl Peer {
    pub fn open(path: PathBuf) -> Result<Self> {
        let help = Command::new(&path).arg("--help").stdin(Stdio::null()).output().with_context(|| format!("cannot start {}", path.display()))?;
        let help = [help.stdout, help.stderr].concat();
        let help = String::from_utf8_lossy(&help);
        if !help.contains("--n-prompt") {
            bail!("{} is no llama-bench: its help does not name --n-prompt", path.display());
        }
        Ok(Self { path, repack: repack_of(&help), fa_words: fa_words(&help) })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Every setting that can matter to `phase`: a decode has no batches to be cut.
    pub fn settings(&self, phase: Phase) -> Vec<Setting> {
        let repack: &[Option<bool>] = if self.repack == Repack::None { &[None] } else { &[Some(true), Some(false)] };
        let ub: &[usize] = if matches!(phase, Phase::Prefill(n) if n > 512) { &[512, 2048] } else { &[512] };
        let each = |&repack| [true, false].into_iter().flat_map(move |fa| ub.iter().map(move |&ub| Setting { repack, fa, ub }));
        repack.iter().flat_map(each).collect()
    }

    pub fn arguments(&self, s: &Setting, model: &Path, phase: Phase) -> Vec<OsString> {
        let (prompt, generated) = match phase {
            Phase::Prefill(n) => (n, 0),
            Phase::Decode(n) => (0, n),
        };
        let threads = std::thread::available_parallelism().map_or(1, Into::into);
        let bit = |on: bool| if on { "1" } else { "0" }.to_owned();
        let fa = if self.fa_words { if s.fa { "on" } else { "off" }.to_owned() } else { bit(s.fa) };
        let mut args = vec![("-p", prompt.to_string()), ("-n", generated.to_string()), ("-r", "1".to_owned()), ("-o", "json".to_owned())];
        args.extend([("-t", threads.to_string()), ("-ub", s.ub.to_string()), ("-fa", fa)]);
        match (self.repack, s.repack) {
            (Repack::Rtr, Some(on)) => args.push(("-rtr", bit(on))),
            (Repack::Switch, Some(on)) => args.push(("--repack", bit(on))),
            _ => {}
        }
        let words = args.into_iter().flat_map(|(name, value)| [OsString::from(name), value.into()]);
        words.chain(["-m".into(), model.as_os_str().to_owned()]).collect()
    }
}

fn repack_of(help: &str) -> Repack {
    if help.contains("-rtr,") {
        Repack::Rtr
    } else if help.contains("--repack <0|1>") {
        Repack::Switch
    } else {
        Repack::None
    }
}

fn fa_words(help: &str) -> bool {
    help.lines().any(|l| l.contains("--flash-attn") && l.contains("on|off"))
}

/// Tokens per second in what `llama-bench -o json` printed: a list with one test. Forks print lines before it.
pub fn rate(json: &[u8]) -> Result<f64> {
    let text = String::from_utf8_lossy(json);
    let start = text.find("[\n").or_else(|| text.find('[')).context("no JSON list was printed")?;
    let tests: Value = serde_json::Deserializer::from_str(&text[start..]).into_iter().next().context("no JSON list was printed")??;
    match tests.as_array().map(Vec::as_slice) {
        Some([test]) => test["avg_ts"].as_f64().filter(|r| *r > 0.0).context("a test without avg_ts"),
        _ => bail!("not one test: {tests}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LLAMA_HELP: &str =
        "  -fa, --flash-attn <on|off|auto>                   (default: auto)\n  --repack <0|1>                                    (default: 1)\n";
    const IK_HELP: &str = "  -fa, --flash-attn <0|1>             (default: 1)\n  -rtr, --run-time-repack <0|1>       (default: 0)\n";

    fn peer(help: &str) -> Peer {
        Peer { path: "llama-bench".into(), repack: repack_of(help), fa_words: fa_words(help) }
    }

    /// Protects comparisons from options that a peer does not know: each is called in its own words.
    #[test]
    fn every_peer_is_called_in_its_own_words() {
        let line = |help: &str| {
            let peer = peer(help);
            let words = peer.arguments(&Setting { repack: Some(true), fa: false, ub: 512 }, Path::new("m.gguf"), Phase::Decode(8));
            words.iter().map(|w| w.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
        };
        assert!(line(LLAMA_HELP).ends_with("-ub 512 -fa off --repack 1 -m m.gguf"), "{}", line(LLAMA_HELP));
        assert!(line(IK_HELP).ends_with("-ub 512 -fa 0 -rtr 1 -m m.gguf"), "{}", line(IK_HELP));
        assert!(line("").starts_with("-p 0 -n 8 -r 1 -o json") && line("").ends_with("-fa 0 -m m.gguf"), "{}", line(""));
    }

    /// Protects the peer's side: every combination is tried once, batches only where there are any.
    #[test]
    fn settings_are_tried_in_all_combinations() {
        let settings = peer(IK_HELP).settings(Phase::Prefill(2048));
        assert_eq!(settings.len(), 8);
        assert!(settings.iter().enumerate().all(|(i, s)| !settings[..i].contains(s)));
        assert_eq!((peer(IK_HELP).settings(Phase::Decode(64)).len(), peer("").settings(Phase::Prefill(512)).len()), (4, 2));
    }

    /// Protects the reading of results: as llama-bench prints them, and a fork with a line before.
    #[test]
    fn the_rate_is_found_in_what_llama_bench_prints() {
        let llama = r#"[
  {
    "build_commit": "unknown", "build_number": 0, "cpu_info": "AMD EPYC", "backends": "CPU", "model_n_params": 34660610688,
    "n_batch": 2048, "n_ubatch": 512, "n_threads": 2, "n_prompt": 512, "n_gen": 0, "n_depth": 0,
    "avg_ns": 5120000000, "stddev_ns": 0, "avg_ts": 100.000000, "stddev_ts": 0.000000,
    "samples_ns": [ 5120000000 ],
    "samples_ts": [ 100 ]
  }
]
"#;
        assert_eq!(rate(llama.as_bytes()).unwrap(), 100.0);
        assert_eq!(rate(format!("======== Repacked 41 tensors [ok]\n{llama}").as_bytes()).unwrap(), 100.0);
        assert!(rate(b"[\n]\n").is_err() && rate(b"").is_err() && rate(b"[\n{\"avg_ts\": 0}]").is_err());
    }
}
