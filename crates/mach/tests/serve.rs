//! `mach serve` with the built-in model, as clients meet it.

mod support;

use std::io::{BufReader, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::server::http::{self, Answer};
use support::server::{CHAT, Server};
use support::{arg, mach};

#[path = "../../mach-server/tests/common/sdk.rs"]
mod sdk;

const QUESTION: &str = "What is the capital of France?";
const ANSWER: &str = "The capital of France is Paris.";
const STORY: &str = "Tell me a story about a fox and a bear.";
/// A bank at its floor and prompts token by token: long prompts take seconds.
const SLOW: [&str; 5] = ["--streaming", "--bank", "8%", "--prefill-chunk", "1"];

fn user(text: &str) -> Value {
    json!([{"role": "user", "content": text}])
}

/// A request that goes on for thousands of tokens.
fn endless(stream: bool) -> Value {
    json!({"messages": user(STORY), "temperature": 0, "ignore_eos": true, "stream": stream})
}

/// A prompt of some thousand tokens.
fn long_text(sentences: usize) -> String {
    "The fox saw a bear near the river and the bear was happy. ".repeat(sentences) + STORY
}

fn text(reply: &Value) -> &str {
    reply["choices"][0]["message"]["content"].as_str().unwrap()
}

fn number(value: &Value, pointer: &str) -> u64 {
    value.pointer(pointer).and_then(Value::as_u64).unwrap_or_else(|| panic!("{pointer} in {value}"))
}

/// The text of a stream's events.
fn streamed(events: &[Value]) -> String {
    events.iter().filter_map(|e| e["choices"][0]["delta"]["content"].as_str()).collect()
}

/// Everything that clients built on the openai SDK do works with the real engine too.
#[test]
fn the_openai_sdk_is_served() {
    let server = Server::start(&[]);
    sdk::check(&server.url(), &[]);
}

/// Nothing is computed for nobody: counters stand still after a client has left.
fn assert_idle(server: &Server) {
    let work = |stats: &Value| ["/tokens/generated", "/tokens/prompt", "/bank/hits", "/bank/misses", "/io/bytes_read"].map(|p| number(stats, p));
    let before = work(&server.stats());
    std::thread::sleep(Duration::from_millis(150));
    assert_eq!(work(&server.stats()), before);
}

/// A client that leaves while its answer is generated stops the computation, streamed or not, and the next one is answered.
#[test]
fn clients_that_leave_during_generation() {
    let server = Server::start(&[]);
    for (n, stream) in [true, false].into_iter().enumerate() {
        let connection =
            if stream { server.stream_until(&endless(true), 5) } else { BufReader::new(server.send("POST", CHAT, &[], &endless(false).to_string())) };
        let before = number(&server.stats(), "/tokens/generated");
        server.wait_until("it generates", |s| number(s, "/tokens/generated") > before + 5 && s["requests"]["running"] == 1);
        drop(connection);
        let waited = server.wait_for("/requests/cancelled", n as u64 + 1);
        assert!(waited < Duration::from_secs(2), "{waited:?}");
        assert_eq!(server.stats()["requests"]["running"], 0);
        assert_idle(&server);
        assert_eq!(text(&server.chat(&json!({"messages": user(QUESTION), "temperature": 0}))), ANSWER);
    }
    assert_eq!(server.stats()["requests"]["failed"], 0);
}

/// A client that leaves during a long prefill stops it long before its end. What was computed is kept, and using it changes nothing.
#[test]
fn clients_that_leave_during_a_long_prefill() {
    let slow = Server::start(&SLOW);
    for (n, stream) in [true, false].into_iter().enumerate() {
        let body = json!({"messages": user(&long_text(220)), "stream": stream});
        let misses = number(&slow.stats(), "/bank/misses");
        let connection = slow.send("POST", CHAT, &[], &body.to_string());
        slow.wait_until("it computes", |s| number(s, "/bank/misses") > misses + 100 && s["requests"]["running"] == 1);
        drop(connection);
        let waited = slow.wait_for("/requests/cancelled", n as u64 + 1);
        assert!(waited < Duration::from_secs(2), "{waited:?}");
        let stats = slow.stats();
        assert_eq!((number(&stats, "/requests/running"), number(&stats, "/tokens/generated")), (0, 0), "{stats}");
        assert_idle(&slow);
    }
    // The same beginning again: it goes on from where the others stopped.
    let again = json!({"messages": user(&long_text(220)), "temperature": 0, "max_tokens": 12});
    let (one, other) = (slow.chat(&again), Server::start(&[]).chat(&again));
    assert_eq!(text(&one), text(&other));
    assert!(number(&one, "/usage/prompt_tokens") > 3000, "{one}");
    assert!(number(&one, "/usage/prompt_tokens_details/cached_tokens") > 0, "{one}");
    assert_eq!(number(&other, "/usage/prompt_tokens_details/cached_tokens"), 0, "{other}");
}

/// Clients at once are served one after another in the order in which they came, each with its own answer; one that leaves the queue
/// costs nothing.
#[test]
fn eight_clients_are_served_in_turn() {
    let server = Server::start(&[]);
    let questions = [QUESTION, "What is 47 + 38?"];
    let alone = questions.map(|q| text(&server.chat(&json!({"messages": user(q), "temperature": 0}))).to_owned());
    // Something to wait for while the others come.
    let busy = server.stream_until(&endless(true), 2);
    let clients: Vec<_> = (0..8)
        .map(|i| {
            let body = json!({"messages": user(questions[i % 2]), "temperature": 0, "stream": i % 3 == 0});
            let sent = Instant::now();
            let connection = server.send("POST", CHAT, &[], &body.to_string());
            server.wait_for("/requests/queued", i as u64 + 1);
            (sent, Instant::now(), connection)
        })
        .collect();
    let gone = server.send("POST", CHAT, &[], &endless(false).to_string());
    server.wait_for("/requests/queued", 9);
    drop((gone, busy));
    let mut last_end = None;
    for (i, (sent, seen, connection)) in clients.into_iter().enumerate() {
        let answer = Answer::read(&mut BufReader::new(connection));
        let (said, timings) = if i % 3 == 0 {
            let events = answer.events();
            (streamed(&events), events[events.len() - 2]["timings"].clone())
        } else {
            (text(&answer.json()).to_owned(), answer.json()["timings"].clone())
        };
        assert_eq!(said, alone[i % 2], "client {i}");
        let ms = |key: &str| Duration::from_secs_f64(timings[key].as_f64().unwrap() / 1e3);
        // It was queued between `sent` and `seen`, so this is the latest that it can have begun: not before the one before it had ended.
        let (latest_begin, earliest_end) = (seen + ms("queue_ms"), sent + ms("queue_ms") + ms("prompt_ms") + ms("predicted_ms"));
        assert!(last_end.is_none_or(|end| latest_begin >= end), "client {i} was not served in turn");
        last_end = Some(earliest_end);
    }
    server.wait_for("/requests/cancelled", 2);
    let stats = server.stats();
    assert_eq!((number(&stats, "/requests/finished"), number(&stats, "/requests/running"), number(&stats, "/requests/queued")), (10, 0, 0));
}

/// The same seed gives the same text: again, streamed, with the seed that an answer names, and at the command line.
#[test]
fn the_same_seed_repeats() {
    let server = Server::start(&[]);
    let body = |seed: Value, stream: bool| json!({"messages": user(STORY), "temperature": 1.2, "max_tokens": 40, "seed": seed, "stream": stream});
    let first = server.chat(&body(json!(5), false));
    assert_eq!(text(&server.chat(&body(json!(5), false))), text(&first));
    assert_eq!(streamed(&server.post(CHAT, &body(json!(5), true)).events()), text(&first));
    assert_ne!(text(&server.chat(&body(json!(6), false))), text(&first));
    let random = server.chat(&body(Value::Null, false));
    assert_eq!(text(&server.chat(&body(random["seed"].clone(), false))), text(&random));
    let generated = mach(&["generate", STORY, "--temperature", "1.2", "-n", "40", "--seed", "5", "--json", "--bank", "10%"]).json();
    assert_eq!(generated["text"], text(&first));
}

/// Usage counts what the tokenizer counts, with tools and template variables too.
#[test]
fn usage_is_what_the_tokenizer_counts() {
    let server = Server::start(&[]);
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, value: &Value| {
        let path = dir.path().join(name);
        std::fs::write(&path, value.to_string()).unwrap();
        path
    };
    let count = |args: &[&str]| mach(&[&["tokenize", "--json"][..], args].concat()).json()["tokens"].as_array().unwrap().len() as u64;
    let history = json!([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüße, 東京 🦊!"},
        {"role": "assistant", "content": "Hm?"}, {"role": "user", "content": QUESTION}]);
    let tools =
        json!([{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}]);
    let (history_file, tools_file) = (file("messages.json", &history), file("tools.json", &tools));
    let cases: [(Value, &[&str]); 3] = [
        (json!({}), &[]),
        (json!({"tools": tools}), &["--tools", arg(&tools_file)]),
        (json!({"chat_template_kwargs": {"enable_thinking": true}}), &["--template-kwargs", r#"{"enable_thinking": true}"#]),
    ];
    for (more, flags) in cases {
        let mut body = json!({"messages": history, "temperature": 0, "max_tokens": 3});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let usage = server.chat(&body)["usage"].clone();
        let prompt = count(&[&["--messages", arg(&history_file)], flags].concat());
        assert_eq!((number(&usage, "/prompt_tokens"), number(&usage, "/completion_tokens")), (prompt, 3), "{body}");
        assert_eq!(number(&usage, "/total_tokens"), prompt + 3);
    }
    let reply = server.chat(&json!({"messages": user(QUESTION), "temperature": 0}));
    assert_eq!((text(&reply), number(&reply, "/usage/completion_tokens")), (ANSWER, count(&[ANSWER])));
    let reply = server.post("/v1/completions", &json!({"prompt": "Once upon <|im_start|> a time", "temperature": 0, "max_tokens": 2})).json();
    assert_eq!(number(&reply, "/usage/prompt_tokens"), count(&["Once upon <|im_start|> a time"]));
    let total = number(&server.stats(), "/tokens/generated");
    assert_eq!(total, 3 * 3 + count(&[ANSWER]) + 2);
}

/// A prompt that does not fit is refused before the first byte in the words that agents look for; an answer that meets the limit ends there.
#[test]
fn context_overflow() {
    let server = Server::start(&["--ctx-size", "256"]);
    for stream in [false, true] {
        let answer = server.post(CHAT, &json!({"messages": user(&"word ".repeat(400)), "stream": stream, "max_tokens": 1}));
        assert_eq!((answer.status, answer.header("content-type")), (400, Some("application/json")), "{answer:?}");
        let error = answer.json()["error"].clone();
        assert_eq!(
            (&error["type"], &error["code"], &error["param"]),
            (&json!("exceed_context_size_error"), &json!("context_length_exceeded"), &json!("messages"))
        );
        assert!(number(&error, "/n_prompt_tokens") > 256 && error["n_ctx"] == 256, "{error}");
        let message = error["message"].as_str().unwrap();
        assert!(message.contains("maximum context length is 256 tokens") && message.contains("exceeds the available context size"), "{message}");
    }
    let mut body = endless(false);
    body["max_tokens"] = json!(100_000);
    let reply = server.chat(&body);
    assert_eq!((&reply["choices"][0]["finish_reason"], number(&reply, "/usage/total_tokens")), (&json!("length"), 256));
    assert_eq!(server.get("/v1/models").json()["data"][0]["max_model_len"], 256);
}

/// A conversation that goes on reuses what was computed, says how much, and says exactly what a server says that starts from nothing.
#[test]
fn reuse_is_exact_and_counted() {
    for thinking in [false, true] {
        let warm = Server::start(&[]);
        let mut messages = Vec::new();
        let mut before = 0;
        let turns = ["What is 47 + 38?", STORY, QUESTION];
        for (turn, question) in turns.into_iter().enumerate() {
            messages.push(json!({"role": "user", "content": question}));
            let body = json!({"messages": messages, "temperature": if turn == 1 { 1.0 } else { 0.0 }, "seed": 3, "max_tokens": 60,
                "chat_template_kwargs": {"enable_thinking": thinking}});
            let (reply, fresh) = (warm.chat(&body), Server::start(&["--bank", "50%"]).chat(&body));
            assert_eq!(reply["choices"][0]["message"], fresh["choices"][0]["message"], "turn {turn}");
            let cached = number(&reply, "/usage/prompt_tokens_details/cached_tokens");
            let prompt = number(&reply, "/usage/prompt_tokens");
            assert_eq!((number(&fresh, "/usage/prompt_tokens_details/cached_tokens"), number(&fresh, "/usage/prompt_tokens")), (0, prompt));
            // At least to the end of the last question; the whole answer too where the template renders it as it was generated.
            assert!(cached >= before && cached < prompt, "turn {turn}: {cached} of {prompt}, at least {before}");
            assert_eq!(number(&reply, "/timings/cache_n") + number(&reply, "/timings/prompt_n"), prompt);
            let said = text(&reply);
            let thought = reply["choices"][0]["message"]["reasoning_content"].as_str().unwrap_or_default();
            assert_eq!(number(&reply, "/usage/completion_tokens_details/reasoning_tokens") > 0, thinking, "{reply}");
            // Else there is nothing that the next prompt leaves out.
            assert!(turn > 0 || thought.is_empty() != thinking, "{reply}");
            // The header of the assistant's turn is rendered anew when thoughts are dropped.
            // The token that met the limit was never computed on.
            let computed = number(&reply, "/usage/completion_tokens") - u64::from(reply["choices"][0]["finish_reason"] == "length");
            before = if thinking { prompt - 8 } else { prompt + computed };
            messages.push(json!({"role": "assistant", "content": said.trim(), "reasoning_content": thought.trim()}));
        }
        // The last question put another way: back to where it began.
        let last = messages.len() - 2;
        messages.truncate(last);
        messages.push(json!({"role": "user", "content": "What is the capital of Japan?"}));
        let body = json!({"messages": messages, "temperature": 0, "chat_template_kwargs": {"enable_thinking": thinking}});
        let (reply, fresh) = (warm.chat(&body), Server::start(&[]).chat(&body));
        assert_eq!(text(&reply), text(&fresh));
        assert!(number(&reply, "/usage/prompt_tokens_details/cached_tokens") > 20, "{reply}");
    }
}

/// The built-in model calls a tool, gets its result and answers; the calls' turn is reused, streams say the same, and usage counts it all.
#[test]
fn tools_are_called_and_answered() {
    let server = Server::start(&[]);
    let integer = json!({"type": "integer"});
    let schema = json!({"type": "object", "properties": {"a": integer, "b": integer}, "required": ["a", "b"]});
    let tools = json!([{"type": "function", "function": {"name": "add_numbers", "description": "Add two numbers.", "parameters": schema}}]);
    let mut body = json!({"messages": user("Please add 12 and 30 with the tool."), "tools": tools, "temperature": 0});
    let reply = server.chat(&body);
    let choice = &reply["choices"][0];
    let call = &choice["message"]["tool_calls"][0];
    assert_eq!((&choice["finish_reason"], &call["function"]["name"]), (&json!("tool_calls"), &json!("add_numbers")), "{reply}");
    let arguments: Value = serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
    assert_eq!(arguments, json!({"a": 12, "b": 30}));
    assert!(choice["message"]["content"].is_null() && number(&reply, "/usage/completion_tokens") > 10, "{reply}");

    body["stream"] = true.into();
    let events = server.post(CHAT, &body).events();
    let deltas = events.iter().filter_map(|e| e["choices"][0]["delta"]["tool_calls"][0]["function"]["arguments"].as_str());
    assert_eq!(deltas.clone().collect::<String>(), call["function"]["arguments"].as_str().unwrap());
    assert!(deltas.count() > 2, "arguments are told while they are written");

    body["stream"] = false.into();
    let result = json!({"role": "tool", "tool_call_id": call["id"], "content": "42"});
    body["messages"].as_array_mut().unwrap().extend([choice["message"].clone(), result]);
    let (answer, fresh) = (server.chat(&body), Server::start(&["--bank", "50%"]).chat(&body));
    assert!(text(&answer).contains("42") && answer["choices"][0]["finish_reason"] == "stop", "{answer}");
    assert_eq!(text(&answer), text(&fresh));
    // The call is rendered as it was generated, so the whole turn is there already.
    let turn = number(&reply, "/usage/prompt_tokens") + number(&reply, "/usage/completion_tokens");
    assert!(number(&answer, "/usage/prompt_tokens_details/cached_tokens") >= turn, "{reply} {answer}");
}

/// SIGTERM lets answers under way and in the queue finish and takes nothing new; the process ends with 0.
#[test]
fn sigterm_drains() {
    let mut server = Server::start(&[]);
    let mut body = endless(true);
    body["max_tokens"] = json!(400);
    let mut stream = server.stream_until(&body, 3);
    let waiting = server.send("POST", CHAT, &[], &json!({"messages": user(QUESTION), "temperature": 0}).to_string());
    server.wait_for("/requests/queued", 1);
    server.terminate();
    let mut rest = String::new();
    while let Some(chunk) = http::read_chunk(&mut stream) {
        rest.push_str(std::str::from_utf8(&chunk).unwrap());
    }
    assert!(rest.contains(r#""finish_reason":"length""#) && rest.ends_with("data: [DONE]\n\n"), "{rest}");
    assert_eq!(text(&Answer::read(&mut BufReader::new(waiting)).json()), ANSWER);
    assert_eq!(server.wait().code(), Some(0));
    assert!(TcpStream::connect(server.addr).is_err());
    // An idle server ends at once, the moment after it says that it listens, an idle connection notwithstanding.
    let mut server = Server::start(&[]);
    let _idle = http::connect(server.addr);
    server.terminate();
    assert_eq!(server.wait().code(), Some(0));
}

/// The second signal does not wait for anybody.
#[test]
fn the_second_signal_ends_at_once() {
    let mut server = Server::start(&SLOW);
    let _prefill = server.send("POST", CHAT, &[], &json!({"messages": user(&long_text(220)), "stream": true}).to_string());
    server.wait_for("/requests/running", 1);
    server.terminate();
    while TcpStream::connect(server.addr).is_ok() {
        std::thread::sleep(Duration::from_millis(5));
    }
    let start = Instant::now();
    server.terminate();
    assert_eq!(server.wait().code(), Some(130));
    assert!(start.elapsed() < Duration::from_secs(1));
}

/// On loopback a page that rebinds its name to this machine is refused; any `model` is served and echoed.
#[test]
fn hosts_and_model_names() {
    let server = Server::start(&["--alias", "mine"]);
    let status = |headers: &[(&str, &str)]| Answer::read(&mut BufReader::new(server.send("GET", "/v1/models", headers, ""))).status;
    assert_eq!(status(&[]), 200);
    assert_eq!(status(&[("Host", "localhost:8080")]), 200);
    assert_eq!(status(&[("Host", "evil.example")]), 403);
    assert_eq!(status(&[("Origin", "https://evil.example")]), 403);
    let body = |model: Value, stream: bool| json!({"model": model, "messages": user(QUESTION), "temperature": 0, "stream": stream});
    assert_eq!(server.chat(&body(json!("gpt-99/unheard-of"), false))["model"], "gpt-99/unheard-of");
    let events = server.post(CHAT, &body(json!("gpt-99/unheard-of"), true)).events();
    let (done, chunks) = events.split_last().unwrap();
    assert!(done == "[DONE]" && chunks.iter().all(|c| c["model"] == "gpt-99/unheard-of"), "{events:?}");
    assert_eq!(server.chat(&body(Value::Null, false))["model"], "mine");
    assert_eq!(server.get("/v1/models").json()["data"][0]["id"], "mine");
}

/// As curl does: several requests on one connection, a stream among them, and a body that waits for leave to be sent.
#[test]
fn connections_are_kept() {
    let server = Server::start(&[]);
    let mut reader = BufReader::new(http::connect(server.addr));
    let body = |stream: bool| json!({"messages": user(QUESTION), "temperature": 0, "stream": stream}).to_string();
    for stream in [false, true, false] {
        http::send(reader.get_mut(), "POST", CHAT, &[("User-Agent", "curl/8.5.0"), ("Accept", "*/*")], &body(stream));
        let answer = Answer::read(&mut reader);
        assert_eq!(answer.status, 200, "{answer:?}");
        assert_eq!(if stream { streamed(&answer.events()) } else { text(&answer.json()).to_owned() }, ANSWER);
    }
    // An error leaves the connection usable.
    http::send(reader.get_mut(), "POST", CHAT, &[], r#"{"messages": 1}"#);
    assert_eq!(Answer::read(&mut reader).status, 400);
    let body = body(false);
    let head = format!("POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\nExpect: 100-continue\r\n\r\n", body.len());
    reader.get_mut().write_all(head.as_bytes()).unwrap();
    assert_eq!(http::read_head(&mut reader).0, 100);
    reader.get_mut().write_all(body.as_bytes()).unwrap();
    assert_eq!(text(&Answer::read(&mut reader).json()), ANSWER);
    let stats = server.stats();
    assert_eq!((number(&stats, "/requests/finished"), number(&stats, "/requests/cancelled")), (4, 0), "{stats}");
    // When the client closes, so does the server.
    reader.get_mut().shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(reader.read(&mut [0; 1]).unwrap(), 0);
}
