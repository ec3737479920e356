"""Tools in /v1/messages and /v1/responses: the same calls as of a chat, in other words; and /tokenize with tools."""

from __future__ import annotations

import json

import openai
import pytest
from http_calls import CHAT, WAIT
from test_serve_other_apis import COUNT, MESSAGES, RESPONSES, named_events
from test_serve_tools import TOOLS, USER

from bitstrata.runtime.tools import CallDelta
from bitstrata.serve.anthropic import MessagesFormatter
from bitstrata.serve.notices import Notices, Told
from bitstrata.serve.replies import Delta, PromptDetails, Usage
from bitstrata.serve.requests import ChatBody
from bitstrata.serve.responses import ResponsesBody, ResponsesFormatter
from bitstrata.serve.spelling import dump

FUNCTIONS = [tool["function"] for tool in TOOLS]
ANTHROPIC = [
    {"name": one["name"], "description": one["description"], "input_schema": one["parameters"]} for one in FUNCTIONS
]
FLAT = [{"type": "function", **one} for one in FUNCTIONS]
GREEDY = {"temperature": 0}
ROUND = [  # a text and two calls in one turn, and their results
    *USER,
    {
        "role": "assistant",
        "content": "I look.",
        "tool_calls": [
            {"id": f"c{at}", "type": "function", "function": {"name": "time", "arguments": '{"zone": "CET"}'}}
            for at in (1, 2)
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "noon"},
    {"role": "tool", "tool_call_id": "c2", "content": "one"},
    {"role": "user", "content": "and now?"},
]


@pytest.fixture(scope="module")
def client(chat_server):
    with openai.OpenAI(base_url=f"{chat_server.url}/v1", api_key="-", max_retries=0, timeout=WAIT) as made:
        yield made


def called(chat_server, **settings) -> tuple[str, dict]:
    """What a chat calls."""
    body = {"messages": USER, "tools": TOOLS, "parallel_tool_calls": False, "max_tokens": 120, **GREEDY, **settings}
    (call,) = chat_server.post(CHAT, body).json["choices"][0]["message"]["tool_calls"]
    return call["function"]["name"], json.loads(call["function"]["arguments"])


@pytest.mark.parametrize(
    ("choice", "of_chat"),
    [({"type": "any"}, "required"), ({"type": "tool", "name": "time"}, {"type": "function", "name": "time"})],
    ids=str,
)
def test_a_message_calls_what_a_chat_calls(chat_server, choice, of_chat):
    body = {
        "messages": USER, "tools": ANTHROPIC, "max_tokens": 120, "bits": 3, **GREEDY,
        "tool_choice": {**choice, "disable_parallel_tool_use": True},
    }  # fmt: skip
    expected = called(chat_server, tool_choice=of_chat, bits=3)
    reply = chat_server.post(MESSAGES, body).json
    (block,) = reply["content"]
    assert (block["type"], block["id"][:6], block["name"], block["input"]) == ("tool_use", "toolu_", *expected)
    assert (reply["stop_reason"], reply["stop_sequence"]) == ("tool_use", None)

    events = named_events(chat_server.post(MESSAGES, {**body, "stream": True}).body)
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    started = events[1]["content_block"]
    assert (started["type"], started["name"], started["input"]) == ("tool_use", expected[0], {})
    pieces = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert {piece["type"] for piece in pieces} == {"input_json_delta"}
    assert len(pieces) > 1
    assert json.loads("".join(piece["partial_json"] for piece in pieces)) == expected[1]
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "time"}], ids=str)
def test_a_response_calls_what_a_chat_calls(chat_server, client, choice):
    settings = {
        "model": "small:3", "input": "what is the weather in Rome?", "tools": FLAT, "tool_choice": choice,
        "parallel_tool_calls": False, "max_output_tokens": 120, **GREEDY,
    }  # fmt: skip
    expected = called(chat_server, tool_choice=choice, bits=3)
    whole = client.responses.create(**settings)
    (item,) = whole.output
    assert (item.type, item.status, whole.status) == ("function_call", "completed", "completed")
    assert (item.id[:3], item.call_id[:5]) == ("fc_", "call_")
    assert (item.name, json.loads(item.arguments)) == expected
    assert [tool.name for tool in whole.tools] == ["weather", "time"]

    with client.responses.stream(**settings) as stream:
        events = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    added = next(event.item for event in events if event.type == "response.output_item.added")
    pieces = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert len(pieces) > 1
    (done,) = (event for event in events if event.type == "response.function_call_arguments.done")
    assert "".join(pieces) == done.arguments == item.arguments
    (final,) = events[-1].response.output
    assert {final.id, added.id, done.item_id} == {final.id}
    assert (final.call_id, final.name, done.name) == (added.call_id, expected[0], expected[0])
    assert not any(event.type.startswith("response.output_text") for event in events)


def test_a_round_is_the_same_prompt_in_every_api(chat_server):
    told = {"tools": TOOLS, "max_tokens": 1}
    expected = chat_server.post(CHAT, {"messages": ROUND, **told}).json["usage"]["prompt_tokens"]
    assert chat_server.post("/tokenize", {"messages": ROUND, "tools": TOOLS}).json["count"] == expected
    blocks = [{"type": "text", "text": "I look."}]
    blocks += [{"type": "tool_use", "id": f"c{at}", "name": "time", "input": {"zone": "CET"}} for at in (1, 2)]
    results = [
        {"type": "tool_result", "tool_use_id": "c1", "content": "noon"},
        {"type": "tool_result", "tool_use_id": "c2", "content": [{"type": "text", "text": "one"}]},
        {"type": "text", "text": "and now?"},
    ]
    turns = [*USER, {"role": "assistant", "content": blocks}, {"role": "user", "content": results}]
    assert chat_server.post(COUNT, {"messages": turns, "tools": ANTHROPIC}).json["input_tokens"] == expected
    items = [
        *USER,
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
        *(
            {"type": "function_call", "call_id": f"c{at}", "name": "time", "arguments": '{"zone": "CET"}'}
            for at in (1, 2)
        ),
        {"type": "function_call_output", "call_id": "c1", "output": "noon"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "one"}]},
        {"role": "user", "content": "and now?"},
    ]
    reply = chat_server.post(RESPONSES, {"input": items, "tools": FLAT, "max_output_tokens": 1}).json
    assert reply["usage"]["input_tokens"] == expected


def test_tools_that_are_not_to_be_called_are_not_told_of(chat_server):
    bare = chat_server.post("/tokenize", {"messages": USER}).json["count"]
    told = chat_server.post("/tokenize", {"messages": USER, "tools": TOOLS}).json["count"]
    one = {"type": "function", "function": {"name": "time"}}
    some = chat_server.post("/tokenize", {"messages": USER, "tools": TOOLS, "tool_choice": one}).json["count"]
    assert bare < some < told
    none = {"tools": ANTHROPIC, "tool_choice": {"type": "none"}}
    assert chat_server.post(COUNT, {"messages": USER, **none}).json["input_tokens"] == bare
    reply = chat_server.post(RESPONSES, {"input": USER, "tools": FLAT, "tool_choice": "none", "max_output_tokens": 1})
    assert reply.json["usage"]["input_tokens"] == bare
    chat_server.post("/tokenize", {"messages": USER, "tools": 3}).refused(400, "tools", "list")


DELTAS = [
    Delta(0, text="I "),
    Delta(0, text="look.", calls=(CallDelta(0, "time"), CallDelta(0, arguments='{"zone": null'))),
    Delta(0, calls=(CallDelta(0, arguments="}"), CallDelta(1, "day"))),
    Delta(0, text="So:"),
    Delta(0, calls=(CallDelta(2, "time"), CallDelta(2, arguments='{"zone": "C')), finish="length"),
]
USAGE = Usage(
    prompt_tokens=3, completion_tokens=9, total_tokens=12, prompt_tokens_details=PromptDetails(cached_tokens=0), bits={}
)


def formatted(kind):
    body, notices = ChatBody.model_validate({"messages": USER}), Notices(False, Told())
    if kind is MessagesFormatter:
        return kind(body, "small", None, notices)
    return kind(ResponsesBody.model_validate({"input": "x", "tools": FLAT}), body, "small", None, notices)


def streamed(kind) -> list[dict]:
    formatter = formatted(kind)
    chunks = formatter.first_chunks(1, USAGE)
    for delta in DELTAS:
        chunks += formatter.next_chunks(delta, 3, USAGE)
    return [json.loads(dump(chunk)) for chunk in [*chunks, *formatter.last_chunks(USAGE, 3)]]


def test_texts_and_calls_are_blocks_in_their_order():
    events = streamed(MessagesFormatter)
    blocks: list[dict] = []
    open_at = None
    for event in events:
        if event["type"] == "content_block_start":
            assert (open_at, event["index"]) == (None, len(blocks))
            open_at = event["index"]
            blocks.append({**event["content_block"], "said": ""})
        elif event["type"] == "content_block_delta":
            assert event["index"] == open_at
            blocks[open_at]["said"] += event["delta"].get("text", "") + event["delta"].get("partial_json", "")
        elif event["type"] == "content_block_stop":
            assert event["index"] == open_at
            open_at = None
    assert [(block["type"], block.get("name"), block["said"]) for block in blocks] == [
        ("text", None, "I look."),
        ("tool_use", "time", '{"zone": null}'),
        ("tool_use", "day", ""),
        ("text", None, "So:"),
        ("tool_use", "time", '{"zone": "C'),
    ]
    assert len({block["id"] for block in blocks if "id" in block}) == 3
    assert events[-2]["delta"]["stop_reason"] == "max_tokens"
    whole = json.loads(dump(formatted(MessagesFormatter).reply([Delta.joined(DELTAS)], USAGE, 3)))
    assert [block.get("input", block.get("text")) for block in whole["content"]] == [
        "I look.So:",
        {"zone": None},
        {},
        {},
    ]


@pytest.mark.parametrize(
    ("said", "read"),
    [('{"a": [1, 2', {"a": [1, 2]}), ("{a}", {"INVALID_JSON": "{a}"}), ("[1]", {"INVALID_JSON": "[1]"}), ("", {})],
    ids=str,
)
def test_the_input_of_a_call_is_an_object_whatever_the_model_wrote(said, read):
    delta = Delta(0, calls=(CallDelta(0, "f"), CallDelta(0, arguments=said)), finish="tool_calls")
    whole = formatted(MessagesFormatter).reply([delta], USAGE, 3)
    assert [block.input for block in whole.content] == [read]


def test_texts_and_calls_are_items_in_their_order():
    events = streamed(ResponsesFormatter)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    added, done = (
        [event for event in events if event["type"] == f"response.output_item.{what}"] for what in ("added", "done")
    )
    final = events[-1]["response"]
    assert [event["output_index"] for event in added] == [event["output_index"] for event in done] == list(range(5))
    assert [event["item"] for event in done] == final["output"]
    assert [event["item"]["id"] for event in added] == [item["id"] for item in final["output"]]
    assert [item["status"] for item in final["output"]] == ["completed"] * 4 + ["incomplete"]
    assert [item.get("arguments") for item in final["output"]] == [None, '{"zone": null}', "", None, '{"zone": "C']
    assert len({item["call_id"] for item in final["output"] if "call_id" in item}) == 3
    for event in events:
        if event["type"].endswith((".delta", "_text.done", "arguments.done")):
            assert event["item_id"] == final["output"][event["output_index"]]["id"]
    assert final["tools"] == FLAT
    assert (final["status"], final["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        (MESSAGES, {"tools": [{"type": "bash_20250124", "name": "bash"}]}, "bash_20250124"),
        (MESSAGES, {"tools": [{"input_schema": {}}]}, "name"),
        (MESSAGES, {"tools": [{"name": "f", "input_schema": 3}]}, "f: "),
        (MESSAGES, {"tools": {}}, "tools"),
        (MESSAGES, {"tools": [*ANTHROPIC, ANTHROPIC[0]]}, "weather"),
        (MESSAGES, {"tool_choice": {"type": "any"}}, "no tools"),
        (MESSAGES, {"tools": ANTHROPIC, "tool_choice": "any"}, "tool_choice"),
        (MESSAGES, {"tools": ANTHROPIC, "tool_choice": {"type": "tool", "name": "g"}}, "called g"),
        (MESSAGES, {"tools": ANTHROPIC, "tool_choice": {"type": "tool"}}, "tool_choice"),
        (MESSAGES, {"tools": ANTHROPIC, "tool_choice": {"type": []}}, "tool_choice"),
        (RESPONSES, {"tools": [{"type": "web_search"}]}, "web_search"),
        (RESPONSES, {"tools": [{"type": "function"}]}, "name"),
        (RESPONSES, {"tool_choice": "required"}, "no tools"),
        (RESPONSES, {"tools": FLAT, "tool_choice": {"type": "function", "name": "g"}}, "called g"),
        (RESPONSES, {"tools": FLAT, "tool_choice": 3}, "tool_choice"),
        (RESPONSES, {"input": [{"type": "function_call", "call_id": "c", "arguments": "{}"}]}, "tool_calls"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused(chat_server, path, body, named):
    told = {"messages": USER, "max_tokens": 1} if path == MESSAGES else {"input": "x", "max_output_tokens": 1}
    answer = chat_server.post(path, {**told, **body})
    assert answer.status == 400, answer.body
    assert named in answer.json["error"]["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("metadata", {"a": "\ud800"}), ("tools", [{**FLAT[0], "parameters": {"title": "\ud800"}}])],
    ids=["metadata", "tools"],
)
def test_half_a_character_is_echoed_as_it_came(chat_server, field, value):
    body = {"input": "x", "max_output_tokens": 1, "tool_choice": "none", field: value}
    assert chat_server.post(RESPONSES, body).json[field] == value
