"""One batch through a model: flat tokens, bits a token, keys and values in the pool.

The model's forward gets `position_ids` and `logits_to_keep`, and attention is ours (`AttentionInterface`) while the
engine holds the model. What an architecture makes of that is not taken on trust: `check` compares batches with the
model's own forward before the first request.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...errors import BatchError, BitstrataError, ResourceError
from ...kernels.cpu.blocked import FEW_ROWS
from ...kernels.cpu.extension import native
from ...memory import is_out_of_memory
from ...models import input_device, vocabulary_size
from ...models.compat import attention_of, can_change_attention
from ...nn import Assignment, bits_state, together
from ...nn import steady_rows as kernels_steady_rows
from ...progress import note
from .attention import NAME, AttentionCall, FlatBatch, Span
from .graph import GraphStep
from .holding import hold, let_go, require_free
from .memory import BLOCK, TokenPool
from .native import NativeStep, Seen, UnfitError, watching

LAYER_TYPES = {"full_attention", "sliding_attention"}
PROBE = 12  # tokens; with a part of another sequence they stay within one kernel's few rows
# Between two ways of computing the same logits, relative to their norm. Wide, because int8 activations turn a
# difference in rounding into half a step; a token that sees the wrong keys is off by tens of percent.
PROBE_TOLERANCE = 0.05
# Of what a block adds, and of the logits, in the native step, which keeps in float32 what modules round to the model's
# dtype; both in exact arithmetic.
STEP_TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 0.02}

T = TypeVar("T")


def steady_rows(model: PreTrainedModel) -> int | None:
    """Tokens up to which a batch computes each as if it were alone; None for any number.

    The native step keeps in float32 what modules round, so what it can take must not share a batch with more.
    """
    limit = kernels_steady_rows(model, model.dtype)
    if native is None or model.device.type != "cpu":
        return limit
    return FEW_ROWS if limit is None else min(limit, FEW_ROWS)


def _token_by_token(
    tokens: Sequence[Sequence[int]], spans: Sequence[Span], bits: Sequence[Assignment], every: Sequence[bool]
) -> tuple[list[Sequence[int]], list[Span], list[Assignment]]:
    """The same batch with a span for each token of those `every` of whose tokens counts."""
    parts: list[tuple[Sequence[int], Span, Assignment]] = []
    for part, span, one, whole in zip(tokens, spans, bits, every, strict=True):
        if whole:
            parts += [([token], Span(span.start, span.past + step, 1), one) for step, token in enumerate(part)]
        else:
            parts.append((part, span, one))
    return [part for part, _, _ in parts], [span for _, span, _ in parts], [one for _, _, one in parts]


class Forward:
    """Runs batches through `model`, which belongs to it from `attach` to `detach`.

    gather: attention of requests that feed one token each in one call; on GPUs by default.
    """

    splits = True  # a prompt may be fed in parts

    def __init__(self, model: PreTrainedModel, pool: TokenPool, gather: bool | None = None) -> None:
        self.model, self.pool = model, pool
        self._state = bits_state(model)
        self._gather = model.device.type != "cpu" if gather is None else gather
        self._own_attention: str | None = None
        self._can_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._calls: dict[int, AttentionCall] | None = None
        self._step: NativeStep | GraphStep | None = None
        self.reason: str | None = None  # why steps go through the model's modules

    def attach(self) -> None:
        """Switch the model's attention to batches; the model is known to allow it.

        Raises UsageError for a model that is attached already.
        """
        hold(self.model)
        self._own_attention = attention_of(self.model)
        self.model.set_attn_implementation(NAME)

    def detach(self) -> None:
        """The model's attention is as it was before `attach`; the pool keeps what it holds."""
        if self._own_attention is not None:
            self.model.set_attn_implementation(self._own_attention)
            self._own_attention = None
            let_go(self.model)

    def run(
        self,
        tokens: Sequence[Sequence[int]],
        spans: list[Span],
        bits: Sequence[Assignment],
        every: Sequence[bool] = (),
    ) -> Tensor:
        """Logits [rows, V] float32 after the last token of each span; each span's tokens run at its own bits.

        every: of which spans a row for each of their tokens is wanted; of none if it is empty.
        """
        if self._step is not None and self._step.fits(sum(span.length for span in spans)):
            if any(every):
                tokens, spans, bits = _token_by_token(tokens, spans, bits, every)
            try:
                with self._state.step(together(bits, [span.length for span in spans])):
                    if not self._step.is_current:
                        assert self._calls is not None
                        self._step = type(self._step)(self.model, self.pool, self._calls)
                    return self._step.run(tokens, spans, bits)
            except UnfitError as error:
                self._go_without_step(str(error))
        return self._through_modules(tokens, spans, bits, every)

    def _go_without_step(self, reason: str) -> None:
        self._step, self.reason = None, reason
        what = "native call" if self.model.device.type == "cpu" else "graph"
        kind = type(self.model).__name__
        note(f"{kind} makes its tokens by its modules, not in one {what}, which is slower: {reason}")

    def _through_modules(
        self,
        tokens: Sequence[Sequence[int]],
        spans: list[Span],
        bits: Sequence[Assignment],
        every: Sequence[bool] = (),
    ) -> Tensor:
        device = input_device(self.model)
        positions = [span.past + step for span in spans for step in range(span.length)]
        starts = [span.start for span in spans for _ in range(span.length)]
        ids = torch.tensor([[token for part in tokens for token in part]], device=device)  # [1, T]
        position_ids = torch.tensor([positions], device=device)
        places = torch.tensor(starts, device=device) + position_ids[0]
        ends = list(itertools.accumulate(span.length for span in spans))
        kept = [
            row
            for span, end, whole in zip(spans, ends, every or [False] * len(spans), strict=True)
            for row in range(end - span.length if whole else end - 1, end)
        ]
        last = torch.tensor(kept, device=device)
        batch = FlatBatch(self.pool, spans, places, gather=self._gather, calls=self._calls)
        extra: dict[str, Any] = {"logits_to_keep": last} if self._can_keep else {}
        logits: Tensor = self.model(
            input_ids=ids,
            position_ids=position_ids,
            use_cache=False,
            bitstrata_batch=batch,
            bits=together(bits, [span.length for span in spans]),
            **extra,
        ).logits[0]
        return (logits if self._can_keep else logits[last]).float()

    def check(self) -> None:
        """Compare batches with the model's own forward, and keep the model attached.

        Raises:
            UsageError: a model that is attached already; BatchError, one of them, for an architecture that does
                something that batches here do not.
            ResourceError: there is no memory for it.
        """
        self._require_plain_attention()
        whole, small = self.pool, TokenPool(2 * BLOCK)  # which keeps what the model computes as it is
        self.pool = small
        try:
            self._check()
            whole.make_as(small)
        finally:
            self.pool = whole
            small.clear()  # a step that was made for it is not current
        if self._step is not None:
            try:
                self._step.use(whole)
            except UnfitError as error:
                self._go_without_step(str(error))

    def _check(self) -> None:
        try:
            with bits_state(self.model).step():
                apart = self._difference()
        except BitstrataError:
            raise
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise ResourceError(
                f"no memory to run {type(self.model).__name__} on {self.model.device}",
                hint="load it with fewer planes or with --fit, or lower cache_tokens (--cache-tokens)",
            ) from error
        if not apart <= PROBE_TOLERANCE:
            raise BatchError(
                f"{type(self.model).__name__} cannot run in an engine's batches: its logits there differ from its own "
                f"forward's by {apart:.1%}",
                hint="its attention or positions work in a way that the engine does not know",
            )
        reason = None
        if self.model.device.type == "cuda":
            self._step, reason = self._find_graph()
        elif native is not None and self.model.device.type == "cpu":
            self._step, reason = self._find_native()
        if reason is not None:
            self._go_without_step(reason)

    def _find_native(self) -> tuple[NativeStep | None, str | None]:
        """The native step if it knows the model and computes what the modules do; else why not."""
        assert self._calls is not None
        try:
            step = NativeStep(self.model, self.pool, self._calls)
            with self._state.using(arithmetic="exact"):
                apart = max(self._probe(partial(self._distance, step)))
        except UnfitError as error:
            return None, str(error)
        except Exception as error:  # a part that is called in a way of its own, say
            if is_out_of_memory(error):
                raise
            return None, f"looking at its parts ends with {error!r}"
        if apart <= STEP_TOLERANCE[self.model.dtype]:
            return step, None
        return None, f"a block or the logits differ from those of the modules by {apart:.1%}"

    def _find_graph(self) -> tuple[GraphStep | None, str | None]:
        """The same of the step as a graph."""
        assert self._calls is not None
        try:
            step = GraphStep(self.model, self.pool, self._calls)
            expected = torch.cat(self._probe(self._through_modules))
            with self._state.step():
                found = torch.cat(self._probe(step.run))
        except UnfitError as error:
            return None, str(error)
        apart = float(((found - expected).norm() / expected.norm()).nan_to_num(torch.inf))
        tolerance = STEP_TOLERANCE[torch.float32] if self.model.dtype == torch.float32 else PROBE_TOLERANCE
        return (step, None) if apart <= tolerance else (None, f"its logits differ from the modules' by {apart:.1%}")

    def _distance(self, step: NativeStep, tokens: list[list[int]], spans: list[Span], bits: list[Assignment]) -> float:
        seen = Seen([], [], torch.empty(0), self.model.dtype)
        with watching(self.model, seen):
            seen.logits = self._through_modules(tokens, spans, bits)
        with self._state.step():
            return step.distance(seen, spans, bits)

    def _require_plain_attention(self) -> None:
        require_free(self.model)
        types = set(getattr(self.model.config.get_text_config(decoder=True), "layer_types", None) or ())
        if types - LAYER_TYPES:
            raise BatchError(f"layers of {', '.join(sorted(types - LAYER_TYPES))} cannot run in an engine's batches")
        if not can_change_attention(self.model):
            raise BatchError(f"{type(self.model).__name__} computes attention in its own way; batches cannot be run")

    def _difference(self) -> float:
        """Of the logits of two sequences in batches from the model's own, relative to their norm."""
        one, other, high, low = self._sequences()
        expected = torch.stack([self._alone(one, high), self._alone(other, low)])
        self.attach()
        self._calls = {}
        try:
            half, rest = self._probe(self._through_modules)
        except Exception as error:
            if isinstance(error, BitstrataError) or is_out_of_memory(error):
                raise
            raise BatchError(f"{type(self.model).__name__} cannot run in an engine's batches: {error!r}") from error
        return float((torch.stack([rest[0], half[1]]) - expected).norm() / expected.norm())

    def _probe(self, run: Callable[[list[list[int]], list[Span], list[Assignment]], T]) -> tuple[T, T]:
        """What `run` makes of two batches: sequences of unequal length at unequal bits, and the rest of one of them."""
        one, other, high, low = self._sequences()
        first, second = self.pool.reserve(BLOCK), self.pool.reserve(BLOCK)
        assert first is not None
        assert second is not None
        try:
            half = run([one[:7], other], [Span(first.start, 0, 7), Span(second.start, 0, len(other))], [high, low])
            return half, run([one[7:]], [Span(first.start, 7, PROBE - 7)], [high])
        finally:
            self.pool.release(first)
            self.pool.release(second)

    def _sequences(self) -> tuple[list[int], list[int], Assignment, Assignment]:
        """Two sequences to compare with, and their bits."""
        state, size = self._state, vocabulary_size(self.model.config)
        one, other = ([(step * stride) % size for step in range(PROBE)] for stride in (7, 11))
        return one, other[:-3], state.resolve(None), state.resolve(min(state.supported, default=None))

    def _alone(self, tokens: list[int], bits: Assignment) -> Tensor:
        ids = torch.tensor([tokens], device=input_device(self.model))
        logits: Tensor = self.model(input_ids=ids, use_cache=False, bits=bits).logits
        return logits[0, -1].float()
