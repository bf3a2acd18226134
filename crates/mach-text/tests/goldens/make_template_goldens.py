"""Renders conversations and template idioms with transformers, for tests/templates.rs.

    python -m pip install transformers jinja2
    python crates/mach-text/tests/goldens/make_template_goldens.py            # writes templates.json beside this file
    python crates/mach-text/tests/goldens/make_template_goldens.py DIRECTORY  # prints the conversations through that checkpoint's template
    python crates/mach-text/tests/goldens/make_template_goldens.py A.jinja …  # prints the conversations through these templates

Needs no weights: the tokenizer is the built-in model's.
"""

import json
import sys
from pathlib import Path

import jinja2
from transformers import AutoTokenizer

HERE = Path(__file__).resolve().parent
TINY = HERE.parents[3] / "models" / "tiny"

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a place, <b>now</b> & \"later\"; it's free.",
        "parameters": {
            "type": "object",
            "properties": {
                "zone": {"type": "string", "description": "Ort, z. B. \"Köln\" 🌧", "enum": ["a", "b'c"]},
                "days": {"type": "integer", "minimum": 0, "default": 3, "nullable": True},
                "scale": {"type": "number", "default": 1.0, "maximum": 1e20, "multipleOf": 1e-07},
                "tags": {"type": "array", "items": {"type": "string"}, "default": None},
            },
            "required": ["zone"],
            "additionalProperties": False,
        },
    },
}
SEARCH = {"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}, "strict": True}}
SYSTEM = {"role": "system", "content": "You are terse."}


def call(name, arguments, id="c1"):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


CONVERSATIONS = {
    "user": {"messages": [{"role": "user", "content": "Hello"}]},
    "system": {"messages": [SYSTEM, {"role": "user", "content": "Hello"}]},
    "turns": {"messages": [SYSTEM, {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "+1?"}]},
    "ends_with_assistant": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}]},
    "tools": {"messages": [{"role": "user", "content": "Rain?"}], "tools": [WEATHER, SEARCH]},
    "system_tools": {"messages": [SYSTEM, {"role": "user", "content": "Rain?"}], "tools": [WEATHER]},
    "no_tools": {"messages": [{"role": "user", "content": "Rain?"}], "tools": []},
    "call": {
        "messages": [
            {"role": "user", "content": "Rain?"},
            {"role": "assistant", "content": "Let me look.", "tool_calls": [call("get_weather", {"zone": "Köln <&>'\"", "days": 2, "scale": 1.5, "deep": {"b": [1, None, True], "a": 1e16}})]},
            {"role": "tool", "tool_call_id": "c1", "content": "{\"rain\": true}"},
        ],
        "tools": [WEATHER],
    },
    "parallel_calls": {
        "messages": [
            SYSTEM,
            {"role": "user", "content": "Rain in both?"},
            {"role": "assistant", "content": None, "tool_calls": [call("get_weather", {"zone": "a"}), call("get_weather", {"zone": "b", "days": None, "tags": [], "ok": False}, "c2")]},
            {"role": "tool", "tool_call_id": "c1", "content": "yes"},
            {"role": "tool", "tool_call_id": "c2", "content": "no\n"},
            {"role": "assistant", "content": "Only in a."},
            {"role": "user", "content": "Thanks"},
        ],
        "tools": [WEATHER],
    },
    "reasoning": {
        "messages": [
            {"role": "user", "content": "Think."},
            {"role": "assistant", "reasoning_content": "\nfirst\n", "content": "One."},
            {"role": "user", "content": "Again."},
            {"role": "assistant", "reasoning": "second", "content": "Two.", "tool_calls": [call("search", {})]},
            {"role": "tool", "content": "nothing"},
        ],
    },
    "reasoning_in_content": {
        "messages": [
            {"role": "user", "content": "Think."},
            {"role": "assistant", "content": "<think>\na</think>b</think>\n\nOne."},
            {"role": "user", "content": "<tool_response>\nx\n</tool_response>"},
            {"role": "assistant", "content": "<think>\nlate\n</think>\n\nTwo."},
        ],
    },
    "thinking_on": {"messages": [{"role": "user", "content": "Why?"}], "kwargs": {"enable_thinking": True}},
    "thinking_off": {"messages": [{"role": "user", "content": "Why?"}], "kwargs": {"enable_thinking": False}},
    "empty_content": {"messages": [{"role": "system", "content": ""}, {"role": "user", "content": ""}, {"role": "assistant", "content": ""}, {"role": "user", "content": " \n"}]},
    "unicode": {"messages": [{"role": "user", "content": "naïve 東京 🙂 e\u0301 \u2028 \u00a0 \u001f <|im_end|> \\n {{ x }} {% if %}"}]},
    "html": {"messages": [{"role": "system", "content": "<b>&amp;</b> 'q' \"d\""}, {"role": "user", "content": "a < b && c > 'd'"}]},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": " one "}, {"type": "text", "text": "two"}]}]},
    "one_call": {
        "messages": [
            SYSTEM,
            {"role": "user", "content": "Rain?"},
            {"role": "assistant", "reasoning_content": "I must look.", "tool_calls": [call("get_weather", {"zone": "Köln", "days": 2})]},
            {"role": "tool", "tool_call_id": "c1", "content": "{\"rain\": \"ja\"}"},
        ],
        "tools": [WEATHER, SEARCH],
        "kwargs": {"enable_thinking": True},
    },
    "calls_in_turn": {
        "messages": [
            {"role": "user", "content": "Rain?"},
            {"role": "assistant", "content": "", "tool_calls": [call("get_weather", {"zone": "a", "list": [1, "x", {"k": None}], "f": -0.5})]},
            {"role": "tool", "tool_call_id": "c1", "content": "dry"},
            {"role": "assistant", "content": "", "reasoning_content": "One more.", "tool_calls": [call("search", {}, "c2")]},
            {"role": "tool", "tool_call_id": "c2", "content": "found"},
            {"role": "assistant", "reasoning_content": "Enough.", "content": "Dry."},
            {"role": "user", "content": "Sure?"},
        ],
        "tools": [SEARCH, WEATHER],
    },
    "schemas": {
        "messages": [{"role": "user", "content": "Book it."}],
        "tools": [{"type": "function", "function": {"name": "book", "description": "Books.\nTwo lines.", "parameters": {"type": "object", "properties": {
            "who": {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": ["integer", "null"]}}, "required": ["name"]},
            "days": {"type": "array", "items": {"type": "object", "properties": {"d": {"type": "string", "format": "date"}}}, "description": "Which"},
            "class": {"type": "string", "enum": ["a", "b"], "default": "a"},
            "either": {"oneOf": [{"type": "string"}, {"type": "number"}]},
            "flag": {"type": "boolean", "description": "On?", "nullable": True},
        }, "required": ["who", "days"]}}}],
    },
    "effort": {"messages": [SYSTEM, {"role": "user", "content": "Why?"}], "kwargs": {"reasoning_effort": "high", "enable_thinking": True}},
    "developer": {"messages": [{"role": "developer", "content": "Rules."}, {"role": "user", "content": "x"}]},
    "image_part": {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what"}]}]},
    "unknown_role": {"messages": [{"role": "user", "content": "x"}, {"role": "critic", "content": "y"}]},
    "no_user": {"messages": [SYSTEM]},
    "late_system": {"messages": [{"role": "user", "content": "x"}, SYSTEM, {"role": "user", "content": "y"}]},
}

# Each is rendered with `v` bound to VALUES; a result that Python refuses is null and ours must be an error too.
VALUES = {
    "s": "  Hello, World\n", "list": [1, "two", 3.0, None, True, {"k": "it's"}], "d": {"b": 1, "a": [1, 2], "items": 5, "keys": "x"},
    "f": 1.0, "big": 1e22, "small": 1e-05, "neg": -0.5, "i": 7, "t": True, "n": None, "e": "", "u": "é🙂\u0007\u007f\"\\",
    "path": "a.b.c", "lines": "one\r\ntwo\n\nthree", "words": [{"w": "x", "n": 2}, {"w": "y", "n": 1}], "nested": [[1, 2], [3]],
}
IDIOMS = [
    "{{ v.list }}", "{{ v.d }}", "{{ v.f }} {{ v.big }} {{ v.small }} {{ v.neg }} {{ v.i }} {{ v.t }} {{ v.n }}", "{{ v.u }}|{{ v.list | string }}",
    "{{ v.list | tojson }}", "{{ v.d | tojson(indent=2) }}", "{{ v.d | tojson(sort_keys=true) }}", "{{ v.u | tojson }} {{ v.u | tojson(ensure_ascii=true) }}",
    "{{ v.d | tojson(separators=(',', ':')) }}", "{{ v.d | tojson(ensure_ascii=False, indent=4) }}", "{{ [] | tojson(indent=2) }}{{ {} | tojson }}", "{{ v.big | tojson }} {{ v.small | tojson }} {{ -0.0 | tojson }}",
    "{{ nope | tojson }}", "{{ nope }}|{{ nope is defined }}|{{ nope | default('x') }}|{{ v.nope is undefined }}", "{{ nope.attr }}", "{{ v.n.attr }}", "{{ v.n.attr.more }}",
    "{{ v.s.strip() }}|{{ v.s.lstrip() }}|{{ v.s.rstrip() }}|{{ v.s | trim }}", "{{ v.s.strip(' H') }}", "{{ '\x1c a \x1f'.strip() }}", "{{ v.s.split() }}", "{{ v.path.split('.') }} {{ v.path.split('.', 1) }} {{ v.path.rsplit('.', 1) }} {{ v.path.split('.', maxsplit=1) }}",
    "{{ ' a  b '.rsplit() }} {{ ' a  b c '.rsplit(none, 1) }} {{ ' a  b c '.split(none, 1) }} {{ 'ab'.split('') }}", "{{ v.lines.splitlines() }}", "{{ v.path.partition('.') }} {{ v.path.rpartition('.')[0] }}",
    "{{ 'a-b'.replace('-', '+') }} {{ 'x'.upper() }} {{ 'Ab c'.title() }} {{ 'ab'.capitalize() }}", "{{ v.path.startswith('a') }} {{ v.path.endswith(('c', 'd')) }} {{ v.path.find('b') }} {{ v.path.count('.') }}",
    "{{ 'abc'.removeprefix('a') }}{{ 'abc'.removesuffix('c') }}", "{{ 'abc'[::-1] }} {{ 'abc'[1:] }} {{ 'abc'[-1] }} {{ v.list[::-1] }} {{ v.list[-2:] }} {{ v.list[:2] }}", "{{ v.d.items() | list }}", "{% for k, v2 in v.d.items() %}{{ k }}={{ v2 }};{% endfor %}", "{% for k, v2 in v.d | items %}{{ k }}={{ v2 }};{% endfor %}",
    "{{ v.d.keys() | list }} {{ v.d.values() | list }} {{ v.d.get('zz') }} {{ v.d.get('zz', 3) }} {{ v.d['b'] }}", "{% for k in v.d %}{{ k }},{% endfor %}", "{{ v.d | dictsort }}", "{{ v.words | map(attribute='w') | join('+') }} {{ v.words | selectattr('n', 'equalto', 1) | list }} {{ v.words | rejectattr('n', 'gt', 1) | list | length }}",
    "{{ v.words | sort(attribute='n') | map(attribute='w') | list }}", "{{ v.list is sequence }} {{ v.d is sequence }} {{ v.s is sequence }} {{ v.i is sequence }}", "{{ v.list is iterable }} {{ v.d is iterable }} {{ v.s is iterable }} {{ v.n is iterable }}", "{{ v.d is mapping }} {{ v.list is mapping }} {{ v.s is string }} {{ v.n is none }} {{ v.t is boolean }} {{ v.t is true }} {{ v.i is number }} {{ v.f is float }} {{ v.i is integer }}",
    "{{ 7 / 2 }} {{ 7 // 2 }} {{ -7 // 2 }} {{ 7 % 3 }} {{ -7 % 3 }} {{ 2 ** 10 }} {{ 1 + 1.5 }}", "{{ 1 == 1.0 }} {{ true == 1 }} {{ 'a' < 'b' }} {{ 1 in [1.0] }} {{ 'a' in v.d }} {{ 'ell' in v.s }}", "{{ 'a' ~ 1 ~ 2.5 ~ none ~ true }}", "{{ 'a' + 1 }}", "{{ 'ab' * 2 }} {{ [1] + [2] }}", "{{ '%s-%d' | format('a', 3) }}", "{{ '{} {}'.format(1, 'x') }} {{ '{0}{a}'.format(1, a=2) }}",
    "{{ v.list | length }} {{ v.d | length }} {{ v.e | length }} {{ nope | length }}", "{{ v.list | first }} {{ v.list | last }} {{ [3, 1, 2] | sort }} {{ [3, 1] | max }} {{ [1, 2] | sum }} {{ [1, 1, 2] | unique | list }}", "{{ 'x' if nope else 'y' }} {{ 'x' if v.e }}|", "{{ v.e or 'alt' }} {{ v.n or v.i }} {{ v.s and 1 }} {{ not v.list }}", "{{ 'A' | lower }} {{ 'a' | upper }} {{ 'ab cd' | title }} {{ 'ab cd' | capitalize }} {{ 'x' | replace('x', 'y') }}", "{{ 'a\nb' | indent }}|{{ 'a\nb' | indent(2, true) }}", "{{ v.nested | sum(start=[]) }}",
    "{{ 'x\\ty\\u00e9\\'' }}", "{{ \"it's\" | tojson }} {{ '<&>' | e }} {{ '<&>' | safe }}", "{{ [1, [2, (3,)], (4, 5)] }} {{ {'a': none} }} {{ () }}", "{{ range(3) | list }} {{ range(5, 0, -2) | list }}", "{{ dict(a=1, b='x') }}", "{{ 3 | string + 'x' }} {{ '3' | int + 1 }} {{ 'x' | int(9) }} {{ '2.5' | float }} {{ 2.567 | round(1) }} {{ 2.5 | round | int }} {{ -3 | abs }}",
    "{% set ns = namespace(n=0, l=[]) %}{% for x in v.list %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "{% set x %}block {{ v.i }}{% endset %}[{{ x }}]", "{% for x in v.list %}{% if loop.index == 3 %}{% break %}{% endif %}{{ loop.index0 }}{{ loop.last }},{% endfor %}", "{% for x in [1, 2, 3] %}{% if x == 2 %}{% continue %}{% endif %}{{ x }}{{ loop.cycle('a', 'b') }}{% endfor %}", "{% for x in [] %}a{% else %}none{% endfor %}", "{% for x in [1, 2, 3] if x > 1 %}{{ loop.length }}{{ x }}{{ loop.revindex }}{% endfor %}",
    "{% for a, b in [(1, 2), (3, 4)] recursive %}{{ a }}{{ b }}{% endfor %}", "{% macro m(a, b=2, *c) %}{{ a }}{{ b }}{% endmacro %}{{ m(1) }}", "{% macro m(a, b=2) %}{{ a }}{{ b }}{% endmacro %}{{ m(1) }}{{ m(b=3, a='x') }}", "{% macro w() %}<{{ caller() }}>{% endmacro %}{% call w() %}in{% endcall %}", "{% with a = 1 %}{{ a }}{% endwith %}{{ a is defined }}", "{% filter upper %}abc{% endfilter %}", "{% raw %}{{ x }}{% endraw %}", "{% if v.i > 5 and v.i < 10 or false %}yes{% elif v.n %}b{% else %}c{% endif %}", "  {% if true %}\n  a\n  {% endif %}\n  b\n", "a {%- if true -%} b {%- endif -%} c\n\n", "{%+ if true %}  x{% endif +%}\n y", "{# c #}\n{{ 1 }}\n{#- d -#} \n2", "{{ v.list[10] }}|{{ v.d.zz }}|{{ v.list[0:100] }}", "{{ v.words[0].w }}{{ v.words[-1]['w'] }}",
    "{% generation %}  a {% endgeneration %}\nb", "{%- generation -%} {% set q = 1 %}a{{ q }} {%- endgeneration %}|{{ q is defined }}", "{{ v.t | int }} {{ v.t | tojson }} {{ v.n | tojson }} {{ v.n | string }} {{ v.t | string }}", "{{ 'é' | length }} {{ 'é🙂'[1] }} {{ 'ß'.upper() }}", "{{ v.list | join(', ') }} {{ v.s | list | length }}", "{{ [1, 2, 3, 4, 5] | batch(2) | list }} {{ [1, 2, 3] | reverse | list }} {{ 'abc' | reverse }}", "{{ v.d.b is divisibleby 1 }} {{ 3 is odd }} {{ 'a' is in ['a'] }} {{ 1 is eq 1 }} {{ 'a' is lower }} {{ none is sameas none }}", "{{ (v.list | tojson)[:5] }} {{ v.big | int }} {{ 10 ** 3 }} {{ 1_000 }}", "{{ v.list.append(1) }}", "{{ v.s.isdigit() }} {{ '12'.isdigit() }} {{ 'Ab'.islower() }} {{ 'ab1'.isalnum() }} {{ ','.join(['a', 'b']) }}", "{{ v.path.split('.') | last }} {{ (v.path.split('.') | list)[1] }}", "{{ v.list | select('string') | list }} {{ v.list | reject('none') | list | length }} {{ [0, 1, ''] | select | list }}", "{{ v.words | groupby('n') | length }}", "{{ v['i'] }} {{ v.get('i') }} {{ v.i is not none and v.i is not string }}", "{{ raise_exception('boom ' ~ v.i) }}",
]


def render(tokenizer, template, source, **variables):
    for name, conversation in CONVERSATIONS.items():
        for prompt in (True, False):
            entry = {"template": template, "conversation": name, "add_generation_prompt": prompt}
            try:
                entry["text"] = tokenizer.apply_chat_template(
                    conversation["messages"], tools=conversation.get("tools"), chat_template=source, tokenize=False,
                    add_generation_prompt=prompt, **(variables | conversation.get("kwargs", {})),
                )
            except (jinja2.exceptions.UndefinedError, TypeError):
                entry["failed"] = True
            except jinja2.exceptions.TemplateError as e:
                entry["raised"] = str(e)
            yield entry


def main():
    if len(sys.argv) > 1 and sys.argv[1].endswith(".jinja"):
        tokenizer = AutoTokenizer.from_pretrained(TINY)
        sources = {path: Path(path).read_text() for path in sys.argv[1:]}
        rendered = [entry for path, source in sources.items() for entry in render(tokenizer, path, source, bos_token="<bos>")]
        print(json.dumps({"conversations": CONVERSATIONS, "rendered": rendered}))
        return
    if len(sys.argv) > 1:
        tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
        print(json.dumps({"conversations": CONVERSATIONS, "rendered": list(render(tokenizer, "own", None))}))
        return
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    templates = {"tiny": (TINY / "chat_template.jinja").read_text()}
    templates |= {path.stem: path.read_text() for path in sorted(HERE.glob("*.jinja"))}
    rendered = [entry for name, source in templates.items() for entry in render(tokenizer, name, source, bos_token="<bos>")]
    idioms = []
    for source in IDIOMS:
        try:
            text = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], chat_template=source, tokenize=False, v=VALUES)
        except Exception:
            text = None
        idioms.append({"source": source, "text": text})
    out = {"conversations": CONVERSATIONS, "rendered": rendered, "values": VALUES, "idioms": idioms}
    (HERE / "templates.json").write_text(json.dumps(out, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
