"""Loss of a model and its distance from a reference model, summed over streamed logits.

    nll    mean over tokens of -ln q(target), nats a token
    kld    mean over positions of KL(p || q) = sum_v p(v) (ln p(v) - ln q(v)), p the reference
    top1   share of positions where both rank the same token first

Logits are turned into log-probabilities in fp32 and summed in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LOGITS = 1 << 22  # logits worked on at a time; bounds the temporaries


@dataclass(frozen=True)
class Metrics:
    """Means over `tokens` predicted tokens; kld and top1_agreement are None without a reference."""

    tokens: int
    nll: float
    kld: float | None
    top1_agreement: float | None

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll) if self.nll < 700 else math.inf


class Tally:
    """Running sums for one model."""

    def __init__(self) -> None:
        self.tokens = 0
        self._nll = self._kld = 0.0
        self._agree = 0
        self._compared = False

    def add(self, logits: Tensor, targets: Tensor, reference: Tensor | None = None) -> None:
        """Add a stretch: logits [s, vocab], targets int64 [s], the reference's logits [s, vocab]."""
        self._compared = self._compared or reference is not None
        self.tokens += len(targets)
        step = max(1, LOGITS // logits.shape[-1])
        for start in range(0, len(targets), step):
            rows = slice(start, start + step)
            log_q = torch.log_softmax(logits[rows].float(), dim=-1)
            self._nll -= float(log_q.gather(1, targets[rows].unsqueeze(1)).sum(dtype=torch.float64))
            if reference is not None:
                log_p = torch.log_softmax(reference[rows].float(), dim=-1)
                self._kld += float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
                self._agree += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())

    def result(self) -> Metrics:
        tokens = max(1, self.tokens)
        return Metrics(
            self.tokens,
            self._nll / tokens,
            max(self._kld / tokens, 0.0) if self._compared else None,  # in this order NaN stays NaN
            self._agree / tokens if self._compared else None,
        )
