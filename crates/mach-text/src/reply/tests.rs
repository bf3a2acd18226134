use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

const JSON: ReplyFormat = ReplyFormat::Tagged { reasoning: Some(ReasoningFormat::Think), calls: Some(CallFormat::Hermes) };
const XML: ReplyFormat = ReplyFormat::Tagged { reasoning: Some(ReasoningFormat::Think), calls: Some(CallFormat::QwenXml) };
const DSML: ReplyFormat = ReplyFormat::Tagged { reasoning: Some(ReasoningFormat::Think), calls: Some(CallFormat::Dsml) };
const GEMMA: ReplyFormat = ReplyFormat::Tagged { reasoning: Some(ReasoningFormat::Channel), calls: Some(CallFormat::Gemma) };

fn tools() -> Arc<ToolSchemas> {
    let properties = json!({
        "city": {"type": "string"}, "days": {"type": "integer"}, "scale": {"type": "number"}, "dry": {"type": "boolean"},
        "tags": {"type": "array", "items": {"type": "string"}}, "options": {"$ref": "#/$defs/options"}, "note": {"type": ["string", "null"]},
        "level": {"enum": [1, 2, 3]}, "any": {}, "either": {"anyOf": [{"type": "string"}, {"type": "array"}]}, "loop": {"$ref": "#/properties/loop"},
    });
    let parameters = json!({"type": "object", "properties": properties, "$defs": {"options": {"type": "object"}}});
    Arc::new(ToolSchemas::from_tools(&json!([{"type": "function", "function": {"name": "weather", "parameters": parameters}}])))
}

/// What a stream of events comes to, in order: drops, and every event's kind.
#[derive(Debug, Default, PartialEq, Clone)]
struct Outcome {
    message: ReplyMessage,
    dropped: usize,
}

fn run<'a>(format: ReplyFormat, prompt: &str, pieces: impl IntoIterator<Item = &'a str>) -> Outcome {
    let mut parser = ReplyParser::new(format, prompt, Some(tools()));
    let mut events: Vec<ReplyEvent> = pieces.into_iter().flat_map(|piece| parser.push(piece)).collect();
    events.extend(parser.finish());
    let mut outcome = Outcome::default();
    let mut open: Option<usize> = None;
    let mut next = 0;
    for event in events {
        match &event {
            ReplyEvent::CallStart { index, .. } => {
                assert_eq!((open, *index), (None, next), "calls come one after another");
                (open, next) = (Some(*index), next + 1);
            }
            ReplyEvent::CallArguments { index, json } => assert!(open == Some(*index) && !json.is_empty()),
            ReplyEvent::CallEnd { index } => assert_eq!(open.take(), Some(*index)),
            ReplyEvent::CallDropped { index } => {
                assert_eq!(open.take(), Some(*index));
                outcome.dropped += 1;
            }
            ReplyEvent::Content(text) | ReplyEvent::Reasoning(text) => assert!(open.is_none() && !text.is_empty()),
        }
        outcome.message.push(event);
    }
    assert_eq!(open, None, "every call ends");
    outcome
}

/// The outcome of the whole text, after checking that every cut in two, and single characters, give the same.
fn every_split(format: ReplyFormat, prompt: &str, text: &str) -> Outcome {
    let whole = run(format, prompt, [text]);
    for (at, _) in text.char_indices().skip(1) {
        assert_eq!(run(format, prompt, [&text[..at], &text[at..]]), whole, "cut at {at} of {text:?}");
    }
    let chars: Vec<String> = text.chars().map(String::from).collect();
    assert_eq!(run(format, prompt, chars.iter().map(String::as_str)), whole, "single characters of {text:?}");
    for call in &whole.message.calls {
        assert!(serde_json::from_str::<Value>(&call.arguments).is_ok_and(|v| v.is_object()), "{call:?}");
    }
    whole
}

fn said(text: &str) -> ReplyMessage {
    let mut message = ReplyMessage::default();
    message.push(ReplyEvent::Content(text.to_owned()));
    message
}

fn call(name: &str, arguments: &Value) -> (String, Value) {
    (name.to_owned(), arguments.clone())
}

fn calls(outcome: &Outcome) -> Vec<(String, Value)> {
    outcome.message.calls.iter().map(|c| (c.name.clone(), serde_json::from_str(&c.arguments).unwrap())).collect()
}

/// Reasoning, content and calls of both syntaxes come apart, whatever the cut; white space between them is markup.
#[test]
fn parts_of_a_reply() {
    let json = "I look.\n</think>\n\nLet me see.\n\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Os\\\"lo </tool_call>\", \"days\": 3}}\n</tool_call>\n\
                <tool_call>\n{\"name\": \"other\", \"arguments\": {}}\n</tool_call>";
    let xml = "I look.\n</think>\n\nLet me see.\n\n<tool_call>\n<function=weather>\n<parameter=city>\nOs\"lo </tool_call>\n</parameter>\n<parameter=days>\n3\n\
               </parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=other>\n</function>\n</tool_call>";
    for (format, text) in [(JSON, json), (XML, xml)] {
        let outcome = every_split(format, "assistant\n<think>\n", text);
        assert_eq!((outcome.message.reasoning.as_str(), outcome.message.content.as_str(), outcome.dropped), ("I look.", "Let me see.", 0));
        let first = json!({"city": "Os\"lo </tool_call>", "days": 3});
        assert_eq!(calls(&outcome), [call("weather", &first), call("other", &json!({}))]);
        let own_tag = every_split(format, "assistant\n", &format!("\n<think>\n{text}"));
        assert_eq!(own_tag, outcome);
    }
}

/// Reasoning is a reply's beginning only; a block that is not closed stays reasoning; tags elsewhere are text.
#[test]
fn reasoning_begins_a_reply_or_is_none() {
    let parts = |prompt: &str, text: &str| {
        let message = every_split(XML, prompt, text).message;
        (message.reasoning, message.content)
    };
    let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
    assert_eq!(parts("<think>\n", "a < b </thin"), pair("a < b </thin", ""));
    assert_eq!(parts("<think>\n\n</think>\n\n", "  What <think> means</think>\n "), pair("", "  What <think> means</think>\n "));
    assert_eq!(parts("what is <think>?", "<think>\n\n</think>\n\nYes"), pair("", "Yes"));
    assert_eq!(parts("", "<think>x</think>"), pair("x", ""));
    assert_eq!(parts("", " \n<thi"), pair("", " \n<thi"));
    assert_eq!(run(ReplyFormat::default(), "<think>", ["<think>a</think>"]).message.content, "<think>a</think>");
}

/// Parameters become what their schema says, else strings; text keeps everything but the one line break that belongs to the markup.
#[test]
fn parameters_follow_their_schema() {
    let cases = [
        ("city", "Oslo", json!("Oslo")),
        ("city", "3", json!("3")),
        ("city", "null", json!("null")),
        ("city", "", json!("")),
        ("city", "\n two\n\tlines \\ \"x\" \u{1}🙂\n", json!("\n two\n\tlines \\ \"x\" \u{1}🙂\n")),
        ("city", "if a < b: </parameter> and </parameter>\nthen", json!("if a < b: </parameter> and </parameter>\nthen")),
        ("days", " 3 ", json!(3)),
        ("days", "3.5", json!("3.5")),
        ("days", "three", json!("three")),
        ("scale", "-1.5e3", json!(-1500.0)),
        ("dry", "true", json!(true)),
        ("dry", "False", json!(false)),
        ("dry", "maybe", json!("maybe")),
        ("tags", "[\"a\",\n \"b\"]", json!(["a", "b"])),
        ("tags", "[\"a\"", json!("[\"a\"")),
        ("options", "{\"a\": {\"b\": null}}", json!({"a": {"b": null}})),
        ("note", "null", json!(null)),
        ("note", "5", json!("5")),
        ("level", "2", json!(2)),
        ("any", "5", json!("5")),
        ("either", "[1]", json!([1])),
        ("either", "[1", json!("[1")),
        ("loop", "1", json!("1")),
        ("new \"key\"", "1", json!("1")),
    ];
    for (key, value, want) in cases {
        let text = format!("<tool_call>\n<function=weather>\n<parameter={key}>\n{value}\n</parameter>\n</function>\n</tool_call>");
        let outcome = every_split(XML, "", &text);
        assert_eq!(calls(&outcome), [call("weather", &json!({ key: want }))], "{text}");
    }
    let unknown = every_split(XML, "", "<tool_call><function=new><parameter=n>5</parameter></function></tool_call>");
    assert_eq!(calls(&unknown), [call("new", &json!({"n": "5"}))]);
}

/// What models leave out is no reason to lose a call: opening and closing tags, order of keys, arguments as text.
#[test]
fn small_mistakes_are_understood() {
    let days = [call("weather", &json!({"days": 3}))];
    for text in [
        "<function=weather>\n<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
        "<function=weather><parameter=days>3</parameter></function>",
        "<tool_call><function=weather><parameter=days>3</parameter></tool_call>",
        "<tool_call><function= weather ><parameter=days>3</parameter></function>\n",
    ] {
        let outcome = every_split(XML, "", text);
        assert_eq!((calls(&outcome).as_slice(), outcome.message.content.as_str()), (days.as_slice(), ""), "{text}");
    }
    for text in [
        "<tool_call>{\"arguments\": {\"days\": 3}, \"name\": \"weather\"}</tool_call>",
        "<tool_call>{\"name\": \"weather\", \"arguments\": \"{\\\"days\\\": 3}\"}",
        "<tool_call>{\"id\": [1, {\"name\": 2}], \"name\": \"weather\", \"arguments\" : {\"days\": 3} , \"x\": null}</tool_call>",
    ] {
        let outcome = every_split(JSON, "", text);
        assert_eq!((calls(&outcome).as_slice(), outcome.message.content.as_str()), (days.as_slice(), ""), "{text}");
    }
    assert_eq!(calls(&every_split(JSON, "", "<tool_call>{\"name\": \"now\"}</tool_call>")), [call("now", &json!({}))]);
    let followed = every_split(XML, "", "a <tool_call><function=x></function></tool_call>\nand b");
    assert_eq!((followed.message.content.as_str(), followed.message.calls.len()), ("a\nand b", 1));
}

/// What is no call, or was cut off, comes back as the text that it was; what follows is still read.
#[test]
fn malformed_calls_come_back_as_text() {
    let xml = [
        "<tool_call>",
        "x <tool_call>\nplease",
        "<tool_call>{\"name\": \"weather\"}</tool_call>",
        "say <tool_call>\n<function=weather>\n<parameter=city>\nOs",
        "<tool_call><function=weather><parameter=days>3</parameter>",
        "<tool_call><function=weather>text</function></tool_call>",
        "<tool_call><function=></function></tool_call>",
        "<tool_call><function=a\nb></function></tool_call>",
        "<function=weather><parameter=city>x</parameter> no",
        "a <functio",
        "</tool_call> </function> <parameter=x>",
    ];
    let json = [
        "<tool_call>\n[1]\n</tool_call>",
        "<tool_call>{\"name\": \"weather\", \"arguments\": {\"city\": \"Os",
        "<tool_call>{\"name\": \"weather\", \"arguments\": {\"city\": \"Os\nlo\"}}</tool_call>",
        "<tool_call>{\"name\": \"weather\", \"arguments\": {\"city\": Oslo}}</tool_call>",
        "<tool_call>{\"name\": \"weather\", \"arguments\": {\"city\": 1}]</tool_call>",
        "<tool_call>{\"name\": \"weather\", \"arguments\": {\"city\": 1}, \"arguments\": {}}</tool_call>",
        "<tool_call>{\"name\": \"weather\", \"arguments\": [1]}</tool_call>",
        "<tool_call>{\"name\": \"weather\", \"arguments\": {\"a\": 1</tool_call> sorry",
        "<tool_call>{\"name\": \" \", \"arguments\": {}}</tool_call>",
        "<tool_call>{\"name\": 3, \"arguments\": {}}</tool_call>",
        "<tool_call>{\"name\": \"weather\", \"arguments\": {\"a\": \"\\ud800\"}}</tool_call>",
    ];
    for (format, texts) in [(XML, xml), (JSON, json)] {
        for text in texts {
            let outcome = every_split(format, "", text);
            assert_eq!((outcome.message.content.as_str(), outcome.message.calls.len()), (text, 0), "{text}");
        }
    }
    let good = "<tool_call>\n<function=weather>\n</function>\n</tool_call>";
    let outcome = every_split(XML, "", &format!("<tool_call>oops {good}"));
    assert_eq!((outcome.message.content.as_str(), calls(&outcome)), ("<tool_call>oops", vec![call("weather", &json!({}))]));
    assert_eq!(every_split(XML, "", "<tool_call><function=weather><parameter=city>x</parameter>!").dropped, 1);
}

/// Arguments are told while they are written, and only what may begin a marker waits.
#[test]
fn nothing_waits_that_is_decided() {
    let content = |text: &str| vec![ReplyEvent::Content(text.to_owned())];
    let arguments = |json: &str| vec![ReplyEvent::CallArguments { index: 0, json: json.to_owned() }];
    let mut parser = ReplyParser::new(XML, "", Some(tools()));
    assert_eq!(parser.push("Let"), content("Let"));
    assert_eq!(parser.push(" me <too"), content(" me"));
    assert_eq!(parser.push("ls"), content(" <tools"));
    assert_eq!(parser.push("<tool_call><function=weather"), []);
    assert_eq!(parser.push(">"), [ReplyEvent::CallStart { index: 0, name: "weather".into() }]);
    assert_eq!(parser.push("<parameter=city>"), arguments("{\"city\": \""));
    assert_eq!(parser.push("\nNew"), arguments("New"));
    assert_eq!(parser.push(" York\n"), arguments(" York"));
    let mut parser = ReplyParser::new(JSON, "", Some(tools()));
    assert_eq!(parser.push("<tool_call>{\"name\": \"weather\", \"arguments\": ").len(), 0);
    assert_eq!(parser.push("{\"city").len(), 2);
    assert_eq!(parser.push("\": \"New"), arguments("\": \"New"));
}

/// gpt-oss: channels become parts; the recipient stands behind the role or in the channel; `<|end|>` ends a message, the end of the text a
/// call whose arguments are complete.
#[test]
fn channels_are_parts() {
    let h = |text: &str| every_split(ReplyFormat::Harmony, "<|start|>assistant", text);
    let answer = h("<|channel|>analysis<|message|>I think. <|end|><|start|>assistant<|channel|>final<|message|>It is < 3.\n<|return|>");
    assert_eq!((answer.message.reasoning.as_str(), answer.message.content.as_str()), ("I think. ", "It is < 3.\n"));
    let oslo = [call("get_weather", &json!({"city": "Oslo", "days": 3}))];
    for (header, end) in [
        ("<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>", "<|call|>"),
        (" to=functions.get_weather<|channel|>commentary json<|message|>", "<|call|>"),
        ("<|channel|>analysis to=functions.get_weather code<|message|>", ""),
        ("<|start|>assistant<|channel|>commentary to=functions.get_weather<|message|>", "<|end|>"),
    ] {
        let outcome = h(&format!("{header}{{\"city\":\"Oslo\",\"days\":3}}{end}"));
        assert_eq!((calls(&outcome).as_slice(), outcome.message.content.as_str()), (oslo.as_slice(), ""), "{header}");
    }
    let preamble = h("<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|><|start|>assistant\
         <|channel|>commentary to=functions.a<|message|>{}<|call|>");
    assert_eq!((preamble.message.reasoning.as_str(), preamble.message.content.as_str()), ("Hm", "I look."));
    assert_eq!(calls(&preamble), [call("a", &json!({}))]);
    assert_eq!(h("<|channel|>analysis<|message|>no end<|channel|>final<|message|>x").message.content, "x");
    for text in [
        "<|channel|>commentary to=functions.a<|message|>{\"b\": 1",
        "<|channel|>commentary to=functions.a<|message|>[1]<|call|>",
        "<|channel|>final<|end|>",
        "<|channel|>final",
        "No markup at all.",
        " to be or not",
    ] {
        assert_eq!(h(text).message, said(text), "{text}");
    }
    let long = format!("<|channel|>{}", "é".repeat(600));
    assert_eq!(h(&long).message.content, long);
    let mut parser = ReplyParser::new(ReplyFormat::Harmony, "", None);
    let text = "<|channel|>commentary to=functions.a<|message|>{}";
    let events: Vec<_> = parser.push(text).into_iter().chain(parser.finish()).collect();
    assert_eq!(events, [ReplyEvent::Content("{}".into())], "without tools a call is what it says");
}

/// Gemma: thoughts in a channel, arguments without quotes around keys; what the model asks back with is markup.
#[test]
fn gemma_replies() {
    let g = |text: &str| every_split(GEMMA, "<|turn>model\n", text);
    let text = "<|channel>thought\nI look.\n<channel|>Let me see.<|tool_call>call:weather{city:<|\"|>Os\"lo }<|\"|>,days:3}<tool_call|>\
                <|tool_call>call:other{}<tool_call|><|tool_response>";
    let outcome = g(text);
    assert_eq!((outcome.message.reasoning.as_str(), outcome.message.content.as_str()), ("I look.", "Let me see."));
    assert_eq!(calls(&outcome), [call("weather", &json!({"city": "Os\"lo }", "days": 3})), call("other", &json!({}))]);
    for (arguments, want) in [
        ("a:1.5,b:true,c:null,d:-2", json!({"a": 1.5, "b": true, "c": null, "d": -2})),
        ("o:{x:[1,<|\"|>y<|\"|>,{}],<|\"|>k k<|\"|>:[]},z:[[]]", json!({"o": {"x": [1, "y", {}], "k k": []}, "z": [[]]})),
        ("city:Oslo , \"q\": \"a,\\\"b\"", json!({"city": "Oslo", "q": "a,\"b"})),
        ("city:<|\"|><|\"|>", json!({"city": ""})),
    ] {
        let outcome = g(&format!("<|tool_call>call:f{{{arguments}}}<tool_call|>"));
        assert_eq!(calls(&outcome), [call("f", &want)], "{arguments}");
    }
    let late = g("One.<|channel>thought\nHm<channel|>Two.");
    assert_eq!((late.message.reasoning.as_str(), late.message.content.as_str()), ("Hm", "One.Two."));
    for text in
        ["<|tool_call>call:f{a:<|\"|>x", "<|tool_call>call:f{a:1]<tool_call|>", "<|tool_call>f{}", "<|tool_call>call:f{a:{b:1}", "a <|tool_call>call:{}"]
    {
        assert_eq!(g(text).message, said(text), "{text}");
    }
}

/// DeepSeek: one block of calls, values typed by their tags; a closing tag of reasoning alone is markup.
#[test]
fn dsml_replies() {
    let d = |prompt: &str, text: &str| every_split(DSML, prompt, text);
    let text = "I look.</think>Let me see.\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"weather\">\n<｜DSML｜parameter name=\"city\" string=\"true\">\
                Os\"lo\n</x></｜DSML｜parameter>\n<｜DSML｜parameter name=\"days\" string=\"false\">3</｜DSML｜parameter>\n</｜DSML｜invoke>\n\
                <｜DSML｜invoke name=\"other\">\n\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>";
    let outcome = d("<｜Assistant｜><think>", text);
    assert_eq!((outcome.message.reasoning.as_str(), outcome.message.content.as_str()), ("I look.", "Let me see."));
    assert_eq!(calls(&outcome), [call("weather", &json!({"city": "Os\"lo\n</x>", "days": 3})), call("other", &json!({}))]);
    assert_eq!(d("<｜Assistant｜></think>", "Yes.").message.content, "Yes.");
    assert_eq!(d("<｜Assistant｜>", "</think>Yes.").message.content, "Yes.");
    let one = |parameter: &str| calls(&d("", &format!("<｜DSML｜invoke name=\"weather\">{parameter}</｜DSML｜parameter></｜DSML｜invoke>")))[0].1.clone();
    assert_eq!(one("<｜DSML｜parameter name=\"days\" string=\"true\">3"), json!({"days": "3"}));
    assert_eq!(one("<｜DSML｜parameter name=\"tags\" string=\"false\">[\"a\", {\"b\": 1}]"), json!({"tags": ["a", {"b": 1}]}));
    assert_eq!(one("<｜DSML｜parameter name=\"days\" string=\"false\">three"), json!({"days": "three"}));
    assert_eq!(one("<｜DSML｜parameter name=\"days\">3"), json!({"days": 3}));
    for text in [
        "<｜DSML｜tool_calls>\n</｜DSML｜tool_calls>",
        "<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"weather\">\n<｜DSML｜parameter name=\"city\" string=\"true\">Os",
        "<｜DSML｜invoke>x</｜DSML｜invoke>",
        "<｜DSML｜invoke name=\"f\">text</｜DSML｜invoke>",
    ] {
        assert_eq!(d("", text).message, said(text), "{text}");
    }
}

/// Without tools a reply is not searched for calls.
#[test]
fn calls_need_tools() {
    let text = "<tool_call>\n<function=weather>\n</function>\n</tool_call>\n ";
    let mut parser = ReplyParser::new(XML, "", None);
    assert_eq!(parser.push(text), [ReplyEvent::Content(text.to_owned())]);
    assert_eq!(ReplyParser::plain().push(text), [ReplyEvent::Content(text.to_owned())]);
}

/// The format is read off the template: the built-in model's, and the ways in which Qwen templates show a call.
#[test]
fn formats_are_facts_of_templates() {
    assert_eq!(ReplyFormat::detect(include_str!("../../../../models/tiny/chat_template.jinja")), XML);
    let json = "<tool_call>\\n{\\\"name\\\": <function-name>, \\\"arguments\\\": <args-json-object>}\\n</tool_call>";
    assert_eq!(ReplyFormat::detect(json), ReplyFormat::Tagged { reasoning: None, calls: Some(CallFormat::Hermes) });
    let coder = "<tool_call>\\n<function=example_function_name>\\n<parameter=a>";
    assert_eq!(ReplyFormat::detect(coder), ReplyFormat::Tagged { reasoning: None, calls: Some(CallFormat::QwenXml) });
    assert_eq!(ReplyFormat::detect("{{ messages }}"), ReplyFormat::default());
    assert_eq!(ReplyFormat::detect("'<|start|>assistant<|channel|>final<|message|>'"), ReplyFormat::Harmony);
    assert_eq!(ReplyFormat::detect("'<|channel>thought\\n' '<|tool_call>call:'"), GEMMA);
    assert_eq!(ReplyFormat::detect("'</think>' '<' + '｜DSML｜' + 'invoke'"), DSML);
}

/// Fragments that replies and mistakes are made of.
fn fragment() -> impl Strategy<Value = String> {
    let markup = prop::sample::select(vec![
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
        "<function=",
        "<function=weather>",
        "</function>",
        "<parameter=city>",
        "<parameter=days>",
        "</parameter>",
        "\n",
        " ",
        "{",
        "}",
        "\"",
        "\\",
        "{\"name\": \"weather\", \"arguments\": {",
        "\"city\": \"x\"",
        "}}",
        ",",
        ":",
        "3",
        "<",
        ">",
        "/",
        "<|channel|>",
        "analysis",
        "final",
        "commentary to=functions.weather ",
        "<|message|>",
        "<|end|>",
        "<|call|>",
        "<|start|>assistant",
        "<|channel>thought\n",
        "<channel|>",
        "<|tool_call>call:weather{",
        "city:<|\"|>",
        "<|\"|>",
        "}<tool_call|>",
        "<|tool_response>",
        "<｜DSML｜tool_calls>",
        "<｜DSML｜invoke name=\"weather\">",
        "<｜DSML｜parameter name=\"city\" string=\"true\">",
        "<｜DSML｜parameter name=\"days\" string=\"false\">",
        "</｜DSML｜parameter>",
        "</｜DSML｜invoke>",
        "</｜DSML｜tool_calls>",
    ]);
    prop_oneof![4 => markup.prop_map(str::to_owned), 1 => any::<String>()]
}

fn formats() -> impl Strategy<Value = ReplyFormat> {
    prop::sample::select(vec![JSON, XML, DSML, GEMMA, ReplyFormat::Harmony])
}

proptest! {
    /// Any text in any pieces: the same parts as at once, no panic, complete calls with valid arguments.
    #[test]
    fn cuts_never_matter(fragments in prop::collection::vec(fragment(), 0..24), sizes in prop::collection::vec(1usize..9, 1..8), format in formats(), open: bool) {
        let prompt = if open { "<think>\n" } else { "" };
        let text = fragments.concat();
        let whole = run(format, prompt, [text.as_str()]);
        let chars: Vec<char> = text.chars().collect();
        let (mut pieces, mut at) = (Vec::new(), 0);
        for size in sizes.iter().cycle() {
            if at >= chars.len() {
                break;
            }
            let end = (at + size).min(chars.len());
            pieces.push(chars[at..end].iter().collect::<String>());
            at = end;
        }
        prop_assert_eq!(&run(format, prompt, pieces.iter().map(String::as_str)), &whole);
        for call in &whole.message.calls {
            prop_assert!(serde_json::from_str::<Value>(&call.arguments).is_ok_and(|v| v.is_object()), "{:?}", call);
        }
        if whole.message.calls.is_empty() && prompt.is_empty() && matches!(format, JSON | XML) && !text.trim_start().starts_with("<think>") && !text.trim_start().starts_with("</think>") {
            prop_assert_eq!(&whole.message.content, &text);
        }
    }

    /// Text without markers goes through as it is.
    #[test]
    fn plain_text_is_untouched(text in "[^<]*", format in formats()) {
        let outcome = run(format, "", [text.as_str()]);
        prop_assert_eq!((outcome.message.content, outcome.message.reasoning, outcome.message.calls.len()), (text, String::new(), 0));
    }

    /// Every text survives the journey through a call's tags, unless it holds those tags itself.
    #[test]
    fn arguments_survive(value in any::<String>().prop_filter("no markup", |v| !v.contains("</parameter>"))) {
        let text = format!("<tool_call>\n<function=weather>\n<parameter=city>\n{value}\n</parameter>\n</function>\n</tool_call>");
        prop_assert_eq!(calls(&run(XML, "", [text.as_str()])), [call("weather", &json!({"city": value}))]);
        let object = json!({"name": "weather", "arguments": {"city": value}});
        let text = format!("<tool_call>\n{object}\n</tool_call>");
        prop_assert_eq!(calls(&run(JSON, "", [text.as_str()])), [call("weather", &object["arguments"])]);
        let text = format!("<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{}<|call|>", object["arguments"]);
        let markup = ReplyFormat::Harmony.markup().into_iter().any(|m| value.contains(m));
        prop_assert!(markup || calls(&run(ReplyFormat::Harmony, "", [text.as_str()])) == [call("weather", &object["arguments"])]);
        let text = format!("<|tool_call>call:weather{{city:<|\"|>{value}<|\"|>}}<tool_call|>");
        prop_assert!(value.contains("<|\"|>") || calls(&run(GEMMA, "", [text.as_str()])) == [call("weather", &object["arguments"])]);
        let tag = |name: &str, rest: &str| format!("<｜DSML｜{name} name=\"{rest}");
        let text = format!("{}{}{value}</｜DSML｜parameter>\n</｜DSML｜invoke>", tag("invoke", "weather\">"), tag("parameter", "city\" string=\"true\">"));
        prop_assert!(value.contains("</｜DSML｜parameter>") || calls(&run(DSML, "", [text.as_str()])) == [call("weather", &object["arguments"])]);
    }
}
