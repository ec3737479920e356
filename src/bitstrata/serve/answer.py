"""A request that was understood -> its answer, whole or as a stream: the same for every API.

Every engine request makes `Delta`s of its choice; a whole choice is the sum of them. A `Formatter` puts both into the
words of one API.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fastapi import Request as HttpRequest
from fastapi import Response
from pydantic import BaseModel

from ..errors import InputError
from ..nn import Assignment, BitsOrPlan
from ..runtime import Constraint, Request, Scored, Token
from ..runtime.tools import CallDelta, CallParser
from .errors import ApiError, closing, translate
from .fields import Notice
from .notices import Notices
from .replies import Delta, FinishReason, Formatter, PlacedToken, PromptDetails, Usage
from .requests import GenerationBody
from .service import Service
from .spelling import dump
from .stream import Arrival, EventStream, Submission, while_connected
from .text import ReplyText
from .tools import ToolUse

CLIENT_GONE = 499  # nobody reads it; nginx's number


@dataclass(frozen=True)
class GenerationSpec:
    """What a body asks for beyond what all bodies have in common.

    prompts: tokens of each. continues: whether a reply's text goes on where its prompt's ends.
    max_tokens: asked for, or None and then at most `default_tokens`. logprobs: as in runtime.Request.
    echo: of each prompt what its tokens add to its text, where replies begin with their prompts.
    constraint: what replies must be, and the field that says so. tools: how calls in them are read.
    ends: tokens that end a reply, beside those that the client names, and are no part of its text.
    """

    prompts: Sequence[Sequence[int]]
    precision: Assignment
    notices: Notices
    continues: bool
    max_tokens: int | None
    default_tokens: int
    logprobs: int | None = None
    echo: Sequence[Sequence[str]] | None = None
    constraint: tuple[str, Constraint] | None = None
    tools: ToolUse | None = None
    ends: Sequence[int] = ()


class _Choice:
    """One reply in the making."""

    def __init__(
        self,
        index: int,
        text: ReplyText,
        echo: Sequence[str],
        asked: BitsOrPlan,
        service: Service,
        started: float,
        tools: ToolUse | None,
    ) -> None:
        self.index, self._text, self._metrics, self._started = index, text, service.metrics, started
        self._echo, self._begin = echo, sum(map(len, echo))  # characters before the reply's own
        self._plan = str(asked)  # of tokens without bits of their own: the plan's name
        self._calls = None if tools is None else CallParser(tools.form)
        self._most_calls = 0 if tools is None else tools.most
        self.bits: Counter[str] = Counter()
        self.latest: int | None = None  # bits of the latest token
        self.is_finished = False
        self._first = self._last = 0.0

    def add(self, arrival: Arrival) -> Delta:
        """Raises ApiError if the request did not end as it should."""
        if isinstance(arrival.event, Token):
            return self._add_token(arrival.event, arrival.time)
        if isinstance(arrival.event, Scored):
            return self.prompt(arrival.event.tokens)
        if arrival.event.error is not None:
            raise translate(arrival.event.error)
        if arrival.event.reason == "cancelled":
            raise closing()
        text, calls = self._read(self._text.flush())
        is_stop = arrival.event.reason == "stop" or self._text.stopped
        rest, more = ("", []) if self._calls is None else self._calls.flush()
        finish = self._finish("length" if not is_stop else "tool_calls" if self._has_calls else "stop")
        return Delta(self.index, text + rest, finish=finish, stop=self._text.stop, calls=(*calls, *more))

    @property
    def _has_calls(self) -> bool:
        return self._calls is not None and self._calls.count > 0

    def _read(self, text: str) -> tuple[str, list[CallDelta]]:
        """`text` without the calls in it, and these."""
        return (text, []) if self._calls is None else self._calls.push(text)

    def prompt(self, tokens: Sequence[Token] = ()) -> Delta:
        """The prompt as the beginning of the reply, with `tokens` where log-probabilities are wanted."""
        ends = itertools.accumulate(map(len, self._echo))
        placed = (PlacedToken(one, end - len(piece)) for one, end, piece in zip(tokens, ends, self._echo, strict=False))
        return Delta(self.index, "".join(self._echo), tuple(placed))

    def _add_token(self, token: Token, when: float) -> Delta:
        self._last = when
        if not self.bits:
            self._first = when
            self._metrics.first_token.observe(when - self._started)
        self.latest = token.bits
        bits = self._plan if token.bits is None else str(token.bits)
        self.bits[bits] += 1
        self._metrics.tokens.labels(bits).inc()
        placed = PlacedToken(token, self._begin + self._text.length)
        text, calls = self._read(self._text.push(token.id))
        finish: FinishReason | None = None
        if self._text.stopped:
            rest, more = ("", []) if self._calls is None else self._calls.flush()
            text, calls = text + rest, [*calls, *more]
            finish = self._finish("tool_calls" if self._has_calls else "stop")
        elif self._calls is not None and self._calls.whole >= self._most_calls:
            finish = self._finish("tool_calls")
        return Delta(self.index, text, (placed,), finish, self._text.stop, tuple(calls))

    def _finish(self, reason: FinishReason) -> FinishReason:
        self.is_finished = True
        if (count := self.bits.total()) > 1:
            self._metrics.per_token.observe((self._last - self._first) / (count - 1))
        return reason


class _Answer:
    """All choices of one HTTP request."""

    def __init__(self, service: Service, body: GenerationBody, spec: GenerationSpec) -> None:
        requests = engine_requests(service, body, spec)
        started = time.perf_counter()
        self._prompts, self._prompt_tokens = len(spec.prompts), sum(map(len, spec.prompts))
        self._shows_tokens = spec.logprobs is not None or bool(body.return_token_ids)
        self._echoes_text = spec.echo is not None and spec.logprobs is None
        self.submission = Submission(service.engine, requests)  # first: it checks the tokens that texts are made from
        self._choices = []
        for index, request in enumerate(requests):
            shown = {} if spec.tools is None else spec.tools.form.shown(service.tokenizer)
            context = request.prompt_ids if spec.continues else ()
            text = ReplyText(service.tokenizer, context, body.stop, shown, spec.ends)
            echo = () if spec.echo is None else spec.echo[index // (body.n or 1)]
            self._choices.append(_Choice(index, text, echo, spec.precision.given, service, started, spec.tools))

    async def deltas(self) -> AsyncIterator[Delta]:
        if self._echoes_text:
            for choice in self._choices:
                yield choice.prompt()
        async for arrival in self.submission.arrivals():
            choice = self._choices[arrival.index]
            if choice.is_finished:  # a stop text was found; what the engine made meanwhile does not count
                continue
            delta = choice.add(arrival)
            if choice.is_finished:
                self.submission.cancel(arrival.index)
            yield delta

    async def whole(self) -> list[Delta]:
        """One Delta a choice."""
        found: list[list[Delta]] = [[] for _ in self._choices]
        async for delta in self.deltas():
            found[delta.index].append(delta)
        return [Delta.joined(deltas) for deltas in found]

    async def chunks(self, formatter: Formatter) -> AsyncIterator[BaseModel]:
        for chunk in formatter.first_chunks(len(self._choices), self.usage):
            yield chunk
        async for delta in self.deltas():
            if delta.text or delta.calls or delta.finish is not None or self._shows_tokens:
                for chunk in formatter.next_chunks(delta, self._choices[delta.index].latest, self.usage):
                    yield chunk
        for chunk in formatter.last_chunks(self.usage, self.bits):
            yield chunk

    @property
    def usage(self) -> Usage:
        counts = sum((choice.bits for choice in self._choices), Counter[str]())
        return Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=counts.total(),
            total_tokens=self._prompt_tokens + counts.total(),
            prompt_tokens_details=PromptDetails(cached_tokens=self._cached_tokens),
            bits={bits: counts[bits] for bits in sorted(counts)},
        )

    @property
    def _cached_tokens(self) -> int:
        """Of each prompt, what none of its choices had to compute."""
        found = self.submission.reused_tokens
        each = len(found) // self._prompts
        return sum(min(found[at : at + each]) for at in range(0, len(found), each))

    @property
    def bits(self) -> int | None:
        """The bits of all tokens; None if there are several, or for a plan."""
        found = {bits for choice in self._choices for bits in choice.bits}
        return int(next(iter(found))) if len(found) == 1 and min(found).isdigit() else None


async def answer(
    service: Service, http: HttpRequest, body: GenerationBody, spec: GenerationSpec, formatter: Formatter
) -> Response:
    """Run the engine requests that `body` and `spec` stand for.

    A client that goes away cancels them. Raises what Engine.submit raises, and ApiError.
    """
    if spec.constraint is not None:
        await service.prepare(*spec.constraint, spec.notices)
    answered = _Answer(service, body, spec)
    if body.stream:
        chunks = answered.chunks(formatter)
        return EventStream(chunks, answered.submission.cancel, formatter.spelling, spec.notices.headers)
    try:
        deltas = await while_connected(answered.whole(), http.receive)
    finally:
        answered.submission.cancel()
    if deltas is None:
        return Response(status_code=CLIENT_GONE)
    whole = dump(formatter.reply(deltas, answered.usage, answered.bits))
    return Response(whole, media_type="application/json", headers=spec.notices.headers)


def engine_requests(service: Service, body: GenerationBody, spec: GenerationSpec) -> list[Request]:
    """`n` for each prompt. Raises ApiError for what is too many or too long."""
    count = body.n or 1
    service.check_choices(len(spec.prompts), count)
    min_bits = service.catalog.min_bits(spec.precision, body.min_bits)
    sampling = _sampling(service, body)
    return [
        Request(
            prompt,
            bits=spec.precision,
            min_bits=min_bits,
            max_new_tokens=_new_tokens(service, len(prompt), spec),
            seed=None if body.seed is None else body.seed + copy,
            stop=[*body.stop, *(body.stop_token_ids or ()), *spec.ends],
            logprobs=spec.logprobs,
            prompt_logprobs=None if spec.echo is None else spec.logprobs,
            ignore_eos=bool(body.ignore_eos),
            constraint=None if spec.constraint is None else spec.constraint[1],
            **sampling,
        )
        for prompt in spec.prompts
        for copy in range(count)
    ]


def _sampling(service: Service, body: GenerationBody) -> dict[str, Any]:
    """How tokens are picked: as `body` says, else as the model's makers advise. Fields of runtime.Request."""
    chosen = asdict(service.defaults)
    chosen |= {name: value for name in chosen if (value := getattr(body, name)) is not None}
    chosen["top_k"] = max(0, chosen["top_k"])
    if chosen["top_p"] == 0:  # the smallest set of tokens that there can be: the likeliest
        chosen |= {"temperature": 0.0, "top_p": 1.0}
    return chosen | {
        "presence_penalty": body.presence_penalty or 0.0,
        "frequency_penalty": body.frequency_penalty or 0.0,
        "logit_bias": body.logit_bias,
        "min_tokens": body.min_tokens or 0,
        "model_rules": service.has_model_rules,
    }


def _new_tokens(service: Service, prompt: int, spec: GenerationSpec) -> int:
    """How many a prompt of so many tokens may be continued with."""
    longest = service.settings.max_prompt_tokens
    if longest is not None and prompt > longest:
        raise ApiError(
            400,
            f"the prompt has {prompt} tokens, this server takes at most {longest}",
            param="prompt",
            code="context_length_exceeded",
        )
    limits, asked = service.engine.limits, spec.max_tokens
    try:
        room = limits.room(prompt)
        if asked is None:
            return min(room, spec.default_tokens)
        if asked > room:
            said = f"max_tokens lowered from {asked} to {room}, which the prompt's {prompt} tokens leave"
            refusal = f"the prompt's {prompt} tokens and max_tokens={asked} do not fit: ask for at most {room}"
            spec.notices.add(Notice("max_tokens", said, refusal, "context_length_exceeded"))
        return min(room, asked)
    except InputError as error:
        raise ApiError(400, error.sentence, code="context_length_exceeded") from error
