"""Anthropic's own client."""

from __future__ import annotations

import json

import anthropic
import pytest
from client_helpers import NAME, PARAMETERS, USER, WAIT, Weather, is_weather

pytestmark = pytest.mark.clients
TOOL = {"name": "weather", "description": "the weather", "input_schema": PARAMETERS}
GREEDY = {"model": f"{NAME}:3", "extra_body": {"temperature": 0}}


@pytest.fixture(scope="module")
def client(server):
    with anthropic.Anthropic(base_url=server.url, api_key="-", max_retries=0, timeout=WAIT) as made:
        yield made


def test_messages_whole_and_streamed(client, said):
    asked = {**GREEDY, "messages": USER, "system": "be brief", "max_tokens": 12}
    expected = said([{"role": "system", "content": "be brief"}, *USER])
    reply = client.messages.create(**asked)
    assert ([block.text for block in reply.content], reply.stop_reason) == ([expected], "max_tokens")
    with client.messages.stream(**asked) as stream:
        pieces = list(stream.text_stream)
        assert stream.get_final_text() == "".join(pieces) == expected
    assert len(pieces) > 1
    counted = client.messages.count_tokens(model=NAME, messages=USER, system="be brief").input_tokens
    assert counted == reply.usage.input_tokens + reply.usage.cache_read_input_tokens


def test_a_round_of_calls_whole_and_streamed(client):
    asked = {
        **GREEDY, "messages": USER, "tools": [TOOL], "max_tokens": 100,
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
    }  # fmt: skip
    reply = client.messages.create(**asked)
    (block,) = reply.content
    assert (block.type, block.name, reply.stop_reason) == ("tool_use", "weather", "tool_use")
    assert is_weather(block.input)
    with client.messages.stream(**asked) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        (streamed,) = stream.get_final_message().content
    assert json.loads("".join(pieces)) == streamed.input == block.input
    result = {"type": "tool_result", "tool_use_id": block.id, "content": "sunny"}
    turns = [*USER, {"role": "assistant", "content": reply.content}, {"role": "user", "content": [result]}]
    after = client.messages.create(**GREEDY, messages=turns, tools=[TOOL], max_tokens=4)
    assert after.stop_reason == "max_tokens"


def test_a_schema(client):
    reply = client.messages.parse(**GREEDY, messages=USER, max_tokens=60, output_format=Weather)
    assert isinstance(reply.parsed_output, Weather)


def test_models_and_errors(client):
    with pytest.raises(anthropic.NotFoundError, match="nothing"):
        client.messages.create(model="nothing", messages=USER, max_tokens=1)
    with pytest.raises(anthropic.BadRequestError, match="bash_20250124"):
        client.messages.create(
            model=NAME, messages=USER, max_tokens=1, tools=[{"type": "bash_20250124", "name": "bash"}]
        )
    assert f"{NAME}:2" in {model.id for model in client.models.list()}
