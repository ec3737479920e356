"""Several sequences at once, each continued greedily: tokens a second of all together, taking turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from bitstrata.runtime import Engine, Request
from bitstrata.runtime.batching import Event, Token


class Batch(Protocol):
    """`run` continues `count` sequences of `context` tokens by `tokens` each: tokens a second, prompts left out."""

    name: str
    bits: int | None

    def run(self, count: int, context: int, tokens: int) -> float: ...


def prompts(count: int, context: int, vocabulary: int) -> list[list[int]]:
    """Sequences that differ in every place."""
    return [[(place * 31 + index * 977) % vocabulary for place in range(context)] for index in range(count)]


class EngineBatch:
    """Ours, through the engine: the tokens made while all sequences were decoding."""

    def __init__(self, engine: Engine, bits: int) -> None:
        self.name, self.bits, self._engine = f"ours {bits} bits", bits, engine

    def run(self, count: int, context: int, tokens: int) -> float:
        times: list[list[float]] = [[] for _ in range(count)]

        def listener(mine: list[float]) -> Callable[[Event], None]:
            return lambda event: mine.append(time.perf_counter()) if isinstance(event, Token) else None

        handles = [
            self._engine.submit(
                Request(prompt, bits=self.bits, max_new_tokens=tokens + 1, ignore_eos=True), listener=listener(mine)
            )
            for prompt, mine in zip(prompts(count, context, self._engine.limits.vocabulary), times, strict=True)
        ]
        for handle in handles:
            handle.result(600)
        first, last = max(mine[0] for mine in times), min(mine[-1] for mine in times)
        return sum(first < at <= last for mine in times for at in mine) / (last - first)


class DenseBatch:
    """torch's, through transformers."""

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        self.name, self.bits, self._model = name, None, model

    @torch.no_grad()
    def run(self, count: int, context: int, tokens: int) -> float:
        cache = DynamicCache(config=self._model.config)
        ids = torch.tensor(prompts(count, context, int(self._model.config.vocab_size)))
        step = self._step(ids, cache)
        started = time.perf_counter()
        for _ in range(tokens):
            step = self._step(step, cache)
        return count * tokens / (time.perf_counter() - started)

    def _step(self, ids: Tensor, cache: DynamicCache) -> Tensor:
        logits: Tensor = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1:].argmax(-1)


def race(contenders: Sequence[Batch], counts: Sequence[int], rounds: int, context: int, tokens: int) -> list[Any]:
    """Tokens a second at each number of sequences, medians of rounds in which they take turns."""
    rows: list[Any] = []
    for count in counts:
        speeds: list[list[float]] = [[] for _ in contenders]
        for turn in range(rounds + 1):  # the first warms up
            for contender, samples in zip(contenders, speeds, strict=True):
                speed = contender.run(count, context, tokens)
                if turn:
                    samples.append(speed)
        medians = [statistics.median(samples) for samples in speeds]
        ours = {item.bits: speed for item, speed in zip(contenders, medians, strict=True) if "ours" in item.name}
        for contender, speed in zip(contenders, medians, strict=True):
            mine = None if "ours" in contender.name else ours.get(contender.bits)
            rows.append(
                {
                    "model": contender.name,
                    "sequences": count,
                    "tokens_per_second": round(speed, 2),
                    "ours_times_faster": None if mine is None else round(mine / speed, 3),
                }
            )
    return rows
