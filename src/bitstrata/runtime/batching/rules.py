"""What a request wants done to its logits before a token is picked: transformers' processors, and what they lack.

In this order: the model's own rules, repetition_penalty, presence and frequency penalties, biases, min_tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from .request import Request

Rules = Callable[[Tensor, Tensor], Tensor]  # as of Continuation


class ReplyPenalty(LogitsProcessor):
    """OpenAI's penalties, on the tokens of a reply: logit - presence - frequency * how often it came. [1, V]."""

    def __init__(self, prompt: int, presence: float, frequency: float) -> None:
        self._prompt, self._presence, self._frequency = prompt, presence, frequency

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens, counts = input_ids[0, self._prompt :].unique(return_counts=True)
        scores = scores.clone()
        scores[0, tokens] -= self._presence + self._frequency * counts.to(scores.dtype)
        return scores


def rules_of(
    request: Request, ends: Iterable[int], device: torch.device, own: LogitsProcessorList | None
) -> Rules | None:
    """The rules of `request`, called as those of `score_rules`; None if it has none.

    Args:
        ends: tokens that end it.
        own: what the model's generation config does.
    """
    rules: list[LogitsProcessor] = list(own or ())
    prompt = len(request.prompt_ids)
    if request.repetition_penalty != 1:
        rules.append(RepetitionPenaltyLogitsProcessor(float(request.repetition_penalty)))
    if request.presence_penalty or request.frequency_penalty:
        rules.append(ReplyPenalty(prompt, request.presence_penalty, request.frequency_penalty))
    biases: list[list[Any]] = [[[token], float(bias)] for token, bias in request.logit_bias.items() if bias]
    if biases:
        rules.append(SequenceBiasLogitsProcessor(biases))
    if request.min_tokens and (ends := sorted(ends)):
        rules.append(MinNewTokensLengthLogitsProcessor(prompt, request.min_tokens, ends, device=str(device)))
    return cast(Rules, LogitsProcessorList(rules)) if rules else None
