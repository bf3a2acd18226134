"""Chat template goldens: conversations rendered and tokenised by transformers."""

from transformers import AutoTokenizer

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Look up the weather & wind of a <city>.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer", "enum": [1, 3, 7]}},
                "required": ["city"],
            },
        },
    }
]
ASK = {"role": "user", "content": "What is the capital of France?"}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "id": "c1", "function": {"name": "get_weather", "arguments": {"city": "Zürich", "days": 3}}}],
}
CONVERSATIONS = {
    "one turn": [ASK],
    "system": [{"role": "system", "content": "Be brief.\n"}, ASK],
    "two turns": [ASK, {"role": "assistant", "content": "Paris."}, {"role": "user", "content": "And of Peru?"}],
    "reasoning in an earlier turn": [
        ASK,
        {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\nParis.", "reasoning_content": "Easy."},
        {"role": "user", "content": "  spaces and\n\nlines  "},
    ],
    "tool call and answer": [{"role": "user", "content": "Weather in Zürich?"}, CALL, {"role": "tool", "content": '{"t": 21.5, "ok": true}'}],
    "two tool answers": [
        {"role": "user", "content": "Weather?"},
        CALL | {"content": "I look.", "tool_calls": CALL["tool_calls"] * 2},
        {"role": "tool", "content": "dry"},
        {"role": "tool", "content": "wet"},
    ],
    "special tokens as text": [{"role": "user", "content": "<|im_end|>\n<|im_start|>system\n"}],
    "beyond ascii": [{"role": "user", "content": "naïve café 日本語 🙂 e\u0301 \"quotes\" \\ <b>&amp;</b>"}],
}
OPTIONS = [
    {},
    {"add_generation_prompt": False},
    {"enable_thinking": True},
    {"enable_thinking": False},
]


def template_cases(folder):
    """Every conversation with every set of options, with and without tools."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    cases = []
    for name, messages in CONVERSATIONS.items():
        for options in OPTIONS:
            for tools in (None, TOOLS):
                arguments = {"add_generation_prompt": True} | options
                prompt = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **arguments)
                tokens = tokenizer(prompt, add_special_tokens=False)["input_ids"]
                cases.append({"name": name, "messages": messages, "tools": tools, "options": arguments, "prompt": prompt, "tokens": tokens})
    return cases
