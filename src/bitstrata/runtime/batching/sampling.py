"""The next token of each request from its own logits, at its own temperature, top_k, top_p, min_p and random numbers.

What is sampled from is what transformers' warpers leave of softmax(logits / temperature), in its order: the top_k
likeliest; of these, the likeliest until their share reaches top_p; of these, what is at least min_p times as likely as
the likeliest. All three are cuts of one sorted row.

A sampled token is where one uniform number falls among the cumulative probabilities of the tokens, likeliest first. The
number comes from the request's own generator, one a token, so a seeded request draws the same ones in any batch.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from ...errors import CheckError
from .request import Token


@dataclass(frozen=True)
class Sampler:
    """How one request picks tokens. temperature 0 is greedy; `random` gives one number a sampled token.

    top_k 0 and min_p 0 leave all tokens.
    """

    temperature: float
    top_p: float
    random: random.Random
    logprobs: int | None = None
    top_k: int = 0
    min_p: float = 0.0


def choose(
    logits: Tensor,
    samplers: Sequence[Sampler],
    own: Mapping[int, Tensor] = MappingProxyType({}),
    among: Mapping[int, Tensor] = MappingProxyType({}),
) -> list[Token | CheckError]:
    """One token a row of logits [rows, V] (float32), with log-probabilities where the sampler asks for them.

    Args:
        own: logits [V] whose log-probabilities are asked for, of rows where they are others.
        among: int64 [n] for rows whose token is one of these n, in ascending order. They are picked from as if all
            others were -inf, without a look at the others.

    A row with no usable maximum gets a CheckError in its place.
    """
    rows = [row for row in range(len(samplers)) if row not in among]
    whole = logits if not among else logits[rows]
    taken = dict(zip(rows, _pick(whole, [samplers[row] for row in rows]) if rows else (), strict=True))
    for row, tokens in among.items():
        if len(tokens) == 1:
            if samplers[row].temperature > 0:
                samplers[row].random.random()  # one number a token, whatever the others may be
            taken[row] = int(tokens) if bool(logits[row, tokens].isfinite()) else None
            continue
        (place,) = _pick(logits[row, tokens][None], [samplers[row]])
        taken[row] = None if place is None else int(tokens[place])
    choices: list[Token | CheckError] = []
    for row, sampler in enumerate(samplers):
        token = taken[row]
        if token is None:
            choices.append(CheckError("the model's logits are not finite", hint="try more bits or another dtype"))
        elif sampler.logprobs is None:
            choices.append(Token(token))
        else:
            choices.append(_with_logprobs(own.get(row, logits[row]), token, sampler.logprobs))
    return choices


def _pick(logits: Tensor, samplers: Sequence[Sampler]) -> list[int | None]:
    """A place in each row of logits [rows, n]; None for a row whose maximum is no number."""
    best, places = logits.max(dim=-1)
    usable = best.isfinite().tolist()
    sampled = [row for row, sampler in enumerate(samplers) if sampler.temperature > 0 and usable[row]]
    if sampled:
        places[sampled] = _sample(logits[sampled], [samplers[row] for row in sampled])
    return [place if good else None for place, good in zip(places.tolist(), usable, strict=True)]


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
    if any(item.top_k for item in samplers):
        vocabulary = probability.shape[-1]
        top_k = torch.tensor([[item.top_k or vocabulary] for item in samplers], device=device)
        probability = torch.where(torch.arange(vocabulary, device=device) < top_k, probability, 0.0)
        # a row that keeps all tokens stays as it is to the last bit
        top_p = torch.where(top_k < vocabulary, top_p * probability.sum(dim=-1, keepdim=True), top_p)
    reached = probability.cumsum(dim=-1)
    kept = reached - probability < top_p  # the likeliest always stays
    if any(item.min_p for item in samplers):
        min_p = torch.tensor([[item.min_p] for item in samplers], dtype=torch.float64, device=device)
        kept &= probability >= min_p * probability[:, :1]
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


def scored(logits: Tensor, tokens: Sequence[int], count: int) -> list[Token]:
    """How likely each of `tokens` was by its row of logits [n, V] (float32), and the `count` likeliest there."""
    values = torch.log_softmax(logits, dim=-1)
    chosen = values.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    largest, ids = (side.tolist() for side in values.topk(count))
    return [
        Token(token, logprob=logprob, top=tuple(zip(ids[row], largest[row], strict=True)))
        for row, (token, logprob) in enumerate(zip(tokens, chosen, strict=True))
    ]


def _with_logprobs(logits: Tensor, token: int, count: int) -> Token:
    values = torch.log_softmax(logits, dim=-1)
    top: tuple[tuple[int, float], ...] = ()
    if count:
        largest, ids = values.topk(count)
        top = tuple(zip(ids.tolist(), largest.tolist(), strict=True))
    return Token(token, logprob=float(values[token]), top=top)
