"""What the server sends, as OpenAI's clients read it; beyond that: `bits`, `usage.bits`, `token_ids`."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, Field

FinishReason = Literal["stop", "length"]


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


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
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
