"""Texts that run one at a time: models whose layers keep more than keys and values, or compute attention their own way.

Recurrent layers, latent attention and the like have caches of their own kind. Each text then has the cache that
transformers' generate would make for it, and each step is what generate does in one: so the tokens are generate's.
Planes are read once for each text, not once for a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...errors import BatchError
from ...models import input_device, vocabulary_size
from ...models.compat import cache_bytes, generation_inputs, generation_step
from ...nn import Assignment, bits_state
from ...progress import note
from .attention import Span
from .forward import PROBE, STEP_TOLERANCE, Forward
from .holding import hold, let_go
from .memory import TokenPool


class Passes(Protocol):
    """What runs batches through a model that it holds from `attach`, or `check`, to `detach`.

    splits: whether a prompt may be fed in parts. reason: why steps are not as fast as they could be, if they are not.
    """

    model: PreTrainedModel
    reason: str | None
    splits: bool

    def attach(self) -> None: ...

    def detach(self) -> None: ...

    def run(
        self, tokens: Sequence[Sequence[int]], spans: list[Span], bits: Sequence[Assignment], every: Sequence[bool] = ()
    ) -> Tensor: ...


class Alone:
    """Runs texts one after the other through `model`; what each has computed is in `pool.states`.

    reason: why they do not share passes.
    """

    def __init__(self, model: PreTrainedModel, pool: TokenPool, reason: str) -> None:
        self.model, self.pool = model, pool
        self.reason: str | None = reason
        self.splits = False
        pool.states.clear()

    def attach(self) -> None:
        """Raises UsageError for a model that is attached already."""
        hold(self.model)

    def detach(self) -> None:
        let_go(self.model)

    def run(
        self, tokens: Sequence[Sequence[int]], spans: list[Span], bits: Sequence[Assignment], every: Sequence[bool] = ()
    ) -> Tensor:
        """As Forward.run."""
        rows = []
        for part, span, choice, whole in zip(tokens, spans, bits, every or [False] * len(spans), strict=True):
            if span.past == 0:
                self.pool.states[span.start] = _Text(self.model)
            rows.append(self.pool.states[span.start].feed(part, choice, every=whole))
        return torch.cat(rows)

    def check(self) -> None:
        """Find out whether prompts can be fed in parts, and keep the model attached."""
        self.attach()
        state, size = bits_state(self.model), vocabulary_size(self.model.config)
        tokens, highest = [(step * 7) % size for step in range(PROBE)], state.resolve(None)
        with state.using(arithmetic="exact"):
            whole = _Text(self.model).feed(tokens, highest)
            text = _Text(self.model)
            text.feed(tokens[:7], highest)
            parts = text.feed(tokens[7:], highest)
        self.splits = bool((parts - whole).norm() <= STEP_TOLERANCE[self.model.dtype] * whole.norm())
        self.pool.kept_as = "whole" if self.splits else "nothing"


class _Text:
    """One text in a cache of the model's own kind."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._tokens: list[int] = []
        self._inputs: dict[str, Any] = {}
        self._outputs: Any = None

    def feed(self, tokens: Sequence[int], bits: Assignment, *, every: bool = False) -> Tensor:
        """Logits [1, V] float32 after `tokens`, which follow those that it was fed before; after `every` one [n, V]."""
        self._tokens += tokens
        ids = torch.tensor([self._tokens], device=input_device(self._model))
        if not self._inputs:
            self._inputs = generation_inputs(self._model, ids)
        before = self._inputs
        all_rows = {key: 0 for key in before if every and key == "logits_to_keep"}
        step = generation_step(self._model, ids, before | all_rows, self._outputs, len(tokens), bits=bits)
        self._outputs, inputs = step
        self._inputs = inputs | {key: before[key] for key in all_rows}
        logits: Tensor = self._outputs.logits[0, -len(tokens) if every else -1 :].float()
        self._outputs.logits = None
        return logits

    @property
    def bytes(self) -> int:
        """Of its cache."""
        return cache_bytes(self._inputs)


def passes(model: PreTrainedModel, pool: TokenPool) -> Passes:
    """What runs `model`: batches if it can run in them, else each text alone, with a note. It holds the model.

    Raises what Forward.check raises, BatchError only where `pool` keeps codes, and what the model itself raises.
    """
    forward = Forward(model, pool)
    made: Forward | Alone = forward
    try:
        try:
            forward.check()
        except BatchError as error:
            if pool.kv_cache_dtype != "auto":
                raise BatchError(
                    f"{error.message}; it then has a cache of its own, which cannot be kept in {pool.kv_cache_dtype}",
                    hint="leave kv_cache_dtype (--kv-cache-dtype) out",
                ) from error
            forward.detach()
            pool.clear()
            note(f"{error.message}; each text runs by itself, which is slower where several do")
            made = Alone(model, pool, error.message)
            made.check()
    except BaseException:
        made.detach()
        raise
    return made
