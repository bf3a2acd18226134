//! Earlier turns in the shape that a template takes, where that is narrower than what clients send.

use serde_json::{Map, Value, json};

/// gpt-oss has one call in a message, its result right behind it, and no content beside reasoning: messages with several calls become
/// several, what was said before a call goes to what was thought.
pub(crate) fn one_call_each(messages: &[Value]) -> Vec<Value> {
    let mut out = Vec::with_capacity(messages.len());
    let mut rest = messages;
    while let Some((message, after)) = rest.split_first() {
        rest = after;
        let Some(fields) = message.as_object().filter(|fields| fields.get("role").is_some_and(|role| role == "assistant")) else {
            out.push(message.clone());
            continue;
        };
        let mut fields = fields.clone();
        let calls = match fields.shift_remove("tool_calls") {
            Some(Value::Array(calls)) => calls,
            _ => Vec::new(),
        };
        if calls.is_empty() {
            fields.entry("content").or_insert_with(|| json!(""));
            out.push(Value::Object(fields));
            continue;
        }
        join_content(&mut fields);
        let results = rest.iter().take_while(|m| m["role"] == "tool").count();
        let mut results = rest[..results].iter().collect::<Vec<_>>();
        rest = &rest[results.len()..];
        for (i, call) in calls.iter().enumerate() {
            let mut one = if i == 0 { std::mem::take(&mut fields) } else { Map::from_iter([("role".to_owned(), json!("assistant"))]) };
            one.insert("tool_calls".to_owned(), json!([call]));
            out.push(Value::Object(one));
            // By id; results without one come in order.
            let of_call = |m: &&Value| call["id"].is_string() && m["tool_call_id"] == call["id"];
            let at = results.iter().position(of_call).or_else(|| results.iter().position(|m| m["tool_call_id"].is_null()));
            out.extend(at.map(|at| results.remove(at).clone()));
        }
        out.extend(results.into_iter().cloned());
    }
    out
}

/// Puts content to the reasoning where a message has both.
fn join_content(fields: &mut Map<String, Value>) {
    let text = |key: &str| fields.get(key).and_then(Value::as_str).filter(|text| !text.is_empty());
    let reasoning = ["reasoning_content", "thinking", "reasoning"].into_iter().find_map(|key| Some((key, text(key)?)));
    if let (Some((key, reasoning)), Some(content)) = (reasoning, text("content")) {
        let joined = json!(format!("{reasoning}\n\n{content}"));
        fields.insert(key.to_owned(), joined);
        fields.shift_remove("content");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parallel calls are told apart with their results behind them, by id or by order; nothing that was said is lost.
    #[test]
    fn parallel_calls_become_messages_of_their_own() {
        let call = |id: &str| json!({"id": id, "function": {"name": id, "arguments": {}}});
        let result = |id: &str| json!({"role": "tool", "tool_call_id": id, "content": id});
        let user = json!({"role": "user", "content": "x"});
        let messages = [
            user.clone(),
            json!({"role": "assistant", "content": "I look.", "reasoning_content": "Hm.", "tool_calls": [call("a"), call("b")]}),
            result("b"),
            result("a"),
            json!({"role": "assistant", "content": "Done.", "tool_calls": []}),
            user.clone(),
            json!({"role": "assistant", "tool_calls": [call("c")]}),
        ];
        let want = [
            user.clone(),
            json!({"role": "assistant", "reasoning_content": "Hm.\n\nI look.", "tool_calls": [call("a")]}),
            result("a"),
            json!({"role": "assistant", "tool_calls": [call("b")]}),
            result("b"),
            json!({"role": "assistant", "content": "Done."}),
            user,
            json!({"role": "assistant", "tool_calls": [call("c")]}),
        ];
        assert_eq!(one_call_each(&messages), want);
        let bare = |name: &str| json!({"function": {"name": name}});
        let unnamed = |text: &str| json!({"role": "tool", "content": text});
        let messages = [json!({"role": "assistant", "tool_calls": [bare("a"), bare("b")]}), unnamed("1"), unnamed("2"), unnamed("3")];
        let texts: Vec<Value> = one_call_each(&messages).iter().map(|m| m["content"].clone()).collect();
        assert_eq!(texts, [Value::Null, json!("1"), Value::Null, json!("2"), json!("3")], "results without ids");
    }
}
