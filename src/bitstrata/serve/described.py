"""What the schema says of answers."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from .replies import ErrorReply

_REFUSALS = {
    400: "what was asked for is wrong or not supported",
    401: "the API key is missing or wrong",
    404: "no such model",
    408: "the body did not come",
    413: "the body is too large",
    403: "the server does not go by that name",
    415: "the body is not JSON",
    429: "too many requests",
    500: "the server's fault",
    503: "the server is closing",
}


def answers(whole: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    description = "the whole answer; with `stream` events of data that add up to it"
    answer = {"model": whole, "content": {"text/event-stream": {}}, "description": description}
    return {200: answer, **refusals(*_REFUSALS)}


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorReply, "description": _REFUSALS[status]} for status in statuses}
