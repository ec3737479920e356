"""/tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import FastAPI, Response
from pydantic import BaseModel, Discriminator, Field, Tag

from .chats import conversation_tokens
from .described import refusals
from .fields import AS_TEXT, AS_TURNS, Body, Flag, Text, Whole
from .service import Service
from .turns import ConversationBody

STATUSES = (400, 401, 403, 404, 408, 413, 415, 429, 503)


class TextToTokenize(Body):
    """A text as /v1/completions would read it."""

    model: Text | None = None
    prompt: Text
    add_special_tokens: Flag | None = Field(None, description="false: without what the tokenizer puts in front")
    return_token_strs: Flag | None = Field(None, description="each token's name in the vocabulary, too")


class TurnsToTokenize(ConversationBody):
    """A conversation as /v1/chat/completions would read it, its tools included."""

    model: Text | None = None
    return_token_strs: Flag | None = None


def _kind(body: Any) -> str:
    is_turns = "messages" in body if isinstance(body, dict) else isinstance(body, TurnsToTokenize)
    return AS_TURNS if is_turns else AS_TEXT


ToTokenize = Annotated[
    Annotated[TextToTokenize, Tag(AS_TEXT)] | Annotated[TurnsToTokenize, Tag(AS_TURNS)], Discriminator(_kind)
]


class TokensToRead(Body):
    model: Text | None = None
    tokens: list[Annotated[Whole, Field(ge=0)]]


class Tokens(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class TextOfTokens(BaseModel):
    prompt: str


def add_tokenization(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize", responses=refusals(*STATUSES))
    async def tokenize(response: Response, body: ToTokenize) -> Tokens:
        """The tokens of a text, or of a conversation."""
        notices = service.notices(body)
        service.catalog.precision(body.model, None)
        if isinstance(body, TextToTokenize):
            begins = body.add_special_tokens is not False
            (tokens,) = await service.prompts.completion([body.prompt], add_special_tokens=begins)
        else:
            tokens = await conversation_tokens(service, body, notices)
        response.headers.update(notices.headers)
        names = list(map(str, service.tokenizer.convert_ids_to_tokens(tokens))) if body.return_token_strs else None
        return Tokens(count=len(tokens), max_model_len=service.engine.limits.longest, tokens=tokens, token_strs=names)

    @app.post("/detokenize", responses=refusals(*STATUSES))
    async def detokenize(response: Response, body: TokensToRead) -> TextOfTokens:
        """The text of tokens, special ones included."""
        notices = service.notices(body)
        service.catalog.precision(body.model, None)
        for token in body.tokens:
            service.engine.limits.check_token(token)
        response.headers.update(notices.headers)
        return TextOfTokens(prompt=await service.prompts.text(body.tokens))
