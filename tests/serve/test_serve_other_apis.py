"""/v1/responses by OpenAI's client, and /v1/messages as Anthropic's sends it."""

from __future__ import annotations

import json

import openai
import pytest
from http_calls import CHAT, WAIT

MESSAGES, COUNT, RESPONSES = "/v1/messages", "/v1/messages/count_tokens", "/v1/responses"
USER = [{"role": "user", "content": "write a loop"}]
GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def client(chat_server):
    with openai.OpenAI(base_url=f"{chat_server.url}/v1", api_key="-", max_retries=0, timeout=WAIT) as made:
        yield made


@pytest.fixture(scope="module")
def said(chat_server):
    """said(messages, ...) -> what a chat answers."""

    def ask(messages, **settings):
        return chat_server.post(CHAT, {"messages": messages, **GREEDY, **settings}).json["choices"][0]["message"][
            "content"
        ]

    return ask


def named_events(stream: bytes) -> list[dict]:
    """The data of events, each of which is named as its type."""
    found = []
    for block in stream.decode().strip().split("\n\n"):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def test_a_response_says_what_a_chat_says(client, said):
    whole = client.responses.create(
        model="small:3", input="write a loop", instructions="be brief", max_output_tokens=9, **GREEDY
    )
    turns = [{"role": "system", "content": "be brief"}, *USER]
    assert whole.output_text == said(turns, max_tokens=9, bits=3)
    assert (whole.status, whole.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (whole.usage.output_tokens, whole.bits) == (9, 3)
    parts = [{"role": "user", "content": [{"type": "input_text", "text": "write a loop"}]}]
    assert client.responses.create(model="small", input=parts, max_output_tokens=9, **GREEDY).output_text == said(
        USER, max_tokens=9
    )


def test_a_streamed_response_is_the_whole_in_pieces(client, said):
    with client.responses.stream(model="small", input="write a loop", max_output_tokens=9, **GREEDY) as stream:
        events = list(stream)
    final = events[-1].response
    assert (events[0].type, events[-1].type) == ("response.created", "response.incomplete")
    assert [event.sequence_number for event in events] == list(range(len(events)))
    pieces = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert len(pieces) > 1
    assert "".join(pieces) == final.output_text == said(USER, max_tokens=9)
    assert final.usage.output_tokens == 9


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"text": {"format": {"type": "xml"}}}, "format"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input_image"),
        ({"input": [{"type": "computer_call"}]}, "computer_call"),
        ({"input": 3}, "input"),
        ({"input": []}, "messages"),
    ],
    ids=str,
)
def test_what_a_response_cannot_do_is_refused(chat_server, body, named):
    chat_server.post(RESPONSES, {"input": "x", "max_output_tokens": 1, **body}).refused(400, named)


def test_a_message_says_what_a_chat_says(chat_server, said):
    turns = [{"role": "user", "content": [{"type": "text", "text": "write a loop", "cache_control": {"type": "x"}}]}]
    body = {"model": "small:3", "system": "be brief", "messages": turns, "max_tokens": 9, **GREEDY}
    reply = chat_server.post(MESSAGES, body).json
    expected = said([{"role": "system", "content": "be brief"}, *USER], max_tokens=9, bits=3)
    assert reply["content"] == [{"type": "text", "text": expected}]
    assert (reply["type"], reply["role"], reply["model"]) == ("message", "assistant", "small:3")
    assert (reply["stop_reason"], reply["stop_sequence"]) == ("max_tokens", None)
    usage = reply["usage"]
    counted = chat_server.post(COUNT, body).json["input_tokens"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == counted
    assert usage["output_tokens"] == 9


def test_a_streamed_message_is_the_whole_in_pieces(chat_server, said):
    answer = chat_server.post(MESSAGES, {"messages": USER, "max_tokens": 9, "stream": True, **GREEDY})
    events = named_events(answer.body)
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert "".join(event["delta"]["text"] for event in events[2:-3]) == said(USER, max_tokens=9)
    assert events[-2]["delta"]["stop_reason"] == "max_tokens"
    assert events[-2]["usage"]["output_tokens"] == 9


def test_a_stop_sequence_is_named_and_an_assistants_last_message_continued(chat_server, said):
    whole = said(USER, max_tokens=30)
    stop = whole[5:9]
    reply = chat_server.post(
        MESSAGES, {"messages": USER, "max_tokens": 30, "stop_sequences": ["never", stop], **GREEDY}
    )
    assert reply.json["content"][0]["text"] == whole[: whole.index(stop)]
    assert (reply.json["stop_reason"], reply.json["stop_sequence"]) == ("stop_sequence", stop)
    begun = [*USER, {"role": "assistant", "content": "for i"}]
    reply = chat_server.post(MESSAGES, {"messages": begun, "max_tokens": 5, **GREEDY}).json
    assert reply["content"][0]["text"] == said(begun, max_tokens=5, continue_final_message=True)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search_20250305"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "image"),
        ({"messages": [{"role": "system", "content": 3}]}, "content"),
        ({"messages": []}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
    ids=str,
)
def test_what_a_message_cannot_do_is_refused_in_anthropics_form(chat_server, body, named):
    answer = chat_server.post(MESSAGES, {"messages": USER, "max_tokens": 1, **body})
    assert answer.status == 400
    assert answer.json["type"] == "error"
    assert named in answer.json["error"]["message"]
    assert answer.json["error"]["type"] == "invalid_request_error"
