"""OpenAI's own client."""

from __future__ import annotations

import json
import math

import openai
import pytest
from client_helpers import NAME, TOOL, USER, WAIT, Weather, is_weather

pytestmark = pytest.mark.clients
GREEDY = {"model": f"{NAME}:3", "temperature": 0}


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.v1, api_key="-", max_retries=0, timeout=WAIT) as made:
        yield made


def test_chat_whole_and_streamed(client, said):
    asked = {**GREEDY, "messages": USER, "max_tokens": 12}
    expected = said(USER)
    assert client.chat.completions.create(**asked).choices[0].message.content == expected
    pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**asked, stream=True)]
    assert "".join(pieces) == expected
    assert sum(map(bool, pieces)) > 1


def test_completions_and_models(client):
    assert {f"{NAME}:{bits}" for bits in (2, 3, 4)} < {model.id for model in client.models.list()}
    asked = {**GREEDY, "prompt": "import os\n", "max_tokens": 8}
    whole = client.completions.create(**asked).choices[0].text
    assert "".join(chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True)) == whole != ""


def test_log_probabilities(client):
    reply = client.chat.completions.create(**GREEDY, messages=USER, max_tokens=5, logprobs=True, top_logprobs=3)
    content = reply.choices[0].logprobs.content
    assert "".join(item.token for item in content) == reply.choices[0].message.content
    for item in content:
        assert len(item.top_logprobs) == 3
        assert item.logprob == max(other.logprob for other in item.top_logprobs) < 0
        assert sum(math.exp(other.logprob) for other in item.top_logprobs) <= 1


def test_tools_whole_and_streamed(client):
    asked = {
        **GREEDY, "messages": USER, "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False,
        "max_tokens": 100,
    }  # fmt: skip
    message = client.chat.completions.create(**asked).choices[0].message
    (call,) = message.tool_calls
    assert call.function.name == "weather"
    assert is_weather(json.loads(call.function.arguments))
    with client.chat.completions.stream(**asked) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls
    assert [event.arguments for event in done] == [streamed.function.arguments] == [call.function.arguments]
    turns = [*USER, message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    after = client.chat.completions.create(**GREEDY, messages=turns, tools=[TOOL], max_tokens=4)
    assert after.choices[0].finish_reason == "length"


def test_a_schema(client):
    reply = client.chat.completions.parse(**GREEDY, messages=USER, response_format=Weather, max_tokens=60)
    assert isinstance(reply.choices[0].message.parsed, Weather)
    response = client.responses.parse(**GREEDY, input="write a loop", text_format=Weather, max_output_tokens=60)
    assert response.output_parsed == reply.choices[0].message.parsed


def test_responses_with_a_round_of_calls(client, said):
    tools = [{"type": "function", **TOOL["function"]}]
    asked = {**GREEDY, "tools": tools, "tool_choice": "required", "parallel_tool_calls": False}
    with client.responses.stream(**asked, input="write a loop", max_output_tokens=100) as stream:
        pieces = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
        first = stream.get_final_response()
    (call,) = first.output
    assert "".join(pieces) == call.arguments
    assert is_weather(json.loads(call.arguments))
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    turns = [*USER, *first.output, result]
    after = client.responses.create(**{**asked, "tool_choice": "none"}, input=turns, max_output_tokens=12)
    function = {"name": call.name, "arguments": call.arguments}
    chat = [
        *USER,
        {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "c", "content": "sunny"},
    ]
    assert after.output_text == said(chat)


def test_errors(client):
    with pytest.raises(openai.NotFoundError, match="nothing"):
        client.chat.completions.create(model="nothing", messages=USER)
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        client.chat.completions.create(model=NAME, messages=USER, temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="image"):
        client.responses.create(model=NAME, input=[{"role": "user", "content": [{"type": "input_image"}]}])
