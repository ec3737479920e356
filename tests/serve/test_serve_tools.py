"""Functions that a reply may call or must, in chats."""

from __future__ import annotations

import json

import openai
import pytest
from http_calls import CHAT, WAIT, events

USER = [{"role": "user", "content": "what is the weather in Rome?"}]


def function(name: str, **properties: dict) -> dict:
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "description": "x", "parameters": schema}}


TOOLS = [
    function("weather", city={"enum": ["Rome", "Oslo"]}, days={"type": "integer", "minimum": 0, "maximum": 9}),
    function("time", zone={"enum": ["CET"]}),
]
NAMED = {"type": "function", "function": {"name": "time"}}


@pytest.mark.parametrize("choice", ["required", NAMED], ids=str)
@pytest.mark.parametrize("temperature", [0, 1])
def test_a_reply_that_must_call_calls(chat_server, choice, temperature):
    body = {
        "messages": USER, "tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False, "bits": 3,
        "max_tokens": 120, "temperature": temperature, "seed": 5,
    }  # fmt: skip
    whole = chat_server.post(CHAT, body).json["choices"][0]
    assert whole["finish_reason"] == "tool_calls"
    assert whole["message"]["content"] is None
    (call,) = whole["message"]["tool_calls"]
    assert (call["type"], call["id"][:5]) == ("function", "call_")
    arguments = json.loads(call["function"]["arguments"])
    if choice == NAMED:
        assert (call["function"]["name"], arguments) == ("time", {"zone": "CET"})
    assert arguments.keys() in ({"city", "days"}, {"zone"})
    chunks = [
        json.loads(data)["choices"][0] for data in events(chat_server.post(CHAT, {**body, "stream": True}).body)[:-1]
    ]
    parts = [part for chunk in chunks for part in chunk["delta"].get("tool_calls", [])]
    assert [part["index"] for part in parts] == [0] * len(parts)
    assert [part["function"]["name"] for part in parts if "id" in part] == [call["function"]["name"]]
    assert "".join(part["function"]["arguments"] for part in parts) == call["function"]["arguments"]
    assert len(parts) > 2
    assert not any(chunk["delta"].get("content") for chunk in chunks)
    assert chunks[-1]["finish_reason"] == "tool_calls"


def test_several_calls_and_a_schema_beside_them(chat_server):
    body = {"messages": USER, "tools": TOOLS[1:], "max_tokens": 400, "temperature": 1}
    counts = set()
    for seed in range(4):
        reply = chat_server.post(CHAT, {**body, "tool_choice": "required", "seed": seed}).json["choices"][0]
        calls = reply["message"]["tool_calls"]
        assert all(json.loads(call["function"]["arguments"]) == {"zone": "CET"} for call in calls)
        counts.add(len(calls))
    assert max(counts) > 1
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [1, 2]}}}
    for seed in range(3):
        reply = chat_server.post(CHAT, {**body, "response_format": schema, "seed": seed}).json["choices"][0]
        assert reply["message"].get("tool_calls") or json.loads(reply["message"]["content"]) in (1, 2)
    off = {"tool_choice": "none", "response_format": schema}
    assert json.loads(chat_server.post(CHAT, {**body, **off}).json["choices"][0]["message"]["content"]) in (1, 2)


def test_the_official_client_goes_through_a_whole_round(chat_server):
    with openai.OpenAI(base_url=f"{chat_server.url}/v1", api_key="-", max_retries=0, timeout=WAIT) as client:
        reply = client.chat.completions.create(
            model="small", messages=USER, tools=TOOLS, tool_choice="required", max_tokens=100, parallel_tool_calls=False
        )
        message = reply.choices[0].message
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}
        after = client.chat.completions.create(
            model="small", messages=[*USER, message, result], tools=TOOLS, max_tokens=4, temperature=0
        )
        assert after.choices[0].finish_reason == "length"


def test_a_template_that_knows_no_tools_is_told_in_words(chat_server):
    call = {"id": "c1", "type": "function", "function": {"name": "time", "arguments": '{"zone": "CET"}'}}
    turns = [*USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
    turns += [{"role": "tool", "tool_call_id": "c1", "content": text} for text in ("noon", "one")]
    tokens = chat_server.post("/tokenize", {"messages": turns}).json["tokens"]
    text = chat_server.post("/detokenize", {"tokens": tokens}).json["prompt"]
    assert '<tool_call>\n{"name": "time", "arguments": {"zone": "CET"}}\n</tool_call>' in text
    assert "# user: <tool_response>\nnoon\n</tool_response>\n<tool_response>\none\n</tool_response>" in text
    short = chat_server.post(CHAT, {"messages": USER, "max_tokens": 1}).json["usage"]["prompt_tokens"]
    told = chat_server.post(CHAT, {"messages": USER, "max_tokens": 1, "tools": TOOLS}).json["usage"]["prompt_tokens"]
    assert told > short + 50


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools", "web_search"),
        ({"tools": [{"type": "function"}]}, "tools", "name"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "tools", "weather"),
        ({"tools": 3}, "tools", "list"),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tools": TOOLS, "tool_choice": "other"}, "tool_choice", "required"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice", "called g"),
        ({"tools": TOOLS, "guided_regex": "a"}, "tools", "guided_regex"),
        ({"tools": [function("f", a={"type": "odd"})], "tool_choice": "required"}, "tools", "odd"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused(chat_server, body, param, said):
    chat_server.post(CHAT, {"messages": USER, "max_tokens": 4, **body}).refused(400, said, param=param)
