//! `mach bench` and traces as scripts see them, on the built-in model.

mod support;

use serde_json::{Value, json};
use support::{arg, flip, mach};

/// Flags that keep a bench short.
const QUICK: [&str; 5] = ["--repeat", "1", "--time", "3", "--json"];

fn bench(args: &[&str]) -> Value {
    let ran = mach(&[&["bench"][..], args, &QUICK[..]].concat());
    assert_eq!(ran.code, 0, "{args:?}: {}", ran.err);
    ran.json()
}

/// The keys that every bench of tokens promises, and what their values mean.
fn keeps_the_contract(report: &Value) {
    for key in ["tok_s", "limit_tok_s", "share_of_limit", "bytes_per_token", "disk_gb_s", "stall_share", "peak_rss"] {
        assert!(report[key].is_number(), "{key} in {report}");
    }
    for key in ["memory_gb_s", "disk_gb_s", "int8_gop_s"] {
        assert!(report["ceilings"][key].as_f64().is_some_and(|c| c > 0.0), "{key} in {report}");
    }
    let number = |key: &str| report[key].as_f64().unwrap();
    assert!((number("tok_s") / number("limit_tok_s") / number("share_of_limit") - 1.0).abs() < 1e-9, "{report}");
    assert!(report["spread"].as_array().unwrap().len() == 2 && report["cpu"].is_string() && report["hit_rate"].is_number(), "{report}");
    assert!(["memory", "compute", "disk"].contains(&report["bound"].as_str().unwrap()), "{report}");
}

/// Protects the JSON contract of the benches that compute tokens.
#[test]
fn benches_have_their_fields() {
    let decode = bench(&["decode", "--tokens", "4", "--warm-up", "2"]);
    keeps_the_contract(&decode);
    assert_eq!((&decode["routing"], &decode["tokens"]), (&json!("uniform"), &json!(4)));

    let prefill = bench(&["prefill", "--tokens", "40", "--routing", "realistic", "--streaming"]);
    keeps_the_contract(&prefill);
    assert!(["sweep_s", "compute_s", "wall_s"].iter().all(|key| prefill[key].as_f64().is_some_and(|s| s > 0.0)), "{prefill}");
    assert!(prefill["distinct_experts"].as_u64().unwrap() > 8);

    let load = bench(&["load"]);
    keeps_the_contract(&load);
    assert_eq!((&load["tokens"], &load["cold"]), (&json!(16), &json!(true)));
    assert!(load["ttft_s"].as_f64().unwrap() > 0.0 && load["limit_ttft_s"].as_f64().unwrap() > 0.0, "{load}");
}

/// Protects the sweep of budgets: one object each, smaller banks and lower hit rates as memory shrinks.
#[test]
fn stream_gives_an_object_a_budget() {
    let list = bench(&["stream", "--tokens", "24", "--warm-up", "8", "--budgets", "80MiB,72MiB"]);
    let list = list.as_array().unwrap();
    list.iter().for_each(keeps_the_contract);
    let of = |key: &str| -> Vec<f64> { list.iter().map(|r| r[key].as_f64().unwrap()).collect() };
    let (slots, hits) = (of("slots"), of("hit_rate"));
    assert!(slots.len() == 2 && slots[0] > slots[1] && hits[0] > hits[1], "{slots:?} {hits:?}");
    let swept = bench(&["stream", "--tokens", "2", "--warm-up", "1"]);
    let slots: Vec<u64> = swept.as_array().unwrap().iter().map(|r| r["slots"].as_u64().unwrap()).collect();
    assert!(slots.len() > 4 && slots.is_sorted_by(|a, b| a >= b) && slots[0] > 240, "{slots:?}");
}

/// Protects the drive's sweep: sizes, depths and modes, and the best of them.
#[test]
fn io_sweeps_the_drive() {
    let io = bench(&["io"]);
    let points = io["points"].as_array().unwrap();
    let most = points.iter().filter(|p| p["mode"] == "direct").filter_map(|p| p["gb_s"].as_f64()).fold(0.0, f64::max);
    assert!(points.len() == 30 || points.iter().all(|p| p["mode"] == "buffered"), "{io}");
    assert!(io["best"]["mode"] == "buffered" || io["best"]["gb_s"].as_f64().unwrap() == most, "{io}");
    let table = mach(&["bench", "io", "--repeat", "1", "--time", "1"]);
    assert!(table.out.contains("gate|up") && table.out.contains("best: "), "{}", table.out);
}

/// Protects replays: a trace of one bank gives the very hits and misses that other banks have in real runs.
#[test]
fn a_replay_predicts_other_banks_exactly() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("trace");
    let run = |bank: &str, more: &[&str]| {
        let args = ["generate", "Tell me a story about a fox.", "--temperature", "0", "-n", "48", "--bank", bank, "--json"];
        mach(&[&args[..], more].concat()).json()["stats"].clone()
    };
    let recorded = run("25%", &["--trace", arg(&file)]);
    let replay = |slots: &str| mach(&["bench", "replay", "--trace", arg(&file), "--slots", slots, "--policy", "lfu-d", "--json"]).json()[0].clone();
    for (bank, slots, real) in [("25%", "64", recorded), ("10%", "25", run("10%", &[])), ("60%", "153", run("60%", &[]))] {
        let predicted = replay(slots);
        assert_eq!((&predicted["hits"], &predicted["misses"]), (&real["hits"], &real["misses"]), "{bank}");
        assert!(predicted["tok_s"].as_f64().unwrap() > 0.0, "{predicted}");
    }
    let table = mach(&["bench", "replay", "--trace", arg(&file)]);
    assert!(["belady", "lru", "lfu-d", "tok/s"].iter().all(|word| table.out.contains(word)), "{} {}", table.out, table.err);
}

/// Protects the measured runs of a bench from its warm-up: only they count in a replay.
#[test]
fn a_bench_and_its_replay_agree() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("trace");
    let run = |bank: &str, more: &[&str]| {
        let args = ["decode", "--tokens", "12", "--warm-up", "16", "--routing", "realistic", "--bank", bank];
        bench(&[&args[..], more].concat())
    };
    let recorded = run("30%", &["--trace", arg(&file)]);
    let other = run("50%", &[]);
    for real in [recorded, other] {
        let slots = real["slots"].to_string();
        let predicted = mach(&["bench", "replay", "--trace", arg(&file), "--slots", &slots, "--policy", "lfu-d", "--json"]).json()[0].clone();
        assert_eq!(predicted["tokens"], 12);
        let (p, r) = (predicted["hit_rate"].as_f64().unwrap(), real["hit_rate"].as_f64().unwrap());
        assert!((p - r).abs() < 1e-9, "{slots} slots: predicted {p}, real {r}");
    }
}

/// Protects against believing a bad trace, and against losing one: every way is a named error.
#[test]
fn bad_traces_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("trace");
    assert_eq!(mach(&["generate", "Hi", "-n", "4", "--temperature", "0", "--trace", arg(&file)]).code, 0);
    let whole = std::fs::read(&file).unwrap();
    let replay = || mach(&["bench", "replay", "--trace", arg(&file)]);
    flip(&file, whole.len() - 1);
    replay().failed_with("trace-damaged");
    std::fs::write(&file, &whole[..whole.len() / 2]).unwrap();
    replay().failed_with("trace-truncated");
    std::fs::write(&file, "no trace").unwrap();
    replay().failed_with("trace-unknown");
    std::fs::remove_file(&file).unwrap();
    replay().failed_with("trace-io");
    let nowhere = mach(&["generate", "Hi", "--trace", "/nonexistent/trace"]);
    assert!(!nowhere.failed_with("trace-io").err.contains("loaded in"), "{}", nowhere.err);
    std::fs::write(&file, &whole).unwrap();
    mach(&["bench", "replay", "--trace", arg(&file), "--slots", "3"]).failed_with("bank-below-floor");
}

/// Protects the table of kernels: every set of this processor, both precisions, and the bytes of the scalar twin.
#[test]
fn kernels_equal_their_twin() {
    let report = mach(&["bench", "kernels", "--format", "q6_k", "--time", "1", "--threads", "1", "--json"]).json();
    let rows = report["kernels"].as_array().unwrap();
    // 1, 4, 16 and 64 rows from L2 and from memory, with 8 and with 16 bits.
    let sets = report["available"].as_array().unwrap().len() - 1;
    assert_eq!(rows.len(), sets * 16);
    for row in rows {
        assert_eq!(row["equals_scalar"], true, "{row}");
        assert!(row["gb_s"].as_f64().unwrap() > 0.0 && row["gmac_s"].as_f64().unwrap() > 0.0, "{row}");
    }
    assert!(mach(&["bench", "kernels", "--kernels", "sse9"]).err.contains("no kernel set sse9"));
}
