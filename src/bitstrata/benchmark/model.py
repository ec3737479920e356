"""Whole models: tokens a second of greedy decoding, one sequence, at each bits in turn."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from random import Random

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from ..models import bytes_per_token
from ..models.compat import set_cached_length
from ..nn import bits_state
from ..runtime.batching import Sampler, Session, session_of
from .clock import captured, wait


@dataclass(frozen=True)
class ModelResult:
    """A model at `bits` (None: an unquantized twin in `name`). Times in seconds.

    bytes: that one token reads: planes and decoders of the quantized layers, and every other matrix.
    switch: time of changing to these bits between two tokens; None for a dense model, and for a graph of its own.
    """

    name: str
    bits: int | None
    bytes: int
    tokens_per_second: float
    floor_tokens_per_second: float
    share: float
    switch: float | None


class SessionDecoder:
    """A sequence being continued greedily, one token a step, by the steps that `generate` and chats are made of."""

    def __init__(self, own: Session, context: int, bits: int) -> None:
        self.model, self._own, self._bits = own.model, own, bits_state(own.model).resolve(bits)
        prompt = torch.arange(context).remainder(int(self.model.config.vocab_size)).tolist()
        sampler = Sampler(0.0, 1.0, Random())
        self._text = own.start(prompt, self._bits, reuse="off", most=sys.maxsize, sampler=sampler)
        self.step()

    def step(self) -> None:
        self._own.step(self._text, self._bits)

    def rewind(self) -> None:
        """It goes on where it was."""

    def prompt(self, tokens: int) -> None:
        """Another text of so many tokens, up to its first new one."""
        ids = torch.arange(tokens).remainder(int(self.model.config.vocab_size)).tolist()
        text = self._own.start(ids, self._bits, reuse="off", most=1, sampler=Sampler(0.0, 1.0, Random()))
        self._own.step(text, self._bits)
        self._own.finish(text)


class Decoder:
    """The same through the model's own forward and a cache of transformers: of dense models."""

    def __init__(self, model: PreTrainedModel, context: int, bits: int | Tensor | None) -> None:
        self.model, self.bits = model, bits
        self.cache = self._new_cache(context)
        ids = torch.arange(context, device=model.device).remainder(int(model.config.vocab_size)).unsqueeze(0)
        self.token = self._run(ids)

    def _new_cache(self, context: int) -> Cache:
        return DynamicCache(config=self.model.config)

    def _run(self, ids: Tensor) -> Tensor:
        extra = {} if self.bits is None else {"bits": self.bits}
        with torch.no_grad():
            out = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1, **extra)
        logits: Tensor = out.logits
        return logits[:, -1:].argmax(-1)

    def step(self) -> None:
        self.token = self._run(self.token)

    def rewind(self) -> None:
        """Start over where memory is bounded."""

    def prompt(self, tokens: int) -> None:
        """Another sequence of so many tokens, in the place of this one."""
        self.cache = self._new_cache(tokens)
        ids = torch.arange(tokens, device=self.model.device).remainder(int(self.model.config.vocab_size))
        self.token = self._run(ids.unsqueeze(0))


class StaticDecoder(Decoder):
    """The same in place, over a static cache with room for `room` tokens: a step can be captured in a CUDA graph.

    bits may be an integer tensor [1] on the model's device: a captured step then runs at what it holds at the time.
    """

    def __init__(self, model: PreTrainedModel, context: int, bits: int | Tensor | None, room: int) -> None:
        self.context, self.room = context, room
        super().__init__(model, context, bits)
        self.first = self.token.clone()

    def _new_cache(self, context: int) -> Cache:
        return StaticCache(config=self.model.config, max_cache_len=context + self.room)

    def step(self) -> None:
        self.token.copy_(self._run(self.token))

    def rewind(self) -> None:
        """Back to the end of the prompt; the addresses that a graph knows stay."""
        self.token.copy_(self.first)
        set_cached_length(self.cache, self.context)


@dataclass(frozen=True)
class _Run:
    """What is timed: `step` makes a token; `prepare` comes before a round. bits None: a dense model."""

    label: str
    bits: int | None
    decoder: Decoder | SessionDecoder
    step: Callable[[], object]
    prepare: Callable[[], object]
    switch: Callable[[], float] | None


def bench_model(
    model: PreTrainedModel,
    name: str,
    bits: Sequence[int],
    bytes_per_second: float,
    *,
    dense: PreTrainedModel | None = None,
    context: int = 64,
    tokens: int = 16,
    rounds: int = 5,
    kv_cache_dtype: str = "auto",
) -> list[ModelResult]:
    """Tokens a second of `model` at each of `bits`, and of `dense`, taking turns round by round.

    On a CPU a step is what `generate` runs. On a GPU it is a CUDA graph: one for each of `bits`, and one more that runs
    at any of them, whichever a tensor on the device holds, so that it survives a switch.
    """
    speeds: list[list[float]] = []
    with ExitStack() as stack:
        if model.device.type == "cuda":
            contenders = _graph_runs(model, name, bits, dense, context, tokens)
        else:
            contenders = _eager_runs(model, name, bits, dense, context, stack, kv_cache_dtype)
        speeds = [[] for _ in contenders]
        for _ in range(rounds):
            for index, run in enumerate(contenders):
                run.prepare()
                run.step()
                wait(model.device)
                started = time.perf_counter()
                for _ in range(tokens):
                    run.step()
                wait(model.device)
                speeds[index].append(tokens / (time.perf_counter() - started))
    results = []
    for run, samples in zip(contenders, speeds, strict=True):
        size = bytes_per_token(run.decoder.model, run.bits)
        speed, floor = statistics.median(samples), bytes_per_second / size
        switch = None if run.switch is None else run.switch()
        results.append(ModelResult(run.label, run.bits, size, speed, floor, speed / floor, switch))
    return results


def _eager_runs(
    model: PreTrainedModel,
    name: str,
    bits: Sequence[int],
    dense: PreTrainedModel | None,
    context: int,
    stack: ExitStack,
    kv_cache_dtype: str,
) -> list[_Run]:
    """`stack` ends what holds the model."""
    runs = []
    for value, decoder in zip(bits, decoders(model, context, bits, stack, kv_cache_dtype), strict=True):
        switch = partial(switch_time, model, value)
        runs.append(_Run(f"{name} {value} bits", value, decoder, decoder.step, decoder.rewind, switch))
    if dense is not None:
        own = Decoder(dense, context, None)
        runs.append(_Run(f"{name} {dtype_name(dense)}", None, own, own.step, own.rewind, None))
    return runs


def decoders(
    model: PreTrainedModel, context: int, bits: Sequence[int], stack: ExitStack, kv_cache_dtype: str = "auto"
) -> Sequence[SessionDecoder | Decoder]:
    """One for each of `bits`, all of the same quantized model, as `generate` runs it until `stack` is closed."""
    own = stack.enter_context(session_of(model, kv_cache_dtype))
    if not own.drafts:  # nothing can be taken back
        return [Decoder(model, context, value) for value in bits]
    return [SessionDecoder(own, context, value) for value in bits]


def _graph_runs(
    model: PreTrainedModel, name: str, bits: Sequence[int], dense: PreTrainedModel | None, context: int, tokens: int
) -> list[_Run]:
    room = tokens + 1

    def run(label: str, value: int | None, decoder: StaticDecoder) -> _Run:
        return _Run(f"{name} {label}", value, decoder, captured(decoder.step), decoder.rewind, None)

    runs = [run(f"{value} bits", value, StaticDecoder(model, context, value, room)) for value in bits]
    if dense is not None:
        runs.append(run(dtype_name(dense), None, StaticDecoder(dense, context, None, room)))
    anything = torch.tensor([max(bits)], dtype=torch.int32, device=model.device)
    shared = StaticDecoder(model, context, anything, room)
    step = captured(shared.step)

    def prepare(value: int) -> None:
        anything.fill_(value)
        shared.rewind()

    for value in bits:
        switch = partial(_fill_time, anything, value)
        label = f"{name} {value} bits, graph for any"
        runs.append(_Run(label, value, shared, step, partial(prepare, value), switch))
    return runs


def dtype_name(model: PreTrainedModel) -> str:
    return str(model.dtype).removeprefix("torch.").replace("bfloat16", "bf16")


def switch_time(model: nn.Module, bits: int, repeats: int = 1000) -> float:
    """Seconds to change a model's bits, the median of `repeats` changes back and forth."""
    state = bits_state(model)
    other = next((value for value in state.supported if value != bits), bits)
    before, samples = state.value, []
    for _ in range(repeats):
        state.value = other
        started = time.perf_counter()
        state.value = bits
        samples.append(time.perf_counter() - started)
    state.value = before
    return statistics.median(samples)


def _fill_time(held: Tensor, bits: int, repeats: int = 200) -> float:
    """Seconds that the host takes to ask for other bits of a graph, the median of `repeats`."""
    samples = []
    for _ in range(repeats):
        started = time.perf_counter()
        held.fill_(bits)
        samples.append(time.perf_counter() - started)
    return statistics.median(samples)
