"""Policies: at how many bits the next token of each request is computed, where the request leaves a choice.

A request asks for `bits` and, if it may be lowered, `min_bits`. The model's bits between the two are its ladder,
highest first. A policy only says how many steps down the ladder a request is now, so none can leave [min_bits, bits],
and a request without min_bits is never lowered. Prompts are fed at `bits`: all later tokens read their keys and values,
and many rows at a time are bound by arithmetic, not by the planes read. Only `load` can be told to lower them too.

    fixed      every request at its bits
    load       down while requests queue or tokens come late, up again when there is room
    position   a step down every so many new tokens: errors early in a text spread into the rest of it
               (PMPD, arXiv 2410.13461)
    entropy    down while the model is sure of its tokens, up when it is not (the signal of FlexQuant,
               arXiv 2506.12024; thresholds and mean are ours)
    structure  up where a reply calls a tool or is JSON or code, and where that may begin; down in prose

Nothing here reads a clock, a model or a text: time, load, entropies and passages come in as values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal

from ..errors import UsageError

Passage = Literal["prose", "opening", "structure", "forced"]  # what the next token is for (passages.py)


@dataclass(frozen=True)
class RequestView:
    """What a policy sees of a request before each token.

    bits, min_bits: as asked for. supported: of the model, ascending. new_tokens: made so far; 0 for the prompt, also
    where that is computed again and holds tokens that were made.
    entropy: of the distribution that gave the last of them (`normalised_entropy`), in [0, 1]; None without one, or if
    the policy does not want it. passage: what the next token is for; None for the prompt, or if it is not wanted.
    """

    bits: int
    min_bits: int | None
    supported: tuple[int, ...]
    new_tokens: int
    entropy: float | None = None
    passage: Passage | None = None

    @property
    def ladder(self) -> tuple[int, ...]:
        """The bits that it may run at, highest first."""
        if self.min_bits is None:
            return (self.bits,)
        low = min(self.min_bits, self.bits)
        return tuple(bits for bits in reversed(self.supported) if low <= bits <= self.bits)

    def lowered(self, steps: int) -> int:
        """The bits `steps` down the ladder, within its ends."""
        return self.ladder[min(max(steps, 0), len(self.ladder) - 1)]

    def steps_to(self, bits: int) -> int:
        """Steps down to the highest of the ladder that is not above `bits`; to its end if there is none."""
        return sum(one > bits for one in self.ladder)


@dataclass(frozen=True)
class LoadView:
    """What a policy sees of the engine before each round.

    now: seconds, on a clock that never goes back. waiting: requests that found no place.
    time_per_token: as in EngineStats. steps: of the longest ladder among the running requests.
    """

    now: float
    waiting: int
    time_per_token: float | None
    steps: int


RequestPolicy = Callable[[RequestView], int]  # steps down the ladder of one request; may remember what it saw of it


@dataclass
class Policy:
    """Every request at its own bits; the base of the others. An object belongs to one engine: it may remember."""

    name: ClassVar[str] = "fixed"
    wants_entropy: ClassVar[bool] = False
    wants_passage: ClassVar[bool] = False

    @property
    def mends(self) -> bool:
        """Whether what was computed at fewer bits is computed anew where bits rise."""
        return False

    def observe(self, load: LoadView) -> None:
        """Called before each round."""

    def start(self) -> RequestPolicy:
        """Called for each request when it is submitted; the result before each of its tokens."""
        return lambda request: 0

    def __str__(self) -> str:
        given = ",".join(f"{item.name}={getattr(self, item.name):g}" for item in fields(self) if item.init)
        return f"{self.name}:{given}" if given else self.name

    def _require(self, fine: bool, expected: str) -> None:
        if not fine:
            raise UsageError(f"policy {self} cannot be used", hint=expected)


@dataclass
class LoadPolicy(Policy):
    """All requests go a step down when the engine is behind, and a step up when it has had room for a while.

    Behind: at least `queue` requests wait, or the time per token is above the target. Room: none waits, and the time
    per token is below `low` times the target, for `dwell_ms` on end. Between the two nothing changes. Steps lie at
    least `dwell_ms` apart; an engine that was without work starts at the top again. So the target must lie well above
    what one request alone takes. `prompts=1` lowers prompts as well: where they cost less at fewer bits
    (`bitstrata bench OUT --rows 32`), and at the price of every token that reads them.
    """

    name: ClassVar[str] = "load"
    target_ms: float
    low: float = 0.7
    queue: int = 4
    dwell_ms: float = 500.0
    prompts: int = 0
    steps: int = field(default=0, init=False)  # down, now
    _changed: float = field(default=float("-inf"), init=False, repr=False)
    _no_room: float = field(default=float("-inf"), init=False, repr=False)  # when there was none for the last time

    def __post_init__(self) -> None:
        fine = self.target_ms > 0 and 0 < self.low < 1 and self.queue >= 1 and self.dwell_ms >= 0
        self._require(
            fine and self.prompts in (0, 1),
            "target_ms above 0, low between 0 and 1, queue at least 1, dwell_ms at least 0, prompts 0 or 1",
        )

    def observe(self, load: LoadView) -> None:
        late = 0.0 if load.time_per_token is None else load.time_per_token * 1000 / self.target_ms
        behind, room = load.waiting >= self.queue or late > 1, load.waiting == 0 and late < self.low
        if not room:
            self._no_room = load.now
        dwell = self.dwell_ms / 1000
        if load.now - self._changed < dwell:
            return
        steps = self.steps
        if behind:
            steps = max(steps, min(steps + 1, load.steps))
        elif room and load.time_per_token is None:
            steps = 0
        elif room and load.now - self._no_room >= dwell:
            steps = max(0, min(steps, load.steps) - 1)
        if steps != self.steps:
            self.steps, self._changed = steps, load.now

    def start(self) -> RequestPolicy:
        return lambda request: self.steps if request.new_tokens or self.prompts else 0


@dataclass
class PositionPolicy(Policy):
    """`tokens` new tokens at `bits`, as many at the next lower, and so on down to min_bits."""

    name: ClassVar[str] = "position"
    tokens: int = 32

    def __post_init__(self) -> None:
        self._require(self.tokens >= 1, "tokens must be at least 1")

    def start(self) -> RequestPolicy:
        return lambda request: request.new_tokens // self.tokens


@dataclass
class EntropyPolicy(Policy):
    """Each request goes a step down while the mean entropy of its tokens is below `low`, up while above `high`.

    The mean is exponential, the newest token counting `weight`. Steps of a request lie at least `hold` tokens apart,
    and the first `hold` tokens are at its bits.
    """

    name: ClassVar[str] = "entropy"
    wants_entropy: ClassVar[bool] = True
    low: float = 0.15
    high: float = 0.3
    weight: float = 0.2
    hold: int = 4

    def __post_init__(self) -> None:
        fine = 0 <= self.low < self.high <= 1 and 0 < self.weight <= 1 and self.hold >= 1
        self._require(fine, "0 <= low < high <= 1, weight above 0 and at most 1, hold at least 1")

    def start(self) -> RequestPolicy:
        mean: float | None = None
        steps = seen = changed = 0

        def policy(request: RequestView) -> int:
            nonlocal mean, steps, seen, changed
            if not request.new_tokens:
                return 0
            if request.entropy is None or request.new_tokens == seen:
                return steps
            seen = request.new_tokens
            before = request.entropy if mean is None else mean
            mean = before + self.weight * (request.entropy - before)
            if request.new_tokens - changed >= self.hold:
                wanted = steps + (mean < self.low) - (mean > self.high)
                wanted = min(max(wanted, 0), len(request.ladder) - 1)
                if wanted != steps:
                    steps, changed = wanted, request.new_tokens
            return steps

        return policy


@dataclass
class StructurePolicy(Policy):
    """At most `prose` bits in words, at most `structured` in calls, JSON, code, and where one of these may begin.

    By default these are the ends of what a request allows. Where a grammar leaves one text to come the model decides
    nothing, and `prose` bits do.

    `mend=1`: where the bits of a request rise, the keys and values of what it wrote at fewer are computed anew, in the
    same pass. What is decided there is then decided as if no token had been lowered; a pass over the tokens of a
    sentence costs more than one over a token, by how much depends on the machine.
    """

    name: ClassVar[str] = "structure"
    wants_passage: ClassVar[bool] = True
    structured: int = 8
    prose: int = 1
    mend: int = 0

    def __post_init__(self) -> None:
        self._require(
            1 <= self.prose <= self.structured <= 8 and self.mend in (0, 1),
            "prose and structured are bits, 1 <= prose <= structured; mend is 0 or 1",
        )

    @property
    def mends(self) -> bool:
        return bool(self.mend)

    def start(self) -> RequestPolicy:
        def policy(request: RequestView) -> int:
            if request.passage is None:
                return 0
            return request.steps_to(self.prose if request.passage in ("prose", "forced") else self.structured)

        return policy


_KINDS = (Policy, LoadPolicy, PositionPolicy, EntropyPolicy, StructurePolicy)
POLICIES: dict[str, type[Policy]] = {kind.name: kind for kind in _KINDS}


def parse_policy(text: str) -> Policy:
    """A policy from what a user types: its name, then settings, as in `load:target_ms=50,low=0.6`.

    Raises UsageError for an unknown policy or setting, a value that is not a number, or one that cannot be used.
    """
    name, _, settings = text.strip().partition(":")
    kind = POLICIES.get(name)
    if kind is None:
        raise UsageError(f"policy {text!r} is not known", hint=f"one of {', '.join(POLICIES)}")
    known = {item.name: int if item.type == "int" else float for item in fields(kind) if item.init}
    given: dict[str, float] = {}
    for part in filter(None, settings.split(",")):
        key, _, value = map(str.strip, part.partition("="))
        if key not in known:
            hint = f"it knows {', '.join(known)}" if known else "it has no settings"
            raise UsageError(f"policy {name} has no setting {key!r}", hint=hint)
        if key in given:
            raise UsageError(f"policy {name}: {key} is given twice")
        try:
            given[key] = known[key](value)
        except ValueError:
            what = "a whole number" if known[key] is int else "a number"
            raise UsageError(f"policy {name}: {key}={value} must be {what}") from None
    if kind is LoadPolicy and "target_ms" not in given:
        raise UsageError(
            "policy load needs a target for the time per token", hint="for example load:target_ms=50, in milliseconds"
        )
    return kind(**given)
