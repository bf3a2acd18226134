//! Sessions on the built-in model's tokenizer and template, with a scripted engine thread.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::channel;

use mach_engine::{EngineHandle, EngineInfo, Event, FinishReason, Receipt, Sampling, Submission, SubmitError, Verdict};
use mach_session::{ChatInput, GenerateRequest, Prompt, ReplyReader, ReplyUpdate, SamplingOverrides, Session, SessionError, TextEvent, TextModel};
use mach_text::{ReplyMessage, ToolCall};
use serde_json::{Map, Value, json};

fn tiny() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny")
}

fn info(context: usize) -> EngineInfo {
    EngineInfo { arch: "scripted".into(), context, context_train: context, vocab: 4100, parameters: 0, weight_bytes: 0, signals: Vec::new() }
}

/// What the engine thread saw of a request.
#[derive(Debug)]
struct Seen {
    prompt: Vec<u32>,
    sampling: Sampling,
    stop_ids: Vec<u32>,
    snapshot_at: Vec<usize>,
    accepted: usize,
    masked: usize,
}

/// A session whose engine says `script` to every request, obeying policy, stop ids and cancellation as the real one does.
/// Every token is first accepted together with a wrong draft that is rolled back.
fn session(script: &str) -> (Session, std::sync::mpsc::Receiver<Seen>) {
    session_of(TextModel::open(&tiny()).unwrap(), script)
}

fn session_of(text: TextModel, script: &str) -> (Session, std::sync::mpsc::Receiver<Seen>) {
    let text = Arc::new(text);
    let script = text.tokenizer().encode(script, false).unwrap();
    let (handle, submissions) = EngineHandle::new(info(512));
    let (tx, seen) = channel();
    let stats = handle.shared_stats();
    std::thread::spawn(move || {
        for mut submission in submissions {
            stats.with(|s| s.queued -= 1);
            let _ = tx.send(run(&mut submission, &script));
        }
    });
    (Session::new(handle, text), seen)
}

fn run(submission: &mut Submission, script: &[u32]) -> Seen {
    let request = &mut submission.request;
    let total = request.prompt.len();
    (submission.sink)(Event::Prefill { done: total, total, cached: 0 });
    let (mut accepted, mut masked, mut reason) = (0, 0, FinishReason::Length);
    for &id in script {
        if submission.cancel.is_cancelled() {
            reason = FinishReason::Cancelled;
            break;
        }
        if request.stop_ids.contains(&id) {
            reason = FinishReason::Stop;
            break;
        }
        if request.max_tokens.is_some_and(|max| accepted >= max) {
            break;
        }
        let mut verdict = Verdict::Continue;
        if let Some(policy) = &mut request.policy {
            let mut logits = vec![0.0f32; 4100];
            policy.mask(&mut logits);
            masked = logits.iter().filter(|l| l.is_infinite()).count();
            policy.accept(77);
            policy.accept(78);
            policy.rollback(2);
            verdict = policy.accept(id);
        }
        accepted += 1;
        (submission.sink)(Event::Token { id, logits: None });
        if verdict == Verdict::Stop {
            reason = FinishReason::Stop;
            break;
        }
    }
    let receipt = Receipt { prompt_tokens: total, completion_tokens: accepted, ..Receipt::default() };
    (submission.sink)(Event::Finished { reason, receipt });
    Seen {
        prompt: request.prompt.clone(),
        sampling: request.sampling.clone(),
        stop_ids: request.stop_ids.clone(),
        snapshot_at: request.snapshot_at.clone(),
        accepted,
        masked,
    }
}

fn chat<'a>(messages: &'a Value, kwargs: &'a Map<String, Value>) -> ChatInput<'a> {
    ChatInput { messages, tools: None, kwargs, add_generation_prompt: true }
}

/// A chat goes in as the template's tokens and comes out as text, ended by the end token, with the checkpoint's sampling.
#[test]
fn a_chat_becomes_tokens_and_text() {
    let (session, seen) = session("Hëllo 🙂, wörld<think>x</think><|im_end|>never");
    let messages = json!([{"role": "user", "content": "Hi"}]);
    let prompt = session.text().chat_prompt(chat(&messages, &Map::new())).unwrap();
    assert_eq!(prompt.text, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n");
    let reply = session.generate(GenerateRequest { prompt: prompt.clone(), ..Default::default() }).unwrap().wait().unwrap();
    assert_eq!(reply.text, "Hëllo 🙂, wörld<think>x</think>");
    assert_eq!((reply.reason, reply.stop), (FinishReason::Stop, None));
    assert_eq!(session.text().tokenizer().decode(&reply.tokens), reply.text);
    let seen = seen.recv().unwrap();
    assert_eq!((seen.prompt, seen.stop_ids), (prompt.tokens, vec![4088, 4086]));
    assert_eq!((seen.sampling.temperature, seen.sampling.top_k, seen.sampling.top_p), (0.7, 20, 0.9));
    assert_eq!(seen.masked, 4, "rows beyond the tokenizer are kept from sampling");
}

/// Stop strings over token borders end the computation at once, after rolled back drafts too, and never show.
#[test]
fn stop_strings_end_the_row() {
    let script = "The quick brown fox jumps over the lazy dog. The end of the story is here.";
    for (stop, want) in [("x jum", "The quick brown fo"), ("The end", "The quick brown fox jumps over the lazy dog. "), ("The", "")] {
        let (session, seen) = session(script);
        let request = GenerateRequest { prompt: session.text().raw_prompt("go").unwrap(), stop: vec!["never".into(), stop.into()], ..Default::default() };
        let mut text = String::new();
        let mut last = None;
        for event in session.generate(request).unwrap() {
            match event {
                TextEvent::Delta { text: piece, .. } => {
                    text.push_str(&piece);
                    assert!(want.starts_with(&text), "{text:?} leaks {stop:?}");
                }
                event => last = Some(event),
            }
        }
        assert_eq!(text, want);
        assert!(matches!(last, Some(TextEvent::Finished { reason: FinishReason::Stop, stop: Some(found), .. }) if found == stop));
        let all = session.text().tokenizer().encode(script, false).unwrap().len();
        let accepted = seen.recv().unwrap().accepted;
        assert!(accepted < all, "{stop:?}: {accepted} of {all}");
    }
}

/// Going back further than the policy keeps states gives the same as never having gone there.
#[test]
fn long_roll_backs_are_exact() {
    let text = TextModel::open(&tiny()).unwrap();
    let (handle, submissions) = EngineHandle::new(info(4096));
    let session = Session::new(handle, Arc::new(text));
    let _stream = session.generate(GenerateRequest { prompt: Prompt::from_tokens(vec![1]), stop: vec!["dog cat".into()], ..Default::default() }).unwrap();
    let mut policy = submissions.recv().unwrap().request.policy.unwrap();
    let tokens = session.text().tokenizer().encode("a dog", false).unwrap();
    for &id in &tokens {
        assert_eq!(policy.accept(id), Verdict::Continue);
    }
    for _ in 0..200 {
        policy.accept(50);
    }
    policy.rollback(200);
    let rest = session.text().tokenizer().encode(" cat", false).unwrap();
    let verdicts: Vec<Verdict> = rest.iter().map(|&id| policy.accept(id)).collect();
    assert_eq!(verdicts.last(), Some(&Verdict::Stop));
}

/// A stream that is dropped cancels; ids and raw text skip template and checkpoint sampling when asked to.
#[test]
fn raw_requests_and_cancellation() {
    let (session, seen) = session("one two three");
    let request = GenerateRequest {
        prompt: Prompt::from_tokens(vec![5, 6, 7]),
        ignore_generation_config: true,
        ignore_eos: true,
        max_tokens: Some(2),
        sampling: SamplingOverrides { seed: Some(3), ..Default::default() },
        ..Default::default()
    };
    let reply = session.generate(request.clone()).unwrap().wait().unwrap();
    assert_eq!((reply.tokens.len(), reply.reason), (2, FinishReason::Length));
    let got = seen.recv().unwrap();
    assert_eq!(got.sampling, Sampling { seed: 3, ..Sampling::default() });
    assert_eq!((got.prompt, got.stop_ids, got.snapshot_at), (vec![5, 6, 7], vec![], vec![]));

    let stream = session.generate(request).unwrap();
    let token = stream.cancel_token();
    drop(stream);
    assert!(token.is_cancelled());
}

/// Prompts that cannot run are refused before anything is computed, by name.
#[test]
fn refusals_are_named() {
    let (session, _seen) = session("x");
    let ask = |tokens: Vec<u32>| {
        let request = GenerateRequest { prompt: Prompt::from_tokens(tokens), ..Default::default() };
        session.generate(request).err().map(|e| (e.code(), matches!(e, SessionError::Submit(SubmitError::ContextOverflow { prompt: 600, context: 512 }))))
    };
    assert_eq!(ask(vec![1; 600]), Some(("context-overflow", true)));
    assert_eq!(ask(vec![]), Some(("empty-prompt", false)));
    assert_eq!(ask(vec![9999]), Some(("token-out-of-range", false)));
}

/// An engine that dies ends the stream with a failure instead of hanging it.
#[test]
fn a_dead_engine_is_a_failure() {
    let text = Arc::new(TextModel::open(&tiny()).unwrap());
    let (handle, submissions) = EngineHandle::new(info(64));
    let session = Session::new(handle, text);
    let stream = session.generate(GenerateRequest { prompt: Prompt::from_tokens(vec![1]), ..Default::default() }).unwrap();
    drop(submissions);
    assert_eq!(stream.wait().unwrap_err().code(), "engine-gone");
}

/// Snapshots lie where the next request still agrees: before the last user turn, and at its end, before what templates re-render.
#[test]
fn snapshots_survive_the_next_turn() {
    let (session, _seen) = session("x");
    let model = session.text();
    let thinking: Map<String, Value> = [("enable_thinking".to_owned(), json!(true))].into_iter().collect();
    let mut messages = vec![
        json!({"role": "system", "content": "Be brief."}),
        json!({"role": "user", "content": "First question about dogs"}),
        json!({"role": "assistant", "content": "Answer"}),
        json!({"role": "user", "content": "Second question about cats"}),
    ];
    let now = Value::Array(messages.clone());
    let prompt = model.chat_prompt(chat(&now, &thinking)).unwrap();
    let text_at = |p: usize| {
        model.tokenizer().encode(&prompt.text, false).unwrap()[..p].iter().map(|&t| model.tokenizer().token_bytes(t).unwrap()).collect::<Vec<_>>().concat()
    };
    assert_eq!(prompt.snapshot_at.len(), 2, "{:?}", prompt.snapshot_at);
    assert!(text_at(prompt.snapshot_at[0]).ends_with(b"Answer<|im_end|>\n<|im_start|>user\n"));
    assert!(text_at(prompt.snapshot_at[1]).ends_with(b"about cats<|im_end|>\n"));

    // The reply's reasoning is dropped from the next prompt: it agrees up to the last snapshot, not to the end.
    messages.push(json!({"role": "assistant", "reasoning_content": "hmm", "content": "Meow"}));
    messages.push(json!({"role": "user", "content": "Third"}));
    let next = Value::Array(messages);
    let next = model.chat_prompt(chat(&next, &thinking)).unwrap();
    let common = prompt.tokens.iter().zip(&next.tokens).take_while(|(a, b)| a == b).count();
    assert!(common >= prompt.snapshot_at[1], "{common} {:?}", prompt.snapshot_at);
    assert!(next.snapshot_at.iter().all(|&p| p < next.tokens.len()));
}

/// A conversation without a user turn, or in parts, needs no snapshot to render.
#[test]
fn odd_conversations_still_render() {
    let (session, _seen) = session("x");
    let kwargs = Map::new();
    let messages = json!([{"role": "system", "content": "Alone"}]);
    assert!(session.text().chat_prompt(chat(&messages, &kwargs)).unwrap().snapshot_at.is_empty());
    assert_eq!(session.text().chat_prompt(chat(&json!(["x"]), &kwargs)).unwrap_err().code(), "bad-messages");
}

/// A reply comes in parts, its reasoning tokens are counted, and with one call allowed nothing behind it is told.
#[test]
fn replies_come_in_parts() {
    let calls = |city: &str| format!("<tool_call>\n<function=get_weather>\n<parameter=city>\n{city}\n</parameter>\n</function>\n</tool_call>");
    let (session, _seen) = session(&format!("I think.\n</think>\n\nWait.\n{}\n{}<|im_end|>", calls("Oslo"), calls("Rome")));
    let kwargs: Map<String, Value> = [("enable_thinking".to_owned(), json!(true))].into_iter().collect();
    let tools = json!([{"type": "function", "function": {"name": "get_weather"}}]);
    let messages = json!([{"role": "user", "content": "Weather?"}]);
    let prompt = session.text().chat_prompt(ChatInput { tools: Some(&tools), ..chat(&messages, &kwargs) }).unwrap();
    for (one_call, cities) in [(false, vec!["Oslo", "Rome"]), (true, vec!["Oslo"])] {
        let mut reader = ReplyReader::new(session.text(), &prompt, Some(&tools)).one_call(one_call);
        let mut message = ReplyMessage::default();
        let mut end = None;
        for event in session.generate(GenerateRequest { prompt: prompt.clone(), ..Default::default() }).unwrap() {
            match reader.read(event) {
                ReplyUpdate::Parts(parts) => parts.into_iter().for_each(|part| message.push(part)),
                ReplyUpdate::Finished { parts, calls, reasoning_tokens, .. } => {
                    parts.into_iter().for_each(|part| message.push(part));
                    end = Some((calls, reasoning_tokens));
                }
                _ => {}
            }
        }
        assert_eq!((message.reasoning.as_str(), message.content.as_str()), ("I think.", "Wait."));
        let want: Vec<ToolCall> = cities.iter().map(|c| ToolCall { name: "get_weather".into(), arguments: format!("{{\"city\": \"{c}\"}}") }).collect();
        assert_eq!(message.calls, want);
        let thought = session.text().tokenizer().encode("I think.\n</think>", false).unwrap().len();
        assert_eq!(end, Some((cities.len(), thought)));
        assert_eq!(reader.is_done(), one_call);
    }
}

/// The markup of channels is made of special tokens, which no text shows: a reply is read through them all the same, its turn ends with a call
/// whatever the checkpoint's files say, and earlier messages are brought to the one call that the template takes.
#[test]
fn special_tokens_mark_up_replies() {
    let dir = tempfile::tempdir().unwrap();
    let mut tokenizer: Value = serde_json::from_slice(&std::fs::read(tiny().join("tokenizer.json")).unwrap()).unwrap();
    for (i, token) in ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>", "<|constrain|>"].into_iter().enumerate() {
        let added = json!({"id": 4096 + i, "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
        tokenizer["added_tokens"].as_array_mut().unwrap().push(added);
    }
    let template = "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.thinking }}|{{ m.content }}|{{ m.tool_calls | length }}<|end|>{% endfor %}\
                    {% if add_generation_prompt %}<|start|>assistant{% endif %}{# <|channel|> #}";
    for (name, text) in [("tokenizer.json", tokenizer.to_string()), ("chat_template.jinja", template.to_owned()), ("config.json", "{}".to_owned())] {
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    let script =
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{\"a\": 1}<|call|>";
    let (session, seen) = session_of(TextModel::open(dir.path()).unwrap(), script);
    let (kwargs, tools) = (Map::new(), json!([{"type": "function", "function": {"name": "f"}}]));
    let calls = json!([{"function": {"name": "f", "arguments": {}}}, {"function": {"name": "g", "arguments": {}}}]);
    let messages = json!([{"role": "user", "content": "x"}, {"role": "assistant", "content": "c", "reasoning_content": "r", "tool_calls": calls},
        {"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}]);
    let prompt = session.text().chat_prompt(ChatInput { tools: Some(&tools), ..chat(&messages, &kwargs) }).unwrap();
    assert_eq!(
        prompt.text,
        "<|start|>user<|message|>|x|0<|end|><|start|>assistant<|message|>r\n\nc||1<|end|><|start|>tool<|message|>|1|0<|end|>\
         <|start|>assistant<|message|>||1<|end|><|start|>tool<|message|>|2|0<|end|><|start|>assistant"
    );
    let mut reader = ReplyReader::new(session.text(), &prompt, Some(&tools));
    let mut message = ReplyMessage::default();
    for event in session.generate(GenerateRequest { prompt: prompt.clone(), markup: true, ..Default::default() }).unwrap() {
        if let ReplyUpdate::Parts(parts) | ReplyUpdate::Finished { parts, .. } = reader.read(event) {
            parts.into_iter().for_each(|part| message.push(part));
        }
    }
    assert_eq!((message.reasoning.as_str(), message.content.as_str()), ("Hm.", ""));
    assert_eq!(message.calls, [ToolCall { name: "f".into(), arguments: "{\"a\": 1}".into() }]);
    let id = |token: &str| session.text().tokenizer().token_id(token).unwrap();
    assert_eq!(seen.recv().unwrap().stop_ids, [id("<|return|>"), id("<|call|>")]);
    let plain = session.generate(GenerateRequest { prompt, ..Default::default() }).unwrap().wait().unwrap();
    assert!(plain.text.starts_with("analysisHm.assistant"), "{}", plain.text);
}
