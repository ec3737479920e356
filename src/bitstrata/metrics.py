"""Loss of a model and its distance from a reference model, from streamed logits.

    nll       mean over tokens of -ln q(target), nats a token
    kld       mean over positions of KL(p || q) = sum_v p(v) (ln p(v) - ln q(v)), p the reference
    top1      share of positions where both rank the same token first
    ln ratio  mean over tokens of ln p(target) - ln q(target), the logarithm of the ratio of both perplexities
    dp        q(target) - p(target); its root mean square

Logits are turned into log-probabilities in fp32; what is kept of a position are four numbers, summed in float64.

An error is the standard error of a mean x over n tokens, sqrt(sum (x_i - x)^2 / (n - 1) / n), carried to a function of
the mean by its derivative: exp(x) for perplexity, sqrt(x) for a root mean square. It takes tokens for independent, as
everybody does who prints it. Quantiles lie between neighbouring values of the sorted ones, linearly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

LOGITS = 1 << 22  # logits worked on at a time; bounds the temporaries

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Spread:
    """How the distance from the reference is spread over tokens, and the errors of its means, None of one token."""

    kld_error: float | None
    kld_median: float
    kld_p99: float
    kld_p999: float
    kld_max: float
    top1_error: float | None
    ln_ratio: float
    ln_ratio_error: float | None
    rms_dp: float
    rms_dp_error: float | None


@dataclass(frozen=True)
class Metrics:
    """Means over `tokens` predicted tokens; kld, top1_agreement and spread are None without a reference."""

    tokens: int
    nll: float
    kld: float | None
    top1_agreement: float | None
    nll_error: float | None = None
    spread: Spread | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll) if self.nll < 700 else math.inf

    @property
    def perplexity_error(self) -> float | None:
        return None if self.nll_error is None else self.perplexity * self.nll_error


class Tally:
    """What is measured of one model, token by token."""

    def __init__(self) -> None:
        self.tokens = 0
        self._nll: list[Tensor] = []  # float64 [s] each, on the CPU, as those below
        self._kld: list[Tensor] = []
        self._reference: list[Tensor] = []  # the nll of the reference
        self._agree: list[Tensor] = []

    def add(self, logits: Tensor, targets: Tensor, reference: Tensor | None = None) -> None:
        """Add a stretch: logits [s, vocab], targets int64 [s], the reference's logits [s, vocab]."""
        self.tokens += len(targets)
        step = max(1, LOGITS // logits.shape[-1])
        for start in range(0, len(targets), step):
            rows = slice(start, start + step)
            log_q = torch.log_softmax(logits[rows].float(), dim=-1)
            self._nll.append(-_chosen(log_q, targets[rows]))
            if reference is not None:
                log_p = torch.log_softmax(reference[rows].float(), dim=-1)
                self._kld.append((log_p.exp() * (log_p - log_q)).sum(-1, dtype=torch.float64).cpu())
                self._reference.append(-_chosen(log_p, targets[rows]))
                self._agree.append((log_p.argmax(-1) == log_q.argmax(-1)).double().cpu())

    @np.errstate(all="ignore")  # of infinite losses, whose spread is not a number
    def result(self) -> Metrics:
        """The measures of all that was added."""
        if not self.tokens:
            return Metrics(0, 0.0, None, None)
        nll = _joined(self._nll)
        if not self._kld:
            return Metrics(self.tokens, float(nll.mean()), None, None, _error(nll))
        kld, agree = _joined(self._kld), _joined(self._agree)
        return Metrics(
            self.tokens,
            float(nll.mean()),
            max(float(kld.mean()), 0.0),  # in this order NaN stays NaN
            float(agree.mean()),
            _error(nll),
            _spread(nll, kld, agree, _joined(self._reference)),
        )


def _spread(nll: Floats, kld: Floats, agree: Floats, reference: Floats) -> Spread:
    ratio, squares = nll - reference, (np.exp(-nll) - np.exp(-reference)) ** 2
    median, p99, p999 = np.quantile(kld, [0.5, 0.99, 0.999])
    rms, error = math.sqrt(squares.mean()), _error(squares)
    return Spread(
        kld_error=_error(kld),
        kld_median=float(median),
        kld_p99=float(p99),
        kld_p999=float(p999),
        kld_max=float(kld.max()),
        top1_error=_error(agree),
        ln_ratio=float(ratio.mean()),
        ln_ratio_error=_error(ratio),
        rms_dp=rms,
        rms_dp_error=None if error is None else error / (2 * rms) if rms else 0.0,
    )


def _chosen(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    """Of [s, vocab] what stands at `targets`, float64 [s] on the CPU."""
    return log_probabilities.gather(1, targets.unsqueeze(1)).squeeze(1).double().cpu()


def _joined(parts: list[Tensor]) -> Floats:
    values: Floats = torch.cat(parts).numpy()
    return values


def _error(values: Floats) -> float | None:
    """The standard error of the mean."""
    return None if len(values) < 2 else float(values.std(ddof=1) / math.sqrt(len(values)))
