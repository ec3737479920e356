"""Conversations, as clients send them: turns, and the functions that the model may call.

What is in a turn is taken or refused as in requests.py.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, FailFast, Field, PlainValidator, WithJsonSchema, model_validator

from ..errors import UsageError
from ..runtime.tools import Tool
from .fields import Body, Flag, Ignored, Only, encodable, refused
from .tools import Choosing, Tools, allowed

MOST_MESSAGES = 4096


def content_text(value: Any) -> str:
    """The text of a message: given as such, or in parts that are texts."""
    if value is None:
        return ""
    if isinstance(value, str):
        return encodable(value)
    if not isinstance(value, list):
        raise ValueError("must be a text or a list of parts")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else None
        if kind not in ("text", "input_text", "output_text", "refusal") or not isinstance(text, str):
            raise ValueError(f'parts must be {{"type": "text", "text": ...}}; this model reads text only, not {kind!r}')
        texts.append(encodable(text))
    return "".join(texts)


def _few_messages(value: Any) -> Any:
    """Before any of them is looked at."""
    if isinstance(value, list) and len(value) > MOST_MESSAGES:
        raise ValueError(f"{len(value)} messages are too many for one request; it may have {MOST_MESSAGES}")
    return value


def _calls(value: Any) -> list[dict[str, Any]]:
    """Tool calls as chat templates take them: the arguments as an object where their text spells one."""
    if value is None:
        return []
    if not isinstance(value, list) or len(value) > MOST_MESSAGES:
        raise ValueError("must be a list of calls")
    found = []
    for call in value:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(
                'calls must be {"id": ..., "type": "function", "function": {"name": ..., "arguments": ...}}'
            )
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                read = json.loads(arguments)
            except (ValueError, RecursionError):
                read = None
            arguments = read if isinstance(read, dict) else arguments
        found.append({**call, "type": "function", "function": {**function, "arguments": arguments or {}}})
    return found


_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_CALLS = {"anyOf": [{"type": "array", "items": {"type": "object"}}, {"type": "null"}]}
_Part = Annotated[dict[str, str], WithJsonSchema(_PART)]
Content = Annotated[str, PlainValidator(content_text, json_schema_input_type=str | list[_Part] | None)]
Calls = Annotated[list[dict[str, Any]], PlainValidator(_calls), WithJsonSchema(_CALLS)]


class Message(Body):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content = ""
    reasoning_content: Annotated[Any, Field(description="for chat templates that show a model what it thought")] = None
    reasoning: Annotated[Any, Field(description="another name of reasoning_content")] = None
    tool_calls: Calls = Field(default_factory=list, description="for chat templates that know them")
    tool_call_id: Any = None
    prefix: Flag | None = Field(None, description="of the last message: the reply goes on where it ends")
    name: Any = None

    id: Ignored = None
    type: Ignored = None
    index: Ignored = None
    timestamp: Ignored = None
    created: Ignored = None
    created_at: Ignored = None
    refusal: Ignored = None
    annotations: Ignored = None
    provider_specific_fields: Ignored = None
    reasoning_details: Ignored = None
    thinking_blocks: Ignored = None
    cache_control: Ignored = None
    images: Annotated[Any, Only([])] = None
    audio: Annotated[Any, Only()] = None
    function_call: Annotated[Any, Only({})] = None

    @property
    def turn(self) -> dict[str, Any]:
        """As chat templates take it."""
        # OpenAI's newer name of a system message, and its older one of a tool's; templates know the others
        turn: dict[str, Any] = {"role": {"developer": "system", "function": "tool"}.get(self.role, self.role)}
        turn["content"] = self.content
        thought = self.reasoning_content or self.reasoning
        if isinstance(thought, str) and self.role == "assistant":
            turn["reasoning_content"] = encodable(thought)
        if self.tool_calls and self.role == "assistant":
            turn["tool_calls"] = self.tool_calls
        if turn["role"] == "tool":
            turn |= {key: value for key in ("name", "tool_call_id") if isinstance(value := getattr(self, key), str)}
        return turn


class ConversationBody(Body):
    """Turns, and what the chat template is told beside them."""

    messages: Annotated[
        list[Message], FailFast(), Field(min_length=1, max_length=MOST_MESSAGES), BeforeValidator(_few_messages)
    ]
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="variables of the chat template")
    reasoning_effort: Annotated[Any, Field(description="for chat templates that know it")] = None
    continue_final_message: Flag | None = Field(None, description="the reply goes on where the last message ends")
    add_generation_prompt: Flag | None = Field(None, description="false: do not begin the model's turn")
    tools: Tools = Field(default_factory=list, description="functions that the model may call")
    tool_choice: Choosing = Field(None, description="whether it may, must, or which one")

    @model_validator(mode="after")
    def _known_functions(self) -> ConversationBody:
        try:
            allowed(self.tools, self.tool_choice)
        except UsageError as error:
            raise refused("tool_choice", error.sentence) from None
        return self

    @model_validator(mode="after")
    def _one_way_to_go_on(self) -> ConversationBody:
        if self.continues and self.add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other")
        if self.continues and self.messages[-1].role != "assistant":
            raise ValueError("continue_final_message needs a last message of the assistant's")
        return self

    @property
    def continues(self) -> bool:
        """Whether the reply goes on where the last message ends."""
        return bool(self.continue_final_message or self.messages[-1].prefix)

    @property
    def offered(self) -> list[Tool]:
        """The functions that the reply may call."""
        return allowed(self.tools, self.tool_choice)
