//! Reasoning and tool calls in answers, over real sockets, with the built-in model's template.

mod common;

use common::{Fixture, REPLY};
use serde_json::{Map, Value, json};

const CHAT: &str = "/v1/chat/completions";
const OSLO: &str = "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>";
const TIME: &str = "<tool_call>\n<function=get_time>\n</function>\n</tool_call>";

fn tools() -> Value {
    let schema = json!({"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}});
    json!([{"type": "function", "function": {"name": "get_weather", "parameters": schema}}, {"type": "function", "function": {"name": "get_time"}}])
}

/// A request to which the scripted engine says `reply`.
fn say(reply: &str, more: Value) -> Value {
    let mut request = json!({"messages": [{"role": "user", "content": format!("SAY({reply})SAY")}], "temperature": 0, "tools": tools()});
    request.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap_or_else(Map::new));
    request
}

/// The message that a stream's deltas come to, as clients put it together, and its finish reason.
fn streamed(server: &Fixture, mut request: Value) -> (Value, Value) {
    request["stream"] = true.into();
    let (mut content, mut reasoning, mut calls, mut finish) = (String::new(), String::new(), Vec::<Value>::new(), Value::Null);
    for event in server.post(CHAT, &request).events().iter().filter(|e| e.is_object()) {
        let choice = &event["choices"][0];
        let delta = &choice["delta"];
        content.push_str(delta["content"].as_str().unwrap_or_default());
        reasoning.push_str(delta["reasoning_content"].as_str().unwrap_or_default());
        for part in delta["tool_calls"].as_array().into_iter().flatten() {
            let index = part["index"].as_u64().unwrap() as usize;
            if index == calls.len() {
                assert!(part["id"].is_string() && part["type"] == "function" && part["function"]["name"].is_string(), "{part}");
                calls.push(json!({"name": part["function"]["name"], "arguments": ""}));
            } else {
                assert!(part.get("id").is_none() && part["function"].get("name").is_none(), "{part}");
            }
            let arguments = format!("{}{}", calls[index]["arguments"].as_str().unwrap(), part["function"]["arguments"].as_str().unwrap());
            calls[index]["arguments"] = arguments.into();
        }
        if !choice["finish_reason"].is_null() {
            finish = choice["finish_reason"].clone();
        }
    }
    (json!({"content": content, "reasoning": reasoning, "calls": calls}), finish)
}

/// The same of an answer in one piece.
fn whole(server: &Fixture, request: &Value) -> (Value, Value) {
    let body = server.post(CHAT, request).json();
    let choice = &body["choices"][0];
    let message = &choice["message"];
    let mut ids = Vec::new();
    let calls: Vec<Value> = message["tool_calls"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|call| {
            assert_eq!(call["type"], "function");
            ids.push(call["id"].as_str().filter(|id| id.starts_with("call_") && id.len() > 20).unwrap().to_owned());
            call["function"].clone()
        })
        .collect();
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), calls.len(), "every call has its own id");
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    (json!({"content": text(&message["content"]), "reasoning": text(&message["reasoning_content"]), "calls": calls}), choice["finish_reason"].clone())
}

/// Calls, content and reasoning come apart, streamed and whole alike.
#[test]
fn answers_come_in_parts() {
    let server = Fixture::start();
    let weather = json!({"name": "get_weather", "arguments": "{\"city\": \"Oslo\", \"days\": 3}"});
    let time = json!({"name": "get_time", "arguments": "{}"});
    let thinking = json!({"chat_template_kwargs": {"enable_thinking": true}});
    let cases = [
        (OSLO.to_owned(), json!({}), json!({"content": "", "reasoning": "", "calls": [weather]}), "tool_calls"),
        (format!("I look.\n\n{OSLO}\n{TIME}"), json!({}), json!({"content": "I look.", "reasoning": "", "calls": [weather, time]}), "tool_calls"),
        (
            format!("I look.\n\n{OSLO}\n{TIME}"),
            json!({"parallel_tool_calls": false}),
            json!({"content": "I look.", "reasoning": "", "calls": [weather]}),
            "tool_calls",
        ),
        (format!("Hm.\n</think>\n\n{TIME}"), thinking.clone(), json!({"content": "", "reasoning": "Hm.", "calls": [time]}), "tool_calls"),
        ("Hm.\n</think>\n\nYes.".to_owned(), thinking, json!({"content": "Yes.", "reasoning": "Hm.", "calls": []}), "stop"),
        (
            "<tool_call>\nnothing\n</tool_call>".to_owned(),
            json!({}),
            json!({"content": "<tool_call>\nnothing\n</tool_call>", "reasoning": "", "calls": []}),
            "stop",
        ),
        (TIME.to_owned(), json!({"tool_choice": "none"}), json!({"content": TIME, "reasoning": "", "calls": []}), "stop"),
    ];
    for (reply, more, want, finish) in cases {
        let request = say(&reply, more);
        assert_eq!(whole(&server, &request), (want.clone(), json!(finish)), "{request}");
        assert_eq!(streamed(&server, request.clone()), (want, json!(finish)), "{request}");
    }
    assert_eq!(server.post(CHAT, &say(OSLO, json!({}))).json()["choices"][0]["message"]["content"], Value::Null);
}

/// A call that the limit cuts off is no call: its text is content, and the reason is the limit.
#[test]
fn cut_calls_come_back_as_text() {
    let server = Fixture::start();
    let request = say(OSLO, json!({"max_tokens": 16}));
    let (message, finish) = whole(&server, &request);
    let content = message["content"].as_str().unwrap();
    assert!(OSLO.starts_with(content) && content.len() > 10, "{content}");
    assert_eq!((&message["calls"], finish), (&json!([]), json!("length")));
    let (message, finish) = streamed(&server, request);
    assert_eq!((message["content"].as_str(), finish), (Some(content), json!("length")));
}

/// Reasoning is counted, and all tokens are billed: markup too.
#[test]
fn usage_counts_reasoning() {
    let server = Fixture::start();
    let reply = format!("I think so.\n</think>\n\n{OSLO}");
    let usage = server.post(CHAT, &say(&reply, json!({"chat_template_kwargs": {"enable_thinking": true}}))).json()["usage"].clone();
    let count = |text: &str| server.session.text().tokenizer().encode(text, false).unwrap().len();
    assert_eq!(usage["completion_tokens"], count(&reply));
    assert_eq!(usage["completion_tokens_details"]["reasoning_tokens"], count("I think so.\n</think>"));
}

/// Calls and their results go back into the prompt, in the template's own form.
#[test]
fn results_go_back() {
    let server = Fixture::start();
    let mut request = say(OSLO, json!({}));
    let call = server.post(CHAT, &request).json()["choices"][0]["message"].clone();
    let result = json!({"role": "tool", "tool_call_id": call["tool_calls"][0]["id"], "content": "rain"});
    request["messages"].as_array_mut().unwrap().extend([call, result]);
    let body = server.post(CHAT, &request).json();
    assert_eq!((&body["choices"][0]["message"]["content"], &body["choices"][0]["finish_reason"]), (&json!(REPLY), &json!("stop")));
    let said = request["messages"][0]["content"].as_str().unwrap();
    let history = format!(
        "<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n{OSLO}<|im_end|>\n<|im_start|>user\n<tool_response>\nrain\n\
         </tool_response><|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    );
    let mut bare = request.clone();
    bare["tools"] = Value::Null;
    let count = server.session.text().tokenizer().encode(&history, false).unwrap().len();
    assert_eq!(server.post(CHAT, &bare).json()["usage"]["prompt_tokens"], count);
}

/// Wrong tools are refused by name before anything is computed.
#[test]
fn wrong_tools_are_named() {
    let server = Fixture::start();
    let function = |function: Value| json!({"tools": [{"type": "function", "function": function}]});
    let cases = [
        (json!({"tools": "x"}), "tools"),
        (json!({"tools": [3]}), "tools[0].type"),
        (json!({"tools": [{"type": 3}]}), "tools[0].type"),
        (json!({"tools": [{"type": "function"}]}), "tools[0].function.name"),
        (json!({"tools": [{"type": "function", "function": "f"}]}), "tools[0].function.name"),
        (function(json!({"name": ""})), "tools[0].function.name"),
        (function(json!({"name": "a b"})), "tools[0].function.name"),
        (function(json!({"name": "a>\n<parameter=x"})), "tools[0].function.name"),
        (function(json!({"name": "f", "parameters": []})), "tools[0].function.parameters"),
        (function(json!({"name": "f", "parameters": "object"})), "tools[0].function.parameters"),
        (function(json!({"name": "f", "parameters": {"properties": [1]}})), "tools[0].function.parameters.properties"),
        (json!({"parallel_tool_calls": "no"}), "parallel_tool_calls"),
        (json!({"tool_choice": "required"}), "tool_choice"),
        (json!({"tool_choice": "sometimes"}), "tool_choice"),
        (json!({"tool_choice": 3}), "tool_choice"),
        (json!({"messages": [{"role": "assistant", "content": "x", "tool_calls": {}}]}), "messages[0].tool_calls"),
        (json!({"messages": [{"role": "assistant", "tool_calls": [3]}]}), "messages[0].tool_calls[0].function.name"),
        (
            json!({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}]}),
            "messages[0].tool_calls[0].function.arguments",
        ),
    ];
    for (more, param) in cases {
        let answer = server.post(CHAT, &say("x", more.clone()));
        assert_eq!((answer.status, answer.json()["error"]["param"].as_str()), (400, Some(param)), "{more}: {answer:?}");
    }
    // Schemas that refer to themselves or say odd things are no reason to refuse.
    let odd = json!({"name": "get_weather", "parameters": {"properties": {"city": {"$ref": "#/properties/city"}, "days": 3}, "additionalProperties": false}});
    let (message, _) = whole(&server, &say(OSLO, function(odd)));
    assert_eq!(message["calls"][0]["arguments"], "{\"city\": \"Oslo\", \"days\": \"3\"}");
    assert_eq!(server.session.engine().stats().finished, 1);
}
