"""/v1/responses: OpenAI's newer API, for text.

A request is translated into one for /v1/chat/completions, and goes the same way; only the words of the answer differ.
Nothing is kept from one request to the next, so those that build on an earlier response are refused.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from . import paths
from .answer import answer
from .chats import chat_spec
from .described import answers
from .fields import Body, Flag, Ignored, Number, Only, Text, Whole, refused, unlimited
from .notices import Notices
from .replies import Delta, Formatter, Usage
from .requests import Bits, ChatBody
from .service import Service
from .spelling import NamedEvents
from .text import TokenNames
from .translated import translated

SAME = {"model", "temperature", "top_p", "stream", "bits", "min_bits"}  # as of a chat


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
    tools: Any = None
    tool_choice: Annotated[Any, Only("none", "auto")] = None

    metadata: Ignored = None
    store: Ignored = None
    user: Ignored = None
    include: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
    parallel_tool_calls: Ignored = None
    max_tool_calls: Ignored = None
    stream_options: Ignored = None
    truncation: Annotated[Any, Only("disabled")] = None
    top_logprobs: Annotated[Any, Only(0)] = None
    background: Annotated[Any, Only(False)] = None
    previous_response_id: Annotated[Any, Only()] = None
    conversation: Annotated[Any, Only()] = None
    prompt: Annotated[Any, Only()] = None

    @model_validator(mode="after")
    def _without_tools(self) -> ResponsesBody:
        if self.tools and self.tool_choice != "none":
            raise refused("tools", "tools are taken at /v1/chat/completions only, or with tool_choice none")
        return self

    def chat(self) -> ChatBody:
        """The same as a chat. Raises RequestValidationError for what a chat cannot say."""
        turns: list[dict[str, Any]] = []
        if self.instructions:
            turns.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            turns.append({"role": "user", "content": self.input})
        else:
            for item in self.input:
                turns += _turns(item)
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


def _turns(item: dict[str, Any]) -> list[dict[str, Any]]:
    """An item of the input as turns of a chat; what a model thought earlier is left out."""
    match item.get("type", "message"):
        case "message":
            return [{"role": item.get("role"), "content": item.get("content")}]
        case "reasoning":
            return []
        case "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            return [{"role": "assistant", "content": "", "tool_calls": [call]}]
        case "function_call_output":
            return [{"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")}]
        case kind:  # refused by its name, as a part of a message that is not text
            return [{"role": "user", "content": [{"type": kind}]}]


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


class ResponsesFormatter(Formatter):
    spelling: ClassVar[NamedEvents] = NamedEvents()

    def __init__(self, asked: ResponsesBody, body: ChatBody, name: str, names: TokenNames, notices: Notices) -> None:
        super().__init__(body, name, names, notices)
        self._asked, self._created = asked, int(time.time())
        self._id, self._item = (f"{kind}_{uuid.uuid4().hex}" for kind in ("resp", "msg"))
        self._text, self._finish, self._events = "", "stop", 0

    def first_chunks(self, count: int, usage: Usage) -> list[BaseModel]:
        whole = self._whole("in_progress", None, None)
        return [
            self._event("response.created", response=whole),
            self._event("response.in_progress", response=whole),
            self._event("response.output_item.added", output_index=0, item=self._message("in_progress")),
            self._event("response.content_part.added", **self._place, part=self._part),
        ]

    def next_chunks(self, delta: Delta, bits: int | None, usage: Usage) -> list[BaseModel]:
        self._note(delta)
        if not delta.text:
            return []
        return [self._event("response.output_text.delta", **self._place, delta=delta.text, logprobs=[])]

    def last_chunks(self, usage: Usage, bits: int | None) -> list[BaseModel]:
        status = self._status
        return [
            self._event("response.output_text.done", **self._place, text=self._text, logprobs=[]),
            self._event("response.content_part.done", **self._place, part=self._part),
            self._event("response.output_item.done", output_index=0, item=self._message(status)),
            self._event(f"response.{status}", response=self._whole(status, usage, bits)),
        ]

    def reply(self, deltas: Sequence[Delta], usage: Usage, bits: int | None) -> BaseModel:
        for delta in deltas:
            self._note(delta)
        return self._whole(self._status, usage, bits)

    def _note(self, delta: Delta) -> None:
        self._text += delta.text
        self._finish = delta.finish or self._finish

    @property
    def _status(self) -> Literal["completed", "incomplete"]:
        return "incomplete" if self._finish == "length" else "completed"

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item, "output_index": 0, "content_index": 0}

    @property
    def _part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": self._text, "annotations": [], "logprobs": []}

    def _message(self, status: str) -> dict[str, Any]:
        parts = [] if status == "in_progress" else [self._part]
        return {"id": self._item, "type": "message", "status": status, "role": "assistant", "content": parts}

    def _event(self, kind: str, **fields: Any) -> ResponsesEvent:
        self._events += 1
        return ResponsesEvent(type=kind, sequence_number=self._events - 1, **fields)

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
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": asked.temperature,
            "text": {"format": (asked.text and asked.text.format) or {"type": "text"}},
            "tool_choice": asked.tool_choice or "auto",
            "tools": [],
            "top_p": asked.top_p,
            "truncation": "disabled",
        }
        return ResponsesReply(
            id=self._id,
            created_at=self._created,
            model=self.model,
            status=status,
            output=[] if status == "in_progress" else [self._message(status)],
            usage=None if usage is None else _usage(usage),
            bits=bits,
            warnings=self._notices.messages,
            **rest,
        )


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
