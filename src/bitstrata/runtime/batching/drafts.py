"""Self-speculation in a cache of our own: drafts at few bits, checked in one pass at the bits of the text.

The mathematics is that of models/speculation.py. Drafts write keys and values into the places after those of the text;
the pass that checks them writes over these, and what was not accepted is simply not counted.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...errors import CheckError
from ...models import DraftLength, Speculation, accept
from ...nn import Assignment, bits_state
from .alone import Passes
from .attention import Span
from .continuation import Continuation, ruled
from .sampling import Sampler, likeliest_first, place_of


class Drafts:
    """Drafts for one text at `bits`, as `speculation` wants them and where it counts them.

    Raises UnsupportedBitsError and UsageError as Speculation.check.
    """

    def __init__(self, model: PreTrainedModel, speculation: Speculation, bits: Assignment) -> None:
        state = bits_state(model)
        speculation.check(state, bits.given)
        self.speculation = speculation
        self._length = DraftLength.of(model, speculation, bits.given)
        self._bits = state.resolve(speculation.draft_bits)

    def most(self, item: Continuation, steady: int | None) -> int:
        """How many tokens to draft now: none that could not be used, and no more than computes as one row does."""
        left = item.most - len(item.new) - 1
        return max(0, min(self._length.next(), left, left if steady is None else steady - 1))

    def cycle(self, forward: Passes, item: Continuation, bits: Assignment, count: int) -> list[int]:
        """The next tokens, one at least; they are not added to `item`, but all except the last are in the cache.

        Raises CheckError if the model's logits are not finite.
        """
        assert item.place is not None
        start, past, sampler = item.place.start, item.past, item.sampler
        drafts: list[int] = []
        guesses: list[Tensor] = []
        for index in range(count):
            tokens = [*item.tokens, *drafts]
            logits = forward.run([tokens[-1:]], [Span(start, past + index, 1)], [self._bits])
            guesses.append(_weighed(ruled(logits, item, tokens), sampler))
            drafts.append(_draw(guesses[-1], sampler))
        fed = [item.tokens[-1], *drafts]
        spans = [Span(start, past + index, 1) for index in range(count + 1)]  # each sees those before it
        logits = forward.run([[token] for token in fed], spans, [bits] * (count + 1))
        wanted = [
            _weighed(ruled(row, item, [*item.tokens, *drafts[:index]]), sampler)
            for index, row in enumerate(logits.split(1))
        ]
        sampled = guesses if sampler.temperature > 0 else None
        accepted, last = accept(drafts, sampled, wanted, lambda one: _draw(one, sampler), sampler.random.random)
        self._length.learn(count, accepted)
        self.speculation.count(count, accepted)
        item.written += [bits.choices[0]] * (1 + accepted)
        return [*drafts[:accepted], last]


def _weighed(logits: Tensor, sampler: Sampler) -> Tensor:
    """What a token is drawn from, [V], for logits [1, V]: probabilities, or the logits if the likeliest is taken."""
    if not bool(logits.amax().isfinite()):
        raise CheckError("the model's logits are not finite", hint="try more bits or another dtype")
    if sampler.temperature == 0:
        return logits[0]
    probability, order = likeliest_first(logits, [sampler])
    return torch.zeros_like(probability).scatter_(1, order, probability / probability.sum())[0]


def _draw(weights: Tensor, sampler: Sampler) -> int:
    if sampler.temperature == 0:
        return int(weights.argmax())
    uniform = torch.tensor([[sampler.random.random()]], dtype=torch.float64, device=weights.device)
    return int(place_of(weights[None], uniform))
