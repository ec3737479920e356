"""What a caller gives the engine, and what comes back: Request, Handle and events.

A Request is checked when it is submitted; the Handle that `Engine.submit` returns is how its caller
follows, steers and cancels it, from any thread.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ...errors import InputError, UnsupportedBitsError, UsageError
from ...nn import Assignment, BitsOrPlan, BitsState
from ...planes import whole_number
from ..constraints import Constraint

REASONS = ("stop", "length", "cancelled", "error")


@dataclass(frozen=True)
class Request:
    """One prompt to continue.

    Args:
        prompt_ids: the prompt's tokens, BOS included where the model wants one.
        bits: an int, or a plan (layer name -> bits), or what the model's BitsState made of one; the model's highest if
            None.
        min_bits: the least that the engine's policy may lower an int `bits` to; `bits` if None, so never lower.
        max_new_tokens: at most so many tokens. None for as many as the model's context leaves; such a request takes
            room in the engine's cache as it goes, and ends, with the reason "length", when it can get no more there.
            0 goes with prompt_logprobs only.
        temperature: 0 takes the most likely token every time; above 0 samples from softmax(logits / temperature).
        top_p: sample from the smallest set of most likely tokens whose probability reaches top_p.
        top_k: sample from the top_k most likely tokens, of which top_p then counts; 0 for all.
        min_p: sample from tokens at least min_p times as likely as the likeliest.
        repetition_penalty: logits of tokens of the prompt and the reply are divided by it, or multiplied if negative.
        presence_penalty, frequency_penalty: taken off the logits of the reply's tokens, once and for each time.
        logit_bias: token -> what is added to its logit.
        min_tokens: so many new tokens come before one that ends the request can; a stop text ends it at any time.
        model_rules: the model's generation config changes logits too: tokens that never come, and the like. Its
            repetition_penalty, temperature, top_p, top_k and min_p count only as they are given here.
        seed: a seeded request samples the same tokens whatever else is in the batch; None draws a fresh seed.
        stop: texts, or single token ids, after which the request ends. What ended it is among the tokens.
        logprobs: None for no log-probabilities, 0 for those of the chosen tokens, n for the n likeliest as well.
        prompt_logprobs: the same of the prompt's tokens, which come in one event, Scored. The prompt is then computed
            as a whole, even where the cache has its beginning.
        ignore_eos: go on after an end-of-sequence token.
        constraint: what the reply must be. It ends, by "stop", where that is whole and nothing can follow; before,
            where the model says so, if it is whole there. Log-probabilities are those of all tokens all the same.
    """

    prompt_ids: Sequence[int]
    bits: BitsOrPlan | Assignment | None = None
    min_bits: int | None = None
    max_new_tokens: int | None = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[str | int] = ()
    logprobs: int | None = None
    ignore_eos: bool = False
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    model_rules: bool = False
    prompt_logprobs: int | None = None
    constraint: Constraint | None = None


@dataclass(frozen=True)
class Token:
    """One new token.

    logprob: ln of its probability at temperature 1, before top_p; None unless asked for.
    top: the likeliest tokens at this place with theirs, likeliest first.
    bits: the precision that computed it; None where that was the request's plan.
    """

    id: int
    bits: int | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Scored:
    """The tokens of a prompt with their log-probabilities, None of the first, which nothing comes before."""

    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class Finished:
    """The last event. reason: "stop", "length", "cancelled" or "error", and then `error` says what happened."""

    reason: str
    error: Exception | None = None


Event = Token | Scored | Finished


@dataclass(frozen=True)
class Limits:
    """What an engine can take: the model's bits and plans, its vocabulary and the longest sequence, in tokens."""

    state: BitsState
    vocabulary: int
    context: int | None
    cache_tokens: int
    texts: bool  # whether stop texts can be read: there is a tokenizer

    @property
    def longest(self) -> int:
        """The most tokens that a prompt and its new tokens may have together."""
        # the last new token is never an input, so it needs no place in the cache
        return min(self.cache_tokens + 1, self.context or self.cache_tokens + 1)

    def admit(self, request: Request) -> int:
        """Check `request`; how many new tokens it may make.

        Raises:
            UnsupportedBitsError: bits or min_bits that the model does not have, in a plan as well.
            InputError: an empty prompt, a token outside the vocabulary, a prompt that leaves no room for a new token.
            UsageError: anything else that is wrong with it.
        """
        bits = self.assignment(request.bits).given
        if request.min_bits is not None:
            if whole_number(request.min_bits) is None:
                raise UnsupportedBitsError(request.min_bits, self.state.supported)
            self.state.resolve(request.min_bits)
            if not isinstance(bits, int):
                raise UsageError(
                    f"min_bits={request.min_bits} cannot go with a plan", hint="policies lower bits that are an int"
                )
            if request.min_bits > bits:
                raise UsageError(f"min_bits={request.min_bits} is above bits={bits}")
        if not request.temperature >= 0 or request.temperature == float("inf") or not 0 < request.top_p <= 1:
            raise UsageError(
                f"temperature={request.temperature}, top_p={request.top_p} cannot be used",
                hint="temperature must be a number from 0 up, top_p must lie in (0, 1]",
            )
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(request, name)
            if count is not None and not 0 <= count <= self.vocabulary:
                raise UsageError(f"{name}={count} must lie between 0 and the vocabulary's {self.vocabulary}")
        self._check_choice(request)
        if request.constraint is not None and request.ignore_eos:
            raise UsageError("ignore_eos cannot go with a constraint: where that is whole the reply ends")
        self._check_stop(request.stop)
        self._check_prompt(request.prompt_ids)
        scores_only = request.max_new_tokens == 0 and request.prompt_logprobs is not None
        return self.room(len(request.prompt_ids), 1 if scores_only else request.max_new_tokens)

    def room(self, prompt: int, asked: int | None = None) -> int:
        """How many new tokens a prompt of so many tokens may have: `asked`, or all that fit.

        Raises:
            InputError: the prompt leaves no room, or not as much as asked.
            UsageError: less than one token is asked for.
        """
        if asked is not None and asked < 1:
            raise UsageError(f"max_new_tokens={asked} must be at least 1")
        size = self.longest
        if size == self.context:
            what, hint = "the model's context", "shorten the prompt"
        else:
            what, hint = "the engine's cache", "start the engine with more cache_tokens"
        if prompt >= size:
            raise InputError(f"the prompt has {prompt} tokens and leaves no room in {what}, {size}", hint=hint)
        if asked is not None and prompt + asked > size:
            raise InputError(
                f"the prompt's {prompt} tokens and max_new_tokens={asked} do not fit into {what}, {size}",
                hint=f"ask for at most {size - prompt} new tokens",
            )
        return size - prompt if asked is None else asked

    def assignment(self, bits: BitsOrPlan | Assignment | None) -> Assignment:
        """`bits`, or the model's default, checked. Raises UnsupportedBitsError and UsageError as BitsState does."""
        if not (bits is None or isinstance(bits, (Mapping, Assignment)) or whole_number(bits) is not None):
            raise UnsupportedBitsError(bits, self.state.supported)
        return self.state.resolve(bits)

    def _check_choice(self, request: Request) -> None:
        """What decides which tokens can come."""
        if request.top_k < 0 or not 0 <= request.min_p <= 1 or request.min_tokens < 0:
            raise UsageError(
                f"top_k={request.top_k}, min_p={request.min_p}, min_tokens={request.min_tokens} cannot be used",
                hint="top_k and min_tokens must not be negative, min_p must lie in [0, 1]",
            )
        numbers = (request.repetition_penalty, request.presence_penalty, request.frequency_penalty)
        if not all(map(math.isfinite, (*numbers, *request.logit_bias.values()))) or not numbers[0] > 0:
            raise UsageError(
                "penalties and biases must be finite numbers, repetition_penalty above 0",
                hint=f"repetition_penalty={numbers[0]}, presence_penalty={numbers[1]}, frequency_penalty={numbers[2]}",
            )
        for token in request.logit_bias:
            self.check_token(token)

    def _check_stop(self, stop: Sequence[str | int]) -> None:
        if isinstance(stop, str) or any(isinstance(item, bool) or not isinstance(item, (str, int)) for item in stop):
            raise UsageError(f"stop must be a sequence of texts and token ids, got {stop!r}")
        if any(item == "" for item in stop):
            raise UsageError("an empty stop text would end every request at once")
        if not self.texts and any(isinstance(item, str) for item in stop):
            raise UsageError("stop texts need a tokenizer", hint="give Engine the model's tokenizer, or stop token ids")

    def _check_prompt(self, ids: Sequence[int]) -> None:
        if len(ids) == 0:
            raise InputError("the prompt is empty", hint="give at least one token")
        for token in ids:
            self.check_token(token)

    def check_token(self, token: object) -> None:
        """Raises InputError for what is no token of the model."""
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < self.vocabulary:
            raise InputError(
                f"{token!r} is not a token of this model", hint=f"tokens are ints from 0 to {self.vocabulary - 1}"
            )


class Handle:
    """A submitted request. Every method may be called from any thread.

    `request` is what was asked for; `reused_tokens`, how many tokens of its prompt the cache had already (known from
    its first new token on). Events are kept, so `events` may be called more than once and late.
    """

    reused_tokens = 0

    def __init__(
        self,
        request: Request,
        number: int,
        limits: Limits,
        listener: Callable[[Event], None] | None,
        wake: Callable[[], None],
    ) -> None:
        self.request, self.number = request, number
        self._limits, self._bits = limits, limits.assignment(request.bits)
        self._listener, self._wake = listener, wake
        self._changed = threading.Condition()
        self._events: list[Event] = []
        self._cancelled = False
        self._listener_error: Exception | None = None

    @property
    def bits(self) -> BitsOrPlan:
        """Of the tokens to come, before a policy lowers them; the engine reads them at each step."""
        given = self._bits.given
        if isinstance(given, int):
            return given
        return dict(zip(self._limits.state.layers, self._bits.choices[0], strict=False))  # without fixed layers

    def set_bits(self, bits: BitsOrPlan) -> None:
        """Go on at `bits`, an int or a plan. What the cache holds of earlier tokens stays as it was computed.

        Raises UnsupportedBitsError for bits that the model does not have, UsageError for a plan that is not its.
        """
        self._bits = self._limits.assignment(bits)

    def cancel(self) -> None:
        """End the request soon, with the reason "cancelled" unless it ends by itself before; no-op once it ended."""
        self._cancelled = True
        self._wake()

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled

    @property
    def finished(self) -> Finished | None:
        """The last event, once there is one."""
        with self._changed:
            last = self._events[-1] if self._events else None
        return last if isinstance(last, Finished) else None

    @property
    def tokens(self) -> list[int]:
        """The new tokens so far."""
        with self._changed:
            return [event.id for event in self._events if isinstance(event, Token)]

    def events(self, timeout: float | None = None) -> Iterator[Event]:
        """Every event from the first to Finished, each as soon as it is there.

        Raises TimeoutError if the next one does not come within `timeout` seconds.
        """
        at = 0
        while True:
            with self._changed:
                if not self._changed.wait_for(lambda at=at: len(self._events) > at, timeout):  # type: ignore[misc]
                    raise TimeoutError(f"request {self.number}: no event for {timeout} s")
                event = self._events[at]
            yield event
            if isinstance(event, Finished):
                return
            at += 1

    def result(self, timeout: float | None = None) -> list[int]:
        """Wait for the end and return the new tokens.

        Raises TimeoutError as `events`, and the request's own error if it ended with one.
        """
        for event in self.events(timeout):
            if isinstance(event, Finished) and event.error is not None:
                raise event.error
        return self.tokens

    def _emit(self, event: Event) -> None:
        """Called by the engine's thread only."""
        with self._changed:
            self._events.append(event)
            self._changed.notify_all()
        if self._listener is not None:
            try:
                self._listener(event)
            except Exception as error:  # this request's own fault: the engine ends it, the others go on
                self._listener, self._listener_error = None, error
