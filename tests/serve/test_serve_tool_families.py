"""Replies that must call, by the template of each family: held to its form, and read back, whole and streamed."""

from __future__ import annotations

import json

import pytest
from http_calls import CHAT, events, served
from marked_tokenizers import renamed

import bitstrata
from bitstrata.runtime import Engine
from bitstrata.runtime.tools import format_of
from bitstrata.runtime.tools.formats import DeepSeek
from bitstrata.serve.app import create_app
from bitstrata.serve.settings import Settings

TURNS = (
    "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}{% for m in messages %}# {{ m.role }}: {{ m.content }}\n"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{% endfor %}"
)
D = DeepSeek
# what the published templates tell a model of its calls, in short: that text, and the control tokens it has for them
FAMILIES = {
    "hermes": ("Answer in <tool_call></tool_call>.", ("<tool_call>", "</tool_call>")),
    "llama": ('Answer as {"name": function, "parameters": object}.', ("<|python_tag|>",)),
    "mistral": ("[TOOL_CALLS] [objects]", ("[TOOL_CALLS]",)),
    "mistral named": ("[TOOL_CALLS]name[ARGS]object", ("[TOOL_CALLS]", "[ARGS]")),
    "deepseek": (f"{D.openings[0]}{D.begin}name{D.separator}object{D.end}{D.last}", (*D.openings, *D.marks)),
    "deepseek fenced": (
        f"{D.openings[0]}{D.begin}function{D.separator}name\n```json\nobject\n```{D.end}{D.last}",
        (*D.openings, *D.marks),
    ),
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"enum": [1, 7]}},
                "required": ["city", "days"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("weather", "rain_fall")
]


@pytest.fixture(scope="module")
def own_model(checkpoint):
    return bitstrata.load(checkpoint)


@pytest.fixture(scope="module", params=[(family, special) for family in FAMILIES for special in (True, False)], ids=str)
def family(request, own_model, tokenizer):
    name, special = request.param
    told, marks = FAMILIES[name]
    own = renamed(tokenizer, dict(enumerate(marks, 300)) if special else {}, special=special)
    own.chat_template = TURNS + "{# " + told + " #}"
    with (
        Engine(own_model, own, max_requests=8) as engine,
        served(create_app(engine, own, Settings("small")), engine) as one,
    ):
        yield name, own, one


def test_a_reply_that_must_call_is_held_to_the_familys_form(family):
    name, tokenizer, server = family
    assert format_of(tokenizer).name == name.split()[0]
    for temperature, most in ((0, 1), (1, 3)):
        body = {
            "messages": [{"role": "user", "content": "Will it rain?"}],
            "tools": TOOLS,
            "tool_choice": "required",
            "parallel_tool_calls": most > 1,
            "max_tokens": 200,
            "temperature": temperature,
            "seed": 5,
        }
        choice = server.post(CHAT, body).json["choices"][0]
        if choice["finish_reason"] != "tool_calls":
            assert most > 1, choice
            continue
        assert not choice["message"]["content"]
        calls = [call["function"] for call in choice["message"]["tool_calls"]]
        assert calls
        for call in calls:
            found = json.loads(call["arguments"])
            assert call["name"] in ("weather", "rain_fall")
            assert list(found) == ["city", "days"]
            assert found["days"] in (1, 7)
        pieces, text = {}, ""
        for data in events(server.post(CHAT, {**body, "stream": True}).body)[:-1]:
            for delta in (one["delta"] for one in json.loads(data)["choices"]):
                text += delta.get("content") or ""
                for call in delta.get("tool_calls") or ():
                    piece = pieces.setdefault(call["index"], {"name": "", "arguments": ""})
                    for key in piece:
                        piece[key] += call["function"].get(key) or ""
        assert (text, list(pieces.values())) == ("", calls)
