"""What the server sends: `Delta`s in the words of each API, and beyond OpenAI's `bits`, `usage.bits`, `token_ids`."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field

from ..runtime import Token
from ..runtime.tools import CallDelta
from .notices import Notices
from .requests import ChatBody, CompletionBody, GenerationBody
from .spelling import Spelling
from .text import TokenNames

FinishReason = Literal["stop", "length", "tool_calls"]
LEAST = -9999.0  # stands for a probability of zero: JSON has no infinity


@dataclass(frozen=True)
class PlacedToken:
    """A token, and the character of its choice's text at which it begins."""

    token: Token
    offset: int


@dataclass(frozen=True)
class Delta:
    """What one event, or all of them, add to the choice `index`. stop: the stop text that ended it."""

    index: int
    text: str = ""
    tokens: tuple[PlacedToken, ...] = ()
    finish: FinishReason | None = None
    stop: str | None = None
    calls: tuple[CallDelta, ...] = ()

    @classmethod
    def joined(cls, deltas: Sequence[Delta]) -> Delta:
        tokens = tuple(placed for delta in deltas for placed in delta.tokens)
        text, calls = "".join(delta.text for delta in deltas), tuple(call for delta in deltas for call in delta.calls)
        return cls(deltas[-1].index, text, tokens, deltas[-1].finish, deltas[-1].stop, calls)

    @property
    def whole_calls(self) -> list[tuple[str, str]]:
        """The names and arguments of its calls, if they are all there."""
        found: dict[int, tuple[str, str]] = {}
        for call in self.calls:
            name, arguments = found.get(call.index, ("", ""))
            found[call.index] = (name + (call.name or ""), arguments + call.arguments)
        return list(found.values())


def call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    error: ErrorBody


class Health(BaseModel):
    status: Literal["ok", "closing", "failed"]


class ModelCard(BaseModel):
    """One precision of the model, or the model itself at its default."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "bitstrata"
    bits: int | None = Field(description="null for a plan, which gives every layer its own")
    bytes_per_token: int = Field(description="bytes of weights read for one token of one request")
    max_model_len: int | None = Field(description="the longest prompt and reply together, in tokens")
    chat_template: bool = Field(description="whether the tokenizer has one: without, chats are continued as plain text")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class PromptDetails(BaseModel):
    cached_tokens: int = Field(description="tokens of the prompts that earlier requests had left in the cache")


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    bits: dict[str, int] = Field(description="bits, or a plan's name -> how many of the new tokens they computed")


class TokenLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class PlacedLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    content: list[PlacedLogprob]
    refusal: None = None


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None] = Field(description="null for the first token of an echoed prompt")
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int] = Field(description="where each token begins in the choice's text")


class _Reply(BaseModel):
    id: str
    created: int
    model: str
    bits: int | None = Field(
        description="that computed all tokens, or a chunk's latest; null for none yet, several (usage.bits) or a plan"
    )
    warnings: list[str] | None = Field(None, description="what in the request was ignored, or read as something else")


class CalledFunction(BaseModel):
    name: str | None = None
    arguments: str


class ToolCall(BaseModel):
    """A call, or what a chunk adds to it."""

    index: int | None = None
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


class ChatMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None = Field(description="null where there are calls and nothing else")
    refusal: None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    token_ids: list[int] | None = None


class ChatReply(_Reply):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChunkChoice(BaseModel):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    token_ids: list[int] | None = None


class ChatChunk(_Reply):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class CompletionChoice(BaseModel):
    """A whole choice, or what a chunk adds to it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    token_ids: list[int] | None = None


class CompletionReply(_Reply):
    """A whole reply, or a chunk of one."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    usage: Usage | None = None


class Formatter(ABC):
    """How an API spells an answer. `bits` as in _Reply.

    name: the model's, where the body gives none. notices: what the reply has to say of the request.
    """

    spelling: ClassVar[Spelling] = Spelling()  # of events

    def __init__(self, body: GenerationBody, name: str, names: TokenNames, notices: Notices) -> None:
        self.model, self._names, self._notices = body.model or name, names, notices
        self._shows_ids = bool(body.return_token_ids)

    @abstractmethod
    def first_chunks(self, count: int, usage: Usage) -> list[BaseModel]:
        """What a stream of `count` choices begins with; of `usage` the prompts are known."""

    @abstractmethod
    def next_chunks(self, delta: Delta, bits: int | None, usage: Usage) -> list[BaseModel]:
        """What a stream goes on with; `usage` so far."""

    @abstractmethod
    def last_chunks(self, usage: Usage, bits: int | None) -> list[BaseModel]:
        """What a stream ends with."""

    @abstractmethod
    def reply(self, deltas: Sequence[Delta], usage: Usage, bits: int | None) -> BaseModel:
        """A whole answer, one delta a choice."""

    def _named(self, token: int, logprob: float | None) -> TokenLogprob:
        text, raw = self._names.of(token)
        return TokenLogprob(token=text, logprob=LEAST if logprob is None else max(logprob, LEAST), bytes=list(raw))


class OpenAIFormatter(Formatter):
    """What chats and completions have in common."""

    prefix: ClassVar[str]  # of an answer's id
    whole: ClassVar[type[BaseModel]]  # a reply
    chunk: ClassVar[type[BaseModel]]  # of a stream

    def __init__(self, body: GenerationBody, name: str, names: TokenNames, notices: Notices) -> None:
        super().__init__(body, name, names, notices)
        self._includes_usage, self._repeats_usage = body.includes_usage, body.repeats_usage
        self._said = False  # the notices, in this stream
        self._head: dict[str, Any] = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": self.model,
        }

    def first_chunks(self, count: int, usage: Usage) -> list[BaseModel]:
        return []

    def next_chunks(self, delta: Delta, bits: int | None, usage: Usage) -> list[BaseModel]:
        return [self._chunk(bits, [self._chunk_choice(delta)], usage if self._repeats_usage else None)]

    def last_chunks(self, usage: Usage, bits: int | None) -> list[BaseModel]:
        return [self._chunk(bits, [], usage)] if self._includes_usage else []

    def reply(self, deltas: Sequence[Delta], usage: Usage, bits: int | None) -> BaseModel:
        choices = [self._choice(delta) for delta in deltas]
        return self.whole(**self._head, bits=bits, choices=choices, usage=usage, warnings=self._notices.messages)

    @abstractmethod
    def _choice(self, delta: Delta) -> BaseModel: ...

    @abstractmethod
    def _chunk_choice(self, delta: Delta) -> BaseModel: ...

    def _chunk(self, bits: int | None, choices: list[BaseModel], usage: Usage | None) -> BaseModel:
        """A part of a stream; the first one has the notices."""
        warnings, self._said = None if self._said else self._notices.messages, True
        return self.chunk(**self._head, bits=bits, choices=choices, usage=usage, warnings=warnings)

    def _shared(self, delta: Delta) -> dict[str, Any]:
        """The fields that every kind of choice has."""
        ids = [placed.token.id for placed in delta.tokens] if self._shows_ids else None
        return {"index": delta.index, "finish_reason": delta.finish, "token_ids": ids}


class ChatFormatter(OpenAIFormatter):
    prefix, whole, chunk = "chatcmpl", ChatReply, ChatChunk

    def __init__(self, body: ChatBody, name: str, names: TokenNames, notices: Notices) -> None:
        super().__init__(body, name, names, notices)
        self._shows_logprobs = bool(body.logprobs)

    def first_chunks(self, count: int, usage: Usage) -> list[BaseModel]:
        chunks = []
        for index in range(count):
            delta = ChatDelta(role="assistant", content="")
            choice = ChatChunkChoice(**self._shared(Delta(index)), delta=delta, logprobs=None)
            chunks.append(self._chunk(None, [choice], usage if self._repeats_usage else None))
        return chunks

    def _choice(self, delta: Delta) -> ChatChoice:
        calls = [
            ToolCall(id=call_id(), type="function", function=CalledFunction(name=name, arguments=arguments))
            for name, arguments in delta.whole_calls
        ]
        message = ChatMessage(content=delta.text or (None if calls else ""), tool_calls=calls or None)
        return ChatChoice(**self._shared(delta), message=message, logprobs=self._logprobs(delta))

    def _chunk_choice(self, delta: Delta) -> ChatChunkChoice:
        logprobs = self._logprobs(delta) if delta.tokens else None
        calls = [
            ToolCall(
                index=call.index,
                id=None if call.name is None else call_id(),
                type=None if call.name is None else "function",
                function=CalledFunction(name=call.name, arguments=call.arguments),
            )
            for call in delta.calls
        ]
        said = ChatDelta(content=delta.text or None, tool_calls=calls or None)
        return ChatChunkChoice(**self._shared(delta), delta=said, logprobs=logprobs)

    def _logprobs(self, delta: Delta) -> ChatLogprobs | None:
        if not self._shows_logprobs:
            return None
        content = []
        for token in (placed.token for placed in delta.tokens):
            chosen = self._named(token.id, token.logprob)
            top = [self._named(*pair) for pair in token.top]
            content.append(PlacedLogprob(**chosen.model_dump(), top_logprobs=top))
        return ChatLogprobs(content=content)


class CompletionFormatter(OpenAIFormatter):
    prefix, whole, chunk = "cmpl", CompletionReply, CompletionReply

    def __init__(self, body: CompletionBody, name: str, names: TokenNames, notices: Notices) -> None:
        super().__init__(body, name, names, notices)
        self._asked = body.logprobs

    def _choice(self, delta: Delta) -> CompletionChoice:
        return CompletionChoice(**self._shared(delta), text=delta.text, logprobs=self._logprobs(delta))

    _chunk_choice = _choice

    def _logprobs(self, delta: Delta) -> CompletionLogprobs | None:
        if self._asked is None:
            return None
        tokens = [placed.token for placed in delta.tokens]
        chosen = [self._named(token.id, token.logprob) for token in tokens]
        return CompletionLogprobs(
            tokens=[item.token for item in chosen],
            token_logprobs=[
                None if token.logprob is None else item.logprob for token, item in zip(tokens, chosen, strict=True)
            ],
            top_logprobs=[self._top(token) for token in tokens] if self._asked else None,
            text_offset=[placed.offset for placed in delta.tokens],
        )

    def _top(self, token: Token) -> dict[str, float] | None:
        """The likeliest tokens by name; of those with one name the likeliest. None where nothing came before."""
        if token.logprob is None:
            return None
        named = [self._named(*pair) for pair in reversed(token.top)]
        return {item.token: item.logprob for item in reversed(list({item.token: item for item in named}.values()))}
