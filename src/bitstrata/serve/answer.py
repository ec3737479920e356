"""A request that was understood -> its answer, whole or as a stream: the same for chats and completions.

Every engine request makes `Part`s of its choice; a whole choice is the sum of them. A `Form` puts both
into the words of one API.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from fastapi import Request as HttpRequest
from fastapi import Response
from pydantic import BaseModel

from ..errors import InputError
from ..nn import Assignment, BitsOrPlan
from ..runtime import Request, Token
from .failures import ApiError, closing, translate
from .flight import Arrival, Flight
from .replies import FinishReason, Usage, dump
from .requests import GenerationBody
from .service import Service
from .stream import EventStream, while_connected
from .text import ReplyText

CLIENT_GONE = 499  # nobody reads it; nginx's number


@dataclass(frozen=True)
class Placed:
    """A token, and the character of its choice's text at which it begins."""

    token: Token
    offset: int


@dataclass(frozen=True)
class Part:
    """What one event, or all of them, add to the choice `index`."""

    index: int
    text: str
    tokens: tuple[Placed, ...]
    finish: FinishReason | None


class Form(Protocol):
    """How an API spells an answer. `bits` as in replies._Reply."""

    def opening(self, count: int) -> Sequence[BaseModel]: ...
    def chunk(self, part: Part, bits: int | None) -> BaseModel: ...
    def ending(self, usage: Usage, bits: int | None) -> BaseModel: ...
    def reply(self, parts: Sequence[Part], usage: Usage, bits: int | None) -> BaseModel: ...


@dataclass(frozen=True)
class Wish:
    """What a body asks for beyond what all bodies have in common.

    prompts: tokens of each. continues: whether a reply's text goes on where its prompt's ends.
    max_tokens: asked for, or None and then at most `default_tokens`. logprobs: as in runtime.Request.
    """

    prompts: Sequence[Sequence[int]]
    continues: bool
    max_tokens: int | None
    default_tokens: int
    logprobs: int | None


class _Choice:
    """One reply in the making."""

    def __init__(self, index: int, text: ReplyText, asked: BitsOrPlan, service: Service, started: float) -> None:
        self.index, self._text, self._service, self._started = index, text, service, started
        self._plan = str(asked)  # of tokens without bits of their own: the plan's name
        self.bits: Counter[str] = Counter()
        self.latest: int | None = None  # bits of the latest token
        self.finish: FinishReason | None = None
        self._first = self._last = 0.0

    def take(self, arrival: Arrival) -> Part | None:
        """Raises ApiError if the request did not end as it should."""
        if self.finish is not None:  # a stop text was found; what the engine made meanwhile does not count
            return None
        event = arrival.event
        if isinstance(event, Token):
            return self._token(event, arrival.time)
        if event.error is not None:
            raise translate(event.error)
        if event.reason == "cancelled":
            raise closing()
        return Part(self.index, self._text.flush(), (), self._end("stop" if event.reason == "stop" else "length"))

    def _token(self, token: Token, when: float) -> Part:
        self._last = when
        if not self.bits:
            self._first = when
            self._service.metrics.first_token.observe(when - self._started)
        self.latest = token.bits
        bits = self._plan if token.bits is None else str(token.bits)
        self.bits[bits] += 1
        self._service.metrics.tokens.labels(bits).inc()
        offset = self._text.length
        text = self._text.push(token.id)
        return Part(self.index, text, (Placed(token, offset),), self._end("stop") if self._text.stopped else None)

    def _end(self, reason: FinishReason) -> FinishReason:
        self.finish = "stop" if self._text.stopped else reason
        if (count := self.bits.total()) > 1:
            self._service.metrics.per_token.observe((self._last - self._first) / (count - 1))
        return self.finish


class _Answer:
    """All choices of one HTTP request."""

    def __init__(self, service: Service, body: GenerationBody, wish: Wish, requests: Sequence[Request]) -> None:
        started = time.perf_counter()
        self._prompt_tokens = sum(map(len, wish.prompts))
        self._shows_tokens = wish.logprobs is not None or bool(body.return_token_ids)
        self.flight = Flight(service.engine, requests)  # first: it checks the tokens that texts are made from
        self._choices = []
        for index, request in enumerate(requests):
            context = request.prompt_ids if wish.continues else ()
            text = ReplyText(service.tokenizer, context, body.stop)
            self._choices.append(_Choice(index, text, _asked(request), service, started))

    async def parts(self) -> AsyncIterator[Part]:
        async for arrival in self.flight.arrivals():
            choice = self._choices[arrival.index]
            part = choice.take(arrival)
            if part is None:
                continue
            if part.finish is not None:
                self.flight.cancel(part.index)
            yield part

    async def whole(self) -> list[Part]:
        found: list[list[Part]] = [[] for _ in self._choices]
        async for part in self.parts():
            found[part.index].append(part)
        return [
            Part(
                index,
                "".join(part.text for part in parts),
                tuple(placed for part in parts for placed in part.tokens),
                parts[-1].finish,
            )
            for index, parts in enumerate(found)
        ]

    async def chunks(self, form: Form, *, with_usage: bool) -> AsyncIterator[BaseModel]:
        for chunk in form.opening(len(self._choices)):
            yield chunk
        async for part in self.parts():
            if part.text or part.finish is not None or self._shows_tokens:
                yield form.chunk(part, self._choices[part.index].latest)
        if with_usage:
            yield form.ending(self.usage, self.bits)

    @property
    def usage(self) -> Usage:
        counts = sum((choice.bits for choice in self._choices), Counter[str]())
        return Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=counts.total(),
            total_tokens=self._prompt_tokens + counts.total(),
            bits={bits: counts[bits] for bits in sorted(counts)},
        )

    @property
    def bits(self) -> int | None:
        """The bits of all tokens; None if there are several, or for a plan."""
        found = {bits for choice in self._choices for bits in choice.bits}
        return int(next(iter(found))) if len(found) == 1 and min(found).isdigit() else None


async def answer(service: Service, http: HttpRequest, body: GenerationBody, wish: Wish, form: Form) -> Response:
    """Run the engine requests that `body` and `wish` stand for.

    A client that goes away cancels them. Raises what Engine.submit raises, and ApiError.
    """
    answered = _Answer(service, body, wish, engine_requests(service, body, wish))
    if body.stream:
        return EventStream(answered.chunks(form, with_usage=body.includes_usage), answered.flight.cancel)
    try:
        parts = await while_connected(answered.whole(), http.receive)
    finally:
        answered.flight.cancel()
    if parts is None:
        return Response(status_code=CLIENT_GONE)
    return Response(dump(form.reply(parts, answered.usage, answered.bits)), media_type="application/json")


def _asked(request: Request) -> BitsOrPlan:
    """The bits or the plan of a request that `engine_requests` made."""
    assert isinstance(request.bits, Assignment)
    asked: BitsOrPlan = request.bits.given
    return asked


def engine_requests(service: Service, body: GenerationBody, wish: Wish) -> list[Request]:
    """`n` for each prompt. Raises ApiError for what is too many or too long."""
    count = body.n or 1
    service.check_choices(len(wish.prompts), count)
    bits = service.catalog.precision(body.model, body.bits)
    min_bits = body.min_bits
    if min_bits is not None and min_bits not in service.catalog.precisions:
        supported = ", ".join(str(key) for key in service.catalog.precisions if isinstance(key, int)) or "none"
        message = f"min_bits={min_bits} is not available; supported bits: {supported}"
        raise ApiError(400, message, param="min_bits", code="unsupported_bits")
    if min_bits is None and isinstance(bits.given, int) and service.settings.min_bits is not None:
        min_bits = min(bits.given, service.settings.min_bits)
    return [
        Request(
            prompt,
            bits=bits,
            min_bits=min_bits,
            max_new_tokens=_room(service, len(prompt), wish),
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=None if body.seed is None else body.seed + copy,
            stop=[*body.stop, *(body.stop_token_ids or ())],
            logprobs=wish.logprobs,
            ignore_eos=bool(body.ignore_eos),
        )
        for prompt in wish.prompts
        for copy in range(count)
    ]


def _room(service: Service, prompt: int, wish: Wish) -> int:
    """New tokens for a prompt of so many."""
    longest = service.settings.max_prompt_tokens
    if longest is not None and prompt > longest:
        raise ApiError(
            400,
            f"the prompt has {prompt} tokens, this server takes at most {longest}",
            param="prompt",
            code="context_length_exceeded",
        )
    try:
        room = service.engine.limits.room(prompt, wish.max_tokens)
    except InputError as error:
        raise ApiError(400, f"{error.message}; {error.hint}", code="context_length_exceeded") from error
    return room if wish.max_tokens is not None else min(room, wish.default_tokens)
