//! The command as users and scripts see it, on the built-in model.

mod support;

use std::io::Write;
use std::process::Stdio;

use serde_json::json;
use support::{Ran, arg, command, mach, tiny};

const QUESTION: &str = "What is the capital of France?";
const ANSWER: &str = "The capital of France is Paris.";

/// Protects the first minute: the built-in model answers, streams, and says how it ran.
#[test]
fn the_first_command_answers() {
    let ran = mach(&["generate", QUESTION, "--temperature", "0"]);
    assert_eq!((ran.out.as_str(), ran.code), (format!("{ANSWER}\n").as_str(), 0), "{}", ran.err);
    for fact in ["arch=qwen3_5_moe", "expert_residency=streaming", "sidecar_valid=1", "bank=64/256", "tok/s", "hit rate", "read"] {
        assert!(ran.err.contains(fact), "{fact}: {}", ran.err);
    }
}

/// Protects the JSON contract of generate.
#[test]
fn generate_json_has_its_fields() {
    let ran = mach(&["generate", "What is 47 + 38?", "--temperature", "0", "--json"]);
    let reply = ran.json();
    assert_eq!(reply["text"], "47 + 38 = 85.");
    assert_eq!(reply["finish_reason"], "stop");
    assert_eq!(reply["tokens"].as_array().unwrap().len() as u64, reply["usage"]["completion_tokens"].as_u64().unwrap());
    for key in ["load_ms", "ttft_ms", "prefill_tok_s", "decode_tok_s", "hit_rate", "bytes_read", "stall_ms", "peak_rss"] {
        assert!(reply["stats"][key].is_number(), "{key} in {reply}");
    }
    let resident = mach(&["generate", "What is 47 + 38?", "--temperature", "0", "--json", "--no-streaming"]).json();
    assert_eq!((&resident["text"], resident["stats"]["hit_rate"].is_null()), (&reply["text"], true));
}

/// Protects promise 1 at the command line: bank, chunks, threads and kernels do not change a bit of the logits.
#[test]
fn the_same_logits_whatever_the_bank_chunk_threads_and_kernels() {
    let dir = tempfile::tempdir().unwrap();
    let run = |name: &str, kernels: Option<&str>, flags: &[&str]| {
        let file = dir.path().join(name);
        let args = [&["generate", "Tell me a story about a fox and a bear.", "--temperature", "0", "-n", "24", "--logits", arg(&file)][..], flags].concat();
        let mut c = command(&args);
        if let Some(k) = kernels {
            c.env("MACH_KERNELS", k);
        }
        let ran = Ran::of(c.output().unwrap());
        assert_eq!(ran.code, 0, "{name}: {}", ran.err);
        std::fs::read(file).unwrap()
    };
    let expected = run("default", None, &[]);
    let variants: &[(&str, &[&str])] = &[
        ("resident", &["--no-streaming"]),
        ("bank15", &["--bank", "15%"]),
        ("bank50", &["--bank", "50%"]),
        ("bank100", &["--bank", "100%"]),
        ("floor", &["--bank", "8%", "--streaming"]),
        ("chunk1", &["--prefill-chunk", "1"]),
        ("chunk7", &["--prefill-chunk", "7"]),
        ("threads1", &["--threads", "1"]),
        ("threads3", &["--threads", "3"]),
        ("budget", &["--memory-budget", "90MiB", "--streaming"]),
    ];
    for (name, flags) in variants {
        assert!(run(name, None, flags) == expected, "{name} changes the logits");
    }
    for set in mach_cpu::KernelSet::available() {
        assert!(run("kernels", Some(set.name()), &[]) == expected, "{} changes the logits", set.name());
    }
}

/// Forty tokens through a model, sixteen more greedily: the bytes of their logits.
fn logits_of(dir: &std::path::Path, model: &std::path::Path, flags: &[&str]) -> Result<Vec<u8>, Ran> {
    let (tokens, logits) = (dir.join("tokens.json"), dir.join("logits"));
    std::fs::write(&tokens, json!((5..45).collect::<Vec<u32>>()).to_string()).unwrap();
    let args = ["generate", "--model", arg(model), "--tokens", arg(&tokens), "-n", "16", "--ignore-eos", "--temperature", "0", "--logits", arg(&logits)];
    let ran = mach(&[&args[..], flags].concat());
    if ran.code == 0 { Ok(std::fs::read(&logits).unwrap()) } else { Err(ran) }
}

/// Protects DeepSeek-V4 as published (8- and 4-bit floats): resident it runs as it is, streaming asks for the engine layout by name,
/// and then gives the same bytes.
#[test]
fn deepseek_streams_from_the_engine_layout_only() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    support::copy(&support::goldens().join("deepseek_v4-fp8fp4"), &model);
    let expected = logits_of(dir.path(), &model, &["--no-streaming"]).map_err(|ran| ran.err).unwrap();
    let refused = logits_of(dir.path(), &model, &["--streaming"]).unwrap_err();
    assert!(refused.failed_with("engine-layout-required").err.contains("mach artifacts build"), "{}", refused.err);
    let built = mach(&["artifacts", "build", arg(&model)]);
    assert_eq!(built.code, 0, "{}", built.err);
    let streamed = logits_of(dir.path(), &model, &["--streaming", "--bank", "50%"]).map_err(|ran| ran.err).unwrap();
    assert!(streamed == expected, "streaming changes the logits");
}

/// Protects packs of every family: they hold all that the model needs (sinks, biases, tables, scales), keep its bytes, and stream; and
/// they can be made of fewer bits.
#[test]
fn packs_of_every_family_give_the_bytes_of_their_source() {
    for name in ["qwen3-base", "gpt_oss-mxfp4", "gemma4-base", "deepseek_v4-base", "gpt_oss-bf16"] {
        let dir = tempfile::tempdir().unwrap();
        let (model, pack) = (support::goldens().join(name), dir.path().join("pack"));
        let expected = logits_of(dir.path(), &model, &["--no-streaming"]).unwrap_or_else(|ran| panic!("{name}: {}", ran.err));
        let built = mach(&["artifacts", "build", arg(&model), "--out", arg(&pack)]);
        assert_eq!(built.code, 0, "{name}: {}", built.err);
        let streamed = logits_of(dir.path(), &pack, &["--streaming", "--bank", "60%"]).unwrap_or_else(|ran| panic!("{name}: {}", ran.err));
        assert!(streamed == expected, "{name}: a pack changes the logits");
        let verified = mach(&["artifacts", "verify", arg(&pack)]);
        assert_eq!(verified.code, 0, "{name}: {}", verified.err);
        if !name.contains("mxfp4") {
            let small = dir.path().join("small");
            let built = mach(&["artifacts", "build", arg(&model), "--bits", "8", "--group-size", "32", "--out", arg(&small)]);
            assert_eq!(built.code, 0, "{name}: {}", built.err);
            logits_of(dir.path(), &small, &[]).unwrap_or_else(|ran| panic!("{name}: {}", ran.err));
        }
    }
}

/// Protects what --logits means: rows of generate are those of eval on prompt and output.
#[test]
fn generate_and_eval_agree_byte_for_byte() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let prompt: Vec<u32> = (100..140).collect();
    std::fs::write(at("prompt.json"), json!(prompt).to_string()).unwrap();
    let (prompt_file, logits_file) = (at("prompt.json"), at("g"));
    let generated =
        mach(&["generate", "--tokens", arg(&prompt_file), "-n", "64", "--ignore-eos", "--temperature", "0", "--logits", arg(&logits_file), "--json"]).json();
    let output: Vec<u32> = serde_json::from_value(generated["tokens"].clone()).unwrap();
    assert_eq!(output.len(), 64);
    let all = [prompt.clone(), output].concat();
    std::fs::write(at("all.json"), json!(all).to_string()).unwrap();
    let report = mach(&["eval", "--tokens", arg(&at("all.json")), "--logits", arg(&at("e")), "--json"]).json();
    assert!(report["perplexity"].as_f64().unwrap() > 1.0);
    let rows = |name: &str| {
        let bytes = std::fs::read(at(name)).unwrap();
        safetensors::SafeTensors::deserialize(&bytes).unwrap().tensor("logits").unwrap().data().to_vec()
    };
    let (g, e) = (rows("g"), rows("e"));
    let row = g.len() / 64;
    assert!(g == e[(prompt.len() - 1) * row..(prompt.len() + 63) * row]);
    // And the comparison with itself is perfect.
    let report = mach(&["eval", "--tokens", arg(&at("all.json")), "--reference", arg(&at("e")), "--json"]).json();
    assert_eq!((&report["max_abs"], &report["top1_agreement"], &report["routes_equal"]), (&json!(0.0), &json!(1.0), &json!(1.0)));
}

/// Protects pipes: a prompt from stdin, and a reader that goes away.
#[test]
fn stdin_and_broken_pipes() {
    let mut child = command(&["generate", "--temperature", "0"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(format!("{QUESTION}\n").as_bytes()).unwrap();
    let ran = Ran::of(child.wait_with_output().unwrap());
    assert_eq!(ran.out.trim(), ANSWER, "{}", ran.err);

    let mut child =
        command(&["generate", "Tell me a story about a dog.", "--ignore-eos", "-n", "400"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let ran = Ran::of(child.wait_with_output().unwrap());
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert!(!ran.err.contains("error"), "{}", ran.err);
}

/// Protects seeds: the same seed repeats, another differs.
#[test]
fn seeds_repeat() {
    let story = |seed: &str| mach(&["generate", "Tell me a story.", "--temperature", "1", "--seed", seed, "-n", "40", "--json"]).json()["text"].clone();
    assert_eq!(story("5"), story("5"));
    assert_ne!(story("5"), story("6"));
}

/// Protects wrong usage: exit code 2, a code, and what would be right.
#[test]
fn wrong_usage() {
    for args in [
        &["generate", "x", "--bank", "0%"][..],
        &["generate", "x", "--memory-budget", "lots"],
        &["generate", "x", "--streaming", "--no-streaming"],
        &["generate", "x", "--no-such-flag"],
        &["generate", "x", "--temperature", "-1"],
        &["tokenize"],
        &["no-such-command"],
    ] {
        mach(args).failed_with("usage");
    }
    let ran = mach(&["generate", "x", "--threads", "0", "--json"]);
    assert_eq!(ran.failed_with("usage").json()["error"]["code"], "usage");
}

/// Protects models that are not here: what to do is in the message.
#[test]
fn unknown_models() {
    let ran = mach(&["check", "Qwen/Qwen3.6-35B-A3B"]);
    assert!(ran.failed_with("model-not-found").err.contains("mach pull Qwen/Qwen3.6-35B-A3B"), "{}", ran.err);
    mach(&["check", "./nowhere"]).failed_with("no-such-path");
    let ran = mach(&["generate", "x", "--model", "/tmp", "--json"]);
    assert!(ran.code == 1 && ran.json()["error"]["code"].is_string());
}

/// Protects against a long load for nothing: a taken port is an error at once.
#[test]
fn a_taken_port_is_told() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let ran = mach(&["serve", "--port", &port]);
    assert!(!ran.failed_with("bind-failed").err.contains("loaded in"), "{}", ran.err);
}

/// Protects discovery: facts in JSON, without weights.
#[test]
fn discovery_commands() {
    let archs = mach(&["archs", "--json"]).json();
    let names: Vec<&str> = archs.as_array().unwrap().iter().map(|a| a["model_type"].as_str().unwrap()).collect();
    for family in ["qwen3_5_moe", "qwen3_moe", "deepseek_v4"] {
        assert!(names.contains(&family), "{family} in {names:?}");
    }
    for key in ["model_type", "reference", "activation", "stacked", "expert_bias", "wrapped", "bits", "group_size", "layouts", "notes"] {
        assert!(archs.as_array().unwrap().iter().all(|a| !a[key].is_null()), "{key}");
    }
    let check = mach(&["check", "--json"]).json();
    assert_eq!((&check["verdict"], &check["artifacts"]["sidecar"]["valid"]), (&json!("fits"), &json!(true)));
    assert!(check["memory"]["resident"].as_u64().unwrap() > 1 << 20);
    let goldens = tiny().join("../../crates/mach-models/tests/goldens");
    let models = mach(&["models", "--models-dir", arg(&goldens), "--json"]).json();
    let gguf = models.as_array().unwrap().iter().find(|m| m["name"] == "qwen3_5-base.gguf").unwrap();
    assert_eq!((&gguf["model_type"], &gguf["supported"]), (&json!("qwen3_5_moe"), &json!(true)), "{models}");
    assert!(gguf["bytes"].as_u64().unwrap() > 100_000);
    let models = mach(&["models", "--models-dir", arg(&tiny().join("..")), "--json"]).json();
    assert_eq!((&models[0]["name"], &models[0]["supported"], &models[0]["sidecar"]), (&json!("tiny"), &json!(true), &json!(true)));
    let prompt = mach(&["tokenize", "<|im_start|>hi", "--json"]).json();
    assert_eq!((&prompt["tokens"][0], &prompt["prompt"]), (&json!(4087), &json!("<|im_start|>hi")));
}

/// Protects the conversation: it goes on from warm state, and commands work.
#[test]
fn chat_keeps_its_history() {
    let mut child = command(&["chat", "--temperature", "0"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let lines = format!("{QUESTION}\n/stats\nWhat is 47 + 38?\n/stats\n/nonsense\n/reset\n/quit\n");
    child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    let ran = Ran::of(child.wait_with_output().unwrap());
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert!(ran.out.contains(ANSWER) && ran.out.contains("85"), "{}", ran.out);
    assert!(ran.err.contains("0 reused") && ran.err.contains("/nonsense is not a command"), "{}", ran.err);
    let reused = |r: &str| r.split_once(" prompt tokens, ").and_then(|(_, r)| r.split_once(" reused")).map(|(n, _)| n.parse::<u32>().unwrap());
    let last = ran.err.lines().rfind(|l| l.starts_with("last reply")).unwrap();
    assert!(reused(last).unwrap() > 10, "{last}");
}

/// Protects the other names of the program.
#[test]
fn other_names_of_the_program() {
    let run = |exe: &str, args: &[&str]| Ran::of(std::process::Command::new(exe).args(args).output().unwrap());
    assert!(run(env!("CARGO_BIN_EXE_mach-archs"), &["--json"]).json().is_array());
    assert!(run(env!("CARGO_BIN_EXE_mach-models"), &["--json"]).json().is_array());
    assert_eq!(run(env!("CARGO_BIN_EXE_mach-generate"), &[QUESTION, "--temperature", "0"]).out.trim(), ANSWER);
    assert!(run(env!("CARGO_BIN_EXE_mach-serve"), &["--help"]).out.contains("--ready-json"));
}
