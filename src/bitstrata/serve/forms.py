"""An answer in the words of each API."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from .answer import Part, Placed
from .replies import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatReply,
    CompletionChoice,
    CompletionLogprobs,
    CompletionReply,
    PlacedLogprob,
    TokenLogprob,
    Usage,
)
from .requests import ChatBody, CompletionBody, GenerationBody
from .service import Service
from .text import TokenNames

LEAST = -9999.0  # stands for a probability of zero: JSON has no infinity


class _Form:
    """What both have in common. `show` says whether a choice carries log-probabilities."""

    prefix: str

    def __init__(self, service: Service, body: GenerationBody) -> None:
        self._names = service.names
        self._ids = bool(body.return_token_ids)
        self._head: dict[str, Any] = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": body.model or service.catalog.name,
        }

    def _token_ids(self, part: Part) -> list[int] | None:
        return [placed.token.id for placed in part.tokens] if self._ids else None


class ChatForm(_Form):
    prefix = "chatcmpl"

    def __init__(self, service: Service, body: ChatBody) -> None:
        super().__init__(service, body)
        self._logprobs = bool(body.logprobs)

    def opening(self, count: int) -> list[ChatChunk]:
        first = ChatDelta(role="assistant", content="")
        return [self._chunk(Part(index, "", (), None), first, None) for index in range(count)]

    def chunk(self, part: Part, bits: int | None) -> ChatChunk:
        return self._chunk(part, ChatDelta(content=part.text) if part.text else ChatDelta(), bits)

    def _chunk(self, part: Part, delta: ChatDelta, bits: int | None) -> ChatChunk:
        choice = ChatChunkChoice(
            index=part.index,
            delta=delta,
            logprobs=self._shown(part.tokens) if part.tokens else None,
            finish_reason=part.finish,
            token_ids=self._token_ids(part),
        )
        return ChatChunk(**self._head, bits=bits, choices=[choice])

    def ending(self, usage: Usage, bits: int | None) -> ChatChunk:
        return ChatChunk(**self._head, bits=bits, choices=[], usage=usage)

    def reply(self, parts: Sequence[Part], usage: Usage, bits: int | None) -> ChatReply:
        choices = [
            ChatChoice(
                index=part.index,
                message=ChatMessage(content=part.text),
                logprobs=self._shown(part.tokens),
                finish_reason=part.finish,
                token_ids=self._token_ids(part),
            )
            for part in parts
        ]
        return ChatReply(**self._head, bits=bits, choices=choices, usage=usage)

    def _shown(self, tokens: Sequence[Placed]) -> ChatLogprobs | None:
        if not self._logprobs:
            return None
        content = []
        for placed in tokens:
            token = placed.token
            top = [_named(self._names, identifier, value) for identifier, value in token.top]
            chosen = _named(self._names, token.id, token.logprob)
            content.append(PlacedLogprob(**chosen.model_dump(), top_logprobs=top))
        return ChatLogprobs(content=content)


class CompletionForm(_Form):
    prefix = "cmpl"

    def __init__(self, service: Service, body: CompletionBody) -> None:
        super().__init__(service, body)
        self._logprobs = body.logprobs

    def opening(self, count: int) -> list[CompletionReply]:
        return []

    def chunk(self, part: Part, bits: int | None) -> CompletionReply:
        return CompletionReply(**self._head, bits=bits, choices=[self._choice(part)])

    def ending(self, usage: Usage, bits: int | None) -> CompletionReply:
        return CompletionReply(**self._head, bits=bits, choices=[], usage=usage)

    def reply(self, parts: Sequence[Part], usage: Usage, bits: int | None) -> CompletionReply:
        return CompletionReply(**self._head, bits=bits, choices=[self._choice(part) for part in parts], usage=usage)

    def _choice(self, part: Part) -> CompletionChoice:
        return CompletionChoice(
            index=part.index,
            text=part.text,
            logprobs=self._shown(part.tokens),
            finish_reason=part.finish,
            token_ids=self._token_ids(part),
        )

    def _shown(self, tokens: Sequence[Placed]) -> CompletionLogprobs | None:
        if self._logprobs is None:
            return None
        top = [
            {item.token: item.logprob for item in (_named(self._names, *pair) for pair in placed.token.top)}
            for placed in tokens
        ]
        chosen = [_named(self._names, placed.token.id, placed.token.logprob) for placed in tokens]
        return CompletionLogprobs(
            tokens=[item.token for item in chosen],
            token_logprobs=[item.logprob for item in chosen],
            top_logprobs=top if self._logprobs else None,
            text_offset=[placed.offset for placed in tokens],
        )


def _named(names: TokenNames, token: int, logprob: float | None) -> TokenLogprob:
    text, raw = names.of(token)
    return TokenLogprob(token=text, logprob=LEAST if logprob is None else max(logprob, LEAST), bytes=list(raw))
