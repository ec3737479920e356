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
from ..runtime.batching import Sampler, Session, captured, session_of
from .clock import wait


@dataclass(frozen=True)
class ModelResult:
    """A model at `bits` (None: an unquantized twin in `name`). Times in seconds.

    bytes: that one token reads: planes and decoders of the quantized layers, and every other matrix.
    switch: time of changing to these bits between two tokens; None for a dense model.
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

    def __init__(self, model: PreTrainedModel, context: int, bits: int | None) -> None:
        self.model, self.bits = model, bits
        self.cache = self._new_cache(context)
        ids = torch.arange(context, device=model.device).remainder(int(model.config.vocab_size)).unsqueeze(0)
        self.token = self._run(ids)

    def _new_cache(self, context: int) -> Cache:
        return DynamicCache(config=self.model.config)

    def _run(self, ids: Tensor) -> Tensor:
        extra: dict[str, object] = {} if self.bits is None else {"bits": self.bits}
        if ids.shape[1] > 1:  # an index, not a count: torch takes 20 times as long for the head of a slice in bf16
            extra["logits_to_keep"] = torch.tensor([ids.shape[1] - 1], device=ids.device)
        with torch.no_grad():
            out = self.model(ids, past_key_values=self.cache, use_cache=True, **extra)
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
    """The same of a dense model in place, over a static cache with room for `room` tokens: a step is a CUDA graph."""

    def __init__(self, model: PreTrainedModel, context: int, room: int) -> None:
        self.context, self.room = context, room
        super().__init__(model, context, None)
        self.first = self.token.clone()
        self._replay, _ = captured(self.in_place)

    def _new_cache(self, context: int) -> Cache:
        return StaticCache(config=self.model.config, max_cache_len=context + self.room)

    def in_place(self) -> None:
        """What is recorded."""
        self.token.copy_(self._run(self.token))

    def step(self) -> None:
        self._replay()

    def rewind(self) -> None:
        """Back to the end of the prompt; the addresses that a graph knows stay."""
        self.token.copy_(self.first)
        set_cached_length(self.cache, self.context)


@dataclass(frozen=True)
class _Run:
    """What is timed. bits None: a dense model."""

    label: str
    bits: int | None
    decoder: Decoder | SessionDecoder
    switch: Callable[[], float] | None = None


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

    A step is what `generate` runs: a native call on a CPU, a CUDA graph on a GPU, the same at all bits. There `dense`
    runs over transformers' static cache, a step a graph too.
    """
    speeds: list[list[float]] = []
    with ExitStack() as stack:
        contenders = _runs(model, name, bits, dense, context, tokens, stack, kv_cache_dtype)
        speeds = [[] for _ in contenders]
        for _ in range(rounds):
            for index, run in enumerate(contenders):
                run.decoder.rewind()
                run.decoder.step()
                wait(model.device)
                started = time.perf_counter()
                for _ in range(tokens):
                    run.decoder.step()
                wait(model.device)
                speeds[index].append(tokens / (time.perf_counter() - started))
    results = []
    for run, samples in zip(contenders, speeds, strict=True):
        size = bytes_per_token(run.decoder.model, run.bits)
        speed, floor = statistics.median(samples), bytes_per_second / size
        switch = None if run.switch is None else run.switch()
        results.append(ModelResult(run.label, run.bits, size, speed, floor, speed / floor, switch))
    return results


def _runs(
    model: PreTrainedModel,
    name: str,
    bits: Sequence[int],
    dense: PreTrainedModel | None,
    context: int,
    tokens: int,
    stack: ExitStack,
    kv_cache_dtype: str,
) -> list[_Run]:
    """`stack` ends what holds the model."""
    runs = []
    for value, decoder in zip(bits, decoders(model, context, bits, stack, kv_cache_dtype), strict=True):
        runs.append(_Run(f"{name} {value} bits", value, decoder, partial(switch_time, model, value)))
    if dense is not None:
        on_gpu = dense.device.type == "cuda"
        own = StaticDecoder(dense, context, tokens + 1) if on_gpu else Decoder(dense, context, None)
        runs.append(_Run(f"{name} {dtype_name(dense)}", None, own))
    return runs


def decoders(
    model: PreTrainedModel, context: int, bits: Sequence[int], stack: ExitStack, kv_cache_dtype: str = "auto"
) -> Sequence[SessionDecoder | Decoder]:
    """One for each of `bits`, all of the same quantized model, as `generate` runs it until `stack` is closed."""
    own = stack.enter_context(session_of(model, kv_cache_dtype))
    if not own.drafts:  # nothing can be taken back
        return [Decoder(model, context, value) for value in bits]
    return [SessionDecoder(own, context, value) for value in bits]


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
