"""The next token of each request from its own logits, at its own temperature, top_p and random numbers.

A sampled token is where one uniform number falls among the cumulative probabilities of the tokens, likeliest first. The
number comes from the request's own generator, one a token, so a seeded request draws the same ones in any batch.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import CheckError
from .request import Token


@dataclass(frozen=True)
class Sampler:
    """How one request picks tokens. temperature 0 is greedy; `random` gives one number a sampled token."""

    temperature: float
    top_p: float
    random: random.Random
    logprobs: int | None = None


def choose(logits: Tensor, samplers: Sequence[Sampler]) -> list[Token | CheckError]:
    """One token a row of logits [rows, V] (float32), with log-probabilities where the sampler asks for them.

    A row with no usable maximum gets a CheckError in its place.
    """
    best, tokens = logits.max(dim=-1)
    usable = best.isfinite().tolist()
    sampled = [row for row, sampler in enumerate(samplers) if sampler.temperature > 0 and usable[row]]
    if sampled:
        tokens[sampled] = _sample(logits[sampled], [samplers[row] for row in sampled])
    taken = tokens.tolist()
    choices: list[Token | CheckError] = []
    for row, sampler in enumerate(samplers):
        if not usable[row]:
            choices.append(CheckError("the model's logits are not finite", hint="try more bits or another dtype"))
        elif sampler.logprobs is None:
            choices.append(Token(taken[row]))
        else:
            choices.append(_with_logprobs(logits[row], taken[row], sampler.logprobs))
    return choices


def normalised_entropy(logits: Tensor) -> Tensor:
    """How flat the distribution of each row is, -sum_v p ln p / ln V: 0 for one certain token, 1 for all alike.

    logits: float32 [rows, V]; returns float32 [rows].
    """
    entropy: Tensor = torch.special.entr(torch.softmax(logits, dim=-1)).sum(dim=-1)
    return entropy / math.log(max(2, logits.shape[-1]))


def likeliest_first(logits: Tensor, samplers: Sequence[Sampler]) -> tuple[Tensor, Tensor]:
    """What is sampled from: probabilities [rows, V], 0 beyond top_p and not adding up to 1, and their tokens."""
    device = logits.device
    temperature = torch.tensor([[item.temperature] for item in samplers], dtype=torch.float64, device=device)
    top_p = torch.tensor([[item.top_p] for item in samplers], dtype=torch.float64, device=device)
    # a tiny temperature must not turn the largest logits into infinities: their difference to the maximum counts
    centred = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # float64: in float32 1e-50 would be 0
    probability, order = torch.softmax(centred, dim=-1).sort(dim=-1, descending=True, stable=True)
    reached = probability.cumsum(dim=-1)
    kept = reached - probability < top_p  # the likeliest always stays
    return torch.where(kept, probability, 0.0), order


def place_of(probability: Tensor, uniform: Tensor) -> Tensor:
    """Where `uniform` [rows, 1] falls among probabilities [rows, V] that need not add up to 1: places [rows, 1]."""
    reached = probability.cumsum(dim=-1)
    place = torch.searchsorted(reached, uniform * reached[:, -1:], right=True)
    last = torch.where(probability > 0, torch.arange(probability.shape[1], device=probability.device), 0).amax(-1)
    return torch.minimum(place, last[:, None])


def _sample(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """Tokens [rows] for logits [rows, V]."""
    probability, order = likeliest_first(logits, samplers)
    uniform = torch.tensor([[item.random.random()] for item in samplers], dtype=torch.float64, device=logits.device)
    return order.gather(1, place_of(probability, uniform)).squeeze(1)


def _with_logprobs(logits: Tensor, token: int, count: int) -> Token:
    values = torch.log_softmax(logits, dim=-1)
    top: tuple[tuple[int, float], ...] = ()
    if count:
        largest, ids = values.topk(count)
        top = tuple(zip(ids.tolist(), largest.tolist(), strict=True))
    return Token(token, logprob=float(values[token]), top=top)
