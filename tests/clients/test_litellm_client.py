"""litellm, by its names for servers of OpenAI's API and of Anthropic's."""

from __future__ import annotations

import copy
import json
from typing import Any

import litellm
import pytest
from client_helpers import NAME, PARAMETERS, TOOL, USER, WAIT, is_weather

pytestmark = pytest.mark.clients
PROVIDERS = ["openai", "hosted_vllm", "anthropic"]


@pytest.fixture(scope="module")
def complete(server):
    """complete(provider, messages, ...) -> what litellm.completion gives, greedy, at 3 bits."""

    def ask(provider: str, messages: list[Any], **settings: Any) -> Any:
        return litellm.completion(
            **{
                "model": f"{provider}/{NAME}:3",
                "api_base": server.url if provider == "anthropic" else server.v1,
                "api_key": "-",
                "messages": messages,
                "temperature": 0,
                "max_tokens": 12,
                "timeout": WAIT,
                "num_retries": 0,
                **copy.deepcopy(settings),  # litellm takes additionalProperties out of tools as they are
            }
        )

    return ask


@pytest.mark.parametrize("provider", PROVIDERS)
def test_chat_whole_streamed_and_with_its_own_reply_in_the_history(complete, said, provider):
    reply = complete(provider, USER)
    expected = said(USER)
    assert reply.choices[0].message.content == expected
    pieces = [chunk.choices[0].delta.content or "" for chunk in complete(provider, USER, stream=True)]
    assert "".join(pieces) == expected
    assert sum(map(bool, pieces)) > 1
    turns = [*USER, reply.choices[0].message, {"role": "user", "content": "again"}]
    plain = [*USER, {"role": "assistant", "content": expected}, {"role": "user", "content": "again"}]
    assert complete(provider, turns).choices[0].message.content == said(plain)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_tools(complete, provider):
    asked = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 100}
    message = complete(provider, USER, **asked).choices[0].message
    (call,) = message.tool_calls
    assert call.function.name == "weather"
    assert is_weather(json.loads(call.function.arguments))
    chunks = list(complete(provider, USER, **asked, stream=True))
    (built,) = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls
    assert json.loads(built.function.arguments) == json.loads(call.function.arguments)
    turns = [*USER, message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    assert complete(provider, turns, tools=[TOOL], max_tokens=4).choices[0].finish_reason == "length"


def test_a_schema_and_log_probabilities(complete):
    schema = {"type": "json_schema", "json_schema": {"name": "weather", "schema": PARAMETERS, "strict": True}}
    reply = complete("openai", USER, response_format=schema, max_tokens=60)
    assert is_weather(json.loads(reply.choices[0].message.content))
    reply = complete("openai", USER, logprobs=True, top_logprobs=2, max_tokens=4)
    assert [len(item.top_logprobs) for item in reply.choices[0].logprobs.content] == [2] * 4


def test_errors(complete):
    with pytest.raises(litellm.NotFoundError, match="nothing"):
        complete("openai", USER, model="openai/nothing")
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        complete("openai", USER, temperature=-1)
