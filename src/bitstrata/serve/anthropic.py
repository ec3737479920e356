"""/v1/messages and /v1/messages/count_tokens: Anthropic's API, for text and tools.

A request is translated into one for /v1/chat/completions, and goes the same way; only the words of the answer differ.
What is not text (images, documents, Anthropic's own tools) is refused by name; thinking in the history goes to chat
templates that know it.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, BeforeValidator, Field, PlainValidator, WithJsonSchema
from pydantic_core import from_json

from . import paths
from .answer import answer
from .chats import chat_spec, conversation_tokens
from .described import answers, refusals
from .fields import Body, Flag, Ignored, Number, Only, Text, Whole, unlimited
from .parts import Part, PartFormatter
from .replies import Delta, Usage
from .requests import MOST_STOPS, Bits, ChatBody
from .service import Service
from .tools import described_tools
from .translated import translated
from .turns import content_text

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
SAME = {"model", "max_tokens", "temperature", "top_p", "top_k", "stream", "bits", "min_bits"}  # as of a chat
STATUSES = (400, 401, 403, 404, 408, 413, 415, 429, 503)
_MESSAGE = {
    "type": "object",
    "properties": {
        "role": {"enum": ["user", "assistant"]},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]},
    },
    "required": ["role", "content"],
}
_MODES = {"auto": "auto", "any": "required", "none": "none"}
_TOOL = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,64}$"},
        "description": {"type": "string"},
        "input_schema": {"type": "object"},
    },
    "required": ["name", "input_schema"],
}


def _tools(value: Any) -> list[dict[str, Any]]:
    """Anthropic's tools as OpenAI's, which are looked at as such; those that its servers would run are none of ours."""
    if not isinstance(value, list | None) or not all(isinstance(one, dict) for one in value or ()):
        raise ValueError("must be a list of objects")
    functions = []
    for one in value or ():
        kind = one.get("type") or "custom"
        named = {key: one.get(key) for key in ("name", "description", "strict")}
        function = {**named, "parameters": one.get("input_schema")}
        functions.append({"type": "function" if kind == "custom" else kind, "function": function})
    return functions


def _choice(value: Any) -> dict[str, Any]:
    """OpenAI's `tool_choice` and `parallel_tool_calls` of Anthropic's tool_choice."""
    if value is None:
        return {}
    kind = value.get("type") if isinstance(value, dict) else None
    alone: dict[str, Any] = {"parallel_tool_calls": False} if kind and value.get("disable_parallel_tool_use") else {}
    if kind == "tool":
        return {"tool_choice": {"type": "function", "function": {"name": value.get("name")}}, **alone}
    if not isinstance(kind, str) or kind not in _MODES:
        raise ValueError('must be {"type": "auto"}, "any" or "none", or {"type": "tool", "name": ...}')
    return {"tool_choice": _MODES[kind], **alone}


_CHOICE = {
    "anyOf": [
        {"type": "object", "properties": {"type": {"enum": list(_MODES)}}, "required": ["type"]},
        {
            "type": "object",
            "properties": {"type": {"const": "tool"}, "name": {"type": "string"}},
            "required": ["type", "name"],
        },
        {"type": "null"},
    ]
}


class MessagesBody(Body):
    """/v1/messages"""

    model: Text | None = None
    messages: list[Annotated[dict[str, Any], WithJsonSchema(_MESSAGE)]] = Field(min_length=1)
    system: Annotated[str, PlainValidator(content_text, json_schema_input_type=str | list[dict[str, Any]] | None)] = ""
    max_tokens: Annotated[Annotated[Whole, Field(ge=1)] | None, BeforeValidator(unlimited)] = None
    temperature: Number | None = Field(None, ge=0)
    top_p: Number | None = Field(None, ge=0, le=1)
    top_k: Annotated[Whole, Field(ge=-1)] | None = None
    stop_sequences: list[Text] | None = Field(None, max_length=MOST_STOPS)
    stream: Flag | None = None
    bits: Bits = Field(None, description="as of /v1/chat/completions")
    min_bits: Whole | None = None

    metadata: Ignored = None
    service_tier: Ignored = None
    container: Ignored = None
    cache_control: Ignored = None
    betas: Ignored = None
    thinking: Annotated[Any, Only({"type": "disabled"})] = None
    tools: Annotated[list[dict[str, Any]], PlainValidator(_tools), described_tools(_TOOL)] = Field(default_factory=list)
    tool_choice: Annotated[dict[str, Any], PlainValidator(_choice), WithJsonSchema(_CHOICE)] = Field(
        default_factory=dict, description="auto, any, tool or none; with disable_parallel_tool_use one call a reply"
    )
    mcp_servers: Annotated[Any, Only([])] = None
    output_config: dict[str, Any] | None = Field(None, description="`format`: a JSON schema that the reply must fit")
    output_format: dict[str, Any] | None = Field(None, description="an older name of output_config.format")

    def chat(self) -> ChatBody:
        """The same as a chat. Raises RequestValidationError for what a chat cannot say."""
        turns: list[dict[str, Any]] = [{"role": "system", "content": self.system}] if self.system else []
        for message in self.messages:
            turns += _turns(message)
        return translated(
            ChatBody,
            {
                "messages": turns,
                "continue_final_message": turns[-1]["role"] == "assistant" and "tool_calls" not in turns[-1],
                "stop": self.stop_sequences,
                "response_format": (self.output_config or {}).get("format") or self.output_format,
                "tools": self.tools,
                **self.tool_choice,
                **self.model_dump(include=SAME),
            },
        )


def _turns(message: dict[str, Any]) -> list[dict[str, Any]]:
    """A message's turns: the results of tools are turns of their own."""
    role, content = message.get("role"), message.get("content")
    if not isinstance(content, list):
        return [{"role": role, "content": content}]
    texts: list[Any] = []
    turn: dict[str, Any] = {"role": role, "content": texts}
    results = []
    for block in content:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "thinking":
            turn["reasoning_content"] = block.get("thinking")
        elif kind == "redacted_thinking":
            continue
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": block.get("input")}
            turn.setdefault("tool_calls", []).append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "tool_result":
            results.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": block.get("content")})
        else:
            texts.append(block)  # a text, or refused as such by its name
    return results + ([turn] if texts or len(turn) > 2 or not results else [])


class TextBlock(BaseModel):
    type: Literal["text"] = "text"
    text: str


class ToolUseBlock(BaseModel):
    """A call. Of one that was cut, `input` has what had come; arguments that are no JSON are its INVALID_JSON."""

    type: Literal["tool_use"] = "tool_use"
    id: str
    name: str
    input: dict[str, Any]

    @classmethod
    def of(cls, part: Part) -> ToolUseBlock:
        try:
            read = from_json(part.text, allow_inf_nan=False, allow_partial=True) if part.text else {}
        except ValueError:
            read = None
        return cls(id=part.id, name=part.name, input=read if isinstance(read, dict) else {"INVALID_JSON": part.text})


class MessagesUsage(BaseModel):
    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int = 0

    @classmethod
    def of(cls, usage: Usage) -> MessagesUsage:
        """Anthropic's input_tokens leave out what was in the cache."""
        cached = min(usage.prompt_tokens_details.cached_tokens, usage.prompt_tokens)
        return cls(
            input_tokens=usage.prompt_tokens - cached,
            output_tokens=usage.completion_tokens,
            cache_read_input_tokens=cached,
        )


class MessagesReply(BaseModel):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[TextBlock | ToolUseBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None = None
    usage: MessagesUsage
    bits: int | None = Field(None, description="that computed all tokens; null for several or a plan")
    warnings: list[str] | None = Field(None, description="what in the request was ignored, or read as something else")


class MessagesEvent(BaseModel):
    """message_start, content_block_start, ..._delta, ..._stop, message_delta or message_stop."""

    type: str
    message: MessagesReply | None = None
    index: int | None = None
    content_block: TextBlock | ToolUseBlock | None = None
    delta: dict[str, Any] | None = None
    usage: MessagesUsage | None = None


class TokenCount(BaseModel):
    input_tokens: int


class MessagesFormatter(PartFormatter):
    text_prefix, call_prefix = "text", "toolu"
    _reason: StopReason | None = None
    _stop: str | None = None  # the text that ended the reply

    def _message(self, usage: Usage, bits: int | None) -> MessagesReply:
        return MessagesReply(
            id=f"msg_{uuid.uuid4().hex}",
            model=self.model,
            content=list(map(_block, self._parts)),
            stop_reason=self._reason,
            stop_sequence=self._stop,
            usage=MessagesUsage.of(usage),
            bits=bits,
            warnings=self._notices.messages,
        )

    def first_chunks(self, count: int, usage: Usage) -> list[BaseModel]:
        return [MessagesEvent(type="message_start", message=self._message(usage, None))]

    def last_chunks(self, usage: Usage, bits: int | None) -> list[BaseModel]:
        ended = {"stop_reason": self._reason, "stop_sequence": self._stop}
        return [
            *self._last_closed(),
            MessagesEvent(type="message_delta", delta=ended, usage=MessagesUsage.of(usage)),
            MessagesEvent(type="message_stop"),
        ]

    def reply(self, deltas: Sequence[Delta], usage: Usage, bits: int | None) -> BaseModel:
        self._read(deltas)
        return self._message(usage, bits)

    def _opened(self, part: Part) -> list[BaseModel]:
        return [MessagesEvent(type="content_block_start", index=part.index, content_block=_block(part))]

    def _added(self, part: Part, text: str) -> list[BaseModel]:
        is_text = part.call is None
        said = {"type": "text_delta", "text": text} if is_text else {"type": "input_json_delta", "partial_json": text}
        return [MessagesEvent(type="content_block_delta", index=part.index, delta=said)]

    def _closed(self, part: Part) -> list[BaseModel]:
        return [MessagesEvent(type="content_block_stop", index=part.index)]

    def _note(self, delta: Delta) -> None:
        if delta.finish == "tool_calls":
            self._reason = "tool_use"
        elif delta.finish == "length":
            self._reason = "max_tokens"
        elif delta.finish is not None:
            self._stop = delta.stop
            self._reason = "end_turn" if delta.stop is None else "stop_sequence"


def _block(part: Part) -> TextBlock | ToolUseBlock:
    return TextBlock(text=part.text) if part.call is None else ToolUseBlock.of(part)


def add_messages(app: FastAPI, service: Service) -> None:
    @app.post(paths.MESSAGES, response_model=None, responses=answers(MessagesReply))
    async def messages(http: Request, body: MessagesBody) -> Response:
        """Answer a conversation as Anthropic does, whole or, with `stream`, as named events."""
        notices = service.notices(body)
        chat = body.chat()
        notices.extend(chat.notices)
        spec = await chat_spec(service, chat, notices)
        formatter = MessagesFormatter(chat, service.catalog.name, service.names, notices)
        return await answer(service, http, chat, spec, formatter)

    @app.post(paths.COUNT, responses=refusals(*STATUSES))
    async def count_tokens(body: MessagesBody) -> TokenCount:
        """How many tokens the prompt of such a request has."""
        notices = service.notices(body)
        chat = body.chat()
        service.catalog.precision(chat.model, chat.bits)
        return TokenCount(input_tokens=len(await conversation_tokens(service, chat, notices)))
