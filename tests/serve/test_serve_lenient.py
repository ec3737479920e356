"""Requests as clients really send them: taken, and what was not done as it says is told."""

from __future__ import annotations

import json
import logging

import pytest
from http_calls import CHAT, COMPLETIONS, events

from bitstrata.serve.notices import HEADER

USER = [{"role": "user", "content": "x"}]


def warned(answer):
    """The warnings of a reply, the same in its header."""
    assert answer.status == 200, answer.body
    found = answer.json.get("warnings", [])
    assert json.loads(answer.headers.get(HEADER.lower(), "[]")) == found
    return found


@pytest.mark.parametrize(
    "body",
    [
        {"max_tokens": 2.0},
        {"max_tokens": None},
        {"max_tokens": -1, "stop": "e"},
        {"stop": ""},
        {"stop": [""]},
        {"top_p": 0},
        {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "typical_p": 1, "mirostat": 0},
        {"seed": -1},
        {"stream_options": {"include_usage": True}},
        {"cache_prompt": True, "id_slot": -1, "user": "u", "metadata": {}, "request_id": "r"},
        {"n": 1.0, "best_of": 1, "use_beam_search": False, "guided_json": None},
    ],
    ids=str,
)
def test_values_as_clients_send_them_need_no_warning(server, body):
    assert warned(server.post(COMPLETIONS, {"prompt": "x", "max_tokens": 2, **body})) == []


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"max_tokens": "2"}, "max_tokens: the text '2' was read as 2"),
        ({"temperature": "0.5"}, "temperature: the text '0.5' was read as 0.5"),
        ({"stream": "false"}, "stream: the text 'false' was read as False"),
        ({"bits": "3"}, "bits: the text '3' was read as 3"),
        ({"colour": 1}, "the unknown field 'colour' was ignored"),
        ({"stream_options": {"colour": 1}}, "the unknown field 'stream_options.colour' was ignored"),
        ({"prompt": [5] * 1000, "max_tokens": 65535}, "max_tokens lowered from 65535 to 24"),
    ],
    ids=str,
)
def test_what_was_read_as_something_else_is_told_and_refused_by_a_strict_server(server, serving, body, said):
    whole = {"prompt": "x", "max_tokens": 2, "ignore_eos": True, **body}
    (told,) = warned(server.post(COMPLETIONS, whole))
    assert told.startswith(said)
    with serving(strict=True) as strict:
        strict.post(COMPLETIONS, whole).refused(400)
        assert strict.post(COMPLETIONS, {"prompt": "x", "max_tokens": 2}).status == 200


def test_a_stream_tells_it_in_its_first_chunk_and_repeats_its_usage(server):
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"messages": USER, "max_tokens": 3, "stream": True, "stream_options": options, "colour": 1}
    answer = server.post(CHAT, {**body, "ignore_eos": True})
    first, *others = [json.loads(data) for data in events(answer.body)[:-1]]
    assert first["warnings"] == json.loads(answer.headers[HEADER.lower()]) == ["the unknown field 'colour' was ignored"]
    assert not any("warnings" in chunk for chunk in others)
    counts = [chunk["usage"]["completion_tokens"] for chunk in (first, *others)]
    assert counts[0] == 0
    assert counts == sorted(counts)
    assert counts[-1] == 3
    once = server.post(CHAT, {**body, "stream_options": {"include_usage": True}})
    assert [b'"usage"' in line for line in once.body.splitlines() if line.startswith(b"data: {")].count(True) == 1


def test_a_clients_own_history_comes_back(chat_server):
    carried = {
        "id": "m1",
        "type": "message",
        "timestamp": 1700000000,
        "refusal": None,
        "annotations": [],
        "provider_specific_fields": {"refusal": None},
        "reasoning_content": "hm",
        "name": "helper",
    }
    turns = [*USER, {"role": "assistant", "content": "y", **carried}, *USER]
    plain = [*USER, {"role": "assistant", "content": "y"}, *USER]
    answers = [chat_server.post(CHAT, {"messages": one, "max_tokens": 2, "temperature": 0}) for one in (turns, plain)]
    assert warned(answers[0]) == []
    assert answers[0].json["usage"]["prompt_tokens"] == answers[1].json["usage"]["prompt_tokens"]
    assert answers[0].json["choices"] == answers[1].json["choices"]


def test_names_of_unknown_fields_cannot_break_the_header(server):
    for name in ("a\r\nSet-Cookie: b", "\N{SNOWMAN}", "x" * 5000):
        (told,) = warned(server.post(COMPLETIONS, {"prompt": "x", "max_tokens": 1, name: 1}))
        assert "set-cookie" not in server.post(COMPLETIONS, {"prompt": "x", "max_tokens": 1, name: 1}).headers
        assert len(told) < 120


def test_refusals_and_unknown_fields_are_in_the_log(serving, caplog):
    with serving() as server, caplog.at_level(logging.INFO, logger="bitstrata"):
        for _ in range(2):
            server.post(COMPLETIONS, {"prompt": "x", "max_tokens": 1, "unheard_of": 1})
        server.post(COMPLETIONS, {"prompt": "x", "suffix": "y"}).refused(400)
        server.get("/v1/what").refused(404)
    said = [record.getMessage() for record in caplog.records]
    assert len([line for line in said if "unheard_of" in line]) == 1
    assert any("refused POST /v1/completions: 400, this model's vocabulary has no marks" in line for line in said)
    assert any("refused GET /v1/what: 404" in line for line in said)


def test_tools_that_are_not_to_be_called_are_taken(chat_server):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    body = {"messages": USER, "max_tokens": 1, "tools": tools}
    assert warned(chat_server.post(CHAT, {**body, "tool_choice": "none"})) == []
    assert warned(chat_server.post(CHAT, body)) == []
