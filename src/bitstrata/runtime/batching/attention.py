"""Attention for a flat batch: tokens of many requests in a row, each seeing its own past and no other's.

transformers hands the queries, keys and values of all tokens [1, H, T, D] of a layer to `attend`, with the keyword
`bitstrata_batch` that the engine gave to the model's forward. It puts keys and values into the pool and attends request
by request, which on a CPU is the very arithmetic of a request alone. On a GPU, where many small kernels cost more than
the work in them, requests that feed one token each are gathered and padded to one call.

Heads that share keys are rows of one query against them, as in models/attention.py, so keys are never repeated.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from ...errors import BatchError
from .memory import TokenPool
from .stored import Stored

NAME = "bitstrata_batch"
# what some architectures want of attention beyond keys, queries, values, a scale and a window
UNKNOWN = ("position_bias", "s_aux", "head_mask")


@dataclass(frozen=True)
class Span:
    """A segment in a batch: `length` tokens after the `past` ones of the range that starts at `start` of the pool."""

    start: int
    past: int
    length: int


@dataclass(frozen=True)
class AttentionCall:
    """How a layer calls attention. unknown: what it asks for beyond the rest."""

    key_heads: int
    width: int
    scale: float | None
    window: int | None
    softcap: float | None
    unknown: tuple[str, ...]


@dataclass
class FlatBatch:
    """What attention needs to know of a batch. places: where in the pool each of its T tokens goes, int64 [T].

    calls: where it notes how each layer called attention, if given.
    """

    pool: TokenPool
    spans: list[Span]
    places: Tensor
    gather: bool  # requests with one token each in one call
    calls: dict[int, AttentionCall] | None = None
    padded: dict[int | None, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def padding(self, window: int | None) -> tuple[Tensor, Tensor]:
        """For one token a span: places in the pool of what each sees [R, S], and which are real [R, 1, 1, S]."""
        if window not in self.padded:
            device = self.places.device
            end = torch.tensor([span.start + span.past + 1 for span in self.spans], device=device)
            seen = [span.past + 1 if window is None else min(window, span.past + 1) for span in self.spans]
            back = torch.arange(max(seen), 0, -1, device=device)  # how far before the end: the last columns are real
            real = back <= torch.tensor(seen, device=device)[:, None]
            self.padded[window] = (end[:, None] - back).clamp_(min=0), real[:, None, None, :]
        return self.padded[window]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    bitstrata_batch: FlatBatch | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [1, H, T, D], key and value [1, H / groups, T, D] of a flat batch -> [1, T, H, D].

    Raises BatchError outside of Forward's own calls, and for attention that is more than softmax within a window.
    """
    batch = bitstrata_batch
    if batch is None:
        raise BatchError(
            "this model is run by an Engine or a call to generate, or its architecture does not pass keywords on to "
            "attention",
            hint="submit requests to the engine, or use the model directly once it is closed",
        )
    wanted = tuple(name for name in UNKNOWN if kwargs.get(name) is not None)
    if wanted or attention_mask is not None:
        what = ", ".join(wanted) or "a mask of its own"
        raise BatchError(f"attention with {what} cannot run in an engine's batches")
    if batch.calls is not None:
        shape = key.shape[1], key.shape[3]
        batch.calls[int(module.layer_idx)] = AttentionCall(*shape, scaling, sliding_window, softcap, wanted)  # type: ignore[arg-type]
    keys, values = batch.pool.write(module.layer_idx, batch.places, key[0], value[0])  # type: ignore[arg-type]
    if batch.gather and len(batch.spans) > 1 and all(span.length == 1 for span in batch.spans):
        return _together(query, keys, values, batch.padding(sliding_window), scaling, softcap), None
    parts = query.split([span.length for span in batch.spans], dim=2)
    each = zip(parts, batch.spans, strict=True)
    return torch.cat(
        [_one(part, keys, values, span, sliding_window, scaling, softcap) for part, span in each], dim=1
    ), None


def _one(
    query: Tensor,
    keys: Stored,
    values: Stored,
    span: Span,
    window: int | None,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """query [1, H, n, D] of one span -> [1, n, H, D']."""
    total = span.past + span.length
    skipped = 0 if window is None else max(0, span.past + 1 - window)  # seen by none of its tokens
    seen = slice(span.start + skipped, span.start + total)
    k, v = keys.read(seen)[None], values.read(seen)[None]  # [1, Hkv, S, D]
    heads, n = query.shape[1], span.length
    groups = heads // k.shape[1]
    if n > 1 and span.past == 0 and (window is None or total <= window) and softcap is None:
        out = nn.functional.scaled_dot_product_attention(
            query, k, v, is_causal=True, scale=scaling, enable_gqa=groups > 1
        )
        return out.transpose(1, 2)
    mask = None
    if n > 1:
        places = torch.arange(total, device=query.device)
        behind = places[span.past :, None] - places[skipped:]
        mask = behind >= 0 if window is None else (behind >= 0) & (behind < window)  # [n, S]
        mask = mask.repeat(groups, 1)
    rows = query.reshape(1, k.shape[1], groups * n, query.shape[3])
    out = _softmax(rows, k, v, mask, scaling, softcap)
    return out.reshape(1, heads, n, out.shape[3]).transpose(1, 2)


def _together(
    query: Tensor,
    keys: Stored,
    values: Stored,
    padding: tuple[Tensor, Tensor],
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """query [1, H, R, D], one token of each of R spans -> [1, R, H, D']."""
    places, real = padding
    k, v = keys.read(places).transpose(0, 1), values.read(places).transpose(0, 1)  # [R, Hkv, S, D]
    _, heads, rows, width = query.shape
    grouped = query[0].transpose(0, 1).reshape(rows, k.shape[1], heads // k.shape[1], width)
    out = _softmax(grouped, k, v, real, scaling, softcap)
    return out.reshape(1, rows, heads, out.shape[3])


def _softmax(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, softcap: float | None
) -> Tensor:
    """softmax(q k^T * scaling) v, scores bounded by softcap * tanh(score / softcap) where there is one."""
    if softcap is None:
        return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ value


AttentionInterface.register(NAME, attend)
