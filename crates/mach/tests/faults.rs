//! Bad files, bad budgets, interrupted builds: each a named error, nothing lost, nothing written over.

mod support;

use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::json;
use support::server::{CHAT, Server};
use support::{arg, command, copy, edit_json, flip, mach, plain, tiny};

fn generate(dir: &Path, flags: &[&str]) -> support::Ran {
    let tokens = dir.join("tokens.json");
    std::fs::write(&tokens, "[1, 2, 3, 4, 5]").unwrap();
    mach(&[&["generate", "--model", arg(dir), "--tokens", arg(&tokens), "-n", "2", "--json"][..], flags].concat())
}

/// The file of a layer's experts.
fn layer_file(model: &Path, layer: usize) -> PathBuf {
    let prefix = format!("layer-{layer:03}");
    let mut files = std::fs::read_dir(model.join("expert_sidecar")).unwrap().flatten();
    files.find(|f| f.file_name().to_string_lossy().starts_with(&prefix)).unwrap().path()
}

/// A broken copy of a plain checkpoint.
fn broken(from: &Path, break_it: impl FnOnce(&Path)) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    copy(from, dir.path());
    break_it(dir.path());
    dir
}

#[test]
fn damaged_checkpoints_are_named() {
    let shard = "model-00001-of-00002.safetensors";
    type Case<'a> = (&'a str, &'a dyn Fn(&Path));
    let cases: &[Case] = &[
        ("truncated-file", &|d| {
            let bytes = std::fs::read(d.join(shard)).unwrap();
            std::fs::write(d.join(shard), &bytes[..bytes.len() - 100]).unwrap();
        }),
        ("missing-shard", &|d| std::fs::remove_file(d.join(shard)).unwrap()),
        ("wrong-shape", &|d| edit_json(&d.join("config.json"), |c| c["text_config"]["moe_intermediate_size"] = json!(96))),
        ("config-unsupported", &|d| edit_json(&d.join("config.json"), |c| c["text_config"]["rope_parameters"]["rope_type"] = json!("wobbly"))),
        ("config-unsupported", &|d| edit_json(&d.join("config.json"), |c| c["text_config"]["final_logit_softcapping"] = json!(30.0))),
        ("unknown-arch", &|d| {
            edit_json(&d.join("config.json"), |c| {
                c["model_type"] = json!("llama");
                c["text_config"]["model_type"] = json!("llama_text");
            });
        }),
        ("config-field", &|d| edit_json(&d.join("config.json"), |c| c["text_config"]["hidden_size"] = json!("many"))),
        ("invalid-json", &|d| std::fs::write(d.join("config.json"), "{\"model_type\": ").unwrap()),
    ];
    for (code, break_it) in cases {
        let dir = broken(&plain(), break_it);
        let ran = generate(dir.path(), &[]);
        assert_eq!(ran.failed_with(code).json()["error"]["code"], *code);
    }
}

/// A flipped byte is found at load when everything is loaded, at the read when streaming, and by verify.
#[test]
fn a_flipped_byte_in_a_record_is_found() {
    let dir = broken(&tiny(), |d| flip(&layer_file(d, 3), 7000));
    generate(dir.path(), &["--no-streaming"]).failed_with("expert-checksum");
    let ran = mach(&[
        "generate",
        "Tell me a story about a fox and a bear and a bird.",
        "--model",
        arg(dir.path()),
        "--streaming",
        "--bank",
        "20%",
        "--temperature",
        "0",
    ]);
    assert!(ran.failed_with("expert-checksum").err.contains("layer 3"), "{}", ran.err);
    let ran = mach(&["artifacts", "verify", arg(dir.path()), "--json"]);
    assert!(ran.code == 1 && ran.err.contains("layer 3"), "{}", ran.err);
    assert!(mach(&["artifacts", "verify", arg(&tiny()), "--json"]).json()["valid"] == true);
}

/// A sidecar of another checkpoint with the same shapes is refused.
#[test]
fn a_sidecar_of_another_checkpoint_is_refused() {
    let (a, b) = (
        broken(&plain(), |_| {}),
        broken(&plain(), |d| {
            let shard = d.join("model-00001-of-00002.safetensors");
            let len = std::fs::metadata(&shard).unwrap().len() as usize;
            flip(&shard, len - 1000);
        }),
    );
    assert_eq!(mach(&["artifacts", "build", arg(a.path()), "--json"]).code, 0);
    assert_eq!(generate(a.path(), &["--streaming"]).code, 0);
    let sidecar = a.path().join("expert_sidecar");
    let ran = generate(b.path(), &["--streaming", "--sidecar", arg(&sidecar)]);
    assert_eq!(ran.code, 1);
    assert!(ran.json()["error"]["code"].as_str().unwrap().contains("sidecar"), "{}", ran.err);
}

/// Budgets and banks below the floor say what the floor is.
#[test]
fn budgets_below_the_floor() {
    let ran = mach(&["generate", "x", "--memory-budget", "20MiB"]);
    assert!(ran.failed_with("budget").err.contains("--memory-budget"), "{}", ran.err);
    mach(&["generate", "x", "--bank", "1%"]).failed_with("budget");
    mach(&["generate", "x", "--bank", "90%", "--memory-budget", "70MiB"]).failed_with("budget");
    mach(&["generate", "x", "--no-streaming", "--memory-budget", "70MiB"]).failed_with("budget");
    mach(&["generate", "x", "--no-streaming", "--bank", "50%"]).failed_with("budget");
    mach(&["generate", "x", "--ctx-size", "400000000"]).failed_with("budget");
    let check = mach(&["check", "--memory-budget", "20MiB", "--json"]).json();
    assert_eq!(check["verdict"], "wont_fit");
}

/// A build that is killed goes on where it stopped and gives the same bytes.
#[test]
fn a_killed_build_resumes() {
    let dir = broken(&plain(), |_| {});
    let sidecar = dir.path().join("expert_sidecar");
    let mut child = command(&["artifacts", "build", arg(dir.path())]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    while !sidecar.exists() && child.try_wait().unwrap().is_none() {
        std::thread::yield_now();
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let resumed = mach(&["artifacts", "build", arg(dir.path()), "--json"]).json();
    let layers = mach(&["artifacts", "info", arg(dir.path()), "--json"]).json()["layers"].as_u64().unwrap();
    assert_eq!(resumed["layers_written"].as_u64().unwrap() + resumed["layers_kept"].as_u64().unwrap(), layers);
    assert_eq!(mach(&["artifacts", "verify", arg(dir.path()), "--json"]).json()["valid"], true);
    // A pack is never written over.
    let out = dir.path().join("pack");
    assert_eq!(mach(&["artifacts", "build", arg(dir.path()), "--bits", "8", "--group-size", "32", "--out", arg(&out), "--json"]).code, 0);
    assert_eq!(mach(&["artifacts", "build", arg(dir.path()), "--bits", "8", "--group-size", "32", "--out", arg(&out), "--json"]).code, 1);
}

/// A bad record while serving fails the request that meets it; the server answers the next one.
#[test]
fn a_bad_record_while_serving_fails_one_request() {
    let dir = broken(&tiny(), |_| {});
    let server = Server::start(&[arg(dir.path()), "--streaming", "--bank", "8%"]);
    let ask = |text: &str| {
        let body = json!({"model": "m", "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 24});
        server.post(CHAT, &body)
    };
    assert_eq!(ask("What is the capital of France?").status, 200);
    // Every record of one layer rots behind the server's back.
    let layer = layer_file(dir.path(), 5);
    let good = std::fs::read(&layer).unwrap();
    let rotten: Vec<u8> = good.iter().map(|b| b ^ 1).collect();
    let overwrite = |bytes: &[u8]| {
        use std::os::unix::fs::FileExt;
        std::fs::OpenOptions::new().write(true).open(&layer).unwrap().write_all_at(bytes, 0).unwrap();
    };
    overwrite(&rotten);
    let answer = ask("Tell me a long story about a fox, a bear and a bird.");
    assert_eq!(answer.status, 500, "{answer:?}");
    assert!(answer.json()["error"]["message"].as_str().unwrap().contains("checksum"), "{answer:?}");
    overwrite(&good);
    assert_eq!(ask("Tell me a long story about a fox, a bear and a bird.").status, 200);
    let stats = server.stats();
    assert!(stats["io"]["errors"].as_u64().unwrap() > 0, "{stats}");
}
