"""The official openai SDK against a running server: python openai_sdk.py URL [--scripted]

With --scripted the server's engine is the one of tests/common (it knows LONG and FAIL); without, a real model serves and the
checks that need a script are left out. Prints one line per check and exits 1 at the first that fails.
"""

import json
import sys
import threading
import time
import urllib.request

import openai

URL = sys.argv[1]
SCRIPTED = "--scripted" in sys.argv[2:]
client = openai.OpenAI(base_url=f"{URL}/v1", api_key="any", max_retries=0, timeout=120)
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."


def stats():
    with urllib.request.urlopen(f"{URL}/v1/stats") as reply:
        return json.load(reply)


def chat(**more):
    return client.chat.completions.create(**{"model": "any/name", "messages": QUESTION, "temperature": 0, "max_tokens": 60} | more)


def text(reply):
    return reply.choices[0].message.content


def check_models():
    model = client.models.list().data[0]
    assert model.owned_by == "mach"
    assert client.models.retrieve(model.id).id == model.id


def check_plain():
    reply = chat()
    assert text(reply) == ANSWER, text(reply)
    assert reply.model == "any/name" and reply.object == "chat.completion"
    assert reply.choices[0].finish_reason == "stop"
    usage = reply.usage
    assert usage.prompt_tokens > 5 and usage.completion_tokens > 3
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens >= 0 and usage.completion_tokens_details.reasoning_tokens == 0


def check_stream():
    chunks = list(chat(stream=True, stream_options={"include_usage": True}))
    pieces = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    assert "".join(pieces) == ANSWER and len(pieces) > 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == chat().usage.completion_tokens
    with client.chat.completions.stream(model="m", messages=QUESTION, temperature=0, max_tokens=40) as stream:
        assert stream.get_final_completion().choices[0].message.content == ANSWER


def check_completions():
    reply = client.completions.create(model="m", prompt=["Once", "The"], max_tokens=3, temperature=0)
    assert [c.index for c in reply.choices] == [0, 1]
    assert all(c.finish_reason in ("length", "stop") for c in reply.choices) and reply.usage.completion_tokens <= 6
    streamed = "".join(c.choices[0].text for c in client.completions.create(model="m", prompt="Once", max_tokens=3, temperature=0, stream=True))
    assert streamed == reply.choices[0].text


def check_stop():
    for stop in (" Par", ["zzz", "is P"]):
        reply = chat(stop=stop)
        cut = min(ANSWER.find(s) for s in ([stop] if isinstance(stop, str) else stop) if s in ANSWER)
        assert text(reply) == ANSWER[:cut] and reply.choices[0].finish_reason == "stop", text(reply)
        streamed = "".join(c.choices[0].delta.content or "" for c in chat(stop=stop, stream=True))
        assert streamed == ANSWER[:cut]


def check_length():
    reply = chat(max_tokens=2)
    assert reply.choices[0].finish_reason == "length" and reply.usage.completion_tokens == 2
    assert chat(max_completion_tokens=1, max_tokens=None).usage.completion_tokens == 1
    assert text(chat(max_tokens=10_000_000)) == ANSWER


def check_seed():
    story = [{"role": "user", "content": "Tell me a story."}]
    one = text(chat(messages=story, temperature=1.5, seed=11))
    assert one == text(chat(messages=story, temperature=1.5, seed=11))
    several = {text(chat(messages=story, temperature=1.5, seed=s)) for s in range(4)}
    assert len(several) > 1
    choices = chat(messages=story, temperature=1.5, seed=11, n=2).choices
    assert [c.index for c in choices] == [0, 1] and choices[0].message.content == one


CITY = {"type": "object", "properties": {"city": {"type": "string", "description": "The city to look up."}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "Get the current weather in a city.", "parameters": CITY}}]
CALL = "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>"
ASK = [{"role": "user", "content": f"SAY({CALL})SAY" if SCRIPTED else "What is the weather in Paris?"}]


def check_tools():
    reply = chat(messages=ASK, tools=TOOLS, tool_choice="auto").choices[0]
    assert reply.finish_reason == "tool_calls" and reply.message.content is None, reply
    (call,) = reply.message.tool_calls
    assert call.type == "function" and call.function.name == "get_weather" and json.loads(call.function.arguments) == {"city": "Paris"}, call
    result = {"role": "tool", "tool_call_id": call.id, "content": json.dumps({"city": "Paris", "temperature": 21, "sky": "sunny"})}
    final = chat(messages=ASK + [reply.message, result], tools=TOOLS)
    assert final.choices[0].finish_reason == "stop" and final.choices[0].message.tool_calls is None, final
    assert "Paris" in text(final), final
    assert SCRIPTED or "sunny" in text(final), final
    chat(messages=[{"role": "developer", "content": [{"type": "text", "text": "Be brief."}]}] + QUESTION, extra_body={"chat_template_kwargs": {"enable_thinking": False}})


def check_streamed_tools():
    name, arguments, finish, ids = "", "", None, []
    for chunk in chat(messages=ASK, tools=TOOLS, stream=True):
        for choice in chunk.choices:
            finish = choice.finish_reason or finish
            for part in choice.delta.tool_calls or []:
                assert part.index == 0
                ids += [part.id] if part.id else []
                name += part.function.name or ""
                arguments += part.function.arguments or ""
    assert (finish, name, json.loads(arguments), len(ids)) == ("tool_calls", "get_weather", {"city": "Paris"}, 1), (finish, name, arguments, ids)
    with client.chat.completions.stream(model="m", messages=ASK, tools=TOOLS, temperature=0, max_tokens=60) as stream:
        message = stream.get_final_completion().choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "{\"city\": \"Paris\", \"temperature\": 21, \"sky\": \"sunny\"}"}
    history = ASK + [{"role": "assistant", "tool_calls": [c.model_dump(include={"id", "type", "function"}) for c in message.tool_calls]}, result]
    final = "".join(c.choices[0].delta.content or "" for c in chat(messages=history, tools=TOOLS, stream=True) if c.choices)
    assert "Paris" in final and "<tool_call>" not in final, final


def check_reasoning():
    asked = [{"role": "user", "content": "SAY(I know.\n</think>\n\nParis.)SAY"}] if SCRIPTED else QUESTION
    thinking = {"chat_template_kwargs": {"enable_thinking": True}}
    reply = chat(messages=asked, extra_body=thinking)
    message = reply.choices[0].message
    assert message.reasoning_content and "think>" not in message.content + message.reasoning_content, message
    if SCRIPTED:
        assert (message.reasoning_content, message.content) == ("I know.", "Paris.") and reply.usage.completion_tokens_details.reasoning_tokens > 2, reply
        streamed = "".join(getattr(c.choices[0].delta, "reasoning_content", None) or "" for c in chat(messages=asked, extra_body=thinking, stream=True))
        assert streamed == message.reasoning_content


def expect(kind, param=None, **request):
    try:
        chat(**request)
    except kind as e:
        assert param is None or e.param == param, (e.param, param)
        return e
    raise AssertionError(f"{request} was accepted")


def check_errors():
    expect(openai.BadRequestError, "temperature", temperature=9)
    expect(openai.BadRequestError, "response_format", response_format={"type": "json_object"})
    expect(openai.BadRequestError, "tool_choice", tool_choice="required")
    expect(openai.BadRequestError, "logprobs", logprobs=True)
    expect(openai.BadRequestError, "messages[0].role", messages=[{"role": "nobody", "content": "x"}])
    overflow = expect(openai.BadRequestError, "messages", messages=[{"role": "user", "content": "word " * 200_000}], stream=True)
    assert overflow.code == "context_length_exceeded" and "maximum context length" in overflow.message
    try:
        client.models.retrieve("no/such")
        raise AssertionError("no/such exists")
    except openai.NotFoundError:
        pass
    if SCRIPTED:
        failing = [{"role": "user", "content": "FAIL"}]
        expect(openai.InternalServerError, messages=failing)
        try:
            list(chat(messages=failing, stream=True))
            raise AssertionError("a failed stream ended well")
        except openai.APIError as e:
            assert "damaged" in e.message


def check_leaving():
    long = [{"role": "user", "content": "LONG: tell me a very long story about everything." * 3}]
    before = stats()["requests"]["cancelled"]
    stream = chat(messages=long, stream=True, max_tokens=400, extra_body={"ignore_eos": True})
    for i, _ in enumerate(stream):
        if i == 3:
            break
    stream.close()
    deadline = time.monotonic() + 20
    while stats()["requests"]["cancelled"] == before or stats()["requests"]["running"] > 0:
        assert time.monotonic() < deadline, stats()
        time.sleep(0.02)


def check_eight_at_once():
    answers = [None] * 8

    def ask(i):
        answers[i] = text(chat()) if i % 2 else "".join(c.choices[0].delta.content or "" for c in chat(stream=True))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [ANSWER] * 8, answers


for name, check in list(globals().items()):
    if name.startswith("check_"):
        try:
            check()
        except Exception as e:
            print(f"{name}: {type(e).__name__}: {e}")
            raise
        print(f"{name}: ok", flush=True)
