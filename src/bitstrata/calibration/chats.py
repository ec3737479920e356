"""Chats: read from a file, and written as text by a model's own template.

A file of chats is JSON lines: an object with `messages` a line, as chat APIs take them, and `tools` where the model may
call some:

    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good morning."}]}
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import TextError, first_line
from ..models import text_prefix
from ..progress import note

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Chat:
    """messages: with `role` and `content`, and `tool_calls` of an assistant. tools: their JSON schemas."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()

    @property
    def has_tools(self) -> bool:
        return bool(self.tools) or any(
            message.get("tool_calls") or message["role"] == "tool" for message in self.messages
        )

    def until(self, turn: int) -> Chat:
        """The chat before message `turn`."""
        return replace(self, messages=self.messages[:turn])


def chats_of(lines: Sequence[tuple[int, Any]], where: str) -> list[Chat]:
    """The chats of what `where` says ("FILE line"), each with its number there. Raises TextError that names it."""
    return [_chat(value, f"{where} {number}") for number, value in lines]


def json_lines(path: Path, content: str) -> list[tuple[int, dict[str, Any]]]:
    """The objects of a file of JSON lines, with the numbers of their lines. Raises TextError that names the line."""
    found = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TextError(f"{path} line {number} is not JSON: {first_line(error)}", hint=_ONE_A_LINE) from error
        if not isinstance(value, dict):
            raise TextError(f"{path} line {number} is a {type(value).__name__}, not an object", hint=_ONE_A_LINE)
        found.append((number, value))
    return found


_ONE_A_LINE = 'one object a line: {"messages": [{"role": "user", "content": "..."}, ...]} or {"text": "..."}'


def _chat(value: Mapping[str, Any], where: str) -> Chat:
    messages, tools = value.get("messages"), value.get("tools") or ()
    if not isinstance(messages, list) or not messages:
        raise TextError(f"{where} has no list of messages", hint=_ONE_A_LINE)
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, dict) for tool in tools):
        raise TextError(
            f"{where}: tools must be a list of JSON schemas", hint='{"type": "function", "function": {...}}'
        )
    return Chat(tuple(_message(message, where) for message in messages), tuple(tools))


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise TextError(f"{where} has a message without a role", hint=_ONE_A_LINE)
    content, calls = message.get("content"), message.get("tool_calls")
    if content is not None and not isinstance(content, str):
        raise TextError(f"{where}: the content of a message is a {type(content).__name__}, not text", hint=_ONE_A_LINE)
    if content is None and not calls:
        raise TextError(f"{where} has a message without content", hint=_ONE_A_LINE)
    taken = {**message, "content": content or ""}
    if calls is not None:
        if not isinstance(calls, list):
            raise TextError(f"{where}: tool_calls must be a list", hint=_ONE_A_LINE)
        taken["tool_calls"] = [_call(call, where) for call in calls]
    return taken


def _call(call: Any, where: str) -> dict[str, Any]:
    """A tool call with its arguments as an object, which templates write; APIs have them as a text."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise TextError(f"{where} has a tool call without a function's name", hint=_ONE_A_LINE)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError as error:
            raise TextError(f"{where}: the arguments of {function['name']} are not JSON") from error
    return {**call, "type": "function", "function": {**function, "arguments": arguments}}


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise TextError for a tokenizer without a chat template."""
    if not tokenizer.chat_template:
        raise TextError(
            "chats need a chat template, and the model's tokenizer has none",
            hint="give a text instead; or put the template into chat_template.jinja beside the model",
        )


def write_chat(tokenizer: PreTrainedTokenizerBase, chat: Chat, *, answering: bool = False) -> str:
    """The chat as the template writes it, up to where the model answers if it is `answering`.

    Raises TextError in the template's own words where it refuses the messages.
    """
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in chat.messages],
            tools=[dict(tool) for tool in chat.tools] or None,
            add_generation_prompt=answering,
            tokenize=False,
        )
    except Exception as error:  # a template is a program that comes with the model: it may raise anything
        raise TextError(f"the chat template refuses the messages: {first_line(error)}") from error
    return str(text)


def takes_tools(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> bool:
    """Whether the template writes down the tools of `chat`, rather than leaving them out."""
    try:
        return write_chat(tokenizer, chat) != write_chat(tokenizer, replace(chat, tools=()))
    except TextError:
        return False


def usable_chats(tokenizer: PreTrainedTokenizerBase, chats: Sequence[Chat]) -> list[Chat]:
    """The chats that the template can write; notes say how many are left out, and why.

    Raises TextError if there is no template, or if none is left.
    """
    check_template(tokenizer)
    if any(chat.tools and takes_tools(tokenizer, chat) for chat in chats):
        left = list(chats)
    else:
        left = [chat for chat in chats if not chat.has_tools]
        if len(left) < len(chats):
            note(f"the chat template knows no tools: {len(chats) - len(left)} of {len(chats)} chats are left out")
    usable, refused = [], []
    for chat in left:
        try:
            write_chat(tokenizer, chat)
            usable.append(chat)
        except TextError as error:
            refused.append(error)
    if not usable:
        raise refused[0] if refused else TextError("no chat is left without tools", hint="give chats without tools")
    if refused:
        note(f"{len(refused)} of {len(chats)} chats are left out: {refused[0].message}")
    return usable


def written_chats(tokenizer: PreTrainedTokenizerBase, chats: Sequence[Chat]) -> Iterator[str]:
    """Each usable chat as a document: without what the tokenizer itself puts in front of a text."""
    front = "".join(map(str, tokenizer.convert_ids_to_tokens(text_prefix(tokenizer))))
    for chat in usable_chats(tokenizer, chats):
        yield write_chat(tokenizer, chat).removeprefix(front)
