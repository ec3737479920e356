"""Whole models: tokens a second of greedy decoding, one sequence, at each bits in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from ..models import bytes_per_token
from ..nn import bits_state


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


class Decoder:
    """A sequence being continued greedily, one token a step."""

    def __init__(self, model: PreTrainedModel, context: int, bits: int | None) -> None:
        self.model, self.bits = model, bits
        self.cache = DynamicCache(config=model.config)
        ids = torch.arange(context).remainder(int(model.config.vocab_size)).unsqueeze(0)
        self.token = self._run(ids)

    def _run(self, ids: torch.Tensor) -> torch.Tensor:
        extra = {} if self.bits is None else {"bits": self.bits}
        with torch.no_grad():
            out = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1, **extra)
        return out.logits[:, -1:].argmax(-1)

    def step(self) -> None:
        self.token = self._run(self.token)


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
) -> list[ModelResult]:
    """Tokens a second of `model` at each of `bits`, and of `dense`, taking turns round by round."""
    decoders: list[tuple[str, Decoder]] = [(f"{name} {value} bits", Decoder(model, context, value)) for value in bits]
    if dense is not None:
        decoders.append((f"{name} {dtype_name(dense)}", Decoder(dense, context, None)))
    speeds: list[list[float]] = [[] for _ in decoders]
    for _ in range(rounds):
        for index, (_, decoder) in enumerate(decoders):
            decoder.step()
            started = time.perf_counter()
            for _ in range(tokens):
                decoder.step()
            speeds[index].append(tokens / (time.perf_counter() - started))
    results = []
    for (label, decoder), samples in zip(decoders, speeds, strict=True):
        size = bytes_per_token(decoder.model, decoder.bits)
        speed, floor = statistics.median(samples), bytes_per_second / size
        switch = None if decoder.bits is None else switch_time(model, decoder.bits)
        results.append(ModelResult(label, decoder.bits, size, speed, floor, speed / floor, switch))
    return results


def dtype_name(model: PreTrainedModel) -> str:
    return str(model.dtype).removeprefix("torch.").replace("bfloat16", "bf16")


def switch_time(model: nn.Module, bits: int, repeats: int = 1000) -> float:
    """Seconds to change a model's bits, the median of `repeats` changes back and forth."""
    state = bits_state(model)
    other = next((value for value in state.supported if value != bits), bits)
    before, samples = state.value, []
    for _ in range(repeats):
        state.set(other)
        started = time.perf_counter()
        state.set(bits)
        samples.append(time.perf_counter() - started)
    state.value = before
    return statistics.median(samples)
