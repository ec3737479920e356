"""The true loss of a plan, and a sketch of how it moves the logits.

The loss is the mean KL divergence from a target to the model at that plan, over fixed windows of text,
nats a token. The target is another model (the original), or the model itself at its highest bits.

A small change d of the log-probabilities costs  KL = 1/2 sum_v p_v (d_v - sum_u p_u d_u)^2  at each
position, a squared length. So with

    s(plan) = the vector of  sqrt(p_v / 2n) (d_v - mean),  d = ln q_plan - ln p,  over n positions and tokens v

the loss is about |s(plan)|^2, and where layers act independently s of a plan is the sum of what each
layer adds: inner products between layers' vectors say which errors add up and which cancel. The
vectors are long, so a count sketch keeps SKETCH numbers of them; it is linear and keeps lengths of
sums to within sqrt(2 / SKETCH), 1.6 %. Of each position the TOP tokens likeliest in the target are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import CheckError
from ..metrics import Tally
from ..nn import Bits, bits_state, use_bits

TOKENS_PER_BATCH = 2048
SKETCH = 8192
TOP = 256
KEPT_BYTES = 1 << 30  # target logits that are kept; beyond, they are computed again for every plan


class Objective:
    """The loss of plans of `model` on `windows` (int64 [n, S]).

    Args:
        reference: the model to stay close to; `model` itself at its highest bits if None.
    """

    def __init__(self, model: PreTrainedModel, windows: Tensor, reference: PreTrainedModel | None = None) -> None:
        self.model, self.reference = model, reference
        self.highest = max(bits_state(model).supported)
        self._batches = windows.to(model.device).split(max(1, TOKENS_PER_BATCH // windows.shape[1]))
        self.positions = windows.shape[0] * (windows.shape[1] - 1)
        vocabulary = model.config.get_text_config().vocab_size
        self._keep = self.positions * vocabulary * model.dtype.itemsize <= KEPT_BYTES
        self._targets: dict[int, Tensor] = {}

    @torch.no_grad()
    def loss(self, plan: Bits) -> float:
        """KL divergence from the target to the model at `plan`, nats a token."""
        tally = Tally()
        for target, logits, following in self._run(plan):
            tally.add(logits, following, target)
        return _finite(tally, plan)

    @torch.no_grad()
    def measure(self, plan: Bits) -> tuple[float, Tensor]:
        """The loss and the sketch of s(plan), fp32 [SKETCH]."""
        tally = Tally()
        sketch = torch.zeros(SKETCH, dtype=torch.float64)
        for number, (target, logits, following) in enumerate(self._run(plan)):
            tally.add(logits, following, target)
            likely = torch.log_softmax(target.float(), -1).topk(min(TOP, target.shape[-1]), dim=-1)
            p = likely.values.exp()
            change = torch.log_softmax(logits.float(), -1).gather(-1, likely.indices) - likely.values
            change = change - (p * change).sum(-1, keepdim=True) / p.sum(-1, keepdim=True)
            entries = ((p / (2 * self.positions)).sqrt() * change).cpu().flatten()
            bucket, sign = _hashes(number, len(entries))
            sketch.index_add_(0, bucket, entries.double() * sign)
        return _finite(tally, plan), sketch.float()

    def _run(self, plan: Bits) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(target logits [s, vocab], logits at `plan` [s, vocab], tokens to predict [s]), a batch at a time."""
        for number, ids in enumerate(self._batches):
            target = self._target(number, ids)
            with use_bits(self.model, plan):
                yield target, _logits(self.model, ids), ids[:, 1:].flatten()

    def _target(self, number: int, ids: Tensor) -> Tensor:
        if number in self._targets:
            return self._targets[number]
        with use_bits(self.model, self.highest) if self.reference is None else nullcontext():
            target = _logits(self.reference or self.model, ids)
        if self._keep:
            self._targets[number] = target
        return target


def _finite(tally: Tally, plan: Bits) -> float:
    """The divergence. Raises CheckError if it is not a number."""
    loss = tally.result().kld
    if loss is None or not math.isfinite(loss):
        raise CheckError(
            f"the loss of {plan if isinstance(plan, int) else 'a plan'} is {loss}",
            hint="check the model with `bitstrata eval`; in 16 bits, activations may overflow",
        )
    return loss


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits [s, vocab] that predict every token but the first of each window."""
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits[:, :-1].flatten(0, 1)


def _hashes(number: int, count: int) -> tuple[Tensor, Tensor]:
    """Bucket and sign of each entry of batch `number`; always the same ones."""
    generator = torch.Generator().manual_seed(number)
    bucket = torch.randint(SKETCH, (count,), generator=generator)
    return bucket, torch.randint(2, (count,), generator=generator) * 2.0 - 1.0
