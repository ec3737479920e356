"""`tools`, `tool_choice` and `parallel_tool_calls`, as clients say them -> what a reply may call, and must."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import PlainValidator, WithJsonSchema
from transformers import PreTrainedTokenizerBase

from ..errors import UsageError
from ..runtime import Constraint
from ..runtime.tools import MOST_CALLS, Tool, ToolFormat, calls_or, forced_calls
from .fields import encodable

MOST_TOOLS = 256
_NAME = re.compile(r"[\w.:/-]{1,128}")
Mode = Literal["auto", "none", "required"]


@dataclass(frozen=True)
class ToolChoice:
    """mode: whether a reply may call, or must. names: which functions; all if empty. named: one was asked for."""

    mode: Mode
    names: tuple[str, ...] = ()
    named: bool = False


@dataclass(frozen=True)
class ToolUse:
    """How a reply is read. most: calls that it may have."""

    form: ToolFormat
    most: int


def _tools(value: Any) -> list[Tool]:
    """OpenAI's list of functions; each may be inside of `function` or, as in /v1/responses, not."""
    if value is None:
        return []
    if not isinstance(value, list) or len(value) > MOST_TOOLS:
        raise ValueError(f"must be a list of at most {MOST_TOOLS} functions")
    found: dict[str, Tool] = {}
    for one in value:
        kind = one.get("type", "function") if isinstance(one, dict) else None
        if kind != "function":
            shown = str(kind)[:60]
            raise ValueError(f'this server knows tools of the type "function" only, not {shown!r}')
        function = one.get("function", one)
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError("a function needs a name, of at most 128 letters, digits and _.:/-")
        parameters, description = function.get("parameters") or {}, function.get("description") or ""
        if not isinstance(parameters, dict) or not isinstance(description, str):
            raise ValueError(f"{name}: parameters must be a JSON schema, and the description a text")
        if name in found:
            raise ValueError(f"there are two functions called {name}")
        found[name] = Tool(name, encodable(description), parameters, function.get("strict") is True)
    return list(found.values())


def _choice(value: Any) -> ToolChoice | None:
    if value is None or value == "":
        return None
    if value in ("auto", "none"):
        return ToolChoice(value)
    if value in ("required", "any"):
        return ToolChoice("required")
    if isinstance(value, dict):
        if value.get("type") == "function":
            name = (value["function"] if isinstance(value.get("function"), dict) else value).get("name")
            if isinstance(name, str):
                return ToolChoice("required", (name,), named=True)
        if value.get("type") == "allowed_tools":
            inner = value["allowed_tools"] if isinstance(value.get("allowed_tools"), dict) else value
            names = [one.name for one in _tools(inner.get("tools"))]
            if names and inner.get("mode", "auto") in ("auto", "required"):
                return ToolChoice(inner.get("mode", "auto"), tuple(names))
    raise ValueError('must be "auto", "none", "required" or {"type": "function", "function": {"name": ...}}')


_FUNCTION = {
    "type": "object",
    "properties": {"name": {"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,64}$"}, "parameters": {"type": "object"}},
    "required": ["name"],
}
_TOOL = {
    "type": "object",
    "properties": {"type": {"const": "function"}, "function": _FUNCTION},
    "required": ["type", "function"],
}
_CHOSEN = {
    "type": "object",
    "properties": {"type": {"const": "function"}, "function": _FUNCTION},
    "required": ["type", "function"],
}


def described_tools(tool: dict[str, Any]) -> WithJsonSchema:
    """A field of a list of what `tool` describes."""
    return WithJsonSchema({"anyOf": [{"type": "array", "items": tool, "maxItems": MOST_TOOLS}, {"type": "null"}]})


Tools = Annotated[list[Tool], PlainValidator(_tools), described_tools(_TOOL)]
Choosing = Annotated[
    ToolChoice | None,
    PlainValidator(_choice),
    WithJsonSchema({"anyOf": [{"enum": ["auto", "none", "required", None]}, _CHOSEN]}),
]


def allowed(tools: Sequence[Tool], choice: ToolChoice | None) -> list[Tool]:
    """The functions that a reply may call. Raises UsageError for a name that none has, or if one must be called."""
    if choice is None or choice.mode == "none":
        return list(tools) if choice is None else []
    if choice.mode == "required" and not tools:
        raise UsageError("tool_choice asks for a call, and there are no tools")
    if missing := set(choice.names) - {tool.name for tool in tools}:
        raise UsageError(f"tool_choice: there is no function called {sorted(missing)[0]}")
    return [tool for tool in tools if not choice.names or tool.name in choice.names]


def held(
    tokenizer: PreTrainedTokenizerBase,
    form: ToolFormat,
    tools: Sequence[Tool],
    choice: ToolChoice | None,
    most: int,
    given: tuple[str, Constraint] | None,
) -> tuple[str, Constraint] | None:
    """What replies with `tools` must be, and the field that says so. given: the same without them.

    Raises UsageError for what cannot go together.
    """
    if choice is not None and choice.mode == "required":
        return "tools", forced_calls(tokenizer, form, tools, most=most)
    if given is None:
        return None
    if given[1].kind != "json":
        raise UsageError(f"{given[0]} cannot go with tools that may be called", hint='say "tool_choice": "none"')
    return given[0], calls_or(tokenizer, form, tools, given[1].source, most=most)


def most_calls(choice: ToolChoice | None, parallel: bool | None) -> int:
    return 1 if parallel is False or (choice is not None and choice.named) else MOST_CALLS
