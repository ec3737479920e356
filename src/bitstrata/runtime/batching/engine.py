"""Engine: a thread that runs many requests, each at its own bits, in common batches.

    engine = Engine(model, tokenizer)
    handle = engine.submit(Request(prompt_ids, bits=3))
    for event in handle.events(): ...
    engine.close()

A round of the thread: drop what was cancelled; admit waiting requests while there are places and room in the cache
(admission.py); let the policy choose the bits of those that may be lowered; pack what each has to feed into batches
(packing.py); run them, and give every request its next token.

Greedy tokens are those of `model.generate(bits=...)` alone. Settings of the model's generation config other than its
end-of-sequence tokens are applied where a request says so (model_rules).
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...errors import BitstrataError, ClosedError, ResourceError, UsageError
from ...models import Stops, end_tokens, input_device, score_rules, steady_context, vocabulary_size
from ...nn import Assignment, bits_state
from ...torch_state import ordinary_torch
from ..constraints import Constraint
from ..policy import LoadView, Policy
from .admission import Running, admit, grow
from .alone import passes
from .continuation import advance, pick
from .forward import steady_rows
from .lowering import Lowerings, see
from .masks import Grammars
from .memory import BLOCK, TokenPool
from .packing import Segment, pack
from .prefixes import Prefixes
from .request import REASONS, Event, Finished, Handle, Limits, Request, Scored, Token
from .rules import Rules, rules_of
from .sampling import Sampler
from .session import forget
from .stats import EngineStats, Pace

SCORED_BYTES = 64 * 2**20  # of logits after every token of prompts, in one batch


class Engine:
    """Runs requests on `model` until it is closed; a context manager too.

    Args:
        model: quantized, from `bitstrata.load`. It belongs to the engine until `close`.
        tokenizer: reads stop texts and constraints, which only requests with some need, replies for a policy that
            wants that, and says what else ends a text.
        max_requests: run at a time; others wait.
        max_batch_tokens: of prompts in one batch: longer prompts are fed in parts, between which others decode.
            By default 512, or max_requests if that is more.
        cache_tokens: room for the tokens of all running requests together, which they take as they go.
            By default 512 for each, or the model's context if that is less, and at least 2,048.
        max_waiting: requests that may wait for a place.
        policy: what lowers requests that have min_bits, for this engine alone; nothing by default.
        reuse: what of a prompt is not computed again if the cache still has it: "equal" what the same bits wrote, "any"
            what any bits wrote, "off" nothing.
        kv_cache_dtype: how the cache keeps keys and values: "auto" in the model's dtype, "int8" or "int4" as codes of
            so many bits (kernels/cached.py).

    `limits` says what requests it can take.

    Raises:
        UsageError: a model that is not quantized or that another engine holds; numbers or a kv_cache_dtype that
            cannot be used; a policy that reads texts without a tokenizer. BatchError, one of them: a kv_cache_dtype for
            a model that cannot run in batches.
        ResourceError: there is no memory for the cache, or for a batch.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        max_requests: int = 16,
        max_batch_tokens: int | None = None,
        cache_tokens: int | None = None,
        max_waiting: int = 1024,
        policy: Policy | None = None,
        reuse: str = "equal",
        kv_cache_dtype: str = "auto",
    ) -> None:
        self.model = model
        context = steady_context(model.config)
        if cache_tokens is None:
            cache_tokens = max(2048, max_requests * min(512, context or 512))
        self._steady = steady_rows(model)
        least = max(max_requests, 2 * (self._steady or 0) + 2)
        if max_batch_tokens is None:
            max_batch_tokens = max(512, least)
        for name, given, smallest in (
            ("max_requests", max_requests, 1),
            ("max_waiting", max_waiting, 1),
            ("max_batch_tokens", max_batch_tokens, least),
            ("cache_tokens", cache_tokens, 2 * BLOCK),
        ):
            if given < smallest:
                raise UsageError(f"{name}={given} cannot be used", hint=f"{name} must be at least {smallest}")
        self.max_requests, self.max_batch_tokens, self.max_waiting = max_requests, max_batch_tokens, max_waiting
        self._tokenizer, self._policy = tokenizer, policy or Policy()
        self._lowerings = Lowerings(self._policy, bits_state(model), tokenizer)
        self._pool = TokenPool(cache_tokens, kv_cache_dtype)
        forget(model)  # its cache of its own, from calls to generate
        self._prefixes = Prefixes(self._pool, self._steady, reuse)
        vocabulary = vocabulary_size(model.config)
        self.limits = Limits(bits_state(model), vocabulary, context, self._pool.tokens, tokenizer is not None)
        self._eos = end_tokens(model, tokenizer)
        self._grammars = Grammars(tokenizer, vocabulary, self._eos)
        self._has_rules = score_rules(model, [0], 1, self._eos, repetition_penalty=1.0) is not None
        self._stretch = max(SCORED_BYTES // (4 * vocabulary), 2 * (self._steady or 0) + 2)
        self._changed = threading.Condition()  # guards what follows, down to the counters
        self._waiting: dict[int, Running] = {}  # in the order in which they came
        self._running: dict[int, Running] = {}
        self._stalled: set[int] = set()  # of these, the ones that wait for room in the cache
        self._number = 0
        self._closing: str | None = None  # "drain" or "drop"
        self._failure: BaseException | None = None
        self._prompt_tokens = self._reused_tokens = self._new_tokens = self._batches = self._set_back = 0
        self._finished = Counter(dict.fromkeys(REASONS, 0))
        self._tokens_by_bits: Counter[str] = Counter()
        self._pace = Pace()
        with ordinary_torch(), torch.no_grad():
            self._forward = passes(model, self._pool)
        self._thread = threading.Thread(target=self._work, name="bitstrata-engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(drain=kind is None)

    def prepare(self, constraint: Constraint) -> tuple[str, ...]:
        """Compile `constraint` ahead of requests that have it; what of it will not be enforced, in words.

        From any thread. It may take half a second, which `submit` of the first such request would take otherwise.
        Raises UsageError if it cannot be used.
        """
        return self._grammars.compile(constraint)

    def submit(self, request: Request, listener: Callable[[Event], None] | None = None) -> Handle:
        """Queue `request`; from any thread.

        Args:
            listener: called with each event, in the engine's thread: it must return at once. If it raises, that
                ends the request with this error.

        Raises:
            UnsupportedBitsError, InputError, UsageError: as Limits.admit; nothing is queued.
            ClosedError: the engine is closed, or has failed.
            ResourceError: max_waiting requests wait already.
        """
        most = self.limits.admit(request)
        seed = request.seed if request.seed is not None else random.SystemRandom().getrandbits(64)
        numbers = random.Random(seed)
        sampler = Sampler(request.temperature, request.top_p, numbers, request.logprobs, request.top_k, request.min_p)
        texts = [stop for stop in request.stop if isinstance(stop, str)]
        stops = Stops(self._tokenizer, texts) if texts and self._tokenizer is not None else None
        ends = {stop for stop in request.stop if not isinstance(stop, str)}
        if not request.ignore_eos:
            ends |= self._eos
        rules = self._rules(request, most, ends)
        mask = None
        if request.constraint is not None:
            mask = self._grammars.mask(request.constraint, len(request.prompt_ids))
        lowering = self._lowerings.of(request.prompt_ids, request.min_bits)
        with self._changed:
            if self._failure is not None:
                raise ClosedError(f"the engine has failed: {self._failure!r}", hint="start another") from self._failure
            if self._closing is not None:
                raise ClosedError("the engine is closed", hint="start another")
            if len(self._waiting) >= self.max_waiting:
                raise ResourceError(f"{self.max_waiting} requests are waiting already", hint="try again later")
            handle = Handle(request, self._number, self.limits, listener, self._wake)
            self._number += 1
            item = Running(
                list(request.prompt_ids),
                most,
                sampler,
                frozenset(ends),
                stops,
                rules=rules,
                mask=mask,
                scores=request.prompt_logprobs,
                handle=handle,
                lowering=lowering,
            )
            self._waiting[handle.number] = item
            self._changed.notify_all()
        return handle

    def _rules(self, request: Request, most: int, ends: set[int]) -> Rules | None:
        """What is done to the logits of `request` before its tokens are picked."""
        own = None
        if request.model_rules and self._has_rules:
            own = score_rules(self.model, list(request.prompt_ids), most, ends, repetition_penalty=1.0)
        return rules_of(request, ends, input_device(self.model), own)

    @property
    def is_open(self) -> bool:
        """Whether it takes requests: it was not closed and has not failed."""
        return self._closing is None and self._failure is None

    def stats(self) -> EngineStats:
        """What the engine is doing now; from any thread."""
        with self._changed:
            return EngineStats(
                running=len(self._running),
                waiting=len(self._waiting),
                cache_tokens=self._pool.tokens,
                cache_used_tokens=self._pool.used_tokens - self._prefixes.tokens,
                cache_kept_tokens=self._prefixes.tokens,
                cache_bytes=self._pool.bytes,
                time_per_token=self._pace.mean,
                prompt_tokens=self._prompt_tokens,
                reused_tokens=self._reused_tokens,
                new_tokens=self._new_tokens,
                tokens_by_bits=dict(sorted(self._tokens_by_bits.items())),
                batches=self._batches,
                set_back=self._set_back,
                finished=dict(self._finished),
            )

    def close(self, drain: bool = True) -> None:
        """Take no more requests, finish those there are or, without `drain`, cancel them, and give the model back.

        Returns when the thread has ended. Closing again does nothing, except that drain=False cuts a drain short.
        """
        with self._changed:
            if self._closing != "drop":
                self._closing = "drain" if drain else "drop"
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    # Below here: the engine's thread only.

    def _work(self) -> None:
        try:
            if self._forward.model.device.type == "cuda":  # a thread starts on the first one
                torch.cuda.set_device(self._forward.model.device)
            with torch.no_grad():  # for this thread
                while self._next_round():
                    self._round()
        except BaseException as error:
            with self._changed:
                self._failure = error
            for item in [*self._running.values(), *self._waiting.values()]:
                self._end(item, Finished("error", error if isinstance(error, Exception) else RuntimeError(repr(error))))
        finally:
            self._forward.detach()
            self._pool.clear()

    def _next_round(self) -> bool:
        """Wait for work, drop what was cancelled and admit what fits; False when there is nothing left to do."""
        with self._changed:
            if not (self._running or self._waiting):
                self._pace.clear()
            self._changed.wait_for(lambda: self._running or self._waiting or self._closing)
            everything = [*self._running.values(), *self._waiting.values()]
            drop = self._closing == "drop"
        for item in everything:
            if item.handle._listener_error is not None:
                self._end(item, Finished("error", item.handle._listener_error))
            elif drop or item.handle.cancelled:
                self._end(item, Finished("cancelled"))
        with self._changed:
            stalled, back = grow(self._running.values(), self._prefixes)
            self._stalled = {item.handle.number for item in stalled}
            self._set_back += len(back)
            for item in back:
                self._waiting[item.handle.number] = self._running.pop(item.handle.number)
            if back:  # they came before those that wait
                self._waiting = dict(sorted(self._waiting.items()))
            if not self._stalled:
                places = self.max_requests - len(self._running)
                for item in admit(self._waiting, self._prefixes, places, self._running.values(), self._first_bits):
                    self._running[item.handle.number] = self._waiting.pop(item.handle.number)
                    if not item.set_back:
                        self._prompt_tokens += len(item.tokens)
                        self._reused_tokens += item.reused
                        item.handle.reused_tokens = item.reused
        assert not self._running or len(self._stalled) < len(self._running), "alone, a request has room"
        return bool(self._running or self._waiting) or self._closing is None

    def _round(self) -> None:
        started = time.monotonic()
        decoding = any(item.new for item in self._running.values())
        segments = [
            item.segment(number, bits)
            for (number, item), bits in zip(self._running.items(), self._bits(started), strict=True)
            if number not in self._stalled
        ]
        most = self.max_batch_tokens if self._forward.splits else self._pool.tokens
        for batch in pack(segments, most, self._steady, self._stretch):
            try:
                self._run(batch)
            except Exception as error:  # out of memory, say: these requests end, the others go on
                for segment in batch:
                    if segment.owner in self._running:
                        self._end(self._running[segment.owner], Finished("error", error))
        if decoding:  # whoever was decoding waited this long for its token
            with self._changed:
                self._pace.add(time.monotonic() - started)

    def _bits(self, now: float) -> list[Assignment]:
        """At what the running requests run in the round that begins now."""
        running = list(self._running.values())
        asked = [item.handle._bits for item in running]
        views = [item.lowering.view(item, bits) for item, bits in zip(running, asked, strict=True)]
        with self._changed:
            waiting = len(self._waiting)
        most = max((len(view.ladder) - 1 for view in views if view is not None), default=0)
        self._policy.observe(LoadView(now, waiting, self._pace.mean, most))
        chosen = [item.lowering.bits(bits, view) for item, bits, view in zip(running, asked, views, strict=True)]
        if self._pool.kept_as == "beginning":
            for item, bits in zip(running, chosen, strict=True):
                item.lowering.mend(item, bits)
        return chosen

    def _first_bits(self, item: Running) -> Assignment:
        """At what the prompt of `item` would be computed if it began now."""
        return item.lowering.first(item, item.handle._bits)

    def _run(self, batch: list[Segment]) -> None:
        items = [self._running[segment.owner] for segment in batch]
        logits = advance(self._forward, items, batch)
        with self._changed:
            self._batches += 1
        rows = [row for row, part in enumerate(batch) if part.is_last]
        if not rows:
            return
        for row in rows:
            self._emit_scored(items[row])
        rows = [row for row in rows if self._running.get(batch[row].owner) is items[row]]
        if not rows:
            return
        logits = logits if len(rows) == len(batch) else logits[rows]
        see(logits, [items[row].lowering for row in rows])
        chosen = pick(logits, [items[row] for row in rows])
        for row, token in zip(rows, chosen, strict=True):
            if isinstance(token, BitstrataError):
                self._end(items[row], Finished("error", token))
            else:
                bits = batch[row].bits.given
                self._add(items[row], replace(token, bits=bits if isinstance(bits, int) else None))

    def _emit_scored(self, item: Running) -> None:
        """Give out the log-probabilities of a prompt, once; a request that asks for nothing else then ends."""
        if not item.scored:
            return
        item.handle._emit(Scored(tuple(item.scored)))
        item.scored, item.scores = [], None
        if item.handle.request.max_new_tokens == 0:
            self._end(item, Finished("length"))

    def _add(self, item: Running, token: Token) -> None:
        item.add(token.id)
        item.lowering.add(token.id)
        with self._changed:
            self._new_tokens += 1
            self._tokens_by_bits["plan" if token.bits is None else str(token.bits)] += 1
        item.handle._emit(token)
        try:
            reason = item.ended()
        except Exception as error:  # the tokenizer's, about the tokens of this request alone
            self._end(item, Finished("error", error))
            return
        if reason is not None:
            self._end(item, Finished(reason))

    def _end(self, item: Running, event: Finished) -> None:
        with self._changed:
            self._prefixes.keep(item)
            if self._running.pop(item.handle.number, None) is None:
                del self._waiting[item.handle.number]
            self._finished[event.reason] += 1
        item.handle._emit(event)
