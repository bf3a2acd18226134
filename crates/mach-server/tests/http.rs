//! Wire shapes, errors, cancellation and limits over real sockets.

mod common;

use std::io::{BufRead, BufReader};
use std::time::{Duration, Instant};

use common::{Answer, CONTEXT, Fixture, REPLY};
use mach_engine::{EngineHandle, EngineInfo};
use mach_server::Ended;
use mach_session::Session;
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";

fn user(text: &str) -> Value {
    json!([{"role": "user", "content": text}])
}

/// A chat answer has the text, the counts of the tokenizer, usage, timings, and echoes the model's name.
#[test]
fn chat_answers_in_the_api_shape() {
    let server = Fixture::start();
    let answer = server.post(CHAT, &json!({"model": "whatever", "messages": user("Hi"), "temperature": 0, "unknown_field": [1]}));
    assert_eq!(answer.status, 200, "{answer:?}");
    let body = answer.json();
    assert_eq!((&body["object"], &body["model"]), (&json!("chat.completion"), &json!("whatever")));
    assert_eq!(body["choices"][0]["message"], json!({"role": "assistant", "content": REPLY}));
    assert_eq!(body["choices"][0]["finish_reason"], "stop");
    let tokenizer = server.session.text().tokenizer();
    let prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n";
    let (p, c) = (tokenizer.encode(prompt, false).unwrap().len(), tokenizer.encode(REPLY, false).unwrap().len());
    let usage = json!({"prompt_tokens": p, "completion_tokens": c, "total_tokens": p + c,
        "prompt_tokens_details": {"cached_tokens": p / 2}, "completion_tokens_details": {"reasoning_tokens": 0}});
    assert_eq!(body["usage"], usage);
    let timings = &body["timings"];
    assert_eq!((&timings["cache_n"], &timings["prompt_n"], &timings["predicted_n"]), (&json!(p / 2), &json!(p - p / 2), &json!(c)));
    assert_eq!((timings["prompt_ms"].as_f64(), timings["predicted_ms"].as_f64()), (Some(2.0), Some(4.0)));
    assert_eq!(timings["predicted_per_second"].as_f64(), Some(c as f64 / 0.004));
    for key in ["prompt_per_token_ms", "prompt_per_second", "predicted_per_token_ms"] {
        assert!(timings[key].is_f64(), "{key}");
    }
    assert!(answer.header("x-request-id").is_some());
}

/// A stream is the same text in pieces, with role first, finish last, usage when asked for, and the closing mark.
#[test]
fn streams_are_the_same_text_in_pieces() {
    let server = Fixture::start();
    let request = json!({"messages": user("Hi"), "temperature": 0, "stream": true, "stream_options": {"include_usage": true}});
    let answer = server.request("POST", CHAT, &[("X-Request-Id", "abc-1")], &request.to_string());
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("content-type"), Some("text/event-stream; charset=utf-8"));
    assert_eq!((answer.header("x-accel-buffering"), answer.header("cache-control")), (Some("no"), Some("no-cache")));
    assert_eq!(answer.header("x-request-id"), Some("abc-1"));
    let events = answer.events();
    assert_eq!(events[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    let text: String = events.iter().filter_map(|e| e["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, REPLY);
    assert!(events.len() > 6, "one event per token or so");
    let [.., finish, usage, done] = events.as_slice() else { panic!("{events:?}") };
    assert_eq!((&finish["choices"][0]["finish_reason"], &finish["usage"]), (&json!("stop"), &Value::Null));
    assert!(finish["timings"]["predicted_n"].is_u64());
    assert_eq!((&usage["choices"], done), (&json!([]), &json!("[DONE]")));
    let whole = server.post(CHAT, &json!({"messages": user("Hi"), "temperature": 0})).json();
    assert_eq!(usage["usage"], whole["usage"]);
    assert!(events[..events.len() - 1].iter().all(|e| e["id"] == events[0]["id"] && e["object"] == "chat.completion.chunk"));

    let silent = server.post(CHAT, &json!({"messages": user("Hi"), "temperature": 0, "stream": true})).events();
    assert!(silent.iter().all(|e| e.get("usage").is_none()));
}

/// Completions take text, lists and ids, skip the template, stop at strings, and stream.
#[test]
fn completions_in_every_form() {
    let server = Fixture::start();
    let ids = server.session.text().tokenizer().encode("Once", false).unwrap();
    for prompt in [json!("Once"), json!(["Once"]), json!(ids), json!([ids])] {
        let body = server.post("/v1/completions", &json!({"prompt": prompt, "temperature": 0})).json();
        assert_eq!((&body["object"], &body["choices"][0]["text"]), (&json!("text_completion"), &json!(REPLY)), "{prompt}");
        assert_eq!(body["usage"]["prompt_tokens"], ids.len());
    }
    let many = server.post("/v1/completions", &json!({"prompt": ["Once", "Twice"], "n": 2, "temperature": 0, "stop": [" Par", "zzz"]})).json();
    let texts: Vec<&str> = many["choices"].as_array().unwrap().iter().filter_map(|c| c["text"].as_str()).collect();
    assert_eq!(texts, ["The capital of France is"; 4]);
    assert_eq!(many["choices"][3]["index"], 3);
    assert_eq!(many["choices"][3]["finish_reason"], "stop");

    let short = server.post("/v1/completions", &json!({"prompt": "x", "temperature": 0, "max_tokens": 2})).json();
    assert_eq!((&short["choices"][0]["finish_reason"], &short["usage"]["completion_tokens"]), (&json!("length"), &json!(2)));
    let events = server.post("/v1/completions", &json!({"prompt": "x", "temperature": 0, "stream": true})).events();
    let text: String = events.iter().filter_map(|e| e["choices"][0]["text"].as_str()).collect();
    assert_eq!(text, REPLY);
}

/// A seed gives the same text; choice 0 of several is the choice of one; the others differ; an answer names its seed.
#[test]
fn seeds_repeat() {
    let server = Fixture::start();
    let ask = |extra: Value| {
        let mut request = json!({"messages": user("Hi"), "temperature": 1});
        request.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        server.post(CHAT, &request).json()
    };
    let text = |body: &Value, i: usize| body["choices"][i]["message"]["content"].as_str().unwrap().to_owned();
    let one = ask(json!({"seed": 5}));
    assert_eq!(text(&one, 0), text(&ask(json!({"seed": 5})), 0));
    assert_ne!(text(&one, 0), text(&ask(json!({"seed": 6})), 0));
    let three = ask(json!({"seed": 5, "n": 3}));
    assert_eq!(text(&three, 0), text(&one, 0));
    assert!(text(&three, 1) != text(&three, 0) && text(&three, 1) != text(&three, 2));
    assert_eq!(three["usage"]["prompt_tokens"], one["usage"]["prompt_tokens"]);
    assert_eq!(three["usage"]["completion_tokens"], 36);
    let free = ask(json!({}));
    assert_eq!(text(&free, 0), text(&ask(json!({"seed": free["seed"]})), 0));
}

/// Wrong requests are refused before anything is computed, each with the parameter that is wrong.
#[test]
fn errors_name_the_parameter() {
    let server = Fixture::start();
    let hi = user("Hi");
    let chat: &[(Value, &str)] = &[
        (json!({}), "messages"),
        (json!({"messages": "Hi"}), "messages"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": ["Hi"]}), "messages[0]"),
        (json!({"messages": [{"role": "user"}]}), "messages[0].content"),
        (json!({"messages": [{"role": "user", "content": 3}]}), "messages[0].content"),
        (json!({"messages": [{"content": "x"}]}), "messages[0].role"),
        (json!({"messages": [{"role": "wizard", "content": "x"}]}), "messages[0].role"),
        (json!({"messages": [{"role": "function", "content": "x"}]}), "messages[0].role"),
        (json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}), "messages[0].content[0]"),
        (json!({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}), "messages[0].content[0]"),
        (
            json!({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}),
            "messages[0].tool_calls[0].function.arguments",
        ),
        (json!({"messages": hi, "model": 3}), "model"),
        (json!({"messages": hi, "stream": "yes"}), "stream"),
        (json!({"messages": hi, "stream_options": 1}), "stream_options"),
        (json!({"messages": hi, "temperature": "hot"}), "temperature"),
        (json!({"messages": hi, "temperature": 2.5}), "temperature"),
        (json!({"messages": hi, "temperature": -0.1}), "temperature"),
        (json!({"messages": hi, "top_p": 1.5}), "top_p"),
        (json!({"messages": hi, "top_k": -2}), "top_k"),
        (json!({"messages": hi, "top_k": 1.5}), "top_k"),
        (json!({"messages": hi, "min_p": -1}), "min_p"),
        (json!({"messages": hi, "presence_penalty": 3}), "presence_penalty"),
        (json!({"messages": hi, "frequency_penalty": "a"}), "frequency_penalty"),
        (json!({"messages": hi, "repetition_penalty": 0}), "repetition_penalty"),
        (json!({"messages": hi, "max_tokens": 0}), "max_tokens"),
        (json!({"messages": hi, "max_completion_tokens": "many"}), "max_completion_tokens"),
        (json!({"messages": hi, "seed": "x"}), "seed"),
        (json!({"messages": hi, "n": 0}), "n"),
        (json!({"messages": hi, "stop": 3}), "stop"),
        (json!({"messages": hi, "stop": ["a", 3]}), "stop"),
        (json!({"messages": hi, "logit_bias": {"x": 1}}), "logit_bias"),
        (json!({"messages": hi, "logit_bias": {"99999": 1}}), "logit_bias"),
        (json!({"messages": hi, "logit_bias": {"5": 101}}), "logit_bias"),
        (json!({"messages": hi, "logprobs": true}), "logprobs"),
        (json!({"messages": hi, "top_logprobs": 2}), "top_logprobs"),
        (json!({"messages": hi, "response_format": {"type": "json_object"}}), "response_format"),
        (json!({"messages": hi, "tools": {}}), "tools"),
        (json!({"messages": hi, "tools": [{"type": "function"}]}), "tools[0].function.name"),
        (json!({"messages": hi, "tool_choice": "required"}), "tool_choice"),
        (json!({"messages": hi, "tool_choice": {"type": "function", "function": {"name": "f"}}}), "tool_choice"),
        (json!({"messages": hi, "functions": []}), "functions"),
        (json!({"messages": hi, "modalities": ["text", "audio"]}), "modalities"),
        (json!({"messages": hi, "chat_template_kwargs": "x"}), "chat_template_kwargs"),
        (json!({"messages": user(&"word ".repeat(CONTEXT))}), "messages"),
        (json!({"messages": user(&"word ".repeat(CONTEXT)), "stream": true}), "messages"),
    ];
    let completions: &[(Value, &str)] = &[
        (json!({}), "prompt"),
        (json!({"prompt": 3}), "prompt"),
        (json!({"prompt": []}), "prompt"),
        (json!({"prompt": ""}), "prompt"),
        (json!({"prompt": [1, "x"]}), "prompt"),
        (json!({"prompt": [99999]}), "prompt"),
        (json!({"prompt": vec![5; CONTEXT]}), "prompt"),
        (json!({"prompt": "x", "echo": true}), "echo"),
        (json!({"prompt": "x", "best_of": 2}), "best_of"),
        (json!({"prompt": "x", "suffix": "y"}), "suffix"),
        (json!({"prompt": "x", "logprobs": 0}), "logprobs"),
        (json!({"prompt": vec!["x"; 100], "n": 2}), "n"),
    ];
    for (path, cases) in [(CHAT, chat), ("/v1/completions", completions)] {
        for (request, param) in cases {
            let answer = server.post(path, request);
            let error = answer.json()["error"].clone();
            assert_eq!((answer.status, error["param"].as_str()), (400, Some(*param)), "{request}: {answer:?}");
            assert!(error["message"].is_string() && error["type"].is_string() && error["code"].is_string(), "{error}");
        }
    }
    // Values that ask for nothing are fine.
    let harmless = json!({"messages": hi, "logprobs": false, "response_format": {"type": "text"}, "tool_choice": "auto", "tools": [],
        "functions": null, "n": 1, "stop": null, "user": "me", "metadata": {}, "parallel_tool_calls": true, "modalities": ["text"], "max_tokens": 99999999});
    assert_eq!(server.post(CHAT, &harmless).status, 200);
    assert_eq!(server.session.engine().stats().finished, 1);
}

/// The overflow error carries every wording that agents look for.
#[test]
fn context_overflow_is_recognised_by_agents() {
    let server = Fixture::start();
    let error = server.post(CHAT, &json!({"messages": user(&"word ".repeat(CONTEXT))})).json()["error"].clone();
    assert_eq!((&error["type"], &error["code"], &error["n_ctx"]), (&json!("exceed_context_size_error"), &json!("context_length_exceeded"), &json!(CONTEXT)));
    assert!(error["n_prompt_tokens"].as_u64().unwrap() >= CONTEXT as u64);
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("maximum context length is 512 tokens") && message.contains("exceeds the available context size"), "{message}");
}

/// What is no request at all gets the same shape: bad JSON, unknown paths, wrong methods, bodies that are too large.
#[test]
fn transport_errors_have_the_shape() {
    let server = Fixture::start();
    let cases = [
        (server.request("POST", CHAT, &[], "{oops"), 400, "invalid_json"),
        (server.request("POST", CHAT, &[], "[1]"), 400, "invalid_json"),
        (server.request("POST", CHAT, &[], ""), 400, "invalid_json"),
        (server.get("/v1/nothing"), 404, "not_found"),
        (server.get(CHAT), 405, "method_not_allowed"),
        (server.get("/v1/models/other"), 404, "model_not_found"),
    ];
    for (answer, status, code) in cases {
        assert_eq!((answer.status, answer.json()["error"]["code"].as_str()), (status, Some(code)), "{answer:?}");
        assert!(answer.header("x-request-id").is_some());
    }
    // Refused by its announced size, before a byte of it is sent.
    let mut stream = std::net::TcpStream::connect(server.addr).unwrap();
    let head = format!("POST {CHAT} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", server.addr, 65 << 20);
    std::io::Write::write_all(&mut stream, head.as_bytes()).unwrap();
    let answer = Answer::read(&mut BufReader::new(stream));
    assert_eq!((answer.status, answer.json()["error"]["code"].as_str()), (413, Some("request_too_large")));
}

/// Tools reach the prompt, and template variables too; a template that refuses is a 400 with its words.
#[test]
fn tools_and_template_variables_reach_the_prompt() {
    let server = Fixture::start();
    let prompt_tokens = |request: Value| server.post(CHAT, &request).json()["usage"]["prompt_tokens"].as_u64().unwrap();
    let tool = json!([{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]);
    let plain = prompt_tokens(json!({"messages": user("Hi")}));
    assert!(prompt_tokens(json!({"messages": user("Hi"), "tools": tool})) > plain + 40);
    assert_eq!(prompt_tokens(json!({"messages": user("Hi"), "tools": tool, "tool_choice": "none"})), plain);
    assert!(prompt_tokens(json!({"messages": user("Hi"), "chat_template_kwargs": {"enable_thinking": true}})) < plain);
}

/// Models, capabilities and statistics carry what clients read.
#[test]
fn facts_of_the_server() {
    let server = Fixture::with(|c| c.alias = Some("tiny".into()));
    let models = server.get("/v1/models").json();
    let model = &models["data"][0];
    assert_eq!((&models["object"], &model["id"], &model["object"], &model["owned_by"]), (&json!("list"), &json!("tiny"), &json!("model"), &json!("mach")));
    assert_eq!((&model["max_model_len"], &model["meta"]["n_ctx_train"], &model["meta"]["n_params"]), (&json!(CONTEXT), &json!(8192), &json!(30)));
    assert_eq!(server.get("/v1/models/org/tiny").json()["id"], "org/tiny");
    assert_eq!(server.get("/v1/models/tiny").json()["id"], "tiny");
    assert_eq!(server.post(CHAT, &json!({"messages": user("Hi")})).json()["model"], "tiny");

    let stats = server.get("/v1/stats").json();
    for path in [
        "/requests/running",
        "/requests/queued",
        "/requests/finished",
        "/requests/cancelled",
        "/tokens/prompt",
        "/tokens/generated",
        "/bank/slots",
        "/bank/hits",
        "/bank/misses",
        "/io/bytes_read",
        "/io/errors",
    ] {
        assert!(stats.pointer(path).is_some_and(Value::is_u64), "{path} in {stats}");
    }
    assert_eq!(stats["requests"]["finished"], 1);
    assert_eq!(stats["signals"].to_string(), r#"{"expert_residency":"streaming","arch":"scripted"}"#);
    let capabilities = server.get("/v1/capabilities").json();
    assert_eq!((&capabilities["arch"], &capabilities["features"]["chat_template"]), (&json!("scripted"), &json!(true)));
    for path in ["/health", "/v1/health", "/healthz"] {
        assert_eq!(server.get(path).json(), json!({"status": "ok"}));
    }
}

/// With a key, everything but health needs it, in either header.
#[test]
fn keys_are_checked() {
    let server = Fixture::with(|c| c.api_keys = vec!["one".into(), "two".into()]);
    let status = |headers: &[(&str, &str)]| server.request("GET", "/v1/models", headers, "").status;
    assert_eq!(status(&[]), 401);
    assert_eq!(status(&[("Authorization", "Bearer three")]), 401);
    assert_eq!(status(&[("Authorization", "one")]), 401);
    assert_eq!(status(&[("Authorization", "Bearer two")]), 200);
    assert_eq!(status(&[("x-api-key", "one")]), 200);
    assert_eq!(server.get("/health").status, 200);
    let error = server.get("/v1/models").json()["error"].clone();
    assert_eq!((&error["type"], &error["code"]), (&json!("authentication_error"), &json!("invalid_api_key")));
    assert_eq!(Fixture::start().request("GET", "/v1/models", &[("Authorization", "Bearer any")], "").status, 200);
}

/// On loopback a foreign Host or Origin is refused (a web page that rebinds its name), local ones pass.
#[test]
fn foreign_hosts_are_refused() {
    let server = Fixture::start();
    let status = |headers: &[(&str, &str)]| server.request("GET", "/health", headers, "").status;
    for host in ["localhost:1234", "127.0.0.1", "[::1]:80"] {
        assert_eq!(status(&[("Host", host)]), 200, "{host}");
    }
    assert_eq!(status(&[("Host", "evil.example")]), 403);
    assert_eq!(status(&[("Host", "localhost"), ("Origin", "https://evil.example")]), 403);
    assert_eq!(status(&[("Host", "localhost"), ("Origin", "http://localhost:3000")]), 200);
    let open = Fixture::with(|c| c.host = "0.0.0.0".into());
    assert_eq!(open.request("GET", "/health", &[("Host", "box.example")], "").status, 200);
}

/// A client that leaves stops the computation: in a stream, in a plain request, during prefill, and while it waits in the queue.
#[test]
fn clients_that_leave_cancel() {
    let server = Fixture::start();
    let body = |text: &str, stream: bool| json!({"messages": user(text), "stream": stream, "temperature": 0, "ignore_eos": true}).to_string();
    for (n, (text, stream)) in [("LONG", true), ("LONG", false), ("PREFILL", true), ("PREFILL", false)].into_iter().enumerate() {
        let connection = server.send("POST", CHAT, &[], &body(text, stream));
        server.wait_for("it runs", |s| s.running == 1);
        if text == "LONG" {
            let before = server.session.engine().stats().generated_tokens;
            server.wait_for("it generates", |s| s.generated_tokens > before + 3);
        }
        drop(connection);
        server.wait_for("it is cancelled", |s| s.cancelled == n as u64 + 1 && s.running == 0);
    }
    let busy = server.send("POST", CHAT, &[], &body("LONG", true));
    server.wait_for("it runs", |s| s.running == 1);
    let waiting = server.send("POST", CHAT, &[], &body("LONG", false));
    server.wait_for("one waits", |s| s.queued == 1);
    drop(waiting);
    drop(busy);
    server.wait_for("both are cancelled", |s| s.cancelled == 6 && s.running == 0 && s.queued == 0);
    assert_eq!(server.post(CHAT, &json!({"messages": user("Hi")})).status, 200);
}

/// While a prompt is computed the stream says so, and the comments count its tokens.
#[test]
fn long_prefills_send_comments() {
    let server = Fixture::with(|c| c.keep_alive = Duration::from_millis(40));
    let stream = server.send("POST", CHAT, &[], &json!({"messages": user("PREFILL"), "stream": true}).to_string());
    let mut reader = BufReader::new(stream);
    let (status, _) = common::http::read_head(&mut reader);
    assert_eq!(status, 200);
    let mut progress = Vec::new();
    for line in reader.lines() {
        if let Some(counts) = line.unwrap().strip_prefix(": keepalive ") {
            let (done, total) = counts.split_once('/').unwrap();
            progress.push((done.parse::<usize>().unwrap(), total.parse::<usize>().unwrap()));
            if progress.len() == 5 {
                break;
            }
        }
    }
    assert!(progress.is_sorted() && progress[4].1 > 5, "{progress:?}");
}

/// A request that fails while it is computed: 500 when nothing was sent, an error event in a stream, and the next one works.
#[test]
fn failures_are_told() {
    let server = Fixture::start();
    let answer = server.post(CHAT, &json!({"messages": user("FAIL")}));
    let error = answer.json()["error"].clone();
    assert_eq!((answer.status, &error["type"], &error["code"]), (500, &json!("server_error"), &json!("checksum-mismatch")));
    let events = server.post(CHAT, &json!({"messages": user("FAIL"), "stream": true})).events();
    let last = events.last().unwrap();
    assert_eq!((&last["error"]["code"], &last["error"]["message"]), (&json!("checksum-mismatch"), &json!("expert 3 of layer 1 is damaged")));
    assert!(!events.contains(&json!("[DONE]")));
    assert_eq!(server.post(CHAT, &json!({"messages": user("Hi")})).status, 200);
    assert_eq!(server.get("/v1/stats").json()["requests"]["failed"], 2);
}

/// A full queue is a 429 that says when to come back; an engine that is gone is a 503.
#[test]
fn full_queues_and_gone_engines() {
    let text = std::sync::Arc::new(mach_session::TextModel::open(&common::tiny()).unwrap());
    let (handle, submissions) = EngineHandle::new(EngineInfo {
        arch: "none".into(),
        context: CONTEXT,
        context_train: CONTEXT,
        vocab: 4096,
        parameters: 0,
        weight_bytes: 0,
        signals: Vec::new(),
    });
    let stats = handle.shared_stats();
    let server = Fixture::serve(Session::new(handle, text), |_| {});
    stats.with(|s| s.queued = 64);
    for stream in [false, true] {
        let answer = server.post(CHAT, &json!({"messages": user("Hi"), "stream": stream}));
        assert_eq!((answer.status, answer.json()["error"]["code"].as_str()), (429, Some("queue_full")));
        assert!(answer.header("retry-after").is_some());
    }
    stats.with(|s| s.queued = 0);
    drop(submissions);
    let answer = server.post(CHAT, &json!({"messages": user("Hi")}));
    assert_eq!((answer.status, answer.json()["error"]["type"].as_str()), (503, Some("unavailable_error")));
}

/// Draining answers what runs and takes nothing new; aborting does not wait.
#[test]
fn shutdown_drains_and_abort_does_not_wait() {
    let server = Fixture::start();
    let stream =
        server.send("POST", CHAT, &[], &json!({"messages": user("LONG"), "max_tokens": 60, "temperature": 0, "ignore_eos": true, "stream": true}).to_string());
    server.wait_for("it runs", |s| s.generated_tokens > 2);
    server.shutdown.drain();
    let answer = Answer::read(&mut BufReader::new(stream));
    assert_eq!(answer.events().last(), Some(&json!("[DONE]")));
    let addr = server.addr;
    assert_eq!(server.join(), Ended::Drained);
    assert!(std::net::TcpStream::connect(addr).is_err());

    let server = Fixture::start();
    let session = server.session.clone();
    let _stream = server.send("POST", CHAT, &[], &json!({"messages": user("LONG"), "ignore_eos": true, "stream": true}).to_string());
    server.wait_for("it runs", |s| s.running == 1);
    server.shutdown.drain();
    server.shutdown.abort();
    let start = Instant::now();
    assert_eq!(server.join(), Ended::Aborted);
    assert!(start.elapsed() < Duration::from_secs(2));
    while session.engine().stats().cancelled == 0 {
        assert!(start.elapsed() < Duration::from_secs(5), "the request was not cancelled");
        std::thread::sleep(Duration::from_millis(5));
    }
}
