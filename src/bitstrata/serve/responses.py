"""/v1/responses: OpenAI's newer API, for text and functions.

A request is translated into one for /v1/chat/completions, and goes the same way; only the words of the answer differ.
Nothing is kept from one request to the next, so those that build on an earlier response are refused.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from . import paths
from .answer import answer
from .chats import chat_spec
from .described import answers
from .fields import Body, Flag, Ignored, Number, Only, Text, Whole, unlimited
from .notices import Notices
from .parts import Part, PartFormatter
from .replies import Delta, Usage, call_id
from .requests import Bits, ChatBody
from .service import Service
from .text import TokenNames
from .tools import described_tools
from .translated import translated

SAME = {  # as of a chat
    *("model", "temperature", "top_p", "stream", "bits", "min_bits"),
    *("tools", "tool_choice", "parallel_tool_calls"),
}
_NAMED: dict[str, Any] = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "name": {"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,64}$"},
    },
    "required": ["type", "name"],
}
_TOOL = {**_NAMED, "properties": {**_NAMED["properties"], "parameters": {"type": "object"}}}
_CHOICE = WithJsonSchema({"anyOf": [{"enum": ["none", "auto", "required", None]}, _NAMED]})


class Reasoning(Body):
    effort: Any = None
    summary: Ignored = None
    generate_summary: Ignored = None


class TextFormat(Body):
    format: dict[str, Any] | None = Field(None, description="text, json_object or json_schema")
    verbosity: Annotated[Any, Only("medium")] = None


class ResponsesBody(Body):
    """/v1/responses"""

    model: Text | None = None
    input: Text | list[dict[str, Any]]
    instructions: Text | None = None
    max_output_tokens: Annotated[Annotated[Whole, Field(ge=1)] | None, BeforeValidator(unlimited)] = None
    temperature: Number | None = Field(None, ge=0)
    top_p: Number | None = Field(None, ge=0, le=1)
    stream: Flag | None = None
    bits: Bits = Field(None, description="as of /v1/chat/completions")
    min_bits: Whole | None = None
    reasoning: Reasoning | None = None
    text: TextFormat | None = None
    tools: Annotated[Any, described_tools(_TOOL)] = None
    tool_choice: Annotated[Any, _CHOICE] = None
    parallel_tool_calls: Flag | None = None

    metadata: Ignored = None
    store: Ignored = None
    user: Ignored = None
    include: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
    max_tool_calls: Ignored = None
    stream_options: Ignored = None
    truncation: Annotated[Any, Only("disabled")] = None
    top_logprobs: Annotated[Any, Only(0)] = None
    background: Annotated[Any, Only(False)] = None
    previous_response_id: Annotated[Any, Only()] = None
    conversation: Annotated[Any, Only()] = None
    prompt: Annotated[Any, Only()] = None

    def chat(self) -> ChatBody:
        """The same as a chat. Raises RequestValidationError for what a chat cannot say."""
        turns: list[dict[str, Any]] = []
        if self.instructions:
            turns.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            turns.append({"role": "user", "content": self.input})
        else:
            for item in self.input:
                _add_turn(turns, item)
        return translated(
            ChatBody,
            {
                "messages": turns,
                "max_tokens": self.max_output_tokens,
                "response_format": None if self.text is None else self.text.format,
                "reasoning_effort": None if self.reasoning is None else self.reasoning.effort,
                **self.model_dump(include=SAME),
            },
        )


def _add_turn(turns: list[dict[str, Any]], item: dict[str, Any]) -> None:
    """An item of the input as a turn of a chat, or a call in the turn before; earlier thoughts are left out."""
    match item.get("type", "message"):
        case "message":
            turns.append({"role": item.get("role"), "content": item.get("content")})
        case "reasoning":
            pass
        case "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            if not turns or turns[-1]["role"] != "assistant":
                turns.append({"role": "assistant", "content": ""})
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            turns[-1].setdefault("tool_calls", []).append(call)
        case "function_call_output":
            turns.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
        case kind:  # refused by its name, as a part of a message that is not text
            turns.append({"role": "user", "content": [{"type": kind}]})


class ResponsesReply(BaseModel):
    """The fields that clients read are described; others say that nothing special was done."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["response"] = "response"
    created_at: int
    model: str
    status: Literal["in_progress", "completed", "incomplete"]
    output: list[dict[str, Any]]
    usage: dict[str, Any] | None = None
    bits: int | None = Field(None, description="that computed all tokens; null for several or a plan")
    warnings: list[str] | None = Field(None, description="what in the request was ignored, or read as something else")


class ResponsesEvent(BaseModel):
    """response.created, response.output_text.delta and so on, each with fields of its own."""

    model_config = ConfigDict(extra="allow")

    type: str
    sequence_number: int


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.prompt_tokens_details.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.total_tokens,
        "bits": usage.bits,
    }


class ResponsesFormatter(PartFormatter):
    text_prefix, call_prefix = "msg", "fc"

    def __init__(self, asked: ResponsesBody, body: ChatBody, name: str, names: TokenNames, notices: Notices) -> None:
        super().__init__(body, name, names, notices)
        self._asked, self._created = asked, int(time.time())
        self._id, self._finish, self._sent = f"resp_{uuid.uuid4().hex}", "stop", 0
        self._call_ids: dict[str, str] = {}  # of parts

    def first_chunks(self, count: int, usage: Usage) -> list[BaseModel]:
        whole = self._whole("in_progress", None, None)
        return [
            self._event("response.created", response=whole),
            self._event("response.in_progress", response=whole),
        ]

    def last_chunks(self, usage: Usage, bits: int | None) -> list[BaseModel]:
        closed, status = self._last_closed(), self._status
        return [*closed, self._event(f"response.{status}", response=self._whole(status, usage, bits))]

    def reply(self, deltas: Sequence[Delta], usage: Usage, bits: int | None) -> BaseModel:
        self._read(deltas)
        return self._whole(self._status, usage, bits)

    def _opened(self, part: Part) -> list[BaseModel]:
        item = self._item(part, "in_progress")
        added = self._event("response.output_item.added", output_index=part.index, item=item)
        if part.call is not None:
            return [added]
        return [added, self._event("response.content_part.added", **_place(part), part=_content(part))]

    def _added(self, part: Part, text: str) -> list[BaseModel]:
        if part.call is not None:
            return [self._event("response.function_call_arguments.delta", **_item_place(part), delta=text)]
        return [self._event("response.output_text.delta", **_place(part), delta=text, logprobs=[])]

    def _closed(self, part: Part) -> list[BaseModel]:
        events: list[BaseModel]
        if part.call is not None:
            said = {"name": part.name, "arguments": part.text}
            events = [self._event("response.function_call_arguments.done", **_item_place(part), **said)]
        else:
            events = [
                self._event("response.output_text.done", **_place(part), text=part.text, logprobs=[]),
                self._event("response.content_part.done", **_place(part), part=_content(part)),
            ]
        item = self._item(part, self._ends(part))
        return [*events, self._event("response.output_item.done", output_index=part.index, item=item)]

    def _note(self, delta: Delta) -> None:
        self._finish = delta.finish or self._finish

    @property
    def _status(self) -> Literal["completed", "incomplete"]:
        return "incomplete" if self._finish == "length" else "completed"

    def _ends(self, part: Part) -> Literal["completed", "incomplete"]:
        """The status of a part when it has ended: only the last can be cut."""
        return self._status if part is self._parts[-1] else "completed"

    def _item(self, part: Part, status: str) -> dict[str, Any]:
        if part.call is not None:
            names = {"call_id": self._call_ids.setdefault(part.id, call_id()), "name": part.name}
            return {"id": part.id, "type": "function_call", "status": status, **names, "arguments": part.text}
        content = [] if status == "in_progress" else [_content(part)]
        return {"id": part.id, "type": "message", "status": status, "role": "assistant", "content": content}

    def _event(self, kind: str, **fields: Any) -> ResponsesEvent:
        self._sent += 1
        return ResponsesEvent(type=kind, sequence_number=self._sent - 1, **fields)

    def _whole(
        self, status: Literal["in_progress", "completed", "incomplete"], usage: Usage | None, bits: int | None
    ) -> ResponsesReply:
        asked = self._asked
        rest: dict[str, Any] = {
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata if isinstance(asked.metadata, dict) else {},
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": asked.temperature,
            "text": {"format": (asked.text and asked.text.format) or {"type": "text"}},
            "tool_choice": asked.tool_choice or "auto",
            "tools": asked.tools or [],
            "top_p": asked.top_p,
            "truncation": "disabled",
        }
        return ResponsesReply(
            id=self._id,
            created_at=self._created,
            model=self.model,
            status=status,
            output=[self._item(part, self._ends(part)) for part in self._parts],
            usage=None if usage is None else _usage(usage),
            bits=bits,
            warnings=self._notices.messages,
            **rest,
        )


def _item_place(part: Part) -> dict[str, Any]:
    return {"item_id": part.id, "output_index": part.index}


def _place(part: Part) -> dict[str, Any]:
    return {**_item_place(part), "content_index": 0}


def _content(part: Part) -> dict[str, Any]:
    return {"type": "output_text", "text": part.text, "annotations": [], "logprobs": []}


def add_responses(app: FastAPI, service: Service) -> None:
    @app.post(paths.RESPONSES, response_model=None, responses=answers(ResponsesReply))
    async def responses(http: Request, body: ResponsesBody) -> Response:
        """Answer a text or a conversation, whole or, with `stream`, as named events."""
        notices = service.notices(body)
        chat = body.chat()
        notices.extend(chat.notices)
        spec = await chat_spec(service, chat, notices)
        formatter = ResponsesFormatter(body, chat, service.catalog.name, service.names, notices)
        return await answer(service, http, chat, spec, formatter)
