"""LangChain's client of OpenAI's API."""

from __future__ import annotations

from typing import Literal

import openai
import pytest
from client_helpers import NAME, USER, WAIT, is_weather
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

pytestmark = pytest.mark.clients


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Rome", "Oslo"]
    days: int = Field(ge=0, le=9)


@tool
def weather(city: Literal["Rome", "Oslo"], days: Literal[1, 2, 3]) -> str:
    """The weather of a city."""
    return f"sunny in {city} for {days}"


@pytest.fixture(scope="module")
def chat(server):
    """chat(...) -> a greedy ChatOpenAI at 3 bits."""

    def make(**settings):
        return ChatOpenAI(
            **{
                "model": f"{NAME}:3",
                "base_url": server.v1,
                "api_key": "-",
                "temperature": 0,
                "max_tokens": 12,
                "max_retries": 0,
                "timeout": WAIT,
                **settings,
            }
        )

    return make


@pytest.mark.parametrize("responses", [False, True], ids=["chat", "responses"])
def test_chat_whole_and_streamed(chat, said, responses):
    model = chat(use_responses_api=responses)
    expected = said(USER)
    assert model.invoke("write a loop").text == expected
    pieces = [chunk.text for chunk in model.stream("write a loop")]
    assert "".join(pieces) == expected
    assert sum(map(bool, pieces)) > 1


@pytest.mark.parametrize("responses", [False, True], ids=["chat", "responses"])
def test_bound_tools_go_through_a_round(chat, responses):
    model = chat(use_responses_api=responses, max_tokens=100)
    bound = model.bind_tools([weather], tool_choice="required", parallel_tool_calls=False)
    reply = bound.invoke("write a loop")
    (call,) = reply.tool_calls
    assert call["name"] == "weather"
    assert is_weather(call["args"])
    whole = None
    for chunk in bound.stream("write a loop"):
        whole = chunk if whole is None else whole + chunk
    assert [(one["name"], one["args"]) for one in whole.tool_calls] == [("weather", call["args"])]
    result = weather.invoke(call)
    assert isinstance(result, ToolMessage)
    turns = [HumanMessage("write a loop"), reply, result]
    after = chat(use_responses_api=responses, max_tokens=16).bind_tools([weather]).invoke(turns)
    assert after.text or after.tool_calls


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(chat, method):
    model = chat(max_tokens=100).with_structured_output(Weather, method=method)
    assert isinstance(model.invoke("write a loop"), Weather)


def test_structured_output_that_was_cut(chat):
    short = chat(max_tokens=3)
    with pytest.raises(openai.LengthFinishReasonError):
        short.with_structured_output(Weather, method="json_schema").invoke("write a loop")
    assert short.with_structured_output(Weather, method="function_calling").invoke("write a loop") is None


def test_log_probabilities_and_errors(chat):
    reply = chat(max_tokens=4).bind(logprobs=True, top_logprobs=2).invoke("write a loop")
    content = reply.response_metadata["logprobs"]["content"]
    assert [len(item["top_logprobs"]) for item in content] == [2] * 4
    with pytest.raises(openai.NotFoundError, match="nothing"):
        chat(model="nothing").invoke("x")
