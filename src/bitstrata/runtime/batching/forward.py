"""One batch through a model: flat tokens, bits a token, keys and values in the pool.

Only public doors of transformers are used: the model's forward with `position_ids` and
`logits_to_keep`, `AttentionInterface`, and `set_attn_implementation` while the engine holds the model.
What an architecture makes of them is not taken on trust: `check` compares batches with the model's
own forward before the first request.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...errors import BitstrataError, ResourceError, UsageError
from ...memory import is_out_of_memory
from ...models import input_device
from ...models.compat import attention_of, can_change_attention
from ...nn import Bits, Precision, RowBits, bits_state
from .attention import NAME, FlatBatch, Span
from .memory import BLOCK, TokenPool

LAYER_TYPES = {"full_attention", "sliding_attention"}
PROBE = 12  # tokens; with a part of another sequence they stay within one kernel's few rows
# Between two ways of computing the same logits, relative to their norm. Activations in int8 turn a difference in
# rounding into one of half a step, so this is wide; a token that sees the wrong keys is off by tens of percent.
PROBE_TOLERANCE = 0.05


class Forward:
    """Runs batches through `model`, which belongs to it from `take` to `give_back`.

    gather: attention of requests that feed one token each in one call; on GPUs by default.
    """

    def __init__(self, model: PreTrainedModel, pool: TokenPool, gather: bool | None = None) -> None:
        self.model, self.pool = model, pool
        self._gather = model.device.type != "cpu" if gather is None else gather
        self._own_attention: str | None = None
        self._can_keep = "logits_to_keep" in inspect.signature(model.forward).parameters

    def take(self) -> None:
        """Switch the model's attention to batches; the model is known to allow it."""
        own = attention_of(self.model)
        self.model.set_attn_implementation(NAME)
        self._own_attention = own

    def _require_usable(self) -> None:
        """UsageError for a model that another engine holds, or whose layers are not plain attention."""
        own = attention_of(self.model)
        if own == NAME:
            raise UsageError("another engine holds this model", hint="close it first, or load the model once more")
        types = set(getattr(self.model.config.get_text_config(decoder=True), "layer_types", None) or ())
        if types - LAYER_TYPES:
            raise UsageError(f"layers of {', '.join(sorted(types - LAYER_TYPES))} cannot run in an engine's batches")
        if not can_change_attention(self.model):
            raise UsageError(f"{type(self.model).__name__} computes attention in its own way; batches cannot be run")

    def give_back(self) -> None:
        """The model is as it was before `take`."""
        if self._own_attention is not None:
            self.model.set_attn_implementation(self._own_attention)
            self._own_attention = None
        self.pool.clear()

    def run(self, tokens: Sequence[Sequence[int]], spans: list[Span], bits: Sequence[Precision]) -> Tensor:
        """Logits [spans, V] float32 after the last token of each span; each span's tokens run at its own bits."""
        device = input_device(self.model)
        positions = [span.past + step for span in spans for step in range(span.length)]
        starts = [span.start for span in spans for _ in range(span.length)]
        ids = torch.tensor([[token for part in tokens for token in part]], device=device)  # [1, T]
        position_ids = torch.tensor([positions], device=device)
        places = torch.tensor(starts, device=device) + position_ids[0]
        last = torch.tensor([span.length for span in spans], device=device).cumsum(0) - 1
        batch = FlatBatch(self.pool, spans, places, gather=self._gather)
        extra: dict[str, Any] = {"logits_to_keep": last} if self._can_keep else {}
        logits: Tensor = self.model(
            input_ids=ids,
            position_ids=position_ids,
            use_cache=False,
            bitstrata_batch=batch,
            bits=_row_bits(bits, [span.length for span in spans], device),
            **extra,
        ).logits[0]
        return (logits if self._can_keep else logits[last]).float()

    def check(self) -> None:
        """Compare batches with the model's own forward, and keep the model taken.

        Raises:
            UsageError: a model that another engine holds, or they differ: the architecture does something that
                batches here do not.
            ResourceError: there is no memory for it.
        """
        self._require_usable()
        try:
            with bits_state(self.model).still():
                self._check()
        except Exception as error:
            if isinstance(error, BitstrataError) or not is_out_of_memory(error):
                raise
            raise ResourceError(
                f"no memory to run {type(self.model).__name__} on {self.model.device}",
                hint="load it with fewer planes or with --fit, or lower cache_tokens (--cache-tokens)",
            ) from error

    def _check(self) -> None:
        state = bits_state(self.model)
        high, low = state.default, min(state.supported, default=state.default)
        vocabulary = self.model.config.get_text_config(decoder=True).vocab_size
        one, other = ([(step * stride) % vocabulary for step in range(PROBE)] for stride in (7, 11))
        expected = torch.stack([self._alone(one, high), self._alone(other[: PROBE - 3], low)])
        self.take()
        # sequences of unequal length at unequal bits, one of them in two parts
        ranges = [self.pool.reserve(BLOCK), self.pool.reserve(BLOCK)]
        try:
            first, second = (item.start for item in ranges if item is not None)
            together = [Span(first, 0, 7), Span(second, 0, PROBE - 3)]
            half = self.run([one[:7], other[: PROBE - 3]], together, [high, low])
            rest = self.run([one[7:]], [Span(first, 7, PROBE - 7)], [high])
        except BitstrataError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise UsageError(f"{type(self.model).__name__} cannot run in an engine's batches: {error!r}") from error
        finally:
            for item in ranges:
                if item is not None:
                    self.pool.release(item)
        measured = torch.stack([rest[0], half[1]])
        apart = float((measured - expected).norm() / expected.norm())
        if not apart <= PROBE_TOLERANCE:
            raise UsageError(
                f"{type(self.model).__name__} cannot run in an engine's batches: its logits there differ from its own "
                f"forward's by {apart:.1%}",
                hint="its attention or positions work in a way that the engine does not know",
            )

    def _alone(self, tokens: list[int], bits: Precision) -> Tensor:
        ids = torch.tensor([tokens], device=input_device(self.model))
        logits: Tensor = self.model(input_ids=ids, use_cache=False, bits=bits).logits
        return logits[0, -1].float()


def _row_bits(bits: Sequence[Precision], lengths: Sequence[int], device: torch.device) -> Bits:
    """What the model is told when `lengths[i]` rows run at bits[i]: the simplest form that says it.

    One precision for all is no tensor, and kernels have less to do.
    """
    choices: list[Precision] = []
    for value in bits:
        if value not in choices:
            choices.append(value)
    if len(choices) == 1:
        return choices[0]
    rows = [choices.index(value) for value, length in zip(bits, lengths, strict=True) for _ in range(length)]
    if all(isinstance(choice, int) for choice in choices):
        return torch.tensor([[choices[row] for row in rows]], dtype=torch.int8, device=device)
    return RowBits(tuple(choices), torch.tensor([rows], device=device))
