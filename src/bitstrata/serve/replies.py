"""What the server sends: `Delta`s in the words of each API, and beyond OpenAI's `bits`, `usage.bits`, `token_ids`."""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field

from ..runtime import Token
from .requests import ChatBody, CompletionBody, GenerationBody
from .text import TokenNames

FinishReason = Literal["stop", "length"]
LEAST = -9999.0  # stands for a probability of zero: JSON has no infinity


@dataclass(frozen=True)
class PlacedToken:
    """A token, and the character of its choice's text at which it begins."""

    token: Token
    offset: int


@dataclass(frozen=True)
class Delta:
    """What one event, or all of them, add to the choice `index`."""

    index: int
    text: str = ""
    tokens: tuple[PlacedToken, ...] = ()
    finish: FinishReason | None = None

    @classmethod
    def joined(cls, deltas: Sequence[Delta]) -> Delta:
        tokens = tuple(placed for delta in deltas for placed in delta.tokens)
        return cls(deltas[-1].index, "".join(delta.text for delta in deltas), tokens, deltas[-1].finish)


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
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int] = Field(description="where each token begins in the choice's text")


class _Reply(BaseModel):
    id: str
    created: int
    model: str
    bits: int | None = Field(
        description="that computed all tokens, or a chunk's latest; null for none yet, several (usage.bits) or a plan"
    )


class ChatMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


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


_OMITTED = {"token_ids", "usage", "role", "content"}  # where there is none; other fields are null


def dump(reply: BaseModel) -> str:
    """As JSON."""
    return json.dumps(_without(reply.model_dump(mode="json")), ensure_ascii=False, separators=(",", ":"))


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without(item) for key, item in value.items() if item is not None or key not in _OMITTED}
    return [_without(item) for item in value] if isinstance(value, list) else value


class Formatter(ABC):
    """How an API spells an answer. `bits` as in _Reply.

    name: the model's, where the body gives none.
    """

    prefix: ClassVar[str]  # of an answer's id
    whole: ClassVar[type[BaseModel]]  # a reply
    chunk: ClassVar[type[BaseModel]]  # of a stream

    def __init__(self, body: GenerationBody, name: str, names: TokenNames) -> None:
        self._names = names
        self._shows_ids = bool(body.return_token_ids)
        self._head: dict[str, Any] = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": body.model or name,
        }

    def first_chunks(self, count: int) -> list[BaseModel]:
        """What a stream of `count` choices begins with."""
        return []

    def next_chunk(self, delta: Delta, bits: int | None) -> BaseModel:
        return self.chunk(**self._head, bits=bits, choices=[self._chunk_choice(delta)])

    def last_chunk(self, usage: Usage, bits: int | None) -> BaseModel:
        return self.chunk(**self._head, bits=bits, choices=[], usage=usage)

    def reply(self, deltas: Sequence[Delta], usage: Usage, bits: int | None) -> BaseModel:
        return self.whole(**self._head, bits=bits, choices=[self._choice(delta) for delta in deltas], usage=usage)

    @abstractmethod
    def _choice(self, delta: Delta) -> BaseModel: ...

    @abstractmethod
    def _chunk_choice(self, delta: Delta) -> BaseModel: ...

    def _shared(self, delta: Delta) -> dict[str, Any]:
        """The fields that every kind of choice has."""
        ids = [placed.token.id for placed in delta.tokens] if self._shows_ids else None
        return {"index": delta.index, "finish_reason": delta.finish, "token_ids": ids}

    def _named(self, token: int, logprob: float | None) -> TokenLogprob:
        text, raw = self._names.of(token)
        return TokenLogprob(token=text, logprob=LEAST if logprob is None else max(logprob, LEAST), bytes=list(raw))


class ChatFormatter(Formatter):
    prefix, whole, chunk = "chatcmpl", ChatReply, ChatChunk

    def __init__(self, body: ChatBody, name: str, names: TokenNames) -> None:
        super().__init__(body, name, names)
        self._shows_logprobs = bool(body.logprobs)

    def first_chunks(self, count: int) -> list[BaseModel]:
        chunks: list[BaseModel] = []
        for index in range(count):
            delta = ChatDelta(role="assistant", content="")
            choice = ChatChunkChoice(**self._shared(Delta(index)), delta=delta, logprobs=None)
            chunks.append(ChatChunk(**self._head, bits=None, choices=[choice]))
        return chunks

    def _choice(self, delta: Delta) -> ChatChoice:
        message = ChatMessage(content=delta.text)
        return ChatChoice(**self._shared(delta), message=message, logprobs=self._logprobs(delta))

    def _chunk_choice(self, delta: Delta) -> ChatChunkChoice:
        logprobs = self._logprobs(delta) if delta.tokens else None
        return ChatChunkChoice(**self._shared(delta), delta=ChatDelta(content=delta.text or None), logprobs=logprobs)

    def _logprobs(self, delta: Delta) -> ChatLogprobs | None:
        if not self._shows_logprobs:
            return None
        content = []
        for token in (placed.token for placed in delta.tokens):
            chosen = self._named(token.id, token.logprob)
            top = [self._named(*pair) for pair in token.top]
            content.append(PlacedLogprob(**chosen.model_dump(), top_logprobs=top))
        return ChatLogprobs(content=content)


class CompletionFormatter(Formatter):
    prefix, whole, chunk = "cmpl", CompletionReply, CompletionReply

    def __init__(self, body: CompletionBody, name: str, names: TokenNames) -> None:
        super().__init__(body, name, names)
        self._asked = body.logprobs

    def _choice(self, delta: Delta) -> CompletionChoice:
        return CompletionChoice(**self._shared(delta), text=delta.text, logprobs=self._logprobs(delta))

    _chunk_choice = _choice

    def _logprobs(self, delta: Delta) -> CompletionLogprobs | None:
        if self._asked is None:
            return None
        chosen = [self._named(placed.token.id, placed.token.logprob) for placed in delta.tokens]
        top = [[self._named(*pair) for pair in placed.token.top] for placed in delta.tokens]
        return CompletionLogprobs(
            tokens=[item.token for item in chosen],
            token_logprobs=[item.logprob for item in chosen],
            top_logprobs=[{item.token: item.logprob for item in items} for items in top] if self._asked else None,
            text_offset=[placed.offset for placed in delta.tokens],
        )
