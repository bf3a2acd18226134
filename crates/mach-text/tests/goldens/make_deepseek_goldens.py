"""Renders conversations as DeepSeek-V4's encoder does, for tests/templates.rs: writes deepseek_v4.json beside this file.

    python crates/mach-text/tests/goldens/make_deepseek_goldens.py

The model has no template to ask. This follows the rules of its encoder one message after another, where mach works on whole turns.
"""

import json
from pathlib import Path

from make_template_goldens import CONVERSATIONS, SEARCH, WEATHER, call

HERE = Path(__file__).resolve().parent
D = "\uff5cDSML\uff5c"
INTRO = f"""## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a "<{D}tool_calls>" block like the following:

<{D}tool_calls>
<{D}invoke name="$TOOL_NAME">
<{D}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{D}parameter>
...
</{D}invoke>
<{D}invoke name="$TOOL_NAME2">
...
</{D}invoke>
</{D}tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside <think>...</think> BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

"""
OUTRO = "\n\nYou MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.\n"
EFFORT = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\nYou MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root "
    "cause, rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.\nExplicitly write out your entire deliberation process, "
    "documenting every intermediate step, considered alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.\n\n"
)
MORE = {
    "results_out_of_order": {
        "messages": [
            {"role": "user", "content": "Both?"},
            {"role": "assistant", "reasoning_content": "Two.", "content": "", "tool_calls": [call("get_weather", {"zone": "a"}), call("search", {"q": "x", "n": [1, {"k": "ü"}]}, "c2")]},
            {"role": "tool", "tool_call_id": "c2", "content": "second"},
            {"role": "tool", "tool_call_id": "c1", "content": "first"},
            {"role": "user", "content": "And?"},
        ],
        "tools": [WEATHER, SEARCH],
    },
    "users_in_a_row": {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]},
    "string_arguments": {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call("f", '{"a": "1", "b": 1.0}')]}, {"role": "tool", "content": ""}]},
}
SKIPPED = ("parts", "image_part", "unknown_role", "developer")


def dumps(value):
    return json.dumps(value, ensure_ascii=False)


def merged(messages):
    out, order = [], {}
    for message in messages:
        role = message["role"]
        if role == "assistant":
            if message.get("tool_calls"):
                order = {c["id"]: i for i, c in enumerate(message["tool_calls"]) if c.get("id")}
            out.append(message)
        elif role == "system":
            out.append(message)
        else:
            block = {"text": message.get("content") or ""} if role == "user" else {"result": message.get("content") or "", "id": message.get("tool_call_id", "")}
            if not out or out[-1]["role"] != "user":
                out.append({"role": "user", "blocks": [], "order": order})
            out[-1]["blocks"].append(block)
    for message in out:
        if message["role"] == "user":
            results = sorted((b for b in message["blocks"] if "result" in b), key=lambda b: message["order"].get(b["id"], 0))
            message["blocks"] = [results.pop(0) if "result" in b else b for b in message["blocks"]]
    return out


def encode(messages, tools, thinking, effort, prompt):
    messages = merged(messages)
    if tools:
        section = "\n\n" + INTRO + "\n".join(dumps(t["function"]) for t in tools) + OUTRO
        if messages and messages[0]["role"] == "system":
            messages[0] = messages[0] | {"content": (messages[0].get("content") or "") + section}
        else:
            messages.insert(0, {"role": "system", "content": section})
    drop = not tools
    last_user = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    text = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
    if thinking and effort == "max" and messages:
        text += EFFORT
    for i, message in enumerate(messages):
        if message["role"] == "system":
            text += message.get("content") or ""
        elif message["role"] == "user":
            text += "<\uff5cUser\uff5c>" + "\n\n".join(b["text"] if "text" in b else f"<tool_result>{b['result']}</tool_result>" for b in message["blocks"])
            following = messages[i + 1]["role"] if i + 1 < len(messages) else ("assistant" if prompt else None)
            if following == "assistant":
                text += "<\uff5cAssistant\uff5c>" + ("<think>" if thinking and (not drop or i >= last_user) else "</think>")
        else:
            if thinking and (not drop or i > last_user):
                text += (message.get("reasoning_content") or message.get("reasoning") or "") + "</think>"
            text += message.get("content") or ""
            if message.get("tool_calls"):
                invokes = []
                for c in message["tool_calls"]:
                    arguments = c["function"]["arguments"]
                    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
                    rows = [
                        f'<{D}parameter name="{k}" string="{"true" if isinstance(v, str) else "false"}">{v if isinstance(v, str) else dumps(v)}</{D}parameter>'
                        for k, v in arguments.items()
                    ]
                    invokes.append(f'<{D}invoke name="{c["function"]["name"]}">\n' + "\n".join(rows) + f"\n</{D}invoke>")
                text += f"\n\n<{D}tool_calls>\n" + "\n".join(invokes) + f"\n</{D}tool_calls>"
            text += "<\uff5cend\u2581of\u2581sentence\uff5c>"
    return text


def main():
    conversations = {name: c | {"kwargs": {}} for name, c in (CONVERSATIONS | MORE).items() if name not in SKIPPED}
    out, cases = {}, []
    for name, conversation in conversations.items():
        for mode, kwargs in {"chat": {}, "thinking": {"thinking": True}, "max": {"enable_thinking": True, "reasoning_effort": "max"}}.items():
            case = out[f"{name}, {mode}"] = conversation | {"kwargs": kwargs}
            for prompt in (True, False):
                text = encode(case["messages"], case.get("tools"), mode != "chat", kwargs.get("reasoning_effort"), prompt)
                cases.append({"template": "deepseek_v4", "conversation": f"{name}, {mode}", "add_generation_prompt": prompt, "text": text})
    (HERE / "deepseek_v4.json").write_text(json.dumps({"conversations": out, "rendered": cases}, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
