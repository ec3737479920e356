"""Replies and the events of a stream as text."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel

from .errors import ApiError

_OMITTED = {
    "token_ids",
    "usage",
    "role",
    "content",
    "tool_calls",
    "id",
    "type",
    "name",
    "warnings",
    "message",
    "index",
    "content_block",
    "delta",
}  # where there is none; other fields are null
_VERBATIM = {"input", "tools", "tool_choice", "metadata", "format"}  # what a model or a client said, nulls included


def dump(reply: BaseModel) -> str:
    """As JSON. Half a surrogate pair, which what is echoed of a request can hold, is spelled as it came: escaped."""
    text = json.dumps(_without(reply.model_dump(mode="json")), ensure_ascii=False, separators=(",", ":"))
    return text.encode(errors="backslashreplace").decode()


def _is_told(key: str, whole: dict[str, Any]) -> bool:
    """A whole message says that it has no text; what a chunk does not add is left out."""
    return key == "content" and "refusal" in whole


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: item if key in _VERBATIM else _without(item)
            for key, item in value.items()
            if item is not None or key not in _OMITTED or _is_told(key, value)
        }
    return [_without(item) for item in value] if isinstance(value, list) else value


class Spelling:
    """How an API writes the events of a stream: OpenAI's way. last: what ends a stream."""

    last = "data: [DONE]\n\n"

    def event(self, chunk: BaseModel) -> str:
        return f"data: {dump(chunk)}\n\n"

    def error(self, error: ApiError) -> str:
        return f"data: {json.dumps(error.body())}\n\n"


class NamedEvents(Spelling):
    """Events whose name is their field `type`, as newer APIs have them; nothing but the last of them ends a stream."""

    last = ""

    def event(self, chunk: BaseModel) -> str:
        return f"event: {getattr(chunk, 'type', 'message')}\n{super().event(chunk)}"

    def error(self, error: ApiError) -> str:
        return f"event: error\ndata: {json.dumps({'type': 'error', **error.body()})}\n\n"
