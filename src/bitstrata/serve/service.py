"""What the parts of one running server share: the names it serves, its limits, what /metrics tells."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from transformers import PreTrainedTokenizerBase

from ..errors import UnsupportedBitsError, UsageError
from ..models import SamplingDefaults, bytes_per_token
from ..nn import Assignment, BitsState
from ..runtime import Constraint, Engine
from .errors import ApiError, translate
from .fields import Body, Notice
from .notices import Notices, Told
from .replies import ModelCard
from .settings import FROM_MODEL, Settings
from .text import PromptEncoder, TokenNames

FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)  # seconds
COMPILED_AT_ONCE = 2  # constraints
PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Service:
    """Lives in one event loop; the engine has a thread of its own.

    active: HTTP requests under way. closing: no new ones are taken.
    Raises UnsupportedBitsError or UsageError if settings.bits or a plan is not of the engine's model, InputError for
    numbers in its generation config that nobody can sample by.
    """

    def __init__(self, engine: Engine, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> None:
        self.engine, self.tokenizer, self.settings = engine, tokenizer, settings
        self.catalog = Catalog(engine, settings, has_template=bool(tokenizer.chat_template))
        self.metrics = Metrics(engine)
        self.names = TokenNames(tokenizer)
        longest = engine.limits.longest - 1  # a new token at least must find room
        self.prompts = PromptEncoder(tokenizer, min(longest, settings.max_prompt_tokens or longest))
        self.has_model_rules = settings.generation_config == FROM_MODEL
        self.defaults = SamplingDefaults.of(engine.model.generation_config if self.has_model_rules else None)
        self._told = Told()
        self._compiling = ThreadPoolExecutor(COMPILED_AT_ONCE, thread_name_prefix="bitstrata-grammars")
        self.active = 0
        self.closing = False

    def notices(self, body: Body) -> Notices:
        """What is to be told of a request with this body. Raises ApiError for anything if the server is strict."""
        found = Notices(self.settings.strict, self._told)
        found.extend(body.notices)
        return found

    async def echo(self, prompts: Sequence[Sequence[int]]) -> list[list[str]]:
        """What the tokens of each prompt add to its text. Raises ApiError for a prompt that is too long anyway."""
        for prompt in prompts:
            self.engine.limits.room(len(prompt))
            for token in prompt:
                self.engine.limits.check_token(token)
        return await self.prompts.pieces(prompts)

    async def prepare(self, field: str, constraint: Constraint, notices: Notices) -> None:
        """Compile a constraint, aside of the event loop. Raises ApiError 400 for one that cannot be used."""
        running = asyncio.get_running_loop()
        try:
            unenforced = await running.run_in_executor(self._compiling, self.engine.prepare, constraint)
        except UsageError as error:
            raise ApiError(400, f"{field}: {error.sentence}", param=field) from error
        for said in unenforced:
            notices.add(Notice(field, f"{field} is not enforced in full: {said}", f"{field}: {said}"))

    def check_choices(self, prompts: int, count: int) -> None:
        """Raises ApiError if `count` replies to each of `prompts` prompts are too many for one request."""
        most = min(self.settings.max_choices, self.engine.max_waiting)
        if prompts * count > most:
            raise ApiError(400, f"prompts times n is {prompts * count}; at most {most} go into one request", param="n")

    @property
    def state(self) -> Literal["ok", "closing", "failed"]:
        """Whether new requests are taken, and if not, why."""
        if self.closing:
            return "closing"
        return "ok" if self.engine.is_open else "failed"


class Catalog:
    """The names a model is served under: `name` as it runs by default, `name:BITS`, and `name:PLAN` for named plans.

    precisions: what requests may choose: bits under themselves, plans under their names. Empty for a model that holds
    one plan's pages and runs nothing else. default: of `name` alone.
    """

    def __init__(self, engine: Engine, settings: Settings, *, has_template: bool) -> None:
        self.name, self._engine, self._settings = settings.name, engine, settings
        self.precisions = _precisions(engine.limits.state, settings)
        self._created, self._has_template = int(time.time()), has_template

    @property
    def default(self) -> Assignment:
        bits = self._settings.bits
        return self._engine.limits.state.resolve(None) if bits is None else self.precisions[bits]

    @property
    def cards(self) -> list[ModelCard]:
        """One for each name."""
        named = {self.name: self.default, **{f"{self.name}:{key}": value for key, value in self.precisions.items()}}
        return [
            ModelCard(
                id=name,
                created=self._created,
                bits=precision.given if isinstance(precision.given, int) else None,
                bytes_per_token=bytes_per_token(self._engine.model, precision.given),
                max_model_len=self._engine.limits.longest,
                chat_template=self._has_template,
            )
            for name, precision in named.items()
        ]

    def card(self, name: str) -> ModelCard:
        """Raises ApiError 404 for a name that is not served."""
        for card in self.cards:
            if card.id == name:
                return card
        raise self._unknown(name)

    def precision(self, model: str | None, bits: int | str | None) -> Assignment:
        """What a request asks for, by its model's name and its field `bits`.

        Raises ApiError: 404 for an unknown name, 400 for bits that the model does not have or that contradict.
        """
        named: int | str | None = None
        if model is not None and model != self.name:
            head, _, tail = model.rpartition(":")
            named = int(tail) if tail.isascii() and tail.isdigit() and len(tail) <= 3 else tail
            if head != self.name or (isinstance(named, str) and named not in self.precisions):
                raise self._unknown(model)
        if named is not None and bits is not None and named != bits:
            raise ApiError(400, f"model says {named} and bits says {bits}; give one of them", param="bits")
        wanted = named if named is not None else bits
        if wanted is None:
            return self.default
        if wanted in self.precisions:
            return self.precisions[wanted]
        if isinstance(wanted, int) and self._supported:
            raise translate(UnsupportedBitsError(wanted, self._supported))
        names = ", ".join(str(key) for key in self.precisions)
        hint = f"there are {names}" if names else "this server holds one plan's pages and runs nothing else"
        raise ApiError(400, f"bits {wanted} cannot be used: {hint}", param="bits", code="unsupported_bits")

    def min_bits(self, precision: Assignment, asked: int | None) -> int | None:
        """How far a policy may lower a request at `precision` that asks for `asked`.

        Raises ApiError for bits that the model does not have.
        """
        if asked is None:
            least = self._settings.min_bits
            bits = precision.given
            return min(bits, least) if least is not None and isinstance(bits, int) else None
        if asked not in self.precisions:
            supported = ", ".join(map(str, self._supported)) or "none"
            message = f"min_bits={asked} is not available; supported bits: {supported}"
            raise ApiError(400, message, param="min_bits", code="unsupported_bits")
        return asked

    @property
    def _supported(self) -> list[int]:
        return [key for key in self.precisions if isinstance(key, int)]

    def _unknown(self, model: str) -> ApiError:
        names = ", ".join([self.name, *(f"{self.name}:{key}" for key in self.precisions)])
        message = f"there is no model {model!r} here; there are {names}"
        return ApiError(404, message, param="model", code="model_not_found")


def _precisions(state: BitsState, settings: Settings) -> dict[int | str, Assignment]:
    """What requests may choose. Raises UnsupportedBitsError and UsageError for settings that do not fit the model."""
    if state.plan is not None:
        if settings.bits is not None or settings.min_bits is not None or settings.plans:
            raise UsageError("a model that holds one plan's pages runs nothing else", hint="leave bits and plans out")
        return {}
    if settings.min_bits is not None and settings.min_bits not in state.supported:
        supported = ", ".join(map(str, state.supported))
        raise UsageError(f"min_bits={settings.min_bits} is not available", hint=f"supported bits: {supported}")
    found: dict[int | str, Assignment] = {bits: state.resolve(bits) for bits in state.supported}
    found.update({name: state.resolve(replace(plan, name=name)) for name, plan in settings.plans.items()})
    if isinstance(settings.bits, int) and settings.bits not in found:
        raise UnsupportedBitsError(settings.bits, state.supported)
    if settings.bits is not None and settings.bits not in found:
        raise UsageError(f"there is no plan {settings.bits!r}", hint=f"plans: {', '.join(settings.plans) or 'none'}")
    return found


class Metrics:
    """What /metrics tells Prometheus. Every server has a registry of its own.

    Requests here are the engine's: one for each choice. What was refused before that shows in
    `bitstrata_http_responses_total`.
    """

    def __init__(self, engine: Engine) -> None:
        self._registry = registry = CollectorRegistry()
        registry.register(_EngineCollector(engine))
        self.responses = Counter(
            "bitstrata_http_responses", "Responses by path and status.", ["path", "status"], registry=registry
        )
        self.tokens = Counter(
            "bitstrata_tokens_by_bits", "New tokens by the bits that computed them.", ["bits"], registry=registry
        )
        self.first_token = Histogram(
            "bitstrata_time_to_first_token_seconds",
            "From when a request enters the queue to its first new token.",
            buckets=FIRST_TOKEN,
            registry=registry,
        )
        self.per_token = Histogram(
            "bitstrata_time_per_output_token_seconds",
            "Mean time between the tokens of a finished request.",
            buckets=PER_TOKEN,
            registry=registry,
        )

    def render(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """The engine's own numbers, asked for when they are read."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        outcomes = CounterMetricFamily("bitstrata_requests", "Finished requests by outcome.", labels=["outcome"])
        for reason, count in stats.finished.items():
            outcomes.add_metric([reason], count)
        yield outcomes
        yield CounterMetricFamily("bitstrata_prompt_tokens", "Tokens of admitted prompts.", stats.prompt_tokens)
        yield CounterMetricFamily("bitstrata_reused_tokens", "Of these, in the cache already.", stats.reused_tokens)
        yield CounterMetricFamily("bitstrata_new_tokens", "Tokens made.", stats.new_tokens)
        yield CounterMetricFamily("bitstrata_batches", "Batches run.", stats.batches)
        yield CounterMetricFamily(
            "bitstrata_preemptions", "Times that a request left the cache to an older one.", stats.set_back
        )
        yield GaugeMetricFamily("bitstrata_requests_running", "Requests that are being served.", stats.running)
        yield GaugeMetricFamily("bitstrata_requests_waiting", "Requests in the queue.", stats.waiting)
        yield GaugeMetricFamily("bitstrata_cache_tokens", "Room in the cache, in tokens.", stats.cache_tokens)
        yield GaugeMetricFamily("bitstrata_cache_used_tokens", "Of it, reserved now.", stats.cache_used_tokens)
        yield GaugeMetricFamily("bitstrata_cache_kept_tokens", "Of ended requests.", stats.cache_kept_tokens)
        yield GaugeMetricFamily("bitstrata_cache_bytes", "Memory of the cache.", stats.cache_bytes)
